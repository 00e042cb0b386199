"""Builds a root like "/" for MGPU_ROOT: a computer's /proc, /sys, /dev and /etc from a small description."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

KERNEL = "6.8.0-90-generic"
SPEEDS = {1: "2.5", 2: "5.0", 3: "8.0", 4: "16.0", 5: "32.0", 6: "64.0"}
AMD_ROOT_PORT = (0x1022, 0x14DB)

_FLAGS = "fpu sse sse2 sse4_2 avx avx2 fma"
_HOST: dict[str, str | bytes] = {
    "proc/sys/kernel/osrelease": f"{KERNEL}\n",
    "proc/sys/kernel/numa_balancing": "0\n",
    "proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=5c3f quiet splash iommu=pt\n",
    "proc/uptime": "86400.00 600000.00\n",
    "proc/cpuinfo": f"processor\t: 0\nmodel name\t: AMD Ryzen 9 7950X 16-Core Processor\nflags\t\t: {_FLAGS}\n\n",
    "proc/meminfo": "MemTotal: 131072000 kB\nMemAvailable: 120000000 kB\nSwapTotal: 8388608 kB\nSwapFree: 8388608 kB\n",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 total=0\n",
    "proc/self/status": "Name:\tmgpu\nCpus_allowed_list:\t0-31\n",
    "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax locked memory  unlimited  unlimited  bytes  \n",
    "proc/self/cgroup": "0::/\n",
    "proc/self/mountinfo": "22 1 259:2 / / rw,relatime - ext4 /dev/nvme0n1p2 rw\n"
    "30 22 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=65536000k,inode64\n",
    "proc/1/cgroup": "0::/init.scope\n",
    "proc/net/tcp": "  sl  local_address rem_address   st tx_queue\n",
    "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       131072000 kB\n",
    **{f"sys/devices/system/cpu/cpu{number}/topology/core_id": f"{number % 16}\n" for number in range(32)},
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "performance\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw": "162000000\n",
    "sys/devices/nvme/nvme0n1/queue/rotational": "0\n",
    "sys/devices/nvme/nvme0n1/nvme0n1p2/partition": "2\n",
    "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": b"\x06\0\0\0\0",
    "dev/kmsg": "6,1,0,-;Linux version 6.8.0\n",
    "etc/os-release": 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n',
    "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet splash"\n',
    "etc/group": "root:x:0:\nvideo:x:44:\nrender:x:992:\n",
    "usr/bin/env": "",
}
_FOLDERS = ("dev", "run", "sys/module", "sys/class/iommu", "sys/bus/pci/devices", "sys/bus/pci/drivers")


class SysfsTree:
    """A root that grows; each method writes files and gives the tree back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in _FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)

    def files(self, files: dict[str, str | bytes]) -> SysfsTree:
        """Write files by their path under the root."""
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self

    def link(self, name: str, target: str) -> SysfsTree:
        """Make a relative symbolic link, as sysfs does, to another path under the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.root / target, path.parent))
        return self

    def host(self, files: dict[str, str | bytes] | None = None) -> SysfsTree:
        """Write a desktop of 16 cores on bare metal that nothing is wrong with, with `files` over it."""
        self.files({**_HOST, **(files or {})})
        return self.link("sys/dev/block/259:2", "sys/devices/nvme/nvme0n1/nvme0n1p2")

    def device(
        self,
        address: str,
        *,
        below: str | None = None,
        ids: tuple[int, int] = AMD_ROOT_PORT,
        pci_class: int = 0x060400,
        driver: str | None = "pcieport",
        gen: tuple[int, int] = (4, 4),
        width: tuple[int, int] = (16, 16),
        group: tuple[int, str] | None = None,
        acs: int | None = 0,
        configuration: int = 4096,
        atomics: bool = True,
        aer: tuple[int, int, int] = (0, 0, 0),
        numa_node: int = -1,
        bar_bytes: int = 32 * 1024**3,
    ) -> SysfsTree:
        """Add a PCI device under the bridge at `below`, with its link now and at most, its IOMMU group and its type,
        and as much of its configuration space as may be read (64 bytes without root)."""
        parent = self._folder(below) if below else "sys/devices/pci0000:00"
        folder = f"{parent}/{address}"
        bridge = pci_class >> 8 == 0x0604
        files = {
            "vendor": f"{ids[0]:#06x}\n",
            "device": f"{ids[1]:#06x}\n",
            "class": f"{pci_class:#08x}\n",
            "current_link_speed": f"{SPEEDS[gen[0]]} GT/s PCIe\n",
            "max_link_speed": f"{SPEEDS[gen[1]]} GT/s PCIe\n",
            "current_link_width": f"{width[0]}\n",
            "max_link_width": f"{width[1]}\n",
            "aer_dev_correctable": f"RxErr 0\nBadTLP {aer[0]}\nTOTAL_ERR_COR {aer[0]}\n",
            "aer_dev_nonfatal": f"Undefined 0\nTOTAL_ERR_NONFATAL {aer[1]}\n",
            "aer_dev_fatal": f"Undefined 0\nTOTAL_ERR_FATAL {aer[2]}\n",
            "numa_node": f"{numa_node}\n",
            "local_cpulist": "0-31\n",
            "resource": f"0x00000000f6000000 0x00000000f6ffffff 0x40200\n{0x4000000000:#018x} "
            f"{0x4000000000 + bar_bytes - 1:#018x} 0x14220c\n",
        }
        self.files({f"{folder}/{name}": content for name, content in files.items()})
        space = configuration_space(bridge=bridge, acs=acs, atomics=atomics)[:configuration]
        self.files({f"{folder}/config": space})
        self.link(f"sys/bus/pci/devices/{address}", folder)
        if driver:
            (self.root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            self.link(f"{folder}/driver", f"sys/bus/pci/drivers/{driver}")
            self.link(f"sys/bus/pci/drivers/{driver}/{address}", folder)
        if group:
            self.files({f"sys/kernel/iommu_groups/{group[0]}/type": f"{group[1]}\n"})
            self.link(f"{folder}/iommu_group", f"sys/kernel/iommu_groups/{group[0]}")
        return self

    def nvidia_driver(self, version: str, *, open_module: bool = True, cards: tuple[str, ...] = ()) -> SysfsTree:
        """Load and install the NVIDIA driver, with a library and module of one version."""
        flavour = "NVIDIA UNIX Open Kernel Module" if open_module else "NVIDIA UNIX x86_64 Kernel Module"
        self.files(
            {
                "sys/module/nvidia/version": f"{version}\n",
                "sys/module/nvidia_uvm/parameters/uvm_disable_hmm": "N\n",
                "proc/driver/nvidia/version": f"NVRM version: {flavour}  {version}  Release Build\n",
                "proc/driver/nvidia/params": 'EnableMSI: 1\nRegistryDwords: ""\n',
                f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{version}": "",
                f"lib/modules/{KERNEL}/modules.dep": "kernel/fs/ext4.ko.zst:\nupdates/dkms/nvidia.ko.zst:\n"
                "updates/dkms/nvidia-uvm.ko.zst: updates/dkms/nvidia.ko.zst\n",
                "usr/bin/nvidia-modprobe": "",
                "dev/nvidiactl": "",
                "dev/nvidia-uvm": "",
                **{f"dev/nvidia{index}": "" for index in range(len(cards))},
                **{f"proc/driver/nvidia/gpus/{card}/information": "Model: \t NVIDIA\n" for card in cards},
            }
        )
        (self.root / "usr/bin/nvidia-modprobe").chmod(0o4755)
        self.link("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{version}")
        return self.link(
            f"var/lib/dkms/nvidia/kernel-{KERNEL}-x86_64", f"var/lib/dkms/nvidia/{version}/{KERNEL}/x86_64"
        )

    def _folder(self, address: str) -> str:
        return str((self.root / "sys/bus/pci/devices" / address).resolve().relative_to(self.root.resolve()))


def tree_of_rig(
    root: Path,
    rig: Path,
    *,
    acs: int = 0,
    group_type: str | None = None,
    besides: tuple[str, ...] = (),
    configuration: int = 4096,
) -> SysfsTree:
    """Build the computer around the cards of a rig of the fake NVML library: healthy, each card on a root port as wide
    as its link, and with `group_type` behind an IOMMU. The cards `besides` are left to be put elsewhere; as much of the
    `configuration` space may be read as `SysfsTree.device` says."""
    facts = dict(line.split(" = ", 1) for line in rig.read_text().splitlines() if " = " in line and line[0] != "#")
    tree = SysfsTree(root).host()
    addresses = tuple(f"{facts[f'gpu{index}.bdf']}.0" for index in range(int(facts.get("sys.count", 0))))
    for index, address in enumerate(addresses):
        if address in besides:
            continue
        device, port = int(facts[f"gpu{index}.devid"], 16), f"0000:00:{index + 1:02x}.0"
        gen, most, lanes = (int(facts[f"gpu{index}.pcie.{key}"]) for key in ("gen", "genmax", "width"))
        node = 1 if facts.get(f"topo.0.{index}") == "50" else 0
        tree.device(port, gen=(gen, most), width=(lanes, lanes), acs=acs, numa_node=node, configuration=configuration)
        tree.device(
            address,
            below=port,
            ids=(device & 0xFFFF, device >> 16),
            pci_class=0x030000,
            driver="nvidia",
            gen=(gen, int(facts.get(f"gpu{index}.pcie.gendev", most))),
            width=(lanes, 16),
            acs=None,
            group=(10 + index, group_type) if group_type else None,
            numa_node=node,
        )
    if "sys.driver" in facts:
        version = re.sub(r"[^\d.]", "", facts["sys.driver"])
        tree.nvidia_driver(version, open_module=not version.startswith("535"), cards=addresses)
    return tree


def configuration_space(*, bridge: bool, acs: int | None = None, atomics: bool = True) -> bytes:
    """4096 bytes with the capabilities that are looked for: PCI Express (0x10), AER (1) and, unless None, ACS (0xd)."""
    space = bytearray(4096)
    struct.pack_into("<H", space, 0x06, 0x10)  # there is a list of capabilities
    space[0x34] = 0x60
    struct.pack_into("<BB", space, 0x60, 0x01, 0x80)  # power management, then
    struct.pack_into("<BBH", space, 0x80, 0x10, 0x00, (4 << 4 if bridge else 0) | 2)
    struct.pack_into("<I", space, 0x80 + 0x24, 0x180 if atomics else 0)
    struct.pack_into("<H", space, 0x80 + 0x28, 0x40 if atomics and not bridge else 0)
    struct.pack_into("<I", space, 0x100, (0x148 if acs is not None else 0) << 20 | 1 << 16 | 0x0001)
    if acs is not None:
        struct.pack_into("<IHH", space, 0x148, 1 << 16 | 0x000D, 0x005F, acs)
    return bytes(space)
