"""Checks of containers: what the one around us was given, and whether Docker here can give cards to others."""

from __future__ import annotations

import shlex

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, check
from mgpu.doctor.commands import Task, steps
from mgpu.doctor.facts import unread, usable_cards
from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import in_container
from mgpu.units import GIB, gib

_NVML_UNKNOWN_ERROR = 999
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  it is looked at, not written to
_RECREATE = "docker run --gpus all --ipc=host IMAGE  # a container keeps what it was made with"


@check("shm-small", Area.container, "A", about=(subjects.several_cards,))
def shm_small(inspection: Inspection, purpose: Purpose) -> Said:
    """Too little shared memory in /dev/shm for several cards.

    Read: statvfs of /dev/shm.
    Rule: for two cards or more, in a container: fail under 1 GiB when a model is to be cut over cards, else warn; warn
    under 8 GiB. On a host: info under 1 GiB.
    Why: Docker gives 64 MiB. NCCL puts its buffers there whenever cards cannot reach each other directly, which is
    every unpatched GeForce without a bridge, and ends with "Error while creating shared memory segment".
    Do: docker run --ipc=host, or --shm-size=8g.
    """
    cards, size = usable_cards(inspection), inspection.host.shm_bytes
    wanted = purpose.tensor_parallel if purpose.tensor_parallel is not None else len(cards)
    if wanted < 2:
        return
    if size is None:
        yield unread(inspection, _SHARED_MEMORY, "shm")
        return
    inside, cut = in_container(inspection), (purpose.tensor_parallel or 1) > 1
    if size < (8 * GIB if inside else GIB):
        severity = Severity.fail if cut and size < GIB else Severity.warn
        yield Finding(
            severity=severity if inside else Severity.info,
            summary=f"{_SHARED_MEMORY} has {_size(size)}; engines on {wanted} cards want 8 GiB, at least 1 GiB",
            evidence=(Evidence(path=_SHARED_MEMORY, value=_size(size)),),
            fix=("docker run --ipc=host IMAGE", "docker run --shm-size=8g IMAGE  # instead")
            if inside
            else ("sudo mount -o remount,size=8G /dev/shm",),
            needs_root=not inside,
        )


def _size(size_bytes: int) -> str:
    return f"{size_bytes // 1024**2} MiB" if size_bytes < GIB else gib(size_bytes)


@check("container-visibility", Area.container, "A", about=(subjects.container,))
def container_visibility(inspection: Inspection, _purpose: Purpose) -> Said:
    """A container that sees fewer cards than the host has.

    Read: NVIDIA_VISIBLE_DEVICES, NVIDIA_DRIVER_CAPABILITIES, /dev/nvidia0 and on, /proc/driver/nvidia/gpus.
    Rule: in a container on a host with NVIDIA cards: fail when none is given, or without the capability compute; warn
    when fewer are given than the host has (say so with --device and ignore it).
    Why: inside, cards are numbered anew, so that number 0 may be another card than outside.
    Do: docker run --gpus all, or --device nvidia.com/gpu=all; choose cards by UUID.
    """
    facts = inspection.container
    if not in_container(inspection):
        return
    nodes, total = facts.device_nodes, facts.host_gpus
    if not nodes and not total and not usable_cards(inspection, "nvidia"):
        return  # no sign of a card of NVIDIA's, here or outside
    if nodes is None or total is None:
        yield unread(inspection, "the cards of the container and of its host", "/dev/nvidia", "driver/nvidia/gpus")
    evidence = (
        Evidence(path="NVIDIA_VISIBLE_DEVICES", value=facts.visible_devices or "not set"),
        Evidence(path="/dev/nvidia[0-9]*", value="unknown" if nodes is None else str(nodes)),
        Evidence(path="/proc/driver/nvidia/gpus", value="unknown" if total is None else str(total)),
    )
    if total and nodes == 0:
        yield Finding(
            severity=Severity.fail,
            summary=f"this container was given none of the host's {total} cards",
            evidence=evidence,
            fix=(_RECREATE, "docker run --device nvidia.com/gpu=all IMAGE  # with CDI"),
        )
        return
    if total and nodes is not None and nodes < total:
        yield Finding(
            severity=Severity.warn,
            summary=f"this container was given {nodes} of the host's {total} cards",
            evidence=evidence,
            fix=(_RECREATE, "choose cards by UUID (nvidia-smi -L): inside, cards are numbered anew"),
        )
    abilities = {word.strip() for word in (facts.capabilities or "all").split(",")}
    if nodes and not abilities & {"all", "compute"}:
        yield Finding(
            severity=Severity.fail,
            summary="this container may not compute on its cards",
            evidence=(Evidence(path="NVIDIA_DRIVER_CAPABILITIES", value=facts.capabilities or ""),),
            fix=("docker run -e NVIDIA_DRIVER_CAPABILITIES=compute,utility IMAGE",),
        )


