"""Who may use a server: everybody on this machine, and in the network those who have the key."""

from __future__ import annotations

import os
from pathlib import Path

from mgpu.errors import UsageError

KEY_VARIABLES = ("MGPU_API_KEY", "LLAMA_API_KEY", "VLLM_API_KEY")
_LONGEST_FILE_BYTES = 1 << 16


def api_key(file: Path | None = None) -> str | None:
    """Return the key that is in `file`, or else that of the environment. Raises UsageError for a file that cannot be
    read or holds no single line, and for an empty key, which is a slip and not the wish for an open server."""
    found = [("--api-key-file", _key_in(file))] if file else []
    found += [(name, value) for name in KEY_VARIABLES if (value := os.environ.get(name)) is not None]
    for name, value in found[:1]:
        if not value.strip():
            raise UsageError(f"{name} is empty", hint="give a key, or leave it out (unset the variable)")
        return value
    return None


def unused_key(file: Path | None, key: str | None) -> str | None:
    """Return in words that the environment has another key than the one of `file`, which counts; None where not."""
    if file is None:
        return None
    other = next((name for name in KEY_VARIABLES if os.environ.get(name, key) != key), None)
    return f"the key is that of --api-key-file; {other} has another one, which does not count" if other else None


def refuse_typed_key() -> UsageError:
    """Return the error for a key in the command line, which every user of this machine could read."""
    return UsageError(
        "--api-key would show the key to everybody on this machine who types ps",
        hint="--api-key-file FILE, or export MGPU_API_KEY=… first",
    )


def require_key(host: str, key: str | None, *, insecure: bool) -> None:
    """Raise UsageError where everybody in the network could use the server, unless that is what is wanted."""
    from mgpu.running.ports import is_loopback, is_this_machine

    if not key and not insecure and not is_loopback(host) and is_this_machine(host):
        raise UsageError(
            f"--host {host} lets everybody in the network use this server, and there is no API key",
            hint="add --api-key-file FILE, or export MGPU_API_KEY=… first; --insecure if everybody may use it",
        )


def _key_in(file: Path) -> str:
    """The one line of a file; it may be a pipe of the shell, such as <(pass show key)."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_LONGEST_FILE_BYTES + 1)
        lines = text.decode().splitlines()
    except OSError as error:
        raise UsageError(f"--api-key-file {str(file)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"--api-key-file {str(file)!r} is no text", hint="it is to hold the key alone") from None
    if len(text) > _LONGEST_FILE_BYTES or len(lines) > 1:
        raise UsageError(f"--api-key-file {str(file)!r} holds more than one line", hint="it is to hold the key alone")
    return lines[0] if lines else ""
