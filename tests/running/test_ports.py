"""Ports and addresses: what is free, what is taken, and what to type into a URL."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from mgpu.errors import Missing, UsageError
from mgpu.running import ports
from mgpu.running.ports import check_host, choose_port, client_host, hold_port, is_this_machine, shown_url
from tests.fakes.devices import free_port

NOT_OURS = "203.0.113.7"  # kept for documentation (RFC 5737)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_first_free_port_is_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST_PORT", taken)
    monkeypatch.setattr(ports, "_LAST_TRIED", min(taken + 50, 65536))
    chosen = choose_port("127.0.0.1", None)
    assert chosen != taken
    with socket.create_server(("127.0.0.1", chosen)):
        assert choose_port("127.0.0.1", None) != chosen


def test_any_port_will_do_when_all_favourites_are_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST_PORT", taken)
    monkeypatch.setattr(ports, "_LAST_TRIED", taken + 1)
    assert choose_port("127.0.0.1", None) not in (0, taken)


def test_a_free_port_that_is_wanted_is_given(taken: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert choose_port("127.0.0.1", free) == free
    assert choose_port("127.0.0.2", taken) == taken, "the same port of another address"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_wanted_port_that_is_taken_is_said_so(host: str, taken: int) -> None:
    with pytest.raises(Missing, match=f"port {taken} is already in use on {host}") as missing:
        choose_port(host, taken)
    assert missing.value.code == "port-in-use"
    assert "--port" in (missing.value.hint or "")


def test_connections_that_linger_after_a_servers_end_do_not_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    assert choose_port("127.0.0.1", port) == port


@pytest.mark.parametrize("choose", [pytest.param(lambda: None, id="any port"), pytest.param(free_port, id="one")])
def test_an_address_that_is_not_ours_is_not_called_busy(choose: Callable[[], int | None]) -> None:
    with pytest.raises(Missing, match=f"on {NOT_OURS} cannot be used") as missing:
        choose_port(NOT_OURS, choose())
    assert missing.value.code == "port-unusable"


@pytest.mark.parametrize("wanted", [0, -1, 65536, 10**9])
def test_what_is_no_port_is_refused(wanted: int) -> None:
    with pytest.raises(UsageError, match="ports go from 1 to 65535"):
        choose_port("127.0.0.1", wanted)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_addresses_are_accepted(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize("host", ["", "no-such-host.invalid", "two..dots", "x" * 300, "\udc80"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="--host") as refused:
        check_host(host)
    assert len(refused.value.message) < 150


@pytest.mark.parametrize(
    ("host", "reached_under"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("192.168.1.5", "192.168.1.5"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("fd00::5", "[fd00::5]"),
        ("localhost", "localhost"),
    ],
)
def test_the_address_for_a_url(host: str, reached_under: str) -> None:
    assert client_host(host) == reached_under


def test_a_port_that_is_held_goes_to_nobody_else() -> None:
    with hold_port("127.0.0.1", None) as held:
        with hold_port("127.0.0.1", None) as other:
            assert other != held
        with pytest.raises(Missing) as refused:
            choose_port("127.0.0.1", held)
        assert refused.value.code == "port-in-use"
    assert choose_port("127.0.0.1", held) == held


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("192.0.2.1", False)]
)
def test_which_addresses_are_this_machines(host: str, here: bool) -> None:
    assert is_this_machine(host) == here


def test_a_port_that_was_served_on_stays_claimed_between_two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_kept", {})
    port = choose_port("127.0.0.1", None)
    claimed = f"\0mgpu-port-{port}"
    with hold_port("127.0.0.1", port):
        ports.keep_port(port)
    with socket.socket(socket.AF_UNIX) as other, pytest.raises(OSError, match="in use"):
        other.bind(claimed)
    assert choose_port("127.0.0.1", port) == port, "by whoever kept it it is used again"
    monkeypatch.setattr(ports, "FIRST_PORT", port + 1)
    with hold_port("127.0.0.1", None) as next_port:
        ports.keep_port(next_port)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(claimed)
    for claim in ports._kept.values():
        claim.close()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        pytest.param("mgpu run m", "http://127.0.0.1:8081", id="this machine alone"),
        pytest.param("mgpu run m --host 0.0.0.0 --insecure", "http://*:8081", id="all networks"),
        pytest.param("mgpu run m --host=::", "http://*:8081", id="all networks, in one word"),
        pytest.param("mgpu run m --host 10.0.0.7", "http://127.0.0.1:8081", id="one address"),
        pytest.param("mgpu run m --host", "http://127.0.0.1:8081", id="no address"),
    ],
)
def test_who_is_open_to_all_networks_is_shown_so(words: str, shown: str) -> None:
    assert shown_url("http://127.0.0.1:8081", words.split()) == shown
    assert shown_url(None, words.split()) is None
