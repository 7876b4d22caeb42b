"""Write the picture that a command was asked for, and replace only pictures of the same command."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from dkd.atomic_files import replacing
from dkd.errors import InputError

DRY_RUN, FIND_LR = "dkd train --dry-run", "dkd find-lr"
"""The words of the commands that draw, which their pictures hold."""
_START = 33  # bytes of a PNG before its second chunk: signature and header


def check_place(path: Path, command: str) -> None:
    """Check that a PNG can be written to `path`, before anything else is done.

    Args:
        command: the words of the command, which each of its pictures holds.

    Raises:
        InputError: the name or folder does not fit, or a file that this command did not write has that name.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--picture {str(path)!r} must end in .png")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--picture {str(path)!r}: {str(path.parent)!r} is no folder; make it first")
    if (path.exists() or path.is_symlink()) and not _is_of(path, command):
        raise InputError(f"--picture {str(path)!r} exists, and {command} did not write it: choose another name")


def write(path: Path, png: bytes, command: str) -> None:
    """Write a PNG with the command's words in it.

    Raises:
        InputError: the file cannot be written.
    """
    content = b"tEXt" + _mark(command)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(png[:_START] + chunk + png[_START:])
    except OSError as error:
        raise InputError(f"the picture cannot be written to {str(path)!r}: {error}") from error


def _is_of(path: Path, command: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return _mark(command) in file.read(1024)


def _mark(command: str) -> bytes:
    return b"Software\0" + command.encode()
