"""The machine's screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgpu.cli.views.words import card_name, cell_gib, fitting, plain_table, unknown
from mgpu.machine.snapshot import Gpu, Host, Machine
from mgpu.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def machine_screen(machine: Machine, width: int) -> Iterator[RenderableType]:
    """Yield the screen of `mgpu gpus`."""
    if machine.driver and machine.driver.problem:
        yield f"driver: {machine.driver.problem}"
    if not machine.gpus:
        yield no_gpu_line(machine)
        return
    yield _summary(machine)
    yield ""
    yield _cards_table(machine, width)
    for gpu in machine.gpus:
        if gpu.problem:
            yield f"  gpu{gpu.index} cannot be used: it {gpu.problem}"
        for process in gpu.used_by:
            held = f"{cell_gib(process.bytes)} GiB" if process.bytes is not None else "an unknown amount"
            yield f"  gpu{gpu.index}: {process.name or 'a process'} (pid {process.pid}) holds {held}"
    if machine.links:
        yield ""
        yield from _links(machine)


def no_gpu_line(machine: Machine) -> str:
    """Return the one line that says there is no card, which is a normal state."""
    if machine.source == "simulated":
        return "no GPU   SIMULATED"
    why = "no usable NVIDIA driver" if machine.driver else "no NVIDIA driver"
    return f"no GPU found: {why}, no AMD card, and llama.cpp lists no device. On the CPU: {host_words(machine.host)}"


def host_words(host: Host) -> str:
    """Return cores and memory in a few words."""
    ram = f"{host.ram_bytes / GIB:.0f} GiB" if host.ram_bytes else "? GiB"
    return f"{unknown(host.cores)} cores, {ram} RAM"


def _summary(machine: Machine) -> str:
    driver = f"driver {machine.driver.version}" if machine.driver and machine.driver.version else None
    cuda = f"CUDA {machine.driver.cuda}" if machine.driver and machine.driver.cuda else None
    place = next((p for p in (machine.host.container, machine.host.virtualisation) if p and p != "none"), None)
    count = f"{len(machine.gpus)} card" + ("s" if len(machine.gpus) > 1 else "")
    host = None if machine.source == "simulated" else host_words(machine.host)
    stamp = "SIMULATED" if machine.source == "simulated" else None
    return " · ".join(part for part in (count, driver, cuda, host, place, stamp) if part)


def _cards_table(machine: Machine, width: int) -> RenderableType:
    return fitting(width, lambda: _cards(machine, narrow=False), lambda: _cards(machine, narrow=True))


def _cards(machine: Machine, *, narrow: bool) -> Table:
    headings = [("card", "left"), ("name", "left"), ("GiB", "right"), ("free", "right")]
    if not narrow:
        headings += [("GB/s", "right"), ("PCIe", "left"), ("load", "right"), ("W", "right"), ("°C", "right")]
    table = plain_table([*headings, ("engine sees", "left")], wrapping="name")
    for gpu in machine.gpus:
        cells = [f"gpu{gpu.index}", card_name(gpu.name), cell_gib(gpu.total_bytes, 1), cell_gib(gpu.free_bytes, 1)]
        if not narrow:
            cells += [_whole(gpu.bandwidth_gb_s), _pcie(gpu), unknown(gpu.utilisation_percent, " %"), _power(gpu)]
            cells += [unknown(gpu.temperature_c)]
        table.add_row(*cells, ",".join(gpu.engine_devices) or "-")
    return table


def _whole(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _power(gpu: Gpu) -> str:
    return "?" if gpu.power_w is None else f"{gpu.power_w:.0f}/{_whole(gpu.power_limit_w)}"


def _pcie(gpu: Gpu) -> str:
    """Generation the card and board can do (an idle card shows gen 1) and the lanes in use."""
    pcie = gpu.pcie
    if pcie.gen_max is None and pcie.width is None:
        return "?"
    of = f" of x{pcie.width_max}" if pcie.width and pcie.width_max and pcie.width < pcie.width_max else ""
    return f"gen{unknown(pcie.gen_max)} x{unknown(pcie.width)}{of}"


def _links(machine: Machine) -> Iterator[str]:
    by_kind: dict[tuple[str, bool | None], list[str]] = {}
    for link in machine.links:
        by_kind.setdefault((link.kind, link.p2p), []).append(f"{link.a}-{link.b}")
    for (kind, p2p), pairs in by_kind.items():
        peer = {True: "peer access granted", False: "no peer access", None: "peer access unknown"}[p2p]
        shown = ", ".join(pairs[:8]) + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")
        yield f"  {kind:<8} {peer:<20} {shown}"
