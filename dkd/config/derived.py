"""Numbers that follow from a recipe and the number of processes."""

from __future__ import annotations

from dkd.config.schema import Recipe


def classes(recipe: Recipe) -> int:
    """Return K, the number of classes, of a recipe that `dkd.preflight.completion` has completed."""
    assert recipe.data.classes is not None, "the recipe has to be completed first"
    return recipe.data.classes


def micro_batch(recipe: Recipe, world_size: int) -> int:
    """Return b, the samples of one forward on one rank: as the recipe states, or B/W."""
    return recipe.train.micro_batch or max(1, recipe.train.global_batch // world_size)


def micro_steps(recipe: Recipe, world_size: int) -> int:
    """Return A = B / (b·W), the forwards of one rank in one optimizer step."""
    return recipe.train.global_batch // (micro_batch(recipe, world_size) * world_size)


def run_length(recipe: Recipe, steps_per_epoch: int) -> tuple[int, int]:
    """Return the optimizer steps of all epochs, which schedules are drawn over, and those of the run: fewer where
    `train.max_steps` ends it before."""
    planned = steps_per_epoch * recipe.train.epochs
    return planned, min(planned, recipe.train.max_steps or planned)
