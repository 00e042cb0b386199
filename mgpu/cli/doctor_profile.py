"""What a profile needs of the machine: its plan, its engine's flags, and the facts that checks judge it by."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mgpu.cli.options import Backend, PlannerOptions
from mgpu.doctor.check import Purpose
from mgpu.doctor.plans import ProfilePlan, unknown_flags
from mgpu.errors import MgpuError, UsageError
from mgpu.machine.snapshot import to_json
from mgpu.running.ports import FIRST_PORT

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.machine.inspection import Inspection
    from mgpu.models.forms import Weights
    from mgpu.planning.candidates import Candidate


def profile_purpose(
    model: str, purpose: Purpose, gpus: str | None, saved: Inspection | None
) -> tuple[Purpose, ProfilePlan]:
    """Return the purpose with what the model needs, and its plan on this machine or on a saved one; `gpus` are the
    cards to plan for, as `--gpus` takes them (None: those that a plan takes of itself).

    A plan that cannot be made is part of the diagnosis. Raises UsageError for a profile that is none.
    """
    try:
        prepared = _prepared(model, purpose, gpus, saved)
    except UsageError:
        raise
    except MgpuError as error:
        if error.code == "model-missing":
            raise
        plan = ProfilePlan(
            name=model, backend=purpose.backend or "mgpu", verdict="it cannot be planned", reasons=(error.message,)
        )
        return purpose, plan
    chosen, facts = prepared.plan.chosen, prepared.plan.model
    needs = replace(
        purpose,
        backend=purpose.backend or prepared.backend,
        tensor_parallel=purpose.tensor_parallel or _cut_over(chosen),
        attention_heads=facts.heads,
        kv_heads=facts.kv_heads,
        weights_bytes=facts.file_bytes,
        missing_bytes=facts.file_bytes if saved else _missing_bytes(prepared),
        port=FIRST_PORT,
    )
    flags, unasked = _unknown_flags(prepared)
    plan = ProfilePlan(
        name=model,
        backend=prepared.backend,
        verdict=chosen.verdict,
        gpus=tuple(device.gpu for device in chosen.devices),
        reasons=chosen.reasons,
        short_bytes=chosen.short_bytes,
        install=prepared.ways[prepared.backend].install,
        missing_flags=flags,
        unasked=unasked,
    )
    return needs, plan


def _cut_over(chosen: Candidate) -> int | None:
    """Over how many cards the plan cuts a tensor: 1 where vLLM has one card, None where cards take whole layers."""
    if chosen.tensor_parallel > 1 or (chosen.backend == Backend.vllm and len(chosen.devices) == 1):
        return chosen.tensor_parallel
    return None


def _prepared(model: str, purpose: Purpose, gpus: str | None, saved: Inspection | None) -> Prepared:
    from mgpu.cli.prepare import prepare

    cut = purpose.tensor_parallel if purpose.backend in (None, Backend.vllm) else None
    options = PlannerOptions(backend=Backend(purpose.backend or Backend.auto), tensor_parallel=cut, gpus=gpus)
    if saved is None:
        return prepare(model, options)
    import json

    with tempfile.TemporaryDirectory(prefix="mgpu-doctor-") as folder:
        machine = Path(folder) / "machine.json"
        machine.write_text(json.dumps(to_json(saved.machine)))
        return prepare(model, options, machine=str(machine))


def _missing_bytes(prepared: Prepared) -> int:
    """What is still to be written to a disk before the engine can load the model: what a download has fetched so far
    is there. Ollama links a file of its own disk, and copies one of another."""
    from mgpu.models.source import OllamaTag

    weights, whole = prepared.weights, prepared.plan.model.file_bytes
    if weights.path is None:
        return max(0, whole - _begun_bytes(weights))
    copied = prepared.backend == Backend.ollama and not isinstance(weights.source, OllamaTag)
    return whole if copied and not _on_ollamas_disk(weights.path) else 0


def _begun_bytes(weights: Weights) -> int:
    """What is in Hugging Face's cache of files that are not all there."""
    from mgpu.models.hub import cache_folder
    from mgpu.models.local import local_models

    repository = getattr(weights.source, "repository", None)
    if repository is None:
        return 0
    if checksums := [each for each in getattr(weights.source, "sha256", ()) if each]:
        blobs = cache_folder() / f"models--{repository.replace('/', '--')}" / "blobs"
        return sum(_largest_bytes(blobs, checksum) for checksum in checksums)
    begun = (each for each in local_models() if each.state == "partial" and each.repository == repository)
    return sum(each.bytes for each in begun if each.format == "safetensors")


def _largest_bytes(blobs: Path, checksum: str) -> int:
    """The size of a file by its content, whole or not: several programs may have begun it."""
    try:
        return max((path.stat().st_size for path in blobs.glob(f"{checksum}*")), default=0)
    except OSError:
        return 0


def _on_ollamas_disk(path: Path) -> bool:
    from mgpu.models.transfer import existing_folder

    folder = os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models")  # noqa: PTH111 - never raises
    try:
        return path.stat().st_dev == existing_folder(Path(folder)).stat().st_dev
    except OSError:
        return False


def _unknown_flags(prepared: Prepared) -> tuple[tuple[str, ...] | None, str | None]:
    """The planned flags that the engine's --help does not list, or why nobody knows."""
    from mgpu.cli.plan import candidate_data

    engine, chosen = prepared.engine, prepared.plan.chosen
    if engine is None or chosen.verdict == "illegal" or prepared.backend == Backend.ollama:
        return None, None  # not installed, not to be started, or without flags that a plan sets
    if prepared.backend == Backend.vllm:
        from mgpu.backends.vllm_program import remembered_help

        text = remembered_help(engine)
        if text is None:
            return None, "vLLM's --help takes ten seconds, and is asked for by the first mgpu run with vLLM"
    else:
        from mgpu.backends.engine import help_text

        try:
            text = help_text(engine)
        except MgpuError as error:
            return None, error.message
    return unknown_flags(candidate_data(prepared, chosen)["argv"], text), None
