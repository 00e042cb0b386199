"""Published measurements (`tests/data/measured.csv`) as work to predict: 522 rows of 50 sources.

The columns `metric` and `depth_tokens` say what was measured: "steady" is pure decoding; "e2e" and "rate_driven" have
the prompts' time inside; "offline_batch" (the number of users is nominal) and "shared_prefix" (one KV cache for all)
are not comparable. `decode_tok_s` is all users' together.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import UsageError
from mgpu.machine.cards import Card, find_card
from mgpu.machine.snapshot import Gpu
from mgpu.planning.work import Chip, Share, Stage, Work, chip_of

DATA = Path(__file__).parent.parent / "data"
# Another file of the same columns, for whoever keeps rows back.
ROWS = Path(os.environ.get("MGPU_MEASURED", DATA / "measured.csv"))

ENGINES = ("llama.cpp", "vllm", "ollama")
"""Engines that mgpu runs; the rows of others are left out."""

# Bits per parameter where a row does not give the file's size, from files of that quantisation.
_BITS = {
    **dict.fromkeys(("F16", "BF16", "FP16"), 16.0),
    **dict.fromkeys(("FP8", "FP8-dynamic", "FP8-dynamic (Marlin)", "W8A8", "INT8"), 8.0),
    "GPTQ-8bit": 8.25,
    **dict.fromkeys(("AWQ", "AWQ-4bit", "GPTQ-4bit", "gptq-4bit", "GPTQ 4-bit", "W4A8", "INT4"), 4.25),
    **dict.fromkeys(("W4A16", "W4A16 / int8-act", "INT4 (AutoRound)", "MXFP4", "mxfp4"), 4.25),
    **dict.fromkeys(("NVFP4", "NVFP4 (Marlin)", "NVFP4-Fast"), 4.5),
    "UD-Q8_K_XL": 9.4,
    **dict.fromkeys(("Q8_0", "(Q8?)"), 8.5),
    **dict.fromkeys(("Q6_K", "UD-Q6_K_XL"), 6.57),
    **dict.fromkeys(("Q5_K_M", "UD-Q5_K_XL"), 5.75),
    **dict.fromkeys(("Q5_K_S", "Q5_K_S gguf"), 5.5),
    "UD-Q4_K_XL": 5.0,
    **dict.fromkeys(("Q4_K_M", "Q4_K", "(35B-A3B quant)"), 4.85),
    **dict.fromkeys(("Q4_0", "Q4_K_S"), 4.55),
    "IQ4_NL": 4.5,
    "IQ4_XS": 4.3,
    "UD-Q3_K_XL": 4.1,
    "Q3_K_L": 4.3,
    "Q3_K_M": 3.9,
    "Q3_K_S": 3.6,
    "UD-Q2_K_XL": 3.2,
    "Q2_K": 3.0,
    "IQ3_XXS": 3.1,
    "IQ2_XXS": 2.3,
}
# Experts used and in all, by the models' configurations; what is not known is taken as the commonest.
_EXPERTS = {
    "Qwen3.6-35B-A3B": (8, 256),
    "Qwen3.5-122B-A10B": (8, 256),
    "Qwen3.5-397B-A17B": (10, 512),
    "Qwen3-Next-80B-A3B": (10, 512),
    "MiniMax-M2.5": (8, 256),
    "DeepSeek-671B": (8, 256),
    "Kimi-K2.5": (8, 384),
    "Nemotron-3-Nano-30B-A3B": (6, 128),
    "gpt-oss-20b": (4, 32),
    "gpt-oss-120b": (4, 128),
    "GLM-4.7": (8, 160),
    "GLM-4.7-Flash": (4, 64),
    "Hunyuan-A13B": (8, 64),
}
_COMMON_EXPERTS = (8, 128)
_HIDDEN = {
    "Qwen3-30B-A3B": 2048,
    "Qwen3.6-35B-A3B": 2048,
    "Qwen3.5-122B-A10B": 3072,
    "MiniMax-M2.5": 3072,
    "gpt-oss-20b": 2880,
    "gpt-oss-120b": 2880,
    "Qwen3.6-27B": 5120,
    "Llama-3-70B": 8192,
    "Qwen3-14B": 5120,
    "Qwen3-32B": 5120,
}
# Their experts have 4.25 bits and the rest more: GB a token reads as GGUF and with vLLM, and active parameters.
_GPT_OSS = {"gpt-oss-120b": (3.53, 5.0, 5.1), "gpt-oss-20b": (2.56, 3.7, 3.6)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """One measurement: `work` as it was measured, `tok_s` of all users together."""

    id: str
    source: str
    engine: str
    split: str
    cards: str
    model: str
    quantisation: str
    metric: str
    depth_tokens: float
    tok_s: float
    prefill_tok_s: float | None
    prompt_tokens: float
    answer_tokens: float
    work: Work

    @property
    def group(self) -> str:
        """The class that errors are shown by."""
        return f"{self.engine} {self.split} {'experts' if self.work.experts else 'dense'}"

    @property
    def depth_band(self) -> int:
        """Rows of one band are comparable."""
        return sum(self.depth_tokens >= start for start in (2_500, 10_000, 50_000))


@functools.cache
def measured_rows(cards_where_unstated: int = 0) -> tuple[tuple[MeasuredRow, ...], dict[str, int]]:
    """The rows that can be predicted (no speculation, no offload, an engine of mgpu's), and why how many others
    cannot. Rows that do not state how many cards there were are left out, or have `cards_where_unstated`."""
    rows: list[MeasuredRow] = []
    left_out: dict[str, int] = {}
    for raw in _read(ROWS):
        found = _row(raw, cards_where_unstated)
        if isinstance(found, str):
            left_out[found] = left_out.get(found, 0) + 1
        else:
            rows.append(found)
    return tuple(rows), left_out


def single_stream() -> tuple[MeasuredRow, ...]:
    """Pure decoding by one user."""
    return tuple(row for row in measured_rows()[0] if row.work.users == 1 and row.metric == "steady")


def many_users() -> tuple[MeasuredRow, ...]:
    """2 to 256 users of vLLM with a KV cache each."""
    metrics = ("steady", "e2e", "rate_driven")
    return tuple(
        row
        for row in measured_rows()[0]
        if row.engine == "vllm" and 1 < row.work.users <= 256 and row.metric in metrics
    )


def largest_source(rows: tuple[MeasuredRow, ...]) -> str:
    """The source that gives most of the rows."""
    sources = [row.source for row in rows]
    return max(set(sources), key=sources.count)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def _models() -> dict[str, dict[str, str]]:
    return {row["model_key"]: row for row in _read(DATA / "models.csv")}


def _row(raw: dict[str, str], cards_where_unstated: int) -> MeasuredRow | str:
    if raw["spec_decode"] != "0":
        return "speculative decoding"
    if raw["offload"] != "0":
        return "layers in host memory"
    if not raw["decode_tok_s"]:
        return "prefill only"
    if raw["engine"] not in ENGINES:
        return "an engine that mgpu does not run"
    if raw["split"] not in ("none", "layer", "tensor"):
        return "a split that mgpu does not plan"
    cards = _cards(raw["gpu_list"], cards_where_unstated)
    if isinstance(cards, str):
        return cards
    model = _models().get(raw["model_key"])
    bits = _bits(raw, model)
    if model is None or bits is None:
        return "the model or its size is not stated"
    chips = tuple(_chip(card, _power_limit_w(raw["notes"])) for card in cards)
    traffic = re.search(r"(\d+) in/(\d+) out", f"{raw['n_ctx_or_prompt']} {raw['notes']}")
    with_prompts = traffic and raw["metric"] in ("e2e", "rate_driven")
    return MeasuredRow(
        id=raw["row_id"],
        source=_source(raw["source_url"]),
        engine=raw["engine"],
        split=raw["split"],
        cards=raw["gpu_list"],
        model=raw["model_key"],
        quantisation=raw["quant"],
        metric=raw["metric"],
        depth_tokens=float(raw["depth_tokens"] or 0),
        tok_s=float(raw["decode_tok_s"]),
        prefill_tok_s=float(raw["prefill_tok_s"]) if raw["prefill_tok_s"] else None,
        prompt_tokens=float(traffic[1]) if traffic and with_prompts else 0,
        answer_tokens=float(traffic[2]) if traffic and with_prompts else 0,
        work=_work(raw, model, bits, cards, chips),
    )


def _work(raw: dict[str, str], model: dict[str, str], bits: float, cards: list[Card], chips: tuple[Chip, ...]) -> Work:
    vllm = raw["engine"] == "vllm"
    total, embedding, head = (
        float(model[name]) for name in ("total_params_b", "embedding_params_b_not_read_per_token", "head_params_b")
    )
    key = raw["model_key"]
    active = float(model["active_params_b_per_token"] or 0) or total - embedding
    head_bits = 16 if vllm and bits < 15 else bits  # vLLM's quantisations leave the output head alone
    read_gb = ((active - head) * bits + head * head_bits) / 8
    used, experts = (0, 0)
    if key in _GPT_OSS:
        read_gb, active = _GPT_OSS[key][vllm], _GPT_OSS[key][2]
    if key in _GPT_OSS or model["active_params_b_per_token"]:
        used, experts = _EXPERTS.get(key, _COMMON_EXPERTS)
    expert_gb = max(0.0, total * bits / 8 - read_gb) / (1 - used / experts) if experts else 0.0
    kv_gb = _kv_gb(raw, model)
    layers = int(model["layers"])
    if raw["split"] == "tensor":
        parts = [1 / len(chips)] * len(chips)
    else:
        parts = [card.marketed_gb / sum(card.marketed_gb for card in cards) for card in cards]
    shares = tuple(
        Share(
            chip=chip,
            weights_bytes=read_gb * part * 1e9,
            expert_bytes=expert_gb * part * 1e9,
            kv_bytes=kv_gb * part * 1e9,
        )
        for chip, part in zip(chips, parts, strict=True)
    )
    if raw["split"] == "tensor":
        stages: tuple[Stage, ...] = (Stage(layers=layers, shares=shares),)
    else:
        ends = [round(layers * sum(parts[: i + 1])) for i in range(len(parts))]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        stages = tuple(Stage(layers=n, shares=(share,)) for n, share in zip(counts, shares, strict=True))
    return Work(
        engine=raw["engine"],
        library=_library(raw, chips[0]),
        stages=stages,
        quantised=bits < 15,
        experts=experts,
        experts_used=used,
        active_parameters=active * 1e9,
        embedding_length=_HIDDEN.get(key),
        users=float(raw["concurrency"] or 1),
        link=_link(raw["pcie_or_nvlink"], cards[0]),
        before_2025=raw["engine"] == "llama.cpp" and raw["date"] < "2025",
    )


def _bits(raw: dict[str, str], model: dict[str, str] | None) -> float | None:
    if raw["model_bytes"] and model:
        return float(raw["model_bytes"]) * 8 / float(model["total_params_b"]) / 1e9
    if bpw := re.fullmatch(r"~?([\d.]+) bpw.*", raw["quant"]):
        return float(bpw[1])
    return _BITS.get(raw["quant"])


def _kv_gb(raw: dict[str, str], model: dict[str, str]) -> float:
    depth = float(raw["depth_tokens"] or 0)
    window = float(model["sliding_window_tokens"] or 0)
    full = float(model["fraction_of_kv_in_full_attention_layers"])
    tokens = full * depth + (1 - full) * min(depth, window) if window else depth
    element = 18 / 64 if "q4_0 KV" in raw["notes"] else 34 / 64 if "q8 KV" in raw["notes"] else 1.0
    return float(model["kv_bytes_per_token_f16_all_layers"]) * tokens * element / 1e9


def _cards(text: str, cards_where_unstated: int) -> list[Card] | str:
    """ "1x RTX 3090 + 2x RTX 3060 12GB" as cards, or why not."""
    cards: list[Card] = []
    for part in text.split(" + "):
        count, _, name = part.partition("x ")
        if count == "?" and not cards_where_unstated:
            return "how many cards is not stated"
        try:
            card = find_card(name.replace("(unified)", "").strip())
        except UsageError:
            return "a card that is not in the catalogue"
        cards += [card] * (cards_where_unstated if count == "?" else int(count))
    return cards


def _chip(card: Card, power_limit_w: float | None) -> Chip:
    gpu = Gpu(
        index=0,
        vendor=card.vendor,
        name=card.full_name,
        total_bytes=card.total_bytes,
        bandwidth_gb_s=card.bandwidth_gb_s,
        compute_capability=card.compute_capability,
        gfx=card.gfx,
        power_limit_w=power_limit_w,
    )
    return chip_of(gpu)


def _power_limit_w(notes: str) -> float | None:
    found = re.search(r"(\d{3}) ?W cap", notes) or re.search(r"power limit (\d{3})W", notes)
    return float(found[1]) if found else None


def _library(raw: dict[str, str], chip: Chip) -> str:
    if "vulkan" in f"{raw['engine_version']} {raw['notes']}".lower():
        return "Vulkan"
    return {"nvidia": "CUDA", "amd": "ROCm"}.get(chip.vendor, "SYCL")


def _link(text: str, card: Card) -> str:
    """What the source says, else what the maker allows: GeForce cards have no peer access over PCIe."""
    if re.match(r"NVLink|xGMI|SXM", text):
        return "nvlink"
    return "host" if card.name.startswith(("GeForce", "Radeon RX")) else "peer"


def _source(url: str) -> str:
    """The repository or page: measurements of one source have their errors in common."""
    parts = url.split("//")[-1].removeprefix("github.com/").split("/")
    return "/".join(parts[:2]) if "reddit" not in url else "/".join(parts[-2:]).strip("/")
