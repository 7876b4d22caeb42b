"""The checkpoints of a run.

RUN/checkpoints/
  step_00000200/        whole: manifest.json lists every other file in it, with size and SHA-256
  step_00000300/
  writing_00000400/     being written, or left behind by a process that was killed; never read
  removing_00000100/    the same of one being removed
  damaged_00000350/     set aside: its files were not what had been written

A checkpoint is written into writing_N. Once all of it is on the disk, and its manifest too, the folder is renamed: at any moment, what is
called step_N is whole. Older ones are removed only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is not what it was when it was written."""


class CheckpointFolder:
    """One process writes: methods that change anything are the main process's.

    Args:
        path: RUN/checkpoints; made by the first checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def path_of(self, step: int) -> Path:
        """Where the whole checkpoint of a step is, or will be."""
        return self.path / f"step_{step:08d}"

    def writing_path(self, step: int) -> Path:
        """Where the checkpoint of a step is made."""
        return self.path / f"writing_{step:08d}"

    def steps(self) -> list[int]:
        """Of all whole checkpoints, oldest first. Whether they are still what they were, `problem` tells."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, os.listdir(self.path)) if match)

    def remove_unfinished(self) -> None:
        """What was being written or removed when a process ended."""
        for left in [*self.path.glob("writing_*"), *self.path.glob("removing_*")]:
            _remove(left)

    def set_aside(self, step: int) -> None:
        """A checkpoint that is not whole must not count as one when older ones are removed."""
        folder = self.path_of(step)
        damaged = folder.with_name(folder.name.replace("step_", "damaged_"))
        if damaged.exists():
            _remove(damaged)
        folder.rename(damaged)

    def commit(self, step: int) -> int:
        """Make what is in `writing_path(step)` the checkpoint of that step. Returns its size in bytes.

        Raises:
            OSError: as the file system says.
        """
        folder, final = self.writing_path(step), self.path_of(step)
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path, to_disk=True)}
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))
        _digest(manifest, to_disk=True)
        for directory in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
            _directory_to_disk(directory)
        # There may be one of the same step, from before a resume.
        older = self._renamed_for_removal(final) if final.exists() else None
        folder.rename(final)
        _directory_to_disk(self.path)
        _directory_to_disk(self.path.parent)
        if older is not None:
            shutil.rmtree(older)
        return sum(entry["bytes"] for entry in files.values())

    def discard(self, step: int) -> None:
        """What was written of a checkpoint that failed: its space is free again."""
        shutil.rmtree(self.writing_path(step), ignore_errors=True)

    def remove_all_but(self, steps: Collection[int]) -> None:
        """Keep the checkpoints of `steps`."""
        for step in self.steps():
            if step not in steps:
                shutil.rmtree(self._renamed_for_removal(self.path_of(step)))

    def remove_all(self) -> None:
        """Every checkpoint, whole or not."""
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if entry.name.startswith(("step_", "writing_", "removing_", "damaged_")):
                    _remove(entry)

    def _renamed_for_removal(self, folder: Path) -> Path:
        """Half of a checkpoint must not be taken for a damaged one."""
        doomed = folder.with_name(folder.name.replace("step_", "removing_"))
        if doomed.exists():
            _remove(doomed)
        return folder.rename(doomed)

    def problem(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; None: they are as they were written."""
        folder = self.path_of(step)
        try:
            files = _read_manifest(folder, step)
            for name, entry in files.items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.is_symlink():
                    return f"{name} is a link"
                if path.stat().st_size != entry["bytes"]:
                    return f"{name} has {path.stat().st_size} bytes, not the {entry['bytes']} that were written"
                if _digest(path) != entry["sha256"]:
                    return f"the content of {name} is not what was written"
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read: {error}"
        return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _read_manifest(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        ours = manifest["format"] == _FORMAT and manifest["step"] == step and isinstance(files, dict) and bool(files)
        for name, entry in files.items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            ours = ours and inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    if not ours:
        raise CheckpointError(f"{MANIFEST} is damaged, or of another version")
    return files


def _digest(path: Path, to_disk: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if to_disk:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _directory_to_disk(folder: Path) -> None:
    """New names in a folder survive a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
