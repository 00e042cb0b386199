"""`mgpu` alone: where you stand and what to type next."""

from __future__ import annotations

from collections.abc import Iterator

from mgpu import __version__
from mgpu.cli.result import Result


def overview_result() -> Result:
    """Return the overview: cards, engine, and the commands that come next."""
    from mgpu.backends.engine import find_llama_server
    from mgpu.cli.views.words import card_name
    from mgpu.errors import Missing
    from mgpu.machine.probe import probe
    from mgpu.units import GIB

    machine = probe()
    try:
        engine = find_llama_server()
    except Missing:
        engine = None
    counts: dict[str, int] = {}
    for gpu in machine.gpus:
        size = f" {gpu.total_bytes / GIB:.0f} GiB" if gpu.total_bytes else ""
        name = f"{card_name(gpu.name)}{size}"
        counts[name] = counts.get(name, 0) + 1
    cards = ", ".join(f"{count}× {name}" for name, count in counts.items()) or "no GPU found by a driver"
    driver = f"driver {machine.driver.version}" if machine.driver and machine.driver.version else None
    llama = "llama.cpp" if engine else "llama.cpp not installed"
    standing = " · ".join(part for part in (f"mgpu {__version__}", cards, driver, llama) if part)

    def screen(_: int) -> Iterator[str]:
        yield standing
        yield ""
        yield '  mgpu run smollm2-135m --ask "Hello"     start a small model, ask it, stop'
        yield "  mgpu plan llama-70b --machine 2x4090    what fits on two cards you may buy"
        yield "  mgpu gpus                               the cards of this machine"
        yield "  mgpu profiles list                      the models mgpu knows by name"
        yield ""
        yield "  mgpu --help"

    return Result(
        command="mgpu",
        data={"version": __version__, "gpus": len(machine.gpus), "llama_cpp": str(engine.path) if engine else None},
        screen=screen,
    )
