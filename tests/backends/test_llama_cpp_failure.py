from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.failure import LONGEST_MESSAGE, clean, from_exit_status, redact, shorten
from mgpu.backends.llama_cpp_failure import LINES_READ, diagnose

from . import recorded

DEVICES = [
    "0.0.0.0 I cmn  common_param: device_info:",
    "0.0.0.0 I cmn  common_param:   - CUDA0   : NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)",
    "0.0.0.0 I cmn  common_param:   - CUDA1   : NVIDIA GeForce RTX 4090 (24081 MiB, 23600 MiB free)",
]
LISTENING = "0.0.0.0 I srv  llama_server: listening on http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("log", "status", "code", "message"),
    [
        ("fail_port_in_use", 1, "port-in-use", "port 8240 on 127.0.0.1 is taken"),
        ("fail_host_bad", 1, "exited", "status 1 and left no message"),
        ("fail_missing_model", 1, "model-missing", "x.gguf does not exist"),
        ("fail_truncated", 1, "model-corrupt", "cut short or damaged (at tensor blk.11.ffn_up.weight)"),
        ("fail_truncated_header", 1, "model-corrupt", "its header is incomplete"),
        ("fail_not_gguf", 1, "model-not-gguf", "begins with 'hell'"),
        ("fail_empty_file", 1, "model-not-gguf", "empty, or a folder"),
        ("fail_is_dir", 1, "model-not-gguf", "empty, or a folder"),
        ("fail_unknown_arch", 1, "architecture-unknown", "'lxama'"),
        ("fail_bad_flag", 1, "bad-flag", "--no-such-flag"),
        ("fail_bad_value", 1, "bad-value", "the value of -c is not a number"),
        ("fail_bad_ts", 1, "bad-value", "the value of -ts is not a number"),
        ("fail_ts_too_many", 1, "bad-value", "-ts: got 40 input configs"),
        ("fail_bad_kvtype", 1, "bad-value", "q3_0 is not a KV cache type"),
        ("fail_bad_dev", 1, "bad-device", "CUDA0"),
        ("fail_q8v_fa_off", 1, "flash-attention-required", "quantised KV cache needs flash attention"),
        ("fail_split_row", 1, "split-unsupported", "row split does not work on Vulkan0"),
        ("fit_abort", -6, "crashed", "while it fitted the model to memory"),
        ("rpc_die_idle", -6, "device-lost", "remote (RPC) device died"),
        ("oom_die_midgen", -6, "device-lost", "remote (RPC) device died"),
        ("sig_loading_SIGTERM", -15, "stopped", "SIGTERM from outside while loading weights"),
        ("sig_gen2_SIGTERM", 1, "stopped", "two signals"),
        ("sig_gen_SIGTERM_True", 0, "stopped", "asked to stop"),
        ("sig_early_0.0", -15, "stopped", "SIGTERM"),
        ("sig_early_0.0", 0, "exited", "ended by itself with status 0"),
        ("rpc_layer_31", -9, "killed", "SIGKILL) while serving"),
    ],
)
def test_a_recorded_failure_is_named(log: str, status: int, code: str, message: str) -> None:
    failure = diagnose(recorded.lines(log), status)
    assert failure.code == code
    assert message in failure.message
    assert len(failure.message) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("log", "status", "device", "part", "wanted_bytes", "message"),
    [
        ("oom_model", 1, "RPC1", "weights", 311734400, "out of memory on RPC1: 297 MiB asked for the weights"),
        ("oom_kv", 1, "RPC1", "kv", 939524096, "out of memory on RPC1: 896 MiB asked for the KV cache"),
        ("oom_compute", 1, "RPC1", "compute", 260087936, "248 MiB asked for the compute buffers"),
        ("oom_fit_on_user_ts", 1, "RPC1", "compute", 130033792, "124 MiB asked for the compute buffers"),
        ("oom_tensor_model", -6, "RPC1", "weights", 346091648, "330 MiB asked for the weights"),
        ("oom_tensor_kv", -6, "RPC1", "kv", 1073741824, "1.0 GiB asked for the KV cache"),
        ("fail_cpu_oom_ctx", 1, "host", "kv", 368640000000, "out of memory in host RAM: 343.3 GiB"),
    ],
)
def test_a_recorded_lack_of_memory_says_where_for_what_and_how_much(
    log: str, status: int, device: str, part: str, wanted_bytes: int, message: str
) -> None:
    lines = recorded.lines(log)
    failure = diagnose(lines, status)
    assert failure.code == ("host-out-of-memory" if device == "host" else "out-of-memory")
    assert (failure.device, failure.part, failure.wanted_bytes) == (device, part, wanted_bytes)
    assert message in failure.message
    assert failure.deterministic
    assert failure.line_number is not None
    assert f"of size {wanted_bytes}" in lines[failure.line_number - 1]


