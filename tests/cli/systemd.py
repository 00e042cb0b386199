"""A real systemd user manager in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import FORBIDDEN

from .program import LIMIT_S, until

_RUNTIME = "/run/user/0"
_NEEDED = ("/lib/systemd/systemd", "systemd-run", "systemctl", "dbus-daemon", "unshare", "nsenter")
# The cgroups where today's distributions have them, and nothing of this computer's own manager in sight. What is
# mounted here is seen by nobody else, and gone with the last process in here; but the cgroups are everybody's.
_UNSHARE = ("unshare", "--mount", "--propagation", "private")
_MOUNTS = """
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mount -t tmpfs none /var/lib/systemd
own=/sys/fs/cgroup/mgpu-test-$$
mkdir $own
"""
_TRIED = """
rmdir $own
"""
_SCRIPT = f"""
{_MOUNTS}
mkdir -p /run/systemd/system {_RUNTIME}
chmod 700 {_RUNTIME}
echo $$ > $own/cgroup.procs
/lib/systemd/systemd --user &
trap 'kill $!' TERM
wait $! || wait $! || true
echo $$ > /sys/fs/cgroup/cgroup.procs
find $own -depth -type d -exec rmdir {{}} ';'
"""


class UserManager:
    """The manager, by how to run a program within its sight."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.environment = {"XDG_RUNTIME_DIR": _RUNTIME, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={_RUNTIME}/bus"}

    def within(self, command: list[str]) -> list[str]:
        """Return the command that runs `command` there."""
        return ["nsenter", f"--target={self._pid}", "--mount", f"--wd={Path.cwd()}", *command]

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        variables = {**os.environ, **self.environment}
        return subprocess.run(self.within([*command]), env=variables, capture_output=True, text=True, check=False)


def lacks_for_systemd() -> str | None:
    """What a user manager cannot be started without here; None if there is all."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if not Path("/usr/lib/systemd/user/dbus.socket").exists():
        return "dbus-user-session is not installed"
    tried = subprocess.run([*_UNSHARE, "sh", "-ec", _MOUNTS + _TRIED], capture_output=True, text=True)
    return f"{FORBIDDEN} it: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def user_manager(log: Path) -> Iterator[UserManager]:
    """Run one of root's; it is gone with all that it has started when this ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_UNSHARE, "sh", "-ec", _SCRIPT],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "XDG_RUNTIME_DIR": _RUNTIME},
        )
    manager = UserManager(process.pid)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return manager.ask("systemctl", "--user", "is-system-running").stdout.strip() in ("running", "degraded")

    try:
        until(answers, "systemd --user answers")
        yield manager
    finally:
        process.terminate()
        process.wait(LIMIT_S)
