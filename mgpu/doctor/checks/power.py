"""Checks of heat, power and clocks. Bits that flicker, and those that an idle card shows, are no faults."""

from __future__ import annotations

from functools import partial
from statistics import median

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import at_work, event, in_use_bytes, is_busy, lasting, named, nvidia_cards, unread, usable_cards
from mgpu.doctor.power_limits import default_limit_w, requested_limit_w
from mgpu.machine.inspection import CardHealth, Inspection, Readings
from mgpu.machine.layout import health, is_laptop, on_bus
from mgpu.machine.snapshot import Gpu
from mgpu.machine.sysfs import INTEL
from mgpu.units import GIB

_POWER_CAP, _HARDWARE_SLOWDOWN, _THERMAL, _POWER_BRAKE = 0x04, 0x08, 0x20 | 0x40, 0x80
_CLOCKS_SET = 0x02
_REASONS_FOR_LOW_CLOCKS = _POWER_CAP | _HARDWARE_SLOWDOWN | _THERMAL | _POWER_BRAKE
_REST_OF_COMPUTER_W = 100
# From Ada on, some cards give the distance to the limit (a small or negative number) where others give the limit.
_LOWEST_TRUE_LIMIT_C = 50


@check("thermal", Area.power, "B", about=(subjects.nvidia_card,))
def thermal(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card that is hot, or that its heat makes slower.

    Read: NVML's temperature, the margin to the limit (or the slowdown temperature where the card gives that), and the
    event bits 0x20 and 0x40 over several readings.
    Rule: fail at 3 °C or less below the limit; warn at 8 °C or less, or when a thermal bit lasts over two thirds of the
    readings; info when an idle card is above 70 °C. Fans that stand still while idle are normal.
    Why: an air-cooled RTX 3090 falls to 310-340 W at about 80 °C, and the slowest card paces all cards of a tensor
    parallel group.
    Do: clean the fans, leave a slot between cards, or lower the power limit with nvidia-smi -pl.
    """
    unknown: list[int] = []
    for gpu, card in nvidia_cards(inspection):
        limited, margin = lasting(card.readings, event(_THERMAL)), _margin_c(gpu, card)
        if limited is None and margin is None:
            unknown.append(gpu.index)
        elif margin is not None and margin <= 3:
            yield _hot(gpu, card, Severity.fail, f"{named([gpu.index])} is {_place(margin)}")
        elif limited:
            yield _hot(gpu, card, Severity.warn, f"{named([gpu.index])} lowers its clocks because of heat")
        elif margin is not None and margin <= 8:
            yield _hot(gpu, card, Severity.warn, f"{named([gpu.index])} is {_place(margin)}")
        elif gpu.temperature_c is not None and gpu.temperature_c > 70 and gpu.utilisation_percent == 0:
            yield _hot(gpu, card, Severity.info, f"{named([gpu.index])} is at {gpu.temperature_c} °C while idle")
    if unknown:
        yield _unsure(inspection, "temperature limits and events", unknown, "Temperature")


def _place(margin_c: int) -> str:
    if margin_c == 0:
        return "at its temperature limit"
    return f"{abs(margin_c)} °C {'below' if margin_c > 0 else 'over'} its limit"


def _margin_c(gpu: Gpu, card: CardHealth) -> int | None:
    if card.temperature_margin_c is not None:
        return card.temperature_margin_c
    limit = card.temperature_slowdown_c
    if limit is None or limit < _LOWEST_TRUE_LIMIT_C or gpu.temperature_c is None:
        return None
    return limit - gpu.temperature_c


def _hot(gpu: Gpu, card: CardHealth, severity: Severity, summary: str) -> Finding:
    evidence = [Evidence(path=f"nvmlDeviceGetTemperature({gpu.index})", value=f"{gpu.temperature_c} °C")]
    if (margin := _margin_c(gpu, card)) is not None:
        evidence.append(Evidence(path=f"margin to the slowdown temperature of GPU{gpu.index}", value=f"{margin} °C"))
    return Finding(
        severity=severity,
        summary=summary,
        evidence=(*evidence, *_events(gpu, card)),
        fix=("clean the fans and vents",)  # a laptop's limit is not the user's to set
        if is_laptop(gpu)
        else ("clean the fans and filters, leave a free slot between cards", *_lower_limit(gpu, card)),
        gpus=(gpu.index,),
    )


def _lower_limit(gpu: Gpu, card: CardHealth, until: str = "") -> tuple[str, ...]:
    """The command that takes a fifth off the limit that holds; none where the card takes no lower one."""
    command = f"sudo nvidia-smi -i {gpu.index} -pl"
    limits = [limit for limit in (requested_limit_w(gpu, card), card.power_default_w) if limit]
    if not limits:
        return (f"{command} WATTS{until}",)
    watts = max(0.8 * min(limits), card.power_min_w or 0)
    return (f"{command} {watts:.0f}{until}",) if watts < min(limits) else ()


def _unsure(inspection: Inspection, what: str, indices: list[int], *paths: str) -> Skip:
    """Why it is unknown whether an event of these cards lasts: a single reading does not show it."""
    events = [
        [r.events for r in card.readings if r.events is not None] for card in inspection.cards if card.gpu in indices
    ]
    if events and all(len(masks) == 1 for masks in events):
        return Skip(reason=f"{what} of {named(indices)} were read once, not three times")
    return unread(inspection, what, *paths, "Event", "Throttle", of=indices)


def _events(gpu: Gpu, card: CardHealth) -> tuple[Evidence, ...]:
    masks = [f"{reading.events:#x}" for reading in card.readings if reading.events is not None]
    path = f"nvmlDeviceGetCurrentClocksEventReasons({gpu.index})"
    return (Evidence(path=path, value=", ".join(masks[:3])),) if masks else ()


@check("hw-slowdown", Area.power, "B", about=(subjects.nvidia_card,))
def hw_slowdown(inspection: Inspection, _purpose: Purpose) -> Said:
    """A card whose hardware brakes it: its power supply or a cable.

    Read: NVML's event bits 0x80 (power brake) and 0x08 (hardware slowdown) over several readings.
    Rule: fail when 0x80 lasts over two thirds of the readings; warn when 0x08 is in all of at least three without a
    thermal bit. 0x08 for a moment is what a change of performance state looks like.
    Why: the brake divides clocks by two or more, and comes before cards that fall off the bus.
    Do: seat the power plugs, give each socket a cable of its own, and look at the power supply.
    """
    unknown: list[int] = []
    for gpu, card in nvidia_cards(inspection):
        braked = lasting(card.readings, event(_POWER_BRAKE))
        masks = [reading.events for reading in card.readings if reading.events is not None]
        slowed = len(masks) >= 3 and all(mask & _HARDWARE_SLOWDOWN and not mask & _THERMAL for mask in masks)
        if braked or slowed:
            yield Finding(
                severity=Severity.fail if braked else Severity.warn,
                summary=f"{named([gpu.index])} is slowed by its power supply or a cable"
                if braked
                else f"{named([gpu.index])} is slowed by its hardware the whole time",
                evidence=_events(gpu, card),
                fix=(
                    "power off, seat the power plugs (12VHPWR up to the stop), one cable for each socket",
                    *_lower_limit(gpu, card, "  # until then"),
                ),
                gpus=(gpu.index,),
            )
        elif braked is None:
            unknown.append(gpu.index)
    if unknown:
        yield _unsure(inspection, "clock events", unknown)


@check("sw-power-cap", Area.power, "B", about=(subjects.busy,))
def sw_power_cap(inspection: Inspection, _purpose: Purpose) -> Said:
    """A busy card that draws all the power it may have.

    Read: event bit 0x04, utilisation and draw over several readings.
    Rule: info when the bit, 50 % utilisation and 95 % of the limit last together. The bit alone means nothing: idle
    cards show it (an idle RTX 5090 at 24 of 575 W does), and so do their cumulative counters.
    Why: at the limit clocks follow power; that is how a card is meant to work.
    Do: nothing; or raise the limit, if it was lowered.
    """
    unknown: list[int] = []
    for gpu, card in nvidia_cards(inspection):
        if at_work(gpu, card) is False:
            continue
        limit_w = card.power_enforced_w or gpu.power_limit_w
        capped = lasting(card.readings, partial(_at_limit, limit_w=limit_w))
        if capped:
            yield Finding(
                severity=Severity.info,
                summary=f"{named([gpu.index])} works at its power limit of {limit_w:.0f} W",
                evidence=_events(gpu, card),
                gpus=(gpu.index,),
            )
        elif capped is None:
            unknown.append(gpu.index)
    if unknown:
        yield _unsure(inspection, "clock events", unknown)


def _at_limit(reading: Readings, limit_w: float | None) -> bool | None:
    if reading.events is None:
        return None
    if not reading.events & _POWER_CAP or (reading.utilisation_percent or 0) < 50:
        return False
    return None if reading.power_w is None or not limit_w else reading.power_w >= 0.95 * limit_w


@check("power-capped", Area.power, "B", about=(subjects.nvidia_card,))
def power_capped(inspection: Inspection, purpose: Purpose) -> Said:
    """A power limit far below the card's default, or unlike its siblings'.

    Read: the power limit that was set (NVML's management limit) against the default one. What a laptop may draw changes
    by itself, so that only a limit that somebody set is judged there.
    Rule: info below 95 % of the default; warn below 60 %, or when cards of one model that share a tensor parallel model
    are more than 15 % apart.
    Why: moderate limits cost little (decoding on an RTX 3090 at 290 W loses 7 % for 22 % less power; 400 to 600 W make
    no difference on an RTX 4090), deep ones cost speed, and unequal ones make the others wait.
    Do: sudo nvidia-smi -pl WATTS -i CARD; a systemd unit keeps it over a reboot.
    """
    shares: dict[str, list[tuple[float, Gpu]]] = {}
    defaults: dict[int, int] = {}
    unknown: list[int] = []
    for gpu, card in nvidia_cards(inspection):
        limit, default = requested_limit_w(gpu, card), default_limit_w(card)
        if not limit or not default:
            if not is_laptop(gpu):
                unknown.append(gpu.index)
            continue
        defaults[gpu.index] = default
        shares.setdefault(gpu.name, []).append((limit / default, gpu))
        if limit < 0.95 * default:
            yield Finding(
                severity=Severity.warn if limit < 0.6 * default else Severity.info,
                summary=f"{named([gpu.index])} is limited to {limit:.0f} of its {default} W",
                evidence=_limits(gpu, limit, default),
                fix=(f"sudo nvidia-smi -i {gpu.index} -pl {default}",),
                gpus=(gpu.index,),
            )
    for same in shares.values():
        lowest, highest = min(share for share, _ in same), max(share for share, _ in same)
        if (purpose.tensor_parallel or 1) > 1 and highest - lowest > 0.15:
            members = [gpu.index for _, gpu in same]
            # The highest that all of them take without being raised above a default.
            common = min(defaults[index] for index in members)
            slow = [gpu.index for share, gpu in same if highest - share > 0.15]
            yield Finding(
                severity=Severity.warn,
                summary=f"{named(slow)} may draw less than its siblings, which wait for it",
                evidence=tuple(
                    Evidence(path=f"power limit of GPU{gpu.index}", value=f"{share:.0%} of the default")
                    for share, gpu in same
                ),
                fix=(f"sudo nvidia-smi -i {','.join(map(str, members))} -pl {common}",),
                gpus=tuple(slow),
            )
    if unknown:
        yield unread(inspection, "power limits", "PowerManagement", "Power", of=unknown)


def _limits(gpu: Gpu, limit: float, default: float) -> tuple[Evidence, ...]:
    return (
        Evidence(path=f"nvmlDeviceGetPowerManagementLimit({gpu.index})", value=f"{limit:.0f} W"),
        Evidence(path=f"nvmlDeviceGetPowerManagementDefaultLimit({gpu.index})", value=f"{default:.0f} W"),
    )


@check("psu-budget", Area.power, "B", about=(subjects.card,))
def psu_budget(inspection: Inspection, purpose: Purpose) -> Said:
    """Cards that together may draw more than the power supply gives.

    Read: the sum of all cards' power limits, the processor's long-term limit (intel-rapl in /sys/class/powercap) and
    100 W for the rest, against the wattage that you give. Intel's cards tell theirs only to who
    computes on them, so that no sum with one of them is all well.
    Rule: fail above 100 % of the supply, warn above 80 %; without a wattage, info with the sum for two cards or more.
    Why: peaks of milliseconds are far above the limits; a supply that trips on them takes cards off the bus (Xid 79).
    Do: limit the cards (nvidia-smi -pl), or take a larger supply.
    """
    cards = usable_cards(inspection)
    limits = {gpu.index: _limit_w(gpu, health(inspection, gpu)) for gpu in cards}
    if unknown := [index for index, limit in limits.items() if limit is None]:
        yield unread(inspection, "power limits", "Power", of=unknown)
        return
    processor_w = inspection.host.cpu_power_w
    total_w = sum(limit or 0 for limit in limits.values()) + (processor_w or 0) + _REST_OF_COMPUTER_W
    evidence = (
        *(Evidence(path=f"power limit of GPU{index}", value=f"{limit:.0f} W") for index, limit in limits.items()),
        Evidence(path="intel-rapl", value="unknown" if processor_w is None else f"{processor_w:.0f} W"),
    )
    others = "processor and the rest" if processor_w is not None else "100 W for the rest (processor unknown)"
    supply_w = purpose.psu_w
    if supply_w and total_w > 0.8 * supply_w:
        yield Finding(
            severity=Severity.fail if total_w > supply_w else Severity.warn,
            summary=f"cards, {others} may draw {total_w:.0f} of {supply_w} W",
            evidence=evidence,
            fix=(
                "sudo nvidia-smi -pl WATTS  # on each card",
                f"or a power supply of {total_w / 0.8:.0f} W",
            ),
            confidence="inferred",
        )
    elif cards and on_bus(inspection, INTEL):
        yield unread(inspection, "the power limits of Intel's cards", "power1_cap")
    elif supply_w and processor_w is None and cards:
        yield unread(inspection, "the processor's power limit", "powercap", "rapl")
    elif not supply_w and len(cards) > 1:
        yield Finding(
            severity=Severity.info,
            summary=f"cards, {others} may draw {total_w:.0f} W together",
            evidence=evidence,
            confidence="inferred",
        )


def _limit_w(gpu: Gpu, card: CardHealth) -> float | None:
    return card.power_enforced_w or gpu.power_limit_w


@check("clocks-locked", Area.power, "B", about=(subjects.busy,))
def clocks_locked(inspection: Inspection, _purpose: Purpose) -> Said:
    """A busy card whose clock stays low, though nothing makes it.

    Read: the SM clock of busy readings against the card's highest, the event bits, and the clocks of busy siblings.
    Rule: warn when a busy card stays below 70 % of its highest clock, or below 85 % of the median of busy cards of its
    model, without an event bit that explains it (power, heat, hardware: other checks say those). Info below 95 % while
    bit 0x02 lasts, by which the driver itself says that a setting holds the clock: no more, because cards for
    datacentres are delivered so. Idle cards are not judged.
    Why: a clock that someone locked (nvidia-smi -lgc) stays locked until it is reset, and the slowest card paces all.
    Do: sudo nvidia-smi -rgc -i CARD; -rac where -ac set the clock of applications.
    """
    unknown: list[int] = []
    clocks = {gpu.index: _busy_clock_mhz(gpu, card) for gpu, card in nvidia_cards(inspection)}
    for gpu, card in nvidia_cards(inspection):
        if at_work(gpu, card) is False:
            continue
        readings = [(r.utilisation_percent, r.sm_clock_mhz) for r in card.readings]
        if all(use is None for use, _ in readings) or (
            clocks[gpu.index] is None and any((use or 0) >= 50 and clock is None for use, clock in readings)
        ):
            unknown.append(gpu.index)
            continue
        clock, highest = clocks[gpu.index], card.sm_clock_max_mhz
        if clock is None:
            continue
        siblings = [clocks[other.index] for other, _ in nvidia_cards(inspection) if other.name == gpu.name]
        typical = median(value for value in siblings if value is not None)
        explained = lasting(card.readings, event(_REASONS_FOR_LOW_CLOCKS)) is not False
        low = highest is not None and clock < 0.7 * highest and not explained
        slow = clock < 0.85 * typical and not explained
        held = highest is not None and clock < 0.95 * highest and lasting(card.readings, event(_CLOCKS_SET)) is True
        if held and not (low or slow or explained):
            yield Finding(
                severity=Severity.info,
                summary=f"a setting holds {named([gpu.index])} at {clock:.0f} of {highest} MHz",
                evidence=_events(gpu, card),
                fix=(f"sudo nvidia-smi -rgc -i {gpu.index}", f"sudo nvidia-smi -rac -i {gpu.index}"),
                gpus=(gpu.index,),
            )
        elif low or slow:
            against = f"of {highest} MHz" if low else f"MHz, its siblings at {typical:.0f} MHz"
            yield Finding(
                severity=Severity.warn,
                summary=f"{named([gpu.index])} is busy at {clock:.0f} {against}",
                evidence=(
                    Evidence(path=f"nvmlDeviceGetClockInfo({gpu.index}, SM)", value=f"{clock:.0f} MHz"),
                    *_events(gpu, card),
                ),
                fix=(f"sudo nvidia-smi -rgc -i {gpu.index}",),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "clocks and utilisation", "ClockInfo", "Utilization", of=unknown)


def _busy_clock_mhz(gpu: Gpu, card: CardHealth) -> float | None:
    if not lasting(card.readings, partial(is_busy, limit_w=gpu.power_limit_w)):
        return None
    clocks = [r.sm_clock_mhz for r in card.readings if r.sm_clock_mhz and is_busy(r, gpu.power_limit_w)]
    return median(clocks) if clocks else None


@check("idle-power-stuck", Area.power, "B", about=(subjects.nvidia_card,))
def idle_power_stuck(inspection: Inspection, _purpose: Purpose) -> Said:
    """An idle card that holds a model and stays at full clocks.

    Read: performance state, utilisation and power over several readings, and the memory in use.
    Rule: info when all readings show P0, under 5 % utilisation and above 40 W while more than 1 GiB is in use.
    Why: a Tesla P40 with a model loaded takes about 50 W instead of 10 for as long as it waits.
    Do: stop the model between uses (Ollama's keep_alive does), or run nvidia-pstated.
    """
    unknown: list[int] = []
    for gpu, card in nvidia_cards(inspection):
        answers = [answer for reading in card.readings if (answer := _idle_at_full_clocks(reading)) is not None]
        if not answers:
            unknown.append(gpu.index)
        elif all(answers) and (in_use_bytes(gpu, card) or 0) > GIB:
            yield Finding(
                severity=Severity.info,
                summary=f"{named([gpu.index])} stays at full clocks while its model waits",
                evidence=(Evidence(path=f"nvmlDeviceGetPowerUsage({gpu.index})", value=f"{gpu.power_w} W at P0"),),
                fix=("end the engine while the model is not needed",),
                gpus=(gpu.index,),
            )
    if unknown:
        yield unread(inspection, "performance states", "PerformanceState", "PowerState", of=unknown)


def _idle_at_full_clocks(reading: Readings) -> bool | None:
    if reading.pstate is None or reading.utilisation_percent is None or reading.power_w is None:
        return None
    return reading.pstate == 0 and reading.utilisation_percent < 5 and reading.power_w > 40


CHECKS: tuple[Check, ...] = (
    thermal,
    hw_slowdown,
    sw_power_cap,
    power_capped,
    psu_budget,
    clocks_locked,
    idle_power_stuck,
)
