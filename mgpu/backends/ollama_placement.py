"""Whether Ollama put a model where the plan wants it: it falls back to fewer cards, or to none, without an error.

Neither its "offloaded 31/31 layers to GPU" nor the `size_vram` of /api/ps can be relied on: both were recorded on a
machine without any card, where buffers of the CPU's matrix unit count as card memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mgpu.backends.ollama_log import Runner, found_devices, planned_index, planned_runner
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.units import MIB, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model as /api/ps lists it. `size_bytes` and `size_vram_bytes` are what Ollama believes; `ctx_tokens` is what
    each user gets, None where the server does not say."""

    name: str
    size_bytes: int | None
    size_vram_bytes: int | None
    ctx_tokens: int | None


def missing_devices(candidate: Candidate, lines: Sequence[str]) -> str | None:
    """Return a sentence when Ollama found fewer cards than planned, None when all are there or it has not said yet.

    It can be asked as soon as Ollama answers: a wrong card index is no error to it, but a silent fall-back.
    """
    planned = [device for device in candidate.devices if not device.idle]
    found = found_devices(lines)
    if found is None or not planned:
        return None
    seen = {planned_index(device, candidate) for device in found} - {None}
    lost = [device for index, device in enumerate(candidate.devices) if not device.idle and index not in seen]
    if not found:
        return f"Ollama found no card and will run on the CPU; asked for: {_names(planned)}"
    if lost:
        others = ", ".join(device.description or device.name for device in found)
        return f"Ollama did not find {_names(lost)}; it sees only {others}"
    return None


def verify_placement(candidate: Candidate, lines: Sequence[str], loaded: LoadedModel | None = None) -> tuple[str, ...]:
    """Return what is not as planned once the model is loaded, each as a sentence to be shown loudly; () when all is.

    `lines` is Ollama's log since its start, `loaded` what /api/ps says of the model. Each planned card must hold
    weights and, where it has layers, a KV cache; what `loaded` says of memory is never evidence by itself.
    """
    planned = [device for device in candidate.devices if not device.idle]
    complaints = []
    if problem := missing_devices(candidate, lines):
        complaints.append(problem)
    runner = planned_runner(lines)
    if planned and (runner is None or not runner.allocated):
        complaints.append("Ollama's log does not say on which cards the model is, so that this could not be checked")
    elif planned and runner:
        complaints += _misplaced(candidate, planned, runner)
        complaints += _fewer_layers(candidate, runner)
    if loaded and loaded.ctx_tokens and loaded.ctx_tokens != candidate.ctx_tokens:
        fewer = "Ollama lowers it to what the model was trained on, or to what its memory allows"
        more = "the model brings its own num_ctx, which counts more than OLLAMA_CONTEXT_LENGTH"
        why = fewer if loaded.ctx_tokens < candidate.ctx_tokens else more
        complaints.append(
            f"each user gets {loaded.ctx_tokens} tokens of context instead of the {candidate.ctx_tokens} planned: {why}"
        )
    return tuple(complaints)


def _misplaced(candidate: Candidate, planned: Sequence[PlannedDevice], runner: Runner) -> list[str]:
    """What stands on other cards than planned."""
    if not runner.cards:
        return [f"the whole model is in RAM and runs on the CPU; asked for: {_names(planned)}"]
    held = {planned_index(device, candidate): buffers for device, buffers in runner.cards}
    complaints = []
    strangers = [device for device, _ in runner.cards if planned_index(device, candidate) is None]
    if strangers:
        names = ", ".join(device.description or device.name for device in strangers)
        complaints.append(f"part of the model is on {names}, which is not in the plan")
    empty = []
    for index, device in enumerate(candidate.devices):
        there = held.get(index)
        if not device.idle and (not there or not there.weights_bytes or (device.layers and not there.kv_bytes)):
            empty.append(device)
    on = [candidate.devices[index] for index in sorted(i for i in held if i is not None)]
    on = [device for device in on if device not in empty]
    if empty and len(on) == 1 and not strangers:
        complaints.append(
            f"the whole model is on {_names(on)}; {_names(empty)} holds nothing "
            "(Ollama spreads a model only with OLLAMA_SCHED_SPREAD=1)"
        )
    elif empty:
        complaints.append(
            f"{_names(empty)} {'do not hold their parts' if len(empty) > 1 else 'does not hold its part'} of the model"
        )
    return complaints


def _fewer_layers(candidate: Candidate, runner: Runner) -> list[str]:
    """Fewer layers on cards than planned: llama.cpp's fit leaves them in RAM when a card gets too full."""
    wanted = sum(device.layers + device.head for device in candidate.devices)
    if not runner.cards or runner.layers is None or runner.of_layers is None or runner.layers >= wanted:
        return []
    headroom = candidate.wants.headroom_bytes
    complaint = (
        f"only {runner.layers} of {runner.of_layers} layers are on cards, {wanted} were planned: the rest is in RAM, "
        f"and slow. Ollama keeps {gib(headroom)} free on each card (LLAMA_ARG_FIT_TARGET={headroom // MIB}); "
        "a smaller --headroom, --ctx or --parallel makes room"
    )
    return [complaint]


def _names(devices: Sequence[PlannedDevice]) -> str:
    names = [f"gpu{device.gpu}" for device in devices]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "no card"