@check("container-cgroup-lost", Area.container, "A", about=(subjects.nvidia, subjects.containers))
def container_cgroup_lost(inspection: Inspection, _purpose: Purpose) -> Said:
    """A container that lost its cards while it ran, or Docker set up so that one can.

    Read: in a container NVML's error 999 ("Unknown Error"); on a host Docker's cgroup driver and the links of
    /dev/char.
    Rule: fail on 999 in a container; info on a host where the driver is systemd, and there are neither links nor CDI.
    Why: with such links absent, systemctl daemon-reload takes the devices from running containers. Hours later Ollama
    computes on the processor, and says nothing.
    Do: make the container again; then create the links, or use CDI.
    """
    if in_container(inspection):
        error = inspection.driver.nvml_error
        if error is None and inspection.container.device_nodes:
            yield unread(inspection, "NVML's answer", "nvmlInit", "NVML")
        elif error == _NVML_UNKNOWN_ERROR:
            yield Finding(
                severity=Severity.fail,
                summary="this container lost its cards, as after systemctl daemon-reload on the host",
                evidence=(Evidence(path="nvmlInit", value="999 (Unknown Error)"),),
                fix=(_RECREATE, "sudo nvidia-ctk system create-dev-char-symlinks --create-all  # on the host"),
            )
        return
    facts = inspection.container
    if not facts.docker or not usable_cards(inspection, "nvidia") or facts.cdi_files:
        return
    if facts.cgroup_driver is None or facts.device_links is None:
        yield unread(inspection, "Docker's cgroup driver and the links of /dev/char", "docker", "/dev/char")
    elif facts.cgroup_driver == "systemd" and not facts.device_links:
        yield Finding(
            severity=Severity.info,
            summary="containers can lose their cards after systemctl daemon-reload",
            evidence=(
                Evidence(path="docker info, cgroup driver", value="systemd"),
                Evidence(path="/dev/char/195:*", value="absent"),
            ),
            fix=("sudo nvidia-ctk system create-dev-char-symlinks --create-all",),
            needs_root=True,
        )


@check("container-toolkit", Area.container, "A", about=(subjects.nvidia_card, subjects.containers))
def container_toolkit(inspection: Inspection, _purpose: Purpose) -> Said:
    """Docker that cannot give NVIDIA cards to a container, or gives them by an old description.

    Read: Docker's runtimes, the CDI files in /etc/cdi and /var/run/cdi, and their age against the driver's.
    Rule: on a host with NVIDIA cards and Docker: info when there is neither the runtime nor CDI (mgpu needs neither);
    warn when a CDI file is older than the driver, because it names libraries that are gone.
    Why: docker answers "could not select device driver" or starts a container without libraries.
    Do: sudo nvidia-ctk runtime configure --runtime=docker; sudo nvidia-ctk cdi generate.
    """
    facts = inspection.container
    if in_container(inspection) or not usable_cards(inspection, "nvidia"):
        return
    if facts.docker is None:
        yield unread(inspection, "whether Docker is installed", "docker")
    elif facts.docker and not facts.docker_nvidia_runtime and not facts.cdi_files:
        if facts.docker_nvidia_runtime is None:
            yield unread(inspection, "Docker's runtimes", "docker")
            return
        fix = steps(inspection, Task.container_toolkit)
        ready = tuple(step for step in fix if step.startswith("sudo nvidia-ctk")) if facts.toolkit else ()
        yield Finding(
            severity=Severity.info,
            summary="Docker cannot give cards to containers: neither NVIDIA's runtime nor CDI",
            evidence=(Evidence(path="docker info, runtimes", value="no nvidia"),),
            fix=ready or fix,
            needs_root=True,
        )
    if facts.cdi_files and facts.cdi_older_than_driver is None:
        yield unread(inspection, "the age of the CDI files", "cdi")
    elif facts.cdi_files and facts.cdi_older_than_driver:
        yield Finding(
            severity=Severity.warn,
            summary="the CDI description of the cards is older than the driver",
            evidence=tuple(Evidence(path=path, value="older than the driver") for path in facts.cdi_files[:4]),
            fix=(f"sudo nvidia-ctk cdi generate --output={shlex.quote(facts.cdi_files[0])}",),
            needs_root=True,
        )


CHECKS: tuple[Check, ...] = (shm_small, container_visibility, container_cgroup_lost, container_toolkit)
