"""vLLM: from a plan to the exact `vllm serve` command, and what the user may add to it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mgpu.backends.backend import Backend, Launch, Serving
from mgpu.backends.engine import Engine
from mgpu.backends.vllm_failure import diagnose
from mgpu.backends.vllm_log import device_memory, phase
from mgpu.backends.vllm_metrics import sample
from mgpu.errors import UsageError
from mgpu.planning.candidates import Candidate, PlannedDevice
from mgpu.planning.vllm_memory import DEFAULT_UTILISATION, VllmWants
from mgpu.units import GIB

NAME = "vllm"
API_KEY_VARIABLE = "VLLM_API_KEY"
# Without it a request in flight keeps the engine's processes waiting for their server and the server for the client,
# for minutes. With it the engine and its workers are gone soon after these seconds; the server, which holds no card,
# may still wait for the client to hang up (both measured on 0.32.0), so that it is killed in the end.
SHUTDOWN_TIMEOUT_S = 3
STOP_GRACE_S = 8.0

# Flags that mgpu sets itself, with the option to use instead.
OWNED_FLAGS = {
    "--model": "MODEL",
    "--served-model-name": "--name",
    "--host": "--host",
    "--port": "--port",
    "--api-key": f"--api-key (or the variable {API_KEY_VARIABLE})",
    "-tp": "--tensor-parallel",
    "--tensor-parallel-size": "--tensor-parallel",
    "-pp": "--pipeline-parallel",
    "--pipeline-parallel-size": "--pipeline-parallel",
    "-dp": "--replicas",
    "--data-parallel-size": "--replicas",
    "--max-model-len": "--ctx",
    "--max-num-seqs": "--parallel",
    "--kv-cache-dtype": "--kv-type",
    "--kv-cache-memory-bytes": "--gpu-memory-utilization after --",
    "--device-ids": "--gpus",
    "--shutdown-timeout": "no such flag: mgpu needs its own",
}
# Flags with which mgpu would wait for ever: it asks the engine over plain HTTP on its port.
_HIDING_FLAGS = ("--uds", "--ssl-keyfile", "--ssl-certfile", "--headless", "--nnodes", "--node-rank")
_UTILISATION_FLAGS = ("--gpu-memory-utilization", "--device-memory-utilization")
# A unix socket's path takes 107 bytes, and vLLM names its sockets with 36 characters (ZeroMQ, sun_path).
_LONGEST_SOCKET_FOLDER = 107 - 1 - 36


def read_engine_arguments(arguments: Sequence[str], wants: VllmWants) -> tuple[tuple[str, ...], VllmWants]:
    """Return the arguments after `--` for `vllm serve`, and `wants` with those that move memory.

    Raises UsageError for a flag that mgpu sets itself, naming the option to use instead, and for a share of memory
    that is none.
    """
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        flag, _, joined = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")  # as vLLM reads it
        if owned := _abbreviated(flag, OWNED_FLAGS):
            raise UsageError(
                f"{flag} after -- would contradict the plan: mgpu sets it", hint=f"use {OWNED_FLAGS[owned]}"
            )
        if _abbreviated(flag, _HIDING_FLAGS):
            raise UsageError(
                f"{flag} after -- would hide the engine from mgpu, which watches it over plain HTTP",
                hint="put a proxy in front of it for TLS or another path",
            )
        if _abbreviated(flag, _UTILISATION_FLAGS):
            share = _share(joined or (queue.pop(0) if queue else ""))
            wants = replace(wants, gpu_memory_utilization=share)
            continue
        if flag == "--enforce-eager":
            wants = replace(wants, enforce_eager=True)
        rest.append(word)
    return tuple(rest), wants


def build_launch(candidate: Candidate, serving: Serving) -> Launch:
    """Return the `vllm serve` command that runs `candidate` exactly as planned.

    Cards are pinned by UUID, in the order of the ranks. TMPDIR is `temporary_folder(serving.folder)`, which the
    caller makes and removes: vLLM leaves its sockets there. Raises UsageError for a key that HTTP cannot carry.
    """
    wants = candidate.wants if isinstance(candidate.wants, VllmWants) else VllmWants()
    argv = [str(serving.program), "serve", serving.model, "--served-model-name", serving.name]
    argv += ["--host", serving.host, "--port", str(serving.port)]
    argv += ["--tensor-parallel-size", str(candidate.tensor_parallel)]
    if candidate.pipeline_parallel > 1:
        argv += ["--pipeline-parallel-size", str(candidate.pipeline_parallel)]
    if candidate.replicas > 1:
        argv += ["--data-parallel-size", str(candidate.replicas)]
    # Each replica has a scheduler of its own, and the limit is that scheduler's ("per data-parallel rank").
    argv += ["--max-model-len", str(candidate.ctx_tokens), "--max-num-seqs", str(candidate.users_per_replica)]
    if candidate.devices:
        share = wants.gpu_memory_utilization or DEFAULT_UTILISATION
        argv += ["--gpu-memory-utilization", f"{share:g}"]
    if candidate.kv_type == "fp8":
        argv += ["--kv-cache-dtype", "fp8"]
    argv += ["--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S), *serving.arguments]

    env = {
        "TMPDIR": str(temporary_folder(serving.folder)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **(_card_variables(candidate) if candidate.devices else _cpu_variables(candidate)),
    }
    if serving.api_key:
        if not serving.api_key.isprintable() or serving.api_key != serving.api_key.strip():
            raise UsageError("the API key begins or ends with a blank, or holds a line break: no client could send it")
        env[API_KEY_VARIABLE] = serving.api_key
    return Launch(argv=tuple(argv), env=env, secrets=frozenset({API_KEY_VARIABLE} if serving.api_key else ()))


def temporary_folder(folder: Path) -> Path:
    """Return the folder for an engine's temporary files: `tmp` in the instance's own folder or, where that is too
    long for the path of a unix socket, one in the system's with a name made from it."""
    own = folder / "tmp"
    if len(os.fsencode(own)) <= _LONGEST_SOCKET_FOLDER:
        return own
    digest = hashlib.sha256(os.fsencode(own)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mgpu-{digest}"


def fitted(launch: Launch, engine: Engine) -> Launch:
    """Return what of `launch` the installed vLLM knows; blocks for ten seconds when it is asked for the first time.

    Raises EngineFailed (code "engine-too-old", "engine-broken").
    """
    from mgpu.backends.vllm_program import fit_to_help, installed_version, serve_help

    return fit_to_help(launch, serve_help(engine), installed_version(engine.path))


BACKEND = Backend(
    name=NAME,
    launch=build_launch,
    fitted=fitted,
    temporary_folder=temporary_folder,
    tells_every_card=False,
    maps_weights=False,
    ready_path="/health",
    phase=phase,
    diagnose=diagnose,
    memory=device_memory,
    sample=sample,
    stop_grace_s=STOP_GRACE_S,
    # Told all at once, its workers stop in the middle of answers that it would finish within the shutdown timeout.
    stops_its_own=True,
)


def _card_variables(candidate: Candidate) -> dict[str, str]:
    devices = candidate.devices
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if all(device.uuid and device.device.startswith("CUDA") for device in devices):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.uuid) for device in devices)
    elif all(device.device.startswith("ROCm") for device in devices):
        env = {"HIP_VISIBLE_DEVICES": ",".join(map(_place, devices))}
    else:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(_place, devices))
    if candidate.pipeline_parallel > 1:
        stages = devices[: candidate.pipeline_parallel * candidate.tensor_parallel : candidate.tensor_parallel]
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(device.layers) for device in stages)
    return env


