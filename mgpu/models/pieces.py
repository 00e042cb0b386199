"""The files of one model on their way from the hub to this machine: several at once, with one progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from mgpu.errors import Missing
from mgpu.models.hub import Hub, RemoteFile
from mgpu.models.transfer import OnProgress, Progress, Unavailable, download, only_one


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a model: where it comes from, where it goes, and where it is while it is not complete."""

    remote: RemoteFile
    sha256: str | None
    target: Path
    partial: Path


def cached_piece(remote: RemoteFile, sha256: str | None = None) -> Piece:
    """A file on its way into the cache that all share; its checksum is the hub's where `sha256` is None."""
    return Piece(remote, sha256 or remote.sha256, remote.blob, remote.partial)


def piece_in(folder: Path, remote: RemoteFile, sha256: str | None = None) -> Piece:
    """A file on its way into a folder of the user's."""
    name = Path(remote.path).name
    return Piece(remote, sha256 or remote.sha256, folder / name, folder / f".{name}.{remote.etag[:12]}.partial")


def missing_bytes(pieces: Iterable[Piece]) -> int:
    """What is still to be written to the disk."""
    return sum(max(0, each.remote.size - (_length(each.target) or _length(each.partial))) for each in pieces)


def refuse_others(pieces: Iterable[Piece]) -> None:
    """Refuse files that are not those that are meant, before anything is downloaded or overwritten."""
    for piece in pieces:
        remote, target = piece.remote, piece.target
        if piece.sha256 and remote.sha256 and piece.sha256 != remote.sha256:
            reason = f"{remote.path} there is now another file (its checksum differs)"
            raise Unavailable(reason, code="checksum-mismatch")
        if target.is_file() and _length(target) != remote.size:
            raise Missing(
                f"{target} is another file or incomplete: it has {_length(target):,} bytes, not {remote.size:,}",
                code="file-differs",
                hint=f"move it away: mv {target} {target}.old",
            )


def fetch_pieces(hub: Hub, pieces: Sequence[Piece], name: str, report: OnProgress) -> None:
    """Have every piece under its name, whole and checked; up to four are downloaded at once.

    `report` is called from this thread, with `name` and what is done of all together. The first failure is raised, and
    ends the others; so does whatever is raised here meanwhile, Ctrl-C above all. What they have then stays for the next
    try. Raises what `download` raises, and OSError.
    """
    missing = [piece for piece in pieces if not piece.target.is_file()]
    tally = _Tally(report, name, pieces, missing)
    if len(missing) > 1:
        _side_by_side(hub, missing, tally)
    elif missing:
        _fetch(hub, missing[0], lambda stage, done: tally.count(missing[0], stage, done, tell=True))
    tally.tell()


_CONNECTIONS = 4
_TELL_SECONDS = 0.1
# A thread that waits for the network cannot be woken. It is left behind, and can do no harm: it writes nothing more.
_GRACE_SECONDS = 1.0
# The stage of all is that of the busiest.
_STAGES = ("downloading", "checking", "waiting")

_OnStage = Callable[[str, int], None]


class _Stopped(Exception):
    """Another file's failure, or Ctrl-C, ended this file's download."""


class _Tally:
    """How far each file is, and what that makes of all together."""

    def __init__(self, report: OnProgress, name: str, pieces: Iterable[Piece], missing: Iterable[Piece]) -> None:
        self._report, self._name = report, name
        self._total = sum(piece.remote.size for piece in pieces)
        self._here = self._total - sum(piece.remote.size for piece in missing)
        self._done: dict[Path, int] = {}
        self._stages: dict[Path, str] = {}

    def count(self, piece: Piece, stage: str, done_bytes: int, *, tell: bool = False) -> None:
        """Note how far a file is; any thread may do so."""
        self._done[piece.target] = done_bytes
        self._stages[piece.target] = stage
        if tell:
            self.tell()

    def finished(self, piece: Piece) -> None:
        """Note that a file is there."""
        self._done[piece.target] = piece.remote.size
        self._stages.pop(piece.target, None)

    def tell(self) -> None:
        """Report how far all are."""
        done = self._here + sum(list(self._done.values()))
        stages = list(self._stages.values())
        stage = next((each for each in _STAGES if each in stages), _STAGES[0])
        self._report(Progress(stage=stage, name=self._name, done_bytes=done, total_bytes=self._total))


def _side_by_side(hub: Hub, pieces: Sequence[Piece], tally: _Tally) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    queue: SimpleQueue[Piece] = SimpleQueue()
    for piece in pieces:
        queue.put(piece)

    def work() -> None:
        try:
            while not stop.is_set():
                piece = queue.get_nowait()

                def on_stage(stage: str, done_bytes: int, piece: Piece = piece) -> None:
                    if stop.is_set():
                        raise _Stopped
                    tally.count(piece, stage, done_bytes)

                _fetch(hub, piece, on_stage)
                tally.finished(piece)
        except (Empty, _Stopped):
            pass
        except BaseException as error:
            if not stop.is_set():  # what breaks when all is given up is no cause
                failures.append(error)
            stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_CONNECTIONS, len(pieces)))]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not stop.is_set():
            stop.wait(_TELL_SECONDS)
            tally.tell()
    finally:
        stop.set()
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]


def _fetch(hub: Hub, piece: Piece, on_stage: _OnStage) -> None:
    """Complete one file, unless another mgpu does so meanwhile."""

    def waiting(progress: Progress) -> None:
        on_stage(progress.stage, progress.done_bytes)

    with only_one(piece.target, waiting):
        if not piece.target.is_file():
            download(
                hub.http,
                piece.remote.url,
                piece.partial,
                headers=hub.headers,
                size=piece.remote.size,
                sha256=piece.sha256,
                on_bytes=lambda done: on_stage("downloading", done),
                on_checked=lambda done: on_stage("checking", done),
            )
            piece.partial.replace(piece.target)


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
