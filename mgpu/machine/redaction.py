"""Taking names of people and computers, and addresses, out of what was read."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from mgpu.machine.inspection import DiskSpace, InstalledEngine
from mgpu.machine.snapshot import GpuProcess

_Value = TypeVar("_Value")
_Change = Callable[[str], str]


def redacted(value: _Value) -> _Value:
    """Return a dataclass with every text in it made printable and freed of the names that are known here: the home
    folder is "~", a folder that has the user's name "user", the computer's own name "host", serial numbers are gone."""
    return _changed(value, _Names())


def anonymous(value: _Value) -> _Value:
    """Return a dataclass for the eyes of strangers: redacted, and without other people's home folders, the addresses
    and names of computers, and the names of processes that are no well-known program's. UUIDs become numbered ones, the
    same one the same number everywhere. Of engines' services the kind is left ("vllm.service"), and of paths outside
    the system's folders the usual words, every other one is "folder". Doing it again changes nothing."""
    return _changed(value, _Strangers())


def kernel_options(command_line: str) -> str:
    """Return the options of the kernel's command line that a diagnosis of cards may need. All others name disks,
    addresses and people."""
    return " ".join(word[:200] for word in command_line.split() if _KERNEL_OPTION.fullmatch(word))


_KERNEL_OPTION = re.compile(
    r"(iommu|amd_iommu|intel_iommu|iommu\.\w+|pci|pcie_\w+|nokaslr|kaslr|nomodeset|isolcpus|numa_balancing|hugepages?|efi"
    r"|default_hugepagesz|transparent_hugepage|mitigations|swiotlb|cgroup_enable|systemd\.unified_cgroup_hierarchy"
    r"|module_\w+|module\.sig_enforce|lockdown|(rd\.driver|modprobe)\.blacklist"
    r"|(nvidia|nouveau|amdgpu|radeon|i915|xe|vfio)([_.-][\w.-]+)?)(=.*)?"
)

# Short or common names tell nobody's secret, and would spoil half of all texts.
_COMMON_HOSTS = {"localhost", "linux", "nvidia", "ubuntu", "debian", "fedora", "host"}
_COMMON_USERS = {"root", "user", "host", "nvidia", "cuda", "ollama", "vllm", "docker", "python", "ubuntu", "linux"}
_SERIAL = re.compile(r"(?i)\b((?:serial(?:[ _-]?(?:number|no\.?))?|S/N)(?: is)?[ :=#]{1,8})(?=\S{0,99}\d)\S+")


class _Names:
    """What is known here: the user's name and home, and the computer's name."""

    def __init__(self) -> None:
        import platform

        home = os.environ.get("HOME", "").rstrip("/")
        variables = ("USER", "LOGNAME", "SUDO_USER", "DOAS_USER")
        self.users = {os.environ.get(name, "") for name in variables} | {home.rpartition("/")[2]}
        self.users = {user for user in self.users if len(user) > 1 and user != "root"}
        name = platform.node()
        host = name.partition(".")[0]
        self.patterns: list[tuple[re.Pattern[str], str]] = [(_SERIAL, r"\1…")]
        if home.count("/") >= 1 and len(home) > 2:
            self.patterns.append((re.compile(rf"(?<![\w.-]){re.escape(home)}(?=[/:;,\s\"']|$)"), "~"))
        for user in sorted(self.users):
            self.patterns.append((re.compile(rf"(?<=/){re.escape(user)}(?=[/:;,\s\"']|$)"), "user"))
        if len(host) >= 4 and host.lower() not in _COMMON_HOSTS:
            names = "|".join(map(re.escape, (name, host)))
            self.patterns.append((re.compile(rf"(?<![\w-])(?:{names})(?![\w-])", re.IGNORECASE), "host"))

    def __call__(self, text: str) -> str:
        text = "".join(character if character.isprintable() else " " for character in text)
        for pattern, instead in self.patterns:
            text = pattern.sub(instead, text)
        return text


_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
# A name with blanks, as Windows has them, ends at the next part of the path.
_HOME = re.compile(r"(?i)(?<=[/\\])((?:home|users|media)[/\\])(?:[^/\\:;,'\"]{1,99}(?=[/\\])|[^/\\\s:;,'\"]+)")
_PROCESS = re.compile(r"\bname=(.*?)(?=, |,?$)")
# Six bytes of Ethernet's (by colons or dashes, or in an interface's name), up to twenty of InfiniBand's.
_HARDWARE = re.compile(
    r"(?i)(?<![0-9a-f:-])[0-9a-f]{2}(?:(?::[0-9a-f]{2}){5,19}|(?:-[0-9a-f]{2}){5})(?![0-9a-f:-])|(?<=\ben)x[0-9a-f]{12}\b"
)
# The version of WSL2's kernel has four numbers too.
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.]*\d|-microsoft)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{0,4}:[0-9a-fA-F:.]{1,45}(?:%[\w.-]{1,15})?(?![\w:])")
# Of two letters all but those that files end with.
_DOMAIN = re.compile(
    r"(?i)(?<![\w-])(?:[a-z0-9][\w-]{0,62}\.){1,9}(?:com|org|net|edu|gov|mil|int|info|biz|dev|app|cloud|local|localdomain|lan"
    r"|home|internal|intranet|corp|private|example|invalid|arpa"
    r"|(?!so|py|sh|md|cc|rs|la|pl|ps|in|am|ac|mk|do|ml)[a-z]{2})(?![\w-]|\.\w)"
)
_PUBLIC = re.compile(r"(?i)(?:.*\.)?(?:nvidia\.com|huggingface\.co|github\.com|ollama\.com|docker\.io|pytorch\.org)")
_LOCAL = {"127.0.0.1", "0.0.0.0", "::", "::1"}  # noqa: S104  they are looked for in texts
_PROGRAM = re.compile(
    r"(?i)python[\d.]*|vllm\S*|ray(::\S*)?|ollama\S*|llama-[a-z-]+|rpc-server|ggml-rpc-server|mgpu|sglang\S*|exo|tabbyapi"
    r"|lmstudio|lms|koboldcpp|nvidia-[a-z-]+|nvidia-cuda-mps-server|Xorg|Xwayland|X|gnome-shell|kwin_\w+|plasmashell"
    r"|sway|Hyprland|firefox\S*|chrom\S*|electron|code|steam\S*|blender|ffmpeg|docker\S*|containerd\S*|<unknown>|program"
)


