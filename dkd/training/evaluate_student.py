"""Exact evaluation of a student on disk, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dkd.build.data import build_image_pipeline, loader_workers
from dkd.config import Recipe, RecipeError, load_recipe, parse_overrides
from dkd.data import EvaluationLoader
from dkd.data.loader import Batch
from dkd.data.sources import runs_user_code
from dkd.distributed.process_group import open_process_group
from dkd.engines.arithmetic import Arithmetic, device_type
from dkd.engines.opening import open_engine
from dkd.launch import Launch
from dkd.models import LogitsOnly, UnknownModelError, WeightsError, load_student, read_description, student_spec
from dkd.preflight.data import open_validation
from dkd.preflight.hardware import settle
from dkd.training.evaluation import Evaluation, evaluate

ALLOWED_OVERRIDES = ("data.", "evaluation.", "train.precision", "train.channels_last")


@dataclass(frozen=True)
class StudentEvaluation:
    """Holds what was evaluated, and the result.

    Args:
        weights: the student's file.
        student: name of its architecture.
        validation: the data, as a recipe names them.
        notes: what was chosen for this hardware.
    """

    weights: Path
    student: str
    validation: str
    result: Evaluation
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        named = {"weights": str(self.weights), "student": self.student, "validation": self.validation}
        return {**named, **self.result.facts()}


def evaluate_student(
    target: str | Path, overrides: Sequence[str] = (), trust_code: bool = False, launch: Launch | None = None
) -> StudentEvaluation:
    """Evaluate the student of a run, a checkpoint or a weights file on the run's validation data. A collective.

    Args:
        target: a run directory, RUN/checkpoints/step_N, or a .safetensors file in one of them.
        overrides: keys of the run's recipe, such as data.validation=...
        trust_code: as `load_student`.
        launch: of this process; None: as its environment describes it.

    Raises:
        RecipeError: what is missing or does not fit.
    """
    launch = launch or Launch.read()
    weights, recipe = _find(Path(target), overrides, launch.world_size)
    try:
        description = read_description(weights)
        spec = student_spec(description)
        student = load_student(weights, trust_code)
    except (WeightsError, UnknownModelError) as error:
        raise RecipeError.at("", error) from error
    data = str(recipe.data.validation)
    for place in {data, recipe.data.train} if isinstance(recipe.data.validation, float) else {data}:
        if runs_user_code(place) and not trust_code:
            raise RecipeError.at(
                "data.validation", f"{place!r} is code to be imported and run; allow it with --trust-code"
            )
    validation = open_validation(recipe, spec.classes, description.get("class_names"))

    open_process_group(launch, device_type(launch.asks_for_cpu) == "cpu", recipe.run.start_timeout)
    recipe, notes = settle(recipe, launch)
    untracked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"trackers": []})})
    device = open_engine(untracked, launch, weights.parent).device
    batches = EvaluationLoader(
        validation,
        build_image_pipeline(recipe).validation,
        recipe.evaluation.batch,
        launch.rank,
        launch.world_size,
        loader_workers(recipe.data, validation, launch.local_world_size),
        image_size=build_image_pipeline(recipe).image_size,
        timeout=recipe.run.start_timeout,
    )
    result = evaluate(_logits(student, recipe, device), batches, device, recipe.data.on_error == "skip")
    assert result is not None
    return StudentEvaluation(weights, spec.name, data, result, tuple(notes))


def _logits(student: torch.nn.Module, recipe: Recipe, device: torch.device) -> Any:
    """Return a function from a batch to the student's logits (b, K), as training computes them."""
    normalize = build_image_pipeline(recipe).normalize
    arithmetic = Arithmetic.of(recipe)
    dtype, autocast = arithmetic.dtype, arithmetic.autocast
    placed = LogitsOnly(arithmetic.place(student, device))

    def logits_of(batch: Batch) -> torch.Tensor:
        images = batch.images.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits: torch.Tensor = placed(normalize(images, dtype).to(memory_format=arithmetic.memory_format))
        return logits

    return logits_of


def _find(target: Path, overrides: Sequence[str], world_size: int) -> tuple[Path, Recipe]:
    """Return the student's file and the recipe of its run. Raises RecipeError."""
    if not target.exists():
        raise RecipeError.at("", f"no such run, checkpoint or weights file: {str(target)!r}")
    for keys, _ in parse_overrides(overrides):
        if not ".".join(keys).startswith(ALLOWED_OVERRIDES):
            raise RecipeError.at(
                ".".join(keys), f"cannot be changed in an evaluation; what can: {', '.join(ALLOWED_OVERRIDES)}"
            )
    weights = target / "student.safetensors" if target.is_dir() else target
    folders = [weights.parent, *weights.resolve().parents[1:3]]
    path = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    if path is None:
        raise RecipeError.at("", f"{str(weights.parent)!r} belongs to no run: there is no recipe.yaml in it or above")
    # What is evaluated is the student alone, in batches of its own: these fit any launch.
    alone = ["teacher=null", "losses={}", f"train.global_batch={world_size}", "train.micro_batch=null"]
    return weights, load_recipe(path, [*overrides, *alone])
