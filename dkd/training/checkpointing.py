"""When a checkpoint is written, what is in it, and how training goes on from one.

RUN/checkpoints/step_N/
  training/             student, optimizer, moving average and random states, as torch.distributed.checkpoint writes them
  state.json            steps done, world size, engine, recipe's hash, teacher, gradient scaler, versions
  recipe.yaml           the resolved recipe
  student.safetensors   the student alone, as `dkd evaluate` and `teacher.weights` take it, with student.json
  manifest.json         sizes and checksums of the others

The training thread only copies the state to the CPU. A thread of its own on every rank writes it, over a process group of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dkd.checkpoints import CheckpointError, CheckpointFolder, SavedTensor, load_tensors, save_tensors, saved_tensors
from dkd.config import Recipe, recipe_to_yaml
from dkd.config.schema import CheckpointSection
from dkd.global_batch.collectives import all_gather_objects
from dkd.training.random_state import random_states, restore_random_states
from dkd.training.run_directory import packages

Tensors = dict[str, torch.Tensor]
_FORMAT = 1


class State(Protocol):
    """`TrainingState` or `ZeroTrainingState`."""

    def collect(self) -> Tensors: ...

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None: ...


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written, or was not."""

    step: int
    error: str | None
    warning: str | None
    """Why older checkpoints could not be removed."""
    stall: float
    """Seconds that training stood still for it."""
    seconds: float
    """That the writing took beside training."""
    bytes: int


class CheckpointSchedule:
    """After which steps a checkpoint is due. The same answer on every rank.

    Args:
        steps_per_epoch, total_steps: of the run. The last step always makes one.
    """

    def __init__(self, section: CheckpointSection, steps_per_epoch: int, total_steps: int) -> None:
        self._section, self._steps_per_epoch, self._total_steps = section, steps_per_epoch, total_steps
        self._last = time.monotonic()

    def due(self, step: int, minutes_are_over: bool) -> bool:
        """After `step` steps.

        Args:
            minutes_are_over: what `minutes_over` was on the main process, as all ranks know it.
        """
        section = self._section
        epoch, rest = divmod(step, self._steps_per_epoch)
        due = (
            step == self._total_steps
            or minutes_are_over
            or (section.every_epochs is not None and rest == 0 and epoch % section.every_epochs == 0)
            or (section.every_steps is not None and step % section.every_steps == 0)
        )
        if due:
            self._last = time.monotonic()
        return due

    def minutes_over(self) -> bool:
        """Whether this process's clock asks for a checkpoint."""
        return self._section.every_minutes is not None and time.monotonic() - self._last >= 60 * self._section.every_minutes


