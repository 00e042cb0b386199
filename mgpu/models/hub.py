"""Hugging Face: what its cache on this machine holds, and files from it into that cache.

The cache is the one that every program using huggingface_hub shares (HF_HOME, HF_HUB_CACHE); its layout is documented
at https://huggingface.co/docs/huggingface_hub/guides/manage-cache. The bytes are fetched here and not by
`hf_hub_download`, which since version 2 starts anew after an interruption: too dear for files of 40 GB.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

import mgpu
from mgpu.errors import BadModel, Missing
from mgpu.models.transfer import Unavailable, client, read_range

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file in a repository at a commit. `etag` is its SHA-256 if it is a large one."""

    repository: str
    revision: str
    path: str
    url: str
    size: int
    etag: str
    commit: str

    @property
    def sha256(self) -> str | None:
        """The file's SHA-256, None if the hub does not tell it."""
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else None

    @property
    def blob(self) -> Path:
        """Where the cache keeps the file's content."""
        return _repository_folder(self.repository) / "blobs" / self.etag

    @property
    def partial(self) -> Path:
        """Where the content is while it is not complete."""
        return self.blob.with_name(f"{self.etag}.mgpu.incomplete")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """The files of one model as they are on the hub: all parts in order, with their checksums and their size."""

    repository: str
    files: tuple[str, ...]
    sha256: tuple[str | None, ...]
    bytes: int
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A repository's files with their sizes (None where the hub does not tell) at a commit.

    `etags` are those that `describe` would find, for the files of which the hub tells them here already.
    """

    commit: str
    sizes: Mapping[str, int | None]
    etags: Mapping[str, str]


def cache_folder() -> Path:
    """The folder of the cache that every program using huggingface_hub shares."""
    return Path(_constants().HF_HUB_CACHE)


def endpoint() -> str:
    """The address of the hub, which HF_ENDPOINT may change."""
    return str(_constants().ENDPOINT)


def cached_file(repository: str, revision: str, path: str) -> Path | None:
    """The file in this machine's cache, None if it is not there. Asks no network."""
    found = cached_snapshot(repository, revision) / path
    return found if found.is_file() else None


def cached_snapshot(repository: str, revision: str) -> Path:
    """The cache's folder of the commit that `revision` was when it was last fetched, or is."""
    folder = _repository_folder(repository)
    reference = folder / "refs" / revision
    return folder / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)


