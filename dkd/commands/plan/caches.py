"""Describe in a plan what a teacher's cache would hold, and what it would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dkd.build.teacher_cache import planned_values
from dkd.config import Recipe
from dkd.config.derived import caches, micro_batch, micro_steps
from dkd.distillation.stored_teacher import Share
from dkd.models import ModelCost
from dkd.runs.progress import clock
from dkd.teacher_cache import Value
from dkd.text import size_in_bytes

_TERA = 1e12


@dataclass(frozen=True)
class Speed:
    """Hold what a plan is told of the data and the hardware.

    Args:
        images: training images; None: not known.
        tflops: floating-point operations that a GPU does in a second, in 10¹²; None: not known.
    """

    images: int | None = None
    tflops: float | None = None


@dataclass(frozen=True)
class PlannedCache:
    """Hold what the caches of a recipe would hold.

    Args:
        recipe: settled.
        values: what is stored of each teacher that has a cache, by the teacher's name.
        world_size: W.
        told: what is known beside the recipe.
    """

    recipe: Recipe
    values: Mapping[str, Sequence[Value]]
    world_size: int
    told: Speed

    def lines(self, student: ModelCost, teachers: Mapping[str, ModelCost], two_passes: bool) -> list[tuple[str, str]]:
        """Return lines for each teacher: bytes, and operations with and without its forward.

        Args:
            student, teachers: operations of an image.
            two_passes: each image passes through the student's forward twice.
        """
        found = []
        trained = student.forward * (2 if two_passes else 1) + student.backward
        for name, values in self.values.items():
            each = sum(value.bytes_per_sample for value in values)
            parts = ", ".join(f"{value.name} {size_in_bytes(value.bytes_per_sample)}" for value in values)
            found += [
                ("cache", f"{f'{name}: ' if name else ''}{size_in_bytes(each)} an image and epoch: {parts}"),
                ("", self._size(each)),
            ]
            forward = teachers[name].forward
            if forward and trained:
                found.append(("", self._work(trained, forward, sum(cost.forward for cost in teachers.values()))))
        return found

    @property
    def _epochs(self) -> int:
        epochs = self.recipe.train.epochs
        return min(epochs, self.recipe.data.augmentation_period or epochs)

    def _size(self, each: int) -> str:
        images, epochs = self.told.images or 10**6, self._epochs
        count = f"{images:,} images" + ("" if self.told.images else " (--images tells how many there are)")
        which = f"{epochs} epoch{'s' if epochs > 1 else ''}"
        size = f"{size_in_bytes(each * images)} an epoch, {size_in_bytes(each * images * epochs)} for {which}"
        return f"{size} of {count}"

    def _work(self, trained: int, forward: int, all_forwards: int) -> str:
        """Return how long filling takes, and a step with and without the teacher's forward, by their operations."""
        live, read = trained + all_forwards, trained + all_forwards - forward
        ratio = f"a step that reads has {read / live:.0%} of the operations of one with the live teacher"
        if self.told.tflops is None:
            return f"{ratio}, and filling an epoch has {forward / live:.0%} (--tflops makes seconds of them)"
        rate, batch = self.told.tflops * _TERA * self.world_size, self.recipe.train.global_batch
        seconds = [f"{batch * work / rate * 1e3:.3g}" for work in (live, read)]
        images = self.told.images or 10**6
        filling = clock(images * self._epochs * forward / rate)
        return (
            f"{ratio}: {seconds[1]} ms in the place of {seconds[0]}; filling takes {filling} at "
            f"{self.told.tflops:g} TFLOP/s of each GPU"
        )


def plan_caches(recipe: Recipe, world_size: int, local_world_size: int, told: Speed) -> PlannedCache | None:
    """Return what the caches would hold on so many ranks; None: the recipe has none. Raises UserCodeError."""
    if not caches(recipe):
        return None
    share = Share(0, world_size, micro_batch(recipe, world_size), micro_steps(recipe, world_size))
    return PlannedCache(recipe, planned_values(recipe, share, local_world_size), world_size, told)
