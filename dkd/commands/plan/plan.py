"""Calculate what a recipe would send between ranks, hold and compute on a cluster.

Models are built on meta tensors: a plan needs no data, no weights, no process group and no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from dkd.build.feature_losses import Given, make_adapter, tapped_shapes
from dkd.build.links import read_links
from dkd.build.models import pairs as loss_pairs
from dkd.build.models import student_spec, teacher_spec
from dkd.build.objective import custom_term
from dkd.commands.plan.caches import PlannedCache, Speed, plan_caches
from dkd.config import Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps, teacher_views
from dkd.config.losses import ComparingSection, CustomLossSection, FormSection, RelationsSection
from dkd.global_batch import Grid, Links, Work, ranks_per_group
from dkd.global_batch.cost import (
    MemoryUse,
    Move,
    held,
    moves,
    seconds,
    syrk_bound,
)
from dkd.models import ModelCost, model_cost
from dkd.preflight import hardware
from dkd.preflight.data import image_pipeline
from dkd.preflight.launch import batch_problems
from dkd.preflight.models import problems_at_sizes
from dkd.preflight.relations import Cluster, grids_of
from dkd.preflight.teacher_cache import cache_problems


@dataclass(frozen=True)
class PlannedRelations:
    """A loss of relations between samples, on one rank and in one optimizer step.

    Args:
        key: of the loss below `losses`.
        title: of the loss in reports.
        taps: (model, path) of each tensor: the student's, then the teacher's, in the order of the recipe's pairs.
        work: what is compared on the ranks that share a batch.
        times: comparisons in a step.
        grid: the grid by which ranks share the work.
        chunks: the parts in which features are sent and multiplied on that grid.
        asked: whether the recipe asks for that grid; else it was chosen.
        links: the speeds of the launch.
        local_world_size: processes on a machine.
    """

    key: str
    title: str
    taps: tuple[tuple[str, str], ...]
    work: Work
    times: int
    grid: Grid
    chunks: int
    asked: bool
    links: Links
    local_world_size: int

    def elements(self, grid: Grid) -> int:
        """Return the number of elements that a rank receives in a step."""
        return self.times * sum(move.elements for move in self._moves(grid))

    def bytes(self, grid: Grid) -> int:
        """Return the number of bytes that a rank receives in a step."""
        return self.times * sum(move.bytes for move in self._moves(grid))

    def collectives(self, grid: Grid) -> int:
        """Return the number of collectives that a rank joins in a step."""
        return self.times * len(self._moves(grid))

    def seconds(self, grid: Grid) -> float:
        """Return the seconds that these collectives are expected to take."""
        return self.times * seconds(self.work, grid, self.links, self.local_world_size, self._chunks_of(grid))

    def memory(self, grid: Grid) -> MemoryUse:
        """Return the most bytes that a rank holds at once."""
        return held(self.work, grid, self._chunks_of(grid))

    def _moves(self, grid: Grid) -> list[Move]:
        return moves(self.work, grid, self._chunks_of(grid))

    def _chunks_of(self, grid: Grid) -> int:
        return self.chunks if grid == self.grid else 1

    @property
    def bound(self) -> float:
        """Return the elements that some rank must receive at least for the products of both models, on any grid."""
        work = self.work
        return self.times * sum(syrk_bound(t.width, work.batch, work.world_size) for t in work.tensors)

    @property
    def forward_elements(self) -> int:
        """Return the elements that a rank receives for these products on the planned grid."""
        found = [move.elements for move in self._moves(self.grid) if move.what in ("features", "products")]
        return self.times * sum(found)

    @property
    def operations(self) -> int:
        """Return the floating-point operations of a rank in a step, which are the same for all grids."""
        widths = sum(t.width * (1 + t.backward) for t in self.work.tensors)
        return self.times * 2 * self.work.rows * self.work.batch * widths


_ASSUMED = ": assumes GPUs with bfloat16 units; on others train.precision=auto is fp16 or fp32"


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe on a cluster, as `dkd plan` prints it.

    Args:
        nodes: number of machines.
        gpus_per_node: GPUs of each machine, with one process for each GPU.
        image_size: pixels, the side of the student's input.
        student: parameters, bytes and floating-point operations of the student.
        teachers: those of each teacher by name; of one alone, the name is empty.
        relations: the losses of relations between samples.
    """

    recipe: Recipe
    nodes: int
    gpus_per_node: int
    image_size: int
    student: ModelCost
    teachers: Mapping[str, ModelCost]
    adapters: Mapping[str, int]
    """Parameters that each loss trains beside the student, by the loss's name."""
    custom_relational: bool
    """Whether a loss of the user's own is one of the whole global batch."""
    relations: tuple[PlannedRelations, ...]
    links: str
    """Where the speeds of links are from, in words."""
    cache: PlannedCache | None = None
    """What the caches of teachers would hold; None: there are none."""
    assumed: str = ""
    """Assumption about the GPUs when train.precision is auto, as the end of a sentence; else empty."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def micro_batch(self) -> int:
        """Return the number of images that a rank takes in one micro-step."""
        return micro_batch(self.recipe, self.world_size)

    @property
    def micro_steps(self) -> int:
        """Return the number of micro-steps in an optimizer step."""
        return micro_steps(self.recipe, self.world_size)

    def compared_samples(self, section: ComparingSection) -> int:
        """Return the samples that a loss compares with each other."""
        ranks = ranks_per_group(section.scope, self.world_size, self.gpus_per_node)
        return ranks * self.micro_batch * (self.micro_steps if section.batch == "step" else 1)

    @property
    def two_passes(self) -> bool:
        """Return whether every image passes through the student's forward twice, as a relational loss over micro-steps
        needs."""
        whole_batch = self.custom_relational or any(each.whole_batch for _, each in self.recipe.losses.named())
        return whole_batch and self.micro_steps > 1


def plan(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int,
    device_type: str = "cuda",
    told: Speed | None = None,
) -> Plan:
    """Return the plan of a recipe for `nodes` machines with one process for each of their `gpus_per_node` GPUs.

    Args:
        recipe: need not be checked yet.
        device_type: the type of device whose autocast decides the types of features.
        told: what is known of the data and the hardware; None: nothing.

    Raises:
        RecipeError: holds every problem of the recipe, models, taps and batches on that many processes.
    """
    world_size = nodes * gpus_per_node
    # The GPUs are not here: assume bfloat16 units, as NVIDIA GPUs since Ampere have.
    assumed = _ASSUMED if recipe.train.precision == "auto" else ""
    recipe, _ = hardware.settled(recipe, [hardware.Hardware(device_type, "GPUs", bf16=True)])
    problems = batch_problems(recipe, world_size, gpus_per_node)
    pipeline = image_pipeline(recipe, problems)
    if pipeline is not None:
        problems += problems_at_sizes(recipe, pipeline.sizes, micro_batch(recipe, world_size), with_weights=False)
        problems += [] if problems else cache_problems(recipe, with_folders=False)
    if problems or pipeline is None:
        raise RecipeError(problems)
    size = pipeline.train_size
    pairs = loss_pairs(recipe)
    student = model_cost(student_spec(recipe), [s for s, _ in pairs], size)
    teachers = {name: _teacher_cost(view, size) for name, view in teacher_views(recipe)}
    links, where = read_links(recipe, device_type)
    cluster = Cluster(world_size, gpus_per_node, device_type, links)
    return Plan(
        recipe,
        nodes,
        gpus_per_node,
        size,
        student,
        teachers,
        *_look_at_losses(recipe),
        tuple(_plan_relations(recipe, cluster, size)),
        where,
        plan_caches(recipe, world_size, gpus_per_node, told or Speed()),
        assumed,
    )


def _look_at_losses(recipe: Recipe) -> tuple[dict[str, int], bool]:
    """Return the number of parameters that each loss trains beside the student, and whether a loss of the user's own is
    one of the whole global batch. Raises UserCodeError."""
    named = dict(recipe.losses.named())
    own = [(section.name, section) for section in named.values() if isinstance(section, CustomLossSection)]
    forms = [(key, section) for key, section in named.items() if isinstance(section, FormSection)]
    if not own and not forms:
        return {}, False
    student, teachers = tapped_shapes(recipe)
    given = Given(student, teachers)
    modules: dict[str, nn.Module | None] = {key: make_adapter(key, section, given) for key, section in forms}
    terms = {name: custom_term(section, lambda step: 1.0, given) for name, section in own}
    for name, term in terms.items():
        trained = getattr(term, "trained", None)
        modules[name] = None if trained is None else trained.module
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}
    relational = any(getattr(term, "relational", False) for term in terms.values())
    return {name: count for name, count in counts.items() if count}, relational


def _teacher_cost(recipe: Recipe, image_size: int) -> ModelCost:
    """Return the cost of the teacher of a view."""
    assert recipe.teacher is not None
    taps, needs_logits = [t for _, t in loss_pairs(recipe)], bool(recipe.losses.needs_teacher_logits)
    size = recipe.teacher.input_size or image_size
    return model_cost(teacher_spec(recipe), taps, size, needs_logits, training=False)


def _plan_relations(recipe: Recipe, cluster: Cluster, image_size: int) -> Iterator[PlannedRelations]:
    """Yield the plan of each loss of relations. Raises RecipeError: no grid fits into the memory that is allowed."""
    for key, section in recipe.losses.compared:
        if isinstance(section, RelationsSection):
            yield from _plan_section(recipe, key, section, cluster, image_size)


def _plan_section(
    recipe: Recipe, key: str, section: RelationsSection, cluster: Cluster, image_size: int
) -> list[PlannedRelations]:
    """Return the plan of each loss of a section."""
    taps = [("student", s) for s, _ in section.paths] + [("teacher", t) for _, t in section.paths]
    times = 1 if section.batch == "step" else micro_steps(recipe, cluster.world_size)
    return [
        PlannedRelations(
            key, section.title, tuple(taps), found.work, times, found.choice.grid, found.choice.chunks, found.asked,
            cluster.links, found.local_world_size,
        )
        for found in grids_of(recipe, key, section, cluster, image_size)
    ]  # fmt: skip
