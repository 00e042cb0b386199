"""A cgroup scope of its own for what is to go on by itself, where systemd offers one."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
from pathlib import Path

from mgpu.programs import kill_group, start_program

_LIMIT_S = 5.0
_QUIETLY = ("--quiet", "--collect", "--no-ask-password")
# A manager that knows this for scopes (systemd 253) else stops all of an instance when the kernel has killed its engine
# for want of RAM, which is mgpu's to start again; an older one refuses it.
_OUTLIVES_AN_ENGINE = "--property=OOMPolicy=continue"


def scoped(name: str) -> tuple[str, ...]:
    """Return the words to put before a command so that it runs in a new scope, named after the instance `name`: the
    same process, in a cgroup outside of the login session and its terminal. Empty where that cannot be had.

    A login manager that ends all of a session with it (logind's KillUserProcesses=yes) then leaves an instance alone,
    and `systemctl --user stop` ends it with all that it has started, whatever became of environments and process
    groups. The scope is the instance's, not the engine's: one of the engine's alone would outlive its supervisor and
    its reaper when a session is ended by force, and the reaper is who ends what the kernel does not.

    A user's manager itself ends with the last session unless the user lingers (`loginctl enable-linger`). A scope of
    it would then be worse than none, so none is taken. Blocks for the time of two tries, some hundredths of a second.
    """
    program = shutil.which("systemd-run")
    manager = _manager() if program else None
    if not program or manager is None:
        return ()
    for properties in ((_OUTLIVES_AN_ENGINE,), ()):
        words = (program, *manager, "--scope", *_QUIETLY, *properties)
        # Proved rather than believed: in containers and under su there may be a manager that refuses.
        if _succeeds((*words, "true")):
            return (*words, f"--unit=mgpu-{name}-{secrets.token_hex(4)}.scope", "--")
    return ()


def _manager() -> tuple[str, ...] | None:
    """Which of systemd's managers a scope would outlive this session with, as options; None if there is none."""
    root = Path(os.environ.get("MGPU_ROOT") or "/")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    lingers = (root / "var/lib/systemd/linger" / _user_name()).exists()
    if lingers and runtime and _is_socket(Path(runtime) / "systemd/private"):
        return ("--user",)
    return () if os.geteuid() == 0 and _is_socket(root / "run/systemd/private") else None


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a user without a name lingers nowhere
        return "-"


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _succeeds(command: tuple[str, ...]) -> bool:
    try:
        process = start_program(command, os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    try:
        return process.wait(_LIMIT_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        kill_group(process, _LIMIT_S)
