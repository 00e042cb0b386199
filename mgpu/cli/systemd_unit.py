"""The text of a systemd unit that runs `mgpu run` in the foreground (systemd.service(5), systemd.exec(5)).

Some settings that look right are left out on purpose:

- `PrivateDevices=`, and `ProtectClock=`, which also closes /dev: the cards would be gone.
- `MemoryDenyWriteExecute=`, `SystemCallFilter=`: CUDA, ROCm and torch.compile make code while they run.
- `PrivateIPC=`, `ProtectProc=`, `PrivateNetwork=`: shared memory of workers, and who else holds a card or a port.
- `ProtectKernelLogs=`: a lost card is told of in the kernel's log.
- In a user's own unit all that drops capabilities (`CapabilityBoundingSet=`, `ProtectKernelModules=`): the user's
  manager has none to drop, and the unit would not start (218/CAPABILITIES).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mgpu.errors import UsageError

# Longer than mgpu lets anything stand still. A start that goes on is given more time by mgpu itself
# (`mgpu.running.notify`): models are fetched and loaded for as long as it takes.
START_S = 1800
# The supervisor's loop goes round every few seconds; a request to an engine that hangs takes the longest.
WATCHDOG_S = 120
# mgpu's own stages of stopping an engine and the reaper's after it: some 10 + 2 + 10 and 10 + 23 seconds.
STOP_S = 90
# When mgpu itself has ended: its engines it starts again by itself, at once. At a boot the network may take minutes.
_AGAIN_S = 30
_MOST_STARTS = 10
_WRONG_USAGE = 2
_INTERRUPTED = 130
_NO_NETWORK = ("# A user's unit cannot wait for the network: a start that needs it fails without, and comes again.",)
MADE_BY = "# Made by mgpu export."
_SHARED_TMP = re.compile(r"(^|[:=,])(/var)?/tmp/")
_PLAIN = re.compile(r"[A-Za-z0-9_@:./,=+-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a unit is made of.

    `command` begins with the absolute path of a program; `environment` holds no secret; `key_file` is where the API key
    is taken from (lines NAME=value), and must be there if `key_required`. `writable` are the folders that mgpu and its
    engines write to. `user` is who a unit of the system runs as; None makes one of the user's own manager. `folder` is
    the current folder, where that matters. `before_start` are commands that the system's unit runs as root, whatever
    becomes of them.
    """

    name: str
    model: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    key_file: Path
    key_required: bool
    writable: tuple[Path, ...]
    user: str | None = None
    folder: Path | None = None
    before_start: tuple[tuple[str, ...], ...] = ()

    @property
    def unit(self) -> str:
        """The unit's file name."""
        return f"mgpu-{self.name}.service"


def unit_text(service: Service) -> str:
    """Return the unit; everything in it is quoted, whatever it holds.

    Raises UsageError for words that are no UTF-8: systemd takes them, and then cannot tell anybody of the unit.
    """
    for word in (*service.command, *service.environment.values(), str(service.key_file), *map(str, service.writable)):
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(f"{word[:80]!r} is no UTF-8: a unit cannot hold it", hint="rename it")
    system = service.user is not None
    what = service.model if service.model == service.name else f"{service.model} as {service.name}"
    network = ("After=network-online.target nvidia-persistenced.service", "Wants=network-online.target")
    sections = (
        (
            "Unit",
            f"Description={_specifiers(_line(f'mgpu: {what}'))}",
            *(network if system else _NO_NETWORK),
            "# More starts than these are somebody's to look at: engines mgpu starts again by itself.",
            "StartLimitIntervalSec=1h",
            f"StartLimitBurst={_MOST_STARTS}",
        ),
        ("Service", *_life(service), *_environment(service), *_sandbox(service)),
        ("Install", f"WantedBy={'multi-user' if system else 'default'}.target"),
    )
    return (
        f"{MADE_BY}\n{_install(service)}\n\n"
        + "\n\n".join("\n".join([f"[{title}]", *lines]) for title, *lines in sections)
        + "\n"
    )


def _install(service: Service) -> str:
    folder, scope = ("/etc/systemd/system", "") if service.user else ("~/.config/systemd/user", " --user")
    steps = [f"put it into {folder}/{service.unit}, then:", f"  systemctl{scope} daemon-reload"]
    steps.append(f"  systemctl{scope} enable --now {service.unit}")
    if not service.user:
        steps.append("  loginctl enable-linger        # to have it run while nobody is logged in")
    return "\n".join(f"# {step}" for step in steps)


def quoted(word: str, *, expands: bool = True) -> str:
    """Return `word` so that systemd takes it as one word and as it is. `expands` says that the setting replaces
    variables, as the arguments of ExecStart= do."""
    text = "".join(map(_escaped, word))
    if expands:
        text = text.replace("$", "$$")
    return text if _PLAIN.fullmatch(word) else f'"{text}"'


def _life(service: Service) -> list[str]:
    program, *arguments = service.command
    return [
        "# mgpu itself tells when its engine answers, how a long load goes on, and that it is alive.",
        "Type=notify",
        "NotifyAccess=main",
        *([f"User={_specifiers(service.user)}"] if service.user else []),
        # The slash keeps a last blank, and a last backslash from joining the next line.
        *([f"WorkingDirectory=-{_specifiers(str(service.folder))}/"] if service.folder else []),
        *(f"ExecStartPre=-+{' '.join(map(quoted, command))}" for command in service.before_start),
        f"ExecStart={' '.join([quoted(program, expands=False), *map(quoted, arguments)])}",
        f"TimeoutStartSec={START_S}",
        f"WatchdogSec={WATCHDOG_S}",
        "Restart=on-failure",
        f"RestartSec={_AGAIN_S}",
        "# Wrong usage is not cured by another start; what is missing may come: the network, a port, room on a disk.",
        f"RestartPreventExitStatus={_WRONG_USAGE}",
        "# Asked to stop, mgpu ends with 130.",
        f"SuccessExitStatus={_INTERRUPTED}",
        "# mgpu is told to stop and ends its engine; what outlives it is killed.",
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_S}",
        "# An engine that is killed for its memory is mgpu's to start again.",
        "OOMPolicy=continue",
        *(["# Pinned memory, --mlock.", "LimitMEMLOCK=infinity"] if service.user else []),
    ]


def _environment(service: Service) -> list[str]:
    settings = (f"{name}={value}" for name, value in sorted(service.environment.items()))
    optional = "" if service.key_required else "-"
    return [
        *(f"Environment={quoted(setting, expands=False)}" for setting in settings),
        f"# Secrets stand there (MGPU_API_KEY=…, HF_TOKEN=…; mode 0600{'; if any' if optional else ''}), never here.",
        f"EnvironmentFile={optional}{_specifiers(str(service.key_file))}",
    ]


def _sandbox(service: Service) -> list[str]:
    paths = tuple(map(str, service.writable))
    # Something that is needed may be there: a folder of another's own would hide it.
    uses_tmp = any(_SHARED_TMP.search(text) for text in (*service.command, *service.environment.values(), *paths))
    temporary = ("/tmp",) if uses_tmp else ()  # noqa: S108  named to the service manager, not opened
    writable = " ".join(quoted(f"-{path}", expands=False) for path in (*paths, *temporary))
    return [
        "UMask=0077",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        f"ReadWritePaths={writable}",
        *([] if uses_tmp else ["PrivateTmp=yes"]),
        "ProtectKernelTunables=yes",
        "ProtectControlGroups=yes",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        *(["CapabilityBoundingSet=", "ProtectKernelModules=yes"] if service.user else []),
    ]


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "%":
        return "%%"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
