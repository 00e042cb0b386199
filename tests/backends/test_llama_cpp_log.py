from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.backends.llama_cpp_log import (
    HOST,
    PHASES,
    BufferAllocated,
    ContextInfo,
    DeviceBuffers,
    DeviceListed,
    Event,
    Phase,
    buffers_by_device,
    device_of,
    parse_line,
    rpc_names,
)

from . import recorded

MIB = 1 << 20


def mib(value: float) -> int:
    return round(value * MIB)


@pytest.mark.parametrize(
    ("line", "event"),
    [
        pytest.param(
            "0.00.311.060 I load_tensors: RPC0[127.0.0.1:8280] model buffer size =    50.73 MiB",
            BufferAllocated(device="RPC0[127.0.0.1:8280]", kind="weights", bytes=mib(50.73)),
            id="weights on an RPC device",
        ),
        pytest.param(
            "0.00.311.059 I load_tensors:   CPU_Mapped model buffer size =    28.69 MiB",
            BufferAllocated(device="CPU_Mapped", kind="weights", bytes=mib(28.69)),
            id="weights mapped from the file",
        ),
        pytest.param(
            "llama_kv_cache_unified:      CUDA0 KV buffer size =  2560.00 MiB",
            BufferAllocated(device="CUDA0", kind="kv", bytes=2560 * MIB),
            id="KV cache as older versions print it, without a time",
        ),
        pytest.param(
            "0.01.0.0 I llama_memory_recurrent:      ROCm1 RS buffer size =    12.50 MiB",
            BufferAllocated(device="ROCm1", kind="kv", bytes=mib(12.5)),
            id="recurrent state counts as KV cache",
        ),
        pytest.param(
            "0.25.455.367 I sched_reserve:    Vulkan0 compute buffer size =   102.01 MiB",
            BufferAllocated(device="Vulkan0", kind="compute", bytes=mib(102.01)),
            id="compute buffer",
        ),
        pytest.param(
            "0.00.035.911 I cmn  common_param:   - RPC0    : 127.0.0.1:8280 (24105 MiB, 20000 MiB free)",
            DeviceListed(id="RPC0", description="127.0.0.1:8280", total_bytes=24105 * MIB, free_bytes=20000 * MIB),
            id="a device in the log",
        ),
        pytest.param(
            "  Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)",
            DeviceListed(
                id="Vulkan0",
                description="llvmpipe (LLVM 15.0.6, 256 bits)",
                total_bytes=2048 * MIB,
                free_bytes=2048 * MIB,
            ),
            id="a device of --list-devices, with parentheses in its name",
        ),
        pytest.param(
            "0.00.645.230 I srv    load_model: initializing, n_slots = 2, n_ctx_slot = 1024, kv_unified = 'false'",
            ContextInfo(slots=2, ctx_per_slot_tokens=1024),
            id="slots and context",
        ),
        pytest.param("0.0.0 I load_tensors: offloaded 31/31 layers to GPU", None, id="a line with no event"),
        pytest.param("0.0.0 I x: CUDA0 model buffer size = lots MiB", None, id="a size that is no number"),
        pytest.param("", None, id="an empty line"),
    ],
)
def test_a_line_becomes_an_event(line: str, event: Event | None) -> None:
    assert parse_line(line) == event


@given(st.text())
def test_any_line_is_survived(line: str) -> None:
    parse_line(line)
    parse_line(line + " buffer size = 1.0 MiB MiB free)")


