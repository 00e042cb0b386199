"""llama-server's /metrics and /slots as samples.

Measured on build 10434: `tokens_predicted_total` moves only when a request ends and `prompt_tokens_total`
only when a prompt is done, so that a long answer would look idle. The tokens of unfinished answers are in
/slots, and are added here. /metrics has no gauge of KV cache use; /slots tells it, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mgpu.backends.samples import Sample, parse_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotUse:
    """What the slots hold now: `kv_used` is the fraction of all slots' context taken by running requests
    (0.0 when idle: prompts kept from finished requests give way), None when the engine does not say."""

    busy: int
    unfinished_tokens: int
    kv_used: float | None


def parse_slots(text: str) -> SlotUse | None:
    """The answer of /slots, or None when it is not a list of slots. Never raises.

    A slot's `n_prompt_tokens` counts its prompt and what it has generated so far. The context of a slot is
    its own (mgpu always passes `-np`, which keeps the cache from being shared by all slots).
    """
    try:
        slots = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
        return None
    busy = [slot for slot in slots if slot.get("is_processing") is True]
    context = sum(_count(slot.get("n_ctx")) for slot in slots)
    used = sum(_count(slot.get("n_prompt_tokens")) for slot in busy)
    return SlotUse(
        busy=len(busy),
        unfinished_tokens=sum(_decoded(slot) for slot in busy),
        kv_used=min(used / context, 1.0) if context else None,
    )


def sample_from_text(at: float, metrics: str, slots: str | None = None) -> Sample:
    """The reading at second `at` from the bodies of /metrics and /slots (None when it was not answered)."""
    series = parse_metrics(metrics)
    use = parse_slots(slots) if slots is not None else None
    return Sample(
        at=at,
        running=_whole(series.get("llamacpp:requests_processing")),
        waiting=_whole(series.get("llamacpp:requests_deferred")),
        prompt_tokens_total=series.get("llamacpp:prompt_tokens_total"),
        prompt_seconds_total=series.get("llamacpp:prompt_seconds_total"),
        generation_tokens_total=series.get("llamacpp:tokens_predicted_total"),
        generation_seconds_total=series.get("llamacpp:tokens_predicted_seconds_total"),
        unfinished_tokens=use.unfinished_tokens if use else 0,
        kv_used=use.kv_used if use else None,
    )


def _decoded(slot: dict[str, Any]) -> int:
    progress = slot.get("next_token")
    entries = progress if isinstance(progress, list) else [progress]
    return sum(_count(entry.get("n_decoded")) for entry in entries if isinstance(entry, dict))


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
