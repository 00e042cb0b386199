from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.failure import LONGEST_MESSAGE, clean
from mgpu.backends.vllm_failure import LINES_READ, diagnose

from . import recorded_vllm as recorded

READY = "INFO:     Application startup complete."
LOADING = "(Worker_TP0 pid=7) INFO 01-01 00:00:00 [gpu_model_runner.py:68] Starting to load model /m..."
ENDED = [
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    "/usr/lib/python3.12/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1",
]


def worker(text: str, number: int = 1) -> str:
    return f"(Worker_TP{number} pid=9) ERROR 01-01 00:00:00 [multiproc_executor.py:953] {text}"


@pytest.mark.parametrize(
    ("log", "status", "code", "message", "hint"),
    [
        ("fail_flag", 2, "bad-flag", "does not know the option --no-such-flag", "--help=all"),
        ("fail_port", 1, "port-in-use", "port is taken", "--port"),
        ("fail_missing_path", 1, "model-missing", "/srv/vllm/nope does not exist", "path"),
        ("fail_missing_hub_offline", 1, "model-missing", "downloads are switched off", "HF_HUB_OFFLINE"),
        ("fail_missing_hub_online", 1, "model-missing", "https://huggingface.co cannot be reached", "network"),
        ("fail_empty_dir", 1, "model-missing", "empty holds no model", "config.json"),
        ("fail_tp3", 1, "split-unsupported", "8 attention heads cannot be dealt to 3 cards", "mgpu plan"),
        ("fail_maxlen", 1, "bad-value", "a context of 100000 tokens is more than the model's 2048", "--ctx 2048"),
        ("fail_kv", 1, "out-of-memory", "KV cache holds 896 tokens, but one request may have 2048", "--ctx 896"),
        ("fail_kvhuge", 1, "host-out-of-memory", "500.0 GiB asked for the KV cache, 21.47 GiB", "--ctx"),
        ("fail_kvspace_empty", 1, "exited", "loading weights: ValueError: invalid literal for int()", "log"),
        ("fail_trunc", 1, "model-corrupt", "cut short or damaged: Error while deserializing header", "fetch it again"),
        ("fail_pp5", 1, "split-unsupported", "more pipeline stages than layers", "mgpu plan"),
        ("tp2_auto", 1, "bad-value", "cannot deal the CPU's cores to 2 workers", "VLLM_CPU_OMP_THREADS_BIND"),
        ("tp2_ray", 1, "bad-value", "does not run on Ray", "ray"),
        ("pp2", 0, "split-unsupported", "cannot run a pipeline without compiling", "--enforce-eager"),
        ("sig_kill_enginecore_idle", 0, "crashed", "its engine core died", "log"),
        ("sig_kill_worker1_idle", 0, "killed", "worker VllmWorker-1 was killed (SIGKILL)", "Out of memory"),
        ("sig_kill_worker1_inflight", 0, "killed", "worker VllmWorker-1 was killed (SIGKILL)", "Out of memory"),
        ("sig_serve_kill_idle", -9, "killed", "vLLM was killed (SIGKILL) while serving", "Out of memory"),
        ("sig_serve_term_drain30", 0, "stopped", "asked to stop from outside", None),
        ("sig_load_term_2s", -15, "stopped", "stopped by SIGTERM from outside while starting", None),
        ("sig_load_term_every_1s", -15, "stopped", "asked to stop from outside while it started", None),
        ("sig_load_int_group", -2, "stopped", "asked to stop from outside while it started", None),
        ("sig_load_term_group", -9, "killed", "SIGKILL) while starting workers", None),
        ("tp2", None, "stopped", "asked to stop from outside", None),
        ("sig_load_term_2s", None, "exited", "its exit status unknown while starting", None),
    ],
)
def test_a_recorded_end_is_named(log: str, status: int | None, code: str, message: str, hint: str | None) -> None:
    failure = diagnose(recorded.lines(log), status)
    assert failure.code == code
    assert message in failure.message
    assert len(failure.message) <= LONGEST_MESSAGE
    assert hint is None or hint in (failure.hint or "")
    if failure.line_number is not None:
        assert (failure.line or "")[:40] in clean(recorded.lines(log)[failure.line_number - 1])


@pytest.mark.parametrize("log", ["fail_kv", "fail_tp3", "fail_trunc", "fail_maxlen", "fail_pp5", "tp2_auto"])
def test_what_would_fail_again_is_called_so(log: str) -> None:
    assert diagnose(recorded.lines(log), 1).deterministic


