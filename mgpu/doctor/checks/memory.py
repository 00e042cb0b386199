"""Checks of memory: of the cards, of the computer, and of the disks that models come from."""

from __future__ import annotations

import re
import shlex

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import BUSY_PERCENT, BUSY_SHARE, in_use_bytes, named, unread, usable_cards
from mgpu.machine.families import family
from mgpu.machine.inspection import DiskSpace, Inspection
from mgpu.machine.layout import health, in_container
from mgpu.machine.snapshot import Gpu
from mgpu.units import GIB, MIB, gib

_WORTH_SAYING_BYTES = 256 * MIB
_LOW_DISK_BYTES = 20 * GIB
_LEAST_FREE_SHARE = 0.1
_PRESSED_PERCENT = 5.0
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "ceph", "glusterfs")


@check("vram-in-use", Area.memory, "B", about=(subjects.card,))
def vram_in_use(inspection: Inspection, purpose: Purpose) -> Said:
    """Memory of a card that is taken before anything starts.

    Read: the card's total and free memory without what the driver reserves, and the processes that NVML lists.
    Rule: warn when over 1 GiB is taken that no listed process accounts for, of a card at rest (a zombie); info in
    a container and of a card that works, where somebody has it who cannot be seen from here. Warn above 10 % in use
    when an engine is named that is to have the cards, else info from 256 MiB. Info too, whatever the size, where the
    driver lists no processes at all (WSL2, some containers): what is in use may be anybody's, and may go.
    Why: vLLM ends at once when less is free than its share of the card, the most common failure on local machines.
    Do: end the processes that are named, an engine of mgpu's with Ctrl-C in its terminal, Ollama's with ollama stop;
    sudo fuser -v /dev/nvidia* finds those that NVML does not list. Intel's cards are not judged: their drivers tell how
    much is in use to programs that compute on them alone.
    """
    unknown: list[int] = []
    untold: dict[int, int] = {}
    full: dict[int, int] = {}
    inside = in_container(inspection)
    wanted = purpose.backend is not None or purpose.weights_bytes is not None
    for gpu in usable_cards(inspection):
        card = health(inspection, gpu)
        used = in_use_bytes(gpu, card)
        if used is None:
            unknown.append(gpu.index)
            continue
        if inside and _is_full(gpu):
            full[gpu.index] = used
            continue
        if gpu.vendor == "nvidia" and not card.used_by_known:
            if used >= _WORTH_SAYING_BYTES:
                untold[gpu.index] = used
            continue
        finding = _taken(gpu, used, inspection.mgpu_processes, wanted=wanted, inside=inside)
        if finding:
            yield finding
    if full:
        yield _filled(full, wanted=wanted)
    if untold:
        yield _untold(untold)
    if unknown:
        yield unread(inspection, "memory in use", "MemoryInfo", "mem_info", of=unknown)


def _is_full(gpu: Gpu) -> bool:
    """Whether nothing can start on a card, and nobody is seen to have it."""
    total, free = gpu.total_bytes or 0, gpu.free_bytes or 0
    return gpu.vendor == "nvidia" and free < _LEAST_FREE_SHARE * total and not gpu.used_by


def _filled(used: dict[int, int], *, wanted: bool) -> Finding:
    return Finding(
        severity=Severity.warn if wanted else Severity.info,
        summary=f"{named(used)}: less than a tenth is free, and who has the rest cannot be seen in here",
        evidence=tuple(
            Evidence(path=f"memory of GPU{index}", value=f"{gib(size)} in use") for index, size in used.items()
        ),
        fix=(_WHO_ON_HOST,),
        gpus=tuple(used),
        needs_root=True,
    )


def _untold(used: dict[int, int]) -> Finding:
    sizes = dict.fromkeys(gib(size) for size in (min(used.values()), max(used.values())))
    return Finding(
        severity=Severity.info,
        summary=f"{' to '.join(sizes)} of {named(used)} are in use; by whom, the driver does not tell here",
        evidence=(
            *(Evidence(path=f"memory of GPU{index}", value=f"{gib(size)} in use") for index, size in used.items()),
            Evidence(path="nvmlDeviceGetComputeRunningProcesses", value="no answer"),
        ),
        gpus=tuple(used),
    )


