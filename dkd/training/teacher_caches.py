"""The caches of a run's teachers: what is reported of them, and when they are written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from dkd.config import Recipe, RecipeError
from dkd.config.derived import caches, teacher_key
from dkd.distillation import LazyTeacher, OneTeacher, TeacherGroup
from dkd.distillation.stored_teacher import StoredTeacher
from dkd.distillation.teacher_group import members_of
from dkd.teacher_cache.key import CacheKey, epochs_in, nearest
from dkd.text import shorten, size_in_bytes
from dkd.training.schedule import RunSchedule


class TeacherCaches:
    """Holds the caches of a run. All ranks make one; those that a docstring calls a collective are called together.

    Args:
        recipe: settled.
        teacher: all teachers of the recipe.
        schedule: of the run.
        stored: by the name of a teacher.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: OneTeacher | TeacherGroup | None,
        schedule: RunSchedule,
        stored: Mapping[str, StoredTeacher],
    ) -> None:
        self._recipe, self._teacher, self._schedule, self._stored = recipe, teacher, schedule, stored

    def prepare(self, step: int) -> list[str]:
        """Look whether the next step is stored, and build teachers that are needed. A collective.

        Returns:
            Lines that report what will happen.

        Raises:
            RecipeError: on every rank: outputs are missing that `fill: false` forbids to compute.
        """
        lines, teachers, sections = [], members_of(self._teacher), caches(self._recipe)
        for name, stored in self._stored.items():
            section, whose = sections[name], f" of {name}" if name else ""
            place = f"{stored.cache.folder}"
            other = self._describe_nearest(Path(section.dir), stored.cache.key)
            if not section.fill and (missing := self._first_missing(stored, step)) is not None:
                raise RecipeError.at(
                    f"{teacher_key(name)}.cache",
                    f"step {missing + 1} is not stored in {place}, and fill is false{other}; fill it with `dkd teach`, "
                    "or allow it with fill: true",
                )
            if stored.cache.has(step):
                lines.append(f"teacher cache{whose}: outputs are read from {place}{self._epochs_there(stored, step)}")
                continue
            stores = f"and stored in {place}; {self._size(stored)}" if section.fill else f"since {place} is damaged"
            lines.append(f"teacher cache{whose}: outputs are computed, {stores}")
            lines += self._check_space(stored, Path(section.dir))
            if other and not any(epochs_in(stored.cache.folder)):
                lines.append(f"note: {section.dir} has no outputs for this recipe yet{other}")
            teacher = teachers[name]
            if isinstance(teacher, LazyTeacher):
                teacher.build()
        return lines

    def _first_missing(self, stored: StoredTeacher, step: int) -> int | None:
        """Return the first step of the rest of the run of which the parts do not list everything; None: there is none.
        A collective."""
        per_epoch, total = self._schedule.steps_per_epoch, self._schedule.total_steps
        while step < total:
            last = min(total, step - step % per_epoch + per_epoch)
            listed = stored.cache.listed(step, last)
            if not all(listed):
                return step + listed.index(False)
            step = last
        return None

    def describe(self, steps: int) -> list[str]:
        """Return lines that report where the outputs of some first steps will be stored, and their size."""
        lines = []
        for name, stored in self._stored.items():
            whose = f" of {name}" if name else ""
            lines.append(f"teacher cache{whose}: {stored.cache.folder}; {self._size(stored, steps)}")
            lines += self._check_space(stored, Path(caches(self._recipe)[name].dir), steps)
        return lines

    def listed(self, first: int, last: int) -> list[bool]:
        """Return, for steps of one epoch, whether the parts of all caches list all that is needed. A collective."""
        each = [stored.cache.listed(first, last) for stored in self._stored.values()]
        return [all(caches_) for caches_ in zip(*each, strict=True)]

    @property
    def folders(self) -> list[Path]:
        """Return the folder of each cache."""
        return [stored.cache.folder for stored in self._stored.values()]

    @property
    def written_bytes(self) -> int:
        """Return the bytes that this process has written."""
        writers = [stored.cache.writer for stored in self._stored.values()]
        return sum(writer.written_bytes for writer in writers if writer is not None)

    @property
    def problem(self) -> str | None:
        """Return the reason why this process can write no more; None: it can."""
        writers = [stored.cache.writer for stored in self._stored.values()]
        return next((writer.problem for writer in writers if writer is not None and writer.problem), None)

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

    def _epochs_there(self, stored: StoredTeacher, step: int) -> str:
        """Return, as the end of a sentence, that epochs of the rest of the run have no folder; nothing where all do."""
        per_epoch, period = self._schedule.steps_per_epoch, self._recipe.data.augmentation_period
        epochs = range(step // per_epoch, -(-self._schedule.total_steps // per_epoch))
        wanted = {epoch if period is None else epoch % period for epoch in epochs}
        missing = len(wanted - set(epochs_in(stored.cache.folder)))
        return f"; {missing} of {len(wanted)} epochs are not there yet, and will be computed" if missing else ""

    def _size(self, stored: StoredTeacher, steps: int | None = None) -> str:
        """Return how large a cache will be, in words."""
        each = stored.reads.bytes_per_sample()
        epoch = each * self._schedule.steps_per_epoch * self._recipe.train.global_batch
        whole = size_in_bytes(self._bytes(stored, steps))
        return f"{size_in_bytes(each)} an image, {size_in_bytes(epoch)} an epoch, {whole} in all"

    def _bytes(self, stored: StoredTeacher, steps: int | None) -> int:
        """Return the bytes of some first steps, or of all steps that differ."""
        if steps is None:
            period = self._recipe.data.augmentation_period
            steps = self._schedule.total_steps
            steps = min(steps, steps if period is None else period * self._schedule.steps_per_epoch)
        return stored.reads.bytes_per_sample() * steps * self._recipe.train.global_batch

    def _check_space(self, stored: StoredTeacher, root: Path, steps: int | None = None) -> list[str]:
        """Return a warning where the file system has too little space."""
        try:
            free = shutil.disk_usage(root).free
        except OSError:
            return []
        needed = self._bytes(stored, steps)
        if free >= needed:
            return []
        return [
            f"warning: {root} has {size_in_bytes(free)} free, and {size_in_bytes(needed)} are needed: what does not "
            "fit is computed in each run; a smaller data.augmentation_period needs less"
        ]

    def _describe_nearest(self, root: Path, key: CacheKey) -> str:
        """Return, as the end of a sentence, in what the nearest other cache differs; nothing where there is none."""
        found = nearest(root, key)
        if found is None:
            return ""
        folder, differences = found
        return f"; {folder.name} there is of another {shorten(', '.join(differences))}"
