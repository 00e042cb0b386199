"""What generating a token takes: the bytes each card reads, in which order, with what engine.

Plain values between the plan and the prediction of its speed. Cards that work in turn (a layer split, the stages of a
pipeline) are stages; cards that work at the same time (a tensor split) are shares of one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mgpu.machine.cards import Card, card_for_name
from mgpu.machine.snapshot import Gpu, Link
from mgpu.models.facts import Layer, ModelFacts

# More bits than this per parameter: the file is not quantised.
_SIXTEEN_BIT = 15
# What a driver reports as the limit may lie a little below the card's rated power.
_CAPPED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What speed depends on in a card. `memory` is "gddr", "hbm" or "lpddr"; `tensor_tflops` the fp16 rate with fp32
    accumulation, `full_rate` whether that is not half of the card's best. `power` is the power limit as a share of
    the card's rated power, 1.0 where it is not lowered. None is unknown."""

    name: str
    vendor: str
    bandwidth_gb_s: float | None
    memory: str = "gddr"
    compute_capability: float | None = None
    gfx: str | None = None
    tensor_tflops: float | None = None
    full_rate: bool = True
    power: float = 1.0

    @property
    def modern(self) -> bool:
        """NVIDIA's Ada, Hopper, Blackwell and later."""
        return self.compute_capability is not None and self.compute_capability >= 8.9

    @property
    def without_tensor_cores(self) -> bool:
        """NVIDIA's Pascal and earlier."""
        return self.compute_capability is not None and self.compute_capability < 7

    @property
    def cdna(self) -> bool:
        """AMD's Instinct cards."""
        return self.vendor == "amd" and self.memory == "hbm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One card's part. `weights_bytes` is what a token of one user reads there, of its routed experts those used;
    `expert_bytes` are all routed experts it holds; `kv_bytes` what one user's token reads of the KV cache at the
    depth asked for."""

    chip: Chip
    weights_bytes: float
    expert_bytes: float = 0.0
    kv_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`layers` computed by cards that work at the same time; one share each."""

    layers: int
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPart:
    """What stays in host memory. `weights_bytes` is what a token reads there beside routed experts, `expert_bytes`
    what it reads of those; `bandwidth_gb_s` is None where it is unknown."""

    layers: int
    weights_bytes: float
    expert_bytes: float = 0.0
    kv_bytes: float = 0.0
    bandwidth_gb_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that a plan's speed is predicted from.

    `engine` is "llama.cpp", "vllm" or "ollama" (which runs llama.cpp); `library` what it drives the cards with
    ("CUDA", "ROCm", "Vulkan", "SYCL"). `stages` are those of one replica, in turn. `users` are those served at the
    same time, by all replicas together. `link` is how cards of a stage exchange large results: "nvlink", "peer"
    (directly over PCIe) or "host", `link_gb_s` what the slowest link carries in one direction, None where that is not
    known. `before_2025` is a build of llama.cpp from then.
    """

    engine: str
    library: str
    stages: tuple[Stage, ...]
    quantised: bool
    experts: int = 0
    experts_used: int = 0
    active_parameters: float | None = None
    embedding_length: int | None = None
    users: float = 1
    replicas: int = 1
    flash_attention: bool = True
    link: str = "host"
    link_gb_s: float | None = None
    before_2025: bool = False
    host: HostPart | None = None

    @property
    def vllm(self) -> bool:
        """Whether the engine is vLLM; the others compute with llama.cpp."""
        return self.engine == "vllm"

    @property
    def layers(self) -> int:
        """All layers on cards."""
        return sum(stage.layers for stage in self.stages)

    @property
    def chips(self) -> tuple[Chip, ...]:
        """The cards, in order."""
        return tuple(share.chip for stage in self.stages for share in stage.shares)

    @property
    def width(self) -> int:
        """How many cards work at the same time."""
        return max((len(stage.shares) for stage in self.stages), default=0)


def chip_of(gpu: Gpu) -> Chip:
    """Return what speed depends on in `gpu`: the machine's own figures, and from the catalogue what it does not say.

    A card without a known bandwidth gives a chip without one, for which no speed is predicted.
    """
    card = _card(gpu.name, gpu.total_bytes)
    power = 1.0
    if card and gpu.power_limit_w and gpu.power_limit_w < card.tdp_w * _CAPPED:
        power = gpu.power_limit_w / card.tdp_w
    capability = gpu.compute_capability or (card.compute_capability if card else None)
    return Chip(
        name=gpu.name,
        vendor=gpu.vendor,
        bandwidth_gb_s=gpu.bandwidth_gb_s or None,
        memory=card.memory if card else "gddr",
        compute_capability=_number(capability),
        gfx=gpu.gfx or (card.gfx if card else None),
        # Without tensor cores the shaders do it.
        tensor_tflops=(card.fp16_fp32_accumulate_tflops or card.fp32_tflops or None) if card else None,
        full_rate=card is None or card.fp16_fp32_accumulate_tflops == card.fp16_tflops,
        power=power,
    )


def share_of(
    facts: ModelFacts,
    layers: Sequence[Layer],
    chip: Chip,
    *,
    head: bool,
    depth_tokens: int,
    kv_element_bytes: tuple[float, float] = (2.0, 2.0),
    cards: int = 1,
) -> Share:
    """Return the share of `chip`, which holds `layers` (and the output head) together with `cards` - 1 equal others.

    `kv_element_bytes` are those of a K and of a V value. Layers with a sliding window read no more than that of the
    KV cache; layers without a cache read nothing.
    """
    used = facts.experts_used / facts.experts if facts.experts else 0.0
    experts = sum(layer.expert_bytes for layer in layers) if facts.experts else 0
    dense = sum(layer.weights_bytes for layer in layers) - experts + (facts.head_bytes if head else 0)
    key_bytes, value_bytes = kv_element_bytes
    kv = sum(
        layer.kv_heads
        * (layer.key_length * key_bytes + layer.value_length * value_bytes)
        * min(depth_tokens, layer.sliding_window or depth_tokens)
        for layer in layers
    )
    return Share(
        chip=chip,
        weights_bytes=(dense + experts * used) / cards,
        expert_bytes=experts / cards,
        kv_bytes=kv / cards,
    )


def is_quantised(facts: ModelFacts) -> bool:
    """Return whether the file holds fewer than 16 bits per parameter."""
    return facts.file_bytes * 8 < facts.parameters * _SIXTEEN_BIT


def link_between(gpus: Sequence[Gpu], links: Sequence[Link]) -> str:
    """Return how these cards exchange large results, by the slowest pair: "nvlink", "peer" or "host"."""
    chosen = {gpu.index for gpu in gpus}
    pairs = {frozenset((link.a, link.b)): link for link in links if {link.a, link.b} <= chosen}
    if len(pairs) < len(chosen) * (len(chosen) - 1) // 2:
        return "host"
    if all(link.kind == "NVLink" for link in pairs.values()):
        return "nvlink"
    return "peer" if all(link.p2p or link.kind == "NVLink" for link in pairs.values()) else "host"


@lru_cache(maxsize=256)
def _card(name: str, total_bytes: int | None) -> Card | None:
    return card_for_name(name, total_bytes)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
