"""What a recipe would move, hold and compute on a cluster, before there is one. On meta tensors: no data, no weights,
no process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dkd.build import assembly, recipe_objects
from dkd.commands.tap_table import tap_table
from dkd.config import Recipe, RecipeError
from dkd.engines import engine
from dkd.global_batch import STRATEGIES, GramTensor, cheapest_strategies, ranks_per_group, received_bytes
from dkd.global_batch.cost import MemoryUse, collectives, held, received
from dkd.models import ModelCost, model_cost, output_shapes, tap_dtypes
from dkd.preflight import checks, hardware


@dataclass(frozen=True)
class PlannedTensor:
    """One tap whose Gram rows SP needs."""

    role: str
    path: str
    tensor: GramTensor
    strategy: str


@dataclass(frozen=True)
class PlannedGram:
    """SP on one rank and one optimizer step.

    Args:
        ranks: that share a Gram matrix.
        rows: that a rank holds of it.
        times: Gram matrices of each pair a step.
        tensors: the student's taps, then the teacher's, in the order of the recipe's pairs.
        strategy: what the recipe asks for.
    """

    ranks: int
    rows: int
    times: int
    tensors: tuple[PlannedTensor, ...]
    strategy: str

    @property
    def batch(self) -> int:
        """Rows of a Gram matrix."""
        return self.rows * self.ranks

    def strategies(self, strategy: str | None = None) -> list[str]:
        """Of each tensor: one for all, or those planned."""
        return [strategy or planned.strategy for planned in self.tensors]

    def elements(self, strategy: str | None = None) -> int:
        """That a rank receives a step."""
        pairs = zip(self.strategies(strategy), self.tensors, strict=True)
        return self.times * sum(received(s, t.tensor, self.rows, self.ranks).elements for s, t in pairs)

    def bytes(self, strategy: str | None = None) -> int:
        """That a rank receives a step."""
        pairs = zip(self.strategies(strategy), self.tensors, strict=True)
        return self.times * sum(received_bytes(s, t.tensor, self.rows, self.ranks) for s, t in pairs)

    def collectives(self, strategy: str | None = None) -> int:
        """That a rank joins a step."""
        return (
            self.times * collectives(self.strategies(strategy), [t.tensor for t in self.tensors])
            if self.ranks > 1
            else 0
        )

    def memory(self, strategy: str | None = None) -> MemoryUse:
        """What a rank holds at once at most."""
        return held(self.strategies(strategy), [t.tensor for t in self.tensors], self.rows, self.ranks)

    @property
    def operations(self) -> int:
        """Floating-point operations of a rank a step: the same for either strategy."""
        widths = sum(t.tensor.width * (1 + t.tensor.backward) for t in self.tensors)
        return self.times * 2 * self.rows * self.batch * widths


@dataclass(frozen=True)
class Plan:
    """What `dkd plan` shows. See `describe`."""

    recipe: Recipe
    nodes: int
    gpus_per_node: int
    image_size: int
    student: ModelCost
    teacher: ModelCost | None
    gram: PlannedGram | None
    assumed: str = ""
    """What was assumed of the GPUs, for `auto`."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def micro_batch(self) -> int:
        return engine.micro_batch(self.recipe, self.world_size)

    @property
    def micro_steps(self) -> int:
        return engine.micro_steps(self.recipe, self.world_size)

    @property
    def two_passes(self) -> bool:
        """Whether every image goes through the student's forward twice."""
        losses = self.recipe.losses
        relational = (losses.sp is not None and losses.sp.batch == "step") or any(
            getattr(assembly.custom_loss(custom), "relational", False) for custom in losses.custom
        )
        return relational and self.micro_steps > 1


def plan(recipe: Recipe, nodes: int, gpus_per_node: int, device_type: str = "cuda") -> Plan:
    """Plan the recipe for a number of machines with one process for each of their GPUs.

    Args:
        recipe: not checked yet.
        nodes, gpus_per_node: how many.
        device_type: whose autocast decides the types of features.

    Raises:
        RecipeError: with every problem of recipe, models, taps and batches on that many processes.
    """
    world_size = nodes * gpus_per_node
    # Of GPUs that are not here: what each supported one with tensor cores of this decade would choose.
    assumed = (
        ""
        if recipe.train.precision != "auto"
        else ": assumes GPUs with bfloat16 units; on others train.precision=auto is fp16 or fp32"
    )
    recipe, _ = hardware.settled(recipe, [hardware.Hardware(device_type, "GPUs", bf16=True)])
    problems = engine.batch_problems(recipe, world_size, gpus_per_node)
    pipeline = checks.image_pipeline(recipe, problems)
    if pipeline is not None:
        problems += checks.model_problems(
            recipe, pipeline.image_size, engine.micro_batch(recipe, world_size), with_weights=False
        )
    if problems or pipeline is None:
        raise RecipeError(problems)
    size = pipeline.image_size
    pairs = recipe_objects.pairs(recipe)
    student = model_cost(recipe_objects.student_spec(recipe), [s for s, _ in pairs], size)
    teacher = None
    if recipe.teacher is not None:
        needs_logits = bool(recipe.losses.needs_teacher_logits)
        teacher = model_cost(
            recipe_objects.teacher_spec(recipe),
            [t for _, t in pairs],
            recipe.teacher.input_size or size,
            needs_logits,
            training=False,
        )
    gram = _planned_gram(recipe, world_size, gpus_per_node, size, device_type) if recipe.losses.sp else None
    return Plan(recipe, nodes, gpus_per_node, size, student, teacher, gram, assumed)


