"""Numbers that follow from a recipe and the number of processes."""

from __future__ import annotations

from dkd.config.schema import Recipe


def micro_batch(recipe: Recipe, world_size: int) -> int:
    """Return b, the samples of one forward on one rank: as the recipe states, or B/W."""
    return recipe.train.micro_batch or max(1, recipe.train.global_batch // world_size)


def micro_steps(recipe: Recipe, world_size: int) -> int:
    """Return A = B / (b·W), the forwards of one rank in one optimizer step."""
    return recipe.train.global_batch // (micro_batch(recipe, world_size) * world_size)


def planned_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Return the optimizer steps of all epochs, which schedules are drawn over."""
    return steps_per_epoch * recipe.train.epochs


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the run: those of all epochs, or fewer where `train.max_steps` ends it before."""
    planned = planned_steps(recipe, steps_per_epoch)
    return min(planned, recipe.train.max_steps or planned)


def gram_size(recipe: Recipe, world_size: int, ranks: int) -> int:
    """Return B_G, the rows and columns of the Gram matrices that SP forms; 0 without SP.

    Args:
        ranks: that share a Gram matrix.
    """
    sp = recipe.losses.sp
    if sp is None:
        return 0
    steps = micro_steps(recipe, world_size) if sp.batch == "step" else 1
    return ranks * micro_batch(recipe, world_size) * steps
