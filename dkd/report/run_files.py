"""What a run directory holds that a report reads: recipe, metrics, description of the student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dkd.config import Recipe, RecipeError, load_recipe


@dataclass(frozen=True)
class RunFiles:
    """One run.

    Args:
        path: its folder.
        label: what it is called in the report; no two runs of a report share it.
        steps: lines of metrics.jsonl with loss terms, in order of steps.
        evaluations, checkpoints: the other lines.
        description: student.json, empty while there is none.
    """

    path: Path
    label: str
    recipe: Recipe
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.path / "student.safetensors"

    @property
    def terms(self) -> list[str]:
        """Loss terms, in the order of the log."""
        found = dict.fromkeys(key.removeprefix("weight/") for line in self.steps for key in line if key.startswith("weight/"))
        return list(found)


def read_run(path: Path, label: str) -> RunFiles:
    """Read a run directory; the run may still be going on.

    Raises:
        RecipeError: no run is there, or its recipe cannot be read.
    """
    if not (path / "recipe.yaml").is_file():
        raise RecipeError.at("", f"{str(path)!r} is no run directory: there is no recipe.yaml in it")
    recipe = load_recipe(path / "recipe.yaml")
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    checkpoints: dict[int, dict[str, Any]] = {}
    metrics = path / "metrics.jsonl"
    for text in metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of a run that is being written
        if not isinstance(line, dict):
            continue
        # A run that went on behind a checkpoint may have logged a step twice: the later line counts.
        for kind, found in (("evaluation", evaluations), ("checkpoint", checkpoints)):
            value = line.get(kind)
            if isinstance(value, dict) and all(_is_number(value.get(key)) for key in _NEEDED[kind]):
                value = {"seconds": line.get("seconds", 0.0), **value}
                found[value[_NEEDED[kind][0]]] = value
        if isinstance(line.get("step"), int) and "loss" in line:
            steps[line["step"]] = line
    description = path / "student.json"
    try:
        described = json.loads(description.read_text()) if description.is_file() else {}
    except ValueError as error:
        raise RecipeError.at("", f"{str(description)!r} cannot be read: {error}") from error
    if not isinstance(described, dict):
        raise RecipeError.at("", f"{str(description)!r} does not describe a student")
    in_order = [[found[key] for key in sorted(found)] for found in (steps, evaluations, checkpoints)]
    return RunFiles(path, label, recipe, in_order[0], in_order[1], in_order[2], described)


_NEEDED = {"evaluation": ("steps", "epoch", "top1"), "checkpoint": ("step",)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def labels_of(paths: list[Path]) -> list[str]:
    """A short name for each folder: its own, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
