"""What a profile needs of the machine: its plan, its engine's flags, and the facts that checks judge it by."""

from __future__ import annotations

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
    from mgpu.cli.prepare import Prepared


def profile_purpose(model: str, purpose: Purpose, replay: Path | None) -> tuple[Purpose, ProfilePlan]:
    """Return the purpose with what the model needs, and its plan on this machine or on a saved one.

    A plan that cannot be made is part of the diagnosis. Raises UsageError for a profile that is none, and Missing for a
    saved machine that cannot be read.
    """
    try:
        prepared = _prepared(model, purpose, replay)
    except UsageError:
        raise
    except MgpuError as error:
        if error.code in ("replay-unusable", "model-missing"):
            raise
        plan = ProfilePlan(
            name=model, backend=purpose.backend or "mgpu", verdict="it cannot be planned", reasons=(error.message,)
        )
        return purpose, plan
    chosen, facts = prepared.plan.chosen, prepared.plan.model
    needs = replace(
        purpose,
        backend=purpose.backend or prepared.backend,
        tensor_parallel=purpose.tensor_parallel or (chosen.tensor_parallel if chosen.tensor_parallel > 1 else None),
        attention_heads=facts.heads,
        kv_heads=facts.kv_heads,
        weights_bytes=facts.file_bytes,
        port=FIRST_PORT,
    )
    flags, unasked = _unknown_flags(prepared)
    plan = ProfilePlan(
        name=model,
        backend=prepared.backend,
        verdict=chosen.verdict,
        reasons=chosen.reasons,
        short_bytes=chosen.short_bytes,
        install=prepared.ways[prepared.backend].install,
        missing_flags=flags,
        unasked=unasked,
    )
    return needs, plan


def _prepared(model: str, purpose: Purpose, replay: Path | None) -> Prepared:
    from mgpu.cli.prepare import prepare

    cut = purpose.tensor_parallel if purpose.backend in (None, Backend.vllm) else None
    options = PlannerOptions(backend=Backend(purpose.backend or Backend.auto), tensor_parallel=cut)
    if replay is None:
        return prepare(model, options)
    import json

    from mgpu.doctor.saved import replay as read_saved

    with tempfile.TemporaryDirectory(prefix="mgpu-doctor-") as folder:
        machine = Path(folder) / "machine.json"
        machine.write_text(json.dumps(to_json(read_saved(replay).machine)))
        return prepare(model, options, machine=str(machine))


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
