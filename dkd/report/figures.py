"""Draw the figures of a report.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart; lines also differ in
style. A function returns None when there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from dkd import console
from dkd.config.losses import LOSSES
from dkd.report.evaluation_file import EvaluationFile
from dkd.report.observations import ModelView, Observation
from dkd.report.run_files import RunFiles

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
# The names of the recipe's own losses; a loss of the user's own has the name of its term.
TERM_NAMES = {key: section.title for key, section in LOSSES.items()}
_MAP, _DIFFERENCE = "cividis", "PuOr"
_IMAGES_SHOWN = 6
_PITCH = 1.08  # distance between the cells of attention maps, in sides of a cell
_MANY_CLASSES = 40
MOST_CLASSES_OF_A_PICTURE = 50
"""Classes up to which a confusion matrix is drawn; more would be smaller than their names."""
_NUMBERED_CLASSES = 20
_MARKERS = "osD^vPX*"


def loss_terms(run: RunFiles) -> Figure | None:
    """Draw each loss term before its weight, and the weighted sum, over steps."""
    names = ["loss", *run.terms]
    if not run.steps:
        return None
    columns = min(3, len(names))
    figure, axes = new_grid(-(-len(names) // columns), columns, 4.2, 2.8)
    for axis, name in zip(axes, names, strict=False):
        steps, values = _series(run, name)
        axis.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=0.8)
        axis.plot(steps, _smooth(values), color=COLOURS[0], linewidth=1.6)
        axis.set_title("weighted sum" if name == "loss" else f"{TERM_NAMES.get(name, name)}, before its weight")
        axis.set_xlabel("step")
        if len(values) and np.all(values > 0):
            axis.set_yscale("log")
            _plain_powers(axis)
    _hide(axes[len(names) :])
    return figure


def accuracy(runs: Sequence[RunFiles]) -> Figure | None:
    """Draw the top-1 accuracy of all runs over epochs."""
    measured = {run.label: [line for line in run.evaluations if line.get("top1") is not None] for run in runs}
    if not any(measured.values()):
        return None
    figure, (axis,) = new_grid(1, 1, 7.5, 3.6)
    lines = {}
    for number, run in enumerate(runs):
        epochs = [line["epoch"] for line in measured[run.label]]
        shares = [100 * line["top1"] for line in measured[run.label]]
        (lines[run.label],) = axis.plot(epochs, shares, marker="o", markersize=3, **_line_style(number))
    axis.set_xlabel("epoch")
    axis.set_ylabel("top-1, % of validation images")
    axis.set_title("Accuracy of the student")
    add_legend(axis, lines, loc="lower right")
    return figure


def agreement(run: RunFiles) -> Figure | None:
    """Draw how alike student and teacher are over epochs; None where fewer than two evaluations measured it."""
    measured = [(line["epoch"], agreement_of(line)) for line in run.evaluations if agreement_of(line)]
    if len(measured) < 2:
        return None
    figure, (left, right) = new_grid(1, 2, 5.2, 3.0)
    lines: dict[str, Artist] = {}
    names = list(dict.fromkeys(name for _, values in measured for name in values if name != "kl"))
    for axis, shown in ((left, names), (right, ["kl"])):
        for number, name in enumerate(shown):
            points = [(epoch, values[name]) for epoch, values in measured if name in values]
            (lines[name],) = axis.plot(
                *np.array(points).reshape(-1, 2).T, marker="o", markersize=3, **_line_style(number)
            )
        axis.set_xlabel("epoch")
    left.set_title("Student and teacher: shares, and CKA")
    right.set_title("KL(teacher ‖ student), nats")
    add_legend(left, {name: line for name, line in lines.items() if name != "kl"})
    return figure


def agreement_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation's line about student and teacher, by name; none where it has none."""
    found = line.get("agreement")
    found = found if isinstance(found, dict) else {}
    cka = found.get("cka")
    named = {"same class first": found.get("top1"), "teacher's top-1": found.get("teacher_top1"), "kl": found.get("kl")}
    named |= {f"CKA {pair}": value for pair, value in (cka if isinstance(cka, dict) else {}).items()}
    return {name: float(v) for name, v in named.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def schedules(run: RunFiles) -> Figure | None:
    """Draw the learning rate and the loss weights over steps."""
    if not run.steps:
        return None
    figure, (left, right) = new_grid(1, 2, 4.8, 2.8)
    left.plot(*_series(run, "lr"), color=COLOURS[0])
    left.set_title("Learning rate")
    lines = {}
    for number, term in enumerate(run.terms):
        (lines[TERM_NAMES.get(term, term)],) = right.plot(*_series(run, f"weight/{term}"), **_line_style(number))
    right.set_title("Weights of the loss terms")
    right.set_yscale("symlog", linthresh=0.01)
    _plain_powers(right)
    add_legend(right, lines)
    for axis in (left, right):
        axis.set_xlabel("step")
    return figure


def throughput(runs: Sequence[RunFiles]) -> Figure | None:
    """Draw the images a second over steps, and the shares of each run's time."""
    with_steps = [run for run in runs if run.steps]
    if not with_steps:
        return None
    figure, (left, right) = new_grid(1, 2, 5.6, max(2.8, 1.2 + 0.35 * len(with_steps)))
    lines = {}
    for number, run in enumerate(with_steps):
        steps, values = _series(run, "images_per_second")
        (lines[run.label],) = left.plot(steps, _smooth(values), **_line_style(number))
    left.set_title("Throughput, all ranks together")
    left.set_xlabel("step")
    left.set_ylabel("images a second")
    left.set_ylim(bottom=0)
    add_legend(left, lines)
    parts = [seconds_by_part(run) for run in with_steps]
    ends = np.zeros(len(with_steps))
    for number, part in enumerate(parts[0]):
        widths = np.array([100 * times[part] / max(sum(times.values()), 1e-9) for times in parts])
        colour = "#999999" if part == "not logged" else COLOURS[number]
        right.barh(np.arange(len(with_steps)), widths, left=ends, label=part, color=colour, edgecolor="white")
        ends += widths
    right.set_yticks(np.arange(len(with_steps)), [console.printable(run.label) for run in with_steps])
    right.invert_yaxis()
    right.set_title("Where the time went")
    right.set_xlabel("% of the run's time")
    right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    return figure


def seconds_by_part(run: RunFiles) -> dict[str, float]:
    """Return the seconds that a run spent on each part of its work, calculated from its log. A logged step stands for
    all steps since the logged step before it."""
    training = waiting = 0.0
    before = 0
    for line in run.steps:
        speed, waited = line.get("images_per_second") or math.inf, line.get("data_wait") or 0.0
        seconds = (line["step"] - before) * run.recipe.train.global_batch / speed
        waiting += seconds * waited
        training += seconds * (1 - waited)
        before = line["step"]
    parts = {
        "forward, backward, update": training,
        "waiting for images": waiting,
        "evaluation": sum(line.get("seconds", 0.0) for line in run.evaluations),
        "standing still for checkpoints": sum(line.get("stall", 0.0) for line in run.checkpoints),
    }
    total = run.description.get("seconds")
    return {**parts, "not logged": max(0.0, total - sum(parts.values())) if isinstance(total, int | float) else 0.0}


def attention(seen: Observation) -> Figure | None:
    """Draw the same images with the attention maps of teacher and student over them, one row for each tap."""
    assert seen.student is not None
    assert seen.images is not None
    assert seen.shown_labels is not None
    pairs = [(s, t) for s, t in seen.pairs if s in seen.student.attention]
    if not pairs:
        return None
    chosen = _one_of_each_class(seen.shown_labels) if seen.labels is not None else _spread(len(seen.shown_labels))
    views = [(view, role) for view, role in ((seen.teacher, "teacher"), (seen.student, "student")) if view is not None]
    rows = [
        (view, role, tap)
        for s, t in pairs
        for view, role in views
        for tap in [t if role == "teacher" else s]
        if tap in view.attention
    ]
    # One axis for all cells: axes for each cell take longer to create and lay out than everything else on the page.
    figure, (axis,) = new_grid(1, 1, 1.45 * len(chosen), 1.45 * (1 + len(rows)), frame=False)

    def cell(row: int, column: int) -> tuple[float, float, float, float]:
        x, y = column * _PITCH, row * _PITCH
        return x, x + 1, y + 1, y

    for column, index in enumerate(chosen):
        image = seen.images[index].transpose(1, 2, 0)
        axis.imshow(image, extent=cell(0, column))
        axis.text(
            column * _PITCH + 0.5,
            -0.05,
            "" if seen.labels is None else _short(seen.class_names[seen.shown_labels[index]]),
            ha="center",
            va="bottom",
            fontsize=8,
        )
        gray = image.mean(2)
        for row, (view, _role, tap) in enumerate(rows, start=1):
            axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=cell(row, column))
            axis.imshow(
                view.attention[tap][index], cmap=_MAP, alpha=0.65, extent=cell(row, column), interpolation="bilinear"
            )
    for row, label in enumerate(["image", *(f"{role}\n{tap}" for _, role, tap in rows)]):
        axis.text(-0.12, row * _PITCH + 0.5, label, ha="right", va="center", fontsize=8)
    axis.set_xlim(0, len(chosen) * _PITCH - _PITCH + 1)
    axis.set_ylim(len(rows) * _PITCH + 1, 0)
    figure.suptitle("Attention maps Σ|A|² of the same images; bright is where the activation is")
    return figure


