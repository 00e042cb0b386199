"""Files in an instance's folder: read only where they are this user's own, replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from mgpu.errors import Missing
from mgpu.running.identity import File

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_file(folder: Path, name: str, most_bytes: int) -> bytes | None:
    """Return the first `most_bytes` of a file of this user in a folder that is no link; None where that is not what is
    there: links, pipes, somebody else's. Raises OSError."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # A pipe in its place must not be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        with os.fdopen(file, "rb", closefd=False) as opened:
            return opened.read(most_bytes)
    finally:
        os.close(file)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Put a file in place, whole: the one before it stays until this one is on the disk, which this blocks on.

    Raises Missing (code "disk-full" or "state-folder").
    """
    temporary = f"{name}.new"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):  # left by one who was killed
                os.unlink(temporary, dir_fd=directory)
            try:
                _write_all(temporary, directory, content)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        code = "disk-full" if error.errno in _DISK_FULL else "state-folder"
        raise Missing(f"{folder / name} cannot be written: {error.strerror}", code=code) from None


def file_of(path: Path) -> File | None:
    """Return the device and inode of a file of this user; None for links and what else there may be."""
    try:
        status = path.lstat()
    except OSError:
        return None
    own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return (status.st_dev, status.st_ino) if own else None


def is_own_folder(path: Path) -> bool:
    """Return whether this is a folder of this user, and no link to one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _write_all(name: str, directory: int, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
    finally:
        os.close(file)
