"""The models folder of a fake Ollama: manifests, blobs by digest, and a library to pull from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
MODEL_LAYER = "application/vnd.ollama.image.model"
_LIBRARY = "smollm2:135m=98362432"
_STEPS = 4


class NotFound(Exception):
    """No such model."""


def full_name(name: str) -> str:
    """`name` with its tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class Store:
    """`$OLLAMA_MODELS`, or `$HOME/.ollama/models`."""

    def __init__(self) -> None:
        self.folder = Path(os.environ.get("OLLAMA_MODELS") or Path(os.environ["HOME"], ".ollama", "models"))
        self.blobs = self.folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def manifest(self, name: str) -> Json:
        """Raises NotFound."""
        try:
            manifest: Json = json.loads(self._manifest_path(name).read_text(encoding="utf-8"))
        except OSError:
            raise NotFound(name) from None
        return manifest

    def model_file(self, name: str) -> Path:
        """The GGUF of a model. Raises NotFound."""
        return self.blob(self.manifest(name)["layers"][0]["digest"])

    def names(self) -> list[str]:
        root = self.folder / "manifests"
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [":".join(str(path.relative_to(root / "registry.ollama.ai/library")).rsplit("/", 1)) for path in files]

    def described(self, name: str) -> Json:
        """An entry of /api/tags."""
        manifest = self.manifest(name)
        return {
            "name": full_name(name),
            "model": full_name(name),
            "modified_at": "2026-11-23T04:12:37.345293519Z",
            "size": sum(layer["size"] for layer in manifest["layers"]),
            "digest": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
            "details": {**DETAILS, "context_length": 8192, "embedding_length": 576},
            "capabilities": ["completion"],
        }

    def write(self, name: str, digest: str, parameters: Json) -> None:
        """Write the manifest of a model made of one blob."""
        layers = [{"mediaType": MODEL_LAYER, "digest": digest, "size": self.blob(digest).stat().st_size}]
        path = self._manifest_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"layers": layers, "parameters": parameters}), encoding="utf-8")

    def receive(self, digest: str, content: bytes) -> bool:
        """Keep an uploaded blob; False when it is not what its digest says."""
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
            return False
        self.blob(digest).write_bytes(content)
        return True

    def pull(self, name: str, faults: dict[str, float]) -> Iterator[Json]:
        """The records of a pull from FAKE_LIBRARY ("name:tag=bytes name:tag=bytes")."""
        yield {"status": "pulling manifest"}
        library = dict(entry.split("=") for entry in os.environ.get("FAKE_LIBRARY", _LIBRARY).split())
        size = int(library.get(full_name(name), "0"))
        if not size:
            yield {"error": "pull model manifest: file does not exist"}
            return
        digest = f"sha256:{hashlib.sha256(full_name(name).encode()).hexdigest()}"
        template = f"sha256:{hashlib.sha256(b'template').hexdigest()}"
        for layer, bytes_ in ((digest, size), (template, 358)):
            for step in range(1, _STEPS + 1) if layer == digest else (_STEPS,):
                time.sleep(faults.get("pull-slow", 0.0))
                record = {"status": f"pulling {layer[7:19]}", "digest": layer, "total": bytes_}
                yield record if step == 1 else {**record, "completed": bytes_ * step // _STEPS}
                if step == 2 and "pull-fails" in faults:
                    yield {"error": "max retries exceeded: write |1: no space left on device"}
                    return
                if step == 2 and "pull-breaks" in faults:
                    raise ConnectionAbortedError
        yield {"status": "verifying sha256 digest"}
        with self.blob(digest).open("wb") as file:
            file.write(b"GGUF")
            file.truncate(size)
        yield {"status": "writing manifest"}
        self.write(name, digest, {})
        yield {"status": "success"}

    def _manifest_path(self, name: str) -> Path:
        model, _, tag = full_name(name).rpartition(":")
        if not re.fullmatch(r"[\w./-]+", model) or ".." in model:
            raise NotFound(name)
        return self.folder / "manifests" / "registry.ollama.ai" / "library" / model / tag


DETAILS: Json = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "134.52M",
    "quantization_level": "Q4_1",
}