def _place(device: PlannedDevice) -> str:
    """A card's number among those of its driver, which knows no others."""
    return re.sub(r"\D", "", device.device)


def _cpu_variables(candidate: Candidate) -> dict[str, str]:
    """Each worker of the CPU build takes a KV cache of its own, in whole GiB, and has to be told its cores: it finds
    them by itself only on a machine with as many NUMA nodes as workers."""
    workers = candidate.tensor_parallel * candidate.pipeline_parallel * candidate.replicas
    env = {"VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-candidate.host.kv_bytes // (workers * GIB))))}
    if workers > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = _cores(workers)
    return env


def _cores(workers: int) -> str:
    """This machine's cores dealt evenly, such as "0,1|2,3"; "nobind" when there are fewer than workers."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    if not each:
        return "nobind"
    shares = (cores[start : start + each] for start in range(0, workers * each, each))
    return "|".join(",".join(map(str, share)) for share in shares)


def _abbreviated(flag: str, flags: Sequence[str] | dict[str, str]) -> str | None:
    """The one of `flags` that vLLM would read `flag` as: itself, or one that it begins."""
    if flag in flags:
        return flag
    if len(flag) < len("--xxx"):
        return None
    return next((known for known in flags if flag.startswith("--") and known.startswith(flag)), None)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.05 <= share <= 1.0:
        raise UsageError(f"--gpu-memory-utilization {text!r} is not a share between 0.05 and 1")
    return round(share, 4)
