"""When a checkpoint is written, what is in it, and how training goes on from one.

RUN/checkpoints/step_N/
  training/             student, optimizer, moving average and random states, as torch.distributed.checkpoint writes them
  state.json            steps done, world size, engine, recipe's hash, teacher, gradient scaler, versions
  recipe.yaml           the resolved recipe
  student.safetensors   the student alone, as `dkd evaluate` and `teacher.weights` take it, with student.json
  manifest.json         sizes and checksums of the others

The training thread only copies the state to the CPU. A thread of its own on every rank writes it, over a process group
of its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dkd import atomic_files
from dkd.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    SavedTensor,
    SharedCheckpointError,
    load_tensors,
    missing_file,
    save_tensors,
    saved_tensors,
)
from dkd.config import Recipe, recipe_to_yaml
from dkd.config.schema import CheckpointSection
from dkd.global_batch.collectives import all_gather_objects
from dkd.rng import random_states, restore_random_states
from dkd.runs.directory import packages
from dkd.runs.place import LOOK_AGAIN_SECONDS, look_again

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
_FORMAT = 1
_MOST_RANKS = 4  # that a message names


class State(Protocol):
    """`TrainingState` or `ZeroTrainingState`."""

    def collect(self) -> Tensors: ...

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None: ...


@dataclass(frozen=True)
class SaveResult:
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
        return (
            self._section.every_minutes is not None
            and time.monotonic() - self._last >= 60 * self._section.every_minutes
        )


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
        self,
        section: CheckpointSection,
        folder: CheckpointFolder,
        state: State,
        rank: int,
        world_size: int,
        timeout: float,
    ) -> None:
        self._section, self._folder, self._state, self._rank = section, folder, state, rank
        self._world_size, self._timeout = world_size, timedelta(seconds=timeout)
        self._patience = min(LOOK_AGAIN_SECONDS, timeout / 4)  # while the others wait
        self._group: Any = None
        self._needs_group = world_size > 1
        self._thread: threading.Thread | None = None
        self._results: deque[SaveResult] = deque()
        self.evaluations: dict[int, float] = {}
        """Steps -> top-1, for `keep_best`; the main process's."""

    def save(self, step: int, files: Callable[[Path], None], begun: float) -> None:
        """Begin to write the checkpoint of a step; an earlier one is waited for. All ranks call it. What comes of it,
        `finished` tells.

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
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, files, begun, stall), name="checkpoint", daemon=True
        )
        self._thread.start()

    def groups(self) -> list[Any]:
        """Process groups that checkpoints are written over, with a timeout of their own."""
        return [] if self._group is None else [self._group]

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[SaveResult]:
        """What came of `save`s that have come to an end on this rank since this was last asked."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def _renew_group(self) -> None:
        """gloo, since what is written lies on the CPU, and a group of its own, since its collectives must not mix with
        those of training. It is of no use after a failure in it, such as a rank that came too late once. All ranks call
        it."""
        if self._world_size > 1 and any(all_gather_objects(self._needs_group)):
            if self._rank == 0:
                # What another rank wrote after this one had given up. Here, where no rank writes: they wait for this
                # one below. What cannot be removed now is removed at the next start.
                with suppress(OSError, CheckpointError):
                    self._folder.remove_unfinished()
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._needs_group = False

    def _write(
        self, step: int, tensors: Tensors, files: Callable[[Path], None], begun: float, stall: float | None = None
    ) -> None:
        """Write one checkpoint; every rank comes to the same result, unless one of them is lost meanwhile."""
        writing = time.monotonic()
        size, error, warning = 0, None, None
        try:
            self._needs_group = self._world_size > 1  # until all ranks have come through
            self._together(lambda: self._folder.begin(step) if self._rank == 0 else None)
            self._together(lambda: self._look_for(step))
            save_tensors(self._folder.writing_path(step) / "training", tensors, self._group)
            # The others wait for the main process here, where they have time, not in training's next collective.
            size, warning = self._together(lambda: self._seal(step, files) if self._rank == 0 else (0, None))
            self._needs_group = False
        except Exception as problem:  # in a thread: whatever it is, training is to hear of it
            if isinstance(problem, SharedCheckpointError):
                self._needs_group = False
            error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
            if self._rank == 0:
                self._folder.discard(step)
        now = time.monotonic()
        self._results.append(
            SaveResult(step, error, warning, now - begun if stall is None else stall, now - writing, size)
        )

    def _together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and return what it returned on rank 0. A collective of the ranks that write.

        Raises:
            SharedCheckpointError: on every rank, when `action` raised on one; it names the rank and its machine.
            RuntimeError: another rank is lost.
        """
        result, reason = None, None
        try:
            result = action()
        except Exception as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        ranks = (
            all_gather_objects((result, reason, platform.node()), self._group)
            if self._world_size > 1
            else [(result, reason, None)]
        )
        raise_together([(reason, host) for _, reason, host in ranks])
        return ranks[0][0]  # type: ignore[return-value]

    def _look_for(self, step: int) -> None:
        """Raise CheckpointError, when this rank does not see the folder that the main process has made for the
        checkpoint of a step."""
        path = self._folder.writing_path(step)
        unseen = look_again(lambda: None if path.is_dir() else f"does not see {str(path)!r}", self._patience)
        if unseen is not None:
            raise CheckpointError(
                f"{unseen}, which rank 0 has made; run.dir must be on a file system that all ranks share"
            )

    def _seal(self, step: int, files: Callable[[Path], None]) -> tuple[int, str | None]:
        """On the main process: make the checkpoint of what all ranks have written. Returns its bytes, and why older
        ones stay."""
        path = self._folder.writing_path(step)
        late = look_again(lambda: missing_file(path / "training"), self._patience)
        if late is not None:
            raise CheckpointError(f"{late}; run.dir must be on a file system that all ranks share")
        files(path)
        return self._folder.commit(step), self.prune()

    def prune(self) -> str | None:
        """Remove what neither `keep_last` nor `keep_best` keeps. The main process's. Returns why that could not be
        done."""
        try:
            steps = self._folder.steps()
        except OSError as error:
            return str(error)
        best = sorted(
            (step for step in steps if step in self.evaluations), key=lambda step: (self.evaluations[step], step)
        )
        kept = {
            *steps[-self._section.keep_last :],
            *(best[-self._section.keep_best :] if self._section.keep_best else []),
        }
        try:
            self._folder.remove_all_but(kept)
        except (OSError, CheckpointError) as error:
            return str(error)
        return None

    def restore(
        self, step: int, saved_world_size: int, problems: Callable[[Mapping[str, SavedTensor]], list[str]]
    ) -> None:
        """Put the checkpoint of a step in the place of the present state. All ranks call it.

        Args:
            problems: names of what was saved -> why it does not fit; the same on every rank.

        Raises:
            CheckpointError: on every rank.
        """
        self._renew_group()
        training = self._folder.path_of(step) / "training"
        saved: dict[str, SavedTensor] = {}

        def look() -> str | None:
            # A file system over a network may show to this rank later what the main process has found.
            try:
                late = missing_file(training)
                saved.update(saved_tensors(training))
            except (CheckpointError, OSError) as error:
                return str(error)
            return (
                late
                if late is not None or self._folder.fingerprint(step) == wanted
                else "it is another checkpoint than rank 0's"
            )

        wanted = all_gather_objects(self._folder.fingerprint(step) if self._rank == 0 else None)[0]
        reason = look_again(look, self._patience)
        found = problems(saved) if reason is None else []
        if found:
            reason = "; ".join(found[:3]) + (f" (and {len(found) - 3} more)" if len(found) > 3 else "")
        # A rank that raised alone would leave the others waiting for it.
        raise_together(all_gather_objects((reason, platform.node())))
        self._state.restore(saved, lambda tensors: load_tensors(training, tensors, self._group))
        prefix = f"rng/{self._rank}/"
        # Of another number of ranks there is none for each; what training itself draws is seeded by position.
        if self._world_size == saved_world_size:
            random = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in saved.items() if name.startswith(prefix)}
            load_tensors(training, random, self._group)
            restore_random_states({name.removeprefix(prefix): state for name, state in random.items()})


def raise_together(ranks: Sequence[tuple[str | None, str | None]]) -> None:
    """Raise a SharedCheckpointError, when one of the ranks has a reason.

    Args:
        ranks: of each rank why it cannot continue, and its machine; None for a machine: there is one rank.
    """
    told = [
        f"rank {rank} on {host}: {reason}" if host else reason
        for rank, (reason, host) in enumerate(ranks)
        if reason is not None
    ]
    if told:
        more = f" (and {len(told) - _MOST_RANKS} more ranks)" if len(told) > _MOST_RANKS else ""
        raise SharedCheckpointError("; ".join(told[:_MOST_RANKS]) + more)


def newest_intact(folder: CheckpointFolder) -> tuple[int | None, list[str]]:
    """Return the newest checkpoint whose files are as they were written, and what is wrong with newer ones. The main
    process's.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    end = time.monotonic() + LOOK_AGAIN_SECONDS  # for all of them together
    problems: list[str] = []
    for step in reversed(folder.steps()):
        problem = look_again(partial(folder.late, step), end - time.monotonic()) or folder.problem(step)
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


def checkpoint_facts(
    step: int, recipe: Recipe, world_size: int, engine: str, run: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
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


def write_facts(folder: Path, facts: Mapping[str, Any], recipe: Recipe) -> None:
    """Write state.json, given `checkpoint_facts`, and recipe.yaml into the folder of a new checkpoint. Raises
    OSError."""
    atomic_files.create(folder / "state.json", json.dumps(facts, indent=2) + "\n")
    atomic_files.create(folder / "recipe.yaml", recipe_to_yaml(recipe))


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
    values, reason = atomic_files.read_json(folder.path_of(step) / "state.json")
    if reason is not None:
        raise CheckpointError(reason)
    try:
        ours = values["format"] == _FORMAT and values["step"] == step
        ours = ours and all(isinstance(values[key], types) for key, types in _TYPES.items())
        ours = ours and {"images", "sha256"} <= set(values["data"])
        ours = ours and (values["teacher"] is None or {"name", "fingerprint"} <= set(values["teacher"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("state.json is damaged") from error
    if not ours:
        raise CheckpointError("state.json is damaged, or of another version")
    return dict(values)
