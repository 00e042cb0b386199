"""The fake llama-server behind a bad wire: `python -P wire.py ARGUMENTS`.

What the file FAULT_WIRE holds decides on each answer: `slowly` (a byte at a time), `partly` (half of it, and the
connection ends), `garbage` (no HTTP at all), `nonsense` (HTTP, but no JSON), `never`, or as it should be.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path

from tests.cli.program import ROOT
from tests.fakes import llama_server
from tests.fakes.llama_server_http import Handler

WAYS = ("slowly", "partly", "garbage", "nonsense", "never")
_BYTE_S = 0.01
_FOREVER_S = 3600.0


def install(folder: Path, wire: Path) -> Path:
    """Write an executable llama-server into `folder` that is behind the wire `wire`, and return its path."""
    program = folder / "llama-server"
    root, python = shlex.quote(str(ROOT)), shlex.quote(sys.executable)
    program.write_text(
        f"#!/bin/sh\nFAULT_WIRE={shlex.quote(str(wire))} PYTHONPATH={root} "
        f'exec {python} -P {shlex.quote(__file__)} "$@"\n'
    )
    program.chmod(0o755)
    return program


def _send(self: Handler, status: int, body: object, content_type: str = "application/json") -> None:
    way = Path(os.environ["FAULT_WIRE"]).read_text()
    text = body if isinstance(body, str) else json.dumps(body)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(text)}\r\n\r\n"
    answer = (head + text).encode()
    self.close_connection = way in WAYS
    match way:
        case "slowly":
            for byte in answer:
                self.wfile.write(bytes([byte]))
                time.sleep(_BYTE_S)
        case "partly":
            self.wfile.write(answer[: len(head) + len(text) // 2])
        case "garbage":
            self.wfile.write(bytes(range(256)))
        case "nonsense":
            self.wfile.write((head + "{" * len(text)).encode())
        case "never":
            time.sleep(_FOREVER_S)
        case _:
            self.wfile.write(answer)


if __name__ == "__main__":
    Handler._send = _send  # type: ignore[method-assign]
    llama_server.main(sys.argv[1:])
