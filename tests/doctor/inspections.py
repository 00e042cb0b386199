"""Healthy, idle machines as inspections, and single facts of them changed: what tests of the checks begin with."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from mgpu.doctor.check import Check, Finding, Purpose, Severity, Skip
from mgpu.machine.cards import Card, card_for_name
from mgpu.machine.inspection import (
    CardHealth,
    ContainerFacts,
    HostFacts,
    Inspection,
    NvidiaDriver,
    PciDevice,
    PeerAccess,
    Readings,
)
from mgpu.machine.snapshot import Driver, Gpu, Host, Link, Machine, NvLinkPort, PcieLink

GIB = 1024**3
MIB = 1024**2
DRIVER = "580.126.20"
H100 = "NVIDIA H100 80GB HBM3"
DAY_S = 86_400.0

# Names that the catalogue would take for another, to its own.
_CATALOGUE_NAMES = {H100: "H100 SXM5 80 GB"}
_NVLINK_PORTS = {"GeForce RTX 3090": 4, "GeForce RTX 3090 Ti": 4, "RTX A6000": 4, "H100 SXM5 80 GB": 18}


def healthy(cards: int = 2, name: str = "NVIDIA GeForce RTX 4090", *, lanes: int = 16, **changes: Any) -> Inspection:
    """Return `cards` idle cards on bare metal, each on a root port of its own with `lanes` lanes, none of them bridged;
    an SXM card is behind switches, joined by NVSwitch. `changes` are fields of the Inspection; a dict changes only
    the named fields of what is there: `healthy(driver={"nvml_error": 18})`.
    """
    model = card_for_name(_CATALOGUE_NAMES.get(name, name))
    assert model is not None, f"{name} is not in the catalogue"
    assert model.vendor == "nvidia"
    switched = "SXM" in model.name
    gpus = tuple(_gpu(index, name, model, lanes, cards) for index in range(cards))
    pairs = list(itertools.combinations(range(cards), 2))
    ancestors = {pair: _ancestor(*pair, cards, switched) for pair in pairs}
    open_module = float(model.compute_capability or 0) >= 7.5  # there is none for older cards
    granted = switched or "GeForce" not in model.name
    kinds = {10: "PIX", 30: "PHB", 50: "SYS"}
    inspection = Inspection(
        machine=Machine(
            captured_at="2026-01-01T00:00:00Z",
            source="probed",
            host=Host(
                kernel="6.8.0-90-generic",
                cpu="AMD Ryzen 9 7950X 16-Core Processor",
                cores=16,
                ram_bytes=cards * 2 * model.total_bytes,
                ram_available_bytes=cards * 2 * model.total_bytes - 8 * GIB,
                numa_nodes=2 if switched else 1,
                virtualisation="none",
                container="none",
            ),
            driver=Driver(version=DRIVER, cuda="13.0", module_flavour="open" if open_module else "closed"),
            gpus=gpus,
            links=tuple(
                Link(a=a, b=b, kind="NVLink" if switched else kinds[ancestors[a, b]], p2p=granted) for a, b in pairs
            ),
        ),
        driver=_driver(switched, open_module=open_module),
        cards=tuple(_health(gpu, model, switched) for gpu in gpus),
        peers=tuple(
            PeerAccess(a=a, b=b, read=0 if granted else 1, write=0 if granted else 1, ancestor=ancestors[a, b])
            for a, b in pairs
        ),
        pci=tuple(device for gpu in gpus for device in _branch(gpu, model, switched)),
        pci_known=True,
        host=_host(switched),
        container=ContainerFacts(device_nodes=cards, host_gpus=cards, docker=False, cdi_older_than_driver=False),
        root=True,
    )
    return changed(inspection, **changes)


def bare(**changes: Any) -> Inspection:
    """Return a machine without any card or driver of one, all of whose facts could be read."""
    inspection = dataclasses.replace(
        healthy(1),
        machine=dataclasses.replace(healthy(1).machine, driver=None, gpus=(), links=()),
        driver=NvidiaDriver(nvml_error=12, uvm_loaded=False, uvm_device=False, control_device=False, nvswitch=False),
        cards=(),
        peers=(),
        pci=(),
        container=ContainerFacts(device_nodes=0, host_gpus=0, docker=False),
    )
    return changed(inspection, **changes)


def changed(inspection: Inspection, **changes: Any) -> Inspection:
    """Replace fields of an inspection; a dict replaces fields of the value that is there."""
    return dataclasses.replace(inspection, **_merged(inspection, changes))


def changed_machine(inspection: Inspection, **changes: Any) -> Inspection:
    """Replace fields of the machine: `changed_machine(it, host={"virtualisation": "kvm"})`."""
    machine = inspection.machine
    return changed(inspection, machine=dataclasses.replace(machine, **_merged(machine, changes)))


def changed_gpu(inspection: Inspection, index: int, **changes: Any) -> Inspection:
    """Replace fields of one Gpu of the machine: `changed_gpu(it, 0, pcie={"width": 4})`."""
    gpus = [
        dataclasses.replace(gpu, **_merged(gpu, changes)) if gpu.index == index else gpu for gpu in _gpus(inspection)
    ]
    return changed_machine(inspection, gpus=tuple(gpus))


def changed_card(inspection: Inspection, index: int, **changes: Any) -> Inspection:
    """Replace fields of one card's CardHealth; a dict for `readings` changes every reading."""
    cards = []
    for card in inspection.cards:
        if card.gpu == index:
            own = dict(changes)
            if isinstance(own.get("readings"), dict):
                own["readings"] = tuple(dataclasses.replace(reading, **own["readings"]) for reading in card.readings)
            card = dataclasses.replace(card, **own)
        cards.append(card)
    return changed(inspection, cards=tuple(cards))


