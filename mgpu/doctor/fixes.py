"""What --fix may do: a short table of local commands that can be undone, each for what a check found."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mgpu.doctor.check import Finding, Severity
from mgpu.doctor.diagnosis import Diagnosis
from mgpu.doctor.power_limits import default_limit_w, requested_limit_w
from mgpu.machine import layout
from mgpu.machine.inspection import CardHealth, Inspection, PciDevice

# Long enough to type a password in.
_LIMIT_S = 180
# Request and completion redirect, upstream forwarding: what sends peers' writes up to the root.
_REDIRECTS = 0x04 | 0x08 | 0x10
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A command for a finding: its check's `id`, what the command does in a few words, and how it is undone. `argv` is
    without sudo; where `refused` is set it must not be run, for that reason."""

    id: str
    does: str
    argv: tuple[str, ...]
    undo: str
    refused: str | None = None

    def command(self, *, root: bool) -> tuple[str, ...]:
        """Return the arguments to run, through sudo unless this is root."""
        return self.argv if root else ("sudo", *self.argv)

    def shown(self, *, root: bool) -> str:
        """Return the command as a shell would take it."""
        return shlex.join(self.command(root=root))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a remedy: `result` is "done", "failed", "declined", "refused" or "not run" (a dry run); `detail`
    is the command's own words where it failed, or why it was refused."""

    remedy: Remedy
    result: str
    detail: str | None = None


def remedies(inspection: Inspection, diagnosis: Diagnosis) -> tuple[Remedy, ...]:
    """Return the commands for what was found, in the order of the findings and each once. What is only said is left as
    it is (a power limit that was set on purpose, bridges that redirect nothing of use), but for what costs nothing to
    mend. What is not here (BIOS, kernel command line, drivers, packages, files) is only ever printed."""
    found: dict[tuple[str, ...], Remedy] = {}
    for finding in diagnosis.findings:
        make = _TABLE.get(finding.id)
        if finding.severity is Severity.info and finding.id not in _HARMLESS:
            continue
        for remedy in make(inspection, finding) if make else ():
            found.setdefault(remedy.argv, remedy)
    return tuple(found.values())


