"""`mgpu run -d` where systemd offers a scope: the instance outlives the session and ends as a whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.running import registry

from .program import Mgpu, until
from .systemd import UserManager, lacks_for_systemd, user_manager


@pytest.fixture
def manager(mgpu: Mgpu, tmp_path: Path) -> Iterator[UserManager]:
    if lacks := lacks_for_systemd():
        pytest.skip(lacks)
    with user_manager(tmp_path / "systemd.log") as manager:
        command = mgpu.command
        mgpu.command = lambda *words: manager.within(command(*words))  # type: ignore[method-assign]
        mgpu.environment |= manager.environment
        root = tmp_path / "root"
        shutil.copytree(mgpu.environment["MGPU_ROOT"], root, symlinks=True)
        mgpu.environment["MGPU_ROOT"] = str(root)
        linger(mgpu).parent.mkdir(parents=True)
        linger(mgpu).touch()
        yield manager


def linger(mgpu: Mgpu) -> Path:
    return Path(mgpu.environment["MGPU_ROOT"]) / "var/lib/systemd/linger/root"


def scopes(manager: UserManager) -> list[str]:
    listed = manager.ask("systemctl", "--user", "list-units", "--no-legend", "--plain", "mgpu-*").stdout
    return [line.split()[0] for line in listed.splitlines()]


def scope_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("/")[2]


def test_all_of_an_instance_is_in_its_scope_until_it_is_stopped(mgpu: Mgpu, tiny: Path, manager: UserManager) -> None:
    started = mgpu("run", tiny, "-d", "--name", "alone")
    assert started.exit_code == 0, started
    instance = registry.read(mgpu.state / "alone").instance
    assert instance
    assert instance.engine
    assert instance.supervisor
    [scope] = scopes(manager)
    assert re.fullmatch(r"mgpu-alone-[0-9a-f]{8}\.scope", scope)
    assert {scope_of(pid) for pid in mgpu.processes()} == {scope}
    assert {instance.engine.pid, instance.supervisor.pid} < set(mgpu.processes())
    assert scope_of(os.getpid()) != scope
    assert mgpu("stop", "alone").exit_code == 0
    mgpu.assert_nothing_left()
    until(lambda: scopes(manager) == [], "the scope is gone")


def test_a_scope_that_systemd_stops_is_an_instance_that_was_stopped(
    mgpu: Mgpu, tiny: Path, manager: UserManager
) -> None:
    assert mgpu("run", tiny, "-d", "--name", "alone").exit_code == 0
    [scope] = scopes(manager)
    assert manager.ask("systemctl", "--user", "stop", scope).returncode == 0
    mgpu.assert_nothing_left()
    [shown] = mgpu("ps", "--json").json["data"]["instances"]
    assert shown["state"] == "stopped"


def test_nobody_who_does_not_linger_gets_one(mgpu: Mgpu, tiny: Path, manager: UserManager) -> None:
    """It would end with the last session, and the instance with it, which goes on without one."""
    linger(mgpu).unlink()
    assert mgpu("run", tiny, "-d", "--name", "alone").exit_code == 0
    assert scopes(manager) == []
    assert mgpu("stop", "alone").exit_code == 0
    mgpu.assert_nothing_left()
