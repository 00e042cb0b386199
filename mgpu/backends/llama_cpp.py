"""llama.cpp: from a plan to the exact llama-server command, and what the user may add to it."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from mgpu.backends.backend import Backend, DeviceMemory, Get, Launch, Serving
from mgpu.backends.cpu_library import cpu_library
from mgpu.backends.engine import LLAMA_CPP, Engine, ask
from mgpu.backends.llama_cpp_failure import diagnose
from mgpu.backends.llama_cpp_log import Phase, buffers_by_device, parse_line
from mgpu.backends.llama_cpp_metrics import sample_from_text
from mgpu.backends.samples import Sample, has_metrics
from mgpu.errors import EngineFailed, UsageError
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.memory import padded_ctx_tokens
from mgpu.planning.wants import Wants

API_KEY_VARIABLE = "LLAMA_API_KEY"

# Flags that mgpu sets itself, with the option to use instead.
OWNED_FLAGS = {
    "-m": "MODEL",
    "--model": "MODEL",
    "-mu": "MODEL",
    "--model-url": "MODEL",
    "-hf": "MODEL",
    "-hfr": "MODEL",
    "--hf-repo": "MODEL",
    "-hff": "MODEL",
    "--hf-file": "MODEL",
    "-a": "--name",
    "--alias": "--name",
    "--host": "--host",
    "--port": "--port",
    "-dev": "--gpus",
    "--device": "--gpus",
    "-sm": "--split-mode",
    "--split-mode": "--split-mode",
    "-ts": "--tensor-split",
    "--tensor-split": "--tensor-split",
    "-ngl": "--offload",
    "--gpu-layers": "--offload",
    "--n-gpu-layers": "--offload",
    "-c": "--ctx",
    "--ctx-size": "--ctx",
    "-np": "--parallel",
    "--parallel": "--parallel",
    "-ctk": "--kv-type",
    "--cache-type-k": "--kv-type",
    "-ctv": "--kv-type",
    "--cache-type-v": "--kv-type",
    "-ub": "--ubatch",
    "--ubatch-size": "--ubatch",
    "-fa": "--flash-attn",
    "--flash-attn": "--flash-attn",
    "--api-key": f"--api-key (or the variable {API_KEY_VARIABLE})",
    "--hf-token": "HF_TOKEN in the environment: it must not be seen in a list of processes",
    "-hft": "HF_TOKEN in the environment: it must not be seen in a list of processes",
    "--api-key-file": f"--api-key (or the variable {API_KEY_VARIABLE})",
    "-fit": "--offload",
    "--fit": "--offload",
}
# Flags that would hide the engine from mgpu, which asks it over plain HTTP at its root and reads its log.
_HIDING_FLAGS = {
    **dict.fromkeys(("--api-prefix", "--ssl-key-file", "--ssl-cert-file"), "put a proxy in front of it instead"),
    **dict.fromkeys(
        ("-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-disable", "--log-file"),
        "the whole log is in the file that mgpu names",
    ),
}
# llama-server's own default for -b; a micro-batch is cut to it.
_BATCH = 2048
# Flags that take memory nobody has planned.
_UNPLANNED_FLAGS = (
    "-md", "--model-draft", "-mm", "--mmproj", "-mmu", "--mmproj-url", "--lora", "--lora-scaled", "--control-vector",
    "-ot", "--override-tensor", "-b", "--batch-size", "--rerank", "--reranking",
)  # fmt: skip
_OVERRIDES = ("-ot", "--override-tensor")
# More layers than any model has.
_ALL_LAYERS = 1_000_000
_LAYERS_TRIED = 200
_HELP_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What follows `--`: `rpc` servers, the memory switches the planner knows, and all else as it was typed."""

    rest: tuple[str, ...] = ()
    rpc: str | None = None

    @property
    def unplanned(self) -> tuple[str, ...]:
        """The flags among `rest` that take memory which is not in the plan."""
        flags = ((word.partition("=")[0], value) for word, value in zip(self.rest, (*self.rest[1:], ""), strict=False))
        return tuple(
            flag
            for flag, value in flags
            if flag in _UNPLANNED_FLAGS and not (flag in _OVERRIDES and experts_on_host(value))
        )


