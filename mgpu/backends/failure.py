"""Why an engine is no longer there, as a value: one sentence, a stable code, and what to type next.

Codes shared by every engine:

    out-of-memory       a card could not give the memory asked for
    host-out-of-memory  the machine's RAM could not, or the kernel killed the engine for want of it
    port-in-use, bad-host
    bad-flag, bad-value, bad-device, split-unsupported, flash-attention-required
    model-missing, model-corrupt, model-not-gguf, model-unusable, architecture-unknown
    device-lost         a card (or the machine behind an RPC endpoint) died or failed while computing
    engine-broken       the program itself cannot run here: missing library, wrong CPU, no kernels for the card
    cards-unreachable   the cards of a group do not reach each other (NCCL)
    killed              SIGKILL, by whomever (mgpu.running.kernel_kills looks whether it was the kernel)
    stopped             somebody else asked the engine to end
    crashed             assertion, abort, segmentation fault
    exited              it ended by itself and nothing above explains it
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from mgpu.backends.cpu_library import INSTALL_CPU_LIBRARY

LONGEST_MESSAGE = 100
"""Characters of a message at most, so that it stays on one line of a 100-column terminal."""

LONGEST_LINE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The cause of one engine's end.

    `message` is one line of at most `LONGEST_MESSAGE` characters; `hint` is the flag or command that would
    help. `deterministic` is True when the same command line would fail again in the same way, so that
    restarting it is pointless. `line` is the decisive log line and `line_number` counts from 1. For memory
    failures `device` is the engine's own name of the device ("CUDA1", "RPC0", "host"), `part` is "weights",
    "kv" or "compute", and `wanted_bytes` the size of the one allocation that was refused; each may be
    unknown.
    """

    code: str
    message: str
    hint: str | None = None
    deterministic: bool
    line_number: int | None = None
    line: str | None = None
    device: str | None = None
    part: str | None = None
    wanted_bytes: int | None = None


def from_exit_status(
    engine: str, exit_status: int | None, *, during: str | None = None, last_words: str | None = None
) -> Failure:
    """What can be said from the exit status, when no known line explains the end.

    `exit_status` is `Popen.returncode` (negative for a signal); a shell's 128 + signal is understood too.
    `during` is what the engine was doing, such as "loading weights"; `last_words` is the last line of its
    log that may mean something.
    """
    when = f" while {during}" if during else ""
    words = f": {last_words}" if last_words else ""
    number = _signal_number(exit_status)
    if number is not None:
        return _from_signal(engine, number, when, words)
    if exit_status in (126, 127):
        message = f"{engine} could not be started (status {exit_status}){words}"
        hint = "mgpu backends shows which engine would be run"
        return Failure(code="engine-broken", message=shorten(message), hint=hint, deterministic=True)
    if exit_status is None:
        ended = "is gone, its exit status unknown"
    elif exit_status == 0:
        ended = "ended by itself with status 0"
    else:
        ended = f"ended with status {exit_status}"
    message = f"{engine} {ended}{when}{words or ' and left no message'}"
    hint = "read the end of the log"
    return Failure(code="exited", message=shorten(message), hint=hint, deterministic=False)


def shorten(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """`text` on one line, without control characters, cut with an ellipsis at `longest` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def clean(text: str) -> str:
    """`text` without terminal escape sequences and unprintable characters (white space becomes spaces)."""
    text = re.sub(r"\s", " ", _ESCAPE_SEQUENCE.sub("", text))
    return "".join(character for character in text if character.isprintable())


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` with every non-empty secret replaced by `***`, the longest first."""
    for secret in sorted({secret for secret in secrets if secret}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")

_ASKED_TO_END = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

_CRASHES: dict[int, tuple[str | None, str]] = {
    signal.SIGABRT: ("it gave up on an internal error", "read the end of the log"),
    signal.SIGSEGV: ("a bug in the engine or its driver", "another version of the engine may help"),
    signal.SIGBUS: (
        "a file or memory it had mapped went away",
        "check the disk that holds the model, and that nobody shortened the file",
    ),
    signal.SIGILL: (
        "the CPU lacks an instruction this build uses",
        f"install a build of the engine that is made for this CPU (llama-server from pip: {INSTALL_CPU_LIBRARY})",
    ),
    signal.SIGFPE: ("a bug in the engine", "another version of the engine may help"),
}


def _signal_number(exit_status: int | None) -> int | None:
    if exit_status is None:
        return None
    number = -exit_status if exit_status < 0 else exit_status - 128
    return number if 0 < number < signal.NSIG else None


def _from_signal(engine: str, number: int, when: str, words: str) -> Failure:
    known = signal.Signals(number) if number in set(signal.Signals) else None
    name = known.name if known else f"signal {number}"
    if known == signal.SIGKILL:
        message = f"{engine} was killed (SIGKILL){when}: by somebody, or by the kernel when RAM ran out"
        hint = "journalctl -k -g 'Out of memory' tells; a smaller --ctx or --quant needs less RAM"
        return Failure(code="killed", message=shorten(message), hint=hint, deterministic=False)
    if known in _ASKED_TO_END:
        message = f"{engine} was stopped by {name} from outside{when}"
        return Failure(code="stopped", message=shorten(message), deterministic=False)
    meaning, hint = _CRASHES.get(number, (None, "read the end of the log"))
    message = f"{engine} crashed ({name}){when}{words or (f': {meaning}' if meaning else '')}"
    broken = known == signal.SIGILL
    return Failure(
        code="engine-broken" if broken else "crashed",
        message=shorten(message),
        hint=hint,
        deterministic=broken,
    )
