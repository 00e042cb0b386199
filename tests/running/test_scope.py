"""Whether systemd offers a scope: asked of a program that answers as systemd-run does."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from mgpu.running.scope import scoped

# As seen of the real one: it becomes the command, and says nothing with --quiet.
OFFERS = """#!/bin/sh
echo "$@" >> "$ASKED"
while [ "$1" != -- ] && [ "${1#-}" != "$1" ]; do shift; done
[ "$1" = -- ] && shift
exec "$@"
"""
OLDER = """#!/bin/sh
case "$*" in *OOMPolicy*) echo 'Unknown assignment: OOMPolicy=continue' >&2; exit 1 ;; esac
"""
REFUSES = "#!/bin/sh\necho 'Failed to start transient scope unit: Access denied' >&2\nexit 1\n"


class Computer:
    """One with a user manager, for somebody who lingers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.programs, self.root, self.runtime, self.asked = (
            folder / name for name in ("programs", "root", "runtime", "asked")
        )
        for each in (self.programs, self.runtime / "systemd", self.root / "run/systemd", self.linger.parent):
            each.mkdir(parents=True)
        self.linger.touch()
        self.has_program(OFFERS)
        self.manager(self.runtime / "systemd/private")
        patch.setenv("PATH", f"{self.programs}:{os.environ['PATH']}")
        patch.setenv("MGPU_ROOT", str(self.root))
        patch.setenv("XDG_RUNTIME_DIR", str(self.runtime))
        patch.setenv("ASKED", str(self.asked))

    @property
    def linger(self) -> Path:
        return self.root / "var/lib/systemd/linger" / getpass.getuser()

    def has_program(self, text: str) -> None:
        (self.programs / "systemd-run").write_text(text)
        (self.programs / "systemd-run").chmod(0o755)

    def manager(self, path: Path) -> None:
        os.chdir(path.parent)  # the path of a socket may have a hundred characters
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "")  # getpass asks the environment first
    monkeypatch.delenv("LOGNAME", raising=False)
    return Computer(tmp_path, monkeypatch)


def test_a_command_runs_in_a_scope_that_has_the_instance_s_name(computer: Computer) -> None:
    words = scoped("llama-70b")
    assert words[1:3] == ("--user", "--scope")
    assert re.fullmatch(r"--unit=mgpu-llama-70b-[0-9a-f]{8}\.scope", words[-2])
    assert subprocess.check_output([*words, "echo", "-n", "here"]) == b"here"


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        pytest.param(OFFERS, True, id="systemd 253 and newer"),
        pytest.param(OLDER + OFFERS, False, id="an older one, which knows no such thing of scopes"),
    ],
)
def test_an_engine_killed_for_want_of_memory_takes_no_scope_with_it(
    computer: Computer, answer: str, taken: bool
) -> None:
    computer.has_program(answer)
    words = scoped("a")
    assert words
    assert ("--property=OOMPolicy=continue" in words) == taken


def test_no_two_scopes_have_one_name(computer: Computer) -> None:
    assert scoped("a")[-2] != scoped("a")[-2]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda it: (it.programs / "systemd-run").unlink(), id="no systemd-run"),
        pytest.param(lambda it: it.linger.unlink(), id="the user's manager ends with the session"),
        pytest.param(lambda it: (it.runtime / "systemd/private").unlink(), id="no manager"),
        pytest.param(lambda it: it.has_program(REFUSES), id="the manager refuses"),
        pytest.param(lambda it: it.has_program("#!/nowhere/sh\n"), id="systemd-run cannot be run"),
    ],
)
def test_there_is_none(computer: Computer, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(computer.programs))
    assert callable(change)
    change(computer)
    assert scoped("a") == ()


def test_there_is_none_without_a_runtime_folder(computer: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert scoped("a") == ()


def test_one_that_does_not_answer_is_not_waited_for(computer: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.running.scope._LIMIT_S", 0.3)
    computer.has_program("#!/bin/sh\nexec sleep 600\n")
    assert scoped("a") == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone has the computer's own manager")
def test_root_has_the_computer_s_own_manager(computer: Computer) -> None:
    computer.linger.unlink()
    computer.manager(computer.root / "run/systemd/private")
    assert scoped("a")[1] == "--scope"
