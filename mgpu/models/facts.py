"""What planning needs to know of a model, whatever it was read from.

`None` means unknown. All sizes are bytes as the engine allocates them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Matrices of a layer, or the head, that the tensor split cuts alike: `bytes` of them along `length` values.

    A cut falls on a multiple of `grain` values and of the quantisation's `block` and, where the cards leave room for
    that, of a power of two up to 128. Of keys and values `share` times as few are cut as of the queries.
    """

    bytes: int
    length: int
    grain: int
    block: int
    share: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One repeating layer.

    `weights_bytes` is everything in it; `expert_bytes` is the routed experts' part of that.
    A token's KV cache in this layer holds `kv_heads * key_length` K values and
    `kv_heads * value_length` V values (`value_length` 0: K only, as with multi-head latent attention).
    `sliding_window` is None for full attention. `state_bytes` is what a recurrent layer keeps for each user,
    whatever the context. `cuts` are the parts of the weights that a tensor split cuts; the rest is held by every card.
    """

    weights_bytes: int
    expert_bytes: int = 0
    kv_heads: int
    key_length: int
    value_length: int
    sliding_window: int | None = None
    state_bytes: int = 0
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model in one quantisation.

    `embedding_bytes` is the token embedding (it stays in host memory), `head_bytes` the output matrix and
    its norm (on the last card). With tied embeddings the head is the embedding loaded a second time:
    `tied` is True and `head_bytes` includes that copy. `other_bytes` is what belongs to no layer and stays
    on the host with the embedding. `head_dim` is a query head's length. `file_bytes` is the size of the file(s).
    `head_cut` is the part of the head that a tensor split cuts. `weights_basis` is where the sizes of the tensors come
    from: "file" (read in a header), or "table" (the tensors that the converter writes for such a shape).
    """

    name: str
    architecture: str
    quantisation: str | None
    parameters: int
    active_parameters: int
    context_length: int | None
    vocabulary: int
    embedding_length: int
    feed_forward_length: int
    expert_feed_forward_length: int | None = None
    shared_expert_feed_forward_length: int | None = None
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    experts_used: int = 0
    sliding_window: int | None = None
    kv_lora_rank: int | None = None
    tied: bool
    embedding_bytes: int
    head_bytes: int
    other_bytes: int = 0
    head_cut: Cut | None = None
    layers: tuple[Layer, ...]
    file_bytes: int
    source: str
    weights_basis: str = "file"