def apply(remedy: Remedy, *, root: bool, ask_password: bool = True) -> Outcome:
    """Run a remedy and return what became of it; never raises for what the command does. Blocks until it has ended,
    three minutes at most. Without `ask_password` sudo fails instead of asking. Refused while MGPU_ROOT stands for
    another machine, for there this one is not what was diagnosed."""
    elsewhere = (
        "MGPU_ROOT names another machine's files" if os.environ.get("MGPU_ROOT") not in (None, "", "/") else None
    )
    if why := remedy.refused or elsewhere:
        return Outcome(remedy=remedy, result="refused", detail=why)
    command = remedy.command(root=root)
    if not ask_password and command[0] == "sudo":
        command = ("sudo", "-n", *command[1:])
    try:
        ended = subprocess.run(
            command,
            stdin=None if ask_password else subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except OSError as error:
        return Outcome(remedy=remedy, result="failed", detail=f"{command[0]}: {error.strerror or error}")
    except subprocess.TimeoutExpired:
        return Outcome(remedy=remedy, result="failed", detail=f"not finished after {_LIMIT_S} s")
    if ended.returncode == 0:
        return Outcome(remedy=remedy, result="done")
    # The first line names the cause; nvidia-smi says it on stdout.
    lines = (ended.stderr.strip() or ended.stdout.strip()).decode("utf-8", "replace").splitlines()
    words = "".join(character for character in (lines[0] if lines else "") if character.isprintable())
    return Outcome(remedy=remedy, result="failed", detail=words[:200] or f"exit status {ended.returncode}")


def _cards(inspection: Inspection, finding: Finding) -> Iterator[tuple[CardHealth, str]]:
    """The NVIDIA cards that a finding is about, each with what nvidia-smi takes for it."""
    known = {card.gpu: card for card in inspection.cards}
    for gpu in inspection.machine.gpus:
        card = known.get(gpu.index)
        if gpu.vendor == "nvidia" and card is not None and (not finding.gpus or gpu.index in finding.gpus):
            named = gpu.bus_id if gpu.bus_id and _ADDRESS.fullmatch(gpu.bus_id) else str(gpu.index)
            yield card, named


def _persistence(inspection: Inspection, finding: Finding) -> Iterator[Remedy]:
    for card, name in _cards(inspection, finding):
        if card.persistence is False:
            yield Remedy(
                id=finding.id,
                does=f"keep the driver's state of GPU{card.gpu} between starts",
                argv=("nvidia-smi", "-i", name, "-pm", "1"),
                undo=f"nvidia-smi -i {name} -pm 0, or a reboot",
            )


def _power_limit(inspection: Inspection, finding: Finding) -> Iterator[Remedy]:
    gpus = {gpu.index: gpu for gpu in inspection.machine.gpus}
    for card, name in _cards(inspection, finding):
        default, limit = default_limit_w(card), requested_limit_w(gpus[card.gpu], card)
        if default is None or limit is None or limit >= default:
            continue
        yield Remedy(
            id=finding.id,
            does=f"set the power limit of GPU{card.gpu} back to its default of {default} W",
            argv=("nvidia-smi", "-i", name, "-pl", str(default)),
            undo=f"nvidia-smi -i {name} -pl {limit:.0f}, or a reboot",
        )


def _compute_mode(inspection: Inspection, finding: Finding) -> Iterator[Remedy]:
    for card, name in _cards(inspection, finding):
        if card.compute_mode:
            yield Remedy(
                id=finding.id,
                does=f"let several processes use GPU{card.gpu}",
                argv=("nvidia-smi", "-i", name, "-c", "0"),
                undo=f"nvidia-smi -i {name} -c {card.compute_mode}, or a reboot",
            )


def _uvm(inspection: Inspection, finding: Finding) -> Iterator[Remedy]:
    if layout.in_container(inspection):  # the host loads modules, and passes the devices on
        return
    if inspection.driver.uvm_loaded is False:
        yield Remedy(
            id=finding.id,
            does="load the module that CUDA shares memory with",
            argv=("modprobe", "nvidia_uvm"),
            undo="rmmod nvidia_uvm",
        )
    if inspection.driver.uvm_device is False:
        yield Remedy(
            id=finding.id,
            does="make the device files that CUDA opens",
            argv=("nvidia-modprobe", "-c0", "-u"),
            undo="rm /dev/nvidia-uvm /dev/nvidia-uvm-tools, or a reboot",
        )


def _acs(inspection: Inspection, finding: Finding) -> Iterator[Remedy]:
    for bridge in _bridges_between_cards(inspection, finding):
        if bridge.acs is None or not bridge.acs & _REDIRECTS or not _ADDRESS.fullmatch(bridge.address):
            continue
        remedy = Remedy(
            id=finding.id,
            does=f"let cards below bridge {bridge.address} reach each other directly, until the next boot",
            argv=("setpci", "-s", bridge.address, "ECAP_ACS+6.w=0000"),
            undo=f"setpci -s {bridge.address} ECAP_ACS+6.w={bridge.acs:04x}, or a reboot",
        )
        yield replace(remedy, refused=_why_acs_stays(inspection))


def _why_acs_stays(inspection: Inspection) -> str | None:
    """ACS is what keeps a virtual machine's devices from the host's memory."""
    if inspection.host.vfio_in_use or any("vfio" in (device.driver or "") for device in inspection.pci):
        return "a device is passed to a virtual machine (vfio), which ACS protects the host from"
    if inspection.host.vfio_in_use is None:
        return "whether a device is passed to a virtual machine could not be read"
    if inspection.machine.host.virtualisation not in (None, "none"):
        return "this is a virtual machine: ACS is the host's"
    return None


def _bridges_between_cards(inspection: Inspection, finding: Finding) -> Iterator[PciDevice]:
    """The bridges on the ways from each card of a finding to each other one, without those where they meet."""
    gpus = (gpu for gpu in layout.cards(inspection) if not finding.gpus or gpu.index in finding.gpus)
    addresses = [gpu.bus_id for gpu in gpus if gpu.bus_id]
    for a, b in itertools.combinations(addresses, 2):
        yield from layout.bridges_between(inspection, a, b)


_TABLE: dict[str, Callable[[Inspection, Finding], Iterator[Remedy]]] = {
    "persistence-off": _persistence,
    "power-capped": _power_limit,
    "compute-mode": _compute_mode,
    "uvm-missing": _uvm,
    "acs-redirect": _acs,
    "p2p-grant-unsafe": _acs,
}

# Of these even what is only said: nothing else changes by it.
_HARMLESS = ("persistence-off", "uvm-missing")


def fixable_ids() -> Sequence[str]:
    """Return the ids of the checks whose findings --fix has a command for."""
    return tuple(_TABLE)
