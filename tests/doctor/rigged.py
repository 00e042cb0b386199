"""Whole computers for the doctor: a rig of the fake NVML library, and a fake root around it.

`python -m tests.doctor.rigged FOLDER` saves each with `mgpu doctor --save`; tests/machines/saved is made so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.llama_server import install
from tests.fakes.sysfs_tree import SysfsTree, tree_of_rig

from .other_rigs import MIB, two_arcs, two_radeons

REPOSITORY = Path(__file__).parents[2]
RIGS = REPOSITORY / "tests/machines/rigs"
SAVED = REPOSITORY / "tests/machines/saved"
ACS_REDIRECTS = 0x1D
_WITHOUT_OPTIONS: dict[str, str | bytes] = {"proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=5c3f quiet splash\n"}
_CARD, _CARD_CLASS, _DRIVER = "0000:01:00.0", 0x030000, "580.126.20"
_AMD_CHIPSET = (0x1022, 0x43F4)
_LIMIT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """A rig, lines that are added to it, the root around it; and what an expert would say: `finds` are failures and
    warnings as "fail ID", `notes` the ids of all else that is worth saying, `hidden` of what is not shown there."""

    rig: str
    finds: tuple[str, ...] = ()
    notes: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    tree: Callable[[Path, Path], SysfsTree] = field(default=lambda root, rig: tree_of_rig(root, rig))


def _in_lxc(root: Path, rig: Path) -> SysfsTree:
    return tree_of_rig(root, rig).files({"run/systemd/container": "lxc\n"})


def _remapped(root: Path, rig: Path) -> SysfsTree:
    return tree_of_rig(root, rig, acs=ACS_REDIRECTS, group_type="DMA-FQ").files(_WITHOUT_OPTIONS)


def _passed_through(root: Path, rig: Path) -> SysfsTree:
    return tree_of_rig(root, rig, group_type="identity")


def _one_card(root: Path, driver: str) -> SysfsTree:
    return SysfsTree(root).host().device(_CARD, ids=(0x10DE, 0x2684), pci_class=_CARD_CLASS, driver=driver, acs=None)


def _with_driver(root: Path, _rig: Path) -> SysfsTree:
    return _one_card(root, "nvidia").nvidia_driver(_DRIVER, cards=(_CARD,))


def _with_older_module(root: Path, rig: Path) -> SysfsTree:
    return _with_driver(root, rig).files({"sys/module/nvidia/version": "580.95.05\n"})


def _in_docker(root: Path, rig: Path) -> SysfsTree:
    return _with_driver(root, rig).files({".dockerenv": ""})


def _in_healthy_docker(root: Path, rig: Path) -> SysfsTree:
    tree = tree_of_rig(root, rig, configuration=64).files({".dockerenv": ""})
    (root / "dev/kmsg").unlink()
    return tree


def _in_wsl(root: Path, _rig: Path) -> SysfsTree:
    tree = SysfsTree(root).host({"proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n", "dev/dxg": ""})
    (root / "dev/kmsg").unlink()
    return tree


def _radeons(root: Path, _rig: Path) -> SysfsTree:
    return two_radeons(root)


def _translated_radeons(root: Path, _rig: Path) -> SysfsTree:
    return two_radeons(root, group_type="DMA-FQ").files(_WITHOUT_OPTIONS)


def _unequal_radeons(root: Path, _rig: Path) -> SysfsTree:
    return two_radeons(root, lanes=(16, 4))


def _radeons_without_atomics(root: Path, _rig: Path) -> SysfsTree:
    return two_radeons(root, atomics=False)


def _arcs(root: Path, _rig: Path) -> SysfsTree:
    return two_arcs(root)


def _arcs_with_small_bars(root: Path, _rig: Path) -> SysfsTree:
    return two_arcs(root, bar_bytes=256 * MIB)


def _with_nouveau(root: Path, _rig: Path) -> SysfsTree:
    return _one_card(root, "nouveau")


def _bare(root: Path, _rig: Path) -> SysfsTree:
    return SysfsTree(root).host()


def _second_on_chipset(root: Path, rig: Path) -> SysfsTree:
    tree = tree_of_rig(root, rig, besides=("0000:02:00.0",))
    tree.device("0000:00:02.1", gen=(4, 4), width=(4, 4))
    tree.device("0000:03:00.0", below="0000:00:02.1", ids=_AMD_CHIPSET, gen=(4, 4), width=(4, 4))
    tree.device("0000:04:08.0", below="0000:03:00.0", ids=_AMD_CHIPSET, gen=(4, 4), width=(4, 4))
    link: dict[str, Any] = {"gen": (1, 4), "width": (4, 16), "ids": (0x10DE, 0x2684)}
    return tree.device("0000:02:00.0", below="0000:04:08.0", pci_class=_CARD_CLASS, driver="nvidia", acs=None, **link)


# What the drivers of these rigs leave out, and what the engine, which is a script, does not tell.
_UNTOLD = ("recovery-action", "display-on-gpu", "arch-unsupported")
_STOCK = ("persistence-off", "p2p-none", "psu-budget")
# Who uses the cards, how they reach each other, and what their power limits may be; Windows' desktop has 2 GiB.
_WINDOWS_HIDES = (
    *(f"gpu{index}.{key} = !3" for index in (0, 1) for key in ("compute", "graphics", "power.default", "virt")),
    *(f"gpu{index}.mem.used = {2 * 1024**3}" for index in (0, 1)),
    "gpu0.persistence = 1\ngpu1.persistence = 1",
    "topo.0.1 = !3\np2p.0.1 = !3",
)
COMPUTERS = {
    "2x4090-x670e": Computer(rig="2x4090-x670e", notes=_STOCK, hidden=_UNTOLD),
    "2x5090-x8": Computer(rig="2x5090-x8", notes=_STOCK, hidden=_UNTOLD),
    "3xp40": Computer(rig="3xp40", notes=("persistence-off", "psu-budget", "p2p-grant-unsafe"), hidden=_UNTOLD),
    "2x3090-nvlink": Computer(
        rig="2x3090-nvlink",
        tree=_in_lxc,
        notes=("persistence-off", "bar1-small", "pcie-host-gen", "psu-budget", "virtualised", "vram-in-use"),
        hidden=_UNTOLD,
    ),
    "4x3090-2nvlink": Computer(
        rig="4x3090-2nvlink", notes=("bar1-small", "p2p-none", "topo-cross-socket", "psu-budget"), hidden=_UNTOLD
    ),
    "6000ada-4090": Computer(
        rig="6000ada-4090", notes=(*_STOCK, "mixed-gpus", "device-order", "topo-cross-socket"), hidden=_UNTOLD
    ),
    "8xa100-sxm": Computer(rig="8xa100-sxm", notes=("psu-budget",), hidden=_UNTOLD),
    "8xh100-sxm": Computer(rig="8xh100-sxm", notes=("psu-budget",), hidden=_UNTOLD),
    "2x4090-chipset": Computer(
        rig="2x4090-x670e",
        tree=_second_on_chipset,
        lines=("gpu1.pcie.width = 4",),
        notes=(*_STOCK, "pcie-slot-limited", "pcie-chipset"),
        hidden=_UNTOLD,
    ),
    "2xpro6000-identity": Computer(
        rig="2xpro6000-p2p-hang",
        tree=_passed_through,
        notes=("persistence-off", "psu-budget", "p2p-grant-unsafe"),
        hidden=_UNTOLD,
    ),
    "no-card": Computer(rig="no-driver", tree=_bare, notes=("no-gpu",)),
    "2xpro6000-p2p-hang": Computer(
        rig="2xpro6000-p2p-hang",
        tree=_remapped,
        finds=("fail p2p-grant-unsafe",),
        notes=("persistence-off", "psu-budget", "iommu-translated", "acs-redirect"),
        hidden=_UNTOLD,
    ),
    "2x3090-riser-x1": Computer(
        rig="2x3090-riser-x1",
        finds=("warn pcie-x1-riser",),
        notes=(*_STOCK, "bar1-small", "nvlink-inactive"),
        hidden=(*_UNTOLD, "clocks-locked"),
    ),
    "2x4090-one-lost": Computer(
        rig="2x4090-one-lost", finds=("fail gpu-lost",), notes=("persistence-off",), hidden=_UNTOLD
    ),
    "driver-mismatch": Computer(
        rig="driver-mismatch", tree=_with_older_module, finds=("fail driver-lib-mismatch",), notes=()
    ),
    "no-driver": Computer(rig="no-driver", tree=_with_nouveau, finds=("fail driver-not-loaded",), notes=()),
    "container-lost-cgroup": Computer(
        rig="container-lost-cgroup", tree=_in_docker, finds=("fail container-cgroup-lost",), notes=()
    ),
    "driver-silent": Computer(
        rig="container-lost-cgroup", tree=_with_driver, finds=("fail driver-not-loaded",), notes=()
    ),
    "2x4090-docker": Computer(
        rig="2x4090-x670e", tree=_in_healthy_docker, notes=_STOCK, hidden=(*_UNTOLD, "xid-recent", "acs-redirect")
    ),
    "2x4090-wsl": Computer(
        rig="2x4090-x670e",
        tree=_in_wsl,
        lines=_WINDOWS_HIDES,
        notes=("vram-in-use", "psu-budget", "wsl2"),
        hidden=(*_UNTOLD, "xid-recent", "power-capped"),
    ),
    "2x7900xtx": Computer(rig="no-driver", tree=_radeons, notes=("psu-budget",), hidden=("display-on-gpu",)),
    "2x7900xtx-translated": Computer(
        rig="no-driver",
        tree=_translated_radeons,
        finds=("warn amd-multi-gpu",),
        notes=("psu-budget",),
        hidden=("display-on-gpu",),
    ),
    "2x7900xtx-unequal": Computer(
        rig="no-driver",
        tree=_unequal_radeons,
        finds=("warn amd-multi-gpu",),
        notes=("psu-budget",),
        hidden=("display-on-gpu",),
    ),
    "2x7900xtx-no-atomics": Computer(
        rig="no-driver",
        tree=_radeons_without_atomics,
        finds=("fail amd-multi-gpu",),
        notes=("psu-budget",),
        hidden=("display-on-gpu",),
    ),
    "2xb580": Computer(rig="no-driver", tree=_arcs, notes=("intel-xe",)),
    "2xb580-small-bar": Computer(
        rig="no-driver", tree=_arcs_with_small_bars, finds=("warn intel-xe",), notes=("intel-xe",)
    ),
}


def environment(name: str, folder: Path, library: Path) -> dict[str, str]:
    """Build a computer in a folder, and return the whole environment of a program that is to be on it. `library` is
    the folder of a fake NVML library."""
    computer, home = COMPUTERS[name], folder / "home"
    rig = folder / f"{name}.txt"
    rig.write_text("\n".join([(RIGS / f"{computer.rig}.txt").read_text(), *computer.lines]))
    (home / "bin").mkdir(parents=True)
    shutil.copytree(library, home / "driver")
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        "LD_LIBRARY_PATH": str(home / "driver"),
        "FAKE_NVML": str(rig),
        "MGPU_ROOT": str(computer.tree(folder / "root", rig).root),
        "MGPU_LLAMA_SERVER": str(install(home / "bin")),
    }


def doctor(variables: dict[str, str], *words: object) -> dict[str, Any]:
    """Run `mgpu doctor ... --json` to its end, and return what it prints."""
    ended = subprocess.run(
        [sys.executable, "-m", "mgpu", "doctor", *map(str, words), "--json"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    said = json.loads(ended.stdout)
    assert isinstance(said, dict)
    assert said["exit_code"] == ended.returncode
    return said


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        library = Path(place) / "driver"
        library.mkdir()
        subprocess.run([sys.executable, REPOSITORY / "tests/fakes/nvml/build.py", library, "--new"], check=True)
        for name in COMPUTERS:
            folder = Path(place) / name
            folder.mkdir()
            doctor(environment(name, folder, library), "--save", target / f"{name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
