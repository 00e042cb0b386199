"""Ollama: from a plan to `ollama serve` and the environment that makes it do what was planned.

Ollama takes no options; everything is a variable. The models' llama-servers inherit its environment, so that their
own LLAMA_ARG_ variables reach where Ollama has none, and stray ones of the user's shell would, too.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgpu.backends import llama_cpp, ollama_failure, ollama_log
from mgpu.backends.backend import Backend, Get, Launch, Serving
from mgpu.backends.engine import OLLAMA_PROGRAM, Engine, engine_environment, find, require
from mgpu.backends.samples import Sample
from mgpu.errors import UsageError
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.units import MIB

OLLAMA = "ollama"
INSTALL_OLLAMA = OLLAMA_PROGRAM.install
# Hides all cards of a library.
_NONE = "-1"
_VISIBLE = {"CUDA": "CUDA_VISIBLE_DEVICES", "ROCm": "ROCR_VISIBLE_DEVICES", "Vulkan": "GGML_VK_VISIBLE_DEVICES"}
_SETTING = re.compile(r"(OLLAMA_[A-Z0-9_]+|LLAMA_ARG_[A-Z0-9_]+)=(.*)", re.DOTALL)
# What mgpu sets itself, with the option to use instead; what of it stands in the user's shell is not for Ollama.
_OWNED = {
    "OLLAMA_HOST": "--host and --port",
    "OLLAMA_CONTEXT_LENGTH": "--ctx",
    "OLLAMA_NUM_PARALLEL": "--parallel",
    "OLLAMA_SCHED_SPREAD": "--gpus",
    "OLLAMA_KV_CACHE_TYPE": "--kv-type",
    "OLLAMA_FLASH_ATTENTION": "--flash-attn",
    "OLLAMA_GPU_OVERHEAD": "--headroom",
    "OLLAMA_LLM_LIBRARY": "--gpus",
    "LLAMA_ARG_TENSOR_SPLIT": "--tensor-split",
    "LLAMA_ARG_SPLIT_MODE": "--split-mode",
    "LLAMA_ARG_N_GPU_LAYERS": "--offload",
    "LLAMA_ARG_FIT_TARGET": "--headroom",
    "LLAMA_ARG_FIT": "--offload",
    "LLAMA_ARG_DEVICE": "--gpus",
    "LLAMA_ARG_MAIN_GPU": "--gpus",
    "LLAMA_ARG_ENDPOINT_METRICS": "nothing: it is on",
}
_HIDDEN_CARDS = (*_VISIBLE.values(), "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def find_ollama() -> Engine | None:
    """Return the ollama to run, as `find` does."""
    return find(OLLAMA_PROGRAM)


def require_ollama() -> Engine:
    """Return `find_ollama()`'s engine. Raises Missing with the way to install one."""
    return require(OLLAMA_PROGRAM)


