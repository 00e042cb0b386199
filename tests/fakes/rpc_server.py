"""A program that poses as ggml-rpc-server (protocol 5.0) with devices of any size.

    python -m tests.fakes.rpc_server --port 0 --mem-gib 24 [--free-gib 23] [--devices 2]
        [--fail-alloc-over-gib G] [--die-after-computes N] [--hang-after-computes N] [--log FILE]

It allocates nothing, throws weights away and answers zeros, so that a real llama-server loads and "serves" a
sparse 70B model over two of these on a machine without a GPU. It prints `listening on 127.0.0.1:PORT` when
ready, and logs each allocation: the exact bytes the engine put into each device.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from mgpu.models.tensors import GGML_TYPES_BY_ID

PROTOCOL = bytes((5, 0, 0))
GIB = 1 << 30
_HELLO_BYTES = 28
_TENSOR_BYTES = 300
_ALIGNMENT = 128  # as on CUDA
_ADDRESS_STEP = 1 << 20
_FORGOTTEN_AT_ONCE = 1 << 20


class Command(IntEnum):
    """What a client asks, in the protocol's order (`enum rpc_cmd` of ggml-rpc.cpp)."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What the devices are like and when they fail; counts of computes are over all connections."""

    devices: int = 1
    total_bytes: int = 24 * GIB
    free_bytes: int = 24 * GIB
    largest_allocation_bytes: int | None = None
    die_after_computes: int | None = None
    hang_after_computes: int | None = None


@dataclass(slots=True)
class Device:
    """The buffers of one device, by their made-up addresses."""

    buffers: dict[int, int] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return sum(self.buffers.values())


