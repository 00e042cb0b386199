"""Which parts of a model llama.cpp's tensor split cuts, and along how many values."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mgpu.models.attention import Attention
from mgpu.models.facts import Cut
from mgpu.models.tensors import Tensor, layer_of


def tensor_cuts(
    tensors: Iterable[Tensor], attention: Sequence[Attention], heads: int
) -> tuple[tuple[tuple[Cut, ...], ...], Cut | None]:
    """Return the cuts of each layer, and that of the output head (None where it is held whole by every card).

    `attention` is that of each layer, `heads` the number of query heads. The rules are llama.cpp's
    (`llama_meta_device_get_split_state` in src/llama-model.cpp): queries and attention's output are cut between groups
    of heads that share keys, keys and values accordingly, the feed-forward network in steps of 128 values, the output
    matrix anywhere. Norms, routers, shared experts and a tied head are held whole.
    """
    named = {tensor.name: tensor for tensor in tensors}
    layers: list[dict[tuple[int, int, int, int], int]] = [defaultdict(int) for _ in attention]
    for tensor in named.values():
        layer = layer_of(tensor.name)
        if layer is None or layer >= len(attention):
            continue
        prefix, _, part = tensor.name.partition(f"{layer}.")
        prefix = f"{prefix}{layer}."
        each = attention[layer]
        if match := _FEED_FORWARD.fullmatch(part):
            down = named.get(f"{prefix}ffn_down.weight") or named.get(f"{prefix}ffn_down_exps.weight")
            if down:
                whole = tensor.dimensions[0] if match["down"] or match["kind"] == "bias" else tensor.dimensions[1]
                length = down.dimensions[0]
                if whole in (length, 2 * length):  # gate and up in one
                    layers[layer][length, _STEP, down.type.block_elements, 1] += tensor.bytes
        elif match := _ATTENTION.fullmatch(part):
            out = named.get(f"{prefix}attn_output.weight")
            if out and each.kv_heads and heads % each.kv_heads == 0:
                keys = match["part"] in ("k", "v")
                head = each.value_length or each.key_length
                length = (each.kv_heads if keys else heads) * head
                group = heads // each.kv_heads
                layers[layer][length, group * head, out.type.block_elements, group if keys else 1] += tensor.bytes
            elif recurrent := named.get(f"{prefix}ssm_out.weight"):
                layers[layer][recurrent.dimensions[0], _STEP, recurrent.type.block_elements, 1] += tensor.bytes
        elif part in _RECURRENT and (recurrent := named.get(f"{prefix}ssm_out.weight")):
            layers[layer][recurrent.dimensions[0], _STEP, recurrent.type.block_elements, 1] += tensor.bytes
    cuts = tuple(
        tuple(
            Cut(bytes=size, length=length, grain=grain, block=block, share=share)
            for (length, grain, block, share), size in sizes.items()
        )
        for sizes in layers
    )
    output = named.get("output.weight")
    head_cut = Cut(bytes=output.bytes, length=output.dimensions[1], grain=1, block=1) if output else None
    return cuts, head_cut


_STEP = 128
_ATTENTION = re.compile(r"attn_(?P<part>q|k|v|qkv|output|gate)\.(?:weight|(?<!output\.)bias)")
_FEED_FORWARD = re.compile(
    r"ffn_(?:(?P<down>down)|up|gate|gate_up)(?:_exps)?\.(?P<kind>weight|bias)(?<!down\.bias)(?<!down_exps\.bias)"
)
_RECURRENT = ("ssm_conv1d.weight", "ssm_out.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_ba.weight")