def clean_environment(base: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return `base` without what would make Ollama place models otherwise than planned, and the names of what was
    taken away, to be shown: all LLAMA_ARG_ variables, and of Ollama's own those that mgpu has options for.

    Lists of visible cards go too; `build_launch` has read them. OLLAMA_MODELS, OLLAMA_ORIGINS and the like stay.
    """
    stray = [name for name in base if name.startswith("LLAMA_ARG_") or name in _OWNED]
    kept = {name: value for name, value in base.items() if name not in stray and name not in _HIDDEN_CARDS}
    # Where Ollama listens is no secret of the user's shell: it says where the service is, and is no loss here.
    return kept, tuple(sorted(name for name in stray if name != "OLLAMA_HOST"))


def build_launch(candidate: Candidate, serving: Serving, *, environ: Mapping[str, str] = os.environ) -> Launch:
    """Return the `ollama serve` that runs `candidate` as planned, for an environment from `clean_environment`.

    Only the planned cards are visible: NVIDIA's by UUID, others by their place among those `environ` shows. Over
    several cards the model is spread even where Ollama would take one. `serving.arguments` are NAME=VALUE settings
    of Ollama or its llama-server. Raises UsageError for those mgpu sets itself and for what Ollama cannot do.
    """
    if serving.api_key:
        raise UsageError(
            "Ollama knows no API key: whoever reaches its port may use it",
            hint="leave --api-key out and unset MGPU_API_KEY and its like; a proxy before Ollama can ask for a key",
        )
    wants, used = candidate.wants, [device for device in candidate.devices if not device.idle]
    if wants.kv_type_k != wants.kv_type_v:
        raise UsageError(f"Ollama has one type for the whole KV cache, not {wants.kv_type_k} and {wants.kv_type_v}")
    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    env = {
        "OLLAMA_HOST": f"{host}:{serving.port}",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NOPRUNE": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_CONTEXT_LENGTH": str(candidate.ctx_tokens),
        "OLLAMA_NUM_PARALLEL": str(candidate.parallel),
        # What is kept free on each card: the first from 0.30 on, the second before.
        "LLAMA_ARG_FIT_TARGET": str(wants.headroom_bytes // MIB),
        "OLLAMA_GPU_OVERHEAD": str(wants.headroom_bytes),
        "LLAMA_ARG_ENDPOINT_METRICS": "1",
        **_visible_cards(used, environ),
        **_split(candidate, used),
    }
    if wants.kv_type_k != "f16":
        env["OLLAMA_KV_CACHE_TYPE"] = wants.kv_type_k
    if wants.flash_attention != "auto":
        env["OLLAMA_FLASH_ATTENTION"] = "1" if wants.flash_attention == "on" else "0"
    if not environ.get("HOME"):
        env["HOME"] = _home(serving.folder)
    for argument in serving.arguments:
        name, value = _setting(argument)
        env[name] = value
    return Launch(argv=(str(serving.program), "serve"), env=env)


def _split(candidate: Candidate, used: Sequence[PlannedDevice]) -> dict[str, str]:
    env: dict[str, str] = {}
    if len(used) > 1:
        env["OLLAMA_SCHED_SPREAD"] = "1"
        if candidate.split_mode == "tensor":
            env["LLAMA_ARG_SPLIT_MODE"] = "tensor"
        if candidate.wants.tensor_split:
            # In whole units, as the ledger has them; without it llama.cpp deals by free memory and may still adapt.
            env["LLAMA_ARG_TENSOR_SPLIT"] = ",".join(str(device.layers + device.head) for device in used)
    return env


def _visible_cards(used: Sequence[PlannedDevice], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that leave exactly these cards to Ollama, in their order.

    Cards of other libraries are hidden, since Ollama would rather use them, with one exception: ROCm heeds CUDA's
    list as well, so that it must not be set for AMD cards.
    """
    library = used[0].device.rstrip("0123456789") if used else ""
    hidden = [variable for name, variable in _VISIBLE.items() if not (library == "ROCm" and name == "CUDA")]
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **dict.fromkeys(hidden, _NONE)}
    if library in _VISIBLE:
        by_uuid = library == "CUDA" and all(device.uuid for device in used)
        # mgpu counts NVIDIA's cards without regard to a mask, and the others within it.
        mask = "" if library == "CUDA" else environ.get(_VISIBLE[library], "")
        shown = [entry.strip() for entry in mask.split(",") if entry.strip()]
        entries = [str(device.uuid) if by_uuid else _entry(device, shown) for device in used]
        env[_VISIBLE[library]] = ",".join(entries)
    if library == "Vulkan":
        env["OLLAMA_VULKAN"] = "1"
    return env


def _entry(device: PlannedDevice, shown: Sequence[str]) -> str:
    """A card's entry in a list of visible ones: its place among all cards, where only those `shown` are counted."""
    place = int(re.sub(r"\D", "", device.device) or 0)
    return shown[place] if place < len(shown) else str(place)


def _home(folder: Path) -> str:
    """The user's home by the password file; without an entry there, the instance's own folder."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return str(folder)


def _setting(argument: str) -> tuple[str, str]:
    match = _SETTING.fullmatch(argument)
    if match is None:
        raise UsageError(
            f"{argument[:80]!r} after -- means nothing to Ollama, which takes no options but variables",
            hint="for example -- OLLAMA_MAX_QUEUE=64",
        )
    name, value = match.groups()
    if name in _OWNED:
        raise UsageError(f"{name} after -- would contradict the plan: mgpu sets it", hint=f"use {_OWNED[name]}")
    if "\0" in value:
        raise UsageError(f"the value of {name} after -- holds a zero byte")
    return name, value


def sample(at: float, get: Get) -> Sample | None:
    """Return a reading at second `at`. The counters are those of the model's llama-server: where `get` asks Ollama
    itself, which counts nothing, all of them are unknown. None when nobody answers."""
    counted = llama_cpp.sample(at, get)
    return counted or (Sample(at=at) if get("/api/version") is not None else None)


def environment() -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the environment an Ollama of mgpu's is started in, and the names of the user's variables left out."""
    kept, _ = clean_environment(engine_environment())
    return kept, clean_environment(os.environ)[1]


BACKEND = Backend(
    name=OLLAMA,
    own_environment=environment,
    launch=build_launch,
    ready_path="/api/version",
    phase=ollama_log.phase,
    diagnose=ollama_failure.diagnose,
    memory=ollama_log.memory,
    tells_every_card=False,  # what it says is verified as a whole, by ollama_placement
    sample=sample,
    # It ends its llama-servers first, which took up to 1.7 s.
    stop_grace_s=10.0,
)
