"""Checks of memory: of the cards, of the computer, and of the disks that models come from."""

from __future__ import annotations

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import BUSY_PERCENT, BUSY_SHARE, in_use_bytes, named, unread, usable_cards
from mgpu.machine.inspection import DiskSpace, Inspection
from mgpu.machine.layout import health, in_container
from mgpu.machine.snapshot import Gpu
from mgpu.units import GIB, MIB, gib

_WORTH_SAYING_BYTES = 256 * MIB
_LOW_DISK_BYTES = 20 * GIB
_PRESSED_PERCENT = 5.0
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "ceph", "glusterfs")
# Cards with HBM keep ECC's bits beside the data: it costs them no capacity.
_HBM = ("A100", "A30", "H100", "H200", "H800", "B200", "B300", "GH200", "GB200", "V100", "P100")


@check("vram-in-use", Area.memory, "B")
def vram_in_use(inspection: Inspection, purpose: Purpose) -> Said:
    """Memory of a card that is taken before anything starts.

    Read: the card's total and free memory without what the driver reserves, and the processes that NVML lists.
    Rule: warn when over 1 GiB is taken that no listed process accounts for, of a card at rest (a zombie); info in
    a container and of a card that works, where somebody has it who cannot be seen from here. Warn above 10 % in use
    when an engine is named that is to have the cards, else info from 256 MiB.
    Why: vLLM ends at once when less is free than its share of the card, the most common failure on local machines.
    Do: end the processes that are named; sudo fuser -v /dev/nvidia* finds those that NVML does not list.
    """
    unknown: list[int] = []
    for gpu in usable_cards(inspection):
        used = in_use_bytes(gpu, health(inspection, gpu))
        if used is None:
            unknown.append(gpu.index)
            continue
        wanted = purpose.backend is not None or purpose.weights_bytes is not None
        finding = _taken(gpu, used, wanted=wanted, elsewhere=in_container(inspection) or _works(gpu))
        if finding:
            yield finding
    if unknown:
        yield unread(inspection, "memory in use", "MemoryInfo", "mem_info", of=unknown)


def _works(gpu: Gpu) -> bool:
    """Whether the card draws more than one at rest does, or computes."""
    drawn, limit = gpu.power_w, gpu.power_limit_w
    return (gpu.utilisation_percent or 0) >= BUSY_PERCENT or bool(drawn and limit and drawn > BUSY_SHARE * limit)


def _taken(gpu: Gpu, used: int, *, wanted: bool, elsewhere: bool) -> Finding | None:
    if used < _WORTH_SAYING_BYTES:
        return None
    sizes = [process.bytes for process in gpu.used_by]
    hidden = used - sum(size or 0 for size in sizes)
    # The desktop's own share and what a process will not tell are no mystery.
    unlisted = gpu.vendor == "nvidia" and hidden > GIB and None not in sizes and not gpu.display
    mysterious = unlisted and not elsewhere
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
        fix=("sudo fuser -v /dev/nvidia*",) if unlisted else tuple(f"kill {each.pid}" for each in gpu.used_by[:8]),
        gpus=(gpu.index,),
        needs_root=unlisted,
    )


@check("display-on-gpu", Area.memory, "B")
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


@check("ecc-vram", Area.memory, "B")
def ecc_vram(inspection: Inspection, _purpose: Purpose) -> Said:
    """Error correction that takes a part of the card's memory.

    Read: NVML's ECC mode, on cards with GDDR memory (HBM has room for it beside the data; GeForce has none).
    Rule: info when it is on.
    Why: an L40S or RTX 6000 Ada has 46068 MiB with it and 49140 without, 6 % that a model may be short of.
    Do: sudo nvidia-smi -i CARD -e 0 and a reboot, if you can do without it.
    """
    unknown: list[int] = []
    for gpu in usable_cards(inspection, "nvidia"):
        if any(word in gpu.name for word in ("GeForce", "TITAN", *_HBM)):
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
    Rule: fail when less is free than 1.1 times the weights that the named engine still has to fetch; warn under 20 GiB,
    on a network file system, or on a disk that turns (info in a container, nothing in a virtual machine: its disks say
    so at random).
    Why: every start reads all weights: 40 GB take 10 s from NVMe, 4 minutes from a hard disk.
    Do: point HF_HOME, OLLAMA_MODELS or mgpu's folder to another disk.
    """
    disks = _disks(inspection, purpose)
    if not disks:
        yield unread(inspection, "the folders that models are kept in", "statvfs", "disk", "mounts")
    needed = 0 if purpose.weights_bytes is None else purpose.weights_bytes * 11 // 10
    unknown: list[str] = []
    for disk in disks:
        if disk.free_bytes is None:
            unknown.append(disk.path)
        elif disk.free_bytes < max(needed, _LOW_DISK_BYTES):
            short = disk.free_bytes < needed
            yield Finding(
                severity=Severity.fail if short else Severity.warn,
                summary=f"{gib(disk.free_bytes)} are free for the {disk.role[:30]}"
                + (f", the model needs {gib(needed)}" if short else ""),
                evidence=(Evidence(path=disk.path, value=f"{gib(disk.free_bytes)} free"),),
                fix=(_move(disk), f"du -xsh {disk.path}/* | sort -h | tail"),
            )
        yield from _slow(disk, inspection)
    if unknown:
        yield unread(inspection, f"free space of {', '.join(unknown)}", *unknown)


def _disks(inspection: Inspection, purpose: Purpose) -> tuple[DiskSpace, ...]:
    """One folder for each disk, of those that the named engine keeps models in."""
    own = {"vllm": ("hugging",), "ollama": ("ollama",)}.get(purpose.backend or "")
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
    return f"move {disk.path} to another disk, and put a link in its place"


CHECKS: tuple[Check, ...] = (vram_in_use, display_on_gpu, ecc_vram, ram_swap, disk_models)