def changed_pci(inspection: Inspection, *addresses: str, **changes: Any) -> Inspection:
    """Replace fields of the PCI devices at `addresses`, or of all."""
    devices = [
        dataclasses.replace(device, **changes) if not addresses or device.address in addresses else device
        for device in inspection.pci
    ]
    return changed(inspection, pci=tuple(devices))


def changed_pair(inspection: Inspection, a: int, b: int, *, kind: str | None = None, **changes: Any) -> Inspection:
    """Replace fields of a pair's PeerAccess, and the kind of its Link; `read` also changes what the Link claims."""
    peers = [dataclasses.replace(peer, **changes) if (peer.a, peer.b) == (a, b) else peer for peer in inspection.peers]
    linked: dict[str, Any] = {} if kind is None else {"kind": kind}
    if "read" in changes:
        linked["p2p"] = None if changes["read"] is None else changes["read"] == 0
    links = [
        dataclasses.replace(link, **linked) if (link.a, link.b) == (a, b) else link for link in inspection.machine.links
    ]
    return changed_machine(changed(inspection, peers=tuple(peers)), links=tuple(links))


def asked(check: Check, inspection: Inspection, purpose: Purpose) -> list[Finding | Skip]:
    """Return what a check says where it applies, as in a diagnosis."""
    return list(check.run(inspection, purpose)) if check.applies(inspection, purpose) else []


def verdict(check: Check, inspection: Inspection, **purpose: Any) -> str:
    """Return the worst that a check says: "fail", "warn", "info", "skip", or "" where all is well or it does not apply.
    Findings must be fit for the screen."""
    said = asked(check, inspection, Purpose(**purpose))
    for item in said:
        text = item.summary if isinstance(item, Finding) else item.reason
        assert text.isprintable()
        assert len(text) <= (90 if isinstance(item, Finding) else 160), text
        assert not isinstance(item, Finding) or item.evidence
        assert isinstance(item, Skip) or item.severity is Severity.info or item.fix, "a coloured finding has a fix"
    words = [item.severity.value if isinstance(item, Finding) else "skip" for item in said]
    assert words.count("skip") <= 1
    return next((word for word in ("fail", "warn", "info", "skip") if word in words), "")


