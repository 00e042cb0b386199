"""What is typed to change a system, by the family of its distribution: the one table that all fixes take it from."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from mgpu.machine.inspection import Inspection
from mgpu.machine.layout import in_container

# The last branch of the driver for cards before Turing.
LAST_BRANCH_FOR_OLD_CARDS: Final = 580


class Task(StrEnum):
    """What is to be done, and the values that its commands take."""

    update_initramfs = "update the initial ramdisk"
    kernel_option = "start the kernel with {option}"
    module_option = "give {module} the {option}"
    blacklist = "keep {module} from loading"
    build_module = "build the NVIDIA module for the kernel that runs"
    enrol_key = "have Secure Boot know the key that signs the NVIDIA module"
    open_driver = "install NVIDIA's driver of {branch} with the open kernel module"
    closed_driver = "install NVIDIA's driver of {branch} with the closed kernel module"
    hold_driver = "keep NVIDIA's driver at {branch}"
    fabric_manager = "install the fabric manager of {version} ({branch} is its first part)"
    container_toolkit = "install NVIDIA's container toolkit"
    newer_nccl = "install the newest NCCL"


def steps(inspection: Inspection, task: Task, **values: object) -> tuple[str, ...]:
    """Return the commands for a task on this system, in order; where its family is unknown, or this is a container, in
    which none of it is to be done, what to do in words. `values` are those that the task names. Raises KeyError for one
    that is missing."""
    table = _TABLE[task]
    family = None if in_container(inspection) else inspection.host.distribution
    if task is Task.kernel_option and family in _WITH_BOOT_LOADERS:
        loader = inspection.host.boot_loader
        family = family if loader == "grub" else loader if family == "debian" and loader in table else None
    return tuple(line.format(**values) for line in table.get(family, table[None]))


def install_driver(inspection: Inspection, *, branch: int, open_module: bool) -> tuple[str, ...]:
    """Return how the NVIDIA driver is installed: of a branch (580), with the open or the closed kernel module. In WSL
    it is Windows that has it."""
    if inspection.host.wsl:
        return ("install NVIDIA's newest driver in Windows", "wsl --shutdown  # in Windows")
    return steps(inspection, Task.open_driver if open_module else Task.closed_driver, branch=branch)


def install_fabric_manager(inspection: Inspection, version: str | None) -> tuple[str, ...]:
    """Return how the fabric manager of exactly the driver's version is installed; in words where that is unknown."""
    if version is None or not _VERSION.fullmatch(version):
        return ("install NVIDIA's fabric manager: of exactly the driver's version",)
    return steps(inspection, Task.fabric_manager, version=version, branch=version.partition(".")[0])


# What is no version gets into no command.
_VERSION = re.compile(r"\d{3}(\.\d{1,4}){1,3}")
# Their kernel options are set with the boot loader, of which they have more than one.
_WITH_BOOT_LOADERS = ("debian", "arch", "suse")
_GRUB = "add {option} to GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub"
_REBUILD = "sudo nixos-rebuild boot && sudo reboot"
_BLACKLIST = "echo 'blacklist {module}' | sudo tee /etc/modprobe.d/blacklist-{module}.conf"
_OPTION = "echo 'options {module} {option}' | sudo tee /etc/modprobe.d/{module}-mgpu.conf"
_LEGACY_ON_NIXOS = "set hardware.nvidia.package = config.boot.kernelPackages.nvidiaPackages.legacy_580;"
_FOR_DOCKER = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
_ENROL = "sudo reboot  # and choose Enroll MOK"