def cached_paths(repository: str, revision: str) -> tuple[str, ...]:
    """The paths of a repository's GGUF files that are in this machine's cache."""
    snapshot = cached_snapshot(repository, revision)
    return tuple(sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*.gguf") if path.is_file()))


def gguf_paths(listing: Listing) -> tuple[str, ...]:
    """The paths of the GGUF files in a repository."""
    return tuple(path for path in listing.sizes if path.endswith(".gguf"))


class Hub:
    """Hugging Face as far as it can be reached, to be closed with `with`; methods raise Unavailable."""

    def __init__(self) -> None:
        """Raises Unavailable if the hub cannot be reached within 3 seconds, or is not to be (HF_HUB_OFFLINE)."""
        if _constants().HF_HUB_OFFLINE:
            raise Unavailable("HF_HUB_OFFLINE is set", code="offline", hint="unset HF_HUB_OFFLINE")
        from huggingface_hub import get_token

        self.endpoint = endpoint()
        if not _is_web_address(self.endpoint):
            raise Unavailable(
                f"HF_ENDPOINT is {self.endpoint[:80]!r}, which is no web address",
                code="bad-environment",
                hint=_ENDPOINT_HINT,
            )
        self.http = client()
        token = get_token()
        self.headers = {"User-Agent": f"mgpu/{mgpu.__version__}"}
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        try:
            self._reach()
        except BaseException:
            self.http.close()
            raise

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def paths(self, repository: str, revision: str) -> tuple[str, ...]:
        """The paths of the GGUF files in a repository."""
        return gguf_paths(self.listing(repository, revision))

    def listing(self, repository: str, revision: str) -> Listing:
        """The files in a repository, by path; those whose paths would lead out of it are left out."""
        url = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        answer = self._request("GET", url)
        self._require(answer, repository, revision, "")
        try:
            data = answer.json()
            entries = {entry["rfilename"]: entry for entry in data["siblings"]}
            sizes = {path: entry.get("size") for path, entry in entries.items()}
            etags = {
                path: (entry.get("lfs") or {}).get("sha256", entry.get("blobId")) for path, entry in entries.items()
            }
            commit = data.get("sha")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Unavailable(f"{self.endpoint} does not answer as Hugging Face does", code="bad-server") from error
        paths = sorted(path for path in sizes if isinstance(path, str) and _PATH.fullmatch(path))
        return Listing(
            commit=commit if isinstance(commit, str) else "",
            sizes={path: _whole(sizes[path]) for path in paths},
            etags={path: tag for path in paths if isinstance(tag := etags[path], str) and _TAG.fullmatch(tag)},
        )

    def json(self, file: RemoteFile) -> dict[str, object]:
        """The JSON object in a file. Raises BadModel where there is none."""
        name = f"hf:{file.repository}/{file.path}"
        page = f"see {self.endpoint}/{file.repository}"
        if file.size > _MOST_JSON_BYTES:
            raise BadModel(f"{name} is not usable: it has {file.size:,} bytes", hint=page)
        try:
            data = json.loads(self.read(file, 0, file.size))
        except (ValueError, RecursionError) as error:
            raise BadModel(f"{name} is not JSON", hint=page) from error
        if not isinstance(data, dict):
            raise BadModel(f"{name} is no JSON object", hint=page)
        return data

    def read(self, remote: RemoteFile, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to before `end`."""
        return read_range(self.http, remote.url, start, end, headers=self.headers)

    def describe(self, repository: str, revision: str, path: str) -> RemoteFile:
        """What the hub says of one file."""
        url = f"{self.endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"
        answer = self._request("HEAD", url)
        self._require(answer, repository, revision, path)
        tag = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or ""
        size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length") or ""
        commit = answer.headers.get("X-Repo-Commit", "")
        etag = tag.removeprefix("W/").strip('"')
        if not (_TAG.fullmatch(etag) and _TAG.fullmatch(commit) and re.fullmatch("[0-9]{1,18}", size)):
            raise Unavailable(
                f"{self.endpoint} does not answer as Hugging Face does (is there a proxy in between?)",
                code="bad-server",
            )
        return RemoteFile(
            repository=repository, revision=revision, path=path, url=url, size=int(size), etag=etag, commit=commit
        )

    def describe_listed(
        self, repository: str, revision: str, listing: Listing, paths: Sequence[str]
    ) -> tuple[RemoteFile, ...]:
        """What the hub says of several files in `listing`, in the order of `paths`.

        It is asked for the first of them only, which tells whether they may be had, and for those of which the listing
        does not tell enough. All are read at the listing's commit, so that they belong together.
        """
        first = self.describe(repository, revision, paths[0])
        files = []
        for path in paths:
            size, etag = listing.sizes.get(path), listing.etags.get(path)
            if size is None or etag is None or first.commit != listing.commit:
                file = first if path == paths[0] else self.describe(repository, first.commit, path)
                files.append(replace(file, revision=revision))
            else:
                url = f"{self.endpoint}/{repository}/resolve/{listing.commit}/{quote(path)}"
                files.append(replace(first, path=path, url=url, size=size, etag=etag))
        return tuple(files)

    def _reach(self) -> None:
        """A connection within 3 seconds, names looked up included, which no timeout of a client covers."""
        failures = ["it does not answer"]

        def knock() -> None:
            try:
                self.http.head(self.endpoint, timeout=_REACH_SECONDS)
                failures.clear()
            except Exception as error:  # whatever it is, there is no hub
                failures[0] = str(error) or type(error).__name__

        thread = threading.Thread(target=knock, daemon=True)
        thread.start()
        thread.join(_REACH_SECONDS + 0.5)
        if failures:
            raise Unavailable(
                f"{self.endpoint} cannot be reached ({failures[0]})",
                code="hub-unreachable",
                hint="check the network, or give the path of a .gguf file",
            )

    def _request(self, method: str, url: str) -> httpx.Response:
        """The answer of the hub itself: its redirects are followed, those to its stores of files are not."""
        import httpx

        for _ in range(_MOST_REDIRECTS):
            try:
                answer = self.http.request(method, url, headers={**self.headers, "Accept-Encoding": "identity"})
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Unavailable(
                    f"{self.endpoint} broke off ({error or type(error).__name__})", code="hub-unreachable"
                ) from error
            target = urljoin(url, answer.headers.get("Location", ""))
            if not answer.is_redirect or urlsplit(target).netloc != urlsplit(url).netloc:
                return answer
            url = target
        raise Unavailable(f"{self.endpoint} redirects without end", code="bad-server")

    def _require(self, answer: httpx.Response, repository: str, revision: str, path: str) -> None:
        status, word = answer.status_code, answer.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{repository}"
        if status < 400:
            return
        if word == "GatedRepo":
            raise Unavailable(
                f"{repository} is gated: its licence must be accepted first",
                code="gated",
                hint=f"accept the licence at {page}, then set HF_TOKEN to a token of yours (or run `hf auth login`)",
            )
        if word == "RevisionNotFound":
            raise Unavailable(f"{repository} has no revision {revision!r}", code="not-found", hint=f"see {page}")
        if word == "EntryNotFound" or (status == 404 and path and word != "RepoNotFound"):
            raise Unavailable(
                f"{repository} has no file {path!r}", code="not-found", hint=f"see {page}/tree/{revision}"
            )
        if status == 401 and "Authorization" in self.headers and not word:
            raise Unavailable(
                f"{self.endpoint} does not accept the access token",
                code="token-rejected",
                hint="set HF_TOKEN to a valid token, or unset it (or run `hf auth login`)",
            )
        if word == "RepoNotFound" or status in (401, 404):
            raise Unavailable(
                f"there is no repository {repository}, or it is private and HF_TOKEN does not open it",
                code="not-found",
                hint=f"see {page}",
            )
        if status == 429:
            raise Unavailable(
                f"{self.endpoint} takes no more requests for now",
                code="rate-limited",
                hint="wait some minutes, or set HF_TOKEN",
            )
        raise Unavailable(f"{self.endpoint} answered {status}", code="bad-server", hint="try again later")


def link(remote: RemoteFile) -> Path:
    """Enter a file whose blob is complete into the cache, as every user of the cache expects it, and return it."""
    folder = _repository_folder(remote.repository)
    pointer = folder / "snapshots" / remote.commit / remote.path
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if not pointer.exists():
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(remote.blob, pointer.parent))
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # a file system without symbolic links
            remote.blob.replace(pointer)
    if remote.revision != remote.commit:
        reference = folder / "refs" / remote.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(remote.commit)
    return pointer


_REACH_SECONDS = 3.0
_MOST_REDIRECTS = 5
_MOST_JSON_BYTES = 32 << 20
_TAG = re.compile("[A-Za-z0-9_-]{1,128}")
_PATH = re.compile(r"(?:[\w+ -][\w.+ -]*/)*[\w+ -][\w.+ -]*")


_ENDPOINT_HINT = "unset HF_ENDPOINT, or set it to an address such as https://huggingface.co"


def _constants() -> ModuleType:
    """The settings that all programs using huggingface_hub share, read from the environment when first asked for."""
    try:
        from huggingface_hub import constants
    except ValueError as error:  # it takes HF_ENDPOINT apart, whatever that is
        raise Missing(
            f"the environment's settings of Hugging Face cannot be used: {error}",
            code="bad-environment",
            hint=_ENDPOINT_HINT,
        ) from error
    return constants


def _whole(size: object) -> int | None:
    return size if type(size) is int and size >= 0 else None


def _is_web_address(text: str) -> bool:
    try:
        address = urlsplit(text)
        return address.scheme in ("http", "https") and bool(address.hostname)
    except ValueError:
        return False


def _repository_folder(repository: str) -> Path:
    return cache_folder() / ("models--" + repository.replace("/", "--"))