@pytest.mark.parametrize("log", ["fail_missing_hub_online", "sig_kill_worker1_idle", "sig_kill_enginecore_idle"])
def test_what_may_go_well_the_next_time_is_not(log: str) -> None:
    assert not diagnose(recorded.lines(log), 1).deterministic


def test_a_refused_allocation_says_where_for_what_and_how_much() -> None:
    failure = diagnose(recorded.lines("fail_kvhuge"), 1)
    assert (failure.device, failure.part, failure.wanted_bytes) == ("host", "kv", 500 << 30)


@pytest.mark.parametrize(
    ("lines", "code", "device", "part", "message"),
    [
        pytest.param(
            [
                LOADING,
                worker(
                    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total "
                    "capacity of 23.52 GiB of which 1.19 GiB is free. Process 12 has 22.33 GiB memory in use."
                ),
            ],
            "out-of-memory",
            "CUDA1",
            "weights",
            "out of memory on CUDA1: 2.00 GiB asked for the weights",
            id="a card too small for the weights",
        ),
        pytest.param(
            [
                worker(
                    "ValueError: Free memory on device cuda:1 (10.21/23.52 GiB) on startup is less than desired GPU "
                    "memory utilization (0.9, 21.17 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
                    "other processes."
                )
            ],
            "out-of-memory",
            "CUDA1",
            "weights",
            "CUDA1 has 10.21 of 23.52 GiB free, and vLLM was to take 21.17",
            id="a card that others use",
        ),
        pytest.param(
            [worker("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")],
            "out-of-memory",
            None,
            "kv",
            "the weights leave no memory for a KV cache",
            id="no memory left for the KV cache",
        ),
        pytest.param(
            [
                "    raise ValueError(",
                "ValueError: Couldn't instantiate the backend tokenizer from one of: ",
                "(1) a `tokenizers` library serialization file, ",
                "You need to have sentencepiece or tiktoken installed to convert a slow tokenizer to a fast one.",
            ],
            "model-missing",
            None,
            None,
            "holds no tokenizer",
            id="a folder without a tokenizer",
        ),
        pytest.param(
            [worker("ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported arch")],
            "architecture-unknown",
            None,
            None,
            "does not know the model architecture 'FooForCausalLM'",
            id="a new architecture",
        ),
        pytest.param(
            ["ValueError: The checkpoint you want has model type `foo9` but Transformers does not recognize"],
            "architecture-unknown",
            None,
            None,
            "does not know the model type foo9",
            id="a new model type",
        ),
        pytest.param(
            ["  Value error, Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your T4 has"],
            "model-unusable",
            None,
            None,
            "does not compute in bfloat16",
            id="an old card",
        ),
        pytest.param(
            [
                worker(
                    "The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. "
                    "Current capability: 75."
                )
            ],
            "model-unusable",
            None,
            None,
            "cannot compute fp8 weights (capability 75, needs 89)",
            id="a quantisation the card lacks",
        ),
        pytest.param(
            [worker("RuntimeError: CUDA error: no kernel image is available for execution on the device")],
            "engine-broken",
            None,
            None,
            "not built for the card",
            id="a build for other cards",
        ),
        pytest.param(
            ["RuntimeError: Failed to infer device type, please set the environment variable"],
            "engine-broken",
            None,
            None,
            "finds no card",
            id="no driver",
        ),
        pytest.param(
            ["ImportError: libcudart.so.13: cannot open shared object file: No such file or directory"],
            "engine-broken",
            None,
            None,
            "installation is broken: libcudart.so.13",
            id="a missing library",
        ),
        pytest.param(
            ["ModuleNotFoundError: No module named 'torch'"],
            "engine-broken",
            None,
            None,
            "installation is incomplete: No module named 'torch'",
            id="a missing package",
        ),
        pytest.param(
            [READY, worker("torch.AcceleratorError: CUDA error: an illegal memory access was encountered")],
            "device-lost",
            None,
            None,
            "failed while computing (CUDA: an illegal memory access",
            id="a card that fails while serving",
        ),
        pytest.param(
            [worker("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:94, unhandled cuda error")],
            "cards-unreachable",
            None,
            None,
            "cannot talk to each other (NCCL: NCCLUtils.hpp:94, unhandled cuda error",
            id="cards that cannot talk",
        ),
        pytest.param(
            ["host:1:1 [0] misc/shmutils.cc:72 NCCL WARN Error: Error while creating shared memory segment /dev/shm/n"],
            "host-out-of-memory",
            "host",
            None,
            "shared memory (/dev/shm) is too small",
            id="a container with little shared memory",
        ),
        pytest.param(
            [
                READY,
                "(EngineCore pid=5) ERROR 01-01 00:00:00 [x.py:1] TimeoutError: RPC call to execute_model timed out.",
            ],
            "device-lost",
            None,
            None,
            "a worker stopped answering (execute_model)",
            id="a worker that hangs",
        ),
        pytest.param(
            ["vllm serve: error: argument --max-num-seqs: invalid int value: 'many'"],
            "bad-value",
            None,
            None,
            "refuses the value of --max-num-seqs: invalid int value: 'many'",
            id="a value that is none",
        ),
        pytest.param(
            [worker("ValueError: Weight input_size_per_partition = 192 is not divisible by group_size = 128.")],
            "split-unsupported",
            None,
            None,
            "quantised matrices cannot be cut",
            id="groups of scales",
        ),
        pytest.param(
            [LOADING, worker("KeyError: 'layers.0.mlp.new_thing.weight'")],
            "exited",
            None,
            None,
            "failed while loading weights: KeyError: 'layers.0.mlp.new_thing.weight'",
            id="what nobody has seen before is quoted",
        ),
    ],
)
def test_lines_of_other_builds_are_named(
    lines: list[str], code: str, device: str | None, part: str | None, message: str
) -> None:
    failure = diagnose([*lines, *ENDED], 1)
    assert message in failure.message
    assert (failure.code, failure.device) == (code, device)
    assert part is None or failure.part == part


