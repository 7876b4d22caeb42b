"""Write checkpoints beside training, and restore training from one.

RUN/checkpoints/step_N/
  training/             student, optimizer, moving average and random states, by torch.distributed.checkpoint
  state.json            steps done, world size, engine, recipe's hash, teacher, gradient scaler, versions (facts.py)
  recipe.yaml           the resolved recipe
  student.safetensors   the student alone, for `dkd evaluate` and `teacher.weights`, with student.json
  manifest.json         sizes and checksums of the other files

The training thread only copies the state to the CPU. A separate thread on every rank writes the copy, over a process
group of its own.
"""

from __future__ import annotations

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

from dkd.atomic_files import LOOK_AGAIN_SECONDS, look_again
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
from dkd.checkpoints.facts import read_facts
from dkd.config.schema import CheckpointSection
from dkd.global_batch.collectives import all_gather_objects
from dkd.library_internals.torch import members_alone
from dkd.rng import random_states, restore_random_states

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
_MOST_RANKS = 4  # ranks that a message names


class State(Protocol):
    """Give and take the tensors of a training: student, optimizer and moving average."""

    def collect(self) -> Tensors:
        """Return copies on the CPU of all tensors that a checkpoint holds, by name. All ranks call it."""
        ...

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None:
        """Replace the state by that of a checkpoint. All ranks call it.

        Args:
            saved: names, shapes and dtypes of the checkpoint's tensors.
            load: fills tensors by name from the checkpoint.
        """
        ...


@dataclass(frozen=True)
class SaveResult:
    """Hold the result of writing one checkpoint."""

    step: int
    """Steps done."""
    error: str | None
    """The reason why the checkpoint could not be written; None: it was written."""
    warning: str | None
    """The reason why older checkpoints could not be removed; None: they were removed."""
    stall: float
    """Seconds that training stood still for the checkpoint."""
    seconds: float
    """Seconds that the writing took, beside training."""
    bytes: int
    """Size of the checkpoint's files in bytes; 0 where it was not written."""


