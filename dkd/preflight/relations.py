"""Whether losses of relations fit into the memory that the recipe allows, and by which grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from dkd.build.compared_tensors import compared_tensors
from dkd.build.links import read_links
from dkd.build.objective import relational_losses
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps, view_of
from dkd.config.losses import RelationsSection
from dkd.errors import InputError
from dkd.global_batch import Links, Work, ranks_per_group
from dkd.global_batch.choice import choose_within
from dkd.global_batch.cost import Choice


class Cluster(NamedTuple):
    """Hold the processes of a launch: in all, and on a machine; the type of their devices; and their links."""

    world_size: int
    local_world_size: int
    device_type: str
    links: Links


class GridOfLoss(NamedTuple):
    """Hold the grid of one loss.

    Args:
        work: what is compared on the ranks that share a batch.
        choice: the grid, and the chunks of features.
        asked: whether the recipe asks for that grid; else it was chosen.
        local_world_size: of the ranks that share a batch, those of one machine.
    """

    work: Work
    choice: Choice
    asked: bool
    local_world_size: int


def grids_of(
    recipe: Recipe, key: str, section: RelationsSection, cluster: Cluster, image_size: int
) -> Iterator[GridOfLoss]:
    """Yield the grid of each loss of a section. Raises RecipeError: none fits into the memory that is allowed."""
    ranks = ranks_per_group(section.scope, cluster.world_size, cluster.local_world_size)
    steps = micro_steps(recipe, cluster.world_size) if section.batch == "step" else 1
    view, half = view_of(recipe, section), section.comm_dtype == "bf16"
    for loss in relational_losses(section).values():
        tensors = compared_tensors(view, section.paths, half, loss.shift_invariant, image_size, cluster.device_type)
        work = Work(tuple(tensors), micro_batch(recipe, cluster.world_size) * steps, ranks, loss.sums())
        local = math.gcd(cluster.local_world_size, ranks)
        grid = loss.grid.asked(ranks)
        memory = math.inf if section.memory is None else section.memory * 1e9
        try:
            choice = choose_within(work, grid, cluster.links, local, memory, f"losses.{key}")
        except InputError as error:
            raise RecipeError.at(f"losses.{key}.memory", str(error)) from error
        yield GridOfLoss(work, choice, grid is not None, local)


def memory_problems(recipe: Recipe, world_size: int, local_world_size: int, image_size: int) -> list[Problem]:
    """Return where a loss does not fit into the memory that the recipe allows it on that many processes."""
    found: list[Problem] = []
    for key, section in recipe.losses.compared:
        if not isinstance(section, RelationsSection) or section.memory is None:
            continue
        if view_of(recipe, section).teacher is None:
            continue
        try:
            links, _ = read_links(recipe, "cpu")
            list(grids_of(recipe, key, section, Cluster(world_size, local_world_size, "cpu", links), image_size))
        except RecipeError as error:
            found += error.problems
    return found
