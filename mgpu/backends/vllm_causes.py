"""What vLLM's error lines mean: a table from patterns to sentences, in the order in which they are tried.

Lines of the CPU build were recorded from version 0.32.0; those of cards were read in its source or are what its
users report. A pattern is matched against what a line says without its prefix, and never against a line that vLLM
logs as information or warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A line that matches `pattern` means `message`; both texts may name groups of the pattern.

    The group `ordinal` is the number of a card among those the engine may see, `wanted` and `unit` the size of a
    refused allocation. `{device}` in `message` is that card, or "a card"; `{file}` is shown without its folder.
    `part` says of a refused allocation what it was for ("weights", "kv", "compute"; None: what the phase says).
    """

    code: str
    pattern: re.Pattern[str]
    message: str
    hint: str
    deterministic: bool = True
    part: str | None = None


def _cause(
    code: str, pattern: str, message: str, hint: str, *, deterministic: bool = True, part: str | None = None
) -> Cause:
    return Cause(
        code=code,
        pattern=re.compile(pattern),
        message=message,
        hint=hint,
        deterministic=deterministic,
        part=part,
    )


_UTILISATION = "-- --gpu-memory-utilization"
_DOCTOR = "look for what the kernel reported: sudo dmesg | grep -i -E 'xid|nvrm|amdgpu'"
_NEWER_ENGINE = "a newer vLLM may: mgpu backends install vllm"
_CHANGE_THE_OPTION = "its options: serve --help=all of the vllm that mgpu backends shows"
_SHAPE = "mgpu plan MODEL --backend vllm shows the sizes that work"

