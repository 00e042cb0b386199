"""All that `mgpu doctor` judges, as one value: the machine, and what only a diagnosis asks of it. JSON both ways.

Every fact has three values: something, nothing, and unknown, which is None (or, of a list, that its `..._known` is
False). What could not be read is in `unread` with the reason, and is never taken for "all is well".
No serial number, host name, user name or address of the network is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mgpu.machine.snapshot import Machine, value_from_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """Something that could not be read: `what` is a path or a function, `why` a few words; `needs_root` where root
    could."""

    what: str
    why: str
    needs_root: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaDriver:
    """The NVIDIA driver as it is installed and loaded. `nvml_error` is the number with which NVML refuses (18: library
    and module differ, 9: no driver, 12: no library, 999: unknown); 0 is no refusal, -1: it did not answer, None: NVML
    was not asked.
    `on_disk` is whether there is a module for the kernel that runs, `on_disk_version` which would be loaded next, and
    `on_disk_open` whether that is the open one; `open_module` is about the loaded one. `node_maker` is whether a setuid
    nvidia-modprobe lies where the driver's libraries start it to make the device nodes they miss."""

    nvml_error: int | None = None
    loaded_version: str | None = None
    library_version: str | None = None
    on_disk_version: str | None = None
    on_disk: bool | None = None
    on_disk_open: bool | None = None
    open_module: bool | None = None
    cuda_version: int | None = None
    uvm_loaded: bool | None = None
    uvm_on_disk: bool | None = None
    node_maker: bool | None = None
    uvm_device: bool | None = None
    control_device: bool | None = None
    secure_boot: bool | None = None
    registry_dwords: str | None = None
    uvm_disable_hmm: bool | None = None
    nvswitch: bool | None = None
    fabric_manager: str | None = None
    fabric_manager_version: str | None = None
    persistence_daemon: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What changes from second to second: three or so of them show what lasts. `events` is NVML's mask of reasons for
    lower clocks (0x01 idle, 0x04 power cap, 0x08 hardware slowdown, 0x20 and 0x40 thermal, 0x80 power brake)."""

    at_s: float
    utilisation_percent: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    pstate: int | None = None
    events: int | None = None
    sm_clock_mhz: int | None = None
    pcie_gen: int | None = None
    pcie_width: int | None = None
    pcie_replays: int | None = None
    nvlink_errors: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardHealth:
    """What only a diagnosis asks of a card; `gpu` is its index in the machine, `bus_id` as sysfs writes it.

    `nvml_error` is the number with which the card refuses all questions (15: lost, 16: needs a reset), 0 if none.
    Powers are W, clocks MHz: `power_requested_w` is the limit that somebody set, `power_enforced_w` what holds now,
    which in a laptop changes by itself. `temperature_margin_c` is how far the card is from its limit. Where
    `used_by_known` is False, the driver did not tell which processes use the card, and the machine's `used_by` proves
    nothing.
    """

    gpu: int
    bus_id: str | None = None
    nvml_error: int | None = None
    persistence: bool | None = None
    compute_mode: int | None = None
    power_default_w: float | None = None
    power_min_w: float | None = None
    power_max_w: float | None = None
    power_requested_w: float | None = None
    power_enforced_w: float | None = None
    temperature_slowdown_c: int | None = None
    temperature_margin_c: int | None = None
    sm_clock_max_mhz: int | None = None
    reserved_bytes: int | None = None
    used_by_known: bool = False
    ecc_enabled: bool | None = None
    ecc_uncorrected_volatile: int | None = None
    ecc_uncorrected_aggregate: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    retired_pages_pending: bool | None = None
    recovery_action: int | None = None
    mig_pending: bool | None = None
    pcie_gen_device: int | None = None
    fabric_state: int | None = None
    fabric_status: int | None = None
    virtualisation_mode: int | None = None
    readings: tuple[Readings, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAccess:
    """What the driver claims for two cards: NVML's P2P status for reads and writes (0 OK, 1 chipset, 2 GPU, 3 topology,
    4 registry, 5 not supported, 6 unknown) and their nearest common ancestor (0, 10 PIX, 20 PXB, 30 PHB, 40 NODE,
    50 SYS)."""

    a: int
    b: int
    read: int | None = None
    write: int | None = None
    ancestor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PciDevice:
    """A graphics card, or a bridge above one. `parent` is the address of the bridge above, None at the root.

    `acs` is the ACS control word (0x04 request redirect, 0x08 completion redirect, 0x10 upstream forwarding), None
    where it has none or may not be read (`acs_known`). AER counters are totals since boot, and `aer_fresh` is how many
    of the corrected errors came within half a second of now. `bar_bytes` is the size of its largest memory region.
    `in_kfd` is whether AMD's compute driver, where it is loaded, lists the card, and `kfd_node` the number that it has
    there.
    """

    address: str
    vendor: int | None = None
    device: int | None = None
    pci_class: int | None = None
    driver: str | None = None
    parent: str | None = None
    gen: int | None = None
    gen_max: int | None = None
    width: int | None = None
    width_max: int | None = None
    iommu_group: str | None = None
    iommu_type: str | None = None
    acs: int | None = None
    acs_known: bool = False
    aer_correctable: int | None = None
    aer_nonfatal: int | None = None
    aer_fatal: int | None = None
    aer_fresh: int | None = None
    numa_node: int | None = None
    local_cpus: str | None = None
    bar_bytes: int | None = None
    atomics: bool | None = None
    in_kfd: bool | None = None
    kfd_node: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """A line of the kernel's log that matters: `age_s` seconds old; `kind` is "xid", "bus", "init", "key", "hmm" or
    "amdgpu"; `number` is an Xid's; `bus_id` the card's, where named. A link's errors are counted in sysfs, which misses
    fewer of them than the log."""

    kind: str
    text: str
    age_s: float | None = None
    number: int | None = None
    bus_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpace:
    """A folder that models are kept in (its role, such as "Hugging Face cache"), and the disk it is on."""

    role: str
    path: str
    free_bytes: int | None = None
    total_bytes: int | None = None
    file_system: str | None = None
    rotational: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A TCP port that is listened on; `everywhere` when it is on all addresses."""

    port: int
    everywhere: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitVariable:
    """A variable that systemd gives to an engine's service: the `unit` (a `user`'s or the system's), and the file that
    sets it."""

    unit: str
    path: str
    name: str
    value: str
    user: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The computer around the cards, as far as it breaks or slows them.

    `kernel_command_line` holds only the options that matter to cards. `boot_loader` is what has the kernel's options
    changed: "kernelstub" (Pop!_OS), "proxmox" (proxmox-boot-tool) or "grub", None where none of them is known to.
    `memory_pressure_percent` is the share of the last minute in which something waited for memory. `allowed_cpus`
    counts the processors that this process may use, by affinity and quota; `allowed_cpu_list` names those of its
    affinity ("0-7,16"). `governors` are those in use, each once. `environment`, `nccl_configuration` and
    `unit_variables` hold only the variables that change what engines do with cards. `distribution` is the family of
    Linux distributions: "debian", "fedora", "arch", "suse" or "nixos".
    """

    distribution: str | None = None
    boot_age_s: float | None = None
    boot_loader: str | None = None
    kernel_command_line: str | None = None
    wsl: bool | None = None
    iommu_present: bool | None = None
    vfio_in_use: bool | None = None
    shm_bytes: int | None = None
    memlock_bytes: int | None = None
    memlock_unlimited: bool | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    memory_limit_bytes: int | None = None
    memory_pressure_percent: float | None = None
    numa_balancing: bool | None = None
    nodes_without_memory: tuple[int, ...] = ()
    cpu_flags_known: bool = False
    avx2: bool | None = None
    allowed_cpus: int | None = None
    allowed_cpu_list: str | None = None
    governors: tuple[str, ...] = ()
    cpu_power_w: float | None = None
    environment: tuple[tuple[str, str], ...] = ()
    nccl_configuration: tuple[tuple[str, str], ...] = ()
    unit_variables: tuple[UnitVariable, ...] = ()
    disks: tuple[DiskSpace, ...] = ()
    listeners: tuple[Listener, ...] = ()
    listeners_known: bool = False
    log: tuple[LogEntry, ...] = ()
    log_known: bool = False
    vllm_p2p_cache_age_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFacts:
    """What a container was given, and what Docker on a host can give. `cgroup_driver` is Docker's ("systemd" or
    "cgroupfs"); `device_links` is whether /dev/char has links to the NVIDIA devices."""

    visible_devices: str | None = None
    capabilities: str | None = None
    device_nodes: int | None = None
    host_gpus: int | None = None
    docker: bool | None = None
    docker_nvidia_runtime: bool | None = None
    cdi_files: tuple[str, ...] = ()
    cdi_older_than_driver: bool | None = None
    toolkit: bool | None = None
    cgroup_driver: str | None = None
    device_links: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AmdFacts:
    """AMD's side: the compute driver's device, who may open it, and the version of its module."""

    kfd_device: bool | None = None
    kfd_accessible: bool | None = None
    render_nodes: tuple[str, ...] = ()
    render_accessible: bool | None = None
    user_groups: tuple[str, ...] = ()
    module_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelFacts:
    """Intel's side: the nodes of its cards, and whether this user may compute through all of them."""

    render_nodes: tuple[str, ...] = ()
    render_accessible: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledEngine:
    """An engine as it is installed; lists are None where it could not be asked without starting it."""

    backend: str
    version: str | None = None
    path: str | None = None
    cpu_build: bool | None = None
    cuda_runtime: int | None = None
    architectures: tuple[str, ...] = ()
    architectures_known: bool = False
    nccl: bool | None = None
    nccl_version: str | None = None
    devices: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything. `machine` is as `mgpu gpus` has it; `mgpu_processes` are those on its cards that an mgpu started."""

    schema_version: int = SCHEMA_VERSION
    machine: Machine
    driver: NvidiaDriver = field(default_factory=NvidiaDriver)
    cards: tuple[CardHealth, ...] = ()
    peers: tuple[PeerAccess, ...] = ()
    pci: tuple[PciDevice, ...] = ()
    pci_known: bool = False
    host: HostFacts = field(default_factory=HostFacts)
    container: ContainerFacts = field(default_factory=ContainerFacts)
    amd: AmdFacts = field(default_factory=AmdFacts)
    intel: IntelFacts = field(default_factory=IntelFacts)
    engines: tuple[InstalledEngine, ...] = ()
    mgpu_processes: tuple[int, ...] = ()
    root: bool = False
    unread: tuple[Unread, ...] = ()


def inspection_from_json(data: object) -> Inspection:
    """Rebuild an Inspection from `to_json`'s output; unknown keys are ignored.

    Raises ValueError naming the path of the first value of a wrong type, missing, out of range, or about a card that
    is not in the machine.
    """
    found = value_from_json(Inspection, data, "inspection")
    if found.schema_version > SCHEMA_VERSION:
        raise ValueError(f"inspection has schema version {found.schema_version}, newest known is {SCHEMA_VERSION}")
    indices = {gpu.index for gpu in found.machine.gpus}
    for position, card in enumerate(found.cards):
        if card.gpu not in indices:
            raise ValueError(f"inspection.cards[{position}].gpu: the machine has no card {card.gpu}")
    for position, peer in enumerate(found.peers):
        if peer.a not in indices or peer.b not in indices or peer.a == peer.b:
            raise ValueError(f"inspection.peers[{position}]: {peer.a} and {peer.b} are not two cards of the machine")
    return found
