"""What a diagnosis asks NVML of each card and of each pair, beyond what planning needs to know."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

from mgpu.machine.inspection import CardHealth, PeerAccess, Readings, Unread
from mgpu.machine.nvml import Nvml, NvmlCard, pci_address, thousandth

# Where one look is not enough: enough to tell a state from a moment, in little more than half a second.
SAMPLES, INTERVAL_S = 3, 0.3
# NVML's events: hardware slowdown, the driver's and the hardware's thermal slowdown, power brake.
_HELD_DOWN = 0x08 | 0x20 | 0x40 | 0x80


class NvidiaCards:
    """The cards of an NVML that was initialised, each opened once; what they are asked is given back as values.

    No method raises. None of the questions makes a CUDA context.
    """

    def __init__(self, nvml: Nvml, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self._started_s = clock()
        self._cards: list[NvmlCard | None] = []
        self._errors: list[int | None] = []
        count = nvml.ask("nvmlDeviceGetCount")
        for index in range(count if isinstance(count, int) else 0):
            nvml.failure = None
            handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
            self._cards.append(NvmlCard(nvml, handle) if handle is not None else None)
            self._errors.append(nvml.failure if handle is None else 0)
        self._ports = [_active_ports(card) if card else () for card in self._cards]

    def sample(self) -> tuple[Readings | None, ...]:
        """Return what each card shows now, None for one that cannot be opened; `at_s` counts from the first."""
        at_s = round(self._clock() - self._started_s, 3)
        return tuple(
            _read(card, at_s, ports) if card else None for card, ports in zip(self._cards, self._ports, strict=True)
        )

    def health(self, samples: tuple[tuple[Readings | None, ...], ...]) -> tuple[CardHealth, ...]:
        """Return what lasts of each card, with the readings that `sample` gave."""
        found = []
        for index, (card, error) in enumerate(zip(self._cards, self._errors, strict=True)):
            if card is None:
                found.append(CardHealth(gpu=index, nvml_error=error))
                continue
            readings = tuple(reading for sample in samples if (reading := sample[index]) is not None)
            found.append(dataclasses.replace(_health(card, index), readings=readings, nvml_error=card.fatal or 0))
        return tuple(found)

    def peers(self) -> tuple[PeerAccess, ...]:
        """Return what the driver claims of each two cards that can be opened."""
        usable = [(index, card.handle) for index, card in enumerate(self._cards) if card and not card.fatal]
        return tuple(
            PeerAccess(
                a=a,
                b=b,
                # Numbers, because pynvml.NVML_P2P_CAPS_INDEX_READ is the tuple (0,) by a stray comma.
                read=_integer(self._nvml.ask("nvmlDeviceGetP2PStatus", one, other, 0)),
                write=_integer(self._nvml.ask("nvmlDeviceGetP2PStatus", one, other, 1)),
                ancestor=_integer(self._nvml.ask("nvmlDeviceGetTopologyCommonAncestor", one, other)),
            )
            for (a, one), (b, other) in itertools.combinations(usable, 2)
        )

    def refused(self) -> tuple[Unread, ...]:
        """Return the questions that were refused so far, and why."""
        whys = {4: "this user may not ask"}
        return tuple(
            Unread(what=function, why=whys.get(error, f"NVML error {error}"), needs_root=error == 4)
            for function, error in self._nvml.refused.items()
        )


def may_pass(sample: tuple[Readings | None, ...]) -> bool:
    """Return whether a card of the sample shows what could be gone a moment later, so that one look proves nothing: it
    works, it is in a high performance state, or its clocks are held down (hardware, heat, power brake)."""
    readings = [reading for reading in sample if reading is not None]
    at_work = any(reading.utilisation_percent for reading in readings)
    high = any(reading.pstate is not None and reading.pstate <= 2 for reading in readings)
    return at_work or high or any((reading.events or 0) & _HELD_DOWN for reading in readings)


def _integer(answer: object) -> int | None:
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else None


def _flag(answer: int | None) -> bool | None:
    return None if answer is None else bool(answer)


def _pair(answer: Any, place: int) -> int | None:
    return _integer(answer[place]) if isinstance(answer, (tuple, list)) and len(answer) > place else None


def _health(card: NvmlCard, index: int) -> CardHealth:
    limits = card.ask("nvmlDeviceGetPowerManagementLimitConstraints")
    remapped = card.ask("nvmlDeviceGetRemappedRows")  # (corrected, uncorrected, pending, failure)
    memory = card.ask("nvmlDeviceGetMemoryInfo", getattr(card.nvml.pynvml, "nvmlMemory_v2", None))
    fabric = _fabric(card)
    return CardHealth(
        gpu=index,
        bus_id=pci_address(card.ask("nvmlDeviceGetPciInfo")),
        persistence=_flag(card.integer("nvmlDeviceGetPersistenceMode")),
        compute_mode=card.integer("nvmlDeviceGetComputeMode"),
        power_default_w=thousandth(card.integer("nvmlDeviceGetPowerManagementDefaultLimit")),
        power_min_w=thousandth(_pair(limits, 0)),
        power_max_w=thousandth(_pair(limits, 1)),
        power_requested_w=thousandth(card.integer("nvmlDeviceGetPowerManagementLimit")),
        power_enforced_w=thousandth(card.integer("nvmlDeviceGetEnforcedPowerLimit")),
        temperature_slowdown_c=_degrees(card.integer("nvmlDeviceGetTemperatureThreshold", 1)),
        # No field gives it where this is missing: 194 (SLOWDOWN_TLIMIT) is where the limit is, -2 on a cold card too.
        temperature_margin_c=card.integer("nvmlDeviceGetMarginTemperature"),
        sm_clock_max_mhz=card.integer("nvmlDeviceGetMaxClockInfo", 1),
        reserved_bytes=_integer(getattr(memory, "reserved", None)),
        used_by_known=any(
            card.ask(f"nvmlDeviceGetComputeRunningProcesses{version}") is not None for version in ("_v3", "_v2")
        ),
        ecc_enabled=_flag(_pair(card.ask("nvmlDeviceGetEccMode"), 0)),
        ecc_uncorrected_volatile=card.integer("nvmlDeviceGetTotalEccErrors", 1, 0),
        ecc_uncorrected_aggregate=card.integer("nvmlDeviceGetTotalEccErrors", 1, 1),
        remap_pending=_flag(_pair(remapped, 2)),
        remap_failed=_flag(_pair(remapped, 3)),
        retired_pages_pending=_flag(card.integer("nvmlDeviceGetRetiredPagesPendingStatus")),
        recovery_action=card.field(230),  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
        mig_pending=_flag(_pair(card.ask("nvmlDeviceGetMigMode"), 1)),
        pcie_gen_device=card.integer("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        fabric_state=fabric[0],
        fabric_status=fabric[1],
        virtualisation_mode=card.integer("nvmlDeviceGetVirtualizationMode"),
    )


def _degrees(threshold: int | None) -> int | None:
    """Newer cards answer with degrees below their limit ("-2"), which is no temperature."""
    return threshold if threshold is not None and 50 <= threshold <= 150 else None


def _fabric(card: NvmlCard) -> tuple[int | None, int | None]:
    """State (0 not supported, 1 not started, 2 in progress, 3 completed) and status of the fabric's registration."""
    make = getattr(card.nvml.pynvml, "c_nvmlGpuFabricInfoV_t", None)
    if make is None:
        return None, None
    import ctypes

    information = make()
    # The binding hands its argument on as it is; without byref the library would write to a random place.
    if card.ask("nvmlDeviceGetGpuFabricInfoV", ctypes.byref(information)) is None:
        return None, None
    return int(information.state), int(information.status)


