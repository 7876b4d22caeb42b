"""Describe a plan in words and numbers."""

from __future__ import annotations

from dkd.commands.plan.plan import Plan, PlannedGram, PlannedTensor
from dkd.commands.tap_table import tap_table
from dkd.global_batch import STRATEGIES
from dkd.models import ModelCost


def describe(planned: Plan) -> str:
    """Return the plan as text: one line for each quantity, with its name in the first column."""
    recipe, world = planned.recipe, planned.world_size
    number, number_bytes = ("float64", 8) if recipe.train.precision == "fp64" else ("float32", 4)
    steps = f"{planned.micro_steps} micro-step{'s' if planned.micro_steps > 1 else ''}"
    student = f"{planned.student.parameters:,} parameters, {_model_work(planned.student, training=True)}"
    lines = [
        ("launch", f"{planned.nodes} × {planned.gpus_per_node} GPUs = {world} ranks"),
        ("precision", f"{recipe.train.precision}{planned.assumed}"),
        ("batch", f"{recipe.train.global_batch:,} = {planned.micro_batch} × {world} ranks × {steps}"),
        ("student", f"{recipe.student.name}, {student}"),
    ]
    if recipe.teacher is not None and planned.teacher is not None:
        teacher = f"{planned.teacher.parameters:,} parameters, {_model_work(planned.teacher, training=False)}"
        lines.append(("teacher", f"{recipe.teacher.name}, {teacher}"))
        lines.append(("", _teacher_memory(planned, planned.teacher, number, number_bytes)))
    gradients = 2 * (world - 1) * planned.student.parameters * number_bytes // world
    lines.append(("gradients", f"{_bytes(gradients)} received a rank and step by the student's all-reduce in {number}"))
    shares = [name for name, section in recipe.losses.named() if section.of_samples]
    lines.append((", ".join(shares), "means over samples: no features move"))
    if planned.gram is not None:
        lines += _gram_lines(planned, planned.gram)
    taps = tap_table(recipe, planned.image_size, planned.gram.batch if planned.gram is not None else 0)
    if taps:
        lines += [("taps", "student  ←  teacher, and the weight of one sample"), *taps]
    return "\n".join(f"{name:<11} {text}".rstrip() for name, text in lines)


def _teacher_memory(planned: Plan, teacher: ModelCost, number: str, number_bytes: int) -> str:
    total = teacher.tensor_bytes * number_bytes // 4
    over_all, over_machine = -(-total // planned.world_size), -(-total // planned.gpus_per_node)
    return (
        f"memory a rank, weights in {number}: {_bytes(total)} replicated; sharded {_bytes(over_all)} over all ranks, "
        f"{_bytes(over_machine)} over those of one machine"
    )


def _gram_lines(planned: Plan, gram: PlannedGram) -> list[tuple[str, str]]:
    """Return the lines about SP: matrices, pairs, movement, memory and work."""
    times = "once a step" if gram.times == 1 else f"{gram.times} times a step"
    lines = [("sp", f"Gram matrices of {gram.batch:,} rows, {gram.rows:,} on each of {gram.ranks} ranks, {times}")]
    half = len(gram.tensors) // 2
    for student, teacher in zip(gram.tensors[:half], gram.tensors[half:], strict=True):
        lines.append(("pair", f"{_tap(student)}  ←  {_tap(teacher)}"))
    if gram.ranks == 1:
        memory = _bytes(gram.memory().gram)
        lines.append(("", f"a rank's own samples only: nothing moves; holds {memory} of Gram matrices"))
    else:
        lines += _movement_lines(gram)
        if planned.recipe.losses.sp is not None and planned.recipe.losses.sp.floor > 0:
            floor = f"one more collective {times}, of one number a tensor: the mean norm of the rows (losses.sp.floor)"
            lines.append(("floor", floor))
    if planned.two_passes:
        kept = _bytes(sum(gram.rows * t.tensor.width * t.tensor.feature_bytes for t in gram.tensors))
        lines.append(("", f"between the two passes the features of {planned.micro_steps} micro-steps are kept: {kept}"))
    return [*lines, ("work", _work_shares(planned, gram))]


def _movement_lines(gram: PlannedGram) -> list[tuple[str, str]]:
    """Return the lines about what each strategy moves, and about the choice between the strategies."""
    names = list(dict.fromkeys(gram.strategies()))
    return [
        *((strategy, _movement(gram, strategy)) for strategy in STRATEGIES),
        *([("both", _movement(gram, None))] if len(names) > 1 else []),
        ("strategy", f"{' and '.join(names)}: {_reason(gram, names)}"),
    ]


def _work_shares(planned: Plan, gram: PlannedGram) -> str:
    work = _step_work(planned)
    twice = " (twice, for SP over micro-steps)" if planned.two_passes else ""
    return (
        f"of a rank's step: SP {_share(gram.operations, work)}, teacher {_share(work['teacher'], work)}, student "
        f"forward {_share(work['forward'], work)}{twice}, backward {_share(work['backward'], work)}"
    )


def _movement(gram: PlannedGram, strategy: str | None) -> str:
    memory = gram.memory(strategy)
    return (
        f"receives {gram.elements(strategy):,} elements, {_bytes(gram.bytes(strategy))} a rank and step, in "
        f"{gram.collectives(strategy)} collectives; holds {_bytes(memory.features)} of features, {_bytes(memory.gram)} "
        "of Gram matrices"
    )


def _reason(gram: PlannedGram, names: list[str]) -> str:
    """Return why the strategies in `names` were chosen."""
    if gram.strategy != "auto":
        return "the recipe asks for it"
    if len(names) > 1:
        return "for each tap the one that moves less: " + ", ".join(
            f"{t.role} {t.path} by {t.strategy}" for t in gram.tensors
        )
    other = STRATEGIES[1 - STRATEGIES.index(names[0])]
    ratio = gram.bytes(other) / max(gram.bytes(), 1)
    if ratio >= 1:
        return f"it moves {ratio:.1f} times less than {other}"
    return f"it moves {1 / ratio:.1f} times more than {other}, which takes more collectives than that saves"


def _step_work(planned: Plan) -> dict[str, int]:
    """Return the floating-point operations of one rank in one step, by part."""
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
