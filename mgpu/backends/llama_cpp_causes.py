"""What llama-server's error lines mean: a table from patterns to sentences, in the order in which they are tried.

Lines of the CPU, Vulkan and RPC backends were recorded from build 10434; those of CUDA and ROCm are what
their users report. Refused allocations are not here: their facts are spread over several lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A log line that matches `pattern` means `message`; both texts may name groups of the pattern.

    `{device}` in `message` is the engine's name of the card that failed, or "a card"; `{file}` is shown
    without its folder.
    """

    code: str
    pattern: re.Pattern[str]
    message: str
    hint: str
    deterministic: bool = True


def _cause(code: str, pattern: str, message: str, hint: str, *, deterministic: bool = True) -> Cause:
    return Cause(code=code, pattern=re.compile(pattern), message=message, hint=hint, deterministic=deterministic)


_CHANGE_THE_OPTION = "its options: --help of the llama-server that mgpu backends shows"
_FETCH_AGAIN = "delete the file and fetch it again"
_NEWER_ENGINE = "a newer llama.cpp may know it: mgpu backends"
_DOCTOR = "look for what the kernel reported: sudo dmesg | grep -i -E 'xid|amdgpu|nvrm'"

INVALID_DEVICE = _cause(
    "bad-device",
    r'while handling argument "(?:-dev|--device)": invalid device: (?P<what>.*)',
    "llama-server does not know the device {what}",
    "mgpu backends shows the devices it sees",
)

# Why a device is unknown; by themselves these lines are harmless.
WHY_INVALID_DEVICE = (
    _cause(
        "device-lost",
        r"Failed to connect to (?P<what>\S+:\d+)",
        "the RPC device at {what} cannot be reached",
        "start ggml-rpc-server there, or leave it out of --gpus",
        deterministic=False,
    ),
    _cause(
        "bad-device",
        r"failed to initialize (?P<what>CUDA|ROCm|HIP): (?P<why>.*)",
        "{what} does not work here: {why}",
        "mgpu gpus shows the driver and the cards it sees",
    ),
)

