"""The command line of `vllm serve`: the flags that mgpu uses and some more, read and refused as argparse does it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

VERSION = "FAKE_VLLM_VERSION"
MISSING_FLAGS = "FAKE_MISSING_FLAGS"
_FIRST_WITH_ALL = (0, 12)
_KV_TYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
_COMMANDS = "{chat,complete,serve,launch,bench,collect-env,download-kernels,preload,run-batch,snapshot}"
_TOP_USAGE = f"vllm [-h] [-v]\n            {_COMMANDS}\n            ..."
_DESCRIPTION = """Launch a local OpenAI-compatible API server to serve LLM
completions via HTTP. Defaults to Qwen/Qwen3-0.6B if no model is specified.

Search by using: `--help=<ConfigGroup>` to explore options by section (e.g.,
--help=ModelConfig, --help=Frontend)
  Use `--help=all` to show all available flags at once."""
_SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}
# Group, names, how it is read, help; in the order of the real one's --help=all.
_FLAGS: tuple[tuple[str, tuple[str, ...], dict[str, Any], str], ...] = (
    ("options", ("--headless",), {"action": "store_true"}, "Run in headless mode."),
    (
        "options",
        ("--shutdown-timeout",),
        {"type": int, "default": 0},
        "Shutdown timeout in seconds. 0 = abort, >0 = wait.",
    ),
    ("Frontend", ("--api-key",), {"nargs": "+"}, "If provided, the server will require one of these keys."),
    ("Frontend", ("--chat-template",), {}, "The file path to the chat template."),
    ("Frontend", ("--host",), {}, "Host name."),
    ("Frontend", ("--port",), {"type": int, "default": 8000}, "Port number."),
    ("Frontend", ("--ssl-certfile",), {}, "The file path to the SSL cert file."),
    ("Frontend", ("--ssl-keyfile",), {}, "The file path to the SSL key file."),
    ("Frontend", ("--uds",), {}, "Unix domain socket path."),
    ("ModelConfig", ("--dtype",), {"default": "auto"}, "Data type for model weights and activations."),
    ("ModelConfig", ("--enforce-eager",), _SWITCH, "Whether to always use eager-mode PyTorch."),
    ("ModelConfig", ("--max-model-len",), {"type": int}, "Model context length (prompt and output)."),
    ("ModelConfig", ("--quantization", "-q"), {}, "Method used to quantize the weights."),
    ("ModelConfig", ("--seed",), {"type": int, "default": 0}, "Random seed for reproducibility."),
    ("ModelConfig", ("--served-model-name",), {"nargs": "+"}, "The model name(s) used in the API."),
    ("ModelConfig", ("--trust-remote-code",), _SWITCH, "Trust remote code when downloading the model."),
    ("LoadConfig", ("--load-format",), {"default": "auto"}, "The format of the model weights to load."),
    ("ParallelConfig", ("--data-parallel-size", "-dp"), {"type": int, "default": 1}, "Number of data parallel groups."),
    ("ParallelConfig", ("--distributed-executor-backend",), {}, "Backend to use for distributed model workers."),
    ("ParallelConfig", ("--enable-expert-parallel", "-ep"), _SWITCH, "Use expert parallelism for MoE layers."),
    (
        "ParallelConfig",
        ("--pipeline-parallel-size", "-pp"),
        {"type": int, "default": 1},
        "Number of pipeline parallel groups.",
    ),
    (
        "ParallelConfig",
        ("--tensor-parallel-size", "-tp"),
        {"type": int, "default": 1},
        "Number of tensor parallel groups.",
    ),
    ("CacheConfig", ("--enable-prefix-caching",), _SWITCH, "Whether to enable prefix caching."),
    (
        "CacheConfig",
        ("--gpu-memory-utilization", "--device-memory-utilization"),
        {"type": float, "default": 0.92, "metavar": "GPU_MEMORY_UTILIZATION"},
        "The fraction of device memory to be used for the model executor.",
    ),
    (
        "CacheConfig",
        ("--kv-cache-dtype",),
        {"choices": _KV_TYPES, "default": "auto"},
        "Data type for kv cache.",
    ),
    ("CacheConfig", ("--kv-cache-memory-bytes",), {"type": int}, "Size of KV Cache per GPU in bytes."),
    ("SchedulerConfig", ("--max-num-batched-tokens",), {"type": int}, "Maximum number of tokens of an iteration."),
    ("SchedulerConfig", ("--max-num-seqs",), {"type": int}, "Maximum number of sequences of an iteration."),
    ("VllmConfig", ("--compilation-config", "-cc"), {}, "`torch.compile` and cudagraph capture configuration."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A command line that was read."""

    model: str
    names: tuple[str, ...]
    host: str | None
    port: int
    tensor: int
    pipeline: int
    replicas: int
    max_model_len: int | None
    max_num_seqs: int
    utilization: float
    kv_cache_dtype: str
    eager: bool
    shutdown_timeout_s: int
    api_keys: tuple[str, ...]
    changed: dict[str, Any]
    """What is not as by default, as vLLM logs it."""

    @property
    def workers(self) -> int:
        """Those of one replica."""
        return self.tensor * self.pipeline