@pytest.mark.parametrize("log", ["oom_model", "oom_kv", "oom_compute"])
@pytest.mark.parametrize("lost", range(1, 6))
def test_lost_last_lines_do_not_hide_a_lack_of_memory(log: str, lost: int) -> None:
    whole = diagnose(recorded.lines(log), 1)
    failure = diagnose(recorded.lines(log)[:-lost], 1)
    assert (failure.code, failure.part, failure.message) == (whole.code, whole.part, whole.message)


@pytest.mark.parametrize(
    ("lines", "code", "device", "message"),
    [
        pytest.param(
            [
                *DEVICES,
                "0.0.0.0 E cuda_alloc_buffer: allocating 24144.00 MiB on device 1: cudaMalloc failed: out of memory",
                "0.0.0.0 E alloc_tensor_range: failed to allocate CUDA1 buffer of size 25316818944",
                "0.0.0.0 E llama_model_load: error loading model: unable to allocate CUDA1 buffer",
            ],
            "out-of-memory",
            "CUDA1",
            "out of memory on CUDA1: 23.6 GiB asked for the weights",
            id="CUDA out of memory for the weights",
        ),
        pytest.param(
            [
                *DEVICES,
                LISTENING,
                "CUDA error: out of memory",
                "  current device: 1, in function alloc at /src/ggml/src/ggml-cuda/ggml-cuda.cu:484",
            ],
            "out-of-memory",
            "CUDA1",
            "out of memory on CUDA1 for the compute buffers",
            id="CUDA out of memory under load",
        ),
        pytest.param(
            [
                LISTENING,
                "/src/ggml/src/ggml-cuda/ggml-cuda.cu:88: CUDA error",
                "CUDA error: an illegal memory access was encountered",
                "  current device: 3, in function ggml_backend_cuda_synchronize at ggml-cuda.cu:2780",
            ],
            "device-lost",
            "CUDA3",
            "CUDA3 failed while computing (CUDA: an illegal memory access was encountered)",
            id="CUDA illegal access",
        ),
        pytest.param(
            ["ROCm error: unspecified launch failure", "  current device: 0, in function f at x.cu:1"],
            "device-lost",
            "ROCm0",
            "ROCm0 failed while computing (ROCm: unspecified launch failure)",
            id="ROCm launch failure",
        ),
        pytest.param(
            ["ROCm error: invalid device function", "  current device: 0, in function f at x.cu:1"],
            "engine-broken",
            "ROCm0",
            "not built for ROCm0",
            id="a build without kernels for the card",
        ),
        pytest.param(
            [
                LISTENING,
                "terminate called after throwing an instance of 'vk::DeviceLostError'",
                "  what():  vk::Device::waitForFences: ErrorDeviceLost",
            ],
            "device-lost",
            None,
            "device lost",
            id="Vulkan device lost",
        ),
        pytest.param(
            [
                "ggml_vulkan: Device memory allocation of size 118497280 failed.",
                "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
            ],
            "out-of-memory",
            None,
            "out of memory on a card: 113 MiB",
            id="Vulkan out of memory, last lines lost",
        ),
        pytest.param(
            [
                "0.0.0.0 E Failed to connect to 10.0.0.7:50052",
                'error while handling argument "-dev": invalid device: RPC0',
            ],
            "device-lost",
            None,
            "10.0.0.7:50052 cannot be reached",
            id="an unreachable RPC device",
        ),
        pytest.param(
            [
                "0.0.0.0 E ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
                'error while handling argument "-dev": invalid device: CUDA0',
            ],
            "bad-device",
            None,
            "CUDA does not work here: no CUDA-capable device is detected",
            id="a driver that does not work explains the unknown device",
        ),
        pytest.param(
            ["0.0.0.0 E srv start: couldn't bind HTTP server socket, hostname: 10.9.9.9, port: 8080"],
            "bad-host",
            None,
            "cannot listen on 10.9.9.9:8080",
            id="an address of another machine",
        ),
        pytest.param(
            ["llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object"],
            "engine-broken",
            None,
            "lacks the shared library libcudart.so.12",
            id="a missing library",
        ),
        pytest.param(
            ["0.0.0.0 E llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'"],
            "model-unusable",
            None,
            "missing tensor 'blk.0.attn_q.weight'",
            id="any other reason the loader gives",
        ),
        pytest.param(
            ["0.0.0.0 I start", "0.0.0.0 E something nobody has seen before", "0.0.0.0 I end"],
            "exited",
            None,
            "something nobody has seen before",
            id="an unknown error is quoted",
        ),
    ],
)
def test_lines_of_other_builds_are_named(lines: list[str], code: str, device: str | None, message: str) -> None:
    failure = diagnose(lines, 1)
    assert failure.code == code
    assert failure.device == device
    assert message in failure.message


