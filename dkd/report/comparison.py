"""What runs are compared by: models, losses, batch, time and accuracy, and the keys in which their recipes differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dkd.config.changes import differing_keys
from dkd.config.derived import teacher_views
from dkd.report.run_files import RunFiles
from dkd.runs.directory import read_provenance
from dkd.runs.metrics_file import agreement_with_teacher
from dkd.runs.status import FINISHED_STATE, read_status

_LONGEST = 40  # characters of a cell in a terminal
_MISSING = "-"


@dataclass(frozen=True)
class RunFacts:
    """Holds what one run is compared by; None where a run has no such number, or not yet.

    Args:
        label: of the run.
        state, step, total_steps: as in `RunStatus`.
        teacher: None for a run without one.
        losses: key -> the loss with its weight, in words.
        epochs_done: up to the last evaluation; without one, those that the logged steps have begun.
        world_size: processes of the last start.
        seconds: of training, over all starts; of finished runs.
        images_per_second: the median over all logged steps.
        top1, top5, loss: of the last evaluation.
        best_top1, best_step: the highest top-1 of all evaluations, and the steps after which it was measured.
        agreement: share of images for which student and teacher name the same class first, in the last evaluation that
            measured it.
        knn_top1: in the last evaluation that measured it.
    """

    label: str
    state: str
    step: int | None
    total_steps: int | None
    student: str
    teacher: str | None
    losses: dict[str, str]
    global_batch: int
    epochs: int
    epochs_done: float
    world_size: int | None
    seconds: float | None
    images_per_second: float | None
    parameters: int | None
    top1: float | None
    top5: float | None
    loss: float | None
    best_top1: float | None
    best_step: int | None
    agreement: float | None = None
    knn_top1: float | None = None

    @property
    def finished(self) -> bool:
        """Return whether the run has done its last step."""
        return self.state == FINISHED_STATE


def facts_of(run: RunFiles) -> RunFacts:
    """Return what a run is compared by. Raises RecipeError where its files cannot be read."""
    recipe, description, status = run.recipe, run.description, read_status(run.path)
    last = run.evaluations[-1] if run.evaluations else {}
    labelled = [line for line in run.evaluations if line.get("top1") is not None]
    best = max(labelled, key=lambda evaluation: evaluation["top1"], default={})
    agreements = [value for line in run.evaluations if (value := agreement_with_teacher(line)) is not None]
    neighbours = [line["knn_top1"] for line in run.evaluations if line.get("knn_top1") is not None]
    speeds = [line["images_per_second"] for line in run.steps if line.get("images_per_second")]
    starts, _ = read_provenance(run.path)
    loss = last.get("loss")
    return RunFacts(
        label=run.label,
        state=status.state,
        step=status.step,
        total_steps=status.total_steps,
        student=recipe.student.name,
        teacher=" + ".join(view.teacher.name for _, view in teacher_views(recipe) if view.teacher is not None) or None,
        losses={key: section.describe() for key, section in recipe.losses.named()},
        global_batch=recipe.train.global_batch,
        epochs=recipe.train.epochs,
        epochs_done=_count_epochs(run),
        world_size=description.get("world_size", starts[-1].get("world_size") if starts else None),
        seconds=description.get("seconds"),
        images_per_second=median(speeds) if speeds else None,
        parameters=description.get("parameters"),
        top1=last.get("top1"),
        top5=last.get("top5"),
        loss=loss if loss is None or math.isfinite(loss) else None,
        best_top1=best.get("top1"),
        best_step=best.get("steps"),
        agreement=agreements[-1] if agreements else None,
        knn_top1=neighbours[-1] if neighbours else None,
    )


def comparison_table(runs: Sequence[RunFiles], facts: Sequence[RunFacts]) -> list[str]:
    """Return lines for a terminal: one column a run, first its facts, then the keys in which the recipes differ."""
    rows = [["", *(each.label for each in facts)], *_fact_rows(facts)]
    differing = differing_keys([run.recipe for run in runs])
    split = len(rows)
    rows += [[key, *(_show(values, i) for i in range(len(runs)))] for key, values in differing.items()]
    cells = [[row[0], *(_shorten(cell) for cell in row[1:])] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(runs) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    title = "keys of the recipes that differ" if differing else "the recipes do not differ"
    return [*lines[:split], "", title, *lines[split:]] if len(runs) > 1 else lines


def _fact_rows(facts: Sequence[RunFacts]) -> list[list[str]]:
    def row(name: str, cells: Sequence[str | None]) -> list[str]:
        return [name, *(cell if cell is not None else _MISSING for cell in cells)]

    losses = dict.fromkeys(key for each in facts for key in each.losses)
    return [
        row("state", [_state(each) for each in facts]),
        row("student", [each.student for each in facts]),
        row("teacher", [each.teacher for each in facts]),
        *(row(f"losses.{key}", [each.losses.get(key) for each in facts]) for key in losses),
        row("global batch", [f"{each.global_batch:,}" for each in facts]),
        row("epochs", [f"{each.epochs_done:.3g} of {each.epochs}" for each in facts]),
        row("world size", [_number(each.world_size) for each in facts]),
        row("seconds", [_number(each.seconds) for each in facts]),
        row("images/s", [_number(each.images_per_second) for each in facts]),
        row("parameters", [_number(each.parameters) for each in facts]),
        row("top-1", [percent(each.top1) for each in facts]),
        row("top-5", [percent(each.top5) for each in facts]),
        row("loss", [None if each.loss is None else f"{each.loss:.4f}" for each in facts]),
        row("best top-1", [_best(each) for each in facts]),
        *_measured_by_some("agreement", [each.agreement for each in facts], row),
        *_measured_by_some("k-NN top-1", [each.knn_top1 for each in facts], row),
    ]


def _measured_by_some(
    name: str, values: Sequence[float | None], row: Callable[[str, Sequence[str | None]], list[str]]
) -> list[list[str]]:
    """Return the row of a number that few runs have; none where no run has it."""
    return [row(name, [percent(value) for value in values])] if any(value is not None for value in values) else []


def percent(fraction: float | None) -> str | None:
    """Return a fraction as a percentage of two decimals; None for None."""
    return None if fraction is None else f"{100 * fraction:.2f}\N{NO-BREAK SPACE}%"


def _state(facts: RunFacts) -> str:
    if facts.finished or facts.total_steps is None:
        return facts.state
    return f"{facts.state}, step {facts.step} of {facts.total_steps}"


def _count_epochs(run: RunFiles) -> float:
    if run.evaluations:
        return float(run.evaluations[-1]["epoch"])
    begun = run.steps[-1].get("epoch", 0) if run.steps else 0
    return float(begun + ("steps" in run.description))  # a finished run has ended its last epoch


def _best(facts: RunFacts) -> str | None:
    return None if facts.best_top1 is None else f"{percent(facts.best_top1)} (step {facts.best_step})"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _show(values: dict[int, Any], run: int) -> str:
    if run not in values:
        return _MISSING
    value = values[run]
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _is_plain(value) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
