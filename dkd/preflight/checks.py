"""Everything that can be checked before a process group opens or a step is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dkd import launch
from dkd.build import assembly, recipe_objects
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.changes import flat
from dkd.data import DataError, ImagePipeline
from dkd.data.sources import ImageSource, check_class_names, check_labels, check_spec
from dkd.data.transforms import transforms_by_name
from dkd.engines import engine
from dkd.errors import InputError
from dkd.global_batch.collectives import all_gather_objects
from dkd.losses.attention_transfer import token_grid
from dkd.models import TapError, build_on_meta, check_training, check_weights, output_shapes
from dkd.runs.directory import check_run_directory
from dkd.runs.launches import IfRunExists

Shapes = dict[str, tuple[int, ...]]


def check(recipe: Recipe, existing: IfRunExists = "resume", allow_recipe_change: bool = False) -> list[Problem]:
    """Files present, models built, taps and pairs checked, launch and recipe in agreement. On meta tensors: seconds, no
    memory.

    Args:
        existing: what is to become of a run that is in `run.dir` already.
        allow_recipe_change: whether that run may go on with another recipe.

    Returns:
        How the recipe differs from that of the run that is to go on.

    Raises:
        RecipeError: with every problem found.
    """
    problems = engine.launch_problems(recipe, launch.world_size())
    changes: list[Problem] = []
    with _collect(problems):
        changes = check_run_directory(recipe, existing, allow_recipe_change)
    for key in ("train", "validation"):
        with _collect(problems, f"data.{key}"):
            check_spec(getattr(recipe.data, key))
    problems += _tracker_problems(recipe)
    pipeline = image_pipeline(recipe, problems)
    if pipeline is not None:
        problems += model_problems(recipe, pipeline.image_size, engine.micro_batch(recipe, launch.world_size()))
    if problems:
        raise RecipeError(problems)
    return changes


def open_sources(recipe: Recipe) -> tuple[ImageSource, ImageSource]:
    """Training and validation images, opened and checked against the recipe; small training sets are decoded into
    memory.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    opened: dict[str, ImageSource] = {}
    pipeline = recipe_objects.build_image_pipeline(recipe)
    validation_key = "transforms" if isinstance(recipe.data.transforms, str) else "validation_transforms"
    for part, transform, key in (
        ("train", pipeline.train, "transforms"),
        ("validation", pipeline.validation, validation_key),
    ):
        with _collect(problems, f"data.{part}", ValueError):  # pyarrow's errors are some
            opened[part] = recipe_objects.open_part(recipe.data, part)
            check_labels(opened[part], recipe.data.classes)
            image = _first_image(opened[part], recipe.data.on_error == "skip")
            with _collect(problems, f"data.{key}"):
                _check_transformed(image, transform, pipeline.image_size)
            if part == "train" and not problems:
                opened[part] = assembly.decode_into_memory(recipe.data, opened[part])
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


# A machine may keep its own copies of files; that they are the same is checked by their content.
_MAY_DIFFER = {
    "run.dir",
    "data.train",
    "data.validation",
    "data.root",
    "data.workers",
    "student.weights",
    "teacher.weights",
}


def check_same_recipe(recipe: Recipe) -> None:
    """Check that all ranks have the same recipe, but for places of files: a machine with an older copy would train
    another thing. A collective. Raises RecipeError on every rank."""
    own = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if key not in _MAY_DIFFER}
    if len(set(all_gather_objects(hashlib.sha256(repr(own).encode()).hexdigest()))) == 1:
        return
    first, *others = all_gather_objects(own)
    for rank, theirs in enumerate(others, 1):
        keys = [key for key in {**first, **theirs} if first.get(key) != theirs.get(key)]
        if keys:
            what = f"on rank {rank}, where rank 0 has"
            raise RecipeError(
                [
                    Problem(key, f"is {theirs.get(key)!r} {what} {first.get(key)!r}; every rank needs the same recipe")
                    for key in keys
                ]
            )


def check_same_teacher(fingerprint: str) -> None:
    """Check that all ranks have loaded the same teacher. A collective. Raises RecipeError on every rank."""
    ranks = all_gather_objects(fingerprint)
    other = next((rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]), None)
    if other is not None:
        raise RecipeError.at(
            "teacher.weights",
            f"rank {other} has loaded other weights ({ranks[other][:12]}) than rank 0 ({ranks[0][:12]}): are the files "
            "the same?",
        )


def check_same_data(training: Mapping[str, Any], validation: Mapping[str, Any]) -> None:
    """Whether all ranks have opened the same data. A collective; the facts are `assembly.data_facts`. Raises
    RecipeError on every rank."""
    for part, facts in (("train", training), ("validation", validation)):
        ranks = all_gather_objects(dict(facts))
        other = next((rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]), None)
        if other is not None:
            counts = f"{ranks[0]['images']} images there, {ranks[other]['images']} here"
            raise RecipeError.at(
                f"data.{part}", f"rank {other} has opened other data than rank 0 ({counts}, or other labels)"
            )