# The first row that matches any line decides, so that consequences come after their causes.
CAUSES = (
    # Memory.
    _cause(
        "out-of-memory",
        r"To serve at least one request with the model's max seq len \((?P<len>\d+)\), \((?P<wanted>[\d.]+) "
        r"(?P<unit>GiB) KV cache is needed.* estimated maximum model length is (?P<fits>\d+)",
        "the KV cache holds {fits} tokens, but one request may have {len}",
        f"--ctx {{fits}}, --kv-type fp8, more cards, or {_UTILISATION} 0.95",
        part="kv",
    ),
    _cause(
        "out-of-memory",
        r"To serve at least one request with the model's max seq len \((?P<len>\d+)\), \((?P<wanted>[\d.]+) "
        r"(?P<unit>GiB) KV cache is needed",
        "no memory is left for a KV cache of {len} tokens ({wanted} GiB)",
        "a smaller --ctx, --kv-type fp8, or more cards (--gpus)",
        part="kv",
    ),
    _cause(
        "out-of-memory",
        r"No available memory for the cache blocks",
        "the weights leave no memory for a KV cache",
        f"more cards (--gpus), a smaller --quant, or {_UTILISATION} 0.95",
        part="kv",
    ),
    _cause(
        "out-of-memory",
        r"Free memory on device (?:cuda:(?P<ordinal>\d+) )?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup "
        r"is less than .*\((?P<share>[\d.]+), (?P<wanted>[\d.]+) (?P<unit>GiB)\)",
        "{device} has {free} of {total} GiB free, and vLLM was to take {wanted}",
        f"mgpu gpus shows who holds the rest; or a smaller {_UTILISATION}",
        deterministic=False,
        part="weights",
    ),
    _cause(
        "host-out-of-memory",
        r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache allocation is less "
        r"than requested memory for kv \((?P<wanted>[\d.]+) (?P<unit>GiB)\)",
        "out of memory in host RAM: {wanted} GiB asked for the KV cache, {free} GiB available",
        "a smaller --ctx or --parallel",
        part="kv",
    ),
    _cause(
        "out-of-memory",
        r"(?:CUDA|HIP) out of memory\. Tried to allocate (?P<wanted>[\d.]+) (?P<unit>[KMG]iB)[. ]+\(?"
        r"GPU (?P<ordinal>\d+)",
        "out of memory on {device}: {wanted} {unit} asked",
        f"more cards (--gpus), a smaller --quant, or a smaller {_UTILISATION}",
    ),
    _cause(
        "out-of-memory",
        r"(?:CUDA|HIP) (?:error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation",
        "out of memory on a card",
        f"more cards (--gpus), a smaller --quant, or a smaller {_UTILISATION}",
    ),
    _cause(
        "host-out-of-memory",
        r"DefaultCPUAllocator: can't allocate memory|\[Errno 12\] Cannot allocate memory|^MemoryError\b",
        "out of memory in host RAM",
        "a smaller --ctx, or close programs that hold RAM",
    ),
    _cause(
        "host-out-of-memory",
        r"Error while creating shared memory segment (?P<file>\S+)|\[Errno 28\] No space left on device: '/dev/shm|"
        r"No space left on device.*/dev/shm",
        "the shared memory (/dev/shm) is too small for what the workers share",
        "in a container: docker run --shm-size 8g (or --ipc host)",
    ),
    # The command line.
    _cause(
        "bad-flag",
        r"^vllm(?: serve)?: error: unrecognized arguments: (?P<flag>\S+)",
        "vLLM does not know the option {flag}",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "bad-value",
        r"^vllm(?: serve)?: error: argument (?P<flag>[^:]+): (?P<why>.*)",
        "vLLM refuses the value of {flag}: {why}",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "bad-flag",
        r"^vllm(?: serve)?: error: (?P<why>.*)",
        "vLLM refuses the command line: {why}",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "port-in-use",
        r"^OSError: \[Errno 98\] .*[Aa]ddress already in use",
        "the port is taken by another program",
        "another --port",
    ),
    _cause(
        "bad-host",
        r"^OSError: \[Errno 99\]|^(?:socket\.)?gaierror: ",
        "cannot listen there: not an address of this machine",
        "--host 127.0.0.1",
    ),
    # The model.
    _cause(
        "model-missing",
        r"HFValidationError: Repo id must be .*: '(?P<what>[^']*)'",
        "the model folder {what} does not exist",
        "check the path",
    ),
    _cause(
        "model-missing",
        r"(?:GatedRepoError|401 Client Error|403 Client Error)",
        "the hub refuses the model: it is gated or private",
        "accept its licence on its page, then set HF_TOKEN",
    ),
    _cause(
        "model-missing",
        r"(?:RepositoryNotFoundError|RevisionNotFoundError|404 Client Error)",
        "the hub knows no such model",
        "check the name",
    ),
    _cause(
        "model-missing",
        r"We couldn't connect to '(?P<what>[^']*)'",
        "the model is not on this machine, and {what} cannot be reached",
        "connect to the network, or give a folder",
        deterministic=False,
    ),
    _cause(
        "model-missing",
        r"LocalEntryNotFoundError: ",
        "the model is not on this machine, and downloads are switched off",
        "unset HF_HUB_OFFLINE, or give a folder",
    ),
    _cause(
        "model-missing",
        r"Invalid repository ID or local directory specified: '(?P<file>[^']*)'",
        "{file} holds no model: there is no config.json in it",
        "give the folder that holds config.json",
    ),
    _cause(
        "model-missing",
        r"Cannot find any model weights with [`'](?P<file>[^`']*)",
        "{file} holds no weights that vLLM reads (*.safetensors)",
        "fetch the model's .safetensors files",
    ),
    _cause(
        "model-missing",
        r"Couldn't instantiate the backend tokenizer from one of|Can't load tokenizer for '(?P<file>[^']*)'",
        "the model's folder holds no tokenizer that vLLM can read",
        "fetch the model's tokenizer files, or name another tokenizer: -- --tokenizer FOLDER",
    ),
    _cause(
        "model-corrupt",
        r"SafetensorError: (?P<why>.*)",
        "a weight file is cut short or damaged: {why}",
        "delete the file and fetch it again",
    ),
    _cause(
        "architecture-unknown",
        r"Model architectures \[(?P<what>[^\]]*)\] are not supported",
        "this vLLM does not know the model architecture {what}",
        _NEWER_ENGINE,
    ),
    _cause(
        "architecture-unknown",
        r"has model type `(?P<what>[^`]*)` but Transformers does not recognize",
        "this vLLM does not know the model type {what}",
        _NEWER_ENGINE,
    ),
    _cause(
        "model-unusable",
        r"requires you to execute the configuration file|`?--trust-remote-code`? flag in the CLI",
        "the model brings code of its own, which vLLM runs only when told to",
        "read that code first, then -- --trust-remote-code",
    ),
    _cause(
        "bad-value",
        r"User-specified max_model_len \((?P<len>\d+)\) is greater than the derived max_model_len "
        r"\((?:max_position_embeddings|model_max_length)=(?P<most>\d+)",
        "a context of {len} tokens is more than the model's {most}",
        "--ctx {most}",
    ),
    _cause(
        "model-unusable",
        r"(?P<what>Bfloat16) is only supported on GPUs with compute capability of at least (?P<least>[\d.]+)",
        "this card does not compute in bfloat16 (compute capability below {least})",
        "-- --dtype half",
    ),
    _cause(
        "model-unusable",
        r"quantization method (?P<what>\S+) is not supported for the current GPU\. Minimum capability: "
        r"(?P<least>\d+)\. Current capability: (?P<has>\d+)",
        "this card cannot compute {what} weights (capability {has}, needs {least})",
        "another quantisation of the model, such as AWQ or GPTQ",
    ),
    _cause(
        "model-unusable",
        r"Quantization scheme is not supported for the current GPU",
        "this card cannot compute the model's quantisation",
        "another quantisation of the model, such as AWQ or GPTQ",
    ),
    # The split.
    _cause(
        "split-unsupported",
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size "
        r"\((?P<size>\d+)\)",
        "{heads} attention heads cannot be dealt to {size} cards",
        _SHAPE,
    ),
    _cause(
        "split-unsupported",
        r"is not divisible by weight quantization block_[nk] = (?P<block>\d+)|"
        r"is not divisible by +min_thread_[nk] = (?P<thread>\d+)|is not divisible by group_size ?= ?(?P<group>\d+)",
        "the quantised matrices cannot be cut into that many parts",
        _SHAPE,
    ),
    _cause(
        "split-unsupported",
        r"^AssertionError: (?P<whole>\d+) is not divisible by (?P<parts>\d+)",
        "a dimension of {whole} cannot be cut into {parts} parts",
        _SHAPE,
    ),
    _cause(
        "split-unsupported",
        r"Pipeline parallelism is not supported for this model",
        "vLLM cannot run this model as a pipeline",
        "--tensor-parallel instead",
    ),
    _cause(
        "split-unsupported",
        r"(?P<what>(?:len|sum)\(partitions\))=(?P<has>\d+) does not match \w+=(?P<wants>\d+)",
        "VLLM_PP_LAYER_PARTITION does not fit the model ({has} instead of {wants})",
        "unset VLLM_PP_LAYER_PARTITION",
    ),
    _cause(
        "split-unsupported",
        r"^assert self\.intermediate_tensors is not None",
        "vLLM's CPU build cannot run a pipeline without compiling",
        "leave out -- --enforce-eager",
    ),
    _cause(
        "split-unsupported",
        r"^ZeroDivisionError: integer division or modulo by zero",
        "vLLM divided by zero, as it does with more pipeline stages than layers",
        _SHAPE,
    ),
    _cause(
        "bad-value",
        r"Not enough allowed NUMA nodes to bind threads of (?P<count>\d+) local CPUWorkers",
        "vLLM cannot deal the CPU's cores to {count} workers by itself",
        "set VLLM_CPU_OMP_THREADS_BIND, such as '0-3|4-7'",
    ),
    _cause(
        "bad-value",
        r"current platform (?P<what>\w+) does not support ray",
        "vLLM's {what} build does not run on Ray",
        "leave out -- --distributed-executor-backend ray",
    ),
    # Cards and drivers.
    _cause(
        "engine-broken",
        r"(?P<why>no kernel image is available for execution on the device)",
        "this vLLM was not built for the card ({why})",
        _NEWER_ENGINE,
    ),
    _cause(
        "engine-broken",
        r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|"
        r"CUDA driver version is insufficient|libcuda\.so\.1: cannot open|CUDA unknown error|no CUDA-capable device",
        "vLLM finds no card it can use here",
        "mgpu gpus shows the driver and the cards",
    ),
    _cause(
        "engine-broken",
        r"^ImportError: (?P<why>.*(?:cannot open shared object file|undefined symbol).*)",
        "vLLM's installation is broken: {why}",
        "install it again: mgpu backends install vllm",
    ),
    _cause(
        "engine-broken",
        r"^ModuleNotFoundError: (?P<why>.*)|^importlib\.metadata\.PackageNotFoundError: (?P<package>.*)",
        "vLLM's installation is incomplete: {why}{package}",
        "install it again: mgpu backends install vllm",
    ),
    _cause(
        "device-lost",
        r"(?P<what>CUDA|HIP) error: (?P<why>.*)",
        "a card failed while computing ({what}: {why})",
        _DOCTOR,
        deterministic=False,
    ),
    _cause(
        "cards-unreachable",
        r"NCCL error.*?: (?P<why>.*)|(?P<nccl>nccl\w*Error): ",
        "the cards cannot talk to each other (NCCL: {why}{nccl})",
        "NCCL_DEBUG=INFO tells more; NCCL_P2P_DISABLE=1 leaves out direct access",
        deterministic=False,
    ),
    _cause(
        "device-lost",
        r"TimeoutError: RPC call to (?P<what>\w+) timed out",
        "a worker stopped answering ({what})",
        _DOCTOR,
        deterministic=False,
    ),
    # Of these the causes above may be the reason, so they come last.
    _cause(
        "stopped",
        r"^KeyboardInterrupt(?:: terminated)?$",
        "vLLM was asked to stop from outside while it started",
        "read the end of the log",
        deterministic=False,
    ),
)
