"""The table of commands by distribution: whole, and without a command of one family for another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mgpu.doctor
from mgpu.doctor.commands import _TABLE, Task, install_driver, install_fabric_manager, steps
from mgpu.machine.inspection import Inspection

from .inspections import changed_machine, healthy

FAMILIES = ("debian", "fedora", "arch", "suse", "nixos")
VALUES = {"option": "iommu=pt", "module": "nouveau", "branch": 580, "version": "580.126.20"}
# What only systems of one family have.
OWN = {
    "debian": r"\b(apt|apt-mark|update-initramfs|update-grub|ubuntu-drivers)\b",
    "fedora": r"\b(dnf|grubby|akmods)\b",
    "arch": r"\b(pacman|mkinitcpio|grub-mkconfig)\b",
    "suse": r"\b(zypper|grub2-mkconfig)\b",
    "nixos": r"\b(nixos-rebuild|configuration\.nix)\b",
}


def on(family: str | None, **changes: object) -> Inspection:
    return healthy(host={"distribution": family, **changes})


@pytest.mark.parametrize("task", [pytest.param(task, id=task.name) for task in Task])
@pytest.mark.parametrize("family", [*FAMILIES, None, "gentoo"])
def test_every_task_is_told_in_the_words_of_its_family(task: Task, family: str | None) -> None:
    told = steps(on(family), task, **VALUES)
    assert told
    assert not any("{" in line or re.search(r": (sudo|export|docker) ", line) for line in told)
    foreign = [pattern for other, pattern in OWN.items() if other != family]
    assert not [line for line in told for pattern in foreign if re.search(pattern, line)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_commands_of_its_own_for_the_ramdisk_and_for_packages(family: str) -> None:
    told = " ".join(line for task in Task for line in steps(on(family), task, **VALUES))
    assert re.search(OWN[family], told)
    assert family in _TABLE[Task.update_initramfs]


def test_where_the_family_is_unknown_nothing_is_installed_by_a_guess() -> None:
    told = [line for task in Task for line in steps(on(None), task, **VALUES)]
    assert not [line for line in told if line.startswith("sudo ") and not re.search("sudo (reboot|nvidia-ctk)", line)]


def test_no_other_part_of_the_doctor_has_a_command_of_one_distribution() -> None:
    folder = Path(mgpu.doctor.__file__).parent
    own = re.compile("|".join(OWN.values()))
    elsewhere = [path for path in folder.rglob("*.py") if path.name != "commands.py" and own.search(path.read_text())]
    assert elsewhere == []


@pytest.mark.parametrize(
    ("family", "loader", "words"),
    [
        pytest.param("debian", "grub", "sudo update-grub && sudo reboot", id="Ubuntu"),
        pytest.param("debian", "kernelstub", "sudo kernelstub -a iommu=pt && sudo reboot", id="Pop!_OS"),
        pytest.param("debian", "proxmox", "/etc/kernel/cmdline", id="Proxmox with systemd-boot"),
        pytest.param("debian", None, "in the boot loader's configuration", id="Debian with systemd-boot"),
        pytest.param("arch", "grub", "sudo grub-mkconfig", id="Arch with GRUB"),
        pytest.param("arch", None, "in the boot loader's configuration", id="Arch with systemd-boot"),
        pytest.param("fedora", None, "sudo grubby", id="Fedora, whose tool knows them all"),
        pytest.param("nixos", None, "boot.kernelParams", id="NixOS"),
    ],
)
def test_the_kernels_options_are_changed_where_the_boot_loader_has_them(
    family: str, loader: str | None, words: str
) -> None:
    told = "\n".join(steps(on(family, boot_loader=loader), Task.kernel_option, option="iommu=pt"))
    assert words in told
    assert ("update-grub" in told) is (family == "debian" and loader == "grub")
    assert ("proxmox-boot-tool refresh" in told) is (loader == "proxmox")


def test_the_fabric_manager_is_of_the_drivers_version() -> None:
    assert install_fabric_manager(on("debian"), "580.95.05") == (
        "sudo apt install 'nvidia-fabricmanager-580=580.95.05-*'",
    )
    assert not any("None" in line or "sudo" in line for line in install_fabric_manager(on("debian"), None))


def test_in_a_container_nothing_of_the_hosts_is_installed() -> None:
    inside = changed_machine(on("debian"), host={"container": "docker"})
    assert steps(inside, Task.open_driver, branch=580) == steps(on(None), Task.open_driver, branch=580)


@pytest.mark.parametrize(
    ("inspection", "open_module", "word"),
    [
        pytest.param(on("debian"), True, "nvidia-driver-580-open ", id="the open module on Ubuntu"),
        pytest.param(on("debian"), False, "nvidia-driver-580 ", id="the closed one"),
        pytest.param(on("debian", wsl=True), True, "in Windows", id="in WSL it is Windows that has the driver"),
    ],
)
def test_the_driver_is_named_with_its_module(inspection: Inspection, open_module: bool, word: str) -> None:
    told = install_driver(inspection, branch=580, open_module=open_module)
    assert any(word in line for line in told)
