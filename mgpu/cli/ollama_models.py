"""The models that Ollama has: of one that runs by asking it, else by what lies on the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from mgpu.errors import EngineFailed, MgpuError, Missing
from mgpu.models.local_model import LocalModel, Owners, last_used

if TYPE_CHECKING:
    from mgpu.models.ollama_store import LocalTag

_TIMEOUT_S = 5.0
_THIS_MACHINE = re.compile(r"https?://(127\.|localhost\b|\[::1\])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A model that an Ollama says it has: `name` with its tag; `modified` in seconds since 1970."""

    name: str
    size_bytes: int
    quantisation: str | None
    modified: float


def running_ollama() -> str:
    """Return the address of the Ollama that runs.

    Raises Missing where none does (code "ollama-not-running", or "engine-missing" if none is installed) or something
    else answers there ("not-ollama").
    """
    from mgpu.backends.ollama import require_ollama
    from mgpu.running.ollama_attach import HOST_VARIABLE, Attached, Foreign, attach, server_url

    found = attach()
    if isinstance(found, Attached):
        return found.url
    if isinstance(found, Foreign):
        raise Missing(
            f"there is no Ollama at {found.url}: {found.why}",
            code="not-ollama",
            hint=f"set {HOST_VARIABLE} to where Ollama runs, or stop what answers there",
        )
    url = server_url(os.environ.get(HOST_VARIABLE, ""))
    here = _THIS_MACHINE.match(url) is not None
    if here:
        require_ollama()
    raise Missing(
        f"Ollama fetches its models itself, and does not run at {url}",
        code="ollama-not-running",
        hint="start it first: ollama serve" if here else f"start it there, or unset {HOST_VARIABLE}",
    )


def tags_at(url: str) -> tuple[Tag, ...]:
    """Return the models of the Ollama at `url`. Raises EngineFailed when it does not answer as Ollama does."""
    import httpx

    try:
        reply = httpx.get(f"{url}/api/tags", timeout=_TIMEOUT_S, trust_env=False)
        return tuple(_tag(entry) for entry in reply.json()["models"])
    except (httpx.HTTPError, httpx.InvalidURL):
        raise EngineFailed(f"the Ollama at {url} does not answer any more", code="engine-died") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise EngineFailed(f"what answers at {url} does not answer as Ollama does", code="wrong-answer") from None


def models_in_ollama(owners: Owners, warnings: list[str]) -> Iterator[LocalModel]:
    """Yield every model of the Ollama that runs, or of the one whose models lie on this disk; what keeps them from
    being known is added to `warnings`."""
    from mgpu.models.ollama_store import local_tags
    from mgpu.running.ollama_attach import Attached, Foreign, attach

    on_disk = {f"{each.name}:{each.tag}": each for each in local_tags()}
    try:
        found = attach()
        if isinstance(found, Foreign):
            warnings.append(f"{found.url} is not Ollama: {found.why}")
        tags = tags_at(found.url) if isinstance(found, Attached) else tuple(map(_described, on_disk.values()))
    except MgpuError as error:
        warnings.append(error.message)
        tags = tuple(map(_described, on_disk.values()))
    for tag in tags:
        owner, stored = owners.of_tag(tag.name), on_disk.get(tag.name)
        yield LocalModel(
            format="ollama",
            path=stored.path if stored else None,
            name=tag.name,
            quantisation=tag.quantisation,
            bytes=tag.size_bytes,
            total_bytes=tag.size_bytes,
            repository=None,
            profile=owner.profile if owner else None,
            last_used=max(tag.modified, last_used(stored.path) if stored else 0.0),
            state="complete",
            problem=None,
        )


def _tag(entry: dict[str, object]) -> Tag:
    """One entry of /api/tags."""
    size, details = entry.get("size"), entry.get("details")
    level = details.get("quantization_level") if isinstance(details, dict) else None
    return Tag(
        name="".join(character for character in str(entry["name"])[:256] if character.isprintable()),
        size_bytes=size if type(size) is int and size >= 0 else 0,
        quantisation=level if isinstance(level, str) and level.isprintable() and level != "unknown" else None,
        modified=_seconds(entry.get("modified_at")),
    )


def _described(model: LocalTag) -> Tag:
    from mgpu.models.gguf import read_gguf
    from mgpu.models.gguf_facts import quantisation_of

    try:
        quantisation = quantisation_of(read_gguf(model.path))
    except MgpuError:
        quantisation = None
    return Tag(
        name=f"{model.name}:{model.tag}", size_bytes=model.bytes, quantisation=quantisation, modified=model.modified
    )


def _seconds(moment: object) -> float:
    """A time such as 2026-11-23T04:12:37.345293519Z; 0 if it is none."""
    try:
        return datetime.fromisoformat(f"{str(moment)[:19]}+00:00").timestamp()
    except ValueError:
        return 0.0
