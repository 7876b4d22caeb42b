"""Write the page and the pictures of `dkd report` from run directories."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dkd import console
from dkd.atomic_files import replacing
from dkd.config import RecipeError
from dkd.report import figures
from dkd.report.comparison import facts_of, percent
from dkd.report.evaluation_file import EvaluationFile, read_evaluation
from dkd.report.observations import Observation, observe
from dkd.report.page import Page
from dkd.report.run_files import RunFiles, labels_of, read_run
from dkd.runs.directory import EVALUATION_FILE

_MARK = "dkd report"
"""Text in each picture, by which the next report of the same name finds the pictures that it may remove."""
_MOST_ROWS = 20
"""Rows of a table of classes, or of pairs of classes."""
_LONGEST_NAME = 200  # bytes of a picture's name, without its extension


def write_report(
    paths: Sequence[Path],
    output: Path,
    images: int | None = None,
    trust_code: bool = False,
    say: Callable[[str], None] = console.say,
) -> list[Path]:
    """Write one self-contained page, and each of its pictures as a PNG into a folder beside the page.

    Pictures that an earlier report left in that folder are removed; other files in it stay.

    Args:
        paths: run directories, finished or not, of any number of processes.
        output: an .html file; an existing file is replaced.
        images: validation images to classify for the accuracies of classes; None: 2,000, or 20 a class where that is
            more.
        trust_code: import every module:callable that recipes and student.json files name.
        say: receives one line for each stage of the work.

    Returns:
        The files that were written: the page, then the pictures.

    Raises:
        RecipeError: a path is no run, or the output cannot be written, or would replace a picture of another program.
    """
    with figures.drawing_names():
        return _write_report(paths, output, images, trust_code, say)


def _write_report(
    paths: Sequence[Path], output: Path, images: int | None, trust_code: bool, say: Callable[[str], None]
) -> list[Path]:
    if len({path.resolve() for path in paths}) < len(paths):
        raise RecipeError.at("", "a run is given twice: name each run once")
    if output.is_dir() or not os.access(next(p for p in output.resolve().parents if p.exists()), os.W_OK):
        raise RecipeError.at(
            "",
            f"the report cannot be written to {str(output)!r}: it is a folder, or its folder is not writable; choose "
            "another --output",
        )
    runs = [read_run(path, label) for path, label in zip(paths, labels_of(list(paths)), strict=True)]
    title = runs[0].recipe.run.name if len(runs) == 1 else f"{len(runs)} runs"
    gallery = _Gallery(Page(f"Distillation report: {title}"))
    page = gallery.page
    page.section("Runs")
    page.table(*_comparison(runs))
    observed: dict[str, Observation] = {}
    for run in runs:
        say(f"running the models of {run.label}")
        observed[run.label] = observe(run, [other for other in runs if other is not run], images, trust_code)
    gallery.add(figures.accuracy(runs), "accuracy", "Each evaluation counts every validation image once.")
    classified = next((len(seen.labels) for seen in observed.values() if seen.labels is not None), 0)
    caption = f"Measured on up to {classified:,} validation images of each run, spread over the set."
    gallery.add(figures.class_accuracies(observed), "accuracy by class", caption)
    gallery.add(
        figures.throughput(runs),
        "throughput",
        "Left: smoothed. Right: calculated from the logged steps, evaluations and checkpoints; the rest of a finished "
        "run's time is not logged.",
    )
    for run in runs:
        page.section(run.label)
        if run.damaged:
            page.note(f"{run.damaged} lines of metrics.jsonl are damaged and are left out.")
        for note in observed[run.label].notes:
            page.note(note)
        say(f"drawing {run.label}")
        _pictures_of_run(gallery, run, observed[run.label], several=len(runs) > 1)
    try:
        return gallery.write(output)
    except OSError as error:
        raise RecipeError.at("", f"the report cannot be written to {str(output)!r}: {error}") from error


def _pictures_of_run(gallery: _Gallery, run: RunFiles, seen: Observation, several: bool) -> None:
    prefix = f"{run.label} " if several else ""
    gallery.add(
        figures.loss_terms(run),
        f"{prefix}loss terms",
        "Thin: each logged step. Thick: mean over a fiftieth of the run.",
    )
    gallery.add(figures.schedules(run), f"{prefix}schedules", "As functions of the step.")
    _add_agreement(gallery, run, prefix)
    _add_neighbours(gallery.page, run)
    _add_classes(gallery, run, prefix)
    if seen.student is None:
        return
    gallery.add(
        figures.attention(seen),
        f"{prefix}attention maps",
        "Each position shows the sum over channels of the squared activation, which attention transfer compares unless "
        "its recipe names another map. Teacher and student see the same validation images; each map has its own scale.",
    )
    for pair in seen.pairs:
        gallery.add(
            figures.gram_matrices(seen, pair),
            f"{prefix}Gram matrices {_named(pair)}",
            "SP compares these matrices: inner products of the images' features, each row divided by its norm. A "
            "bright square on the diagonal is a class whose images activate the layer alike. There is one row for each "
            "shown image; the brightest hundredth of the numbers, mostly the diagonal, has one colour.",
        )
        gallery.add(
            figures.channel_activations(seen, pair),
            f"{prefix}channel activations {_named(pair)}",
            "The activation of each channel is averaged over positions and over the images of a class.",
        )


def _add_agreement(gallery: _Gallery, run: RunFiles, prefix: str) -> None:
    """Add how alike student and teacher are: the last numbers, and their course where there are several."""
    measured = [line for line in run.evaluations if figures.agreement_of(line)]
    if not measured:
        return
    last = measured[-1]
    gallery.page.text(f"Student and teacher on the validation images, after step {last['steps']}.")
    values = figures.agreement_of(last)
    names = ["KL(teacher ‖ student), nats" if name == "kl" else name for name in values]
    gallery.page.table(names, [[f"{value:.4f}" for value in values.values()]])
    gallery.add(
        figures.agreement(run),
        f"{prefix}agreement with the teacher",
        "Linear CKA compares the features of a tapped pair, averaged over positions, on all validation images.",
    )


def _add_neighbours(page: Page, run: RunFiles) -> None:
    """Add the k-NN accuracy of each evaluation that measured it."""
    measured = [line for line in run.evaluations if line.get("knn_top1") is not None]
    if not measured:
        return
    page.text("k-NN accuracy of the student's features: the votes of the most similar images with labels.")
    rows = [
        [f"{line['epoch']:g}", percent(line["knn_top1"]) or "", percent(line.get("knn_top5")) or ""]
        for line in measured
    ]
    page.table(["epoch", "top-1", "top-5"], rows)


def _add_classes(gallery: _Gallery, run: RunFiles, prefix: str) -> None:
    """Add what evaluation.json states of each class: the worst classes, and what they were taken for."""
    if not run.recipe.data.labels:
        return
    found, reason = read_evaluation(run.path / EVALUATION_FILE)
    page = gallery.page
    if reason is not None:
        page.note(f"The counts of classes cannot be read: {reason}")
    if found is None:
        return
    page.text(f"Accuracy of each class in the evaluation after step {found.steps}, the worst classes first.")
    page.table(["class", "top-1", "images", "most often taken for"], _worst_classes(found))
    gallery.add(
        figures.confusion(found),
        f"{prefix}confusion matrix",
        "Each row is a class of the validation images; the colour is the share of its images for which the class of "
        "the column came first.",
    )
    if len(found.names) > figures.MOST_CLASSES_OF_A_PICTURE and (pairs := found.confused_pairs()):
        page.text("Pairs of classes that were confused most often:")
        rows = [[found.names[label], found.names[taken], str(count)] for label, taken, count in pairs[:_MOST_ROWS]]
        page.table(["class", "taken for", "images"], rows)


def _worst_classes(found: EvaluationFile) -> list[list[str]]:
    """Return the rows of the table of classes, the least accurate first; classes without images come last."""
    accuracies = found.accuracies
    taken: dict[int, str] = {}
    for label, other, count in found.confused_pairs():
        taken.setdefault(label, f"{found.names[other]} ({count})")
    order = sorted(range(len(accuracies)), key=lambda label: (accuracies[label] is None, accuracies[label] or 0.0))
    rows = [
        [found.names[i], percent(accuracies[i]) or "no images", str(found.samples[i]), taken.get(i, "")] for i in order
    ]
    more = len(rows) - _MOST_ROWS
    return rows if more <= 0 else [*rows[:_MOST_ROWS], [f"and {more} better classes", "", "", ""]]


def _named(pair: tuple[str, str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} {pair[1]}"


class _Gallery:
    """Draw figures onto the page, and keep their PNGs."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._pictures: dict[str, bytes] = {}

    def add(self, figure: Figure | None, title: str, caption: str) -> None:
        """Draw a figure and add it to the page; None adds nothing."""
        if figure is None:
            return
        buffer = io.BytesIO()
        figure.set_dpi(110)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": _MARK})
        name = plain = re.sub(r"[^\w.-]+", "_", title).strip("_").encode()[:_LONGEST_NAME].decode(errors="ignore")
        for number in range(2, 10**6):
            if name not in self._pictures:
                break
            name = f"{plain}_{number}"
        self._pictures[name] = buffer.getvalue()
        self.page.picture(buffer.getvalue(), title, caption)

    def write(self, output: Path) -> list[Path]:
        """Write the page and the pictures, and return their paths.

        Raises:
            OSError: a file cannot be written.
            RecipeError: a picture would replace a file that no report wrote.
        """
        folder = output.with_name(f"{output.stem}_pictures")
        if folder.is_symlink():
            raise RecipeError.at(
                "",
                f"{str(folder)!r} is a link, but pictures are written into a folder of their own: remove the link, or "
                "choose another --output",
            )
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in folder.glob("*.png") if _is_of_a_report(path)]
        pictures = {folder / f"{name}.png": png for name, png in self._pictures.items()}
        for path in pictures:
            if path not in earlier and (path.exists() or path.is_symlink()):
                raise RecipeError.at(
                    "", f"{str(path)!r} exists, and no report wrote it: move it, or choose another --output"
                )
        for path in earlier:
            path.unlink()
        for path, png in pictures.items():
            with replacing(path) as unfinished:
                unfinished.write_bytes(png)
        with replacing(output) as unfinished:
            unfinished.write_bytes(self.page.html().encode(errors="backslashreplace"))
        return [output, *pictures]


def _is_of_a_report(path: Path) -> bool:
    """Return whether a report wrote this picture: its text chunks come first."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return f"Software\0{_MARK}".encode() in file.read(1024)


def _comparison(runs: Sequence[RunFiles]) -> tuple[list[str], list[list[str]]]:
    head = [
        "run",
        "student",
        "teacher",
        "losses",
        "top-1",
        "top-5",
        "parameters",
        "epochs",
        "global batch",
        "ranks",
        "images/s",
        "seconds",
    ]
    return head, [_row(run) for run in runs]


def _row(run: RunFiles) -> list[str]:
    facts = facts_of(run)
    return [
        facts.label,
        facts.student,
        facts.teacher or "none",
        ", ".join(facts.losses.values()),
        percent(facts.top1) or "",
        percent(facts.top5) or "",
        "" if facts.parameters is None else f"{facts.parameters:,}",
        f"{facts.epochs_done:.3g} of {facts.epochs}",
        str(facts.global_batch),
        "" if facts.world_size is None else str(facts.world_size),
        "" if facts.images_per_second is None else f"{facts.images_per_second:,.0f}",
        "not finished" if facts.seconds is None else f"{facts.seconds:,.0f}",
    ]
