"""vLLM's /metrics as samples.

Counters move while a request runs, token by token, so nothing is unfinished here. With replicas every series exists
once for each engine; counts are summed, the use of the KV cache is the mean.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgpu.backends.backend import Get
from mgpu.backends.samples import Sample, has_metrics, parse_metrics

METRICS_PATH = "/metrics"


def sample(at: float, get: Get) -> Sample | None:
    """Read the engine's counters at second `at`; None when it does not answer, or with something else."""
    text = get(METRICS_PATH) or ""
    return sample_from_text(at, text) if has_metrics(text) else None


def sample_from_text(at: float, text: str) -> Sample:
    """The reading at second `at` from the body of /metrics. Never raises; what is not there is None.

    Older versions called the KV cache's use `gpu_cache_usage_perc`; it is a fraction under either name.
    """
    series = parse_metrics(text)
    kv_used = _values(series, "vllm:kv_cache_usage_perc") or _values(series, "vllm:gpu_cache_usage_perc")
    return Sample(
        at=at,
        running=_whole(_sum(series, "vllm:num_requests_running")),
        waiting=_whole(_sum(series, "vllm:num_requests_waiting")),
        prompt_tokens_total=_sum(series, "vllm:prompt_tokens_total"),
        prompt_seconds_total=_sum(series, "vllm:request_prefill_time_seconds_sum"),
        generation_tokens_total=_sum(series, "vllm:generation_tokens_total"),
        generation_seconds_total=_sum(series, "vllm:request_decode_time_seconds_sum"),
        kv_used=min(max(sum(kv_used) / len(kv_used), 0.0), 1.0) if kv_used else None,
    )


def _values(series: Mapping[str, float], name: str) -> list[float]:
    return [value for key, value in series.items() if key == name or key.startswith(name + "{")]


def _sum(series: Mapping[str, float], name: str) -> float | None:
    values = _values(series, name)
    return sum(values) if values else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
