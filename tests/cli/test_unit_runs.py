"""An exported unit in a real systemd: engines come back without it, and mgpu where something was in the way."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.running import registry
from mgpu.running.instance import Instance, State
from tests.fakes.devices import free_port

from .program import Mgpu, until
from .systemd import UserManager, lacks_for_systemd, user_manager

UNIT = "mgpu-alone.service"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[UserManager]:
    if lacks := lacks_for_systemd():
        pytest.skip(lacks)
    with user_manager(tmp_path / "systemd.log") as manager:
        yield manager


def systemctl(manager: UserManager, *words: object) -> str:
    ended = manager.ask("systemctl", "--user", *map(str, words))
    assert ended.returncode == 0, (words, ended, manager.ask("systemctl", "--user", "status", UNIT).stdout)
    return ended.stdout.strip()


def properties(manager: UserManager, *names: str) -> list[str]:
    shown = systemctl(manager, "show", UNIT, *(f"--property={name}" for name in names))
    found = dict(line.split("=", 1) for line in shown.splitlines())
    return [found[name] for name in names]


def install(mgpu: Mgpu, manager: UserManager, path: Path, model: Path, *words: object) -> None:
    """Give the manager the unit as it is exported, but for what a container does not allow and how long it waits."""
    written = mgpu("export", model, "--as", "systemd", "--name", "alone", *words, "-o", path)
    assert written.exit_code == 0, written
    text = path.read_text()
    path.write_text(text.replace("ProtectKernelTunables=yes\n", "").replace("RestartSec=30", "RestartSec=1"))
    # Variables that only a test has come from where a user keeps keys.
    (file,) = re.findall(r"(?m)^EnvironmentFile=-(.*)", text)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in mgpu.environment.items() if name.startswith("MGPU_")}
    Path(file).write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in own.items()))
    systemctl(manager, "link", "--runtime", path)


def instance(mgpu: Mgpu) -> Instance:
    found = registry.read(mgpu.state / "alone").instance
    assert found
    return found


def test_an_engine_that_is_killed_comes_back_without_systemd(
    mgpu: Mgpu, tiny: Path, tmp_path: Path, manager: UserManager
) -> None:
    install(mgpu, manager, tmp_path / UNIT, tiny)
    systemctl(manager, "start", UNIT)  # until it is ready
    engine, supervisor = instance(mgpu).engine, instance(mgpu).supervisor
    assert engine
    assert supervisor
    assert properties(manager, "ActiveState", "MainPID", "NRestarts") == ["active", str(supervisor.pid), "0"]
    mgpu.kill(engine.pid)
    until(lambda: instance(mgpu).restarts or instance(mgpu).state.is_over, "another engine is ready")
    assert (instance(mgpu).state, instance(mgpu).restarts) == (State.READY, 1)
    assert properties(manager, "ActiveState", "MainPID", "NRestarts") == ["active", str(supervisor.pid), "0"]
    systemctl(manager, "stop", UNIT)
    mgpu.assert_nothing_left()
    assert properties(manager, "ActiveState", "Result", "NRestarts") == ["inactive", "success", "0"]


def test_a_port_that_somebody_holds_is_waited_for(mgpu: Mgpu, tiny: Path, tmp_path: Path, manager: UserManager) -> None:
    port = free_port()
    install(mgpu, manager, tmp_path / UNIT, tiny, "--port", port)
    with socket.create_server(("127.0.0.1", port)):
        systemctl(manager, "start", "--no-block", UNIT)
        until(
            lambda: properties(manager, "NRestarts", "ActiveState") not in (["0", "activating"], ["0", "inactive"]),
            "the first start has failed",
        )
    until(lambda: properties(manager, "ActiveState") != ["activating"], "it is ready, or given up")
    assert properties(manager, "ActiveState") == ["active"]
    systemctl(manager, "stop", UNIT)
    mgpu.assert_nothing_left()