def open_validation(recipe: Recipe, classes: int) -> ImageSource:
    """Validation images alone, checked as `open_sources` checks them.

    Args:
        classes: outputs of the model to be evaluated.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[Problem] = []
    pipeline = image_pipeline(recipe, problems)
    with _collect(problems, "data.validation", ValueError):
        check_spec(recipe.data.validation)
        source = recipe_objects.open_part(recipe.data, "validation")
        check_labels(source, classes)
        if pipeline is not None:
            _check_transformed(
                _first_image(source, recipe.data.on_error == "skip"), pipeline.validation, pipeline.image_size
            )
    if problems:
        raise RecipeError(problems)
    return source


@contextmanager
def _collect(problems: list[Problem], path: str = "", *expected: type[Exception]) -> Iterator[None]:
    """Make a problem at `path` of an error of input, or of the file system, or of another library that is `expected` to
    raise such errors. Any other error is a bug, and is raised."""
    errors: tuple[type[Exception], ...] = (InputError, OSError, *expected)
    try:
        yield
    except RecipeError as error:
        problems += error.problems
    except errors as error:
        problems += RecipeError.at(path, error).problems


def image_pipeline(recipe: Recipe, problems: list[Problem]) -> ImagePipeline | None:
    """Transforms and normalisation, or None when they cannot be built; what is wrong with them joins `problems`."""
    data, found = recipe.data, len(problems)
    for key, stages in (("transforms", data.transforms), ("validation_transforms", data.validation_transforms)):
        if isinstance(stages, list):
            with _collect(problems, f"data.{key}", ValueError):
                transforms_by_name(stages)
    return recipe_objects.build_image_pipeline(recipe) if len(problems) == found else None


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


def _tracker_problems(recipe: Recipe) -> list[Problem]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    problems = []
    for tracker in recipe.run.trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            problems.append(
                Problem(
                    "run.trackers",
                    f"{tracker!r} is not a tracker of Accelerate: {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}",
                )
            )
        elif tracker not in available:
            problems.append(Problem("run.trackers", f"{tracker!r} is not installed: pip install {tracker}"))
    return problems


def model_problems(recipe: Recipe, image_size: int, micro_batch: int, with_weights: bool = True) -> list[Problem]:
    """What is wrong with models, taps and pairs.

    Args:
        image_size: pixels, of the student's input.
        micro_batch: b.
        with_weights: also that files of weights are there and fit.
    """
    problems: list[Problem] = []
    student = _shapes(recipe, "student", image_size, micro_batch, with_weights, problems)
    teacher = None
    if recipe.teacher is not None:
        teacher = _shapes(
            recipe, "teacher", recipe.teacher.input_size or image_size, micro_batch, with_weights, problems
        )
    for i, custom in enumerate(recipe.losses.custom):
        with _collect(problems, f"losses.custom.{i}.loss"):
            assembly.custom_loss(custom)
    if student is not None and teacher is not None:
        problems += _pair_problems(recipe, student, teacher)
    return problems


def _shapes(
    recipe: Recipe, role: str, image_size: int, micro_batch: int, with_weights: bool, problems: list[Problem]
) -> Shapes | None:
    """Shapes of the taps of one model that exist, or None when the model itself cannot be had."""
    section = getattr(recipe, role)
    spec = recipe_objects.student_spec(recipe) if role == "student" else recipe_objects.teacher_spec(recipe)
    losses = recipe.losses
    tapping = [
        ("at", losses.at),
        ("sp", losses.sp),
        *((f"custom.{i}", section) for i, section in enumerate(losses.custom)),
    ]
    taps = [
        (f"losses.{key}.pairs.{i}", pair[0 if role == "student" else 1])
        for key, loss in tapping
        if loss is not None
        for i, pair in enumerate(loss.paths)
    ]
    logits: tuple[int, ...] = ()
    shapes: Shapes | None = None
    found = len(problems)
    with _collect(problems, f"{role}.name"):
        try:
            logits, shapes = output_shapes(spec, list(dict.fromkeys(tap for _, tap in taps)), image_size)
        except TapError:  # of one of the taps, or of the logits
            logits, _ = output_shapes(spec, [], image_size)
        if role == "student":
            check_training(spec, micro_batch, image_size)
    if len(problems) > found:
        return None
    if logits != (spec.classes,):
        problems.append(
            Problem(
                f"{role}.name", f"{spec.name!r} yields logits of shape {logits} for one image, not ({spec.classes},)"
            )
        )
    if with_weights and section.weights not in (None, "random"):
        with _collect(problems, f"{role}.weights"):
            check_weights(build_on_meta(spec), spec.name, section.weights)
    if shapes is None:
        shapes = {}
        for path, tap in taps:
            if tap not in shapes:
                with _collect(problems, path):
                    shapes[tap] = output_shapes(spec, [tap], image_size)[1][tap]
    return shapes


def _pair_problems(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Problem]:
    problems = []
    at = recipe.losses.at
    for i, (s, t) in enumerate(at.paths if at is not None else []):
        if s not in student or t not in teacher:
            continue
        shapes = f"{s!r} yields {student[s]}, {t!r} yields {teacher[t]}"
        try:
            maps = [token_grid(shape, at.class_tokens if at else None) for shape in (student[s], teacher[t])]
        except ValueError as error:
            problems.append(Problem(f"losses.at.pairs.{i}", f"{error}; {shapes}"))
            continue
        if maps[0][1:] != maps[1][1:] and at is not None and at.resize == "error":
            problems.append(
                Problem(
                    f"losses.at.pairs.{i}",
                    f"resolutions differ: {shapes}; ask for losses.at.resize=map (the paper) or features (the public "
                    "implementations)",
                )
            )
    return problems
