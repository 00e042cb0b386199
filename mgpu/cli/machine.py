"""`mgpu gpus` and `mgpu backends`: what this machine has, and what the engines see of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mgpu.cli.options import JsonOption, MachineOption
from mgpu.cli.result import Result
from mgpu.errors import MgpuError

if TYPE_CHECKING:
    from rich.console import RenderableType


def gpus(machine: MachineOption = None, json: JsonOption = False) -> Result:
    """Show the cards of this machine (or of another one): memory, links, what holds them."""
    import os

    from mgpu.backends.engine import DeviceQuery, find_llama_server
    from mgpu.cli.views.machine import machine_screen
    from mgpu.machine.probe import probe, with_engine_devices
    from mgpu.machine.simulate import simulate
    from mgpu.machine.snapshot import to_json

    warnings: list[str] = []
    if machine is not None:
        found = simulate(machine)
    else:
        found = probe()
        try:
            if engine := find_llama_server():
                devices = DeviceQuery(engine, rpc=os.environ.get("LLAMA_ARG_RPC")).devices()
                found = with_engine_devices(found, devices, backend=engine.backend)
        except MgpuError as error:
            warnings.append(error.message)
    return Result(
        command="gpus",
        data=to_json(found),
        screen=lambda width: machine_screen(found, width),
        simulated=found.source == "simulated",
        warnings=tuple(warnings),
    )


def backends(json: JsonOption = False) -> Result:
    """Show which engines are installed, their version, and the devices they see."""
    engines = [_llama_cpp(), _program("vllm", "vllm"), _program("ollama", "ollama")]
    return Result(command="backends", data={"backends": engines}, screen=lambda _: _backends_screen(engines))


def _llama_cpp() -> dict[str, Any]:
    import os

    from mgpu.backends.engine import INSTALL_LLAMA_CPP, DeviceQuery, find_llama_server, version
    from mgpu.machine.snapshot import to_json

    entry: dict[str, Any] = {
        "backend": "llama.cpp",
        "installed": False,
        "path": None,
        "version": None,
        "devices": None,
        "problem": None,
        "note": None,
    }
    try:
        engine = find_llama_server()
        if engine is None:
            return entry | {"note": INSTALL_LLAMA_CPP}
        entry |= {"installed": True, "path": str(engine.path), "note": f"found in {engine.found_in}"}
        query = DeviceQuery(engine, rpc=os.environ.get("LLAMA_ARG_RPC"))
        with contextlib.closing(query):
            entry["version"] = version(engine)
            entry["devices"] = [to_json(device) for device in query.devices()]
    except MgpuError as error:
        entry["problem"] = error.message
    return entry


def _program(backend: str, program: str) -> dict[str, Any]:
    path = shutil.which(program)
    note = "this version of mgpu does not start it yet" if path else "not on PATH"
    return {
        "backend": backend,
        "installed": path is not None,
        "path": path,
        "version": None,
        "devices": None,
        "problem": None,
        "note": note,
    }


def _backends_screen(engines: list[dict[str, Any]]) -> Iterator[RenderableType]:
    for entry in engines:
        yield f"{entry['backend']:<10} {entry['version'] or ('installed' if entry['installed'] else 'not installed')}"
        if entry["path"]:
            yield f"           {entry['path']}"
        for device in entry["devices"] or ():
            total, free = device["total_bytes"] / 2**30, device["free_bytes"] / 2**30
            yield f"           {device['id']:<9} {device['description']}  {total:.1f} GiB, {free:.1f} free"
        if entry["devices"] == []:
            yield "           sees no device: it runs on the CPU"
        yield f"           {entry['problem'] or entry['note']}"
