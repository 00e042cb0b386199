"""The planner's options, shared by the commands that plan."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgpu.errors import UsageError
from mgpu.planning.wants import DEFAULT_HEADROOM_BYTES, Goal, Wants
from mgpu.units import MIB, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from mgpu.planning.vllm_memory import VllmWants

_PANEL = "Planning"
_DEFAULT_UBATCH = 512
# Whom throughput is for, where nobody says how many.
_MANY_USERS = 8
# What only some engines know, with what to do instead.
_FOR_VLLM = {
    "--tensor-parallel": "--gpus N splits the layers over N cards",
    "--pipeline-parallel": "--gpus N splits the layers over N cards",
    "--replicas": "leave it out",
    "--kv-type fp8": "--kv-type q8_0 takes nearly the same memory",
}
_NOT_FOR_VLLM = {
    "--kv-type q8_0": "--kv-type fp8 takes nearly the same memory",
    "--kv-type q4_0": "--kv-type fp8 is the smallest that it has",
    "--split-mode layer": "--pipeline-parallel N gives each card whole layers",
    "--tensor-split": "its cards take equal parts; of unequal ones mgpu makes a pipeline",
    "--ubatch": "-- --max-num-batched-tokens N is the nearest to it",
    "--flash-attn": "-- --attention-backend NAME chooses how it computes attention",
    "--offload allow": "-- --cpu-offload-gb N is the nearest to it",
}
_NOT_FOR_OLLAMA = {
    "--ubatch": "leave --ubatch out: Ollama decides that by itself",
    "--split-mode tensor": "leave --split-mode out for a layer split; or --backend llama.cpp",
}


class Backend(StrEnum):
    """Engines by the names of --backend."""

    auto = "auto"
    llama_cpp = "llama.cpp"
    vllm = "vllm"
    ollama = "ollama"


BACKENDS = (Backend.llama_cpp, Backend.vllm, Backend.ollama)


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
    """The options as typed. What only some engines know narrows the choice among them: `refused_by` says which."""

    backend: Annotated[Backend, _option("--backend", "Engine to use.")] = Backend.auto
    goal: Annotated[
        Goal | None,
        _option("--for", "One user's latency, or many users' throughput (8, unless --parallel says)."),
    ] = None
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
    tensor_parallel: Annotated[
        int | None, _option("--tensor-parallel", "vLLM: cards that each layer is cut over.", min=1, max=64)
    ] = None
    pipeline_parallel: Annotated[
        int | None, _option("--pipeline-parallel", "vLLM: stages of layers, one after the other.", min=1, max=64)
    ] = None
    replicas: Annotated[int, _option("--replicas", "vLLM: engines behind one address.", min=1, max=64)] = 1
    ubatch: Annotated[int, _option("--ubatch", "Tokens of a prompt computed at once.", min=1, max=65536)] = (
        _DEFAULT_UBATCH
    )
    flash_attn: Annotated[FlashAttention, _option("--flash-attn", "Flash attention.")] = FlashAttention.auto
    headroom: Annotated[str, _option("--headroom", "Memory to leave free on each card.")] = (
        f"{DEFAULT_HEADROOM_BYTES // MIB}MiB"
    )
    offload: Annotated[Offload, _option("--offload", "Allow layers in host memory (slow).")] = Offload.forbid

    @property
    def users(self) -> int | None:
        """Users served at the same time; None where that is left to the profile."""
        return self.parallel or (_MANY_USERS if self.goal is Goal.throughput else None)

    def wants(self) -> Wants:
        """Return the options as llama.cpp's and Ollama's planner takes them. Raises UsageError."""
        return Wants(
            **self._shared_wants(),
            ubatch=self.ubatch,
            flash_attention=self.flash_attn.value,
            tensor_split=_proportions(self.tensor_split) if self.tensor_split is not None else None,
            offload=self.offload == Offload.allow,
        )

    def vllm_wants(self) -> VllmWants:
        """Return the options as vLLM's planner takes them. Raises UsageError."""
        from mgpu.planning.vllm_memory import VllmWants

        return VllmWants(
            **self._shared_wants(),
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            replicas=self.replicas,
            all_cards=self.gpus is not None,
            goal=self.goal,
        )

    def refused_by(self, backend: str) -> UsageError | None:
        """Return what `backend` cannot do of what was asked for, None if it can do all."""
        from mgpu.planning.choice import TITLES

        title, given = TITLES[backend], {option for option, is_given in self._given().items() if is_given}
        if backend != Backend.vllm and (only := given.intersection(_FOR_VLLM)):
            option = min(only)
            return UsageError(
                f"{option} is vLLM's: {title} has no such {'cache' if 'kv' in option else 'split'}",
                hint=f"{_FOR_VLLM[option]}; or --backend vllm",
            )
        if backend == Backend.vllm and (others := given.intersection(_NOT_FOR_VLLM)):
            option = min(others)
            return UsageError(f"vLLM knows no {option}", hint=_NOT_FOR_VLLM[option])
        if backend == Backend.ollama and (others := given.intersection(_NOT_FOR_OLLAMA)):
            option = min(others)
            return UsageError(f"Ollama knows no {option}", hint=_NOT_FOR_OLLAMA[option])
        if self.flash_attn == FlashAttention.off and self.kv_type in (KvType.q8_0, KvType.q4_0):
            return UsageError(
                f"{title} cannot quantise the KV cache ({self.kv_type}) without flash attention",
                hint="leave --flash-attn out, or --kv-type f16",
            )
        return None

    def _shared_wants(self) -> dict[str, Any]:
        return {
            "ctx_tokens": parse_tokens(self.ctx, option="--ctx") if self.ctx is not None else None,
            "parallel": self.users or 1,
            "kv_type_k": self.kv_type.value,
            "kv_type_v": self.kv_type.value,
            "split_mode": self.split_mode.value if self.split_mode else None,
            "headroom_bytes": parse_bytes(self.headroom, option="--headroom"),
        }

    def _given(self) -> dict[str, bool]:
        """Every option that not all engines know, and whether it was given."""
        return {
            "--tensor-parallel": self.tensor_parallel is not None,
            "--pipeline-parallel": self.pipeline_parallel is not None,
            "--replicas": self.replicas != 1,
            "--kv-type fp8": self.kv_type == KvType.fp8,
            "--kv-type q8_0": self.kv_type == KvType.q8_0,
            "--kv-type q4_0": self.kv_type == KvType.q4_0,
            "--split-mode tensor": self.split_mode == SplitMode.tensor,
            "--split-mode layer": self.split_mode == SplitMode.layer,
            "--tensor-split": self.tensor_split is not None,
            "--ubatch": self.ubatch != _DEFAULT_UBATCH,
            "--flash-attn": self.flash_attn != FlashAttention.auto,
            "--offload allow": self.offload == Offload.allow,
        }


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
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature
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
    str,
    typer.Argument(
        metavar="MODEL",
        help="A profile, a .gguf file, a model folder, hf:ORG/REPO[:QUANT], ollama:NAME[:TAG].",
        show_default=False,
    ),
]
