"""The models that Ollama has: of one that runs by asking it, else by what lies on the disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgpu.errors import MgpuError, Missing
from mgpu.models.local_model import LocalModel, Owners, last_used

if TYPE_CHECKING:
    from mgpu.models.ollama_store import LocalTag
    from mgpu.running.ollama_client import Tag

_THIS_MACHINE = re.compile(r"https?://(127\.|localhost\b|\[::1\])")


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


def models_at(url: str) -> tuple[Tag, ...]:
    """Return the models of the Ollama at `url`. Raises EngineFailed when it does not answer as Ollama does."""
    from mgpu.running.ollama_client import OllamaClient

    with OllamaClient(url, keep_alive=None) as client:
        return client.models()


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
        tags = models_at(found.url) if isinstance(found, Attached) else None
    except MgpuError as error:
        warnings.append(error.message)
        tags = None
    for tag in tuple(map(_described, on_disk.values())) if tags is None else tags:
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


def _described(model: LocalTag) -> Tag:
    from mgpu.models.gguf import read_gguf
    from mgpu.models.gguf_facts import quantisation_of
    from mgpu.running.ollama_client import Tag

    try:
        quantisation = quantisation_of(read_gguf(model.path))
    except MgpuError:
        quantisation = None
    return Tag(
        name=f"{model.name}:{model.tag}", size_bytes=model.bytes, quantisation=quantisation, modified=model.modified
    )