def _planned_gram(
    recipe: Recipe, world_size: int, gpus_per_node: int, image_size: int, device_type: str
) -> PlannedGram:
    sp = recipe.losses.sp
    assert sp is not None
    assert recipe.teacher is not None
    ranks = ranks_per_group(sp.scope, world_size, gpus_per_node)
    micro_steps = engine.micro_steps(recipe, world_size)
    per_step = sp.batch == "step"
    rows = engine.micro_batch(recipe, world_size) * (micro_steps if per_step else 1)

    spec, taps = recipe_objects.student_spec(recipe), [s for s, _ in sp.paths]
    teacher_spec, teacher_taps = recipe_objects.teacher_spec(recipe), [t for _, t in sp.paths]
    teacher_size = recipe.teacher.input_size or image_size
    shapes = output_shapes(spec, taps, image_size)[1]
    teacher_shapes = output_shapes(teacher_spec, teacher_taps, teacher_size)[1]
    full = engine.model_dtype(recipe)
    autocast = engine.autocast_dtype(recipe)
    dtypes = dict.fromkeys(taps, full)  # the trainer promotes the student's features before the losses see them
    teacher_dtypes = dict.fromkeys(teacher_taps, full)
    if autocast:
        teacher_dtypes = tap_dtypes(teacher_spec, teacher_taps, teacher_size, autocast, device_type)
    comm_dtype = assembly.comm_dtype(recipe)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> GramTensor:
        return GramTensor(torch.Size(shape).numel(), backward, (comm_dtype or dtype).itemsize, full.itemsize)

    tensors = [tensor(shapes[s], dtypes[s], True) for s in taps]
    tensors += [tensor(teacher_shapes[t], teacher_dtypes[t], False) for t in teacher_taps]
    chosen = cheapest_strategies(tensors, rows, ranks) if sp.strategy == "auto" else (sp.strategy,) * len(tensors)
    names = [("student", s) for s in taps] + [("teacher", t) for t in teacher_taps]
    planned = tuple(PlannedTensor(role, path, t, c) for (role, path), t, c in zip(names, tensors, chosen, strict=True))
    return PlannedGram(ranks, rows, 1 if per_step else micro_steps, planned, sp.strategy)


def describe(planned: Plan) -> str:
    """The plan in words and numbers."""
    recipe, world = planned.recipe, planned.world_size
    number, number_bytes = ("float64", 8) if recipe.train.precision == "fp64" else ("float32", 4)
    lines = [
        ("launch", f"{planned.nodes} × {planned.gpus_per_node} GPUs = {world} ranks"),
        ("precision", f"{recipe.train.precision}{planned.assumed}"),
        (
            "batch",
            f"{recipe.train.global_batch:,} = {planned.micro_batch} × {world} ranks × {planned.micro_steps} micro-step"
            f"{'s' if planned.micro_steps > 1 else ''}",
        ),
        (
            "student",
            f"{recipe.student.name}, {planned.student.parameters:,} parameters, "
            f"{_model_work(planned.student, training=True)}",
        ),
    ]
    if recipe.teacher is not None and planned.teacher is not None:
        lines.append(
            (
                "teacher",
                f"{recipe.teacher.name}, {planned.teacher.parameters:,} parameters, "
                f"{_model_work(planned.teacher, training=False)}",
            )
        )
        whole = planned.teacher.tensor_bytes * number_bytes // 4
        lines.append(
            (
                "",
                f"memory a rank, weights in {number}: {_bytes(whole)} replicated; sharded {_bytes(-(-whole // world))} "
                "over all ranks, "
                f"{_bytes(-(-whole // planned.gpus_per_node))} over those of one machine",
            )
        )
    gradients = 2 * (world - 1) * planned.student.parameters * number_bytes // world
    lines.append(("gradients", f"{_bytes(gradients)} received a rank and step by the student's all-reduce in {number}"))
    shares = [name for name in ("ce", "at", "gradient_at", "kd") if getattr(recipe.losses, name) is not None]
    lines.append((", ".join(shares), "means over samples: no features move"))
    if planned.gram is not None:
        lines += _gram_lines(planned, planned.gram)
    taps = tap_table(recipe, planned.image_size, planned.gram.batch if planned.gram is not None else 0)
    if taps:
        lines += [("taps", "student  ←  teacher, and what a sample weighs"), *taps]
    return "\n".join(f"{name:<11} {text}".rstrip() for name, text in lines)


