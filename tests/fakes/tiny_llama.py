"""A Llama of 2.5 million random parameters as Hugging Face lays models out, written without any library.

Its tokenizer knows single bytes only, so that any text can be asked and answered (with nonsense). Real engines load
it in an instant: `python -m tests.fakes.tiny_llama FOLDER`.
"""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = 4
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 32
WIDTH = HEADS * HEAD_DIM
FEED_FORWARD = 512
CONTEXT_LENGTH = 2048
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(_SPECIAL) + 61  # a multiple of 64, as engines like it
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT_LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def make_tiny_llama(folder: Path) -> Path:
    """Write the model into `folder` (made if need be) and return it. The same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256})
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL[0],
            "eos_token": _SPECIAL[2],
            "pad_token": _SPECIAL[0],
            "model_max_length": CONTEXT_LENGTH,
            "chat_template": _TEMPLATE,
        },
    )
    write_safetensors(folder / "model.safetensors", dict(shapes()))
    return folder


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        yield f"{own}.input_layernorm.weight", (WIDTH,)
        yield f"{own}.self_attn.q_proj.weight", (WIDTH, WIDTH)
        yield f"{own}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH)
        yield f"{own}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH)
        yield f"{own}.self_attn.o_proj.weight", (WIDTH, WIDTH)
        yield f"{own}.post_attention_layernorm.weight", (WIDTH,)
        yield f"{own}.mlp.gate_proj.weight", (FEED_FORWARD, WIDTH)
        yield f"{own}.mlp.up_proj.weight", (FEED_FORWARD, WIDTH)
        yield f"{own}.mlp.down_proj.weight", (WIDTH, FEED_FORWARD)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], *, values: bool = True) -> None:
    """Write bfloat16 tensors: random values of the size a fresh model has or, without `values`, a hole of zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if not values:
            file.truncate(8 + len(text) + end)
            return
        source = random.Random(0)
        pool = b"".join(_bfloat16(source.gauss(0.0, 0.05)) for _ in range(1 << 16))
        for name, shape in tensors.items():
            count = math.prod(shape)
            if "norm" in name:
                file.write(_bfloat16(1.0) * count)
                continue
            for written in range(0, count, 4096):
                at = 2 * source.randrange((len(pool) >> 1) - 4096)
                file.write(pool[at : at + 2 * min(4096, count - written)])


def _bfloat16(value: float) -> bytes:
    return struct.pack("<f", value)[2:]


def _tokenizer() -> dict[str, object]:
    """Byte-level, without a single merge: each byte is a token, written as the character GPT-2 gives it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = [
        {"id": 256 + i, "content": text, "special": True}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(_SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {characters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    make_tiny_llama(Path(sys.argv[1]))
