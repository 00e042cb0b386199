"""Checks of the computer around the cards: processors, limits, ports, and what the doctor may not read."""

from __future__ import annotations

from collections.abc import Sequence

from mgpu.doctor import subjects
from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import is_hosts, named, unread, usable_cards
from mgpu.machine.host_facts import ENGINE_PORTS
from mgpu.machine.inspection import Inspection, Unread
from mgpu.machine.layout import in_container, is_wsl
from mgpu.machine.sysfs import ranges
from mgpu.units import MIB

_ENOUGH_LOCKED_BYTES = 64 * MIB
_MOST_LISTED = 6


@check("memlock", Area.host, "A", about=(subjects.several_cards,))
def memlock(inspection: Inspection, _purpose: Purpose) -> Said:
    """A low limit of memory that may be locked.

    Read: RLIMIT_MEMLOCK.
    Rule: info under 64 MiB with two cards or more.
    Why: --mlock cannot hold the weights, and NCCL over InfiniBand ends with "unhandled system error". Cards in one
    computer do without, so it is never a warning.
    Do: docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity in the unit.
    """
    if inspection.host.memlock_unlimited:
        return
    limit = inspection.host.memlock_bytes
    if limit is None:
        yield unread(inspection, "RLIMIT_MEMLOCK", "MEMLOCK", "rlimit")
    elif limit < _ENOUGH_LOCKED_BYTES:
        yield Finding(
            severity=Severity.info,
            summary="little memory may be locked, which only --mlock and InfiniBand want",
            evidence=(Evidence(path="RLIMIT_MEMLOCK", value=f"{limit // 1024} KiB"),),
            fix=("LimitMEMLOCK=infinity in the unit, or docker run --ulimit memlock=-1 --cap-add IPC_LOCK",),
        )


@check("numa-affinity", Area.host, "B", about=(subjects.card,))
def numa_affinity(inspection: Inspection, _purpose: Purpose) -> Said:
    """Memory or processors that are far from the cards, or a kernel that moves pages about.

    Read: /sys/devices/system/node, numa_node and local_cpulist of the cards, Cpus_allowed_list in /proc/self/status,
    /proc/sys/kernel/numa_balancing.
    Rule: with two nodes or more: warn when a card's own node has no memory; info when this process may run on none of
    the processors that are near a card; info when automatic balancing is on (warn with AMD cards, whose maker says to
    turn it off).
    Why: copies to such a card cross from the other socket, and balancing unmaps pages in the middle of them.
    Do: put memory into the empty node's slots; numactl --cpunodebind=N --membind=N with the card's node, or end the
    limit that taskset, numactl or a cpuset sets; sudo sysctl kernel.numa_balancing=0.
    """
    cards, nodes, host = usable_cards(inspection), inspection.machine.host.numa_nodes, inspection.host
    if nodes is None:
        yield unread(inspection, "NUMA nodes", "system/node", "numa")
        return
    if nodes < 2:
        return
    places = {device.address: device.numa_node for device in inspection.pci}
    for node in host.nodes_without_memory:
        if far := [gpu.index for gpu in cards if places.get(gpu.bus_id or "") == node]:
            yield Finding(
                severity=Severity.warn,
                summary=f"the socket of {named(far)} has no memory of its own",
                evidence=(Evidence(path=f"/sys/devices/system/node/node{node}/meminfo", value="MemTotal = 0"),),
                fix=("put memory modules into the slots of that socket, or set NPS1 in the BIOS",),
                gpus=tuple(far),
            )
    yield from _far_processors(inspection)
    if host.numa_balancing is None:
        yield unread(inspection, "NUMA balancing", "numa_balancing")
    elif host.numa_balancing:
        amd = [gpu.index for gpu in cards if gpu.vendor == "amd"]
        yield Finding(
            severity=Severity.warn if amd else Severity.info,
            summary="the kernel moves memory between sockets while engines use it",
            evidence=(Evidence(path="/proc/sys/kernel/numa_balancing", value="1"),),
            fix=("sudo sysctl kernel.numa_balancing=0",),
            gpus=tuple(amd),
            needs_root=True,
        )


def _far_processors(inspection: Inspection) -> Said:
    """The cards none of whose near processors this process may use; those of one node are one finding."""
    listed = inspection.host.allowed_cpu_list
    allowed, devices = ranges(listed), {device.address: device for device in inspection.pci}
    if allowed is None:
        if inspection.host.numa_balancing is not None:  # else that is said, and once is enough
            yield unread(inspection, "the processors of this process", "self/status")
        return
    far: dict[tuple[int | None, str], list[int]] = {}
    for gpu in usable_cards(inspection):
        found = devices.get(gpu.bus_id or "")
        near = ranges(found.local_cpus) if found else None
        if found and near and not any(a <= d and c <= b for a, b in near for c, d in allowed):
            far.setdefault((found.numa_node, found.local_cpus or ""), []).append(gpu.index)
    for (node, near_list), indices in far.items():
        yield Finding(
            severity=Severity.info,
            summary=f"this process may not run on the processors near {named(indices)}",
            evidence=(
                Evidence(path="/proc/self/status Cpus_allowed_list", value=(listed or "")[:80]),
                Evidence(path=f"local_cpulist of {named(indices)}", value=near_list[:80]),
            ),
            fix=(f"numactl --cpunodebind={node} --membind={node} mgpu run MODEL",) if node is not None else (),
            gpus=tuple(indices),
        )