def _gram_lines(planned: Plan, gram: PlannedGram) -> list[tuple[str, str]]:
    times = "once a step" if gram.times == 1 else f"{gram.times} times a step"
    lines = [("sp", f"Gram matrices of {gram.batch:,} rows, {gram.rows:,} on each of {gram.ranks} ranks, {times}")]
    half = len(gram.tensors) // 2
    for student, teacher in zip(gram.tensors[:half], gram.tensors[half:], strict=True):
        lines.append(("pair", f"{_tap(student)}  ←  {_tap(teacher)}"))
    if gram.ranks == 1:
        lines.append(
            ("", f"a rank's own samples only: nothing moves; holds {_bytes(gram.memory().gram)} of Gram matrices")
        )
    else:
        for strategy in STRATEGIES:
            lines.append((strategy, _movement(gram, strategy)))
        names = list(dict.fromkeys(gram.strategies()))
        if len(names) > 1:
            lines.append(("both", _movement(gram, None)))
        lines.append(("strategy", f"{' and '.join(names)}: {_reason(gram, names)}"))
        if planned.recipe.losses.sp is not None and planned.recipe.losses.sp.floor > 0:
            lines.append(
                (
                    "floor",
                    f"one more collective {times}, of one number a tensor: the mean norm of the rows (losses.sp.floor)",
                )
            )
    if planned.two_passes:
        kept = sum(gram.rows * t.tensor.width * t.tensor.feature_bytes for t in gram.tensors)
        lines.append(
            ("", f"between the two passes the features of {planned.micro_steps} micro-steps are kept: {_bytes(kept)}")
        )
    work = _step_work(planned)
    lines.append(
        (
            "work",
            f"of a rank's step: SP {_share(gram.operations, work)}, teacher {_share(work['teacher'], work)}, "
            "student forward "
            f"{_share(work['forward'], work)}{' (twice, for SP over micro-steps)' if planned.two_passes else ''}, "
            f"backward {_share(work['backward'], work)}",
        )
    )
    return lines


def _movement(gram: PlannedGram, strategy: str | None) -> str:
    memory = gram.memory(strategy)
    return (
        f"receives {gram.elements(strategy):,} elements, {_bytes(gram.bytes(strategy))} a rank and step, in "
        f"{gram.collectives(strategy)} collectives; holds {_bytes(memory.features)} of features, {_bytes(memory.gram)} "
        "of Gram matrices"
    )


def _reason(gram: PlannedGram, names: list[str]) -> str:
    if gram.strategy != "auto":
        return "the recipe says so"
    if len(names) > 1:
        return "for each tap what moves less: " + ", ".join(f"{t.role} {t.path} by {t.strategy}" for t in gram.tensors)
    other = STRATEGIES[1 - STRATEGIES.index(names[0])]
    ratio = gram.bytes(other) / max(gram.bytes(), 1)
    if ratio >= 1:
        return f"it moves {ratio:.1f} times less than {other}"
    return f"it moves {1 / ratio:.1f} times more than {other}, which takes more collectives than that saves"


def _step_work(planned: Plan) -> dict[str, int]:
    """Floating-point operations of one rank and step."""
    images = planned.micro_batch * planned.micro_steps
    return {
        "sp": planned.gram.operations if planned.gram else 0,
        "teacher": images * planned.teacher.forward if planned.teacher else 0,
        "forward": images * planned.student.forward * (2 if planned.two_passes else 1),
        "backward": images * planned.student.backward,
    }


def _share(part: int, work: dict[str, int]) -> str:
    return f"{100 * part / max(sum(work.values()), 1):.2g} %"


def _model_work(cost: ModelCost, training: bool) -> str:
    if cost.forward == 0:
        return "operations not countable"
    backward = f" and {cost.backward / 1e9:.3g} backward" if training else ""
    return f"{cost.forward / 1e9:.3g} GFLOP an image forward{backward}"


def _tap(planned: PlannedTensor) -> str:
    return f"{planned.role} {planned.path}, d = {planned.tensor.width:,}, {planned.tensor.feature_bytes} bytes each"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
