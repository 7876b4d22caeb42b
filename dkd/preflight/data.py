"""Whether the recipe's images can be opened, read and transformed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dkd.build.data import (
    KnnSources,
    build_image_pipeline,
    decode_into_memory,
    open_labelled,
    open_part,
    open_validation_part,
)
from dkd.build.objective import class_weights
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import classes, data_seed
from dkd.data import DataError, ImagePipeline
from dkd.data.sources import (
    ImageSource,
    PartOfSource,
    check_labels,
    check_names,
    check_spec,
    count_classes,
    count_places,
    match_classes,
    same_images,
    set_aside,
)
from dkd.data.transforms import transforms_by_name
from dkd.launch import Launch
from dkd.preflight.collecting import collect


def place_problems(recipe: Recipe) -> list[Problem]:
    """Return what is wrong with the names of the training and validation images, as far as costs nothing to check."""
    data, problems = recipe.data, list[Problem]()
    for key in ("train", "validation"):
        if isinstance(spec := getattr(data, key), str):
            with collect(problems, f"data.{key}"):
                check_spec(spec)
    problems += knn_place_problems(recipe)
    if isinstance(data.validation, str) and not problems and not data.allow_same_images:
        how = same_images(data.train, data.validation)
        if how is not None:
            problems.append(
                Problem(
                    "data.validation",
                    f"its images are training images: {how}; name other images, set some aside with "
                    "data.validation=0.1, or allow it with data.allow_same_images=true",
                )
            )
    return problems


def knn_place_problems(recipe: Recipe) -> list[Problem]:
    """Return what is wrong with the names of the images of `evaluation.knn`."""
    section, data, problems = recipe.evaluation.knn, recipe.data, list[Problem]()
    if section is None:
        return []
    named = {"train": section.train, "validation": section.validation}
    for key, spec in named.items():
        if spec is not None:
            with collect(problems, f"evaluation.knn.{key}"):
                check_spec(spec)
    bank, queries = section.train or data.train, section.validation or data.validation
    if not problems and any(named.values()) and isinstance(queries, str) and not data.allow_same_images:
        with collect(problems, "evaluation.knn.validation"):
            if (how := same_images(bank, queries)) is not None:
                raise DataError(
                    f"its images are those among which neighbours are looked for: {how}; name other images, or allow "
                    "it with data.allow_same_images=true"
                )
    return problems


def count_classes_of(recipe: Recipe) -> int:
    """Return the number of classes that the training data show. Raises RecipeError: the data cannot be opened, or their
    labels are no class indices."""
    problems = place_problems(recipe)
    with collect(problems, "data.train", ValueError):
        if not problems:
            return count_classes(open_part(recipe.data, "train"))
    raise RecipeError(problems)


def open_sources(recipe: Recipe, launch: Launch) -> tuple[ImageSource, ImageSource | None]:
    """Return training and validation images, opened and checked against the recipe; small training sets are decoded
    into memory.

    Returns:
        The validation images have the training data's class indices; None: nothing is evaluated.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    pipeline, data = build_image_pipeline(recipe), recipe.data
    training: ImageSource | None = None
    validation: ImageSource | None = None
    texts = False
    with collect(problems, "data.train", ValueError):  # pyarrow's errors are some
        training = open_part(data, "train")
        texts = getattr(training, "has_text_labels", False)
        _check_labels(recipe, training, classes(recipe))
        if isinstance(data.validation, float):
            with collect(problems, "data.validation"):
                training, validation = set_aside(training, data.validation, data_seed(recipe))
        class_weights(recipe, training)
        for each in pipeline.by_epoch:
            _check_first(recipe, training, each.transform, each.image_size, "transforms", problems)
        if not problems:
            training = decode_into_memory(data, training, launch.local_world_size)
    if isinstance(data.validation, str):
        with collect(problems, "data.validation", ValueError):
            validation = open_part(data, "validation")
            if training is not None:
                match_classes(training.class_names, validation, texts)
            _check_labels(recipe, validation, classes(recipe))
    if validation is not None:
        key = "transforms" if isinstance(data.transforms, str) else "validation_transforms"
        with collect(problems, "data.validation", ValueError):
            _check_first(recipe, validation, pipeline.validation, pipeline.image_size, key, problems)
    if training is not None and len(training) < recipe.train.global_batch:
        problems.append(
            Problem(
                "train.global_batch",
                f"{recipe.train.global_batch} is more than the {len(training)} training images; make it smaller",
            )
        )
    if problems or training is None:
        raise RecipeError(problems)
    return training, validation