_SERVICE = re.compile(r"\b(ollama|vllm|llama|mgpu)[\w.@:\\-]*\.service\b(\.d/[^\s/]+\.conf)?")
_PATH = re.compile(r"(?<![\w./~)-])~?(?:/[\w.@+~%-]+)+")
# What is below these is named by those who make systems; below all others everybody may choose.
_SYSTEM_FOLDERS = {"sys", "proc", "dev", "run", "usr", "lib", "lib64", "bin", "sbin", "boot", "etc"}
_USUAL_PART = re.compile(
    r"~?|home|root|user|Users|media|mnt|data|opt|srv|var|lib|lib64|bin|local|share|snap|tmp|folder|disk\d?|nvme\d?|ssd\d?"
    r"|\.?cache|\.local|\.config|systemd|huggingface|hub|\.?ollama|models?|mgpu|vllm|llama\.cpp|build|docker|containerd"
    r"|\.?venv|envs?|site-packages|dist-packages|torch|nvidia|nccl|rocm(-[\d.]+)?|cuda(-[\d.]+)?|python[\d.]*|conda"
    r"|llama-server|rpc-server|\.?nccl\.conf|(vllm|ollama|llama|mgpu)\.service(\.d)?|drop-in\.conf|lib[\w+-]+\.so[\d.]*"
)


class _Strangers:
    """All that `_Names` takes away, and what follows from a text's form alone."""

    def __init__(self) -> None:
        self._names = _Names()
        self._numbers: dict[str, int] = {}
        private = [user for user in self._names.users if len(user) >= 3 and user.lower() not in _COMMON_USERS]
        self._user = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, private))})(?![\w-])") if private else None

    def __call__(self, text: str) -> str:
        text = self._names(text)
        text = _UUID.sub(self._numbered, text)
        text = _HOME.sub(r"\1user", text)
        text = _PROCESS.sub(lambda match: f"name={program_name(match[1])}", text)
        text = _HARDWARE.sub("(address)", text)
        text = _IPV6.sub(functools.partial(_without_address, parse=ipaddress.IPv6Address), text)
        text = _IPV4.sub(functools.partial(_without_address, parse=ipaddress.IPv4Address), text)
        text = _DOMAIN.sub(lambda match: match[0] if _PUBLIC.fullmatch(match[0]) else "(host)", text)
        text = self._user.sub("user", text) if self._user else text
        text = _SERVICE.sub(lambda match: f"{match[1]}.service{'.d/drop-in.conf' if match[2] else ''}", text)
        return _PATH.sub(lambda match: usual_path(match[0]), text)

    def _numbered(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match[0].lower(), len(self._numbers))
        return f"00000000-0000-0000-0000-{number:012d}"


def program_name(name: str) -> str:
    """Return the name of a process where it is a well-known program's, else "program": people name theirs freely."""
    return name if _PROGRAM.fullmatch(name) else "program"


def usual_path(path: str) -> str:
    """Return a path with "folder" for each part of it that only its owner would choose."""
    parts = path.split("/")
    if parts[1:2] and parts[1] in _SYSTEM_FOLDERS and not parts[0]:
        return path
    return "/".join(part if _USUAL_PART.fullmatch(part) else "folder" for part in parts)


def _without_address(match: re.Match[str], parse: Callable[[str], object]) -> str:
    found = match[0].rstrip(":.") if not match[0].endswith("::") else match[0]
    try:
        parse(found)
    except ValueError:
        return match[0]
    return match[0] if found in _LOCAL else "(address)" + match[0][len(found) :]


def _changed(value: _Value, change: _Change) -> _Value:
    changed = _each_text(value, change)
    assert isinstance(changed, type(value))
    return changed


def _each_text(value: object, change: _Change) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_each_text(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: dict[str, Any] = {
            field.name: _each_text(getattr(value, field.name), change) for field in dataclasses.fields(value)
        }
        if isinstance(value, GpuProcess) and isinstance(change, _Strangers) and value.name is not None:
            fields["name"] = program_name(value.name)
        if isinstance(value, DiskSpace | InstalledEngine) and isinstance(change, _Strangers) and fields["path"]:
            fields["path"] = usual_path(fields["path"])  # a path with blanks in it, too
        return dataclasses.replace(value, **fields)
    return value