_WHO = "sudo fuser -v /dev/nvidia*"
_WHO_ON_HOST = f"{_WHO}  # on the host"
_DESKTOP = re.compile(
    r"(?i)X|X(org|wayland)(\.bin)?|(gnome|kwin|plasma|ksm|kde|xfwm|xfce|cinnamon|budgie|cosmic|mate-|xdg|gdm|sddm|lightdm)"
    r"\S*|mutter\S*|sway|hyprland|weston|niri|wayfire|labwc|river|marco|muffin|picom|compiz|gamescope\S*"
)
_OLLAMA = re.compile(r"(?i)ollama([-_. ].*)?")
_DESKTOP_PROGRAM = re.compile(
    r"(?i)(firefox|chrom(e|ium)|brave|msedge|electron|code|thunderbird|steam|discord|slack|obs)([-_. ].*)?"
)


def _ended(gpu: Gpu, own: tuple[int, ...]) -> tuple[str, ...]:
    """How each process is ended: one of mgpu's by its mgpu and one of Ollama's by its service, which would start it
    again; a desktop never by force."""
    lines: list[str] = []
    for process in gpu.used_by[:8]:
        name = process.name or ""
        if process.pid in own:
            called = name or "the engine"
            lines.append(f"end {called} (process {process.pid}) with Ctrl-C in the terminal of its mgpu run")
        elif _OLLAMA.fullmatch(name):
            lines.append("ollama stop MODEL  # ollama ps lists them; or all of it: sudo systemctl stop ollama")
        elif _DESKTOP_PROGRAM.fullmatch(name):
            lines.append(f"close {name} (process {process.pid})")
        elif not _DESKTOP.fullmatch(name):
            lines.append(f"kill {process.pid}" + (f"  # {shlex.quote(name)}" if name else ""))
    if any(_DESKTOP.fullmatch(process.name or "") for process in gpu.used_by):
        lines.append("plug the monitor into the mainboard, or log out of the desktop")
    return tuple(dict.fromkeys(lines)) or ((_WHO,) if gpu.vendor == "nvidia" else ())


def _works(gpu: Gpu) -> bool:
    """Whether the card draws more than one at rest does, or computes."""
    drawn, limit = gpu.power_w, gpu.power_limit_w
    return (gpu.utilisation_percent or 0) >= BUSY_PERCENT or bool(drawn and limit and drawn > BUSY_SHARE * limit)


def _taken(gpu: Gpu, used: int, own: tuple[int, ...], *, wanted: bool, inside: bool) -> Finding | None:
    if used < _WORTH_SAYING_BYTES:
        return None
    sizes = [process.bytes for process in gpu.used_by]
    hidden = used - sum(size or 0 for size in sizes)
    # The desktop's own share and what a process will not tell are no mystery.
    unlisted = gpu.vendor == "nvidia" and hidden > GIB and None not in sizes and not gpu.display
    mysterious = unlisted and not (inside or _works(gpu))
    large = bool(gpu.total_bytes) and used > 0.1 * (gpu.total_bytes or 0)
    processes = tuple(
        Evidence(
            path=f"process {process.pid} ({process.name or 'name unknown'})",
            value="size unknown" if process.bytes is None else gib(process.bytes),
        )
        for process in gpu.used_by
    )
    what = f"{gib(hidden)} of {named([gpu.index])} are taken by no process that can be seen from here"
    return Finding(
        severity=Severity.warn if mysterious or (large and wanted) else Severity.info,
        summary=what if unlisted else f"{gib(used)} of {named([gpu.index])} are in use",
        evidence=(Evidence(path=f"memory of GPU{gpu.index}", value=f"{gib(used)} in use"), *processes[:8]),
        fix=(_WHO_ON_HOST if inside else _WHO,) if unlisted else _ended(gpu, own),
        gpus=(gpu.index,),
        needs_root=unlisted,
    )