@pytest.mark.parametrize("log", ["rpc_layer_31", "vk_0_0_ts_31", "rpc_tensor_11", "cpu_nofit"])
def test_a_load_goes_through_every_phase_in_order(log: str) -> None:
    events = [parse_line(line) for line in recorded.lines(log)]
    assert tuple(event.name for event in events if isinstance(event, Phase)) == PHASES


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param(
            "rpc_layer_31",
            {
                HOST: DeviceBuffers(weights_bytes=mib(28.69), compute_bytes=mib(0.38) + mib(3.26)),
                "RPC0": DeviceBuffers(weights_bytes=mib(50.73), kv_bytes=mib(36), compute_bytes=mib(13.38)),
                "RPC1": DeviceBuffers(weights_bytes=mib(41.37), kv_bytes=mib(9), compute_bytes=mib(13.38)),
            },
            id="two RPC devices that the log both calls RPC0",
        ),
        pytest.param(
            "rpc_tensor_11",
            {
                HOST: DeviceBuffers(weights_bytes=mib(28.69), compute_bytes=mib(0.38) + mib(3.26)),
                "RPC0": DeviceBuffers(
                    weights_bytes=mib(60.46), kv_bytes=mib(22.5), compute_bytes=mib(13.38), at_most=True
                ),
                "RPC1": DeviceBuffers(
                    weights_bytes=mib(60.46), kv_bytes=mib(22.5), compute_bytes=mib(13.38), at_most=True
                ),
            },
            id="tensor split: the fullest device stands for all",
        ),
        pytest.param("fail_bad_flag", {}, id="nothing was allocated"),
    ],
)
def test_buffers_are_summed_for_each_device(log: str, expected: dict[str, DeviceBuffers]) -> None:
    assert buffers_by_device(recorded.lines(log)) == expected


def test_host_memory_of_every_kind_is_one_sum() -> None:
    host = buffers_by_device(recorded.lines("cpu_nofit"))[HOST]
    assert host.weights_bytes == mib(95.34) + mib(92.10)
    assert host.total_bytes == host.weights_bytes + host.kv_bytes + host.compute_bytes


def test_both_caches_of_a_sliding_window_model_count() -> None:
    lines = [
        "0.0.0 I llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells",
        "0.0.0 I llama_kv_cache:      CUDA0 KV buffer size =   100.00 MiB",
        "0.0.0 I llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells",
        "0.0.0 I llama_kv_cache:      CUDA0 KV buffer size =    40.00 MiB",
    ]
    assert buffers_by_device(lines) == {"CUDA0": DeviceBuffers(kv_bytes=140 * MIB)}


def test_of_several_starts_in_one_log_the_last_counts() -> None:
    first, second = recorded.lines("vk_0_0_ts_31"), recorded.lines("rpc_layer_31")
    assert buffers_by_device([*first, *second]) == buffers_by_device(second)


@pytest.mark.parametrize(
    ("buffer", "device"),
    [
        pytest.param("RPC0[127.0.0.1:8291]", "RPC1", id="an RPC device by its endpoint"),
        pytest.param("RPC1[10.0.0.2:50052]", "RPC3", id="the second device behind one endpoint"),
        pytest.param("RPC0[10.0.0.9:1]", "RPC0[10.0.0.9:1]", id="an RPC device nobody listed"),
        pytest.param("CUDA1", "CUDA1", id="a card"),
        pytest.param("CUDA0_Split", "CUDA0", id="a card's part of a row split"),
        pytest.param("CUDA_Host", HOST, id="pinned memory"),
        pytest.param("CPU_REPACK", HOST, id="repacked weights"),
        pytest.param("AMX", HOST, id="weights for matrix instructions"),
    ],
)
def test_buffers_are_named_for_the_device_that_holds_them(buffer: str, device: str) -> None:
    endpoints = ("127.0.0.1:8290", "127.0.0.1:8291", "10.0.0.2:50052", "10.0.0.2:50052")
    listed = [
        DeviceListed(id=f"RPC{index}", description=endpoint, total_bytes=1, free_bytes=1)
        for index, endpoint in enumerate(endpoints)
    ]
    assert device_of(buffer, rpc_names(listed)) == device


def test_an_endpoint_alone_names_a_device_too() -> None:
    assert device_of("RPC0[127.0.0.1:8291]", {"127.0.0.1:8291": "RPC1"}) == "RPC1"


def test_a_line_made_to_be_slow_is_not() -> None:
    slow = ["a" * 4000 + " model buffer size =", "- a :  " * 500 + "MiB free)"]
    assert buffers_by_device(slow * 5000) == {}