def gram_matrices(seen: Observation, pair: tuple[str, str]) -> Figure | None:
    """Draw the row-normalised Gram matrices of teacher and student, sorted by class, and their difference."""
    assert seen.student is not None
    assert seen.shown_labels is not None
    student, teacher = pair
    own = seen.student.gram.get(student)
    if own is None:
        return None
    theirs = None if seen.teacher is None else seen.teacher.gram.get(teacher)
    panels = [(f"student {student}", own, _MAP)]
    if theirs is not None:
        panels = [(f"teacher {teacher}", theirs, _MAP), *panels, ("student − teacher", own - theirs, _DIFFERENCE)]
    matrices = [matrix for _, matrix, colours in panels if colours == _MAP]
    # Cut the scale at the brightest hundredth: by the diagonal, which compares an image with itself, the rest of an
    # early layer would be dark.
    largest, smallest = (
        max(float(np.quantile(m, 0.99)) for m in matrices),
        min(0.0, *(float(m.min()) for m in matrices)),
    )
    figure, axes = new_grid(1, len(panels), 3.9, 3.6)
    names, ticks, edges = _class_ticks(seen)
    for axis, (title, matrix, colours) in zip(axes, panels, strict=True):
        # One scale for teacher and student, so that they can be compared.
        limit = float(np.abs(matrix).max()) if colours == _DIFFERENCE else largest
        low = -limit if colours == _DIFFERENCE else smallest
        shown = axis.imshow(matrix, cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks(ticks, names, rotation=90, fontsize=7)
        axis.set_yticks(ticks, names if axis is axes[0] else [""] * len(ticks), fontsize=7)
        for edge in edges:
            axis.axhline(edge, color="white", linewidth=0.4)
            axis.axvline(edge, color="white", linewidth=0.4)
        figure.colorbar(shown, ax=axis, fraction=0.046, extend="neither" if colours == _DIFFERENCE else "max")
    axes[0].set_ylabel("images, sorted by class")
    return figure


def channel_activations(seen: Observation, pair: tuple[str, str]) -> Figure | None:
    """Draw the mean activation of each channel on the images of each class, for teacher and student."""
    assert seen.student is not None
    panels = [(f"student {pair[0]}", _class_means(seen, seen.student, pair[0]))]
    if seen.teacher is not None:
        panels.insert(0, (f"teacher {pair[1]}", _class_means(seen, seen.teacher, pair[1])))
    panels = [(title, means) for title, means in panels if means is not None]
    if not panels:
        return None
    figure, axes = new_grid(1, len(panels), 5.6, 3.2)
    names = _class_ticks(seen)[0]
    for axis, (title, means) in zip(axes, panels, strict=True):
        assert means is not None
        shown = axis.imshow(means, aspect="auto", cmap=_MAP, interpolation="nearest")
        axis.set_title(title)
        axis.set_xlabel("channel")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=7)
        figure.colorbar(shown, ax=axis, fraction=0.046)
    axes[0].set_ylabel("class")
    return figure


