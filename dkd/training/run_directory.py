"""The files of a run.

RUN/
  recipe.yaml              the resolved recipe: every default written out, overrides applied
  provenance.json          one entry a start, the first and each resume: command line, versions, git revision, host, world size, step
  metrics.jsonl            one line a logged step ("step", terms, learning rate, ...), one an evaluation ("evaluation")
  metrics.superseded.jsonl lines of steps that were computed again after an interruption
  tensorboard/             and whatever other trackers write
  checkpoints/             see dkd/checkpoints/folder.py and checkpointing.py
  student.safetensors      the finished student, and beside it
  student.json             its architecture, input and metrics

and one of these, until the next start:
  FINISHED                 the last step is done
  PREEMPTED                a signal stopped it behind a checkpoint: the same command is to be started again
  STOPPED                  somebody did, by making a file called STOP
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from dkd.checkpoints import CheckpointFolder
from dkd.config import Problem, Recipe, RecipeError, load_recipe, recipe_changes, recipe_to_yaml
from dkd.training.stopping import STOP_FILE

FINISHED, PREEMPTED, STOPPED = MARKERS = "FINISHED", "PREEMPTED", "STOPPED"
PACKAGES = ("dkd", "torch", "torchvision", "accelerate", "deepspeed", "datasets", "numpy", "pillow", "pydantic", "safetensors")
Existing = Literal["resume", "refuse", "replace"]
"""What to do with a run that is in `run.dir` already."""
_FILES = (
    "recipe.yaml",
    "provenance.json",
    "metrics.jsonl",
    "metrics.superseded.jsonl",
    "tensorboard",
    "student.safetensors",
    "student.json",
    *MARKERS,
    STOP_FILE,
)


class RunDirectory:
    """One run's folder. Only the main process writes; the others hold it and do nothing."""

    def __init__(self, path: str | Path, writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")
        self._metrics: Any = None
        self._unwritten = b""
        self._lock: Any = None

    def claim(self, existing: Existing) -> None:
        """Create it and keep other trainings out of it; with `replace`, an older run in it is removed.

        Raises:
            OSError: it cannot be made.
            RecipeError: another process trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            # Not flock: worker processes would inherit it, and keep it for a while when this process is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RecipeError.at("run.dir", f"{str(self.path)!r}: another process is training in it") from error
        except OSError:  # a file system without locks
            self._lock = None
        if existing == "replace":
            self.checkpoints.remove_all()
            for target in (self.path / name for name in _FILES):
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
        self.checkpoints.remove_unfinished()

    def start(self, recipe: Recipe, world_size: int, step: int) -> None:
        """Write what describes this start, after `step` steps of earlier ones; metrics go on behind that step.

        Raises:
            OSError: as the file system says.
        """
        if not self.writes:
            return
        for name in MARKERS:
            (self.path / name).unlink(missing_ok=True)
        earlier = _read_json(self.path / "provenance.json", [])
        starts = [*(earlier if isinstance(earlier, list) else []), provenance(world_size, step)]
        _replace(self.path / "provenance.json", json.dumps(starts, indent=2) + "\n")
        _replace(self.path / "recipe.yaml", recipe_to_yaml(recipe))
        self._supersede_after(step)
        self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)

    def _supersede_after(self, step: int) -> None:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept: list[str] = []
        superseded: list[str] = []
        text = path.read_text(errors="replace")
        for line in text.splitlines():
            (kept if _belongs_before(line, step) else superseded).append(line + "\n")
        if superseded:
            with (self.path / "metrics.superseded.jsonl").open("a") as file:
                file.writelines(superseded)
                _to_disk(file)
        if superseded or not text.endswith("\n"):
            _replace(path, "".join(kept))

    def log(self, line: Mapping[str, Any]) -> str | None:
        """Append one line to metrics.jsonl. Lines that a full disk does not take are kept for the next time; returns what the system said
        when that begins."""
        if self._metrics is None:
            return None
        was_behind = bool(self._unwritten)
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            while self._unwritten:  # a disk that fills up takes the beginning of it
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            return None if was_behind else str(error)
        return None

    def sync(self) -> None:
        """What was logged is on the disk. Raises OSError."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def mark_finished(self, steps: int) -> None:
        """A STOP file that came too late has no effect. Raises OSError."""
        self._mark(FINISHED, {"steps": steps})
        if self.writes:
            (self.path / STOP_FILE).unlink(missing_ok=True)

    def mark_stopped(self, by: str, step: int, steps: int, steps_this_start: int) -> None:
        """The run stopped when asked; a STOP file has had its effect. Raises OSError.

        Args:
            by: a signal's name, or STOP.
            step, steps: that are done, and of the whole run.
            steps_this_start: of those that are done.
        """
        facts = {"by": by, "step": step, "steps": steps, "steps_this_start": steps_this_start}
        self._mark(STOPPED if by == STOP_FILE else PREEMPTED, facts)
        if by == STOP_FILE:
            (self.path / STOP_FILE).unlink(missing_ok=True)

    def _mark(self, name: str, facts: Mapping[str, Any]) -> None:
        if self.writes:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            _replace(self.path / name, json.dumps({**facts, "time": when, "host": platform.node()}) + "\n")

    def evaluations(self) -> dict[int, float]:
        """Steps -> top-1 of what metrics.jsonl holds."""
        path = self.path / "metrics.jsonl"
        lines = map(read_line, path.read_text(errors="replace").splitlines() if path.exists() else [])
        found = (line["evaluation"] for line in lines if isinstance(line.get("evaluation"), dict))
        return {evaluation["steps"]: evaluation["top1"] for evaluation in found if {"steps", "top1"} <= set(evaluation)}

    def identity(self) -> tuple[str, bool]:
        """The same for all starts of a run, and another's for no other; and whether this is not the first of them."""
        starts = _read_json(self.path / "provenance.json", [])
        first = starts[0] if starts else {}
        named = f"{first.get('host')} {first.get('started')} {first.get('command')}"
        return hashlib.sha256(named.encode()).hexdigest()[:16], len(starts) > 1

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()  # unbuffered: there is nothing left to write that could fail
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_run(path: Path) -> bool:
    """Whether a run has been started in `path`."""
    return any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl")) or bool(CheckpointFolder(path / "checkpoints").steps())


def check_run_directory(recipe: Recipe, existing: Existing, allow_recipe_change: bool) -> list[Problem]:
    """Whether a run can start in `run.dir`, or go on there. Returns how its recipe differs from that of the run that is in it.

    Raises:
        RecipeError: `run.dir` is no folder; it holds a run that must not be lost, or one of another recipe.
    """
    path = Path(recipe.run.dir)
    try:
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:
        raise RecipeError.at("run.dir", f"{str(path)[:80]!r} cannot be a folder: {error}") from error
    if not parent.is_dir():
        raise RecipeError.at("run.dir", f"{str(parent)!r} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError.at("run.dir", f"{str(path)!r} cannot be made: {str(parent)!r} cannot be written to")
    if not is_run(path) or existing == "replace":
        return []
    if existing == "refuse":
        raise RecipeError.at(
            "run.dir", f"{str(path)!r} holds a run already, and --fresh was asked for; choose another run.dir, or add --overwrite"
        )
    try:
        before = load_recipe(path / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError.at(
            "run.dir",
            f"{str(path)!r} holds a run already, whose recipe.yaml cannot be read ({error.problems[0]}); choose another run.dir, or give "
            "--overwrite to replace it",
        ) from error
    changes = recipe_changes(before, recipe)
    if changes and not allow_recipe_change:
        advice = (
            "holds a run of a recipe that differs as said; give --allow-recipe-change to go on with the new one, --overwrite to replace "
        )
        raise RecipeError([*changes, Problem("run.dir", f"{str(path)!r} {advice}the run, or choose another run.dir")])
    return changes


def provenance(world_size: int, step: int) -> dict[str, Any]:
    """How this process was started, from what, and after how many steps of earlier ones."""
    from dkd.data.jpeg import jpeg_decoder  # late: `dkd status` imports this module, and is to be quick

    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "host": platform.node(),
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": packages(),
        "jpeg_decoder": jpeg_decoder().name,
        "git_revision": _git_revision(),
    }


def packages() -> dict[str, str | None]:
    """Versions of what a result depends on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the working directory: the commit, and `-dirty` when files differ from it."""
    try:
        # Without optional locks: killed in the middle, git would leave one behind in the user's repository.
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _belongs_before(line: str, step: int) -> bool:
    """Whether a line of metrics stays when training goes on after `step` steps. An evaluation after that step is made again."""
    values = read_line(line)
    try:
        if "evaluation" in values:
            return bool(values["evaluation"]["steps"] < step)
        if "checkpoint" in values:
            return bool(values["checkpoint"]["step"] <= step)
        return bool(0 < values["step"] <= step)
    except (KeyError, TypeError):  # not a line of ours
        return False


def read_line(line: str) -> dict[str, Any]:
    """A line of metrics; empty when a killed process wrote half of it."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def _replace(path: Path, text: str) -> None:
    """A reader, also after a power cut, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w") as file:
        file.write(text)
        _to_disk(file)
    os.replace(temporary, path)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
