from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.llama_cpp_log import HOST, DeviceBuffers
from mgpu.backends.llama_cpp_projection import devices_of, projecting, projection, refusal
from mgpu.units import MIB

from . import recorded

BEGUN = "0.00.048.725 I cmn  common_init_: fitting params to device memory ..."
PRINTED = "0.00.312.061 I common_memory_breakdown_print: "
HEAD = f"{PRINTED}| memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |"
DONE = "0.00.335.136 I common_params_fit_impl: projected to use 293 MiB of host memory vs. 24105 MiB of total"

FAILED = "common_fit_params: failed to fit params to free device memory: "
BROKEN = "common_fit_params: encountered an error while trying to fit params to free device memory: "


def mib(weights: int, cache: int, compute: int) -> DeviceBuffers:
    return DeviceBuffers(weights_bytes=weights * MIB, kv_bytes=cache * MIB, compute_bytes=compute * MIB)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        pytest.param(
            [
                "|   - RPC0 (127.0.0.1:18290) | 24105 = 24105 + (21574 = 20038 +    1312 +     224) +      -21574 |",
                "|   - RPC1 (127.0.0.1:18291) | 24105 = 24105 + (20627 = 19171 +    1248 +     208) +      -20627 |",
                "|   - Host                   |                     76 =    36 +       0 +      40                |",
            ],
            {"RPC0": mib(20038, 1312, 224), "RPC1": mib(19171, 1248, 208), HOST: mib(36, 0, 40)},
            id="two devices",
        ),
        pytest.param(
            [
                "|   - Host               |                 10726 =  7926 +    2560 +     240                |",
                "|   - CPU_REPACK         |                 31320 = 31320 +       0 +       0                |",
            ],
            {HOST: mib(39246, 2560, 240)},
            id="weights repacked for the processor are the host's",
        ),
        pytest.param(
            [
                "|   - Vulkan1 (llvmpipe (LLVM 15.0.6, 256 bits)) |  2048 = 2048 + ( 194 = 58 + 84 +  52) +    -194 |",
            ],
            {"Vulkan1": mib(58, 84, 52)},
            id="a name with brackets",
        ),
        pytest.param(
            ["|   - CUDA0 (NVIDIA GeForce RTX 4090) | 24081 = 23600 + (9 = 2 + 3 + 4) + 472 |"],
            {"CUDA0": mib(2, 3, 4)},
            id="a name that ends in a number",
        ),
    ],
)
def test_a_table_is_read(rows: list[str], found: dict[str, DeviceBuffers]) -> None:
    lines = [BEGUN, HEAD, *(PRINTED + row for row in rows)]
    assert projection(lines) is None  # more rows may follow
    assert projection([*lines, "AMX is not ready to be used!"]) is None
    assert projection([*lines, DONE]) == found
    assert refusal([*lines, DONE]) is None


def test_recorded_projections_are_read_and_only_the_first_of_a_log() -> None:
    (rpc0, rpc1) = (mib(50, 36, 13), mib(41, 9, 12))
    found = projection(recorded.lines("rpc_layer_31"))
    assert found
    assert (found["RPC0"], found["RPC1"]) == (rpc0, rpc1)
    lines = recorded.lines("oom_fit_on_user_ts")
    expected = {"RPC0": mib(311, 1152, 124), "RPC1": mib(297, 896, 120), HOST: mib(51, 0, 72)}
    assert projection(lines) == projection([*lines, HEAD, f"{PRINTED}|   - Host | 3 = 1 + 1 + 1 |", DONE]) == expected


@pytest.mark.parametrize("name", ["cpu_nofit", "fail_missing_model", "list_devices_rpc"])
def test_a_log_without_a_projection_has_none(name: str) -> None:
    assert projection(recorded.lines(name)) is None


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        pytest.param([], None, id="nothing yet"),
        pytest.param([BEGUN], None, id="only begun"),
        pytest.param(
            [BEGUN, f"0.00.033.718 W {FAILED}llama_params_fit is not implemented for SPLIT_MODE_TENSOR, abort"],
            "llama_params_fit is not implemented for SPLIT_MODE_TENSOR",
            id="a mode that it does not project",
        ),
        pytest.param(
            [BEGUN, f"0.00.042.132 E {BROKEN}failed to load model"],
            "failed to load model",
            id="a file that it cannot load",
        ),
        pytest.param(
            [BEGUN, "0.1 I common_fit_params: fitting params to free memory took 0.07 seconds"],
            "it prints no table",
            id="a version without a table",
        ),
        pytest.param(
            ["0.00.1 I load_tensors: loading model tensors, this can take a while... (mmap = true)"],
            "it began to load at once",
            id="a version that does not fit",
        ),
    ],
)
def test_a_projection_that_will_not_come_is_given_up(lines: list[str], why: str | None) -> None:
    assert refusal(lines) == why
    assert projection(lines) is None


@given(st.lists(st.sampled_from([BEGUN, HEAD, DONE, PRINTED]) | st.text(max_size=80)))
def test_no_log_breaks_the_reader(lines: list[str]) -> None:
    projection([PRINTED + line for line in lines])
    refusal(lines)


@pytest.mark.parametrize(("devices", "names"), [("none", ()), ("CUDA0", ("CUDA0",)), ("RPC1,RPC0", ("RPC1", "RPC0"))])
def test_the_command_differs_in_one_word(devices: str, names: tuple[str, ...]) -> None:
    argv = ("llama-server", "-m", "--fit.gguf", "-dev", devices, "--fit", "off", "-c", "8192")
    assert projecting(argv) == ("llama-server", "-m", "--fit.gguf", "-dev", devices, "--fit", "on", "-c", "8192")
    assert devices_of(argv) == names