def _merged(value: Any, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dataclasses.replace(getattr(value, key), **change) if isinstance(change, dict) else change
        for key, change in changes.items()
    }


def _gpus(inspection: Inspection) -> tuple[Gpu, ...]:
    return inspection.machine.gpus


def _stays_fast(model: Card) -> bool:
    return any(word in model.name for word in ("H100", "H200", "A100", "L40S"))


def _gpu(index: int, name: str, model: Card, lanes: int, cards: int) -> Gpu:
    ports = _NVLINK_PORTS.get(model.name, 0)
    switched = "SXM" in model.name
    small = model.name.startswith(("GeForce RTX 30", "RTX A6000"))
    return Gpu(
        index=index,
        vendor="nvidia",
        name=name,
        uuid=f"GPU-00000000-0000-0000-0000-{index:012}",
        bus_id=_address(index),
        total_bytes=model.total_bytes,
        free_bytes=model.total_bytes - model.reserved_bytes - 2 * MIB,
        compute_capability=model.compute_capability,
        bandwidth_gb_s=model.bandwidth_gb_s,
        pcie=PcieLink(
            gen=model.pcie_gen if _stays_fast(model) else 1,
            gen_max=model.pcie_gen,
            width=lanes,
            width_max=16,
            slot_width=lanes,
        ),
        bar1_bytes=256 * MIB if small else 1 << (model.total_bytes - 1).bit_length(),
        power_w=model.tdp_w * 0.06,
        power_limit_w=model.tdp_w,
        temperature_c=35,
        utilisation_percent=0,
        nvlink=tuple(NvLinkPort(port=port, active=switched) for port in range(ports)),
        mig=False if switched else None,
        display=False,
        engine_devices=(f"CUDA{index}",) if cards else (),
    )


def _health(gpu: Gpu, model: Card, switched: bool) -> CardHealth:
    readings = tuple(
        Readings(
            at_s=float(second),
            utilisation_percent=0,
            power_w=gpu.power_w,
            temperature_c=35,
            pstate=0 if switched else 8,
            events=0x01 if switched else 0x04,  # so idle GeForce cards say
            sm_clock_mhz=345 if switched else 210,
            pcie_gen=gpu.pcie.gen,
            pcie_width=gpu.pcie.width,
            pcie_replays=9 if switched else 0,  # a healthy H100 shows nine
            nvlink_errors=0 if any(port.active for port in gpu.nvlink) else None,
        )
        for second in range(3)
    )
    datacentre = "GeForce" not in model.name
    return CardHealth(
        gpu=gpu.index,
        bus_id=gpu.bus_id,
        nvml_error=0,
        persistence=True,
        compute_mode=0,
        power_default_w=model.tdp_w,
        power_min_w=model.tdp_w / 3,
        power_max_w=model.tdp_w,
        power_requested_w=model.tdp_w,
        power_enforced_w=model.tdp_w,
        temperature_slowdown_c=None if switched else 96,
        temperature_margin_c=50 if switched else None,
        sm_clock_max_mhz=1980 if switched else 3120,
        reserved_bytes=model.reserved_bytes,
        used_by_known=True,
        ecc_enabled=True if datacentre else None,
        ecc_uncorrected_volatile=0 if datacentre else None,
        ecc_uncorrected_aggregate=0 if datacentre else None,
        remap_pending=False if datacentre else None,
        remap_failed=False if datacentre else None,
        recovery_action=0,
        mig_pending=gpu.mig,
        pcie_gen_device=model.pcie_gen,
        fabric_state=3 if switched else None,
        fabric_status=0 if switched else None,
        virtualisation_mode=0,
        readings=readings,
    )


def _address(index: int) -> str:
    return f"0000:{0x10 * (index + 1):02x}:00.0"