@pytest.mark.parametrize(
    "harmless",
    [
        pytest.param(
            "(APIServer pid=1) WARNING 01-01 00:00:00 [system_utils.py:255] This can cause fd limit errors like "
            "`OSError: [Errno 98] Address already in use`",
            id="a warning that quotes an error",
        ),
        pytest.param(
            "(APIServer pid=1) INFO 01-01 00:00:00 [logger.py:40] Received request: prompt: 'CUDA out of memory'",
            id="a prompt that quotes an error",
        ),
    ],
)
def test_information_is_never_a_cause(harmless: str) -> None:
    assert diagnose([LOADING, harmless], -9).code == "killed"


@pytest.mark.parametrize(
    "survived",
    [
        pytest.param([worker("RuntimeError: CUDA error: unknown error"), READY], id="before it served"),
        pytest.param(
            [READY, "(APIServer pid=1) ERROR 01-01 00:00:00 [serving.py:1] ValueError: CUDA error: a user's words"],
            id="the failure of a single request",
        ),
    ],
)
def test_what_the_engine_survived_is_not_the_cause(survived: list[str]) -> None:
    failure = diagnose(survived, -9)
    assert failure.code == "killed"
    assert "while serving" in failure.message


@pytest.mark.parametrize(
    ("ended", "code"), [pytest.param("-9", "killed", id="killed"), pytest.param("1", "exited", id="of its own")]
)
def test_a_core_that_ends_while_it_loads_tells_how(ended: str, code: str) -> None:
    failure = diagnose([LOADING, ENDED[0].replace("{}", f"{{'EngineCore_DP0': {ended}}}"), ENDED[1]], 1)
    assert failure.code == code
    assert ("the engine core of vLLM was killed (SIGKILL)" in failure.message) == (code == "killed")


def test_status_0_is_no_success() -> None:
    assert diagnose([LOADING, READY], 0).code == "crashed"
    assert (
        diagnose([LOADING], 0).message == "vLLM ended by itself with status 0 while loading weights and left no message"
    )


def test_a_cause_at_the_end_of_a_huge_log_is_found() -> None:
    lines = ["(APIServer pid=1) INFO 01-01 00:00:00 [loggers.py:1] Engine 000: ..."] * (2 * LINES_READ)
    failure = diagnose([*lines, worker("RuntimeError: CUDA error: unknown error")], 0)
    assert (failure.code, failure.line_number) == ("device-lost", len(lines) + 1)
    assert "while serving" in diagnose(lines, -11).message


@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from([READY, LOADING, "", worker("x"), worker("ValueError: y"), *ENDED])),
        max_size=20,
    ),
    st.one_of(st.none(), st.integers(min_value=-200, max_value=300)),
)
def test_any_log_gets_a_clean_one_line_answer(lines: list[str], status: int | None) -> None:
    failure = diagnose(lines, status)
    assert failure.message == clean(failure.message)
    assert 0 < len(failure.message) <= LONGEST_MESSAGE
    assert failure.line_number is None or 1 <= failure.line_number <= len(lines)