def class_accuracies(observed: Mapping[str, Observation]) -> Figure | None:
    """Draw the accuracy of the students and their teachers on each class."""
    series: dict[str, np.ndarray] = {}
    names: Sequence[str] = ()
    for label, seen in observed.items():
        if seen.student is None or seen.labels is None:
            continue
        names = seen.class_names
        series[label] = accuracy_by_class(seen, seen.student)
        if seen.teacher is not None and seen.teacher.classifies:
            values = accuracy_by_class(seen, seen.teacher)
            name = f"teacher {seen.teacher.name}"
            if name in series and not np.array_equal(series[name], values, equal_nan=True):
                name = f"teacher {seen.teacher.name} of {label}"
            series[name] = values
    series = {label: values for label, values in series.items() if len(values) == len(names)}
    drawn: dict[str, Artist] = {}
    if not series:
        return None
    many = len(names) > _MANY_CLASSES
    figure, (axis,) = new_grid(1, 1, 9.5 if len(names) > 12 else 7.5, 3.4)
    for number, (label, values) in enumerate(series.items()):
        if many:
            (drawn[label],) = axis.plot(np.sort(values), **_line_style(number))
        else:
            # Dots, since the axis does not begin at 0.
            places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * 0.6 / len(series)
            marker = _MARKERS[number % len(_MARKERS)]
            (drawn[label],) = axis.plot(
                places, values, linestyle="none", color=COLOURS[number % 7], marker=marker, markersize=6
            )
    if many:
        axis.set_xlabel("classes, each model's sorted by its accuracy")
    else:
        axis.set_xticks(
            range(len(names)), [_short(name) for name in names], rotation=45 if len(names) > 6 else 0, ha="right"
        )
        axis.grid(axis="y", color="#dddddd")
    axis.set_ylabel("accuracy, %")
    axis.set_title("Accuracy by class")
    add_legend(axis, drawn, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def confusion(evaluation: EvaluationFile) -> Figure | None:
    """Draw the confusion matrix, each row divided by the samples of its class; None without a matrix, and for more
    classes than `MOST_CLASSES_OF_A_PICTURE`."""
    matrix, count = evaluation.confusion, len(evaluation.names)
    if matrix is None or not 1 < count <= MOST_CLASSES_OF_A_PICTURE:
        return None
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(3.6, 1.6 + 0.26 * count)
    figure, (axis,) = new_grid(1, 1, side + 1.2, side)
    shown = axis.imshow(shares, cmap=_MAP, vmin=0, vmax=100, interpolation="nearest")
    names = [_short(name) for name in evaluation.names]
    axis.set_xticks(range(count), names, rotation=90, fontsize=7)
    axis.set_yticks(range(count), names, fontsize=7)
    axis.set_xlabel("class that came first")
    axis.set_ylabel("class of the label")
    if count <= _NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "black" if shares[row, column] > 60 else "white"
            axis.text(
                column, row, str(matrix[row, column]), ha="center", va="center", fontsize=6, color=colour, clip_on=True
            )
    axis.set_title("Confusion matrix")
    figure.colorbar(shown, ax=axis, fraction=0.046, label="% of the class")
    return figure


def accuracy_by_class(seen: Observation, view: ModelView) -> np.ndarray:
    """Return the accuracy on each class, (K,) in per cent; NaN for a class without an image."""
    assert seen.labels is not None
    right = np.bincount(seen.labels, weights=view.predictions == seen.labels, minlength=len(seen.class_names))
    total = np.bincount(seen.labels, minlength=len(seen.class_names))
    return 100 * right / np.where(total == 0, np.nan, total)


def _series(run: RunFiles, key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [
        (line["step"], line[key])
        for line in run.steps
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving mean over a fiftieth of the run, over fewer values at its ends."""
    half = len(values) // 100
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    smoothed: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return smoothed


def new_grid(rows: int, columns: int, width: float, height: float, frame: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row.

    Args:
        width, height: inches of one panel.
        frame: whether the panels have axes with ticks.
    """
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(np.array(figure.subplots(rows, columns, squeeze=False)).ravel())
    for axis in axes:
        if frame:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.title.set_fontsize(10)
        else:
            axis.set_axis_off()
    return figure, axes


def add_legend(axis: Axes, drawn: Mapping[str, Artist], **place: Any) -> None:
    """Draw a legend of everything in `drawn`. The names are set afterwards, because matplotlib leaves out a name that
    begins with _."""
    legend = axis.legend(list(drawn.values()), [str(number) for number in range(len(drawn))], fontsize="small", **place)
    for text, name in zip(legend.get_texts(), drawn, strict=True):
        text.set_text(console.printable(name))


class _PlainPowers(LogFormatter):
    """Label a logarithmic axis without formulas, which `drawing_names` turns off."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_powers(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(_PlainPowers())
    if axis.get_yscale() == "log":
        axis.yaxis.set_minor_formatter(_PlainPowers())


def drawing_names() -> AbstractContextManager[Any]:
    """Return a context in which all figures must be made and drawn: matplotlib reads no name with dollars as a formula
    there."""
    return matplotlib.rc_context({"text.parse_math": False})


def _hide(axes: Sequence[Axes]) -> None:
    for axis in axes:
        axis.set_axis_off()


def _line_style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def _one_of_each_class(labels: np.ndarray) -> list[int]:
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    return first[:_IMAGES_SHOWN]


def _spread(count: int) -> list[int]:
    """Return the places of a few of so many images, spread over all of them."""
    return np.unique(np.linspace(0, count - 1, min(_IMAGES_SHOWN, count)).round().astype(int)).tolist()


def _class_ticks(seen: Observation) -> tuple[list[str], list[float], list[float]]:
    """Return the names of the shown classes, the positions of their labels, and the positions of the lines between
    classes."""
    assert seen.shown_labels is not None
    classes, starts, counts = np.unique(seen.shown_labels, return_index=True, return_counts=True)
    names = [_short(seen.class_names[label]) for label in classes]
    return names, list(starts + counts / 2 - 0.5), list(starts[1:] - 0.5)


def _class_means(seen: Observation, view: ModelView, tap: str) -> np.ndarray | None:
    if tap not in view.channels:
        return None
    assert seen.shown_labels is not None
    return np.stack([view.channels[tap][seen.shown_labels == label].mean(0) for label in np.unique(seen.shown_labels)])


def _short(name: str) -> str:
    first = console.printable(name.split(",")[0])
    return first if len(first) <= 16 else f"{first[:15]}…"