def read_engine_arguments(arguments: Sequence[str], wants: Wants) -> tuple[EngineArguments, Wants]:
    """Return the arguments after `--` for llama-server, and `wants` with those that move memory.

    `--rpc` may also come from llama.cpp's own variable LLAMA_ARG_RPC. Raises UsageError for a flag that mgpu
    sets itself, naming the option to use instead.
    """
    rest: list[str] = []
    rpc = os.environ.get("LLAMA_ARG_RPC") or None
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        flag, _, joined = word.partition("=")
        if flag in OWNED_FLAGS:
            raise UsageError(
                f"{flag} after -- would contradict the plan: mgpu sets it", hint=f"use mgpu's own {OWNED_FLAGS[flag]}"
            )
        if flag in _HIDING_FLAGS:
            raise UsageError(f"{flag} after -- would hide the engine from mgpu", hint=_HIDING_FLAGS[flag])
        if flag == "--rpc":
            rpc = joined or (queue.pop(0) if queue else None)
            if not rpc:
                raise UsageError("--rpc wants servers as HOST:PORT,HOST:PORT")
            continue
        rest.append(word)
        if flag in ("-nkvo", "--no-kv-offload"):
            wants = replace(wants, kv_on_host=True)
        elif flag in ("-kvu", "--kv-unified"):
            wants = replace(wants, kv_unified=True)
        elif flag == "--swa-full":
            wants = replace(wants, swa_full=True)
        elif flag in ("--embedding", "--embeddings"):
            wants = replace(wants, embeddings=True)
        elif flag in ("-cmoe", "--cpu-moe"):
            wants = replace(wants, cpu_moe_layers=_ALL_LAYERS)
        elif flag in ("-ncmoe", "--n-cpu-moe") and queue and queue[0].isdecimal():
            wants = replace(wants, cpu_moe_layers=int(queue[0][:6]))
        elif flag in _OVERRIDES and queue and (layers := experts_on_host(queue[0])):
            wants = replace(wants, cpu_moe_layers=layers)
    return EngineArguments(rest=tuple(rest), rpc=rpc), wants


def experts_on_host(override: str) -> int:
    """Return of how many first layers `--override-tensor` keeps the routed experts on the host, as "exps=CPU" and
    "blk\\.[0-9]\\.ffn_.*_exps\\.=CPU" do; 0 where it does anything else."""
    pattern, _, buffer = override.rpartition("=")
    if buffer != "CPU":
        return 0
    try:
        found = re.compile(pattern)
    except re.error:
        return 0
    parts = ("up", "gate", "down")
    matched = [
        [bool(found.search(f"blk.{layer}.ffn_{part}{kind}.weight")) for part in parts for kind in ("_exps", "")]
        for layer in range(_LAYERS_TRIED)
    ]
    experts = [all(each[::2]) and not any(each[1::2]) for each in matched]
    count = experts.index(False) if False in experts else _ALL_LAYERS
    others = any(any(each) for each in matched[count:]) or found.search("blk.0.attn_q.weight")
    return 0 if others else count


