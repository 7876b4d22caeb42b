"""Describe what a recipe would train: `dkd train --dry-run`."""

from __future__ import annotations

from dkd import launch
from dkd.build import assembly, recipe_objects
from dkd.commands.tap_table import tap_table
from dkd.config import Recipe
from dkd.engines import engine
from dkd.models import ModelSpec, build_on_meta
from dkd.preflight import checks, hardware


def describe(recipe: Recipe) -> str:
    """Open and check the data, and return lines about data, batch, steps, models, taps and objective.

    Raises:
        RecipeError: the data cannot be opened or do not fit the recipe.
    """
    world_size = launch.world_size()
    recipe, chosen = hardware.settled_here(recipe)
    training, validation = checks.open_sources(recipe)
    size = recipe_objects.build_image_pipeline(recipe).image_size
    train = recipe.train
    steps = len(training) // train.global_batch
    order = assembly.build_order(recipe, training, 0, world_size)
    total = min(steps * train.epochs, train.max_steps or steps * train.epochs)
    lines = [
        f"run         {recipe.run.dir}",
        f"data        {len(training)} training images, {len(validation)} for validation, {recipe.data.classes} "
        f"classes, {size}×{size}",
        f"batch       {train.global_batch} = {engine.micro_batch(recipe, world_size)} × {world_size} processes × "
        f"{engine.micro_steps(recipe, world_size)} micro-steps",
        f"steps       {steps} an epoch, {total} in all",
        *(f"hardware    {line}" for line in chosen),
        f"student     {recipe.student.name}, {_parameters(recipe_objects.student_spec(recipe)):,} parameters",
    ]
    if recipe.teacher is not None:
        teacher = recipe.teacher
        lines.append(
            f"teacher     {teacher.name}, {_parameters(recipe_objects.teacher_spec(recipe)):,} parameters, weights "
            f"{teacher.weights}"
        )
        lines += [f"{name:<11} {text}" for name, text in tap_table(recipe, size, assembly.gram_rows(recipe, order))]
    objective = assembly.build_objective(recipe, order, steps * train.epochs)
    weights = ", ".join(f"{term.weight(0):g} · {term.name}" for term in objective.terms)
    lines.append(f"objective   {weights} (at step 1)")
    return "\n".join([*lines, "nothing was trained"])


def _parameters(spec: ModelSpec) -> int:
    return sum(p.numel() for p in build_on_meta(spec).parameters())
