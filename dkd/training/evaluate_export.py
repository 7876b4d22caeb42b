"""Exact evaluation of a student on disk, on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dkd import console, launch
from dkd.build import assembly, recipe_objects
from dkd.config import Recipe, RecipeError, load_recipe, parse_overrides
from dkd.data import EvaluationLoader
from dkd.data.samples import Batch
from dkd.data.sources import runs_user_code
from dkd.engines import engine
from dkd.models import UnknownModelError, WeightsError, load_student, read_description, student_spec
from dkd.preflight import checks, hardware
from dkd.training.evaluation import Evaluation, evaluate

ALLOWED_OVERRIDES = ("data.", "evaluation.", "train.precision", "train.channels_last")


def evaluate_export(target: str, overrides: Sequence[str] = (), trust_code: bool = False) -> Evaluation:
    """Evaluate the student of a run, a checkpoint or a weights file on the run's validation data; print one line on the
    main process.

    Args:
        target: a run directory, RUN/checkpoints/step_N, or a .safetensors file in one of them.
        overrides: keys of the run's recipe, such as data.validation=...
        trust_code: as `load_student`.

    Raises:
        RecipeError: what is missing or does not fit.
    """
    if not Path(target).exists():
        raise RecipeError.at("", f"no such run, checkpoint or weights file: {target!r}")
    for keys, _ in parse_overrides(overrides):
        if not ".".join(keys).startswith(ALLOWED_OVERRIDES):
            raise RecipeError.at(
                ".".join(keys), f"cannot be changed in an evaluation; what can: {', '.join(ALLOWED_OVERRIDES)}"
            )
    weights = Path(target) / "student.safetensors" if Path(target).is_dir() else Path(target)
    recipe = _recipe_of(weights, overrides)
    try:
        spec = student_spec(read_description(weights))
        student = load_student(weights, trust_code)
    except (WeightsError, UnknownModelError) as error:
        raise RecipeError.at("", error) from error
    if runs_user_code(recipe.data.validation) and not trust_code:
        raise RecipeError.at(
            "data.validation", f"{recipe.data.validation!r} is code to be imported and run; allow it with --trust-code"
        )
    validation = checks.open_validation(recipe, spec.classes)

    engine.join(recipe)
    recipe, notes = hardware.settle(recipe)
    accelerator = engine.build_accelerator(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"trackers": []})}), weights.parent
    )
    pipeline = recipe_objects.build_image_pipeline(recipe)
    dtype, memory_format = engine.model_dtype(recipe), engine.model_memory_format(recipe)
    autocast = engine.autocast_dtype(recipe)
    student = engine.place(student, recipe, accelerator.device)
    batches = EvaluationLoader(
        validation,
        pipeline.validation,
        recipe.evaluation.batch,
        accelerator.process_index,
        accelerator.num_processes,
        assembly.loader_workers(recipe.data, validation, launch.local_world_size()),
        image_size=pipeline.image_size,
        timeout=recipe.run.start_timeout,
    )

    def logits_of(batch: Batch) -> torch.Tensor:
        images = batch.images.to(accelerator.device, non_blocking=True)
        with torch.autocast(accelerator.device.type, dtype=autocast, enabled=autocast is not None):
            return student(pipeline.normalize(images, dtype).to(memory_format=memory_format))

    result = evaluate(logits_of, batches, accelerator.device, recipe.data.on_error == "skip")
    assert result is not None
    if accelerator.is_main_process:
        for note in notes:
            console.say(f"dkd: {note}")
        console.show(
            json.dumps(
                {"weights": str(weights), "student": spec.name, "validation": recipe.data.validation, **result.facts()}
            )
        )
    return result


def _recipe_of(weights: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run that `weights` belongs to. Its batch is replaced by one that fits any launch: evaluation
    has its own."""
    folders = [weights.parent, *weights.resolve().parents[1:3]]
    path = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    if path is None:
        raise RecipeError.at("", f"{str(weights.parent)!r} belongs to no run: there is no recipe.yaml in it or above")
    world_size = launch.world_size()
    alone = ["teacher=null", "losses={}"]  # what is evaluated is the student
    return load_recipe(path, [*overrides, f"train.global_batch={world_size}", "train.micro_batch=null", *alone])
