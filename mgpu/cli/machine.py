"""`mgpu gpus`: what this machine has, and what the engine sees of it."""

from __future__ import annotations

from mgpu.cli.options import JsonOption, MachineOption
from mgpu.cli.result import Result
from mgpu.errors import MgpuError


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
