"""`dkd files`: list and copy the launch files and the recipes that are installed with dkd."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from dkd import atomic_files, console, files
from dkd.commands.command import Command
from dkd.errors import InputError

_EXAMPLES = """
examples:
  dkd files                                               list them
  dkd files launch .                                      copy the launch files to ./launch
  dkd files configs ~/work                                copy the recipes to ~/work/configs
  dkd files launch . --force                              replace files that differ

A file that is there already is kept: the command writes nothing when one of them differs, unless --force is given.
"""
_SHOWN = 5
_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd files`."""
    parser.add_argument("kind", nargs="?", choices=files.FOLDERS, help="what to copy (default: list all files)")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="where to: DIR/launch or DIR/configs is written")
    parser.add_argument("--force", action="store_true", help="replace files that are there already and differ")


def run(options: argparse.Namespace) -> int:
    """List or copy the files, and return the exit code 0."""
    if options.kind is None:
        if options.force:
            raise InputError("--force belongs to a copy: dkd files launch DIR --force")
        console.show(*(f"{kind}/{name}" for kind in files.FOLDERS for name in _names(kind)))
        return 0
    if options.folder is None:
        raise InputError(f"a folder is missing, such as: dkd files {options.kind} .")
    copied, kept = copy(options.kind, Path(options.folder), options.force)
    console.show(f"{Path(options.folder) / options.kind}: {copied} files written, {kept} were there already")
    return 0


def copy(kind: str, folder: Path, force: bool = False) -> tuple[int, int]:
    """Copy the files of a kind to FOLDER/KIND, through no link. Returns how many were written, and how many were there
    already with the same content.

    Args:
        kind: one of files.FOLDERS.
        force: replace files that differ.

    Raises:
        InputError: files that differ are there, and `force` is not given, or a link is in the way; nothing was written.
        OSError: the file system refuses.
    """
    wanted = {folder / kind / name: files.folder(kind) / name for name in _names(kind)}
    missing = {path: source for path, source in wanted.items() if not os.path.lexists(path)}
    others = {path: source for path, source in wanted.items() if path not in missing and not _is_same(path, source)}
    for parent in {parent for path in wanted for parent in path.parents if parent.is_relative_to(folder / kind)}:
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise InputError(f"{str(parent)!r} is {'a link' if parent.is_symlink() else 'no folder'}; take another DIR")
    for path in others:
        if path.is_dir() and not path.is_symlink():
            raise InputError(f"{str(path)!r} is a folder, where a file of this name belongs; take another DIR")
    if others and not force:
        shown = ", ".join(str(path) for path in list(others)[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise InputError(
            f"{shown}{more}: already there, and not the same; take another DIR, or --force to replace them"
        )
    for path, source in {**missing, **others}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = 0o666 | (source.stat().st_mode & _EXECUTABLE)
        write = atomic_files.create if path in missing else atomic_files.replace_text
        write(path, source.read_text(encoding="utf-8"), mode)
    return len(missing) + len(others), len(wanted) - len(missing) - len(others)


def _names(kind: str) -> list[str]:
    """Return the names of the files of a kind. Raises InputError where the installation has none."""
    found = files.names(kind)
    if not found:
        raise InputError(f"{str(files.folder(kind))!r} holds no files: the installation of dkd is not complete")
    return found


def _is_same(path: Path, source: Path) -> bool:
    """Return whether a file is there already: a regular file, no link, with the content of `source`."""
    return not path.is_symlink() and atomic_files.read_bytes(path) == (source.read_bytes(), None)


COMMAND = Command(
    "files",
    "List or copy the launch files and recipes of dkd.",
    _EXAMPLES,
    add_arguments,
    run,
    "List the launch files and the recipes that are installed with dkd, or copy them to a folder.",
)