@check("cpu-caps", Area.host, "B")
def cpu_caps(inspection: Inspection, purpose: Purpose) -> Said:
    """A processor without AVX2, or with too few cores.

    Read: the flags in /proc/cpuinfo, the physical cores, and those that this program may use.
    Rule: warn on an x86 without AVX2; warn when there are fewer cores than ranks and one for the rest.
    Why: ready-made wheels stop with "illegal instruction" without AVX2, and every rank of vLLM spins on a core.
    Do: build the engine on this computer; use fewer ranks, or more cores.
    """
    host = inspection.host
    if host.avx2 is False:
        yield Finding(
            severity=Severity.warn,
            summary="the processor has no AVX2, and ready-made engines may end on it at once",
            evidence=(Evidence(path="/proc/cpuinfo flags", value="no avx2"),),
            fix=("build the engine on this computer: cmake -B build -DGGML_NATIVE=ON",),
        )
    elif not host.cpu_flags_known:
        yield unread(inspection, "the processor's flags", "cpuinfo")
    counts = [count for count in (inspection.machine.host.cores, host.allowed_cpus) if count is not None]
    ranks = purpose.tensor_parallel or 1
    if not counts:
        yield unread(inspection, "the number of cores", "cpu", "topology")
    elif min(counts) < ranks + 1:
        cores = min(counts)
        yield Finding(
            severity=Severity.warn,
            summary=f"{cores} processor core{'s' * (cores != 1)} for {ranks} rank{'s' * (ranks != 1)} and the rest",
            evidence=(
                Evidence(path="physical cores", value=str(inspection.machine.host.cores or "unknown")),
                Evidence(path="/proc/self/status Cpus_allowed", value=str(host.allowed_cpus or "unknown")),
            ),
            fix=("give the virtual machine or container more processors, or cut over fewer cards",),
        )


@check("cpu-governor", Area.host, "B")
def cpu_governor(inspection: Inspection, _purpose: Purpose) -> Said:
    """A processor that is told to save power.

    Read: /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor.
    Rule: info when one is "powersave", never more: no measurement shows an effect on tokens per second, and with
    intel_pstate the word means what "ondemand" means elsewhere. Virtual machines have none.
    Why: processors that are slow to wake could delay the start of kernels.
    Do: sudo cpupower frequency-set -g performance, and measure.
    """
    host = inspection.machine.host
    if not inspection.host.governors:
        if host.virtualisation == "none" and host.container == "none" and usable_cards(inspection):
            yield unread(inspection, "the frequency governor", "cpufreq", "governor")
    elif "powersave" in inspection.host.governors:
        yield Finding(
            severity=Severity.info,
            summary="the processor saves power, without a known effect on token rates",
            evidence=(Evidence(path="/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor", value="powersave"),),
            fix=("sudo cpupower frequency-set -g performance",),
            needs_root=True,
        )


@check("port-exposed", Area.host, "B")
def port_exposed(inspection: Inspection, purpose: Purpose) -> Said:
    """A port that is taken, or an engine that the whole network reaches.

    Read: /proc/net/tcp and tcp6.
    Rule: info when the port that is wanted is listened on, for mgpu run takes the next free one; info when an engine's
    usual port (8000, 8080, 11434) is open on all addresses.
    Why: engines answer anyone who reaches them, and ports that Docker publishes pass by ufw.
    Do: another --port; --host 127.0.0.1, OLLAMA_HOST=127.0.0.1, docker run -p 127.0.0.1:8000:8000.
    """
    host = inspection.host
    if not host.listeners_known:
        yield unread(inspection, "the ports in use", "net/tcp")
        return
    taken = sorted({listener.port for listener in host.listeners})
    if purpose.port is not None and purpose.port in taken:
        yield Finding(
            severity=Severity.info,
            summary=f"port {purpose.port} is taken by another program; mgpu run takes the next free one",
            evidence=(Evidence(path="/proc/net/tcp", value=f"port {purpose.port} in state LISTEN"),),
            fix=(f"ss -ltnp 'sport = :{purpose.port}'  # shows by which",),
        )
    wide = sorted({listener.port for listener in host.listeners if listener.everywhere})
    for port in (port for port in wide if port in (*ENGINE_PORTS, purpose.port)):
        yield Finding(
            severity=Severity.info,
            summary=f"port {port} is open to the whole network",
            evidence=(Evidence(path="/proc/net/tcp", value=f"0.0.0.0:{port}"),),
            fix=("start the engine with --host 127.0.0.1 (Ollama: OLLAMA_HOST=127.0.0.1)",),
        )


@check("cannot-read", Area.host, "B")
def cannot_read(inspection: Inspection, _purpose: Purpose) -> Said:
    """What the doctor was not allowed to read, or could not.

    Read: the reasons that were kept while reading.
    Rule: never a finding; two lines at most, one of what root could read, one of the rest. What no container is shown,
    and no WSL2, is left to the checks that ask for it.
    Why: silence about what was not looked at would pass for health.
    Do: sudo mgpu doctor, with --only for the checks that are named.
    """
    confined = in_container(inspection) or is_wsl(inspection)
    told = [each for each in inspection.unread if not (confined and is_hosts(each.what))]
    for needs_root in (True, False):
        missed = [each for each in told if each.needs_root is needs_root]
        if missed:
            yield Skip(reason=_listed(missed, needs_root=needs_root), needs_root=needs_root)


def _listed(missed: Sequence[Unread], *, needs_root: bool) -> str:
    names = ", ".join(dict.fromkeys(each.what for each in missed[:_MOST_LISTED]))
    more = f" and {len(missed) - _MOST_LISTED} more" if len(missed) > _MOST_LISTED else ""
    if needs_root:
        return f"only root may read {names}{more}"
    return f"could not be read: {names}{more} ({missed[0].why})"


CHECKS: tuple[Check, ...] = (memlock, numa_affinity, cpu_caps, cpu_governor, port_exposed, cannot_read)
