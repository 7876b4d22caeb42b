"""Calculate what a recipe would send between ranks, hold and compute on a cluster.

Models are built on meta tensors: a plan needs no data, no weights, no process group and no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dkd.build.models import pairs as loss_pairs
from dkd.build.models import student_spec, teacher_spec
from dkd.build.objective import comm_dtype, custom_loss
from dkd.config import Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps
from dkd.engines.arithmetic import Arithmetic
from dkd.global_batch import GramTensor, cheapest_strategies, ranks_per_group, received_bytes
from dkd.global_batch.cost import MemoryUse, collectives, held, received
from dkd.models import ModelCost, model_cost, output_shapes, tap_dtypes
from dkd.preflight import hardware
from dkd.preflight.data import image_pipeline
from dkd.preflight.launch import batch_problems
from dkd.preflight.models import model_problems


@dataclass(frozen=True)
class PlannedTensor:
    """One tap whose Gram rows SP needs.

    Args:
        role: "student" or "teacher".
        path: the tap's module.
        tensor: the size and type of its features.
        strategy: the strategy that moves its features, "gather" or "exchange".
    """

    role: str
    path: str
    tensor: GramTensor
    strategy: str


@dataclass(frozen=True)
class PlannedGram:
    """The Gram matrices of SP, on one rank and in one optimizer step.

    The methods take a strategy for all tensors; None means the planned strategy of each tensor.

    Args:
        ranks: number of ranks that share a Gram matrix.
        rows: rows of a Gram matrix that one rank holds.
        times: Gram matrices of each pair in a step.
        tensors: the student's taps, then the teacher's, in the order of the recipe's pairs.
        strategy: the recipe's losses.sp.strategy.
    """

    ranks: int
    rows: int
    times: int
    tensors: tuple[PlannedTensor, ...]
    strategy: str

    @property
    def batch(self) -> int:
        """Return the number of rows of a Gram matrix."""
        return self.rows * self.ranks

    def strategies(self, strategy: str | None = None) -> list[str]:
        """Return the strategy of each tensor."""
        return [strategy or planned.strategy for planned in self.tensors]

    def elements(self, strategy: str | None = None) -> int:
        """Return the number of elements that a rank receives in a step."""
        pairs = zip(self.strategies(strategy), self.tensors, strict=True)
        return self.times * sum(received(s, t.tensor, self.rows, self.ranks).elements for s, t in pairs)

    def bytes(self, strategy: str | None = None) -> int:
        """Return the number of bytes that a rank receives in a step."""
        pairs = zip(self.strategies(strategy), self.tensors, strict=True)
        return self.times * sum(received_bytes(s, t.tensor, self.rows, self.ranks) for s, t in pairs)

    def collectives(self, strategy: str | None = None) -> int:
        """Return the number of collectives that a rank joins in a step."""
        if self.ranks == 1:
            return 0
        return self.times * collectives(self.strategies(strategy), [t.tensor for t in self.tensors])

    def memory(self, strategy: str | None = None) -> MemoryUse:
        """Return the most bytes that a rank holds at once."""
        return held(self.strategies(strategy), [t.tensor for t in self.tensors], self.rows, self.ranks)

    @property
    def operations(self) -> int:
        """Return the floating-point operations of a rank in a step, which are the same for both strategies."""
        widths = sum(t.tensor.width * (1 + t.tensor.backward) for t in self.tensors)
        return self.times * 2 * self.rows * self.batch * widths


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe on a cluster, as `dkd plan` prints it.

    Args:
        nodes: number of machines.
        gpus_per_node: GPUs of each machine, with one process for each GPU.
        image_size: pixels, the side of the student's input.
        student, teacher: parameters, bytes and floating-point operations of each model.
        gram: the Gram matrices of SP; None without SP.
    """

    recipe: Recipe
    nodes: int
    gpus_per_node: int
    image_size: int
    student: ModelCost
    teacher: ModelCost | None
    gram: PlannedGram | None
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

    @property
    def two_passes(self) -> bool:
        """Return whether every image passes through the student's forward twice, as a relational loss over micro-steps
        needs."""
        losses = self.recipe.losses
        relational = (losses.sp is not None and losses.sp.batch == "step") or any(
            getattr(custom_loss(custom), "relational", False) for custom in losses.custom
        )
        return relational and self.micro_steps > 1


