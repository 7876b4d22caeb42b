"""Open the files of a run directory, which no other module does.

Writing follows no links: a run directory may be shared, and a link in it may lead to any file of this user. A file that
is replaced appears complete or not at all, also after a power cut, and has the mode that the umask gives. Reading never
raises on damage: it returns a reason, which a command can print as one line.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from dkd.errors import InputError

UNFINISHED = ".writing_"
"""The beginning of the name of a file that is to replace another one."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


LOOK_AGAIN_SECONDS = 10.0
"""Seconds after which a network file system shows what was written on another machine, at the latest."""
_LOOK_EVERY = 0.2  # seconds


class LinkError(InputError, OSError):
    """A file that was to be written is a link."""


def look_again(look: Callable[[], str | None], seconds: float) -> str | None:
    """Call `look` until it finds nothing wrong, at most for `seconds`. Returns the last result of `look`; None: nothing
    is wrong.

    Args:
        look: returns what is wrong; None: nothing is.
    """
    end = time.monotonic() + seconds
    while (reason := look()) is not None and time.monotonic() < end:
        time.sleep(_LOOK_EVERY)
    return reason


def open_to_append(path: Path) -> FileIO:
    """Open a file to write at its end, unbuffered; a missing file is made. Raises OSError, and LinkError for a link."""
    return FileIO(_open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def open_to_read(path: Path) -> FileIO:
    """Open a regular file to read it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is no regular file")
    return FileIO(descriptor, "rb")


def open_lock(path: Path) -> FileIO:
    """Open a file to lock it, without changing its content; a missing file is made. Raises OSError, and LinkError for a
    link."""
    return FileIO(_open(path, os.O_RDWR | os.O_CREAT), "rb+")


def create(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a new file. Raises OSError, also when something else, such as a link, has that name.

    Args:
        mode: of the file, less what the umask takes away.
    """
    with open(os.open(path, _NEW, mode), "w", encoding="utf-8") as file:
        file.write(text)


def replace_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file in the place of an older file. A reader sees the old file or the new file, also after a power cut.
    Raises OSError.

    Args:
        mode: of the file, less what the umask takes away.
    """
    with replacing(path, mode) as unfinished, open(_open(unfinished, os.O_WRONLY), "w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of an empty file beside `path`, with the same suffix, to be written by a library. After the block,
    the new file takes the place of `path`.

    An older file stays as it is when the block raises. A link at `path` is replaced, not followed.

    Args:
        mode: of the file, less what the umask takes away.

    Raises:
        OSError: the file system refuses.
    """
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}_{path.name}")
    descriptor = os.open(unfinished, _NEW, mode)
    try:
        try:
            # The mode that the umask, or the folder's default access list, gives a file. Libraries may put a private
            # file in its place.
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
        yield unfinished
        descriptor = os.open(unfinished, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with everything in it. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove the unfinished files that `replacing` has left in a folder for the files `names`, because its process was
    killed. Raises OSError."""
    for entry in os.listdir(folder):
        if entry.startswith(UNFINISHED) and entry.removeprefix(UNFINISHED).partition("_")[2] in names:
            (folder / entry).unlink()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, which new files need to survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def link_problem(path: Path) -> str | None:
    """Return the reason why `path` cannot be written, when it is a link; None: it is no link."""
    if not path.is_symlink():
        return None
    return (
        f"{str(path)!r} is a link, and dkd writes through no link in a run directory; remove it, or put what it leads "
        "to in its place"
    )


def read_bytes(path: Path) -> tuple[bytes, str | None]:
    """Return the content of a regular file and None; or nothing and the reason why the file cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return b"", f"{str(path)!r} is no regular file"
            blocks = []
            while block := os.read(descriptor, 1 << 20):
                blocks.append(block)
            return b"".join(blocks), None
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return b"", f"{str(path)!r} is not there"
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        return b"", f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"


def read_json(path: Path) -> tuple[Any, str | None]:
    """Return the value that a JSON file holds and None; or None and the reason why the file cannot be read."""
    content, reason = read_bytes(path)
    if reason is not None:
        return None, reason
    value, reason = parse_json(content)
    return value, None if reason is None else f"{str(path)!r} is damaged: {reason}"


def parse_json(text: str | bytes) -> tuple[Any, str | None]:
    """Return the value of a JSON text and None; or None and what is wrong with the text."""
    try:
        return json.loads(text), None
    except RecursionError:
        return None, "it is nested too deeply"
    except ValueError as error:  # also UnicodeDecodeError, and numbers of too many digits
        return None, f"it is not JSON ({error})"


def _open(path: Path, flags: int) -> int:
    """Open a regular file, and return its descriptor. Raises OSError, and LinkError for a link."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = link_problem(path) if error.errno == errno.ELOOP else None
        if reason is not None:
            raise LinkError(reason) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is no regular file")
    os.set_blocking(descriptor, True)
    return descriptor