def build_launch(candidate: Candidate, serving: Serving) -> Launch:
    """Return the llama-server command that runs `candidate` exactly as planned.

    Nothing is left for llama-server to adjust (`--fit off`): devices are named, since it drops a missing one in
    silence, and layers are dealt by `-ts` in whole units, which llama.cpp's own arithmetic gives back exactly.
    NVIDIA cards are pinned by UUID, which renumbers them. Raises UsageError for a key that HTTP cannot carry, and
    what `read_engine_arguments` raises.
    """
    arguments, _ = read_engine_arguments(serving.arguments, candidate.wants)
    api_key = serving.api_key
    if api_key and (not api_key.isprintable() or api_key != api_key.strip()):
        raise UsageError("the API key begins or ends with a blank, or holds a line break: no client could send it")
    used = [device for device in candidate.devices if not device.idle]
    pinned = _pinned(used)
    env = cpu_library(serving.program)
    if any(device.device.startswith("CUDA") for device in used):
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if pinned:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in used)
    names = _names(used)
    units = [device.layers + device.head for device in used]
    wants = candidate.wants

    argv = [str(serving.program), "-m", serving.model, "--alias", serving.name]
    argv += ["--host", serving.host, "--port", str(serving.port)]
    if arguments.rpc:
        argv += ["--rpc", arguments.rpc]
    if used:
        tensor = candidate.split_mode == "tensor"  # then each has all layers
        argv += ["-dev", ",".join(names), "-ngl", str(units[0] if tensor else sum(units)), "-sm", candidate.split_mode]
        if tensor:
            argv += ["-ts", ",".join(f"{share:g}" for share in wants.tensor_split or (1,) * len(used))]
        elif len(used) > 1:
            argv += ["-ts", ",".join(map(str, units))]
        if candidate.host.expert_layers > wants.cpu_moe_layers:
            argv += ["--n-cpu-moe", str(candidate.host.expert_layers)]
    else:
        argv += ["-dev", "none", "-ngl", "0"]
    ctx_tokens = padded_ctx_tokens(candidate.ctx_tokens) * candidate.parallel
    argv += ["--fit", "off", "-c", str(ctx_tokens), "-np", str(candidate.parallel)]
    argv += ["-ctk", wants.kv_type_k, "-ctv", wants.kv_type_v, "-ub", str(wants.ubatch), "-fa", wants.flash_attention]
    if wants.ubatch > _BATCH:
        argv += ["-b", str(wants.ubatch)]
    # -lv 4 prints devices, buffers and memory; pings end a stream soon after SIGTERM.
    argv += ["-lv", "4", "--metrics", "--sse-ping-interval", "2", *arguments.rest]
    if api_key:
        # Of a single key llama-server writes the last four characters to its log, of several only how many.
        env[API_KEY_VARIABLE] = api_key if "," in api_key else f"{api_key},{secrets.token_hex(16)}"
    return Launch(argv=tuple(argv), env=env, secrets=frozenset({API_KEY_VARIABLE} if api_key else ()))


@cache
def knows_tensor_split(engine: Engine) -> bool:
    """Return whether the llama-server has `--split-mode tensor`, as its --help tells; blocks for a second or so when it
    is asked for the first time. One that gives no answer is taken to know it: its start will tell."""
    try:
        modes = re.search(r"--split-mode\s+\{([^}]*)\}", ask(engine, ["--help"], limit_s=_HELP_LIMIT_S))
    except EngineFailed:
        return True
    return modes is None or "tensor" in modes[1].split(",")


def memory(lines: Sequence[str], candidate: Candidate) -> dict[int, DeviceMemory]:
    """Return what the log says was allocated on each card that it names, by its place in `candidate.devices`."""
    buffers = buffers_by_device(lines)
    used = [(index, device) for index, device in enumerate(candidate.devices) if not device.idle]
    names = _names([device for _, device in used])
    return {
        index: DeviceMemory(
            weights_bytes=buffers[name].weights_bytes,
            kv_bytes=buffers[name].kv_bytes,
            compute_bytes=buffers[name].compute_bytes,
        )
        for (index, _), name in zip(used, names, strict=True)
        if name in buffers
    }


def phase(line: str) -> str | None:
    """Return what a log line says has begun, None for most lines."""
    event = parse_line(line)
    return event.name if isinstance(event, Phase) else None


def sample(at: float, get: Get) -> Sample | None:
    """Read the engine's counters at second `at`; None when it does not answer, or with something else."""
    metrics = get("/metrics") or ""
    return sample_from_text(at, metrics, get("/slots")) if has_metrics(metrics) else None


def _pinned(used: Sequence[PlannedDevice]) -> bool:
    """Whether the cards are NVIDIA's, which are chosen by UUID and renumbered by that."""
    return bool(used) and all(device.uuid and device.device.startswith("CUDA") for device in used)


def _names(used: Sequence[PlannedDevice]) -> list[str]:
    """What llama-server calls these cards once only they are visible to it."""
    pinned = _pinned(used)
    return [f"CUDA{i}" if pinned else device.device for i, device in enumerate(used)]


BACKEND = Backend(
    name=LLAMA_CPP,
    launch=build_launch,
    ready_path="/health",
    phase=phase,
    diagnose=diagnose,
    memory=memory,
    sample=sample,
    is_chatter=lambda line: line.endswith(": all slots are idle"),
)
