"""What the kernel logged about cards and their buses since it started."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from mgpu.machine import sysfs
from mgpu.machine.inspection import LogEntry, Unread
from mgpu.machine.journal import kernel_records

LARGEST_BYTES = 16 * 1024**2
# The newest of each kind: a card that fails writes thousands of equal lines.
_MOST_OF_A_KIND = 32
_LONGEST_TEXT = 300

_ADDRESS = r"(?P<address>(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(?:\.[0-7])?)"
# The first that matches names the kind: an Xid 79 says in words what its number says, that the card is off the bus.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("xid", rf"NVRM: Xid \((?:PCI:)?{_ADDRESS}\).*?: (?P<number>\d{{1,5}})\b"),
        ("bus", rf"NVRM:.*?(?:{_ADDRESS}.*)?fallen off the bus"),
        ("init", rf"NVRM:.*?(?:{_ADDRESS}.*)?(?:RmInitAdapter failed|requires use of the NVIDIA open kernel modules)"),
        ("init", rf"NVRM:.*?(?:{_ADDRESS}.*)?not supported by (?:the (?:open )?nvidia|.{{1,40}} driver release)"),
        ("key", r"Key was rejected by service|Loading of (?:unsigned module|module with unavailable key) is rejected"),
        ("hmm", r"uvm_pmm_gpu\.c.*devmem_alloc_pagemap.*(?:err|error):? ?-34|devmem_alloc_pagemap.*-34"),
        ("amdgpu", rf"kfd (?:{_ADDRESS}|kfd).*skipped device|PCI rejects atomics"),
        ("amdgpu", rf"amdgpu (?:{_ADDRESS}).*(?:GPU reset begin|ring \S+ timeout)"),
    )
)
# So that a large log costs one search for most of its lines.
_WORTH_A_LOOK = re.compile(rb"NVRM|rejected|-34|kfd|amdgpu")


_STAMP = re.compile(rb"kernel: \[ *\d{1,10}\.\d{1,9}\] ")


def read_kernel_log(root: Path = Path("/")) -> tuple[tuple[LogEntry, ...], bool, tuple[Unread, ...]]:
    """Return the lines of this boot that matter, oldest first; whether a log could be read at all; and what could not.

    /dev/kmsg is read, where that is forbidden the journal (`journal.kernel_records`), and where there is none
    /var/log/kern.log; the files without waiting and to at most 16 MiB, the last proving nothing where no line of it is
    understood. Under a replaced root, /dev/kmsg is a regular file of the same records. Ages are by the clock that does
    not run while the computer sleeps, but under a replaced root. Never raises.
    """
    try:
        content, is_device = _kernel_messages(root / "dev/kmsg")
    except OSError as error:
        refused = error
    else:
        now_s = time.monotonic() if is_device else _uptime_s(root)
        return _chosen(_records(content), now_s), True, ()
    try:
        records = kernel_records(root)
    except OSError as error:
        no_journal = str(error)
    else:
        now_s = time.monotonic() if root == Path("/") else _uptime_s(root)
        worth = (record for record in records if _WORTH_A_LOOK.search(record[1].encode("utf-8", "replace")))
        return _chosen(worth, now_s), True, ()
    text = _tail(root / "var/log/kern.log")
    if text is not None and _STAMP.search(text):
        return _chosen(_lines_of_this_boot(text), _uptime_s(root)), True, ()
    forbidden = refused.errno in (errno.EPERM, errno.EACCES)
    why = f"it {'may be read by root only' if forbidden else 'is not there'}, and {no_journal}"
    why += " (/var/log/kern.log has no line with a time that is understood)" if text is not None else ""
    needs_root = forbidden and os.geteuid() != 0
    return (), False, (Unread(what="/dev/kmsg", why=why, needs_root=needs_root),)


def _uptime_s(root: Path) -> float | None:
    uptime = re.match(r"\d{1,12}(\.\d+)?", sysfs.read_text(root / "proc/uptime", 100) or "")
    return float(uptime[0]) if uptime else None


def _kernel_messages(path: Path) -> tuple[bytes, bool]:
    """All records, and whether they come from the device. Raises OSError where there is neither it nor a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            raise FileNotFoundError(errno.ENOENT, "neither a file nor a device")
        chunks, size = [], 0
        while size < LARGEST_BYTES:
            try:
                chunk = os.read(descriptor, 8192)  # of the device, one record
            except BrokenPipeError:  # the record was overwritten before it was read; the next one is there
                size += 1
                continue
            except BlockingIOError:
                break
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks), stat.S_ISCHR(mode)
    finally:
        os.close(descriptor)


def _tail(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return None
            file.seek(max(0, status.st_size - LARGEST_BYTES))
            return file.read(LARGEST_BYTES)
    except (OSError, ValueError):
        return None


def _records(content: bytes) -> Iterator[tuple[float | None, str]]:
    """Time (s) and text of each record "priority,number,microseconds,flags;text"."""
    for line in content.split(b"\n"):
        if _WORTH_A_LOOK.search(line):
            head, found, text = line.partition(b";")
            parts = head.split(b",")
            timed = found and len(parts) >= 3 and re.fullmatch(rb"\d{1,18}", parts[2])
            yield (int(parts[2]) / 1e6 if timed else None), (text if timed else line).decode("utf-8", "replace")


def _lines_of_this_boot(content: bytes) -> Iterator[tuple[float | None, str]]:
    """Time (s) and text of lines "date host kernel: [seconds] text", from the last start of a kernel on."""
    starts = [found.start() for found in re.finditer(rb"kernel: \[ +0\.000000\] Linux version", content)]
    for line in content[starts[-1] if starts else 0 :].split(b"\n"):
        if _WORTH_A_LOOK.search(line):
            found = re.search(r"kernel: \[ *(\d{1,10}\.\d{1,9})\] (.*)", line.decode("utf-8", "replace"))
            if found:
                yield float(found[1]), found[2]


def _chosen(lines: Iterator[tuple[float | None, str]], now_s: float | None) -> tuple[LogEntry, ...]:
    entries = []
    for at_s, text in lines:
        age_s = round(now_s - at_s, 1) if now_s is not None and at_s is not None else None
        if age_s is not None and age_s < -1:  # a line of an earlier boot
            continue
        if entry := _entry(text, None if age_s is None else max(age_s, 0.0)):
            entries.append(entry)
    left = dict.fromkeys({entry.kind for entry in entries}, _MOST_OF_A_KIND)
    kept = []
    for entry in reversed(entries):
        left[entry.kind] -= 1
        if left[entry.kind] >= 0:
            kept.append(entry)
    return tuple(reversed(kept))


def _entry(text: str, age_s: float | None) -> LogEntry | None:
    text = "".join(character if character.isprintable() else " " for character in text[: 4 * _LONGEST_TEXT])
    for kind, pattern in _KINDS:
        if found := pattern.search(text):
            groups = found.groupdict()
            number = int(groups["number"]) if groups.get("number") else None
            return LogEntry(
                kind=kind,
                text=text[:_LONGEST_TEXT].strip(),
                age_s=age_s,
                number=number,
                bus_id=_bus_id(groups.get("address")),
            )
    return None


def _bus_id(address: str | None) -> str | None:
    """The address as sysfs writes it, of "0000:01:00", "00000000:01:00.0" or "01:00.0"."""
    if not address:
        return None
    place, _, function = address.lower().partition(".")
    *domain, bus, device = place.split(":")
    return f"{int(domain[0], 16) if domain else 0:04x}:{bus}:{device}.{function or '0'}"
