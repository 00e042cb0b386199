"""What is there, area by area, in a line each: what the doctor says where all is well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mgpu.cli.views.words import card_name
from mgpu.doctor.check import Area
from mgpu.doctor.facts import named
from mgpu.doctor.report import Report
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import nvidia_on_bus, on_bus
from mgpu.machine.snapshot import Gpu
from mgpu.machine.sysfs import AMD, INTEL, NVIDIA
from mgpu.planning.choice import TITLES
from mgpu.units import GIB

_NOT_NEEDED = "none needed: no NVIDIA card"
NOTHING = ("none", "no NVIDIA driver", _NOT_NEEDED)
_MOST_CARDS_ONE_BY_ONE = 4
_IDLE_PERCENT = 10
_VENDORS = {"NVIDIA": NVIDIA, "AMD": AMD, "Intel": INTEL}
_P2P_STATES = {1: "chipset", 2: "card", 3: "topology", 4: "registry", 5: "not supported"}


def area_line(area: Area, report: Report) -> str | None:
    """Return what there is of an area in a few words, None for an area that this machine does not have."""
    return _LINES[area](report)


def header(report: Report, version: str) -> str:
    """Return who speaks and of what machine: version, driver, cards, kernel, kind of computer."""
    machine = report.inspection.machine
    driver = machine.driver
    cuda = f" (CUDA {driver.cuda})" if driver and driver.cuda else ""
    parts = (
        f"mgpu doctor {version}",
        f"driver {driver.version}{cuda}" if driver and driver.version else None,
        _cards(report.inspection),
        f"kernel {machine.host.kernel.partition('-')[0]}" if machine.host.kernel else None,
        _place(report.inspection),
        "REPLAYED" if report.replayed else None,
    )
    return " · ".join(part for part in parts if part)


def judged_for(report: Report) -> str | None:
    """Return for what the machine is judged, None where nobody said."""
    engine, size = report.purpose.backend, report.purpose.tensor_parallel
    parts = (TITLES.get(engine, engine) if engine else None, f"tensor parallel {size}" if size else None)
    words = ", ".join(part for part in parts if part)
    return f"judged for {words}" if words else None


def _cards(inspection: Inspection) -> str:
    count = len(inspection.machine.gpus)
    there = sum(_on_bus(inspection).values())
    words = f"{count or there} GPU{'' if (count or there) == 1 else 's'}"
    return words if count else f"{words} on the PCI bus" if there else "no GPU"


def _on_bus(inspection: Inspection) -> dict[str, int]:
    """How many cards of each vendor the PCI bus shows."""
    counts = {vendor: len(on_bus(inspection, number)) for vendor, number in _VENDORS.items()}
    return {vendor: count for vendor, count in counts.items() if count}


def _place(inspection: Inspection) -> str | None:
    host = inspection.machine.host
    if inspection.host.wsl:
        return "WSL2"
    if host.container not in (None, "none"):
        return f"in {host.container}"
    return "bare metal" if host.virtualisation == "none" else host.virtualisation


def _driver(report: Report) -> str | None:
    driver, machine = report.inspection.driver, report.inspection.machine
    version = driver.loaded_version or (machine.driver.version if machine.driver else None)
    if version is None:
        if any(gpu.vendor in ("amd", "intel") for gpu in machine.gpus):
            return "the kernel's own"
        return _NOT_NEEDED if report.inspection.pci_known and not nvidia_on_bus(report.inspection) else NOTHING[1]
    flavour = {True: " open module", False: " closed module", None: ""}[driver.open_module]
    agree = driver.library_version == version and driver.loaded_version == version
    return f"{version}{flavour}{', library and kernel agree' if agree else ''}"


def _gpus(report: Report) -> str | None:
    cards = report.inspection.machine.gpus
    if not cards:
        there = _on_bus(report.inspection)
        found = " and ".join(f"{count} of {vendor}" for vendor, count in there.items())
        return f"none through a driver, {found} on the PCI bus" if there else NOTHING[0]
    counts: dict[str, int] = {}
    for gpu in cards:
        size = f" {gpu.total_bytes / GIB:.0f} GiB" if gpu.total_bytes else ""
        name = f"{card_name(gpu.name)}{size}"
        counts[name] = counts.get(name, 0) + 1
    loads = [gpu.utilisation_percent for gpu in cards if gpu.utilisation_percent is not None]
    state = ("idle" if max(loads) < _IDLE_PERCENT else f"up to {max(loads)} % busy") if loads else None
    return " · ".join(part for part in (_counted(counts), state, _range(cards, "temperature_c", "°C")) if part)


def _counted(counts: dict[str, int]) -> str:
    return " + ".join(f"{count}× {name}" if count > 1 else name for name, count in counts.items())


def _range(cards: Sequence[Gpu], key: str, unit: str) -> str | None:
    values = sorted(round(value) for gpu in cards if (value := getattr(gpu, key)) is not None)
    if not values:
        return None
    return f"{values[0]} {unit}" if values[0] == values[-1] else f"{values[0]} to {values[-1]} {unit}"


def _pcie(report: Report) -> str | None:
    cards = [gpu for gpu in report.inspection.machine.gpus if gpu.problem is None and not gpu.integrated]
    links = {gpu.index: _link(gpu) for gpu in cards}
    if not cards:
        return None
    if len(set(links.values())) == 1 and len(cards) > 1:
        words = f"all {links[cards[0].index]}"
    elif len(cards) <= _MOST_CARDS_ONE_BY_ONE:
        words = "  ".join(f"GPU{index} {link}" for index, link in links.items())
    else:
        counts: dict[str, int] = {}
        for link in links.values():
            counts[link] = counts.get(link, 0) + 1
        words = _counted(counts)
    now = {gpu.pcie.gen for gpu in cards if gpu.pcie.gen and gpu.pcie.gen_max and gpu.pcie.gen < gpu.pcie.gen_max}
    idle = all((gpu.utilisation_percent or 0) < _IDLE_PERCENT for gpu in cards)
    note = f" (Gen{min(now)} now because idle)" if now and idle else ""
    words, note = (words[:-1], f";{note[2:]}".replace(";", "; ")) if note and words.endswith(")") else (words, note)
    if report.proof and report.proof.copies:
        speeds = [copy.gb_s for copy in report.proof.copies]
        note = f" · {min(speeds):.1f} GB/s measured" + (f" to {max(speeds):.1f}" if len(speeds) > 1 else "")
    return words + note


def _link(gpu: Gpu) -> str:
    by_design = gpu.pcie.slot_width is not None and gpu.pcie.width == gpu.pcie.slot_width != gpu.pcie.width_max
    width = "x?" if gpu.pcie.width is None else f"x{gpu.pcie.width}"
    return f"Gen{gpu.pcie.gen_max or '?'} {width}" + (" (all the slot has)" if by_design else "")


def _p2p(report: Report) -> str | None:
    links = report.inspection.machine.links
    if all(link.p2p is None and link.kind != "NVLink" for link in links):
        return None
    bridged = sum(link.kind == "NVLink" for link in links)
    granted = sum(link.p2p is True for link in links)
    words = [f"NVLink joins {bridged} of {len(links)} pairs"] if bridged else []
    if all(link.p2p is None for link in links):
        words.append("peer access unknown")
    elif granted == len(links):
        words.append("peer access granted")
    elif granted:
        words.append(f"peer access for {granted} of {len(links)} pairs")
    else:
        refusals = (peer.read for peer in report.inspection.peers)
        why = next((_P2P_STATES[number] for number in refusals if number in _P2P_STATES), None)
        words.append("no peer access" + (f" ({why})" if why else "") + ": data between cards goes through the host")
    if report.proof and report.proof.collectives and all(each.outcome == "right" for each in report.proof.collectives):
        words.append("all-reduce proved")
    return " · ".join(words)


def _memory(report: Report) -> str | None:
    cards = [gpu for gpu in report.inspection.machine.gpus if gpu.problem is None]
    free = [gpu.free_bytes for gpu in cards if gpu.free_bytes is not None]
    if not free:
        return None
    low, high = min(free) / GIB, max(free) / GIB
    each = f"{low:.1f} GiB" if high - low < 0.05 else f"{low:.1f} to {high:.1f} GiB"
    return f"{each} free" + (" on each card" if len(free) > 1 else "")


def _power(report: Report) -> str | None:
    cards = [gpu for gpu in report.inspection.machine.gpus if gpu.problem is None and not gpu.integrated]
    limits = [gpu.power_limit_w for gpu in cards if gpu.power_limit_w is not None]
    if not limits:
        return None
    total = f" · {sum(limits):.0f} W together" if len(limits) > 1 else ""
    return f"limits {_range(cards, 'power_limit_w', 'W')}{total}"


def _host(report: Report) -> str | None:
    host = report.inspection.machine.host
    ram = f"{host.ram_bytes / GIB:.0f} GiB RAM" if host.ram_bytes else None
    cores = f"{host.cores} cores" if host.cores else None
    nodes = f"{host.numa_nodes} NUMA nodes" if host.numa_nodes and host.numa_nodes > 1 else None
    return " · ".join(part for part in (cores, ram, nodes) if part) or "unknown"


def _container(report: Report) -> str | None:
    name, facts = report.inspection.machine.host.container, report.inspection.container
    if name not in (None, "none"):
        return f"{name}"
    return "Docker can give cards" if facts.docker and (facts.docker_nvidia_runtime or facts.cdi_files) else None


def _of_vendor(vendor: str, number: int) -> Callable[[Report], str | None]:
    def line(report: Report) -> str | None:
        cards = [gpu for gpu in report.inspection.machine.gpus if gpu.vendor == vendor]
        counts: dict[str, int] = {}
        for gpu in cards:
            name = card_name(gpu.name) + (f" ({gpu.gfx})" if gpu.gfx else "")
            counts[name] = counts.get(name, 0) + 1
        there = len(on_bus(report.inspection, number))
        return _counted(counts) or (f"{there} on the PCI bus" if there else None)

    return line


def _engines(report: Report) -> str | None:
    engines = report.inspection.engines
    return " · ".join(f"{TITLES.get(e.backend, e.backend)} {e.version or ''}".strip() for e in engines) or "none"


def _profile(report: Report) -> str | None:
    plan = report.plan
    if plan is None:
        return None
    place = f"on {named(plan.gpus)}" if plan.gpus else "on the processor, without a card"
    return f"{plan.name} {plan.verdict.replace('-', ' ')} with {TITLES.get(plan.backend, plan.backend)} {place}"


_LINES: dict[Area, Callable[[Report], str | None]] = {
    Area.driver: _driver,
    Area.gpus: _gpus,
    Area.pcie: _pcie,
    Area.p2p: _p2p,
    Area.memory: _memory,
    Area.power: _power,
    Area.host: _host,
    Area.container: _container,
    Area.amd: _of_vendor("amd", AMD),
    Area.intel: _of_vendor("intel", INTEL),
    Area.engines: _engines,
    Area.profile: _profile,
}