class RpcServer:
    """Listens when made (port 0 takes a free one); `serve_forever` answers each client in a thread."""

    def __init__(self, behaviour: Behaviour, port: int = 0, log: TextIO = sys.stderr) -> None:
        self.behaviour = behaviour
        self.devices = [Device() for _ in range(behaviour.devices)]
        self.computes = 0
        self._log = log
        self._lock = threading.Lock()
        self._next_address = 1 << 32
        self._socket = socket.create_server(("127.0.0.1", port), backlog=16)
        self.port: int = self._socket.getsockname()[1]

    def serve_forever(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_Client(self, connection).serve, daemon=True).start()

    def allocate(self, index: int, size: int) -> tuple[int, int]:
        """The address and size of a new buffer in device `index`; zeros when it does not fit."""
        behaviour = self.behaviour
        with self._lock:
            device = self.devices[index] if index < len(self.devices) else None
            limit = behaviour.largest_allocation_bytes
            too_large = limit is not None and size > limit
            if device is None or too_large or device.used_bytes + size > behaviour.free_bytes:
                self._note(f"refused {size} bytes in device {index}")
                return 0, 0
            address = self._next_address
            self._next_address += -(-size // _ADDRESS_STEP) * _ADDRESS_STEP + _ADDRESS_STEP
            device.buffers[address] = size
            self._note(f"allocated {size} bytes in device {index}, {device.used_bytes} in all")
            return address, size

    def free(self, address: int) -> None:
        with self._lock:
            for index, device in enumerate(self.devices):
                if size := device.buffers.pop(address, 0):
                    self._note(f"freed {size} bytes in device {index}, {device.used_bytes} in all")

    def memory(self, index: int) -> tuple[int, int]:
        """Free and total bytes of device `index`."""
        with self._lock:
            used = self.devices[index].used_bytes if index < len(self.devices) else 0
        return max(self.behaviour.free_bytes - used, 0), self.behaviour.total_bytes

    def compute(self) -> None:
        """Count a compute; may not return, as the behaviour wants it."""
        behaviour = self.behaviour
        with self._lock:
            self.computes += 1
            computes = self.computes
        if behaviour.die_after_computes is not None and computes > behaviour.die_after_computes:
            self._note(f"dying at compute {computes}")
            os._exit(9)
        if behaviour.hang_after_computes is not None and computes > behaviour.hang_after_computes:
            self._note(f"hanging at compute {computes}")
            threading.Event().wait()

    def _note(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()


class _Client:
    """One connection: requests of a command, a length and a body, answered in order."""

    def __init__(self, server: RpcServer, connection: socket.socket) -> None:
        self.server = server
        self.connection = connection
        self.buffers: set[int] = set()
        self._forgotten = memoryview(bytearray(_FORGOTTEN_AT_ONCE))

    def serve(self) -> None:
        try:
            while True:
                command, size = struct.unpack("<BQ", self._receive(9))
                if command == Command.SET_TENSOR:
                    self._forget(size)
                else:
                    self._answer(command, self._receive(size))
        except (EOFError, OSError, KeyError, struct.error):
            pass
        finally:
            self.connection.close()
            for address in self.buffers:
                self.server.free(address)

    def _answer(self, command: int, body: bytes) -> None:
        server = self.server
        match command:
            case Command.HELLO:
                self._reply(PROTOCOL.ljust(_HELLO_BYTES, b"\0"))
            case Command.DEVICE_COUNT:
                self._reply(struct.pack("<I", server.behaviour.devices))
            case Command.GET_DEVICE_MEMORY:
                self._reply(struct.pack("<QQ", *server.memory(struct.unpack_from("<I", body)[0])))
            case Command.GET_ALIGNMENT:
                self._reply(struct.pack("<Q", _ALIGNMENT))
            case Command.GET_MAX_SIZE:
                self._reply(struct.pack("<Q", (1 << 64) - 1))
            case Command.ALLOC_BUFFER:
                address, size = server.allocate(*struct.unpack("<IQ", body))
                if address:
                    self.buffers.add(address)
                self._reply(struct.pack("<QQ", address, size))
            case Command.BUFFER_GET_BASE:
                self._reply(body[:8])
            case Command.FREE_BUFFER:
                (address,) = struct.unpack_from("<Q", body)
                self.buffers.discard(address)
                server.free(address)
                self._reply(b"")
            case Command.SET_TENSOR_HASH | Command.COPY_TENSOR:
                self._reply(b"\1")  # have it already; done
            case Command.GET_TENSOR:
                self._reply(bytes(struct.unpack_from("<Q", body, len(body) - 8)[0]))
            case Command.GET_ALLOC_SIZE:
                self._reply(struct.pack("<Q", _tensor_bytes(body[4 : 4 + _TENSOR_BYTES])))
            case Command.BUFFER_CLEAR | Command.INIT_TENSOR:
                self._reply(b"")
            case Command.GRAPH_COMPUTE | Command.GRAPH_RECOMPUTE:
                server.compute()

    def _reply(self, body: bytes) -> None:
        self.connection.sendall(struct.pack("<Q", len(body)) + body)

    def _receive(self, size: int) -> bytes:
        body = bytearray(size)
        view = memoryview(body)
        while len(view):
            count = self.connection.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(body)

    def _forget(self, size: int) -> None:
        while size:
            count = self.connection.recv_into(self._forgotten[: min(size, _FORGOTTEN_AT_ONCE)])
            if not count:
                raise EOFError
            size -= count


def _tensor_bytes(tensor: bytes) -> int:
    """The size of an `rpc_tensor` (`ggml_nbytes`): id u64, type u32, buffer u64, 4 dimensions and 4 strides u32."""
    kind = GGML_TYPES_BY_ID[struct.unpack_from("<I", tensor, 8)[0]]
    dimensions: tuple[int, ...] = struct.unpack_from("<4I", tensor, 20)
    strides: tuple[int, ...] = struct.unpack_from("<4I", tensor, 36)
    if kind.block_elements == 1:
        size = kind.block_bytes + (dimensions[0] - 1) * strides[0]
    else:
        size = dimensions[0] * strides[0] // kind.block_elements
    size += sum((count - 1) * stride for count, stride in zip(dimensions[1:], strides[1:], strict=True))
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _behaviour(arguments: argparse.Namespace) -> Behaviour:
    def gib(value: float | None) -> int | None:
        return None if value is None else int(value * GIB)

    total = gib(arguments.mem_gib) or 0
    return Behaviour(
        devices=arguments.devices,
        total_bytes=total,
        free_bytes=gib(arguments.free_gib) or total,
        largest_allocation_bytes=gib(arguments.fail_alloc_over_gib),
        die_after_computes=arguments.die_after_computes,
        hang_after_computes=arguments.hang_after_computes,
    )


def main(arguments: Sequence[str]) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--mem-gib", type=float, default=24.0, help="size of each device")
    parser.add_argument("--free-gib", type=float, help="what of it can be allocated (all)")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--fail-alloc-over-gib", type=float, help="refuse any single larger allocation")
    parser.add_argument("--die-after-computes", type=int)
    parser.add_argument("--hang-after-computes", type=int)
    parser.add_argument("--log", type=Path, help="where allocations are logged (stderr)")
    parsed = parser.parse_args(arguments)
    log = parsed.log.open("a", encoding="utf-8") if parsed.log else sys.stderr
    server = RpcServer(_behaviour(parsed), parsed.port, log)
    print(f"listening on 127.0.0.1:{server.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
