"""Keep the folders of a run's checkpoints.

RUN/checkpoints/
  step_00000200/        complete: manifest.json lists every other file in it, with size and SHA-256
  step_00000300/
  writing_00000400/     being written, or left by a process that was killed; never read
  removing_00000100/    being removed, or left by a process that was killed; never read
  damaged_00000350/     set aside, because its files were not as they had been written

A checkpoint is written into writing_N. The folder is renamed once all its files and its manifest are on the disk, so
that a folder called step_N is complete at any moment. Older checkpoints are removed only after the renaming.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dkd.atomic_files import create, link_problem, read_bytes, read_json, remove, sync_folder
from dkd.errors import RunError

MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")


class CheckpointError(RunError):
    """A checkpoint cannot be written, or is no longer as it was written."""


class SharedCheckpointError(CheckpointError):
    """A rank could not write or read its part of a checkpoint. Raised on every rank, with the same message."""


class CheckpointFolder:
    """Keep the checkpoints of one run. Methods that change anything are called on the main process only.

    Args:
        path: RUN/checkpoints; made by the first checkpoint.
        run_problem: returns the reason why RUN is no longer the folder of this training; None: it still is. Nothing is
            changed in the folder of another training.
    """

    def __init__(self, path: Path, run_problem: Callable[[], str | None] = lambda: None) -> None:
        self.path = path
        self._run_problem = run_problem

    def path_of(self, step: int) -> Path:
        """Return the folder where the complete checkpoint of a step is, or will be."""
        return self.path / f"step_{step:08d}"

    def writing_path(self, step: int) -> Path:
        """Return the folder that the checkpoint of a step is written into."""
        return self.path / f"writing_{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first. `problem` reports whether one is still intact."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, os.listdir(self.path)) if match)

    def begin(self, step: int) -> None:
        """Make the empty folder that the checkpoint of a step is written into.

        Raises:
            CheckpointError: the folder of the run, or that of its checkpoints, does not belong to this training.
            OSError: the file system refuses.
        """
        self._check_place()
        self.path.mkdir(exist_ok=True)
        folder = self.writing_path(step)
        if os.path.lexists(folder):
            remove(folder)
        folder.mkdir()

    def _check_place(self) -> None:
        problem = self._run_problem() or link_problem(self.path)
        if problem is not None:
            raise CheckpointError(problem)

    def remove_unfinished(self) -> None:
        """Remove folders that were being written or removed when a process ended.

        Raises:
            CheckpointError: the folder of the run no longer belongs to this training.
            OSError: the file system refuses.
        """
        self._check_place()
        for left in [*self.path.glob("writing_*"), *self.path.glob("removing_*")]:
            remove(left)

    def set_aside(self, step: int) -> None:
        """Rename a checkpoint that is not intact, so that it does not count when older ones are removed. Raises
        OSError."""
        folder = self.path_of(step)
        damaged = folder.with_name(folder.name.replace("step_", "damaged_"))
        if os.path.lexists(damaged):
            remove(damaged)
        folder.rename(damaged)

    def commit(self, step: int) -> int:
        """Turn `writing_path(step)` into the checkpoint of that step. Returns the size of its files in bytes.

        Raises:
            CheckpointError: the folder of the run no longer belongs to this training.
            OSError: the file system refuses.
        """
        folder, final = self.writing_path(step), self.path_of(step)
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            size, digest = _digest(path, to_disk=True)
            files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
        manifest = folder / MANIFEST
        create(manifest, json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))
        _digest(manifest, to_disk=True)
        for directory in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
            sync_folder(directory)
        self._check_place()
        # A checkpoint of the same step may exist, from before a resume.
        older = self._rename_for_removal(final) if os.path.lexists(final) else None
        folder.rename(final)
        sync_folder(self.path)
        sync_folder(self.path.parent)
        if older is not None:
            remove(older)
        return sum(entry["bytes"] for entry in files.values())

    def discard(self, step: int) -> None:
        """Remove the files of a checkpoint that failed, which frees their space."""
        if self._run_problem() is None:
            shutil.rmtree(self.writing_path(step), ignore_errors=True)

    def remove_all_but(self, steps: Collection[int]) -> None:
        """Keep the checkpoints of `steps`, and remove the others.

        Raises:
            CheckpointError: the folder of the run no longer belongs to this training.
            OSError: the file system refuses.
        """
        self._check_place()
        for step in self.steps():
            if step not in steps:
                remove(self._rename_for_removal(self.path_of(step)))

    def remove_all(self) -> None:
        """Remove every checkpoint, complete or not. Raises OSError."""
        if self.path.is_dir() and not self.path.is_symlink():
            for entry in self.path.iterdir():
                if entry.name.startswith(("step_", "writing_", "removing_", "damaged_")):
                    remove(entry)

    def _rename_for_removal(self, folder: Path) -> Path:
        """Rename a checkpoint, so that a removal that is interrupted leaves nothing that looks like a damaged one."""
        doomed = folder.with_name(folder.name.replace("step_", "removing_"))
        if os.path.lexists(doomed):
            remove(doomed)
        return folder.rename(doomed)

    def fingerprint(self, step: int) -> str | None:
        """Return the SHA-256 of a checkpoint's manifest, which stands for all its files; None: the manifest cannot be
        read."""
        content, reason = read_bytes(self.path_of(step) / MANIFEST)
        return hashlib.sha256(content).hexdigest() if reason is None else None

    def late(self, step: int) -> str | None:
        """Return which file of a checkpoint is missing or too short; None: no file is. A network file system may show
        the file later."""
        return self._check(step, contents=False)

    def problem(self, step: int) -> str | None:
        """Return what is wrong with the files of a checkpoint; None: the checkpoint is intact."""
        return self._check(step, contents=True)

    def _check(self, step: int, contents: bool) -> str | None:
        folder = self.path_of(step)
        if folder.is_symlink():
            return "it is a link; put the folder that it leads to in its place"
        if folder.exists() and not folder.is_dir():
            return "it is no folder"
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
                if contents and _digest(path)[1] != entry["sha256"]:
                    return f"the content of {name} is not what was written"
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"it cannot be read: {error}"
        return None


def _read_manifest(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    manifest, reason = read_json(folder / MANIFEST)
    if reason is not None:
        raise CheckpointError(reason)
    try:
        files = manifest["files"]
        ours = manifest["format"] == _FORMAT and manifest["step"] == step and isinstance(files, dict) and bool(files)
        for name, entry in files.items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            ours = ours and inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    if not ours:
        raise CheckpointError(f"{MANIFEST} is damaged, or of another version")
    return files


def _digest(path: Path, to_disk: bool = False) -> tuple[int, str]:
    """Return the length of a file in bytes and its SHA-256 in hexadecimal.

    The length counts the bytes that were read: a network file system may still answer `stat` with an older length.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if to_disk:
            os.fsync(file.fileno())
    return size, digest.hexdigest()
