"""What a plan puts on each card and in host memory, line by line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """One card's ledger. `device` is the engine's name for it; `layers` counts the repeating layers from
    `first_layer` on; `head` says that it also holds the output head. `card_bytes` is the card's
    whole memory, `total_bytes` what is planned on it, `spare_bytes` what then stays free. `basis` says of each line
    what it rests on: a `file`'s header, a `table`, a `formula`, or something `measured`.
    With a tensor split every card has a part of all layers and of the head."""

    gpu: int
    uuid: str | None
    name: str
    device: str
    first_layer: int
    layers: int
    head: bool
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    runtime_bytes: int
    card_bytes: int | None
    free_bytes: int
    basis: str

    @property
    def idle(self) -> bool:
        """Whether nothing of the model is on this card: the engine is then started without it."""
        return not self.layers and not self.head

    @property
    def total_bytes(self) -> int:
        """Everything the engine will hold on this card."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.runtime_bytes

    @property
    def spare_bytes(self) -> int:
        """What stays free; negative when the card overflows."""
        return self.free_bytes - self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedHost:
    """The host memory's ledger: the first `layers` layers and the routed experts of the first `expert_layers`.

    `free_bytes` is None when unknown. `basis` says of each line what it rests on, as a device's does.
    """

    layers: int
    expert_layers: int = 0
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int | None
    basis: str = "weights: file, KV: formula, compute: formula"

    @property
    def total_bytes(self) -> int:
        """Everything the engine will hold in host memory (mapped weights included)."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes

    def words(self, layers: int) -> str:
        """What of a model of `layers` layers is kept here besides the embedding: "9 of 32 layers", "the experts of the
        first 12 layers"; "" for nothing."""
        kept = [f"{self.layers} of {layers} layers"] if self.layers else []
        kept += [f"the experts of the first {self.expert_layers} layers"] if self.expert_layers else []
        return " and ".join(kept)

    @property
    def spare_bytes(self) -> int | None:
        """What stays available, None when unknown."""
        return None if self.free_bytes is None else self.free_bytes - self.total_bytes
