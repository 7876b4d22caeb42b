"""The caches of a run's teachers: what is reported of them, and when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dkd.config import Recipe, RecipeError
from dkd.config.derived import caches, teacher_key
from dkd.distillation import LazyTeacher
from dkd.distillation.step import DistillationStep
from dkd.distillation.stored_teacher import StoredTeacher
from dkd.distillation.teacher_group import members_of
from dkd.teacher_cache.key import CacheKey, nearest
from dkd.text import shorten
from dkd.training.schedule import RunSchedule


def in_bytes(count: float) -> str:
    """Return a number of bytes in a unit that people read."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


class TeacherCaches:
    """Holds the caches of a run. All ranks make one; those that a docstring calls a collective are called together.

    Args:
        recipe: settled.
        step: of the run, whose outputs of teachers come from these caches.
        schedule: of the run.
        stored: by the name of a teacher.
    """

    def __init__(
        self, recipe: Recipe, step: DistillationStep, schedule: RunSchedule, stored: Mapping[str, StoredTeacher]
    ) -> None:
        self._recipe, self._step, self._schedule, self._stored = recipe, step, schedule, stored
        step.teaching.stored = stored

    def prepare(self, step: int) -> list[str]:
        """Look whether the next step is stored, and build teachers that are needed. A collective.

        Returns:
            Lines that report what will happen.

        Raises:
            RecipeError: on every rank: outputs are missing that `fill: false` forbids to compute.
        """
        lines, teachers, sections = [], members_of(self._step.teacher), caches(self._recipe)
        for name, stored in self._stored.items():
            section, whose = sections[name], f" of {name}" if name else ""
            place = f"{stored.cache.folder}"
            if stored.cache.has(step):
                lines.append(f"teacher cache{whose}: outputs are read from {place}")
                continue
            other = self._describe_nearest(Path(section.dir), stored.cache.key)
            if not section.fill:
                raise RecipeError.at(
                    f"{teacher_key(name)}.cache",
                    f"step {step + 1} is not stored in {place}, and fill is false{other}; fill it with `dkd teach`, or "
                    "allow it with fill: true",
                )
            lines.append(f"teacher cache{whose}: outputs are computed, and stored in {place}; {self._size(stored)}")
            if other:
                lines.append(f"note: {section.dir} has no outputs for this recipe yet{other}")
            teacher = teachers[name]
            if isinstance(teacher, LazyTeacher):
                teacher.build()
        return lines

    def confirm(self, steps: int) -> None:
        """Note that the steps before `steps` were right on all ranks."""
        for stored in self._stored.values():
            stored.cache.confirm(steps)

    def flush(self) -> None:
        """Write what is confirmed, and wait until it is on the disk."""
        for stored in self._stored.values():
            stored.cache.flush()

    def wait(self) -> None:
        """Wait until no thread of a cache runs, such as before a fork."""
        for stored in self._stored.values():
            stored.cache.wait()

    def close(self) -> None:
        """End the threads of the caches."""
        for stored in self._stored.values():
            stored.cache.close()

    def _size(self, stored: StoredTeacher) -> str:
        """Return how large a cache will be."""
        each = stored.reads.bytes_per_sample()
        schedule = self._schedule
        epochs = -(-schedule.total_steps // schedule.steps_per_epoch)
        epochs = min(epochs, self._recipe.data.augmentation_period or epochs)
        epoch = each * schedule.steps_per_epoch * self._recipe.train.global_batch
        return f"{in_bytes(each)} an image, {in_bytes(epoch)} an epoch, {in_bytes(epoch * epochs)} in all"

    def _describe_nearest(self, root: Path, key: CacheKey) -> str:
        """Return, as the end of a sentence, in what the nearest other cache differs; nothing where there is none."""
        found = nearest(root, key)
        if found is None:
            return ""
        folder, differences = found
        return f"; {folder.name} there is of another {shorten(', '.join(differences))}"