def _active_ports(card: NvmlCard) -> tuple[int, ...]:
    ports = []
    for port in range(getattr(card.nvml.pynvml, "NVML_NVLINK_MAX_LINKS", 18)):
        state = card.ask("nvmlDeviceGetNvLinkState", port)
        if state is None:  # the card has no such port
            break
        if state:
            ports.append(port)
    return tuple(ports)


def _read(card: NvmlCard, at_s: float, ports: tuple[int, ...]) -> Readings:
    utilisation = card.ask("nvmlDeviceGetUtilizationRates")
    events = card.integer("nvmlDeviceGetCurrentClocksEventReasons")
    if events is None:
        events = card.integer("nvmlDeviceGetCurrentClocksThrottleReasons")
    pstate = card.integer("nvmlDeviceGetPerformanceState")
    return Readings(
        at_s=at_s,
        utilisation_percent=_integer(getattr(utilisation, "gpu", None)),
        power_w=thousandth(card.integer("nvmlDeviceGetPowerUsage")),
        temperature_c=card.integer("nvmlDeviceGetTemperature", 0),
        pstate=pstate if pstate != 32 else None,  # NVML_PSTATE_UNKNOWN
        events=events,
        sm_clock_mhz=card.integer("nvmlDeviceGetClockInfo", 1),
        pcie_gen=card.integer("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_width=card.integer("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_replays=card.integer("nvmlDeviceGetPcieReplayCounter"),
        nvlink_errors=_nvlink_errors(card, ports),
    )


# NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, _RECOVERY and _CRC; Blackwell has none of them, and counts packets received with
# errors, times that errors went over a threshold, and recoveries (NVML_FI_DEV_NVLINK_COUNT_...).
_HOPPER_ERRORS, _BLACKWELL_ERRORS = (161, 162, 163), (208, 211, 215)


def _nvlink_errors(card: NvmlCard, ports: tuple[int, ...]) -> int | None:
    """The sum over the active links of replays, recoveries and CRC errors, by the first of the three ways of counting
    that the card knows; None where they are not counted."""
    if not ports:
        return None
    for fields in (_HOPPER_ERRORS, _BLACKWELL_ERRORS):
        answers = card.fields(*itertools.product(fields, ports))
        if counted := [count for count in answers if count is not None]:
            return sum(counted)
    total = None
    for port, counter in itertools.product(ports, range(4)):
        count = card.integer("nvmlDeviceGetNvLinkErrorCounter", port, counter)
        if count is None and total is None:
            return None  # cards that do not count say so at the first question
        total = (total or 0) + (count or 0)
    return total
