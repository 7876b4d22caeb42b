"""Read the files of a run directory that a report needs: recipe, metrics and description of the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkd.config import Recipe, RecipeError, load_recipe
from dkd.models import WeightsError, read_description
from dkd.runs.metrics_file import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Args:
        path: the run directory.
        label: the name of the run in the report, unique in it.
        steps: lines of metrics.jsonl with loss terms, in order of steps.
        evaluations, checkpoints: lines of metrics.jsonl about evaluations and checkpoints.
        description: the content of student.json; empty while there is no finished student.
        damaged: number of lines of metrics.jsonl that cannot be read.
    """

    path: Path
    label: str
    recipe: Recipe
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    description: Mapping[str, Any] = field(default_factory=dict)
    damaged: int = 0

    @property
    def weights(self) -> Path:
        """Return the file of the finished student's weights, which may not exist yet."""
        return self.path / "student.safetensors"

    @property
    def terms(self) -> list[str]:
        """Return the names of the loss terms, in the order of the log."""
        found = dict.fromkeys(
            key.removeprefix("weight/") for line in self.steps for key in line if key.startswith("weight/")
        )
        return list(found)


def read_run(path: Path, label: str) -> RunFiles:
    """Read a run directory; the run may still be training.

    Args:
        label: the name of the run in the report.

    Raises:
        RecipeError: the folder holds no run, or one of its files cannot be read.
    """
    if not (path / "recipe.yaml").is_file():
        raise RecipeError.at("", f"{str(path)!r} is no run directory: it holds no recipe.yaml")
    recipe = load_recipe(path / "recipe.yaml")
    metrics, reason = read_metrics(path / "metrics.jsonl")
    if reason is not None:
        raise RecipeError.at("", reason)
    try:
        description = read_description(path / "student.safetensors") if (path / "student.json").exists() else {}
    except WeightsError as error:
        raise RecipeError.at("", error) from error
    return RunFiles(
        path, label, recipe, metrics.steps, metrics.evaluations, metrics.checkpoints, description, metrics.damaged
    )


def labels_of(paths: list[Path]) -> list[str]:
    """Return a short, unique name for each folder: its own name, preceded by as many parents as are needed."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
