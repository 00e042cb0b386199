"""What the user wants of a plan; `None` leaves the choice to mgpu."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from mgpu.units import MIB

if TYPE_CHECKING:
    from mgpu.machine.snapshot import Gpu
    from mgpu.models.facts import ModelFacts

# Bytes per element of each KV cache type; quantised ones store 32 values in one block
# (ggml: q8_0 34 bytes, q5_1 24, q5_0 22, q4_1 20, q4_0 and iq4_nl 18).
KV_ELEMENT_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

_F16_BYTES = 2.0

# Left free on each card besides the plan: what a desktop may grow by between plan and start.
DEFAULT_HEADROOM_BYTES = 256 * MIB
# The same on a card that drives a display: windows, videos and browsers come and go.
DISPLAY_HEADROOM_BYTES = 1024 * MIB
# Asked for when nobody says how much context is wanted; lowered if that makes the model fit.
DEFAULT_CTX_TOKENS = 8192


class Goal(StrEnum):
    """What a plan is for: the shortest answer to one user, or the most tokens to many."""

    latency = "latency"
    throughput = "throughput"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """The planner's options. `ctx_tokens` is what each of `parallel` users gets.

    `tensor_split` gives proportions in card order; `keep_order` says that this order is the user's own;
    `headroom_bytes` is kept free on every card; `offload` allows layers in host memory. The rest are llama-server's own
    switches, known here because they move
    memory: `kv_unified` (one KV cache shared by all users), `swa_full` (sliding-window layers keep the whole context),
    `kv_on_host` (`--no-kv-offload`), `cpu_moe_layers` (`--n-cpu-moe`, experts of the first layers on the host),
    `embeddings` (`--embeddings`: an output for every token, not only for each user's last). `knows_tensor_split` says
    whether the llama-server that is to run it has `--split-mode tensor`; older ones have not.
    """

    ctx_tokens: int | None = None
    parallel: int = 1
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    ubatch: int = 512
    flash_attention: str = "auto"
    split_mode: str | None = None
    tensor_split: tuple[float, ...] | None = None
    keep_order: bool = False
    headroom_bytes: int = DEFAULT_HEADROOM_BYTES
    offload: bool = False
    kv_unified: bool = False
    swa_full: bool = False
    kv_on_host: bool = False
    cpu_moe_layers: int = 0
    embeddings: bool = False
    knows_tensor_split: bool = True

    @property
    def uses_flash_attention(self) -> bool:
        """Whether the plan counts on flash attention ("auto" resolves to on wherever it is supported)."""
        return self.flash_attention != "off"

    @property
    def quantised_k(self) -> bool:
        """Whether K is stored in blocks of few bits."""
        return KV_ELEMENT_BYTES[self.kv_type_k] < _F16_BYTES

    @property
    def quantised_v(self) -> bool:
        """Whether V is stored in blocks of few bits."""
        return KV_ELEMENT_BYTES[self.kv_type_v] < _F16_BYTES

    def headroom_on(self, gpu: Gpu) -> int:
        """Return what is kept free on `gpu`: where it drives a display at least 1 GiB, unless the user said how
        much."""
        if gpu.display and self.headroom_bytes == DEFAULT_HEADROOM_BYTES:
            return DISPLAY_HEADROOM_BYTES
        return self.headroom_bytes


def asked_ctx_tokens(wants: Wants, facts: ModelFacts) -> int:
    """Return the context that a plan starts from: what was asked for, or the default, no more than what the model was
    trained for."""
    return wants.ctx_tokens or min(DEFAULT_CTX_TOKENS, facts.context_length or DEFAULT_CTX_TOKENS)