def version() -> str:
    return os.environ.get(VERSION, "0.32.0")


def on_cpu() -> bool:
    return "cpu" in version()


def parse(arguments: Sequence[str], *, old: bool) -> Settings:
    """Read what follows `vllm`. An `old` one has help in one piece and no --shutdown-timeout, as have all before 0.12.

    Ends the process for --help, --version, and with status 2 and argparse's words for what it refuses.
    """
    old = old or tuple(int(part) for part in version().split("+")[0].split(".")[:2]) < _FIRST_WITH_ALL
    top = argparse.ArgumentParser(prog="vllm", usage=_TOP_USAGE, description="vLLM CLI", add_help=False)
    top.add_argument("-h", "--help", action="help")
    top.add_argument("-v", "--version", action="version", version=version())
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        prog="vllm serve",
        usage="vllm serve [model_tag] [options]",
        description=_DESCRIPTION,
        formatter_class=_Format,
        add_help=False,
    )
    flags = [flag for flag in _FLAGS if not set(flag[1]) & _missing(old)]
    _add(serve, flags)
    words = [_dashed(word) for word in arguments]
    if words[:1] == ["serve"]:
        _help(serve, words, old)
    found = vars(top.parse_args(words))
    changed = {"model_tag": found["model_tag"]}
    defaults = {name: value for name, value in vars(serve.parse_args([])).items() if name != "model_tag"}
    for name, value in defaults.items():
        if found[name] != value:
            changed[name] = found[name]
    changed["model"] = found["model_tag"]
    key = os.environ.get("VLLM_API_KEY")
    return Settings(
        model=found["model_tag"],
        names=tuple(found["served_model_name"] or [found["model_tag"]]),
        host=found["host"],
        port=found["port"],
        tensor=found["tensor_parallel_size"],
        pipeline=found["pipeline_parallel_size"],
        replicas=found["data_parallel_size"],
        max_model_len=found["max_model_len"],
        max_num_seqs=found.get("max_num_seqs") or 256,
        utilization=found["gpu_memory_utilization"],
        kv_cache_dtype=found["kv_cache_dtype"],
        eager=found["enforce_eager"],
        shutdown_timeout_s=found.get("shutdown_timeout", 0),
        api_keys=tuple(found["api_key"] or ([key] if key else [])),
        changed=changed,
    )


class _Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _add(parser: argparse.ArgumentParser, flags: Sequence[tuple[str, tuple[str, ...], dict[str, Any], str]]) -> None:
    parser.add_argument("model_tag", nargs="?", help="The model tag to serve (optional if specified in config)")
    groups: dict[str, argparse._ArgumentGroup | argparse.ArgumentParser] = {"options": parser}
    for group, names, how, text in flags:
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(*names, help=text, **how)
    parser.add_argument(
        "-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this help message and exit"
    )


def _help(parser: argparse.ArgumentParser, words: Sequence[str], old: bool) -> None:
    asked = next((word for word in words if word in ("-h", "--help") or word.startswith("--help=")), None)
    if asked is None:
        return
    if old and "=" in asked:
        parser.error(f"argument -h/--help: ignored explicit argument {asked.partition('=')[2]!r}")
    text = parser.format_help()
    if not old and "=" not in asked:  # only what comes before the first group
        text = text.partition("\nFrontend:")[0] + "\nFor full list:            vllm serve --help=all\n"
    sys.stdout.write(text)
    _exit(0)


def _missing(old: bool) -> set[str]:
    missing = {word for word in os.environ.get(MISSING_FLAGS, "").split(",") if word}
    return missing | ({"--shutdown-timeout"} if old else set())


def _dashed(word: str) -> str:
    """A flag with the dashes for which vLLM takes underscores."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(status)
