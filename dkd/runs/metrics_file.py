"""The lines of a run's metrics.jsonl, read and checked in one place.

A line is about a logged step, an evaluation or a checkpoint. A run that is killed, or whose disk is full, may leave a
line that is damaged; such lines do not count, and the reader learns how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkd import atomic_files

_LARGEST = 2**63  # of whole numbers: Python's can be too large to become a float
_TEXT = ("error", "warning")  # of a checkpoint: why it could not be written


@dataclass(frozen=True)
class Metrics:
    """What a metrics.jsonl holds. Of two lines about the same step the later one counts: the step was computed
    again."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Logged steps with their loss terms, in order."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`steps`, `epoch`, `top1` and more of each evaluation, in order; `seconds` is the time that it took. The top-1 of
    images without labels is None."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `bytes`, `seconds`, `stall` and more of each checkpoint, in order."""
    damaged: int = 0
    """Lines that cannot be read."""


def read_metrics(path: Path) -> tuple[Metrics, str | None]:
    """Return what a metrics.jsonl holds, and why nothing in it can be read, or None. A file that is not there holds
    nothing."""
    if not path.exists() and not path.is_symlink():
        return Metrics(), None
    content, reason = atomic_files.read_bytes(path)
    if reason is not None:
        return Metrics(), reason
    found: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}, "checkpoint": {}}
    texts = content.splitlines(keepends=True)
    damaged = 0
    for text in texts:
        line = parse_line(text)
        kind = kind_of(line)
        if kind is None:
            # The last line of a run that is being written, or was killed meanwhile, has a beginning and no end yet:
            # that is no damage.
            damaged += not (text.startswith(b"{") and text is texts[-1] and not text.endswith(b"\n"))
        elif kind == "evaluation":
            found[kind][line[kind]["steps"]] = {"seconds": line.get("seconds", 0.0), **line[kind]}
        elif kind == "checkpoint":
            found[kind][line[kind]["step"]] = line[kind]
        elif kind == "step":
            found[kind][line["step"]] = line
    steps, evaluations, checkpoints = ([lines[step] for step in sorted(lines)] for lines in found.values())
    metrics = Metrics(steps, evaluations, checkpoints, damaged)
    if damaged and damaged == len(texts):
        return metrics, f"{str(path)!r} is damaged: none of its {damaged} lines is one of a run"
    return metrics, None


def parse_line(text: str | bytes) -> dict[str, Any]:
    """Return the values of one line; none when it is damaged."""
    values, _ = atomic_files.parse_json(text)
    return values if isinstance(values, dict) else {}


def kind_of(line: Mapping[str, Any]) -> str | None:
    """Return what a line is about: `step` (with loss terms), `evaluation`, `checkpoint`, or `other` at a step; None: it
    is damaged.

    Only values that are computed with are checked: lines may hold more than this version of dkd knows.
    """
    for kind, step, needed, optional in (
        ("evaluation", "steps", ("epoch",), ("top1", "top5", "loss", "samples", "knn_top1", "knn_top5")),
        ("checkpoint", "step", (), ("bytes", "seconds", "stall")),
    ):
        if kind in line:
            facts = line[kind]
            sound = (
                isinstance(facts, dict)
                and _is_step(facts.get(step))
                and all(_is_number(facts.get(key)) for key in needed)
            )
            sound = sound and all(facts.get(key) is None or _is_number(facts[key]) for key in optional)
            return kind if sound and _is_number(line.get("seconds", 0.0)) else None
    if not _is_step(line.get("step")):
        return None
    if "loss" not in line:
        return "other"
    terms = [key.removeprefix("weight/") for key in line if key.startswith("weight/")]
    computed = {
        "loss",
        "epoch",
        "lr",
        "images_per_second",
        "data_wait",
        *terms,
        *(f"weight/{term}" for term in terms),
    } & set(line)
    return "step" if all(_is_number(line[key]) for key in computed) else None


def agreement_with_teacher(evaluation: Mapping[str, Any]) -> float | None:
    """Return the share of images for which student and teacher name the same class first, of an evaluation's line; None
    where it was not measured."""
    found = evaluation.get("agreement")
    value = found.get("top1") if isinstance(found, dict) else None
    return float(value) if value is not None and _is_number(value) else None


def describe_accuracy(evaluation: Mapping[str, Any]) -> str:
    """Return the top-1 of an evaluation's line in words, or without labels the agreement with the teacher, or the k-NN
    accuracy; empty where none was measured."""
    named = {
        "top-1": evaluation.get("top1"),
        "agreement": agreement_with_teacher(evaluation),
        "k-NN top-1": evaluation.get("knn_top1"),
    }
    for name, value in named.items():
        if value is not None:
            return f"{name} {value:.4f}"
    return ""


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    """Return whether a value is a number that can be computed with; a float may be one that is not finite, as a loss
    may be."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST
    )
