"""Checks of each card's PCIe link: its width against what the slot offers, its speed under load, its errors."""

from __future__ import annotations

import math

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.facts import at_work, is_busy, keeps_link_speed, nvidia_cards, unread
from mgpu.doctor.pcie_rates import TRANSFERS_GT_S
from mgpu.doctor.visibility import cuda_sees_only
from mgpu.machine.inspection import CardHealth, Inspection, PciDevice
from mgpu.machine.layout import bridges_above, device, is_virtual
from mgpu.machine.snapshot import Gpu
from mgpu.units import seconds

_RISER_LANES = 2


@check("pcie-width-degraded", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def pcie_width_degraded(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card runs with fewer lanes than both it and its slot have.

    Read: the lanes in use, and the lesser of the card's own and the slot's, which is what the bridge above it offers;
    the card itself says 16 in any slot.
    Rule: warn for fewer, fail for a quarter or less under load. A slot that is wired for fewer lanes is no fault.
    Why: dust on the contacts, a riser, a bent pin, or an M.2 disk that shares the lanes.
    Do: reseat the card and its riser, clean the contacts, and see what else uses the slot's lanes.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        width, slot = _width(gpu, card), gpu.pcie.slot_width
        if width is not None and width <= _RISER_LANES:
            continue  # pcie-x1-riser says it
        if width is None or gpu.pcie.width_max is None or (slot is None and width < gpu.pcie.width_max):
            unknown.append(gpu.index)
            continue
        possible = min(gpu.pcie.width_max, slot or gpu.pcie.width_max)
        if width >= possible:
            continue
        severe = width * 4 <= possible and _loaded_gen(gpu, card) is not None
        yield Finding(
            severity=Severity.fail if severe else Severity.warn,
            summary=f"GPU{gpu.index} runs on {width} lanes, its slot has {possible}",
            evidence=(
                Evidence(path=f"{_path(gpu)}/current_link_width", value=str(width)),
                Evidence(path=f"{_path(gpu)}/../max_link_width", value=str(slot or "unknown")),
            ),
            fix=(
                "turn the machine off, reseat the card, clean its contacts, try without the riser",
                "BIOS: set the slot to x16 (bifurcation); remove M.2 disks that share its lanes",
            ),
            gpus=(gpu.index,),
        )
    if unknown:
        yield unread(inspection, "the width of the slot", "link_width", "LinkWidth", of=unknown)


@check("pcie-slot-limited", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def pcie_slot_limited(inspection: Inspection, purpose: Purpose) -> Said:
    """A card is in a slot that is wired for four lanes.

    Read: the card's lanes and the slot's. Eight are normal on desktop boards and never mentioned; one or two are a
    riser's.
    Rule: info for four, warn where a model is to be cut over the cards (--tensor-parallel).
    Why: 3090s on gen 4 x4 were 2 % slower in decode and 8 % in prefill than on x16, four cards up to 30 % in prefill. A
    split by layers does not notice.
    Do: move the card to a wider slot, or split by layers.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        width, slot = _width(gpu, card), gpu.pcie.slot_width
        if width is None or (slot is None and _RISER_LANES < width <= 4):
            unknown.append(gpu.index)
        elif slot is not None and width == slot and _RISER_LANES < slot <= 4 and (gpu.pcie.width_max or 16) > slot:
            yield Finding(
                severity=Severity.warn if _cutting(purpose) else Severity.info,
                summary=f"GPU{gpu.index} is in a slot with {slot} lanes: prefill of a cut model is slower",
                evidence=(Evidence(path=f"{_path(gpu)}/../max_link_width", value=str(slot)),),
                fix=("use a slot with 8 or 16 lanes, or split by layers",),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "the width of the slot", "link_width", "LinkWidth", of=unknown)


@check("pcie-x1-riser", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def pcie_x1_riser(inspection: Inspection, purpose: Purpose) -> Said:
    """A card hangs on one or two lanes, as on a mining riser.

    Read: the lanes in use, which do not shrink at idle.
    Rule: fail with --tensor-parallel, else warn.
    Why: at 0.8 GB/s each all-reduce waits longer than the cards compute. A split by layers decodes as fast as ever, but
    24 GB take 30 seconds (gen 3) to two minutes (gen 1) to load.
    Do: use a riser with 16 lanes, or leave the card out.
    """
    unknown = []
    others = [gpu.index for gpu, card in nvidia_cards(inspection) if (_width(gpu, card) or 0) > _RISER_LANES]
    for gpu, card in nvidia_cards(inspection):
        width = _width(gpu, card)
        if width is None:
            unknown.append(gpu.index)
        elif width <= _RISER_LANES and (gpu.pcie.width_max or 16) > width:
            said = "too slow to cut a model over it" if _cutting(purpose) else "loading is slow, decoding is not"
            without = (f"{cuda_sees_only(others)}  # leaves it out",) if others else ()
            yield Finding(
                severity=Severity.fail if _cutting(purpose) else Severity.warn,
                summary=f"GPU{gpu.index} has {width} PCIe lane{'s' * (width > 1)}: {said}",
                evidence=(
                    Evidence(path=f"{_path(gpu)}/current_link_width", value=str(width)),
                    Evidence(path=f"{_path(gpu)}/../max_link_width", value=str(gpu.pcie.slot_width or "unknown")),
                ),
                fix=("replace the riser by one with 16 lanes, or reseat the card", *without),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "the link width", "link_width", "LinkWidth", of=unknown)


@check("pcie-gen-degraded", Area.pcie, "B", about=(subjects.fast_link, subjects.bare_metal))
def pcie_gen_degraded(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card's link is slower under load than card and board can do.

    Read: the generation in use and the most that card and board agree on, while the card works (half its time, or a
    high performance state with 40 % of its power).
    Rule: warn for one generation less, fail for two; warn for a slow idle link of A100, H100, H200, B200 and L40S,
    which keep their speed.
    Why: other idle cards drop to gen 1 to save power, which says nothing; under load it is a riser or a setting.
    Do: set the slot's speed in the BIOS, or use a riser made for that generation.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        if at_work(gpu, card) is False and not keeps_link_speed(gpu):
            continue
        most, loaded = gpu.pcie.gen_max, _loaded_gen(gpu, card)
        if most is None or (gpu.pcie.gen is None and not any(reading.pcie_gen for reading in card.readings)):
            unknown.append(gpu.index)
            continue
        idle = max(
            (gen for gen in (gpu.pcie.gen, *(each.pcie_gen for each in card.readings)) if gen is not None), default=0
        )
        gen = loaded if loaded is not None else idle
        if gen >= most or (loaded is None and not keeps_link_speed(gpu)) or (_width(gpu, card) or 16) <= _RISER_LANES:
            continue
        when = "under load" if loaded is not None else "at idle, where this card keeps its speed"
        yield Finding(
            severity=Severity.fail if loaded is not None and most - gen >= 2 else Severity.warn,
            summary=f"GPU{gpu.index} runs at PCIe gen {gen} {when}, and could at gen {most}",
            evidence=(
                Evidence(path=f"GPU{gpu.index} PCIe generation now", value=str(gen)),
                Evidence(path=f"GPU{gpu.index} PCIe generation of card and board", value=str(most)),
            ),
            fix=(f"BIOS: set the slot's PCIe speed to Gen{most}", "use a riser that is made for that generation"),
            gpus=(gpu.index,),
        )
    if unknown:
        yield unread(inspection, "the link generation", "link_speed", "LinkGeneration", of=unknown)


@check("pcie-host-gen", Area.pcie, "B", about=(subjects.nvidia_card, subjects.bare_metal))
def pcie_host_gen(inspection: Inspection, purpose: Purpose) -> Said:
    """The board's slot is of an older PCIe generation than the card.

    Read: what the card alone can do, and what card and board agree on.
    Rule: info, for a gen 5 card in a gen 4 board is normal; warn with --tensor-parallel on gen 3 with eight lanes or
    fewer.
    Why: 8 GB/s and less are felt in prefill.
    Do: nothing, or set the slot's speed in the BIOS from Auto to the generation you expect.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        most, own = gpu.pcie.gen_max, card.pcie_gen_device
        if most is None or own is None:
            unknown.append(gpu.index)
        elif most < own:
            slow = _cutting(purpose) and most <= 3 and (_width(gpu, card) or 16) <= 8
            yield Finding(
                severity=Severity.warn if slow else Severity.info,
                summary=f"GPU{gpu.index} can do PCIe gen {own}, its slot gen {most}",
                evidence=(
                    Evidence(path=f"GPU{gpu.index} PCIe generation of the card", value=str(own)),
                    Evidence(path=f"GPU{gpu.index} PCIe generation of card and board", value=str(most)),
                ),
                fix=(f"BIOS: set the slot's PCIe speed to Gen{own}, if the board has it",),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "the PCIe generation of card or board", "LinkGeneration", "link_speed", of=unknown)


@check("pcie-replay-rate", Area.pcie, "B", about=(subjects.watched,))
def pcie_replay_rate(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card's link repeats more packets than a clean one does.

    Read: NVML's replay counter over the readings of a card that works. Its value alone is no fault (a healthy H100
    shows 9), and an idle card, whose link carries nothing, is read once and not judged.
    Rule: warn for more within the readings' second than DCGM allows a whole minute: GT/s × 0.06 × lanes (8 for gen 3
    x16, 16 for gen 4, 31 for gen 5).
    Why: such links come before a card that falls off the bus.
    Do: reseat the card, replace its riser or cable, or set the slot one PCIe generation lower.
    """
    unknown = []
    for gpu, card in nvidia_cards(inspection):
        if len(card.readings) == 1:
            continue
        counted = [(each.at_s, each.pcie_replays) for each in card.readings if each.pcie_replays is not None]
        gen, width = gpu.pcie.gen_max, _width(gpu, card)
        if not counted or gen not in TRANSFERS_GT_S or width is None:
            unknown.append(gpu.index)
            continue
        (start_s, first), (end_s, last) = counted[0], counted[-1]
        a_minute, span = math.ceil(TRANSFERS_GT_S[gen] * 0.06 * width), seconds(max(end_s - start_s, 0))
        if last - first > a_minute * max((end_s - start_s) / 60, 1.0):
            yield Finding(
                severity=Severity.warn,
                summary=f"GPU{gpu.index}'s link repeats packets: {last - first} in {span}",
                evidence=(
                    Evidence(path=f"GPU{gpu.index} PCIe replays", value=f"{first}, and {last} after {span}"),
                    Evidence(path="allowed a minute (DCGM)", value=str(a_minute)),
                ),
                fix=_CLEAN_LINK,
                gpus=(gpu.index,),
            )
    if unknown and not is_virtual(inspection):
        yield unread(inspection, "the PCIe replay counter", "Replay", of=unknown)


@check("pcie-aer", Area.pcie, "B", about=(subjects.nvidia_card,))
def pcie_aer(inspection: Inspection, _purpose: Purpose) -> Said:
    """The kernel counted errors on a card's link.

    Read: aer_dev_fatal, _nonfatal and _correctable of the card and of the port above it, since the machine started, and
    once more half a second later.
    Rule: warn for any fatal or non-fatal error; for corrected ones where ten come in that half second, or more than one
    a second since the start; else info.
    Why: a bad gen 3 cable gave 210 to 240 a second. The log shows a fraction of them.
    Do: reseat the card, replace its riser or cable, or set the slot one PCIe generation lower; do not hide them with
    pci=noaer.
    """
    boot_s = inspection.host.boot_age_s
    unknown, unrated = [], []
    for gpu, _ in nvidia_cards(inspection):
        ends = [end for end in (device(inspection, gpu.bus_id), *bridges_above(inspection, gpu.bus_id)[:1]) if end]
        if all(_aer(end) is None for end in ends):
            unknown.append(gpu.index)
            continue
        hard = sum((end.aer_fatal or 0) + (end.aer_nonfatal or 0) for end in ends)
        soft = max((end.aer_correctable or 0 for end in ends), default=0)
        if not hard and not soft:
            continue
        fresh = max((end.aer_fresh for end in ends if end.aer_fresh is not None), default=None)
        often = (fresh or 0) >= _MANY_FRESH_ERRORS or (boot_s is not None and soft > boot_s > 0)
        if soft and not often and fresh is None and boot_s is None:
            unrated.append(gpu.index)
        said = f"{hard} uncorrected" if hard else f"{soft} corrected"
        yield Finding(
            severity=Severity.warn if hard or often else Severity.info,
            summary=f"GPU{gpu.index}'s link had {said} errors since the machine started",
            evidence=tuple(
                Evidence(path=f"/sys/bus/pci/devices/{end.address}/aer_dev_{kind}", value=str(value))
                for end in ends
                for kind, value in (
                    ("fatal", end.aer_fatal),
                    ("nonfatal", end.aer_nonfatal),
                    ("correctable", end.aer_correctable),
                )
                if value
            )
            + ((Evidence(path="of these, in half a second", value=str(fresh)),) if fresh else ()),
            fix=_CLEAN_LINK if hard or often else (),
            gpus=(gpu.index,),
        )
    if is_virtual(inspection):
        return
    if unknown:
        yield unread(inspection, "the error counters (AER)", "aer", of=unknown)
    elif unrated:
        yield unread(inspection, "since when errors are counted", "uptime", of=unrated)


# Two or three may come at once on a link that is well for the rest of the day.
_MANY_FRESH_ERRORS = 10
_CLEAN_LINK = ("reseat the card, replace its riser or cable", "BIOS: set the slot's PCIe speed one generation lower")


def _cutting(purpose: Purpose) -> bool:
    return (purpose.tensor_parallel or 1) > 1


def _width(gpu: Gpu, card: CardHealth) -> int | None:
    """The most lanes that were seen in use."""
    seen = (gpu.pcie.width, *(reading.pcie_width for reading in card.readings))
    return max((width for width in seen if width), default=None)


def _loaded_gen(gpu: Gpu, card: CardHealth) -> int | None:
    """The link's generation while the card worked, None where it did not."""
    gens = [each.pcie_gen for each in card.readings if each.pcie_gen and is_busy(each, gpu.power_limit_w)]
    return max(gens, default=None)


def _aer(end: PciDevice) -> int | None:
    counted = [each for each in (end.aer_correctable, end.aer_nonfatal, end.aer_fatal) if each is not None]
    return sum(counted) if counted else None


def _path(gpu: Gpu) -> str:
    return f"/sys/bus/pci/devices/{gpu.bus_id or 'unknown'}"


CHECKS: tuple[Check, ...] = (
    pcie_width_degraded,
    pcie_slot_limited,
    pcie_x1_riser,
    pcie_gen_degraded,
    pcie_host_gen,
    pcie_replay_rate,
    pcie_aer,
)
