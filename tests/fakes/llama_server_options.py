"""The options of llama-server, taken from its own recorded `--help`, and refused with its own words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HELP = Path(__file__).parent.parent / "data" / "logs" / "llama_cpp" / "help.txt"
_DESCRIPTION_COLUMN = 40


class Refused(Exception):
    """The text llama-server prints before it exits with status 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One entry of `--help`: `names` without values, the number of `values` it takes, its whole `usage`."""

    names: tuple[str, ...]
    values: int
    usage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asks for; values not given have llama-server's defaults."""

    model: str | None
    host: str
    port: int
    devices: tuple[str, ...] | None
    tensor_split: tuple[float, ...]
    split_mode: str
    flash_attention: str
    ctx_tokens: int
    slots: int
    ubatch: int
    kv_type: tuple[str, str]
    verbosity: int
    metrics: bool
    slots_endpoint: bool
    ping_seconds: int
    alias: str
    api_keys: tuple[str, ...]


def options() -> dict[str, Option]:
    """Every option by each of its names."""
    found: dict[str, Option] = {}
    for entry in re.findall(r"(?m)^-(?!----).*(?:\n +.*)*", HELP.read_text(encoding="utf-8")):
        first = entry.split("\n", 1)[0]
        cut = len(first) > _DESCRIPTION_COLUMN and first[_DESCRIPTION_COLUMN - 1] == " "
        words = (first[:_DESCRIPTION_COLUMN] if cut else first).split()
        names = tuple(word.rstrip(",") for word in words if word.startswith("-"))
        values = [word for word in words if not word.startswith("-")]
        count = 1 if values and values[0].startswith("<") else len(values)
        found.update(dict.fromkeys(names, Option(names=names, values=count, usage=entry)))
    return found


def parse(arguments: Sequence[str], device_ids: Callable[[str], Sequence[str]]) -> tuple[Settings, str | None]:
    """Settings from the command line, and "version", "help" or "list-devices" when only that was asked for.

    `device_ids(servers)` gives the devices known once `--rpc servers` was read; as in the real program,
    `-dev` knows only the RPC devices of an earlier `--rpc`. Raises `Refused`.
    """
    known = options()
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        written = rest.pop(0)
        option = known.get(written)
        if option is None:
            raise Refused(f"error: invalid argument: {written}\n")
        name = option.names[0]
        if name in ("-h", "--version", "--list-devices"):
            asked = {"-h": "help", "--version": "version", "--list-devices": "list-devices"}[name]
            if asked == "list-devices":
                device_ids(values.get("--rpc", ""))
            return _settings(values), asked
        if len(rest) < option.values:
            _refuse(option, written, "expected value for argument")
        given = [rest.pop(0) for _ in range(option.values)]
        values[name] = given[0] if given else ("off" if written.startswith(("--no-", "-no")) else "on")
        check = _CHECKS.get(name)
        problem = check(values[name]) if check else None
        if problem:
            _refuse(option, written, problem)
        if name == "-dev" and values[name] != "none":
            ids = device_ids(values.get("--rpc", ""))
            for device in values[name].split(","):
                if device not in ids:
                    _refuse(option, written, f"invalid device: {device}")
    return _settings(values), None


def _settings(values: Mapping[str, str]) -> Settings:
    model = values.get("-m")
    slots = int(values.get("-np", "-1"))
    keys = values.get("--api-key", os.environ.get("LLAMA_API_KEY", ""))
    devices = values.get("-dev")
    return Settings(
        model=model,
        host=values.get("--host", "127.0.0.1"),
        port=int(values.get("--port", "8080")),
        devices=None if devices is None else () if devices == "none" else tuple(devices.split(",")),
        tensor_split=tuple(float(part) for part in re.split(r"[,/]", values.get("-ts", "")) if part),
        split_mode=values.get("-sm", "layer"),
        flash_attention=values.get("-fa", "auto"),
        ctx_tokens=int(values.get("-c", "0")) or 8192,
        slots=slots if slots > 0 else 4,
        ubatch=int(values.get("-ub", "512")),
        kv_type=(values.get("-ctk", "f16"), values.get("-ctv", "f16")),
        verbosity=int(values.get("-lv", "3")),
        metrics=values.get("--metrics") == "on",
        slots_endpoint=values.get("--slots", "on") == "on",
        ping_seconds=int(values.get("--sse-ping-interval", "30")),
        alias=values.get("-a") or model or "",
        api_keys=tuple(key for key in keys.split(",") if key),
    )


def _refuse(option: Option, written: str, problem: str) -> None:
    raise Refused(
        f'error while handling argument "{written}": {problem}\n\n'
        f"usage:\n{option.usage}\n\n\nto show complete usage, run with -h\n"
    )


def _whole_number(value: str) -> str | None:
    return None if re.match(r"\s*[+-]?\d", value) else "stoi"


def _layers(value: str) -> str | None:
    return None if value in ("auto", "all") else _whole_number(value)


def _fractions(value: str) -> str | None:
    parts = re.split(r"[,/]", value)
    if len(parts) > 16:
        return f"got {len(parts)} input configs, but system only has 16 devices"
    return None if all(re.match(r"\s*[+-]?\.?\d", part) for part in parts) else "stof"


def _one_of(words: str, otherwise: str) -> Callable[[str], str | None]:
    return lambda value: None if value in words.split() else otherwise.format(value)


_KV_TYPES = "f32 f16 bf16 q8_0 q4_0 q4_1 iq4_nl q5_0 q5_1"
_CHECKS: dict[str, Callable[[str], str | None]] = {
    **dict.fromkeys(
        ("-c", "-t", "-tb", "-b", "-ub", "-np", "-lv", "-mg", "-n", "-s", "-to", "--port", "--threads-http"),
        _whole_number,
    ),
    "--sse-ping-interval": _whole_number,
    "-ngl": _layers,
    "-ts": _fractions,
    "-ctk": _one_of(_KV_TYPES, "Unsupported cache type: {}"),
    "-ctv": _one_of(_KV_TYPES, "Unsupported cache type: {}"),
    "-sm": _one_of("none layer row tensor", "invalid value"),
    "-fa": _one_of("on off auto enabled disabled true false 1 0 -1", "error: unknown value for --flash-attn: '{}'\n"),
    "-fit": _one_of("on off true false 1 0", "error: unknown value for --fit: '{}'\n"),
}
