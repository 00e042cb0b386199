"""`mgpu plan --exact`: what the engine itself projects, beside the plan."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgpu.backends.llama_cpp_log import HOST, DeviceBuffers
from mgpu.errors import UsageError

if TYPE_CHECKING:
    from mgpu.cli.options import PlannerOptions
    from mgpu.cli.prepared import Prepared
    from mgpu.planning.candidates import PlannedDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One card's memory, or the host's (`device` is None), as planned and as the engine projects it (None: it does
    not mention it). The driver's own memory is in neither."""

    device: PlannedDevice | None
    planned: DeviceBuffers
    projected: DeviceBuffers | None

    @property
    def difference_bytes(self) -> int | None:
        """By how much the engine projects more than was planned."""
        return self.projected.total_bytes - self.planned.total_bytes if self.projected else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The plan beside the projection of the engine at `program`, which took `seconds`; the host comes last."""

    program: Path
    seconds: float
    compared: tuple[Compared, ...]

    @property
    def largest_difference_bytes(self) -> int | None:
        """The largest difference of any card or the host; None if the engine leaves one of them out."""
        differences = [each.difference_bytes for each in self.compared]
        return max((abs(each) for each in differences if each is not None), default=None)


def for_exact(options: PlannerOptions, machine: str | None) -> PlannerOptions:
    """Return `options` with llama.cpp as the engine: it alone can be asked.

    Raises UsageError for a simulated machine and for another engine, Missing where there is none to ask.
    """
    from mgpu.backends.engine import require_llama_server
    from mgpu.cli.options import Backend

    if machine is not None:
        raise UsageError(
            "--exact asks the engine about devices that are here; those of --machine cannot be asked",
            hint="leave out one of --exact and --machine",
        )
    if options.backend not in (Backend.auto, Backend.llama_cpp):
        raise UsageError(
            f"--exact asks llama-server, and {options.backend} has no way to be asked", hint="leave --exact out"
        )
    require_llama_server()
    return replace(options, backend=Backend.llama_cpp)


def ask_engine(prepared: Prepared) -> Exact:
    """Return the chosen plan beside the engine's own projection. Nothing is loaded and nothing is left behind.

    Raises Missing, EngineFailed.
    """
    from mgpu.backends import load_backend
    from mgpu.backends.engine import LLAMA_CPP, require_llama_server
    from mgpu.backends.llama_cpp_projection import devices_of
    from mgpu.running.projection import project, work_folder

    candidate = prepared.plan.chosen
    engine = prepared.engine or require_llama_server()
    begun = time.monotonic()
    with work_folder() as folder:
        # Port 0 is any: nobody will ask it anything.
        serving = prepared.serving(LLAMA_CPP, name=prepared.name, host="127.0.0.1", port=0, folder=folder, api_key=None)
        serving = replace(serving, program=engine.path, model=str(_model_file(prepared, folder)))
        launch = load_backend(LLAMA_CPP).launch(candidate, serving)
        found = project(launch, folder)
    used = [device for device in candidate.devices if not device.idle]
    compared = [
        Compared(device=device, planned=_planned(device), projected=found.get(name))
        for device, name in zip(used, devices_of(launch.argv), strict=True)
    ]
    host = candidate.host
    planned = DeviceBuffers(weights_bytes=host.weights_bytes, kv_bytes=host.kv_bytes, compute_bytes=host.compute_bytes)
    compared.append(Compared(device=None, planned=planned, projected=found.get(HOST)))
    return Exact(program=engine.path, seconds=time.monotonic() - begun, compared=tuple(compared))


def exact_data(exact: Exact) -> dict[str, Any]:
    """Return the comparison as JSON."""
    *devices, host = exact.compared
    return {
        "program": str(exact.program),
        "seconds": round(exact.seconds, 3),
        "devices": [
            {"gpu": each.device.gpu, "uuid": each.device.uuid, "device": each.device.device, **_sides(each)}
            for each in devices
            if each.device
        ],
        "host": _sides(host),
        "largest_difference_bytes": exact.largest_difference_bytes,
    }


def _model_file(prepared: Prepared, folder: Path) -> Path:
    """A file with the model's header: the model itself where it is on disk, else a sparse one."""
    from mgpu.models.sparse import make_sparse_gguf, write_starts

    weights = prepared.weights
    if weights.path:
        return weights.path
    if weights.remote:
        return write_starts(folder, weights.remote.starts)
    profile, quantisation = prepared.model.profile, weights.facts.quantisation
    assert profile
    assert quantisation
    return make_sparse_gguf(folder / "model.gguf", profile.model, quantisation, name=prepared.name)


def _planned(device: PlannedDevice) -> DeviceBuffers:
    return DeviceBuffers(
        weights_bytes=device.weights_bytes, kv_bytes=device.kv_bytes, compute_bytes=device.compute_bytes
    )


def _sides(each: Compared) -> dict[str, Any]:
    return {
        "planned": _side(each.planned),
        "projected": _side(each.projected) if each.projected else None,
        "difference_bytes": each.difference_bytes,
    }


def _side(buffers: DeviceBuffers) -> dict[str, int]:
    return {
        "weights_bytes": buffers.weights_bytes,
        "kv_bytes": buffers.kv_bytes,
        "compute_bytes": buffers.compute_bytes,
        "total_bytes": buffers.total_bytes,
    }
