"""The files of a run.

RUN/
  recipe.yaml            the resolved recipe: every default written out, overrides applied
  provenance.json        command line, versions, git revision, hosts' world size, start time
  metrics.jsonl          one line a logged step ("step", terms, learning rate, ...), one an evaluation ("evaluation")
  tensorboard/           and whatever other trackers write
  checkpoints/step_N/    student.safetensors and student.json after an epoch
  student.safetensors    the finished student, and beside it
  student.json           its architecture, input and metrics
"""

from __future__ import annotations

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
from typing import Any

from dkd.config import Recipe, RecipeError, recipe_to_yaml

PACKAGES = ("dkd", "torch", "torchvision", "accelerate", "deepspeed", "datasets", "numpy", "pydantic", "safetensors")


class RunDirectory:
    """One run's folder. Only the main process writes; the others hold it and do nothing."""

    def __init__(self, path: str | Path, writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self._metrics: Any = None

    def start(self, recipe: Recipe, world_size: int, overwrite: bool) -> None:
        """Create it; with `overwrite`, an older run in it is removed first."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # Only here: the process ends, and the launcher ends the others.
            raise RecipeError.at("run.dir", f"{str(self.path)!r} cannot be made: {error.strerror}") from error
        if overwrite and is_run(self.path):
            for name in (
                "recipe.yaml",
                "provenance.json",
                "metrics.jsonl",
                "tensorboard",
                "checkpoints",
                "student.safetensors",
                "student.json",
            ):
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        (self.path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        (self.path / "provenance.json").write_text(json.dumps(provenance(world_size), indent=2) + "\n")
        self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(line) + "\n")

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}"

    def remove_old_checkpoints(self, keep: int) -> None:
        if self.writes:
            for folder in sorted((self.path / "checkpoints").glob("step_*"))[:-keep]:
                shutil.rmtree(folder)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def is_run(path: Path) -> bool:
    """Whether a run has been started in `path`."""
    return (path / "recipe.yaml").exists() or (path / "metrics.jsonl").exists()


def check_free(path: Path, overwrite: bool) -> None:
    """Raises RecipeError when `path` holds a run that must not be lost, or is no directory."""
    try:
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:
        raise RecipeError.at("run.dir", f"{str(path)[:80]!r} cannot be a folder: {error}") from error
    if not parent.is_dir():
        raise RecipeError.at("run.dir", f"{str(parent)!r} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError.at("run.dir", f"{str(path)!r} cannot be made: {str(parent)!r} cannot be written to")
    if is_run(path) and not overwrite:
        raise RecipeError.at("run.dir", f"{str(path)!r} holds a run already; choose another run.dir, or give --overwrite to replace it")


def provenance(world_size: int) -> dict[str, Any]:
    """How this process was started, and from what."""
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Of the working directory: the commit, and `-dirty` when files differ from it."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
