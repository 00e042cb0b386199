"""Checks of each NVIDIA card: lost, failing, or set up so that engines cannot use it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import named, nvidia_cards, unread
from mgpu.machine.families import family
from mgpu.machine.inspection import Inspection, LogEntry
from mgpu.machine.layout import nvidia_on_bus, pairs
from mgpu.machine.snapshot import Gpu
from mgpu.units import MIB, gib, seconds

_DAY_S = 86_400
_NO_ANSWER = -1  # as the inspection calls a driver that hangs


@check("gpu-lost", Area.gpus, "A", about=(subjects.nvidia,))
def gpu_lost(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card has fallen off the bus, or must be reset before it answers again.

    Read: NVML's answer to any question about the card: 15, lost; 16, needs a reset; 4, no permission; 8, no power
    cable.
    Rule: fail.
    Why: every model that is cut over it dies. Power supplies that trip on peaks, risers, an unclean gen 5 link, and
    heat are the causes of a loss; OCuLink and external boxes are prone to it.
    Do: turn the power off (a reboot often is not enough), reseat card and cable, then cap power and clocks to see
    whether it stays; another refusal has its own remedy.
    """
    if inspection.driver.nvml_error == _NO_ANSWER:  # driver-not-loaded says it of all cards
        return
    health = {card.gpu: card.nvml_error for card in inspection.cards}
    addresses = {card.gpu: card.bus_id for card in inspection.cards}
    for gpu in inspection.machine.gpus:
        error = health.get(gpu.index)
        if gpu.vendor != "nvidia" or not (error or gpu.problem):
            continue
        address = gpu.bus_id or addresses.get(gpu.index)
        name, where = (shlex.quote(address), f" at {address}") if address else (str(gpu.index), "")
        said, _, advice = (gpu.problem or f"does not answer (NVML error {error})").partition(": ")
        fix: tuple[str, ...] = (advice or "sudo dmesg | grep NVRM  # names the reason",)
        if error == 16:
            said, fix = "needs a reset", (f"sudo nvidia-smi -r -i {gpu.index}",)
        elif error == 15:
            said, fix = (
                "fell off the bus",
                (
                    *((f"lspci -vs {shlex.quote(address)}  # which card, and its slot",) if address else ()),
                    "turn the machine off at its power supply, reseat the card and its power cables",
                    f"sudo nvidia-smi -i {name} -lgc 300,1500  # after it is back: a test with less power",
                    "if it is lost again, BIOS: set the slot's PCIe generation one lower",
                ),
            )
        log = [entry for entry in inspection.host.log if entry.kind == "bus" and entry.bus_id in (None, gpu.bus_id)]
        yield Finding(
            severity=Severity.fail,
            summary=f"GPU{gpu.index}{where[:20]}: {said}"[:90],
            evidence=(
                Evidence(
                    path=f"nvml GPU{gpu.index}",
                    value={15: "15 (lost)", 16: "16 (reset required)", 0: (gpu.problem or "")[:120]}.get(
                        error or 0, f"error {error}"
                    ),
                ),
                *(Evidence(path="kernel log", value=entry.text[:120]) for entry in log[-1:]),
            ),
            fix=fix,
            gpus=(gpu.index,),
        )