@pytest.mark.parametrize(
    "survived",
    [
        pytest.param(["0.0.0.0 E Failed to connect to 10.0.0.7:50052", LISTENING], id="before it listened"),
        pytest.param(
            [
                "0.0.0.0 E ggml_gallocr_reserve_n_impl: failed to allocate CUDA1 buffer of size 54262464512",
                "0.0.0.0 W sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism",
            ],
            id="a compute buffer that was tried again",
        ),
        pytest.param(
            ["0.0.0.0 E ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected"],
            id="a driver nobody asked for",
        ),
        pytest.param(
            ["0.0.0.0 I llama_model_loader: - kv   2: general.name str = CUDA error: out of memory"],
            id="text that the model brings along",
        ),
    ],
)
def test_what_the_engine_survived_is_not_the_cause(survived: list[str]) -> None:
    assert diagnose([*DEVICES, *survived], -9).code == "killed"


def test_a_failed_second_start_is_not_taken_for_a_failure_while_serving() -> None:
    failure = diagnose([*recorded.lines("rpc_layer_31"), *recorded.lines("oom_kv")], 1)
    assert (failure.part, failure.device, failure.deterministic) == ("kv", "RPC1", True)


def test_a_cause_at_the_end_of_a_huge_log_is_found() -> None:
    lines = ["0.0.0.0 I slot print_timing: id 0"] * (3 * LINES_READ)
    assert diagnose([*lines, "CUDA error: unknown error"], -6).line_number == len(lines) + 1
    assert "while serving" in diagnose(lines, -11).message


@given(st.lists(st.text()), st.one_of(st.none(), st.integers(min_value=-200, max_value=300)))
def test_any_log_gets_a_clean_one_line_answer(lines: list[str], status: int | None) -> None:
    failure = diagnose(lines, status)
    assert failure.code
    assert failure.message.isprintable()
    assert len(failure.message) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("status", "code", "word", "deterministic"),
    [
        (None, "exited", "unknown", False),
        (0, "exited", "status 0", False),
        (3, "exited", "status 3", False),
        (127, "engine-broken", "could not be started", True),
        (-9, "killed", "RAM ran out", False),
        (137, "killed", "RAM ran out", False),
        (-15, "stopped", "SIGTERM", False),
        (-11, "crashed", "SIGSEGV", False),
        (139, "crashed", "SIGSEGV", False),
        (-4, "engine-broken", "SIGILL", True),
        (-7, "crashed", "mapped", False),
        (-40, "crashed", "signal 40", False),
    ],
)
def test_an_exit_status_alone_says_something(status: int | None, code: str, word: str, deterministic: bool) -> None:
    failure = from_exit_status("engine", status)
    assert (failure.code, failure.deterministic) == (code, deterministic)
    assert word in failure.message


def test_secrets_are_replaced_the_longest_first() -> None:
    assert redact("key sk-abc-long and sk-abc", ["sk-abc", "sk-abc-long", ""]) == "key *** and ***"


def test_terminal_escapes_are_removed() -> None:
    assert clean("\x1b[31mred\x1b[0m\x07 \x00text") == "red text"
    assert shorten("a\nb   c\x1b[2J" + "d" * 200, 10) == "a b cdddd…"
