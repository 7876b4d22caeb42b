"""Describe a plan in words and numbers."""

from __future__ import annotations

from dkd.commands.plan.plan import Plan, PlannedRelations
from dkd.commands.tap_table import tap_table
from dkd.config.derived import teacher_views
from dkd.config.losses import CrdSection, DistSection, LossSection, QueueSection, RkdSection, SrdSection
from dkd.global_batch import STRATEGIES, Grid, Link, corner
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
    for name, view in teacher_views(recipe):
        cost = planned.teachers[name]
        assert view.teacher is not None
        work = f"{cost.parameters:,} parameters, {_model_work(cost, training=False)}"
        lines.append(("teacher", f"{f'{name}: ' if name else ''}{view.teacher.name}, {work}"))
        lines.append(("", _teacher_memory(planned, cost, number, number_bytes)))
    if planned.cache is not None:
        lines += planned.cache.lines(planned.student, planned.teachers, planned.two_passes)
    if planned.adapters:
        counts = ", ".join(f"{name} {count:,}" for name, count in planned.adapters.items())
        lines.append(("trained too", f"{counts} parameters, by losses; no part of the student"))
    trained = planned.student.parameters + sum(planned.adapters.values())
    gradients = 2 * (world - 1) * trained * number_bytes // world
    what = "by the all-reduce of student and losses" if planned.adapters else "by the student's all-reduce"
    lines.append(("gradients", f"{_bytes(gradients)} received a rank and step {what} in {number}"))
    shares = [name for name, section in recipe.losses.named() if section.of_samples and name != "queue"]
    lines.append((", ".join(shares), "means over samples: no features move"))
    for relations in planned.relations:
        lines += _relations_lines(relations)
    lines += _other_comparisons(planned)
    if planned.relations:
        lines += _shared_lines(planned)
    taps = tap_table(recipe, planned.image_size, lambda section: planned.compared_samples(section))
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


def _relations_lines(relations: PlannedRelations) -> list[tuple[str, str]]:
    """Return the lines about one loss: what it compares, and what moves."""
    work, grid = relations.work, relations.grid
    times = "once a step" if relations.times == 1 else f"{relations.times} times a step"
    who = f"{work.rows:,} on each of {work.world_size} ranks" if work.world_size > 1 else "on each rank alone"
    lines = [(relations.key, f"relations of {work.batch:,} samples, {who}, {times}")]
    for number in range(work.pairs):
        student, teacher = (_tap(relations, number + offset) for offset in (0, work.pairs))
        lines.append(("pair", f"{student}  ←  {teacher}"))
    if work.world_size == 1:
        memory = _bytes(relations.memory(grid).gram)
        return [*lines, ("", f"a rank's own samples only: nothing moves; holds {memory} of relations")]
    reason = "the recipe asks for it" if relations.asked else "the least expected time of the grids that fit"
    parts = f" in {relations.chunks} chunks" if relations.chunks > 1 else ""
    lines.append(("grid", f"{grid.name}{parts}: {_movement(relations, grid)}; {reason}"))
    for strategy in STRATEGIES:
        other = corner(strategy, work.world_size)
        lines.append((strategy, "this grid" if other == grid else f"{other.name}: {_movement(relations, other)}"))
    if relations.bound > 0:
        times_more = relations.forward_elements / relations.bound
        lines.append(
            (
                "bound",
                f"the products alone: at least {relations.bound:,.0f} elements on any grid, and "
                f"{relations.forward_elements:,} on this one, {times_more:.2g} times as many",
            )
        )
    return lines


def _other_comparisons(planned: Plan) -> list[tuple[str, str]]:
    """Return the lines about losses that compare samples without a grid."""
    lines = []
    for key, section in planned.recipe.losses.compared:
        samples = planned.compared_samples(section)
        if isinstance(section, RkdSection) and section.angle != 0:
            gathered = "every rank gathers the features, and computes the angles at its own samples"
            lines.append((key, f"angles between {samples:,} samples: {gathered}"))
        if isinstance(section, DistSection):
            lines.append((key, f"correlations over {samples:,} samples: five sums a class are added over ranks"))
    for name, loss in planned.recipe.losses.named():
        lines += _bank_lines(planned, name, loss)
    return lines


def _bank_lines(planned: Plan, key: str, section: LossSection) -> list[tuple[str, str]]:
    """Return the lines about a loss of features that brings something of all ranks together."""
    batch, world = planned.recipe.train.global_batch, planned.world_size
    if isinstance(section, SrdSection):
        return [(key, f"one sum over {batch:,} samples is added over ranks, and the teacher's sums of each channel")]
    if isinstance(section, CrdSection):
        gathered = _bytes(2 * 4 * (batch - batch // world) * section.width)
        return [
            (key, f"gathers the vectors of {batch:,} samples, {gathered} a rank and step, and as much in the backward"),
            ("", f"banks: {_bytes(-(-2 * 4 * section.width // world))} a training image on each rank"),
        ]
    if isinstance(section, QueueSection):
        return [(key, f"gathers the teacher's vectors of {batch:,} samples after a step; a queue of {section.size:,}")]
    return []


def _shared_lines(planned: Plan) -> list[tuple[str, str]]:
    """Return the lines about all losses of relations."""
    lines = []
    first = planned.relations[0]
    if any(relations.work.world_size > 1 for relations in planned.relations):
        inside, between = (_link(link) for link in first.links)
        lines.append(("links", f"inside a machine {inside}, between machines {between} ({planned.links})"))
    if planned.two_passes:
        tensors = {tap: tensor for r in planned.relations for tap, tensor in zip(r.taps, r.work.tensors, strict=True)}
        kept = _bytes(sum(first.work.rows * tensor.width * tensor.gram_bytes for tensor in tensors.values()))
        lines.append(("", f"between the two passes the features of {planned.micro_steps} micro-steps are kept: {kept}"))
    return [*lines, ("work", _work_shares(planned))]


def _link(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s and {link.latency * 1e6:.3g} µs"


def _work_shares(planned: Plan) -> str:
    work = _step_work(planned)
    twice = " (twice, for relations over micro-steps)" if planned.two_passes else ""
    return (
        f"of a rank's step: relations {_share(work['relations'], work)}, teacher {_share(work['teacher'], work)}, "
        f"student forward {_share(work['forward'], work)}{twice}, backward {_share(work['backward'], work)}"
    )


def _movement(relations: PlannedRelations, grid: Grid) -> str:
    memory = relations.memory(grid)
    return (
        f"receives {relations.elements(grid):,} elements, {_bytes(relations.bytes(grid))} a rank and step, in "
        f"{relations.collectives(grid)} collectives, about {_milliseconds(relations.seconds(grid))}; holds "
        f"{_bytes(memory.features)} of features, {_bytes(memory.gram)} of relations"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _step_work(planned: Plan) -> dict[str, int]:
    """Return the floating-point operations of one rank in one step, by part."""
    images = planned.micro_batch * planned.micro_steps
    return {
        "relations": sum(relations.operations for relations in planned.relations),
        "teacher": images * sum(cost.forward for cost in planned.teachers.values()),
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


def _tap(relations: PlannedRelations, number: int) -> str:
    (role, path), tensor = relations.taps[number], relations.work.tensors[number]
    return f"{role} {path}, d = {tensor.width:,}, {tensor.feature_bytes} bytes each"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"