# NVIDIA's catalogue of Xid errors, those that local rigs meet: what each means, in a few words.
_XID_FAILS = {
    48: "uncorrectable memory error",
    54: "its power cables are not attached",
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
_XID_OF_PROGRAMS = (13, 31, 32, 43, 45, 68, 69)
_XID_WARNS = {
    63: "memory row to be remapped",
    92: "many corrected memory errors",
    94: "contained memory error",
    109: "context switch timeout",
}


@check("xid-recent", Area.gpus, "A", about=(subjects.nvidia,))
def xid_recent(inspection: Inspection, _purpose: Purpose) -> Said:
    """The driver logged hardware errors (Xid) since the machine started.

    Read: the kernel's log (root, or membership of adm or systemd-journal).
    Rule: fail for codes of failing hardware, such as 48, 54, 62, 64, 74, 79, 95, 119, 120, 140, 143, 154 and 158; warn
    for 63, 92, 94 and 109; info for all others, for a 154 that ends with "None", since the recovery is done, and for
    what is older than a day or of unknown age.
    Why: 13, 31, 32, 43, 45, 68 and 69 come from programs that crashed; the others from the card, its power or its slot.
    Do: reset the card or reboot; where it returns, reseat the card and its cables, and have it replaced in the end.
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
        severity, meaning, fixed = _xid_meaning(number, entries[-1])
        if age_s is None or age_s > _DAY_S:
            severity = Severity.info
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
            fix=() if fixed else _xid_fix(number, gpus),
            gpus=gpus,
        )


def _xid_meaning(number: int, last: LogEntry) -> tuple[Severity, str, bool]:
    """The severity and meaning of an Xid, and whether nothing is left to do."""
    if number == 154 and re.search(r"\bto 0x0\b", last.text):
        return Severity.info, "the recovery that was asked for is done", True
    if number in _XID_FAILS:
        return Severity.fail, _XID_FAILS[number], False
    if number in _XID_WARNS:
        return Severity.warn, _XID_WARNS[number], False
    return Severity.info, "a program's fault" if number in _XID_OF_PROGRAMS else "meaning unknown here", True


def _xid_fix(number: int, gpus: tuple[int, ...]) -> tuple[str, ...]:
    reset = f"sudo nvidia-smi -r -i {gpus[0]}" if gpus else "sudo nvidia-smi -r"
    if number == 79:
        return ("turn the machine off at its power supply, reseat the card, its riser and its power cables",)
    if number == 54:
        return ("turn the machine off and attach all power cables of the card",)
    if number in (119, 120):
        return (f"{reset}  # or: sudo reboot", "if it returns: update the driver")
    if number == 74:
        return ("reseat the NVLink bridge", "nvidia-smi nvlink -e", reset)
    if number in (48, 63, 64, 92, 94, 95, 140):
        return (f"{reset}  # when idle: bad rows are replaced then", "if it returns: have the card replaced")
    if number in _XID_FAILS or number in _XID_WARNS:
        return (reset, "sudo reboot  # if it returns")
    return ()


@check("memory-remap", Area.gpus, "A", about=(subjects.nvidia_card,))
def memory_remap(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card's memory has failed, or rows of it wait to be replaced.

    Read: NVML's remapped rows (from Ampere on), retired pages (before) and the counts of uncorrectable ECC errors.
    GeForce cards do not count.
    Rule: fail for a failed replacement; warn for one that waits, or an uncorrectable error since the driver started;
    info for errors of the card's past.
    Why: results may be wrong until a reset.
    Do: reset the card when it is idle; return one whose memory could not be replaced.
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
        elif all(fact is None for fact in facts) and not family(gpu.name).geforce:
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


@check("recovery-action", Area.gpus, "A", about=(subjects.nvidia_card,))
def recovery_action(inspection: Inspection, _purpose: Purpose) -> Said:
    """The driver itself asks for a reset or a reboot.

    Read: NVML's field 230, one number that sums up what an Xid 154 says; older drivers do not have it.
    Rule: fail for any but 0: 1 is a reset of the card, 2 and 7 a reboot, 3 and 4 that work be stopped first, 5 IMEX, 6
    a reset of the bus.
    Why: until then the card refuses work, or returns errors.
    Do: what the number says; the finding has the command.
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


@check("mig-enabled", Area.gpus, "A", about=(subjects.nvidia_card,))
def mig_enabled(inspection: Inspection, purpose: Purpose) -> Said:
    """A card is cut into MIG instances, or will be after its next reset.

    Read: NVML's MIG mode, now and pending. Cards without MIG are passed over.
    Rule: fail where one model is to be cut over several cards (--tensor-parallel), else info; warn for a mode that
    differs from the pending one.
    Why: instances reach each other neither by peer access nor by NVLink.
    Do: sudo nvidia-smi -mig 0, then a reset of the card.
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
    unknown = [gpu.index for gpu, _ in nvidia_cards(inspection) if gpu.mig is None and family(gpu.name).mig]
    if unknown:
        yield unread(inspection, "the MIG mode", "Mig", of=unknown)


@check("compute-mode", Area.gpus, "A", about=(subjects.nvidia_card,))
def compute_mode(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card is closed to programs, or takes only one at a time.

    Read: NVML's compute mode.
    Rule: fail at 2, which prohibits all computing; warn at 1 and 3, which let one process in.
    Why: with Ollama and vLLM on one card, the second is told "device unavailable".
    Do: sudo nvidia-smi -c 0.
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


_WITHOUT_RESIZABLE_BAR = ("5.", "6.", "7.")  # it came with Ampere


@check("bar1-small", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def bar1_small(inspection: Inspection, _purpose: Purpose) -> Said:
    """The window through which others reach a card's memory (BAR1) is smaller than that memory.

    Read: NVML's size of BAR1, which is 256 MiB with Resizable BAR off. A virtual machine shows a window that says
    nothing.
    Rule: info for RTX cards; warn where a patched driver grants GeForce cards peer access all the same, and for the
    datacentre cards whose window covers the memory. Other professional cards have peer access with 256 MiB (an RTX
    A6000 is sold so), and whatever is older than Ampere, a T4 too, has no more for ever.
    Why: it costs no tokens by itself; it is peers that write through that window.
    Do: turn on Above 4G Decoding and Re-Size BAR in the BIOS; old RTX 3090 need a newer VBIOS as well.
    """
    granted = {index for pair in pairs(inspection) if pair.granted and not pair.nvlink for index in pair.indices}
    unknown, small, short = [], [], []
    for gpu, _ in nvidia_cards(inspection):
        kind = family(gpu.name)
        if gpu.bar1_bytes is None or gpu.total_bytes is None:
            unknown.append(gpu.index)
        elif gpu.bar1_bytes >= gpu.total_bytes:
            continue
        elif kind.whole_window:
            short.append(gpu)
        elif (gpu.compute_capability or "").startswith(_WITHOUT_RESIZABLE_BAR):
            continue
        elif gpu.index in granted:
            if kind.geforce:
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


CHECKS: tuple[Check, ...] = (
    gpu_lost,
    xid_recent,
    memory_remap,
    recovery_action,
    mig_enabled,
    compute_mode,
    bar1_small,
)