class Checkpointer:
    """Write checkpoints, one at a time, and remove old ones.

    Args:
        section: the recipe's section.
        folder: the run's folder of checkpoints.
        state: the state that is saved and restored.
        rank, world_size: rank of this process, and number of ranks.
        timeout: seconds that a rank waits for another rank while writing.
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
        self._section, self.folder, self._state, self._rank = section, folder, state, rank
        self._world_size, self._timeout = world_size, timedelta(seconds=timeout)
        self.patience = min(LOOK_AGAIN_SECONDS, timeout / 4)  # while the others wait
        self._group: Any = None
        self._needs_group = world_size > 1
        self._thread: threading.Thread | None = None
        self._results: deque[SaveResult] = deque()
        self.evaluations: dict[int, float] = {}
        """Top-1, or without labels the agreement with the teacher, by number of steps, for `keep_best`; used on the
        main process only."""

    def save(self, step: int, files: Callable[[Path], None], begun: float) -> None:
        """Begin to write the checkpoint of a step, after an earlier one has been written. All ranks call it.
        `finished` returns the result.

        Args:
            step: steps done.
            files: writes the other files into a folder; called on the main process, beside training.
            begun: the time when training stopped for the checkpoint, by time.monotonic().
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
        """Return the process groups that checkpoints are written over, which have a timeout of their own."""
        return [] if self._group is None else [self._group]

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[SaveResult]:
        """Return the results of those `save`s that have finished on this rank since the last call."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def _renew_group(self) -> None:
        """Make a new process group where one is needed. All ranks call it.

        The group's backend is gloo, since checkpoints are written from the CPU. The group is separate, since its
        collectives must not mix with those of training. A group cannot be used after a failure in it, such as a rank
        that joined too late.
        """
        if self._world_size > 1 and any(all_gather_objects(self._needs_group)):
            if self._rank == 0:
                # Another rank may have written after this rank had given up. No rank writes now, since the others
                # wait for this rank below. Folders that cannot be removed now are removed at the next start.
                with suppress(OSError, CheckpointError):
                    self.folder.remove_unfinished()
            with members_alone():  # and bound to no GPU
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self._needs_group = False

    def _write(
        self, step: int, tensors: Tensors, files: Callable[[Path], None], begun: float, stall: float | None = None
    ) -> None:
        """Write one checkpoint. Every rank gets the same result, unless a rank is lost meanwhile."""
        writing = time.monotonic()
        size, error, warning = 0, None, None
        try:
            self._needs_group = self._world_size > 1  # until all ranks have succeeded
            self._run_together(lambda: self.folder.begin(step) if self._rank == 0 else None)
            self._run_together(lambda: self._look_for(step))
            save_tensors(self.folder.writing_path(step) / "training", tensors, self._group)
            # The other ranks wait for the main process here, where they have time, not in training's next collective.
            size, warning = self._run_together(lambda: self._seal(step, files) if self._rank == 0 else (0, None))
            self._needs_group = False
        except Exception as problem:  # this is a thread: training must learn of any failure
            if isinstance(problem, SharedCheckpointError):
                self._needs_group = False
            error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
            if self._rank == 0:
                self.folder.discard(step)
        now = time.monotonic()
        self._results.append(
            SaveResult(step, error, warning, now - begun if stall is None else stall, now - writing, size)
        )

    def _run_together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, and return the result of rank 0. This is a collective of the ranks that write.

        Raises:
            SharedCheckpointError: on every rank, when `action` raised on one; it names the rank and the machine.
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
        """Check that this rank sees the folder that the main process has made for the checkpoint of a step. Raises
        CheckpointError."""
        path = self.folder.writing_path(step)
        unseen = look_again(lambda: None if path.is_dir() else f"does not see {str(path)!r}", self.patience)
        if unseen is not None:
            raise CheckpointError(
                f"{unseen}, which rank 0 has made; run.dir must be on a file system that all ranks share"
            )

    def _seal(self, step: int, files: Callable[[Path], None]) -> tuple[int, str | None]:
        """Make the checkpoint from what all ranks have written, on the main process. Returns the checkpoint's bytes,
        and the reason why older checkpoints could not be removed."""
        path = self.folder.writing_path(step)
        late = look_again(lambda: missing_file(path / "training"), self.patience)
        if late is not None:
            raise CheckpointError(f"{late}; run.dir must be on a file system that all ranks share")
        files(path)
        return self.folder.commit(step), self.prune()

    def prune(self) -> str | None:
        """Remove the checkpoints that neither `keep_last` nor `keep_best` keeps. Called on the main process only.
        Returns the reason why they could not be removed; None: they were removed."""
        try:
            steps = self.folder.steps()
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
            self.folder.remove_all_but(kept)
        except (OSError, CheckpointError) as error:
            return str(error)
        return None

    def restore(
        self, step: int, saved_world_size: int, problems: Callable[[Mapping[str, SavedTensor]], list[str]]
    ) -> None:
        """Replace the present state by the checkpoint of a step. All ranks call it.

        Args:
            step: the checkpoint.
            saved_world_size: number of ranks that wrote the checkpoint.
            problems: returns the reasons why saved tensors do not fit, given their shapes and dtypes by name; the same
                reasons on every rank.

        Raises:
            CheckpointError: on every rank.
        """
        self._renew_group()
        training = self.folder.path_of(step) / "training"
        saved: dict[str, SavedTensor] = {}

        def look() -> str | None:
            # A network file system may show files to this rank later than to the main process.
            try:
                late = missing_file(training)
                saved.update(saved_tensors(training))
            except (CheckpointError, OSError) as error:
                return str(error)
            return (
                late
                if late is not None or self.folder.fingerprint(step) == wanted
                else "it is another checkpoint than rank 0's"
            )

        wanted = all_gather_objects(self.folder.fingerprint(step) if self._rank == 0 else None)[0]
        reason = look_again(look, self.patience)
        found = problems(saved) if reason is None else []
        if found:
            reason = "; ".join(found[:3]) + (f" (and {len(found) - 3} more)" if len(found) > 3 else "")
        # A rank that raised alone would leave the other ranks waiting.
        raise_together(all_gather_objects((reason, platform.node())))
        self._state.restore(saved, lambda tensors: load_tensors(training, tensors, self._group))
        prefix = f"rng/{self._rank}/"
        # With another number of ranks, not every rank has a saved state; training's own draws are seeded by position.
        if self._world_size == saved_world_size:
            random = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in saved.items() if name.startswith(prefix)}
            load_tensors(training, random, self._group)
            restore_random_states({name.removeprefix(prefix): state for name, state in random.items()})


def raise_together(ranks: Sequence[tuple[str | None, str | None]]) -> None:
    """Raise a SharedCheckpointError when a rank has a reason.

    Args:
        ranks: for each rank, the reason why it cannot continue (None: it can), and its machine (None: there is one
            rank).
    """
    reports = [
        f"rank {rank} on {host}: {reason}" if host else reason
        for rank, (reason, host) in enumerate(ranks)
        if reason is not None
    ]
    if reports:
        more = f" (and {len(reports) - _MOST_RANKS} more ranks)" if len(reports) > _MOST_RANKS else ""
        raise SharedCheckpointError("; ".join(reports[:_MOST_RANKS]) + more)


def newest_intact(folder: CheckpointFolder) -> tuple[int | None, list[str]]:
    """Return the step of the newest intact checkpoint, and what is wrong with newer ones. Called on the main process
    only.

    A checkpoint is intact when its files are as they were written. The step is None where there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and none is intact.
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
        raise CheckpointError("no checkpoint is intact: " + "; ".join(problems))
    return None, []
