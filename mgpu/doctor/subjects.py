"""What checks are about: where a machine has none of it, silence is no praise."""

from __future__ import annotations

from mgpu.doctor.check import Purpose
from mgpu.doctor.facts import at_work, is_promised, keeps_link_speed, nvidia_cards, rocm_cards, usable_cards
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import cards, in_container, is_virtual, nvidia_on_bus, on_bus
from mgpu.machine.sysfs import INTEL

_NO_DRIVER, _NO_LIBRARY = 9, 12


def nvidia(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there is any sign of an NVIDIA card or driver."""
    listed = any(gpu.vendor == "nvidia" for gpu in inspection.machine.gpus)
    answers = inspection.driver.nvml_error not in (None, _NO_DRIVER, _NO_LIBRARY)
    return listed or answers or bool(nvidia_on_bus(inspection) or inspection.container.host_gpus)


def nvidia_or_promised(inspection: Inspection, purpose: Purpose) -> bool:
    """Return whether there is such a sign, or a container that was to have NVIDIA cards."""
    return nvidia(inspection, purpose) or is_promised(inspection)


def nvidia_card(inspection: Inspection, _: Purpose) -> bool:
    """Return whether an NVIDIA card answers."""
    return bool(cards(inspection))


def busy(inspection: Inspection, _: Purpose) -> bool:
    """Return whether an NVIDIA card works; whether it does being unknown counts as working."""
    return any(at_work(gpu, card) is not False for gpu, card in nvidia_cards(inspection))


def fast_link(inspection: Inspection, _: Purpose) -> bool:
    """Return whether an NVIDIA card's PCIe link ought to be at its full speed: while it works, or always."""
    return any(at_work(gpu, card) is not False or keeps_link_speed(gpu) for gpu, card in nvidia_cards(inspection))


def watched(inspection: Inspection, _: Purpose) -> bool:
    """Return whether an NVIDIA card was read more than once, which cards at rest are not; or could not be read."""
    return any(len(card.readings) != 1 for _, card in nvidia_cards(inspection))


def nvidia_pair(inspection: Inspection, _: Purpose) -> bool:
    """Return whether two NVIDIA cards answer."""
    return len(cards(inspection)) > 1


def card(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there is a card of any vendor that can be used."""
    return bool(usable_cards(inspection))


def several_cards(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there are two cards of any vendor that can be used."""
    return len(usable_cards(inspection)) > 1


def expected_cards(inspection: Inspection, purpose: Purpose) -> bool:
    """Return whether cards of NVIDIA's are here, or anybody says how many there should be."""
    return purpose.expected_gpus is not None or nvidia(inspection, purpose)


def amd(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there is an AMD card that can be used."""
    return bool(usable_cards(inspection, "amd"))


def rocm(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there is an AMD card that can compute."""
    return bool(rocm_cards(inspection))


def intel(inspection: Inspection, _: Purpose) -> bool:
    """Return whether there is an Intel card, be it without a driver."""
    return bool(usable_cards(inspection, "intel") or on_bus(inspection, INTEL))


def bare_metal(inspection: Inspection, _: Purpose) -> bool:
    """Return whether slots and links are this machine's: in a virtual one they are not; unknown counts as its own."""
    return not is_virtual(inspection)


def container(inspection: Inspection, _: Purpose) -> bool:
    """Return whether this is a container."""
    return in_container(inspection)


def containers(inspection: Inspection, purpose: Purpose) -> bool:
    """Return whether this is a container, or may start some."""
    return container(inspection, purpose) or inspection.container.docker is not False


def nvswitch(inspection: Inspection, _: Purpose) -> bool:
    """Return whether switches join the cards, or may: a link leads to no card, and whether to a switch is unknown."""
    if inspection.driver.nvswitch is not None:
        return inspection.driver.nvswitch
    return any(port.active and not port.remote_bus_id for gpu in cards(inspection) for port in gpu.nvlink)


def nvlink(inspection: Inspection, _: Purpose) -> bool:
    """Return whether a card has an NVLink that is up."""
    return any(port.active for gpu in cards(inspection) for port in gpu.nvlink)


def nvlink_port(inspection: Inspection, _: Purpose) -> bool:
    """Return whether a card has a port for NVLink."""
    return any(gpu.nvlink for gpu in cards(inspection))


def engine(inspection: Inspection, _: Purpose) -> bool:
    """Return whether an engine that may use cards is installed."""
    return any(not each.cpu_build for each in inspection.engines)


def named_engine(inspection: Inspection, purpose: Purpose) -> bool:
    """Return whether the engine that is named may use cards and is installed; any one, where none is named."""
    wanted = (each for each in inspection.engines if purpose.backend in (None, each.backend))
    return any(not each.cpu_build for each in wanted)


def cut(_: Inspection, purpose: Purpose) -> bool:
    """Return whether a model is to be cut over cards."""
    return (purpose.tensor_parallel or 1) > 1


def for_llama_cpp(_: Inspection, purpose: Purpose) -> bool:
    """Return whether llama.cpp is named."""
    return purpose.backend == "llama.cpp"


def for_vllm(_: Inspection, purpose: Purpose) -> bool:
    """Return whether vLLM is named."""
    return purpose.backend == "vllm"
