"""What every engine offers mgpu: one value of functions for each (`mgpu.backends.load_backend`).

Nothing here starts a process or opens a connection: programs are found and asked in `engine.py`, processes live in
`mgpu.running`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgpu.backends.engine import Engine, engine_environment, stray_variables
from mgpu.backends.failure import Failure
from mgpu.backends.samples import Sample
from mgpu.planning.candidates import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command to start: `argv`, what `env` adds to the engine's environment, and the names in it that are secret."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    secrets: frozenset[str] = frozenset()

    def shell_command(self) -> str:
        """Return the command quoted for a POSIX shell; secret values are taken from variables of the same name."""
        settings = [
            # `:?` makes the shell refuse an empty one: a server without a key is not what was asked for.
            f'{name}="${{{name}:?}}"' if name in self.secrets else f"{name}={shlex.quote(value)}"
            for name, value in self.env.items()
        ]
        return " ".join([*settings, shlex.join(self.argv)])

    def public_env(self) -> dict[str, str]:
        """Return `env` with secret values hidden, for reports."""
        return {name: "***" if name in self.secrets else value for name, value in self.env.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where and under what name an engine serves what: `model` is a file, a folder or a hub's name for it; `folder` is
    the instance's own, for what the engine wants to write."""

    program: Path
    model: str
    name: str
    host: str
    port: int
    folder: Path
    arguments: tuple[str, ...] = ()
    api_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What an engine says it holds of one card, in bytes; None where its log does not tell."""

    weights_bytes: int | None = None
    kv_bytes: int | None = None
    compute_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """All that the log tells of."""
        return (self.weights_bytes or 0) + (self.kv_bytes or 0) + (self.compute_bytes or 0)


# Asks the running engine for a path and returns the body of a 200 answer, None for anything else.
Get = Callable[[str], "str | None"]


def unchanged(launch: Launch, _: Engine) -> Launch:
    """Return `launch` as it is: most programs know all that mgpu tells them."""
    return launch


def nothing(_: str) -> bool:
    """Return that a line of the log is worth keeping."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One engine.

    `launch(candidate, serving)` is the exact command, and `fitted(launch, engine)` what of it the installed program
    can take; it may ask the program. `own_environment()` is `environment()` where that is more than leaving out what
    contradicts a plan. `temporary_folder(folder)` is its TMPDIR, which mgpu empties.
    `ready_path` answers 200 once the engine can take requests. `phase(line)` is what a log line says of loading, in a
    few words, or None. `diagnose(lines, exit_status)` says why it ended. `memory(lines, candidate)` maps the planned
    devices' indices in `candidate.devices` to what the log says was allocated there; of a card that is not in it
    nothing is known, unless `tells_every_card`. With `maps_weights` the memory its processes hold tells how much of the
    model is loaded. `sample(at, get)` reads its counters. `stop_grace_s` is how long it
    may take to end politely; one that `stops_its_own` processes wants its first process alone to be told.
    `is_chatter(line)` is true of what it logs each time that its counters are read, which tells nothing of its end.
    """

    name: str
    launch: Callable[[Candidate, Serving], Launch]
    ready_path: str
    phase: Callable[[str], str | None]
    diagnose: Callable[[Sequence[str], int | None], Failure]
    memory: Callable[[Sequence[str], Candidate], Mapping[int, DeviceMemory]]
    sample: Callable[[float, Get], Sample | None]
    fitted: Callable[[Launch, Engine], Launch] = unchanged
    own_environment: Callable[[], tuple[dict[str, str], tuple[str, ...]]] | None = None
    temporary_folder: Callable[[Path], Path] | None = None
    tells_every_card: bool = True
    maps_weights: bool = True
    stop_grace_s: float = 3.0
    stops_its_own: bool = False
    is_chatter: Callable[[str], bool] = nothing

    def environment(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return what the engine is started in besides its launch, and the names of those of the user's variables for
        it that were left out and are to be told."""
        if self.own_environment:
            return self.own_environment()
        stray = (name for name in stray_variables(self.name) if name != "LLAMA_ARG_RPC")  # that one is read
        return engine_environment(), tuple(stray)
