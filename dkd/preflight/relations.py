"""Whether losses of relations fit into the memory that the recipe allows, and by which grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from dkd.build.links import read_links
from dkd.build.models import student_spec, teacher_spec
from dkd.build.objective import relational_losses
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps, view_of
from dkd.config.losses import RelationsSection
from dkd.engines.arithmetic import Arithmetic
from dkd.errors import InputError
from dkd.global_batch import GramTensor, Links, Work, ranks_per_group
from dkd.global_batch.choice import choose_within
from dkd.global_batch.cost import Choice
from dkd.models import ModelSpec, output_shapes, tap_dtypes


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
    tensors = _compared_tensors(recipe, section, image_size, cluster.device_type)
    for loss in relational_losses(section).values():
        if loss.shift_invariant and section.comm_dtype is None:
            # Less their mean, features are float32 and travel so.
            tensors = [replace(tensor, feature_bytes=tensor.gram_bytes) for tensor in tensors]
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


def _compared_tensors(recipe: Recipe, section: RelationsSection, image_size: int, device_type: str) -> list[GramTensor]:
    """Return the sizes and types of the features that a loss compares: the student's, then the teacher's."""
    recipe = view_of(recipe, section)
    assert recipe.teacher is not None
    spec, taps = student_spec(recipe), [s for s, _ in section.paths]
    of_teacher, teacher_taps = teacher_spec(recipe), [t for _, t in section.paths]
    teacher_size = recipe.teacher.input_size or image_size
    # Types that only the hardware will decide are taken to be the larger ones.
    settled = recipe.train.precision != "auto"
    autocast = Arithmetic.of(recipe).autocast if settled else None
    full = Arithmetic.of(recipe).dtype if settled else torch.float32
    rounded = torch.bfloat16 if section.comm_dtype == "bf16" else None

    def tensors(model: ModelSpec, paths: list[str], size: int, backward: bool) -> list[GramTensor]:
        shapes = output_shapes(model, paths, size)[1]
        types = dict.fromkeys(paths, full)
        if autocast:
            types = tap_dtypes(model, paths, size, autocast, device_type)
        return [
            # The student's gradient comes in full precision, since its features are promoted before the losses.
            GramTensor(
                torch.Size(shapes[path]).numel(),
                backward,
                (rounded or types[path]).itemsize,
                full.itemsize,
                (rounded or full).itemsize if backward else 0,
            )
            for path in paths
        ]

    return [*tensors(spec, taps, image_size, True), *tensors(of_teacher, teacher_taps, teacher_size, False)]
