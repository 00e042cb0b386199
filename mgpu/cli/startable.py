"""What keeps an engine from starting, said before gigabytes are fetched for it."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from mgpu.cli.options import Backend
from mgpu.errors import BadModel, Missing, NoAnswer

if TYPE_CHECKING:
    from mgpu.cli.prepared import Prepared
    from mgpu.cli.serving import Endpoint


def require_startable(prepared: Prepared, endpoint: Endpoint) -> None:
    """Raise what would keep the engine from starting, before gigabytes are fetched for it: that it is not installed,
    that the model does not fit, that the port cannot be used, that the engine cannot be told what was asked for."""
    from mgpu.cli.serving import build_launch
    from mgpu.planning.choice import TITLES
    from mgpu.running.state import state_path

    if prepared.engine is None:
        missing = f"{TITLES[prepared.backend]} is not installed"
        raise Missing(missing, code="engine-missing", hint=prepared.ways[prepared.backend].install)
    require_fit(prepared)
    _require_port(endpoint)
    build_launch(prepared, endpoint, port=endpoint.port or 1, folder=state_path() / endpoint.name)
    _require_tokenizer(prepared)


def _require_port(endpoint: Endpoint) -> None:
    from mgpu.running.census import port_of
    from mgpu.running.ports import choose_port
    from mgpu.running.registry import instances

    port = endpoint.port
    try:
        choose_port(endpoint.host, port)
    except Missing as error:
        if error.code != "port-in-use" or port is None:
            raise
        living = [entry for entry in instances() if entry.instance and not entry.is_over]
        owner = next((entry.name for entry in living if entry.instance and port_of(entry.instance.url) == port), None)
        if owner is None:
            raise
        raise Missing(
            f"port {port} is taken by your instance {owner}",
            code=error.code,
            hint=f"mgpu stop {owner}, or another --port; left out, mgpu takes a free one",
        ) from None


def require_fit(prepared: Prepared) -> None:
    """Raise NoAnswer unless the plan can run, with the cheapest ways out."""
    if refusal := why_not(prepared):
        raise refusal


def why_not(prepared: Prepared) -> NoAnswer | None:
    """Return why the plan cannot run, with the cheapest ways out; None where it can."""
    plan = prepared.plan
    if plan.best is not None:
        return None
    verdict, reasons = plan.chosen.verdict, "\n".join(plan.chosen.reasons)
    what = {"illegal": "cannot be run so", "unavailable": "fits no engine that is installed"}
    changes = [fix.change for fix in plan.fixes]
    if verdict == "unavailable":  # that an engine is missing is what was said: how to get it must not be cut off
        changes.sort(key=lambda change: not change.startswith("mgpu backends install"))
    changes = changes[:3]
    fixes = [f"add {change}" if change.startswith("--") else change for change in changes]
    return NoAnswer(
        f"{prepared.name} {what.get(verdict, 'does not fit')}\n{reasons}",
        code="illegal" if verdict == "illegal" else "does-not-fit",
        hint="   or   ".join(fixes)
        or _lawful(prepared, reasons)
        or f"mgpu plan {shlex.quote(prepared.argument)} shows the ledger",
    )


def _require_tokenizer(prepared: Prepared) -> None:
    """Raise BadModel for a folder in which vLLM would miss the tokenizer, after a quarter of a minute."""
    from mgpu.models.folder import has_tokenizer

    folder, arguments = prepared.weights.path, prepared.ways[prepared.backend].arguments
    own = any(word.partition("=")[0] in ("--tokenizer", "--skip-tokenizer-init") for word in arguments)
    if prepared.backend == Backend.vllm and folder and not own and not has_tokenizer(folder):
        raise BadModel(
            f"{folder} holds no tokenizer: vLLM cannot serve a model without one",
            code="model-missing",
            hint="copy tokenizer.json and tokenizer_config.json of the model there, or name one: -- --tokenizer PATH",
        )


def _lawful(prepared: Prepared, reasons: str) -> str | None:
    """What to ask for instead of a shape or a context that is not possible, where the reasons tell."""
    if sizes := re.search(r"tensor parallel sizes that work: (.*)", reasons):
        cards = len(prepared.ways[prepared.backend].gpus) or 1
        size = max(size for size in map(int, sizes[1].split(", ")) if size <= cards)
        fewer = f"--gpus {size} " if size < cards else ""
        return f"{fewer}--tensor-parallel {size}, or leave it out and mgpu chooses"
    if shape := re.search(r"a shape of .* takes (\d+) cards?, and there (?:are|is) (\d+)", reasons):
        return f"--gpus {shape[1]}" if int(shape[1]) < int(shape[2]) else "a smaller shape, or leave it to mgpu"
    most = re.search(r"more than the (\d+) vLLM allows|gives a user (\d+) tokens at most", reasons)
    return f"--ctx {most[1] or most[2]}" if most else None
