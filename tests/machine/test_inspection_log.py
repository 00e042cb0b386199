"""The kernel's log: which lines matter, how old they are, and what happens where it cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mgpu.machine import kernel_log
from mgpu.machine.inspection import LogEntry
from mgpu.machine.kernel_log import read_kernel_log
from tests.fakes.sysfs_tree import SysfsTree

CARD = "0000:01:00.0"


def entries(root: Path, *records: str, uptime: str = "1000.00 1.0\n") -> tuple[LogEntry, ...]:
    text = "".join(f"3,{number},{record}\n" for number, record in enumerate(records))
    SysfsTree(root).files({"dev/kmsg": text, "proc/uptime": uptime})
    found, known, unread = read_kernel_log(root)
    assert (known, unread) == (True, ())
    return found


@pytest.mark.parametrize(
    ("text", "kind", "number", "bus_id"),
    [
        pytest.param(
            "NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            "xid",
            79,
            CARD,
            id="an Xid that says it is off the bus",
        ),
        pytest.param(
            "NVRM: Xid (PCI:0000:c1:00): 31, pid=4711, name=python3, Ch 00000008",
            "xid",
            31,
            "0000:c1:00.0",
            id="an Xid of a program",
        ),
        pytest.param("NVRM: Xid (0000:01:00): 13, Graphics Exception", "xid", 13, CARD, id="an old driver's Xid"),
        pytest.param("NVRM: Xid (PCI:00000000:01:00.0): 48, pid=1", "xid", 48, CARD, id="eight digits of a domain"),
        pytest.param("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", "bus", None, CARD, id="off the bus"),
        pytest.param("NVRM: RmInitAdapter failed! (0x62:0xffff:2477)", "init", None, None, id="no start"),
        pytest.param(
            "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x24:0x72:1568)", "init", None, CARD, id="no start, named"
        ),
        pytest.param(
            "NVRM: installed in this system requires use of the NVIDIA open kernel modules.",
            "init",
            None,
            None,
            id="a card for the open module",
        ),
        pytest.param(
            "NVRM: The NVIDIA GPU 0000:01:00.0 is not supported by the NVIDIA 590.48.01 driver release.",
            "init",
            None,
            CARD,
            id="a card that is too old",
        ),
        pytest.param("Loading of module with unavailable key is rejected", "key", None, None, id="unsigned"),
        pytest.param("nvidia: Key was rejected by service", "key", None, None, id="a foreign key"),
        pytest.param(
            "nvidia-uvm: uvm_pmm_gpu.c:3187 devmem_alloc_pagemap failed: err -34", "hmm", None, None, id="HMM"
        ),
        pytest.param(
            "kfd kfd: amdgpu: skipped device 1002:7300, PCI rejects atomics 730<0", "amdgpu", None, None, id="atomics"
        ),
        pytest.param(
            "amdgpu 0000:03:00.0: amdgpu: GPU reset begin!", "amdgpu", None, "0000:03:00.0", id="a reset of AMD's"
        ),
    ],
)
def test_a_line_that_matters_is_named_by_its_kind(
    tmp_path: Path, text: str, kind: str, number: int | None, bus_id: str | None
) -> None:
    (entry,) = entries(tmp_path, f"400000000,-;{text}")
    assert entry == LogEntry(kind=kind, text=text, age_s=600.0, number=number, bus_id=bus_id)


@pytest.mark.parametrize(
    "text",
    [
        "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.126.20",
        "NVRM: GPU 0000:01:00.0: GPU serial number is 1324321012345.",
        "pci 0000:00:01.1: AER enabled with IRQ 28",
        "pcieport 0000:00:01.1: AER: Correctable error message received from 0000:01:00.0",
        "acpi PNP0A08:00: _OSC: OS now controls [PCIeHotplug AER PCIeCapability]",
        "amdgpu 0000:03:00.0: amdgpu: SMU is initialized successfully!",
        "usb 1-1: new device rejected: err -34",
    ],
)
def test_lines_that_nothing_judges_are_left_out(tmp_path: Path, text: str) -> None:
    assert entries(tmp_path, f"400000000,-;{text}") == ()


@pytest.mark.parametrize(
    ("record", "age_s"),
    [
        pytest.param("990000000,-;", 10.0, id="by the clock since the start"),
        pytest.param("1000500000,-;", 0.0, id="a moment ahead of the clock"),
        pytest.param("soon,-;", None, id="no time"),
    ],
)
def test_a_line_is_as_old_as_its_record_says(tmp_path: Path, record: str, age_s: float | None) -> None:
    (entry,) = entries(tmp_path, f"{record}NVRM: Xid (PCI:0000:01:00): 79, x")
    assert entry.age_s == age_s
    assert entries(tmp_path, "1,-;NVRM: Xid (PCI:0000:01:00): 79, x", uptime="?")[0].age_s is None


def test_of_a_flood_the_newest_lines_are_kept_and_other_kinds_with_them(tmp_path: Path) -> None:
    flood = [f"{second}000000,-;amdgpu 0000:03:00.0: amdgpu: GPU reset begin!" for second in range(1, 900)]
    found = entries(tmp_path, "1,-;NVRM: Xid (PCI:0000:01:00): 48, x", *flood)
    assert [entry.kind for entry in found] == ["xid", *["amdgpu"] * 32]
    assert [found[1].age_s, found[-1].age_s] == [1000 - 868, 1000 - 899]


KERN_LOG = (
    "Nov  1 09:00:00 adas-box kernel: [    0.000000] Linux version 6.8.0\n"
    "Nov  1 09:05:00 adas-box kernel: [  300.000000] NVRM: Xid (PCI:0000:01:00): 62, before the reboot\n"
    "2026-11-02T09:00:00 adas-box kernel: [    0.000000] Linux version 6.8.0\n"
    "2026-11-02T09:05:00 adas-box kernel: [  900.250000] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.\n"
)


def test_where_the_device_is_closed_the_log_file_of_this_boot_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SysfsTree(tmp_path).files({"var/log/kern.log": KERN_LOG, "proc/uptime": "1000.25 1"})
    found, known, unread = read_kernel_log(tmp_path)
    text = "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."
    assert found == (LogEntry(kind="xid", text=text, age_s=100.0, number=79, bus_id=CARD),)
    assert (known, unread) == (True, ())


@pytest.mark.parametrize(
    ("error", "user", "needs_root"),
    [
        pytest.param(errno.EPERM, 1000, True, id="closed to an ordinary user"),
        pytest.param(errno.EACCES, 1000, True, id="not readable by its mode"),
        pytest.param(errno.EPERM, 0, False, id="closed even to root, as in a container"),
        pytest.param(errno.ENOENT, 1000, False, id="not there"),
    ],
)
def test_a_log_that_may_not_be_read_is_unknown_and_says_who_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, user: int, needs_root: bool
) -> None:
    def refuse(path: Path) -> tuple[bytes, bool]:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(kernel_log, "_kernel_messages", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    found, known, unread = read_kernel_log(tmp_path)
    assert (found, known) == ((), False)
    assert [(each.what, each.needs_root) for each in unread] == [("/dev/kmsg", needs_root)]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        pytest.param("", False, id="empty"),
        pytest.param("2026-11-02T09:05:00 box kernel: NVRM: Xid (PCI:0000:01:00): 79, x\n", False, id="without times"),
        pytest.param("Nov  1 09:00:00 box kernel: [    1.000000] usb 1-1: new device\n", True, id="of a healthy boot"),
    ],
)
def test_a_log_file_is_known_where_a_line_of_it_is_understood(tmp_path: Path, text: str, known: bool) -> None:
    SysfsTree(tmp_path).files({"var/log/kern.log": text, "proc/uptime": "10 1"})
    found = read_kernel_log(tmp_path)
    assert found[:2] == ((), known)
    assert bool(found[2]) is not known


def test_a_pipe_in_place_of_the_log_does_not_block(tmp_path: Path) -> None:
    SysfsTree(tmp_path)
    os.mkfifo(tmp_path / "dev/kmsg")
    (tmp_path / "var/log").mkdir(parents=True)
    os.mkfifo(tmp_path / "var/log/kern.log")
    assert read_kernel_log(tmp_path)[1] is False


def test_a_huge_log_is_read_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_log, "LARGEST_BYTES", 64 * 1024)
    line = b"Nov  1 09:00:00 box kernel: [    1.000000] NVRM: Xid (PCI:0000:01:00): 48, x\n"
    SysfsTree(tmp_path).files({"var/log/kern.log": line + b"\n" * 200_000, "proc/uptime": "10 1"})
    assert read_kernel_log(tmp_path)[:2] == ((), False)  # the line is out of reach, and blank ones prove nothing
    SysfsTree(tmp_path).files({"var/log/kern.log": b"\n" * 200_000 + line})
    assert len(read_kernel_log(tmp_path)[0]) == 1
