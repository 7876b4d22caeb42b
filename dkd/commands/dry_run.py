"""Describe what a recipe would train: `dkd train --dry-run`."""

from __future__ import annotations

from pathlib import Path

import torch

from dkd.build.data import build_image_pipeline, build_sampler
from dkd.build.models import expected_notes, student_spec, teacher_spec
from dkd.build.objective import build_objective, class_weights, compared_samples
from dkd.build.teacher_cache import planned_values
from dkd.commands.batch_picture import draw_first_batch
from dkd.commands.tap_table import tap_table
from dkd.config import Recipe
from dkd.config.derived import caches, run_length, teacher_views
from dkd.data import GlobalBatchSampler, ImageSource
from dkd.distillation.stored_teacher import Share
from dkd.launch import Launch
from dkd.models import ModelSpec, build_on_meta
from dkd.preflight.completion import compare_student
from dkd.preflight.data import open_knn, open_sources
from dkd.preflight.hardware import settled_here
from dkd.preflight.models import check_class_order
from dkd.text import shorten, size_in_bytes


def describe(recipe: Recipe, launch: Launch, picture: Path | None = None) -> str:
    """Open and check the data, and return lines about data, batch, steps, models, taps and objective.

    Args:
        picture: where the main process draws the first batch; None: nowhere.

    Raises:
        RecipeError: the data cannot be opened or do not fit the recipe, or the picture cannot be written.
    """
    recipe, chosen = settled_here(recipe, launch)
    training, validation = open_sources(recipe, launch)
    open_knn(recipe, training, validation)
    notes = [*compare_student(recipe), *check_class_order(recipe, training.class_names), *expected_notes(recipe)]
    pipeline = build_image_pipeline(recipe)
    size = pipeline.train_size
    train, without = recipe.train, "" if recipe.data.labels else " without labels"
    sampler = build_sampler(recipe, training, launch)
    steps = sampler.steps_per_epoch
    planned, total = run_length(recipe, steps)
    lines = [
        f"run         {recipe.run.dir}",
        f"data        {len(training)} training images{without}, {_count_validation(validation)}, "
        f"{recipe.data.classes} classes{_name_classes(training.class_names)}, {pipeline.describe_sizes()}",
        f"batch       {train.global_batch} = {sampler.micro_batch} × {launch.world_size} processes × "
        f"{sampler.micro_steps} micro-steps",
        f"steps       {steps} an epoch, {total} in all",
        *(f"hardware    {line}" for line in chosen),
        f"student     {recipe.student.name}, {_parameters(student_spec(recipe)):,} parameters",
    ]
    for name, view in teacher_views(recipe):
        assert view.teacher is not None
        what = f"{name}: {view.teacher.name}" if name else view.teacher.name
        count = f"{_parameters(teacher_spec(view)):,} parameters"
        lines.append(f"teacher     {what}, {count}, weights {view.teacher.weights}")
    lines += _describe_caches(recipe, sampler, launch, total)
    if teacher_views(recipe):
        table = tap_table(recipe, size, lambda section: compared_samples(section, sampler))
        lines += [f"{name:<11} {text}" for name, text in table]
    lines += [f"note        {note.removeprefix('note: ')}" for note in notes]
    objective = build_objective(recipe, sampler, planned, torch.device("meta"), class_weights(recipe, training))
    trained = {name: sum(p.numel() for p in each.module.parameters()) for name, each in objective.adapters.items()}
    if trained:
        counts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
        lines.append(f"trained too {counts} parameters, by losses; no part of the student")
    weights = ", ".join(f"{term.weight(0):g} · {term.name}" for term in objective.terms)
    lines.append(f"objective   {weights} (at step 1)")
    if picture is not None and launch.is_main:
        lines.append(f"picture     {draw_first_batch(picture, recipe, launch, training, validation)}")
    return "\n".join([*lines, "nothing was trained"])


def _describe_caches(recipe: Recipe, sampler: GlobalBatchSampler, launch: Launch, total: int) -> list[str]:
    """Return a line about the size of each teacher's cache."""
    share = Share(sampler.rank, sampler.world_size, sampler.micro_batch, sampler.micro_steps)
    period = recipe.data.augmentation_period
    steps = min(total, total if period is None else period * sampler.steps_per_epoch)
    lines = []
    for name, values in planned_values(recipe, share, launch.local_world_size).items():
        each, whose = sum(value.bytes_per_sample for value in values), f"{name}: " if name else ""
        whole = size_in_bytes(each * steps * sampler.global_batch)
        lines.append(f"cache       {whose}{caches(recipe)[name].dir}, {size_in_bytes(each)} an image, {whole} in all")
    return lines


def _count_validation(validation: ImageSource | None) -> str:
    return "none for validation: nothing is evaluated" if validation is None else f"{len(validation)} for validation"


def _name_classes(names: list[str] | None) -> str:
    return "" if names is None else f" ({shorten(', '.join(names), 60)})"


def _parameters(spec: ModelSpec) -> int:
    return sum(p.numel() for p in build_on_meta(spec).parameters())
