"""The planner's options, shared by the commands that plan."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from mgpu.errors import Missing, UsageError
from mgpu.planning.wants import DEFAULT_HEADROOM_BYTES, Wants
from mgpu.units import MIB, parse_bytes, parse_tokens

_PANEL = "Planning"


class Backend(StrEnum):
    """Engines by the names of --backend."""

    auto = "auto"
    llama_cpp = "llama.cpp"
    vllm = "vllm"
    ollama = "ollama"


class KvType(StrEnum):
    """Types of the KV cache."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"
    fp8 = "fp8"


class SplitMode(StrEnum):
    """How a model is split over cards."""

    layer = "layer"
    tensor = "tensor"
    none = "none"


class FlashAttention(StrEnum):
    """Flash attention: forced, forbidden, or wherever it is supported."""

    on = "on"
    off = "off"
    auto = "auto"


class Offload(StrEnum):
    """Whether layers may stay in host memory."""

    allow = "allow"
    forbid = "forbid"


def _option(flag: str, text: str, **more: Any) -> Any:  # typer's own OptionInfo is untyped
    return typer.Option(flag, help=text, rich_help_panel=_PANEL, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerOptions:
    """The options as typed; `wants` checks and converts them."""

    backend: Annotated[Backend, _option("--backend", "Engine to use.")] = Backend.auto
    gpus: Annotated[
        str | None, _option("--gpus", "Cards: a count (2), all, none, or a list (0,1 or gpu1 or GPU-3f…).")
    ] = None
    ctx: Annotated[str | None, _option("--ctx", "Context of each user, in tokens: 8192 or 8k.")] = None
    parallel: Annotated[int | None, _option("--parallel", "Users served at the same time.", min=1, max=1024)] = None
    quant: Annotated[str | None, _option("--quant", "Quantisation, such as Q4_K_M.")] = None
    kv_type: Annotated[KvType, _option("--kv-type", "Type of the KV cache.")] = KvType.f16
    split_mode: Annotated[SplitMode | None, _option("--split-mode", "How to split the model over cards.")] = None
    tensor_split: Annotated[
        str | None, _option("--tensor-split", "Proportions per card, such as 3,1 (default: balanced by memory).")
    ] = None
    ubatch: Annotated[int, _option("--ubatch", "Tokens of a prompt computed at once.", min=1, max=65536)] = 512
    flash_attn: Annotated[FlashAttention, _option("--flash-attn", "Flash attention.")] = FlashAttention.auto
    headroom: Annotated[str, _option("--headroom", "Memory to leave free on each card.")] = (
        f"{DEFAULT_HEADROOM_BYTES // MIB}MiB"
    )
    offload: Annotated[Offload, _option("--offload", "Allow layers in host memory (slow).")] = Offload.forbid

    def wants(self) -> Wants:
        """Return the options as the planner takes them. Raises UsageError; Missing for an engine mgpu cannot start."""
        if self.backend not in (Backend.auto, Backend.llama_cpp):
            raise Missing(
                f"this version of mgpu starts llama.cpp only, not {self.backend}",
                code="backend-unsupported",
                hint="leave --backend out, or --backend llama.cpp",
            )
        if self.kv_type == KvType.fp8:
            raise UsageError("llama.cpp has no fp8 KV cache", hint="--kv-type q8_0 takes nearly the same memory")
        if self.split_mode == SplitMode.tensor:
            raise UsageError(
                "this version of mgpu plans no tensor split for llama.cpp (it is experimental there)",
                hint="leave --split-mode out for a layer split",
            )
        if self.flash_attn == FlashAttention.off and self.kv_type != KvType.f16:
            raise UsageError(
                f"llama.cpp cannot quantise the KV cache ({self.kv_type}) without flash attention",
                hint="leave --flash-attn out, or --kv-type f16",
            )
        return Wants(
            ctx_tokens=parse_tokens(self.ctx, option="--ctx") if self.ctx is not None else None,
            parallel=self.parallel or 1,
            kv_type_k=self.kv_type.value,
            kv_type_v=self.kv_type.value,
            ubatch=self.ubatch,
            flash_attention=self.flash_attn.value,
            split_mode=self.split_mode.value if self.split_mode else None,
            tensor_split=_proportions(self.tensor_split) if self.tensor_split is not None else None,
            headroom_bytes=parse_bytes(self.headroom, option="--headroom"),
            offload=self.offload == Offload.allow,
        )


def _proportions(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if not shares or len(shares) > 64 or not all(0 <= share < 1e6 for share in shares) or not sum(shares):
        raise UsageError(f"--tensor-split {text!r} is not a list of proportions such as 3,1")
    return shares


def with_planner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a Typer command the planner's options: it takes them as one keyword, `options`.

    Typer reads a function's signature, so the options are written into it.
    """
    names = [f.name for f in dataclasses.fields(PlannerOptions)]
    hints = typing.get_type_hints(PlannerOptions, include_extras=True)
    planner = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(PlannerOptions)
    ]

    def wrapper(*args: Any, **given: Any) -> Any:
        options = PlannerOptions(**{name: given.pop(name) for name in names})
        return command(*args, options=options, **given)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    signature = inspect.Signature([*own, *planner])
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    return wrapper


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
MachineOption = Annotated[
    str | None,
    typer.Option("--machine", help="Another machine: 2x4090, 4090+4080, 4xA100-80, or a snapshot file."),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A profile, a .gguf file, hf:ORG/REPO[:QUANT].", show_default=False)
]