class Checkpointer:
    """Writes checkpoints, one at a time, and prunes old ones.

    Args:
        section: the recipe's.
        folder: of the run.
        state: what is saved.
        rank, world_size: of this process.
        timeout: seconds that a rank waits for another while writing.
    """

    def __init__(
        self, section: CheckpointSection, folder: CheckpointFolder, state: State, rank: int, world_size: int, timeout: float
    ) -> None:
        self._section, self._folder, self._state, self._rank = section, folder, state, rank
        self._world_size, self._timeout = world_size, timedelta(seconds=timeout)
        self._group: Any = None
        self._needs_group = world_size > 1
        self._thread: threading.Thread | None = None
        self._results: deque[Written] = deque()
        self.evaluations: dict[int, float] = {}
        """Steps -> top-1, for `keep_best`; the main process's."""

    def save(self, step: int, files: Callable[[Path], None], begun: float) -> None:
        """Begin to write the checkpoint of a step; an earlier one is waited for. All ranks call it. What comes of it, `finished` tells.

        Args:
            files: writes the other files into a folder; called on the main process, beside training.
            begun: when training stopped for this, by time.monotonic().
        """
        self.wait()
        self._renew_group()
        tensors = self._state.collect() | {f"rng/{self._rank}/{name}": state for name, state in random_states().items()}
        if not self._section.background:
            self._write(step, tensors, files, begun)
            return
        stall = time.monotonic() - begun
        self._thread = threading.Thread(target=self._write, args=(step, tensors, files, begun, stall), name="checkpoint", daemon=True)
        self._thread.start()

    def groups(self) -> list[Any]:
        """Process groups that checkpoints are written over, with a timeout of their own."""
        return [] if self._group is None else [self._group]

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[Written]:
        """What came of `save`s that have come to an end on this rank since this was last asked."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def _renew_group(self) -> None:
        """gloo, since what is written lies on the CPU, and a group of its own, since its collectives must not mix with those of training.
        It is of no use after a failure in it, such as a rank that came too late once. All ranks call it."""
        if self._world_size > 1 and any(all_gather_objects(self._needs_group)):
            if self._rank == 0:
                # What another rank wrote after this one had given up. Here, where no rank writes: they wait for this one below. What cannot
                # be removed now is removed at the next start.
                with suppress(OSError):
                    self._folder.remove_unfinished()
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._needs_group = False

    def _write(self, step: int, tensors: Tensors, files: Callable[[Path], None], begun: float, stall: float | None = None) -> None:
        writing = time.monotonic()
        path, size, error, warning = self._folder.writing_path(step), 0, None, None
        try:
            self._needs_group = self._world_size > 1  # until all ranks have come through
            save_tensors(path / "training", tensors, self._group)
            self._needs_group = False
            if self._rank == 0:
                files(path)
                size = self._folder.commit(step)
                warning = self.prune()
        except Exception as problem:  # in a thread: whatever it is, training is to hear of it
            error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
            if self._rank == 0:
                self._folder.discard(step)
        if self._world_size > 1 and not self._needs_group:
            # Only now is the main process done, and the others wait for it here, where they have time, not in training's next collective.
            try:
                dist.barrier(self._group)
            except RuntimeError:
                self._needs_group = True
        now = time.monotonic()
        self._results.append(Written(step, error, warning, now - begun if stall is None else stall, now - writing, size))

    def prune(self) -> str | None:
        """Remove what neither `keep_last` nor `keep_best` keeps. The main process's. Returns why that could not be done."""
        steps = self._folder.steps()
        best = sorted((step for step in steps if step in self.evaluations), key=lambda step: (self.evaluations[step], step))
        kept = {*steps[-self._section.keep_last :], *(best[-self._section.keep_best :] if self._section.keep_best else [])}
        try:
            self._folder.remove_all_but(kept)
        except OSError as error:
            return str(error)
        return None

    def restore(self, step: int, saved_world_size: int, problems: Callable[[Mapping[str, SavedTensor]], list[str]]) -> None:
        """Put the checkpoint of a step in the place of the present state. All ranks call it.

        Args:
            problems: names of what was saved -> why it does not fit; the same on every rank.

        Raises:
            CheckpointError: on every rank.
        """
        self._renew_group()
        training = self._folder.path_of(step) / "training"
        saved: dict[str, SavedTensor] = {}
        try:
            saved = saved_tensors(training)
            found = problems(saved)
        except (CheckpointError, OSError) as error:
            found = [str(error)]
        # A rank that raised alone would leave the others waiting for it.
        for rank, reasons in enumerate(all_gather_objects(found)):
            if reasons:
                more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
                raise CheckpointError(f"rank {rank}: {'; '.join(reasons[:3])}{more}")
        self._state.restore(saved, lambda tensors: load_tensors(training, tensors, self._group))
        prefix = f"rng/{self._rank}/"
        # Of another number of ranks there is none for each; what training itself draws is seeded by position.
        if self._world_size == saved_world_size:
            random = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in saved.items() if name.startswith(prefix)}
            load_tensors(training, random, self._group)
            restore_random_states({name.removeprefix(prefix): state for name, state in random.items()})


def newest_whole(folder: CheckpointFolder) -> tuple[int | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with newer ones. Of the main process.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for step in reversed(folder.steps()):
        problem = folder.problem(step)
        if problem is None:
            try:
                saved_tensors(folder.path_of(step) / "training")
                read_facts(folder, step)
            except (CheckpointError, OSError) as error:
                problem = str(error)
        if problem is None:
            return step, problems
        problems.append(f"{folder.path_of(step)}: {problem}")
    if problems:
        raise CheckpointError("no checkpoint is whole: " + "; ".join(problems))
    return None, []


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe, but for the run's own place."""
    placeless = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": ""})})
    return hashlib.sha256(recipe_to_yaml(placeless).encode()).hexdigest()


def run_facts(recipe: Recipe, teacher: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a run cannot change without being another run.

    Args:
        teacher: name, fingerprint and taps.
        data: the number of training images, and a fingerprint of their labels and places.
    """
    return {"global_batch": recipe.train.global_batch, "teacher": teacher, "data": data}


def checkpoint_facts(step: int, recipe: Recipe, world_size: int, engine: str, run: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The content of state.json.

    Args:
        run: `run_facts`.
        more: what has added up since the first step.
    """
    return {
        "format": _FORMAT,
        "step": step,
        "world_size": world_size,
        "engine": engine,
        "recipe_sha256": recipe_hash(recipe),
        "packages": packages(),
        **run,
        **more,
    }


_TYPES: dict[str, Any] = {
    "world_size": int,
    "engine": str,
    "global_batch": int,
    "teacher": (dict, type(None)),
    "data": dict,
    "seconds": (int, float),
    "replaced_images": int,
    "scaler": (dict, type(None)),
}


def read_facts(folder: CheckpointFolder, step: int) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError."""
    try:
        values = json.loads((folder.path_of(step) / "state.json").read_text())
        ours = values["format"] == _FORMAT and values["step"] == step
        ours = ours and all(isinstance(values[key], types) for key, types in _TYPES.items())
        ours = ours and {"images", "sha256"} <= set(values["data"])
        ours = ours and (values["teacher"] is None or {"name", "fingerprint"} <= set(values["teacher"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("state.json is damaged") from error
    if not ours:
        raise CheckpointError("state.json is damaged, or of another version")
    return dict(values)
