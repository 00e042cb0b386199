"""Getting large files over a network: one at a time, with progress, resumed where they broke off, and checked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mgpu.errors import Missing

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is. `stage` is "waiting" (for another mgpu that fetches the same), "checking" (what an earlier
    one left), "downloading" or "unpacking"; `total_bytes` is None while it is not known."""

    stage: str
    name: str
    done_bytes: int
    total_bytes: int | None


OnProgress = Callable[[Progress], None]


class Unavailable(Exception):
    """One way of getting a file failed, another may work: `reason` is a clause that says why."""

    def __init__(self, reason: str, *, code: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = without_secrets(reason)
        self.code = code
        self.hint = hint


def without_secrets(text: str) -> str:
    """`text` without the access tokens and passwords that addresses and messages may carry, on one line."""
    text = re.sub(r"\bhf_\w{6,}", "hf_***", text)
    text = re.sub(r"://[^/\s@]+@", "://***@", text)
    text = re.sub(r"(?i)(bearer|token[=:]?)\s+[\w.-]{8,}", r"\1 ***", text)
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise Missing (`disk-full`) unless `needed_bytes` fit on the disk that `folder` is or will be on."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if needed_bytes + _SPARE_BYTES > free:
        raise Missing(
            f"the disk of {folder} is too full: {needed_bytes:,} bytes are needed, {free:,} are free",
            code="disk-full",
            hint="free some space, or move the caches to another disk: HF_HOME, XDG_CACHE_HOME",
        )


def existing_folder(folder: Path) -> Path:
    """Return `folder`, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def client() -> httpx.Client:
    """An HTTP client that trusts the system's certificates and uses the proxies of the environment.

    This machine's own addresses are never asked through a proxy, whatever the environment says. Raises Unavailable
    if it names certificates or proxies that cannot be used.
    """
    import httpx

    timeout = httpx.Timeout(_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS)
    try:
        mounts = dict.fromkeys(_THIS_MACHINE)
        return httpx.Client(verify=ssl.create_default_context(), timeout=timeout, mounts=mounts)
    except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
        raise Unavailable(
            f"the environment's settings of proxies or certificates cannot be used ({error})",
            code="bad-environment",
            hint="env | grep -i -e proxy -e ssl_cert",
        ) from error


@contextmanager
def only_one(target: Path, on_progress: OnProgress) -> Iterator[None]:
    """Let no other mgpu of this user produce `target` meanwhile; blocks while one does."""
    import platformdirs

    folder = platformdirs.user_cache_path("mgpu") / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:32]
    with (folder / name).open("wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_progress(Progress(stage="waiting", name=target.name, done_bytes=0, total_bytes=None))
                time.sleep(_POLL_SECONDS)
        yield


def download(
    http: httpx.Client,
    url: str,
    partial: Path,
    *,
    headers: Mapping[str, str],
    size: int,
    sha256: str | None,
    on_bytes: Callable[[int], None],
    on_checked: Callable[[int], None],
) -> None:
    """Complete `partial` until it holds the `size` bytes behind `url`, and check them.

    What `partial` holds already is kept if the server can go on from there. A connection that breaks is taken up
    again as long as it makes progress. `on_checked` is told how many of the bytes that were there are read again,
    `on_bytes` how many are there. Raises Unavailable: after a broken connection `partial` stays, for the next try;
    with a wrong checksum (`checksum-mismatch`) it is deleted.
    """
    import httpx

    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        digest = hashlib.sha256()
        done = _digest_so_far(file, size, digest, on_checked)
        fruitless = 0
        while done < size:
            before = done
            try:
                for chunk, start in _stream(http, url, headers, done):
                    if start == 0 and done:  # the server began anew
                        file.truncate(0)
                        digest, done = hashlib.sha256(), 0
                    file.write(chunk)
                    file.flush()  # what is counted is in the file, whatever becomes of this process
                    digest.update(chunk)
                    done += len(chunk)
                    if done > size:
                        break
                    on_bytes(done)
            except (httpx.HTTPError, httpx.StreamError) as error:
                broken = str(error) or type(error).__name__
            else:
                broken = "the connection ended early"
            fruitless = 0 if done > before else fruitless + 1
            if done < size and fruitless >= _TRIES:
                raise Unavailable(
                    f"the download broke off at {done:,} of {size:,} bytes ({broken})",
                    code="download-interrupted",
                    hint="the same command goes on from there",
                )
            if done < size and fruitless:
                time.sleep(fruitless)
        _settle(file)
    if done != size or sha256 not in (None, digest.hexdigest()):
        partial.unlink()
        raise Unavailable(
            "what was downloaded has the wrong checksum, so it was deleted",
            code="checksum-mismatch",
            hint="try again; if it happens again, the file at its source is not the one that is meant",
        )


def read_range(http: httpx.Client, url: str, start: int, end: int, *, headers: Mapping[str, str]) -> bytes:
    """Return the bytes from `start` to before `end` of the file behind `url`, which must hold so many.

    A server that knows no ranges is read from the beginning, and left when it has sent enough. Raises Unavailable.
    """
    import httpx

    if start >= end:
        return b""
    broken = ""
    for attempt in range(_TRIES):
        time.sleep(attempt)
        data = bytearray()
        begun = start
        try:
            for chunk, answer_began in _stream(http, url, headers, start, end):
                begun = begun if data else answer_began
                data += chunk
                if len(data) >= end - begun:
                    return bytes(data[start - begun : end - begun])
            broken = "the connection ended early"
        except (httpx.HTTPError, httpx.StreamError) as error:
            broken = str(error) or type(error).__name__
    raise Unavailable(
        f"the server broke off before it had sent bytes {start:,} to {end:,} ({broken})",
        code="download-interrupted",
        hint="try again",
    )


def copy_checked(source: IO[bytes], target: Path, sha256: str, on_bytes: Callable[[int], None]) -> None:
    """Write `source` to `target`; with another checksum than `sha256`, delete it and raise Unavailable."""
    digest = hashlib.sha256()
    done = 0
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            on_bytes(done)
        _settle(file)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise Unavailable("the file in it has the wrong checksum, so it was deleted", code="checksum-mismatch")


def steadily(on_progress: OnProgress) -> OnProgress:
    """`on_progress`, but called no more often than ten times a second, apart from what ends a stage."""
    last = ("", 0.0)

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.stage != last[0] or now - last[1] > 0.1 or progress.done_bytes == progress.total_bytes:
            last = (progress.stage, now)
            on_progress(progress)

    return report


def as_missing(error: OSError, folder: Path) -> Missing:
    """What an error of the file system means to the user who fetches into `folder`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Missing(f"the disk of {folder} is full", code="disk-full", hint="free some space, then try again")
    if error.errno == errno.EFBIG:
        return Missing(
            f"the file system of {folder} (or a limit) does not allow so large a file",
            code="file-too-large",
            hint="HF_HOME moves the cache of models to another disk; FAT32 ends at 4 GiB, `ulimit -f` shows a limit",
        )
    return Missing(
        f"{error.filename or folder} cannot be written: {error.strerror or error}",
        code="folder-unwritable",
        hint="choose a folder that you may write to; HF_HOME moves the cache of models",
    )


_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20
_CONNECT_SECONDS = 3.0
_TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.2
_TRIES = 3
_THIS_MACHINE = ("all://127.0.0.1", "all://localhost", "all://[::1]")


def _digest_so_far(file: IO[bytes], size: int, digest: hashlib._Hash, on_bytes: Callable[[int], None]) -> int:
    """Feed what the file holds to `digest` and return its length; a file that holds too much is emptied."""
    if file.seek(0, os.SEEK_END) > size:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        on_bytes(file.tell())
    return file.tell()


def _settle(file: IO[bytes]) -> None:
    """Have the file on the disk before its name says that it is whole."""
    file.flush()
    os.fsync(file.fileno())


def _stream(
    http: httpx.Client, url: str, headers: Mapping[str, str], offset: int, end: int | None = None
) -> Iterator[tuple[bytes, int]]:
    """The bytes behind `url` from `offset` on; each with where the answer began: 0 if the server knows no ranges."""
    import httpx

    wanted = {**headers, "Accept-Encoding": "identity"}
    if offset or end is not None:
        wanted["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"
    with http.stream("GET", url, headers=wanted, follow_redirects=True) as response:
        start = offset if response.status_code == 206 else 0
        if response.status_code == 206 and f"bytes {offset}-" not in response.headers.get("Content-Range", ""):
            raise Unavailable("the server sent another part of the file than it was asked for", code="bad-server")
        if response.status_code == 429 or response.status_code >= 500:
            raise httpx.NetworkError(f"the server answered {response.status_code}")
        if response.status_code not in (200, 206):
            raise Unavailable(f"the server answered {response.status_code} to the download", code="bad-server")
        for chunk in response.iter_raw():  # as it comes: a slow link shows progress, and Ctrl-C loses nothing
            yield chunk, start
            start = start or -1  # only the first chunk of an answer may begin anew
