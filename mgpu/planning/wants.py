"""What the user wants of a plan; `None` leaves the choice to mgpu."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mgpu.units import MIB

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

# Left free on each card besides the plan: what a desktop may grow by between plan and start.
DEFAULT_HEADROOM_BYTES = 256 * MIB
# Asked for when nobody says how much context is wanted; lowered if that makes the model fit.
DEFAULT_CTX_TOKENS = 8192


class Goal(StrEnum):
    """What a plan is for: the shortest answer to one user, or the most tokens to many."""

    latency = "latency"
    throughput = "throughput"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """The planner's options. `ctx_tokens` is what each of `parallel` users gets.

    `tensor_split` gives proportions in card order; `headroom_bytes` is kept free on every card;
    `offload` allows layers in host memory. The rest are llama-server's own switches, known here because they move
    memory: `kv_unified` (one KV cache shared by all users), `swa_full` (sliding-window layers keep the whole context),
    `kv_on_host` (`--no-kv-offload`), `cpu_moe_layers` (`--n-cpu-moe`, experts of the first layers on the host).
    """

    ctx_tokens: int | None = None
    parallel: int = 1
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    ubatch: int = 512
    flash_attention: str = "auto"
    split_mode: str | None = None
    tensor_split: tuple[float, ...] | None = None
    headroom_bytes: int = DEFAULT_HEADROOM_BYTES
    offload: bool = False
    kv_unified: bool = False
    swa_full: bool = False
    kv_on_host: bool = False
    cpu_moe_layers: int = 0

    @property
    def uses_flash_attention(self) -> bool:
        """Whether the plan counts on flash attention ("auto" resolves to on wherever it is supported)."""
        return self.flash_attention != "off"
