"""Fill the caches of a recipe's teachers, without a student."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dkd import console
from dkd.build.data import build_data
from dkd.build.models import build_teachers
from dkd.config import Recipe
from dkd.config.derived import data_seed
from dkd.data.loader import Batch
from dkd.distillation.inputs import Inputs
from dkd.distillation.step import mixing_seed
from dkd.distillation.teacher_pass import TeacherPass
from dkd.distributed.async_mean import AsyncMean, StepValues
from dkd.distributed.process_group import set_timeouts
from dkd.distributed.stop_signals import signalled
from dkd.engines.arithmetic import Arithmetic
from dkd.errors import Stopped, TrainingError
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch
from dkd.preflight.agreement import check_same_teacher
from dkd.runs.progress import Progress
from dkd.text import size_in_bytes
from dkd.training.opening import Opened, build_losses, open_training, read_caches
from dkd.training.schedule import RunSchedule
from dkd.training.teacher_caches import TeacherCaches

_STEPS_AT_ONCE = 512
"""Steps whose parts are looked for at a time."""


@dataclass(frozen=True)
class Filled:
    """Holds what was done.

    Args:
        computed: steps.
        found: steps that were stored before.
        written: bytes, on this rank.
        folders: of the caches.
    """

    computed: int
    found: int
    written: int
    folders: list[Path]


class Filling:
    """Computes the steps that are missing in the caches of a recipe. A collective. Arguments and errors as
    `Trainer.from_recipe`.

    Args:
        epochs: of the period that are filled, at most; None: those of the recipe.
    """

    def __init__(self, recipe: Recipe, launch: Launch, epochs: int | None = None) -> None:
        self._opened = opened = open_training(recipe, launch, None)
        with opened.heartbeat.names_lost_ranks():
            self._build(opened, epochs)

    def _build(self, opened: Opened, epochs: int | None) -> None:
        recipe, launch, engine = opened.recipe, opened.launch, opened.engine
        arithmetic = Arithmetic.of(recipe)
        self._data = data = build_data(recipe, opened.training, None, launch, arithmetic.dtype, engine.device)
        schedule = RunSchedule(recipe, data.sampler.steps_per_epoch)
        objective = build_losses(opened, data.sampler, schedule)
        teacher = build_teachers(recipe, launch, arithmetic, engine.device)
        assert teacher is not None
        check_same_teacher(teacher.fingerprint)
        stored = read_caches(opened, objective, data, teacher, schedule)
        self.caches = TeacherCaches(recipe, teacher, schedule, stored)
        sampler = data.sampler
        inputs = Inputs(
            engine.device,
            sampler.rank,
            sampler.world_size,
            data.mixing,
            lambda step, place: mixing_seed(data_seed(recipe), sampler.drawn_step(step), place),
        )
        self._pass = TeacherPass(
            teacher,
            objective,
            stored,
            inputs,
            sampler.micro_steps,
            data.pipeline.normalize,
            data.teacher_normalize,
            arithmetic.dtype,
            arithmetic.memory_format,
        )
        limits = [schedule.total_steps]
        limits += [each * sampler.steps_per_epoch for each in (sampler.period, epochs) if each is not None]
        self.steps = min(limits)
        set_timeouts(recipe.run.start_timeout)

    def run(self) -> Filled:
        """Compute and store what is missing. A collective.

        Raises:
            TrainingError: on every rank: images cannot be loaded, or the cache cannot be written.
            Stopped: on every rank: a signal asked for it. What was computed is stored.
            LostRankError: another rank is gone.
        """
        opened, computed = self._opened, 0
        for line in (*opened.notes, *self.caches.describe(self.steps)):
            console.say_on_first_rank(f"dkd: {line}")
        batch = opened.recipe.train.global_batch
        progress = Progress(self.steps, 0, batch, opened.launch.is_main)
        try:
            with opened.heartbeat.names_lost_ranks():
                for first, last in self._missing():
                    self._fill(first, last, progress)
                    computed += last - first
                self.caches.flush()
                self._check_written()
        finally:
            progress.close()
            self.caches.close()
            opened.heartbeat.close()
        folders = self.caches.folders
        return Filled(computed, self.steps - computed, self.caches.written_bytes, folders)

    def report(self) -> None:
        """Fill the caches, and report what was done. A collective. Errors as `run`."""
        begun = time.monotonic()
        filled = self.run()
        where = ", ".join(str(folder) for folder in filled.folders)
        console.say_on_first_rank(
            f"dkd: {filled.computed} steps computed in {time.monotonic() - begun:.0f} s, {filled.found} were stored "
            f"already; {size_in_bytes(filled.written)} written by this process: {where}"
        )

    def _missing(self) -> Iterator[tuple[int, int]]:
        """Yield runs of steps of one epoch that some cache lacks. A collective."""
        per_epoch = self._data.sampler.steps_per_epoch
        step = 0
        while step < self.steps:
            last = min(step + _STEPS_AT_ONCE, self.steps, step - step % per_epoch + per_epoch)
            listed = self.caches.listed(step, last)
            first = None
            for number in range(step, last + 1):
                missing = number < last and not listed[number - step]
                if missing and first is None:
                    first = number
                elif not missing and first is not None:
                    yield first, number
                    first = None
            step = last

    def _fill(self, first: int, last: int, progress: Progress) -> None:
        heartbeat = self._opened.heartbeat
        self.caches.wait()  # worker processes are forked now
        batches = iter(self._data.train_loader.steps(first, last))
        pending: AsyncMean | None = None
        failures: tuple[str, ...] = ()
        for step in range(first, last):
            heartbeat.reach([step, 0], f"step {step + 1}, waiting for images")
            micro_batches = list(islice(batches, self._data.sampler.micro_steps))
            heartbeat.reach([step, 1], f"step {step + 1}, forward of the teacher")
            self._pass(micro_batches, step)
            failures += _failures(micro_batches)
            counts = {
                "failures": float(len(failures)),
                "unwritten": float(self.caches.problem is not None),
                "stop": float(signalled() is not None),
            }
            mean = AsyncMean(step, StepValues({}, counts))
            self._read(pending, failures)
            pending = mean
            progress.step(step, {"stored_GB": self.caches.written_bytes / 1e9})
        self._read(pending, failures)

    def _read(self, mean: AsyncMean | None, failures: tuple[str, ...]) -> None:
        """Confirm a step, or end on all ranks together. A collective where there is a reason to end."""
        if mean is None:
            return
        counts = mean.read().counts
        if counts["failures"] > 0:
            found = [each[0] for each in all_gather_objects(failures) if each]
            raise TrainingError(f"step {mean.step + 1}: {found[0]}")
        self.caches.confirm(mean.step + 1)
        if counts["unwritten"] > 0:
            self._check_written()
        if counts["stop"] > 0:
            self.caches.flush()
            self._check_written()
            raise Stopped(mean.step + 1, "a signal")

    def _check_written(self) -> None:
        """End on all ranks where one could not write. A collective."""
        problems = [each for each in all_gather_objects(self.caches.problem) if each is not None]
        if problems:
            raise TrainingError(f"the teacher's cache cannot be written: {problems[0]}")


def _failures(micro_batches: list[Batch]) -> tuple[str, ...]:
    """Return what went wrong in loading."""
    found = [batch.failure for batch in micro_batches if batch.failure]
    return tuple(found + [message for batch in micro_batches for message in batch.unreadable])
