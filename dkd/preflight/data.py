"""Whether the recipe's images can be opened, read and transformed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dkd.build.data import build_image_pipeline, decode_into_memory, open_part
from dkd.config import Problem, Recipe, RecipeError
from dkd.data import DataError, ImagePipeline
from dkd.data.sources import ImageSource, check_class_names, check_labels, check_spec
from dkd.data.transforms import transforms_by_name
from dkd.launch import Launch
from dkd.preflight.collecting import collect


def open_sources(recipe: Recipe, launch: Launch) -> tuple[ImageSource, ImageSource]:
    """Return training and validation images, opened and checked against the recipe; small training sets are decoded
    into memory.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    opened: dict[str, ImageSource] = {}
    pipeline = build_image_pipeline(recipe)
    validation_key = "transforms" if isinstance(recipe.data.transforms, str) else "validation_transforms"
    for part, transform, key in (
        ("train", pipeline.train, "transforms"),
        ("validation", pipeline.validation, validation_key),
    ):
        with collect(problems, f"data.{part}", ValueError):  # pyarrow's errors are some
            opened[part] = open_part(recipe.data, part)
            check_labels(opened[part], recipe.data.classes)
            image = _first_image(opened[part], recipe.data.on_error == "skip")
            with collect(problems, f"data.{key}"):
                _check_transformed(image, transform, pipeline.image_size)
            if part == "train" and not problems:
                opened[part] = decode_into_memory(recipe.data, opened[part], launch.local_world_size)
            if part == "validation" and "train" in opened:
                check_class_names(opened["train"], opened["validation"])
    if "train" in opened and len(opened["train"]) < recipe.train.global_batch:
        images = len(opened["train"])
        problems.append(
            Problem(
                "train.global_batch",
                f"{recipe.train.global_batch} is more than the {images} training images; make it smaller",
            )
        )
    if problems:
        raise RecipeError(problems)
    return opened["train"], opened["validation"]


def open_validation(recipe: Recipe, classes: int) -> ImageSource:
    """Return the validation images alone, checked as `open_sources` checks them.

    Args:
        classes: outputs of the model to be evaluated.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    pipeline = image_pipeline(recipe, problems)
    with collect(problems, "data.validation", ValueError):
        check_spec(recipe.data.validation)
        source = open_part(recipe.data, "validation")
        check_labels(source, classes)
        if pipeline is not None:
            _check_transformed(
                _first_image(source, recipe.data.on_error == "skip"), pipeline.validation, pipeline.image_size
            )
    if problems:
        raise RecipeError(problems)
    return source


def image_pipeline(recipe: Recipe, problems: list[Problem]) -> ImagePipeline | None:
    """Return transforms and normalisation, or None when they cannot be built; what is wrong with them joins
    `problems`."""
    data, found = recipe.data, len(problems)
    for key, stages in (("transforms", data.transforms), ("validation_transforms", data.validation_transforms)):
        if isinstance(stages, list):
            with collect(problems, f"data.{key}", ValueError):
                transforms_by_name(stages)
    return build_image_pipeline(recipe) if len(problems) == found else None


def _check_transformed(image: torch.Tensor, transform: Callable, size: int) -> None:
    try:
        made = transform(image)
    except Exception as error:  # a transform's own code
        raise DataError(
            f"the transforms fail on an image of {tuple(image.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.Tensor) or tuple(made.shape) != (3, size, size) or made.dtype != torch.uint8:
        what = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
        raise DataError(
            f"the transforms make {what} of an image of {tuple(image.shape)}; data.image_size asks for torch.uint8 (3, "
            f"{size}, {size})"
        )


def _first_image(source: ImageSource, skip: bool) -> torch.Tensor:
    """Return the first image, or where unreadable ones are skipped the first of a thousand that can be read. Raises
    DataError."""
    last = min(len(source), 1000) - 1 if skip else 0
    for index in range(last):
        try:
            return source.image(index)
        except DataError:
            continue
    return source.image(last)
