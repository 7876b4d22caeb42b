"""Look at a cache as a whole: what it holds, whether it is intact, and what of it can go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkd.atomic_files import UNFINISHED
from dkd.teacher_cache.key import CacheKey, epoch_folder, epochs_in, key_folders, read_key
from dkd.teacher_cache.part import SUFFIX, DamagedPartError, Part

_REMOVING = "removing_"
_YOUNG_SECONDS = 3600.0
"""An unfinished file that is younger may still be written by another process."""


@dataclass
class ValueSummary:
    """Hold what a cache has of one value.

    Args:
        name: for people.
        form: in which it is stored.
        facts: on which it depends.
        row_bytes: bytes of one sample.
        rows: by epoch, the number of samples; those that are stored twice count once.
    """

    name: str
    form: str
    facts: Mapping[str, Any]
    row_bytes: int
    rows: dict[int, int] = field(default_factory=dict)


@dataclass
class KeySummary:
    """Hold what is in the folder of one key.

    Args:
        folder: of the key.
        key: None: it cannot be read, for the reason in `problems`.
        values: by their ids.
        made_by: what computed it, in words.
        parts, bytes: of all epochs.
        used: seconds since 1970 when a file in the folder was last written.
        problems: a line for each file that is damaged.
    """

    folder: Path
    key: CacheKey | None
    values: dict[str, ValueSummary] = field(default_factory=dict)
    made_by: set[str] = field(default_factory=set)
    parts: int = 0
    bytes: int = 0
    used: float = 0.0
    problems: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)


def part_paths(folder: Path, epoch: int) -> list[Path]:
    """Return the parts of an epoch."""
    within = epoch_folder(folder, epoch)
    if not within.is_dir():
        return []
    return [within / name for name in sorted(os.listdir(within)) if name.startswith("part_") and name.endswith(SUFFIX)]


def summarize(folder: Path, contents: bool = False) -> KeySummary:
    """Return what is in the folder of a key.

    Args:
        contents: whether all numbers are read and compared with their digests, and not the headers alone.
    """
    key, reason = read_key(folder)
    found = KeySummary(folder, key, problems=[] if reason is None else [f"{folder}: {reason}"])
    # Of the files and not of what can be read of them: a key whose parts cannot be opened is not an old one.
    found.used = max(_written(path) or 0.0 for path in (folder, *folder.rglob("*")))
    for epoch in epochs_in(folder):
        covered: dict[str, set[int]] = {}
        for path in part_paths(folder, epoch):
            try:
                part = Part(path, folder.name, epoch)
                if contents:
                    for value, stored in part.values.items():
                        for number in range(len(stored.pieces)):
                            part.read(value, [number])
                _add(found, part, covered)
            except (DamagedPartError, OSError) as error:
                found.problems.append(f"{path}: {error}")
                # What cannot be opened, or is of another version, may be intact.
                if type(error) is DamagedPartError or not path.is_file():
                    found.damaged.append(path)
        for value, positions in covered.items():
            found.values[value].rows[epoch] = len(positions)
    return found


def _written(path: Path) -> float | None:
    """Return when a file was last written, in seconds since 1970; None: another process has renamed or removed it."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return None


def _add(found: KeySummary, part: Part, covered: dict[str, set[int]]) -> None:
    found.parts += 1
    found.bytes += part.bytes
    found.made_by.add(", ".join(str(part.made_by.get(name, "?")) for name in ("device", "torch")))
    for value, stored in part.values.items():
        described = part.described[value]
        if value not in found.values:
            found.values[value] = ValueSummary(
                described["name"], described["form"], described["facts"], stored.row_bytes
            )
        positions = covered.setdefault(value, set())
        for piece in stored.pieces:
            positions.update(range(piece.position, piece.position + piece.rows))


def summaries(root: Path, contents: bool = False) -> Iterator[KeySummary]:
    """Yield what is in the folder of each key of a cache. Arguments as `summarize`."""
    for folder in key_folders(root):
        yield summarize(folder, contents)


def unfinished(folder: Path) -> list[Path]:
    """Return files in the folder of a key that were being written when a process ended, an hour ago or longer."""
    found = []
    for within in [folder, *(epoch_folder(folder, epoch) for epoch in epochs_in(folder))]:
        for path in within.glob(f"{UNFINISHED}*"):
            written = _written(path)
            if written is not None and time.time() - written > _YOUNG_SECONDS:
                found.append(path)
    return found


def half_removed(root: Path) -> list[Path]:
    """Return folders of keys whose removal was interrupted."""
    return [path for path in sorted(root.iterdir()) if path.name.startswith(_REMOVING) and path.is_dir()]


def remove_key(folder: Path) -> None:
    """Remove the folder of a key. It is renamed first, so that no other process reads half of it. Raises OSError."""
    doomed = folder.with_name(_REMOVING + folder.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(each.lstat().st_size for each in (path, *(path.rglob("*") if path.is_dir() else ())) if each.is_file())