# The first row that matches any line decides,
# so that consequences come after their causes.
CAUSES = (
    _cause(
        "engine-broken",
        r"error while loading shared libraries: (?P<what>[^:]+)",
        "llama-server lacks the shared library {what}",
        "mgpu backends shows which engine is run; install its runtime libraries",
    ),
    _cause(
        "bad-value",
        r'while handling argument "(?P<flag>[^"]+)": Unsupported cache type: (?P<what>.*)',
        "{what} is not a KV cache type this llama-server supports ({flag})",
        "--kv-type f16, q8_0 or q4_0",
    ),
    _cause(
        "bad-value",
        r'while handling argument "(?P<flag>[^"]+)": (?:sto\w+)$',
        "the value of {flag} is not a number",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "bad-value",
        r'while handling (?:argument|environment variable) "(?P<flag>[^"]+)": (?:error: )?(?P<why>.*)',
        "llama-server refuses the value of {flag}: {why}",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "bad-flag",
        r"^error: invalid argument: (?P<flag>.*)",
        "llama-server does not know the option {flag}",
        _CHANGE_THE_OPTION,
    ),
    _cause(
        "port-in-use",
        r"couldn't bind HTTP server socket, hostname: (?P<host>127\.[\d.]+|localhost|0\.0\.0\.0|::1?), "
        r"port: (?P<port>\d+)",
        "port {port} on {host} is taken by another program",
        "another --port",
    ),
    _cause(
        "bad-host",
        r"couldn't bind HTTP server socket, hostname: (?P<host>.*), port: (?P<port>\d+)",
        "cannot listen on {host}:{port}: not an address of this machine, or the port is taken",
        "--host 127.0.0.1, or another --port",
    ),
    _cause(
        "model-missing",
        r"failed to open GGUF file '(?P<file>.*)' \(No such file or directory\)",
        "the model file {file} does not exist",
        "check the path",
    ),
    _cause(
        "model-missing",
        r"failed to open GGUF file '(?P<file>.*)' \((?P<why>.*)\)",
        "the model file {file} cannot be read: {why}",
        "check the owner and permissions of the file and its folders",
    ),
    _cause(
        "model-missing",
        r"failed to load GGUF split from (?P<file>.*)",
        "a part of the model is missing or unreadable: {file}",
        _FETCH_AGAIN,
    ),
    _cause(
        "model-corrupt",
        r"tensor '(?P<what>[^']*)' data is not within the file bounds",
        "the model file is cut short or damaged (at tensor {what})",
        _FETCH_AGAIN,
    ),
    _cause(
        "model-corrupt",
        r"failed to read (?:key-value pairs|tensor info|tensor data|header)",
        "the model file is cut short or damaged (its header is incomplete)",
        _FETCH_AGAIN,
    ),
    _cause(
        "model-not-gguf",
        r"invalid magic characters: (?P<what>.*), expected 'GGUF'",
        "the model file is not a GGUF (it begins with {what})",
        "llama.cpp reads GGUF files only: choose another file",
    ),
    _cause(
        "model-not-gguf",
        r"failed to read magic",
        "the model file is empty, or a folder",
        _FETCH_AGAIN,
    ),
    _cause(
        "architecture-unknown",
        r"unknown model architecture: (?P<what>.*)",
        "this llama-server does not know the model architecture {what}",
        _NEWER_ENGINE,
    ),
    _cause(
        "architecture-unknown",
        r"unknown pre-tokenizer type: (?P<what>.*)",
        "this llama-server does not know the model's tokenizer {what}",
        _NEWER_ENGINE,
    ),
    _cause(
        "flash-attention-required",
        r"quantized V cache requires flash_attn|V cache quantization requires flash_attn",
        "a quantised KV cache needs flash attention, which is off",
        "--flash-attn on, or --kv-type f16",
    ),
    _cause(
        "flash-attention-required",
        r"SPLIT_MODE_TENSOR requires flash_attn",
        "tensor split needs flash attention, which is off",
        "--flash-attn on, or --split-mode layer",
    ),
    _cause(
        "split-unsupported",
        r"SPLIT_MODE_TENSOR not implemented for architecture (?P<what>.*)",
        "tensor split does not work with the architecture {what}",
        "--split-mode layer",
    ),
    _cause(
        "split-unsupported",
        r"device (?P<what>\S+) does not support split buffers",
        "row split does not work on {what}",
        "--split-mode layer",
    ),
    _cause(
        "model-unusable",
        r"error loading model: (?!llama_model_loader: failed to load model)(?P<why>.*)",
        "llama-server cannot use the model: {why}",
        _NEWER_ENGINE,
    ),
    _cause(
        "device-lost",
        r"Remote RPC server crashed or returned malformed response|\brecv failed \(bytes_recv=0",
        "a remote (RPC) device died or broke the connection",
        "look at ggml-rpc-server on the other machine",
        deterministic=False,
    ),
    _cause(
        "device-lost",
        r"DeviceLost|device lost|VK_ERROR_DEVICE_LOST",
        "{device} was lost while computing (Vulkan: device lost)",
        _DOCTOR,
        deterministic=False,
    ),
    _cause(
        "engine-broken",
        r"(?P<what>CUDA|ROCm|HIP|MUSA) error: "
        r"(?P<why>no kernel image is available.*|invalid device function|device kernel image is invalid)",
        "this llama-server was not built for {device} ({what}: {why})",
        "install a build for this card's generation: mgpu backends",
    ),
    _cause(
        "device-lost",
        r"(?P<what>CUDA|ROCm|HIP|MUSA) error: (?P<why>.*)",
        "{device} failed while computing ({what}: {why})",
        _DOCTOR,
        deterministic=False,
    ),
    _cause(
        "crashed",
        r"GGML_ASSERT\((?P<what>.*)\) failed",
        "llama-server met an internal error: {what}",
        "another version of llama.cpp, or --split-mode layer, may help",
        deterministic=False,
    ),
    _cause(
        "crashed",
        r"^ *what\(\): *(?P<why>.*)",
        "llama-server gave up: {why}",
        "read the end of the log",
        deterministic=False,
    ),
    _cause(
        "stopped",
        r"^Received second interrupt",
        "llama-server was stopped by two signals from outside",
        "read the end of the log",
        deterministic=False,
    ),
)