@check("display-on-gpu", Area.memory, "B", about=(subjects.card,))
def display_on_gpu(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card that shows the desktop.

    Read: NVML's display state, or the connectors of the card in /sys/class/drm.
    Rule: info, with the memory in use.
    Why: a desktop takes 0.5 to 1.5 GiB and grows with the windows; an RTX 4090 with one leaves about 23.5 GB.
    Do: plug the monitor into the processor's own graphics, or run without a desktop.
    """
    cards = usable_cards(inspection)
    for gpu in cards:
        if gpu.display:
            used = in_use_bytes(gpu, health(inspection, gpu))
            taken = "" if used is None else f" ({gib(used)} in use)"
            yield Finding(
                severity=Severity.info,
                summary=f"{named([gpu.index])} shows the desktop{taken}",
                evidence=(Evidence(path=f"nvmlDeviceGetDisplayActive({gpu.index})", value="1"),),
                fix=(
                    "plug the monitor into the mainboard",
                    "sudo systemctl set-default multi-user.target  # instead: no desktop after the next start",
                ),
                gpus=(gpu.index,),
            )
    if unknown := [gpu.index for gpu in cards if gpu.display is None]:
        yield unread(inspection, "display state", "Display", "drm", of=unknown)


@check("ecc-vram", Area.memory, "B", about=(subjects.nvidia_card,))
def ecc_vram(inspection: Inspection, _purpose: Purpose) -> Said:
    """Error correction that takes a part of the card's memory.

    Read: NVML's ECC mode, on cards with GDDR memory (HBM has room for it beside the data; GeForce has none).
    Rule: info when it is on.
    Why: an L40S or RTX 6000 Ada has 46068 MiB with it and 49140 without, 6 % that a model may be short of.
    Do: sudo nvidia-smi -i CARD -e 0 and a reboot, if you can do without it.
    """
    unknown: list[int] = []
    for gpu in usable_cards(inspection, "nvidia"):
        kind = family(gpu.name)
        if kind.geforce or kind.hbm:
            continue
        enabled = health(inspection, gpu).ecc_enabled
        if enabled is None:
            unknown.append(gpu.index)
        elif enabled:
            yield Finding(
                severity=Severity.info,
                summary=f"ECC is on and takes about 6 % of the memory of {named([gpu.index])}",
                evidence=(Evidence(path=f"nvmlDeviceGetEccMode({gpu.index})", value="1"),),
                fix=(f"sudo nvidia-smi -i {gpu.index} -e 0", "sudo reboot"),
                gpus=(gpu.index,),
                needs_root=True,
            )
    if unknown:
        yield unread(inspection, "ECC mode", "Ecc", of=unknown)


@check("ram-swap", Area.memory, "B")
def ram_swap(inspection: Inspection, purpose: Purpose) -> Said:
    """Too little main memory for the weights, or a computer that swaps.

    Read: /proc/meminfo, memory.max of the control group, /proc/pressure/memory.
    Rule: warn when the weights are larger than the memory; warn when over a quarter of the swap is used and programs
    wait for memory over 5 % of the time (info when the waiting is unknown); info when there is no swap and the cards
    have more memory than the computer.
    Why: weights are read through main memory, by every rank of a tensor parallel engine; what does not fit is read
    again from the disk. Swap that is merely used is normal.
    Do: more memory or zram, no --no-mmap, fewer other programs.
    """
    ram, host = inspection.machine.host.ram_bytes, inspection.host
    if ram is None:
        yield unread(inspection, "the computer's memory", "meminfo")
    weights = purpose.weights_bytes
    if ram is not None and weights is not None and weights > ram:
        yield Finding(
            severity=Severity.warn,
            summary=f"weights of {gib(weights)} pass through {gib(ram)} of memory and are read twice",
            evidence=_memory(inspection),
            fix=("keep mmap on (no --no-mmap), or add memory",),
        )
    total, free = host.swap_total_bytes, host.swap_free_bytes
    if total is None or (total > 0 and free is None):
        yield unread(inspection, "swap", "meminfo", "swap")
        return
    pressure = host.memory_pressure_percent
    used = total - (free or 0)
    if used > 0.25 * total and (pressure is None or pressure > _PRESSED_PERCENT):
        waiting = "" if pressure is None else ", and programs wait for memory"
        yield Finding(
            severity=Severity.info if pressure is None else Severity.warn,
            summary=f"{gib(used)} of {gib(total)} of swap are in use{waiting}",
            evidence=_memory(inspection),
            fix=("ps aux --sort=-rss | head  # shows who has the memory",),
        )
    vram = sum(gpu.total_bytes or 0 for gpu in usable_cards(inspection))
    if total == 0 and ram is not None and ram < vram:
        yield Finding(
            severity=Severity.info,
            summary=f"no swap, and {gib(ram)} of memory for cards of {gib(vram)}",
            evidence=_memory(inspection),
            fix=("sudo fallocate -l 32G /swapfile && sudo chmod 600 /swapfile", "sudo mkswap /swapfile", _SWAPON),
            needs_root=True,
        )


_SWAPON = "sudo swapon /swapfile"


def _memory(inspection: Inspection) -> tuple[Evidence, ...]:
    facts = (
        ("/proc/meminfo MemTotal", inspection.machine.host.ram_bytes),
        ("/proc/meminfo SwapTotal", inspection.host.swap_total_bytes),
        ("/proc/meminfo SwapFree", inspection.host.swap_free_bytes),
        ("memory.max", inspection.host.memory_limit_bytes),
    )
    evidence = tuple(Evidence(path=path, value=gib(value)) for path, value in facts if value is not None)
    pressure = inspection.host.memory_pressure_percent
    return evidence + (() if pressure is None else (Evidence(path="/proc/pressure/memory", value=f"{pressure:.1f} %"),))


@check("disk-models", Area.memory, "B")
def disk_models(inspection: Inspection, purpose: Purpose) -> Said:
    """A folder for models on a disk that is full, far away, or turns.

    Read: statvfs of the folders that models are kept in, the file system's type, /sys/block/*/queue/rotational.
    Rule: fail when less is free than 1.1 times the weights that are still to be fetched, in the folder that they are
    fetched to (Ollama's for Ollama, else Hugging Face's); warn under 20 GiB, on a network file system, or on a disk
    that turns (info in a container, nothing in a virtual machine: its disks say so at random).
    Why: every start reads all weights: 40 GB take 10 s from NVMe, 4 minutes from a hard disk.
    Do: point HF_HOME, OLLAMA_MODELS or mgpu's folder to another disk.
    """
    disks = _disks(inspection, purpose)
    if not disks:
        yield unread(inspection, "the folders that models are kept in", "statvfs", "disk", "mounts")
    fetched = (purpose.missing_bytes or 0) * 11 // 10
    unknown: list[str] = []
    for disk in disks:
        needed = fetched if _FETCHED_TO.get(purpose.backend or "", "hugging") in disk.role.lower() else 0
        if disk.free_bytes is None:
            unknown.append(disk.path)
        elif disk.free_bytes < max(needed, _LOW_DISK_BYTES):
            short = disk.free_bytes < needed
            yield Finding(
                severity=Severity.fail if short else Severity.warn,
                summary=f"{gib(disk.free_bytes)} are free for the {disk.role[:30]}"
                + (f", what is to be fetched needs {gib(needed)}" if short else ""),
                evidence=(Evidence(path=disk.path, value=f"{gib(disk.free_bytes)} free"),),
                fix=(_move(disk), f"du -xsh {shlex.quote(disk.path)}/* | sort -h | tail"),
            )
        yield from _slow(disk, inspection)
    if unknown:
        yield unread(inspection, f"free space of {', '.join(unknown)}", *unknown)


# Words of the roles of folders: the ones that an engine reads models from, and the one that they are fetched to.
_FOLDERS = {"vllm": ("hugging",), "ollama": ("ollama",), "llama.cpp": ("hugging", "mgpu")}
_FETCHED_TO = {"ollama": "ollama"}


def _disks(inspection: Inspection, purpose: Purpose) -> tuple[DiskSpace, ...]:
    """One folder for each disk, of those that the named engine keeps models in."""
    own = _FOLDERS.get(purpose.backend or "")
    folders = [disk for disk in inspection.host.disks if not own or any(word in disk.role.lower() for word in own)]
    return tuple({(d.free_bytes, d.total_bytes, d.file_system, d.rotational): d for d in reversed(folders)}.values())


def _slow(disk: DiskSpace, inspection: Inspection) -> Said:
    kind = (disk.file_system or "").lower()
    remote = kind.startswith(_NETWORK_FILE_SYSTEMS)
    if not remote and not disk.rotational:
        return
    if not remote and inspection.machine.host.virtualisation != "none":
        return
    yield Finding(
        severity=Severity.info if in_container(inspection) and not remote else Severity.warn,
        summary=f"the {disk.role[:40]} is on {'the network (' + kind[:12] + ')' if remote else 'a disk that turns'}",
        evidence=(Evidence(path=disk.path, value=kind if remote else "rotational = 1"),),
        fix=(_move(disk),),
    )


def _move(disk: DiskSpace) -> str:
    role = disk.role.lower()
    for word, variable in (("hugging", "HF_HOME"), ("ollama", "OLLAMA_MODELS")):
        if word in role:
            return f"export {variable}=/path/on/another/disk"
    return f"move {shlex.quote(disk.path)} to another disk, and put a link in its place"


CHECKS: tuple[Check, ...] = (vram_in_use, display_on_gpu, ecc_vram, ram_swap, disk_models)