def open_knn(recipe: Recipe, training: ImageSource | None, validation: ImageSource | None) -> KnnSources | None:
    """Return the images that the k-NN accuracy is measured on, opened and checked; None where the recipe asks for none.

    Args:
        training, validation: as `open_sources` returns them; None: not used, since the recipe names others.

    Raises:
        RecipeError: with every problem found.
    """
    section, problems = recipe.evaluation.knn, list[Problem]()
    if section is None:
        return None
    pipeline, opened = build_image_pipeline(recipe), list[ImageSource]()
    transforms = "transforms" if isinstance(recipe.data.transforms, str) else "validation_transforms"
    for key, own, spec in (("train", training, section.train), ("validation", validation, section.validation)):
        path = f"evaluation.knn.{key}"
        with collect(problems, path, ValueError):
            if spec is None and own is not None:
                source = own
                if key == "validation" and section.train is not None:
                    # Its labels become those of the bank, while evaluations keep those of the training data.
                    source = PartOfSource(own, np.arange(len(own)))
            else:
                assert spec is not None  # rules.py asks for one
                source = open_labelled(recipe, spec, training=key == "train")
                _check_first(recipe, source, pipeline.validation, pipeline.image_size, transforms, problems)
            if opened and (section.train is not None or spec is not None):
                match_classes(opened[0].class_names, source, getattr(opened[0], "has_text_labels", False))
            _check_voted(source, opened[0] if opened else source)
            opened.append(source)
    if problems:
        raise RecipeError(problems)
    bank, queries = opened
    return KnnSources(bank, queries, count_places(bank))


def _check_voted(source: ImageSource, bank: ImageSource) -> None:
    """Check that the labels of a source are classes of the images that vote. Raises DataError."""
    if len(source) == 0:
        raise DataError("the data set is empty")
    check_names(source.class_names or [])
    classes, low, high = count_places(bank), int(source.labels.min()), int(source.labels.max())
    if low < 0:
        raise DataError(f"labels go from {low} to {high}; a label is the index of a class, counted from 0")
    if classes < 2:
        raise DataError("all images are of one class: name the folder that holds the folders of the classes")
    if high >= classes:
        raise DataError(f"labels go up to {high}, but the images that vote have the classes 0 … {classes - 1}")


def _check_labels(recipe: Recipe, source: ImageSource, classes: int) -> None:
    """Check the labels of a source, or that it has images where they have no labels. Raises DataError."""
    if recipe.data.labels:
        check_labels(source, classes)
    elif len(source) == 0:
        raise DataError("the data set is empty")


def _check_first(
    recipe: Recipe, source: ImageSource, transform: Callable, size: int, key: str, problems: list[Problem]
) -> None:
    """Read the first image and transform it to a size; what is wrong with the transform joins `problems`. Raises
    DataError."""
    image = _first_image(source, recipe.data.on_error == "skip")
    with collect(problems, f"data.{key}"):
        asks = "data.image_size" if size == build_image_pipeline(recipe).image_size else "data.train_image_size"
        _check_transformed(image, transform, size, asks)


def open_validation(recipe: Recipe, classes: int, class_names: list[str] | None = None) -> ImageSource:
    """Return the validation images alone, checked as `open_sources` checks them.

    Args:
        classes: outputs of the model to be evaluated.
        class_names: of these outputs; None: not known.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    pipeline = image_pipeline(recipe, problems)
    with collect(problems, "data.validation", ValueError):
        check_spec(recipe.data.validation if isinstance(recipe.data.validation, str) else recipe.data.train)
        source = open_validation_part(recipe)
        if source is None:
            raise DataError("is null: name the images to evaluate, such as data.validation=folder:PATH")
        match_classes(class_names, source)
        _check_labels(recipe, source, classes)
        if pipeline is not None:
            image = _first_image(source, recipe.data.on_error == "skip")
            _check_transformed(image, pipeline.validation, pipeline.image_size)
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


def _check_transformed(image: torch.Tensor, transform: Callable, size: int, asks: str = "data.image_size") -> None:
    try:
        made = transform(image)
    except Exception as error:  # a transform's own code
        raise DataError(
            f"the transforms fail on an image of {tuple(image.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.Tensor) or tuple(made.shape) != (3, size, size) or made.dtype != torch.uint8:
        what = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
        raise DataError(
            f"the transforms make {what} of an image of {tuple(image.shape)}; {asks} asks for torch.uint8 (3, "
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
