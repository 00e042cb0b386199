"""Ports to listen on."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator, Sequence

from mgpu.errors import Missing, UsageError

FIRST_PORT = 8080
_LAST_TRIED = FIRST_PORT + 100
_claims: dict[int, socket.socket] = {}
# The port on which this process's engine has served, with its claim.
_kept: dict[int, socket.socket] = {}


def check_host(host: str) -> str:
    """Return `host` if it is an address or name to listen on. Raises UsageError otherwise."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(
            f"--host {host[:80]!r} is not an address of this machine", hint="use 127.0.0.1, or 0.0.0.0 for all networks"
        ) from None
    return host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`: every address it stands for is a loopback one."""
    found = socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def choose_port(host: str, wanted: int | None) -> int:
    """Return a port on `host` that is free now, as `hold_port` would give it. Raises what that raises."""
    with hold_port(host, wanted) as port:
        return port


@contextlib.contextmanager
def hold_port(host: str, wanted: int | None) -> Iterator[int]:
    """Give a free port on `host` that no other mgpu gets meanwhile: `wanted`, or without one the first free one from
    8080 on.

    Some engines bind their port long before they listen, and the system then lets a second one bind it as well.
    Raises Missing (code "port-in-use") when `wanted` is taken, Missing (code "port-unusable") when this machine does
    not have the address or keeps the port for others, UsageError when it is no port.
    """
    if wanted is not None and not 1 <= wanted <= 65535:
        raise UsageError(f"--port {wanted} is not a port: ports go from 1 to 65535")
    for port in (wanted,) if wanted is not None else (*range(FIRST_PORT, _LAST_TRIED), 0):
        with socket.socket(socket.AF_UNIX) as claim:
            problem = _claimed(claim, port) or _bind(host, port)
            if isinstance(problem, int):
                if port:
                    _claims[port] = claim
                try:
                    yield problem
                finally:
                    _claims.pop(port, None)
                return
        if problem.errno != errno.EADDRINUSE:
            raise _unusable(host, port, problem)
    if wanted is None:
        raise Missing("no port is free", code="port-in-use")
    raise Missing(
        f"port {wanted} is already in use on {host}",
        code="port-in-use",
        hint="choose another --port, or leave it out and mgpu takes a free one",
    )


def keep_port(port: int) -> None:
    """Have a port that is held stay claimed until this process has ended, not only as long as its engine lives: it is
    to be started again where clients know it. The one before is given up."""
    if port in _kept or port not in _claims:
        return
    for claim in _kept.values():
        claim.close()
    _kept.clear()
    _kept[port] = _claims[port].dup()


def is_this_machine(host: str) -> bool:
    """Whether `host` is an address of this machine, loopback or not: one that can be listened on."""
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in addresses:
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind(address)
            return True
    return False


def client_host(host: str) -> str:
    """Return the address, ready for a URL, under which this machine reaches a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


def shown_url(url: str | None, command: Sequence[str]) -> str | None:
    """Return the URL of what mgpu serves by `command`, with a * in the place of the host where that is reached by all
    addresses of this machine: for people, and for no client."""
    words = [part for word in command for part in word.split("=", 1)]
    host = words[words.index("--host") + 1] if "--host" in words[:-1] else ""
    if url is None or host not in ("0.0.0.0", "::"):  # noqa: S104  asked for by the user
        return url
    return f"http://*:{url.rpartition(':')[2]}"


def _claimed(claim: socket.socket, port: int) -> OSError | None:
    """Why another mgpu has claimed the port, None once `claim` has it. Names that begin with a zero byte belong to a
    network, as ports do, and go with their owner."""
    if port in _kept:
        return None
    try:
        claim.bind(f"\0mgpu-port-{port}" if port else "")
    except OSError as error:
        return error
    return None


def _unusable(host: str, port: int, problem: OSError) -> Missing:
    return Missing(
        f"port {port} on {host} cannot be used: {problem.strerror}",
        code="port-unusable",
        hint="use --host 127.0.0.1, or 0.0.0.0 for all networks",
    )


def _bind(host: str, port: int) -> int | OSError:
    """The port when it could be bound, else why not.

    With SO_REUSEADDR, as servers bind: connections that linger after a server's end do not count, a listener does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
        return int(probe.getsockname()[1])