def _branch(gpu: Gpu, model: Card, switched: bool) -> tuple[PciDevice, ...]:
    """The card and the bridges above it: a root port of the processor, and for SXM cards a switch for every two."""
    index = gpu.index
    node = index // 4 if switched else None
    link: dict[str, Any] = {"gen": gpu.pcie.gen, "gen_max": model.pcie_gen, "width": gpu.pcie.width}
    quiet: dict[str, Any] = {"aer_correctable": 0, "aer_nonfatal": 0, "aer_fatal": 0, "acs_known": True}
    port = f"0000:00:01.{index}"
    bridge: dict[str, Any] = {"pci_class": 0x060400, "driver": "pcieport", "width_max": gpu.pcie.slot_width, **link}
    bridges: list[PciDevice] = []
    above = port
    if switched:
        first = index % 2 == 0
        upstream = f"0000:{0x10 * (index // 2 * 2 + 1) - 4:02x}:00.0"
        above = f"0000:{0x10 * (index + 1) - 1:02x}:00.0"
        port = f"0000:00:01.{index // 2}"
        plx: dict[str, Any] = {"vendor": 0x1000, "device": 0xC030, "acs": 0, **bridge, **quiet}
        if first:
            bridges.append(PciDevice(address=upstream, parent=port, **plx))
        bridges.append(PciDevice(address=above, parent=upstream, **plx))
    if not switched or index % 2 == 0:
        bridges.append(PciDevice(address=port, vendor=0x1022, device=0x14DB, acs=0, **bridge, **quiet))
    card = PciDevice(
        address=_address(index),
        vendor=0x10DE,
        device=_PCI_DEVICES.get(model.name, 0x2684),
        pci_class=0x030200 if switched else 0x030000,
        driver="nvidia",
        parent=above,
        width_max=16,
        iommu_group=str(20 + index),
        iommu_type="identity",
        numa_node=node if switched else -1,
        local_cpus=f"{node * 32}-{node * 32 + 31}" if node is not None else "0-31",
        **link,
        **quiet,
    )
    return (*reversed(bridges), card)


_PCI_DEVICES = {
    "GeForce RTX 3090": 0x2204,
    "GeForce RTX 4090": 0x2684,
    "GeForce RTX 5090": 0x2B85,
    "RTX A6000": 0x2230,
    "Tesla P40": 0x1B38,
    "H100 SXM5 80 GB": 0x2330,
}


def _ancestor(a: int, b: int, cards: int, switched: bool) -> int:
    if not switched:
        return 30
    return 10 if a // 2 == b // 2 else 30 if a // 4 == b // 4 else 50


def _driver(switched: bool, *, open_module: bool) -> NvidiaDriver:
    return NvidiaDriver(
        nvml_error=0,
        loaded_version=DRIVER,
        library_version=DRIVER,
        on_disk_version=DRIVER,
        open_module=open_module,
        cuda_version=13000,
        uvm_loaded=True,
        uvm_on_disk=True,
        node_maker=True,
        uvm_device=True,
        control_device=True,
        secure_boot=False,
        uvm_disable_hmm=False,
        nvswitch=switched,
        fabric_manager="active" if switched else None,
        fabric_manager_version=DRIVER if switched else None,
        persistence_daemon=True,
    )


def _host(switched: bool) -> HostFacts:
    return HostFacts(
        distribution="debian",
        boot_loader="grub",
        boot_age_s=30 * DAY_S,
        kernel_command_line="BOOT_IMAGE=/vmlinuz root=/dev/nvme0n1p2 ro quiet iommu=pt",
        wsl=False,
        iommu_present=True,
        vfio_in_use=False,
        shm_bytes=32 * GIB,
        memlock_bytes=8 * GIB,
        memlock_unlimited=False,
        swap_total_bytes=8 * GIB,
        swap_free_bytes=8 * GIB,
        memory_pressure_percent=0.0,
        numa_balancing=False,
        cpu_flags_known=True,
        avx2=True,
        allowed_cpus=64 if switched else 32,
        allowed_cpu_list="0-63" if switched else "0-31",
        governors=("schedutil",),
        cpu_power_w=170.0,
        listeners_known=True,
        log_known=True,
    )
