"""Checks of each NVIDIA card: lost, failing, or set up so that engines cannot use it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, nvidia_cards, unread
from mgpu.machine.inspection import Inspection, LogEntry
from mgpu.machine.layout import is_geforce, is_virtual, nvidia_on_bus, pairs
from mgpu.machine.snapshot import Gpu
from mgpu.units import MIB, gib, seconds

_DAY_S = 86_400


@check("gpu-lost", Area.gpus, "A")
def gpu_lost(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card has fallen off the bus, or must be reset before it answers again.

    Read from NVML's answer to any question about the card: 15, lost; 16, needs a reset. A failure: every model that is
    cut over it dies. Power supplies that trip on peaks, risers, an unclean gen 5 link, and heat are the causes;
    OCuLink and external boxes are prone to it. A reboot often is not enough: turn the power off, reseat card and cable,
    then cap power and clocks to see whether it stays.
    """
    health = {card.gpu: card.nvml_error for card in inspection.cards}
    for gpu in inspection.machine.gpus:
        error = health.get(gpu.index)
        if gpu.vendor != "nvidia" or not (error or gpu.problem):
            continue
        reset = error == 16
        said = (
            "needs a reset" if reset else f"does not answer{': it fell off the bus' if error in (15, None, 0) else ''}"
        )
        log = [entry for entry in inspection.host.log if entry.kind == "bus" and entry.bus_id in (None, gpu.bus_id)]
        yield Finding(
            severity=Severity.fail,
            summary=f"GPU{gpu.index} {said}",
            evidence=(
                Evidence(
                    path=f"nvml GPU{gpu.index}",
                    value={15: "15 (lost)", 16: "16 (reset required)", 0: (gpu.problem or "")[:120]}.get(
                        error or 0, f"error {error}"
                    ),
                ),
                *(Evidence(path="kernel log", value=entry.text[:120]) for entry in log[-1:]),
            ),
            fix=(
                (f"sudo nvidia-smi -r -i {gpu.index}",)
                if reset
                else (
                    "turn the machine off at its power supply, reseat the card and its power cables",
                    f"sudo nvidia-smi -i {gpu.index} -lgc 300,1500  # then a test with less power",
                    "BIOS: set the slot's PCIe generation one lower",
                )
            ),
            gpus=(gpu.index,),
        )


# NVIDIA's catalogue of Xid errors, those that local rigs meet: what each means, in a few words.
_XID_FAILS = {
    48: "uncorrectable memory error",
    62: "internal micro-controller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
    140: "unrecovered memory error",
    143: "GPU initialisation error",
    154: "the driver asks for a recovery",
    158: "GPU fatal timeout",
}
_XID_WARNS = {
    63: "memory row to be remapped",
    92: "many corrected memory errors",
    94: "contained memory error",
    109: "context switch timeout",
}


@check("xid-recent", Area.gpus, "A")
def xid_recent(inspection: Inspection, _purpose: Purpose) -> Said:
    """The driver logged hardware errors (Xid) since the machine started.

    Read from the kernel's log (root, or membership of adm or systemd-journal). Codes of failing hardware, such as 48,
    62, 64, 74, 79, 95, 119, 120, 140, 143, 154 and 158, are failures; 63, 92, 94 and 109 are warnings; all others
    (13, 31, 43, 45 and their like) come from programs that crashed and are only said. What is older than a day, or of
    unknown age, never colours: it is said with its age.
    """
    log = inspection.host.log
    present = nvidia_on_bus(inspection) or any(gpu.vendor == "nvidia" for gpu in inspection.machine.gpus)
    if present and not inspection.host.log_known:
        yield unread(inspection, "the kernel's log", "kmsg")
    seen: dict[tuple[int, str | None], list[LogEntry]] = {}
    for entry in log:
        if entry.kind == "xid" and entry.number is not None:
            seen.setdefault((entry.number, entry.bus_id), []).append(entry)
    for (number, bus_id), entries in seen.items():
        ages = [entry.age_s for entry in entries if entry.age_s is not None]
        age_s = min(ages, default=None)
        severity = Severity.fail if number in _XID_FAILS else Severity.warn if number in _XID_WARNS else Severity.info
        if age_s is None or age_s > _DAY_S:
            severity = Severity.info
        meaning = _XID_FAILS.get(number) or _XID_WARNS.get(number) or "a program's fault"
        gpus = tuple(gpu.index for gpu in inspection.machine.gpus if bus_id and gpu.bus_id == bus_id)
        card = named(gpus) if gpus else "a card"
        when = f"{seconds(max(age_s, 0))} ago" if age_s is not None else "at an unknown time"
        yield Finding(
            severity=severity,
            summary=f"Xid {number} on {card} {when}: {meaning}"[:90],
            evidence=(
                Evidence(path="kernel log", value=entries[-1].text[:120]),
                *((Evidence(path="times since boot", value=str(len(entries))),) if len(entries) > 1 else ()),
            ),
            fix=_xid_fix(number, gpus),
            gpus=gpus,
        )