# None: no known family, so no command that may be wrong. Sources: NVIDIA's driver installation guide (its pages on
# kernel modules and on version locking), packages.ubuntu.com, software.opensuse.org, and Arch's news on branch 590.
_TABLE: Final[dict[Task, dict[str | None, tuple[str, ...]]]] = {
    Task.update_initramfs: {
        "debian": ("sudo update-initramfs -u",),
        "fedora": ("sudo dracut --force",),
        "arch": ("sudo mkinitcpio -P  # or dracut-rebuild, where dracut is in its place",),
        "suse": ("sudo dracut --force",),
        "nixos": ("sudo nixos-rebuild boot",),
        None: ("build the initial ramdisk (initramfs) anew",),
    },
    Task.kernel_option: {
        "debian": (_GRUB, "sudo update-grub && sudo reboot"),
        "fedora": ("sudo grubby --update-kernel=ALL --args={option} && sudo reboot",),
        "arch": (_GRUB, "sudo grub-mkconfig -o /boot/grub/grub.cfg && sudo reboot"),
        "suse": (_GRUB, "sudo grub2-mkconfig -o /boot/grub2/grub.cfg && sudo reboot"),
        "kernelstub": ("sudo kernelstub -a {option} && sudo reboot",),
        "proxmox": (
            "add {option} to the line in /etc/kernel/cmdline, or, where that is absent, "
            + _GRUB.removeprefix("add {option} "),
            "sudo proxmox-boot-tool refresh && sudo reboot",
        ),
        "nixos": ('add "{option}" to boot.kernelParams in configuration.nix', _REBUILD),
        None: ("add {option} to the kernel's command line, in the boot loader's configuration", "sudo reboot"),
    },
    Task.module_option: {
        "nixos": (
            'set boot.extraModprobeConfig = "options {module} {option}"; in configuration.nix',
            "sudo nixos-rebuild switch",
        ),
        None: (_OPTION,),
    },
    Task.blacklist: {
        "nixos": ('add "{module}" to boot.blacklistedKernelModules in configuration.nix',),
        None: (_BLACKLIST,),
    },
    Task.build_module: {
        "debian": ("sudo apt install linux-headers-$(uname -r) && sudo dkms autoinstall",),
        "fedora": (
            "sudo dnf install kernel-devel-$(uname -r)",
            "sudo akmods --force  # or dkms autoinstall, whichever of them is installed",
        ),
        "arch": (
            "sudo pacman -S --needed linux-headers  # or linux-lts-headers, as the kernel is",
            "sudo dkms autoinstall",
        ),
        "suse": (
            "sudo zypper install kernel-default-devel",
            "install the NVIDIA driver's kmp package again: that builds the module",
        ),
        "nixos": ("sudo nixos-rebuild boot  # builds the module for its kernel",),
        None: ("install the headers of the kernel that runs, then build the NVIDIA module again (DKMS does)",),
    },
    Task.enrol_key: {
        "debian": ("sudo mokutil --import /var/lib/shim-signed/mok/MOK.der  # on Debian /var/lib/dkms/mok.pub", _ENROL),
        "fedora": (
            "sudo mokutil --import /etc/pki/akmods/certs/public_key.der  # with DKMS /var/lib/dkms/mok.pub",
            _ENROL,
        ),
        "arch": ("sudo mokutil --import /var/lib/dkms/mok.pub  # where shim starts the computer", _ENROL),
        "suse": ("sudo mokutil --import /var/lib/nvidia-pubkeys/*.der", _ENROL),
        None: ("BIOS: turn Secure Boot off, or sign the NVIDIA module with a key that it knows",),
    },
    Task.open_driver: {
        "debian": ("sudo apt install nvidia-driver-{branch}-open  # on Debian nvidia-open, of NVIDIA's repository",),
        "fedora": ("sudo dnf install nvidia-open  # from NVIDIA's repository",),
        "arch": ("sudo pacman -S --needed nvidia-open nvidia-utils  # nvidia-open-dkms for other kernels than linux",),
        "suse": ("sudo zypper install nvidia-open-driver-G06-signed-kmp-default nvidia-compute-utils-G06",),
        "nixos": (
            'set services.xserver.videoDrivers = [ "nvidia" ]; and hardware.nvidia.open = true; in configuration.nix',
            "sudo nixos-rebuild boot",
        ),
        None: ("install NVIDIA's driver {branch} or newer with the open kernel module, as your distribution does it",),
    },
    Task.closed_driver: {
        "debian": ("sudo apt install nvidia-driver-{branch}  # on Debian nvidia-driver",),
        "fedora": (
            "sudo dnf versionlock add '*nvidia*{branch}*'",
            "sudo dnf install cuda-drivers  # from NVIDIA's repository",
        ),
        "arch": ("replace nvidia-open with nvidia-580xx-dkms and nvidia-580xx-utils, from the AUR",),
        "suse": ("sudo zypper install nvidia-driver-G06-kmp-default nvidia-compute-utils-G06",),
        "nixos": (
            "set hardware.nvidia.open = false; in configuration.nix",
            _LEGACY_ON_NIXOS,
            "sudo nixos-rebuild boot",
        ),
        None: ("install NVIDIA's driver {branch} with the closed kernel module, as your distribution does it",),
    },
    Task.hold_driver: {
        "debian": ("sudo apt-mark hold nvidia-driver-{branch}",),
        "fedora": ("sudo dnf versionlock add '*nvidia*{branch}*'",),
        "arch": ("stay with nvidia-580xx-dkms, from the AUR: nvidia-open is newer",),
        "suse": ("sudo zypper addlock '*nvidia*G06*'",),
        "nixos": (_LEGACY_ON_NIXOS,),
        None: ("keep NVIDIA's driver from being upgraded past {branch}",),
    },
    Task.fabric_manager: {
        "debian": ("sudo apt install 'nvidia-fabricmanager-{branch}={version}-*'",),
        "fedora": ("sudo dnf install 'nvidia-fabric*manager-{version}'",),
        "suse": ("sudo zypper install 'nvidia-fabricmanager={version}'",),
        "nixos": ("set hardware.nvidia.datacenter.enable = true; in configuration.nix", "sudo nixos-rebuild switch"),
        None: ("install NVIDIA's fabric manager {version}: of exactly the driver's version",),
    },
    Task.container_toolkit: {
        "debian": ("sudo apt install nvidia-container-toolkit", _FOR_DOCKER),
        "fedora": ("sudo dnf install nvidia-container-toolkit", _FOR_DOCKER),
        "arch": ("sudo pacman -S nvidia-container-toolkit", _FOR_DOCKER),
        "suse": ("sudo zypper install nvidia-container-toolkit", _FOR_DOCKER),
        "nixos": (
            "set hardware.nvidia-container-toolkit.enable = true; in configuration.nix",
            "sudo nixos-rebuild switch",
        ),
        None: ("install NVIDIA's container toolkit (nvidia-container-toolkit)", _FOR_DOCKER),
    },
    Task.newer_nccl: {
        "debian": ("sudo apt install --only-upgrade libnccl2 libnccl-dev",),
        "fedora": ("sudo dnf upgrade libnccl libnccl-devel",),
        "arch": ("sudo pacman -S nccl",),
        None: ("install NCCL 2.27.5 or newer, with its headers",),
    },
}