def plan(recipe: Recipe, nodes: int, gpus_per_node: int, device_type: str = "cuda") -> Plan:
    """Return the plan of a recipe for `nodes` machines with one process for each of their `gpus_per_node` GPUs.

    Args:
        recipe: need not be checked yet.
        device_type: the type of device whose autocast decides the types of features.

    Raises:
        RecipeError: holds every problem of the recipe, models, taps and batches on that many processes.
    """
    world_size = nodes * gpus_per_node
    # The GPUs are not here: assume bfloat16 units, as NVIDIA GPUs since Ampere have.
    assumed = (
        ""
        if recipe.train.precision != "auto"
        else ": assumes GPUs with bfloat16 units; on others train.precision=auto is fp16 or fp32"
    )
    recipe, _ = hardware.settled(recipe, [hardware.Hardware(device_type, "GPUs", bf16=True)])
    problems = batch_problems(recipe, world_size, gpus_per_node)
    pipeline = image_pipeline(recipe, problems)
    if pipeline is not None:
        problems += model_problems(recipe, pipeline.image_size, micro_batch(recipe, world_size), with_weights=False)
    if problems or pipeline is None:
        raise RecipeError(problems)
    size = pipeline.image_size
    pairs = loss_pairs(recipe)
    student = model_cost(student_spec(recipe), [s for s, _ in pairs], size)
    teacher = None
    if recipe.teacher is not None:
        needs_logits = bool(recipe.losses.needs_teacher_logits)
        teacher = model_cost(
            teacher_spec(recipe),
            [t for _, t in pairs],
            recipe.teacher.input_size or size,
            needs_logits,
            training=False,
        )
    gram = _plan_gram(recipe, world_size, gpus_per_node, size, device_type) if recipe.losses.sp else None
    return Plan(recipe, nodes, gpus_per_node, size, student, teacher, gram, assumed)


def _plan_gram(recipe: Recipe, world_size: int, gpus_per_node: int, image_size: int, device_type: str) -> PlannedGram:
    """Return the Gram matrices of a recipe with SP."""
    sp = recipe.losses.sp
    assert sp is not None
    ranks = ranks_per_group(sp.scope, world_size, gpus_per_node)
    steps = micro_steps(recipe, world_size)
    per_step = sp.batch == "step"
    rows = micro_batch(recipe, world_size) * (steps if per_step else 1)
    names = [("student", s) for s, _ in sp.paths] + [("teacher", t) for _, t in sp.paths]
    tensors = _gram_tensors(recipe, image_size, device_type)
    chosen = cheapest_strategies(tensors, rows, ranks) if sp.strategy == "auto" else (sp.strategy,) * len(tensors)
    planned = tuple(PlannedTensor(role, path, t, c) for (role, path), t, c in zip(names, tensors, chosen, strict=True))
    return PlannedGram(ranks, rows, 1 if per_step else steps, planned, sp.strategy)


def _gram_tensors(recipe: Recipe, image_size: int, device_type: str) -> list[GramTensor]:
    """Return the sizes and types of the features that SP compares: the student's, then the teacher's."""
    sp = recipe.losses.sp
    assert sp is not None
    assert recipe.teacher is not None
    spec, taps = student_spec(recipe), [s for s, _ in sp.paths]
    of_teacher, teacher_taps = teacher_spec(recipe), [t for _, t in sp.paths]
    teacher_size = recipe.teacher.input_size or image_size
    shapes = output_shapes(spec, taps, image_size)[1]
    teacher_shapes = output_shapes(of_teacher, teacher_taps, teacher_size)[1]
    arithmetic = Arithmetic.of(recipe)
    full, autocast = arithmetic.dtype, arithmetic.autocast
    dtypes = dict.fromkeys(taps, full)  # the trainer converts the student's features before the losses get them
    teacher_dtypes = dict.fromkeys(teacher_taps, full)
    if autocast:
        teacher_dtypes = tap_dtypes(of_teacher, teacher_taps, teacher_size, autocast, device_type)
    rounded = comm_dtype(recipe)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> GramTensor:
        return GramTensor(torch.Size(shape).numel(), backward, (rounded or dtype).itemsize, full.itemsize)

    tensors = [tensor(shapes[s], dtypes[s], True) for s in taps]
    return tensors + [tensor(teacher_shapes[t], teacher_dtypes[t], False) for t in teacher_taps]