def _xid_fix(number: int, gpus: tuple[int, ...]) -> tuple[str, ...]:
    reset = f"sudo nvidia-smi -r -i {gpus[0]}" if gpus else "sudo nvidia-smi -r"
    if number == 79:
        return ("turn the machine off at its power supply, reseat the card, its riser and its power cables",)
    if number in (119, 120):
        return (f"{reset}  # or: sudo reboot", "if it returns: update the driver")
    if number == 74:
        return ("reseat the NVLink bridge", "nvidia-smi nvlink -e", reset)
    if number in (48, 63, 64, 92, 94, 95, 140):
        return (f"{reset}  # when idle: bad rows are replaced then", "if it returns: have the card replaced")
    if number in _XID_FAILS or number in _XID_WARNS:
        return (reset, "sudo reboot  # if it returns")
    return ()


@check("memory-remap", Area.gpus, "A")
def memory_remap(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card's memory has failed, or rows of it wait to be replaced.

    Read from NVML's remapped rows (from Ampere on), retired pages (before) and the counts of uncorrectable ECC errors.
    A failed replacement is a failure: return the card. One that waits, or an uncorrectable error since the driver
    started, is a warning: results may be wrong until a reset. Errors of the card's past are only said. GeForce cards
    do not count.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        facts = (card.remap_failed, card.remap_pending, card.retired_pages_pending, card.ecc_uncorrected_volatile)
        reset = f"sudo nvidia-smi -r -i {gpu.index}  # when idle"
        if card.remap_failed:
            yield _about(
                gpu,
                Severity.fail,
                "a failing memory row could not be replaced: return the card",
                (("remapped rows: failure", "yes"),),
                ("have the card replaced (RMA)",),
            )
        elif card.remap_pending or card.retired_pages_pending:
            yield _about(
                gpu,
                Severity.warn,
                "failing memory waits for a reset to be replaced",
                (("remap or retirement pending", "yes"),),
                (reset,),
            )
        elif card.ecc_uncorrected_volatile:
            yield _about(
                gpu,
                Severity.warn,
                "uncorrectable memory errors since the driver started",
                (("ECC uncorrectable, volatile", str(card.ecc_uncorrected_volatile)),),
                (reset,),
            )
        elif card.ecc_uncorrected_aggregate:
            yield _about(
                gpu,
                Severity.info,
                "had uncorrectable memory errors in its past",
                (("ECC uncorrectable, aggregate", str(card.ecc_uncorrected_aggregate)),),
                (),
            )
        elif all(fact is None for fact in facts) and not is_geforce(gpu):
            unknown.append(gpu.index)
    if unknown:
        yield unread(inspection, "memory errors", "Remapped", "Ecc", "Retired", of=unknown)


_RECOVERY = {
    1: ("a reset of the card", "sudo nvidia-smi -r -i {}"),
    2: ("a reboot", "sudo reboot"),
    3: (
        "peer-to-peer work to be stopped",
        "nvidia-smi -q -i {}  # once all engines that use several cards are stopped",
    ),
    4: ("all work to be stopped, and a reset", "sudo nvidia-smi -r -i {}  # once all engines are stopped"),
    5: ("the IMEX domain to be recovered", "sudo systemctl restart nvidia-imex"),
    6: ("a reset of the bus", "sudo reboot"),
    7: ("a reboot of the system", "sudo reboot"),
}


@check("recovery-action", Area.gpus, "A")
def recovery_action(inspection: Inspection, _purpose: Purpose) -> Said:
    """The driver itself asks for a reset or a reboot.

    Read from NVML's field 230, one number that sums up what an Xid 154 says: 0 is none; 1 a reset of the card, 2 and 7
    a reboot, 3 and 4 that work be stopped first, 5 IMEX, 6 a reset of the bus. Any but 0 is a failure: do what it says.
    Older drivers do not have the field.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        if card.recovery_action is None:
            unknown.append(gpu.index)
        elif card.recovery_action != 0:
            asked, command = _RECOVERY.get(card.recovery_action, ("a recovery that is unknown here", "sudo reboot"))
            yield _about(
                gpu,
                Severity.fail,
                f"the driver asks for {asked}",
                (("NVML field 230", str(card.recovery_action)),),
                (command.format(gpu.index),),
            )
    if unknown:
        yield unread(inspection, "the recovery action", "230", "RECOVERY", of=unknown)


@check("mig-enabled", Area.gpus, "A")
def mig_enabled(inspection: Inspection, purpose: Purpose) -> Said:
    """A card is cut into MIG instances, or will be after its next reset.

    Read from NVML's MIG mode, now and pending. Instances reach each other neither by peer access nor by NVLink, so a
    card in MIG mode is a failure where one model is to be cut over several cards (--tensor-parallel), and is only said
    otherwise. A mode that differs from the pending one is a warning. Cards without MIG are passed over.
    """
    cutting = (purpose.tensor_parallel or 1) > 1
    for gpu, card in nvidia_cards(inspection):
        seen = (("MIG mode", _on_off(gpu.mig)), ("MIG mode, pending", _on_off(card.mig_pending)))
        off = (f"sudo nvidia-smi -mig 0 -i {gpu.index}", f"sudo nvidia-smi -r -i {gpu.index}")
        if gpu.mig is not None and card.mig_pending is not None and gpu.mig is not card.mig_pending:
            yield _about(gpu, Severity.warn, f"MIG will be {_on_off(card.mig_pending)} after a reset", seen, off[1:])
        elif gpu.mig:
            severity = Severity.fail if cutting else Severity.info
            yield _about(gpu, severity, "is in MIG mode: a model cannot be cut over it and others", seen, off)
    unknown = [gpu.index for gpu, _ in nvidia_cards(inspection) if gpu.mig is None and _has_mig(gpu)]
    if unknown:
        yield unread(inspection, "the MIG mode", "Mig", of=unknown)


@check("compute-mode", Area.gpus, "A")
def compute_mode(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card is closed to programs, or takes only one at a time.

    Read from NVML's compute mode: 0 is shared, 2 prohibits all computing (a failure), 1 and 3 let one process in (a
    warning: with Ollama and vLLM on one card, the second is told "device unavailable"). Set it to 0.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        fix = (f"sudo nvidia-smi -c 0 -i {gpu.index}",)
        if card.compute_mode is None:
            unknown.append(gpu.index)
        elif card.compute_mode == 2:
            yield _about(gpu, Severity.fail, "is closed to all programs", (("compute mode", "2 (prohibited)"),), fix)
        elif card.compute_mode != 0:
            yield _about(
                gpu,
                Severity.warn,
                "takes only one program at a time",
                (("compute mode", f"{card.compute_mode} (exclusive)"),),
                fix,
            )
    if unknown:
        yield unread(inspection, "the compute mode", "ComputeMode", of=unknown)


@check("bar1-small", Area.pcie, "B")
def bar1_small(inspection: Inspection, _purpose: Purpose) -> Said:
    """The window through which others reach a card's memory (BAR1) is smaller than that memory.

    Read from NVML. With Resizable BAR off it is 256 MiB. That costs no tokens by itself, so for RTX cards it
    is only said; it is a warning where peer access is granted all the same, as by a patched driver, and for datacentre
    cards, whose window covers the memory. Turing cards and a T4 have 256 MiB for ever; a virtual machine shows a window
    that says nothing. Turn on Above 4G Decoding and Re-Size BAR in the BIOS; old RTX 3090 need a newer VBIOS as well.
    """
    if is_virtual(inspection):
        return
    granted = {index for pair in pairs(inspection) if pair.granted and not pair.nvlink for index in pair.indices}
    unknown, small, short = [], [], []
    for gpu, _ in nvidia_cards(inspection):
        if gpu.bar1_bytes is None or gpu.total_bytes is None:
            unknown.append(gpu.index)
        elif gpu.bar1_bytes >= gpu.total_bytes or (gpu.compute_capability or "").startswith(("5.", "7.5")):
            continue
        elif gpu.index in granted or _is_datacentre(gpu):
            short.append(gpu)
        elif gpu.bar1_bytes <= 256 * MIB:
            small.append(gpu)
    for group, severity, summary in (
        (short, Severity.warn, "can be reached only through a window smaller than its memory"),
        (small, Severity.info, "Resizable BAR is off: costs no speed, only peer access needs it"),
    ):
        if group:
            yield Finding(
                severity=severity,
                summary=f"{named(gpu.index for gpu in group)}: {summary}",
                evidence=tuple(
                    Evidence(
                        path=f"GPU{gpu.index} BAR1", value=f"{gib(gpu.bar1_bytes or 0)} of {gib(gpu.total_bytes or 0)}"
                    )
                    for gpu in group
                ),
                fix=("BIOS: enable Above 4G Decoding and Re-Size BAR",),
                gpus=tuple(gpu.index for gpu in group),
            )
    if unknown:
        yield unread(inspection, "the size of BAR1", "BAR1", of=unknown)


def _about(
    gpu: Gpu, severity: Severity, summary: str, seen: Iterable[tuple[str, str]], fix: tuple[str, ...]
) -> Finding:
    """A finding about one card."""
    return Finding(
        severity=severity,
        summary=f"GPU{gpu.index} {summary}" if not summary.startswith("the driver") else f"GPU{gpu.index}: {summary}",
        evidence=tuple(Evidence(path=f"GPU{gpu.index} {path}", value=value) for path, value in seen),
        fix=fix,
        gpus=(gpu.index,),
    )


def _on_off(value: bool | None) -> str:
    return {True: "on", False: "off", None: "unknown"}[value]


def _is_datacentre(gpu: Gpu) -> bool:
    return re.search(r"\b(Tesla|[ABHV][1-9]\d{2}|A[1-9]\d?|L40S?|L4|T4|P[14]00?)\b", gpu.name) is not None


def _has_mig(gpu: Gpu) -> bool:
    return re.search(r"\b(A100|A30|H[128]00|B[123]00)\b", gpu.name) is not None


CHECKS: tuple[Check, ...] = (
    gpu_lost,
    xid_recent,
    memory_remap,
    recovery_action,
    mig_enabled,
    compute_mode,
    bar1_small,
)
