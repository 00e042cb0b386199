"""The bodies of vLLM's answers, shaped as 0.32.0 was recorded to give them."""

from __future__ import annotations

import re
import secrets
import time
from functools import cache
from typing import Any

from tests.fakes.vllm_log_lines import RECORDED
from tests.fakes.vllm_model import Memory
from tests.fakes.vllm_options import Settings
from tests.fakes.vllm_requests import Counters

Json = dict[str, Any]
_NOTHING = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
_SERIES = re.compile(r'(?m)^(?P<name>[\w:]+)(?P<labels>\{.*engine="0".*\}) (?P<value>\S+)$')


def error(message: str, kind: str, param: str | None, status: int) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


DEAD = error(
    "EngineCore encountered an issue. See stack trace (above) for the root cause.", "InternalServerError", None, 500
)


def invalid(place: str, kind: str, message: str, given: object, **more: object) -> Json:
    """A body that does not have the form it must have."""
    what = {"type": kind, "loc": place, "msg": message, "input": f"<{type(given).__name__} of {_size(given)} items>"}
    return error(f"1 validation error:\n  {what | more}", "Bad Request", place, 400)


def fingerprint(settings: Settings, version: str, mark: str) -> str:
    shape = {"tp": settings.tensor, "pp": settings.pipeline, "dp": settings.replicas}
    return "-".join([f"vllm-{version}", *(f"{name}{size}" for name, size in shape.items() if size > 1), mark])


def models(settings: Settings) -> Json:
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": int(time.time()),
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    shown = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": settings.model}
    more = {"parent": None, "max_model_len": settings.max_model_len, "permission": [permission]}
    return {"object": "list", "data": [{"id": name, **shown, **more} for name in settings.names]}


class Answer:
    """One answer on the way, as a chat or a completion."""

    def __init__(self, *, chat: bool, model: str, mark: str, prompt_tokens: int) -> None:
        self.chat, self.model, self.mark, self.prompt_tokens = chat, model, mark, prompt_tokens
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(8)}"
        self.created = int(time.time())

    def whole(self, answers: list[tuple[str, str]], made: int) -> Json:
        """In one piece: a text and the reason of its end for every choice."""
        choices = [self._choice(index, *answer) for index, answer in enumerate(answers)]
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        prompt = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None} if self.chat else {}
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self.mark,
            "usage": {**self.usage(made), **details},
            **prompt,
            **_NOTHING,
        }

    def opening(self, index: int, *, usage: bool) -> Json:
        """The first chunk of a chat, which says whose turn it is."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        counted = {"usage": {**self.usage(0), "completion_tokens_details": None}} if usage else {}
        head = self._head("chat.completion.chunk")
        nothing = {"prompt_token_ids": None, "prompt_text": None}
        return {**head, "choices": [{**choice, "finish_reason": None}], **counted, **nothing}

    def chunk(self, index: int, text: str, reason: str | None, *, made: int | None, last: bool) -> Json:
        """One token; with `made` (how many there are) also the usage so far, and when `last` the fingerprint."""
        if self.chat:
            choice: Json = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}
            choice |= ({"stop_reason": None} if reason else {}) | {"token_ids": None}
        else:
            choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
            choice |= {"prompt_token_ids": None, "token_ids": None}
        body = {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}
        if made is not None:
            body["usage"] = {**self.usage(made), **({"completion_tokens_details": None} if self.chat else {})}
        return body | ({"system_fingerprint": self.mark} if last else {})

    def closing(self, made: int) -> Json:
        """The chunk that has the usage and nothing else."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [], "usage": self.usage(made), "system_fingerprint": self.mark}

    def usage(self, made: int) -> Json:
        total = self.prompt_tokens + made
        return {"prompt_tokens": self.prompt_tokens, "total_tokens": total, "completion_tokens": made}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, text: str, reason: str) -> Json:
        end = {"logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None}
        if not self.chat:
            more = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
            return {"index": index, "text": text, **end, **more}
        nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        return {"index": index, "message": {"role": "assistant", "content": text, **nothing}, **end} | {
            "routed_experts": None
        }


def metrics(settings: Settings, memory: Memory, counters: list[Counters]) -> str:
    """The recorded text with the counters as they are now, for every engine core."""

    def each(match: re.Match[str]) -> str:
        name, labels = match["name"], match["labels"].replace('model_name="tiny"', f'model_name="{settings.names[0]}"')
        lines = []
        for index, counted in enumerate(counters):
            values = _values(counted)
            ended = re.search(r'finished_reason="(\w+)"', labels)
            value = counted.ended.get(ended[1], 0) if ended and name.endswith("_total") else values.get(name)
            if 'reason="capacity"' in labels and "waiting" in name:
                value = counted.waiting
            shown = match["value"] if value is None else repr(float(value))
            own = labels.replace('engine="0"', f'engine="{index}"')
            lines.append(f"{name}{own} {shown}")
        return "\n".join(lines)

    sizes = {
        "kv_cache_size_tokens": memory.kv_tokens,
        "kv_cache_memory_bytes": memory.kv_bytes[0],
        "block_size": memory.block_tokens,
        "num_gpu_blocks": memory.kv_tokens // memory.block_tokens,
        "gpu_memory_utilization": settings.utilization,
        "kv_cache_max_concurrency": memory.kv_tokens / (settings.max_model_len or 1),
    }
    text = _recorded()
    for name, size in sizes.items():
        text = re.sub(rf'([{{,]){name}="[^"]*"', rf'\g<1>{name}="{size}"', text)
    return _SERIES.sub(each, text)


def _values(counted: Counters) -> dict[str, float]:
    ended = sum(counted.ended[reason] for reason in ("stop", "length"))
    sums = {
        "request_prompt_tokens": counted.ended_prompt_tokens,
        "request_generation_tokens": counted.ended_generation_tokens,
        "request_queue_time_seconds": counted.seconds["queue"],
        "request_prefill_time_seconds": counted.seconds["prefill"],
        "request_decode_time_seconds": counted.seconds["decode"],
        "request_inference_time_seconds": counted.seconds["prefill"] + counted.seconds["decode"],
        "time_to_first_token_seconds": counted.seconds["first"],
        "e2e_request_latency_seconds": counted.seconds["whole"],
    }
    return {
        "vllm:num_requests_running": counted.running,
        "vllm:num_requests_waiting": counted.waiting,
        "vllm:kv_cache_usage_perc": counted.kv_used,
        "vllm:prompt_tokens_total": counted.prompt_tokens,
        "vllm:generation_tokens_total": counted.generation_tokens,
        "vllm:iteration_tokens_total_count": counted.steps,
        **{f"vllm:{name}_sum": value for name, value in sums.items()},
        **{f"vllm:{name}_count": ended for name in sums},
    }


@cache
def _recorded() -> str:
    return (RECORDED / "metrics_idle.txt").read_text(encoding="utf-8")


def _size(given: object) -> int:
    return len(given) if isinstance(given, (dict, list, str)) else 0
