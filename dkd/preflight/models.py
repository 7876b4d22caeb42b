"""Whether the recipe's models exist, and their taps and pairs fit. On meta tensors: seconds, no memory."""

from __future__ import annotations

from dkd.build.models import student_spec, teacher_spec
from dkd.build.objective import custom_loss
from dkd.config import Problem, Recipe
from dkd.losses.attention_transfer import token_grid
from dkd.models import TapError, build_on_meta, check_training, check_weights, output_shapes
from dkd.preflight.collecting import collect

Shapes = dict[str, tuple[int, ...]]


def model_problems(recipe: Recipe, image_size: int, micro_batch: int, with_weights: bool = True) -> list[Problem]:
    """Return what is wrong with models, taps and pairs.

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
        with collect(problems, f"losses.custom.{i}.loss"):
            custom_loss(custom)
    if student is not None and teacher is not None:
        problems += _pair_problems(recipe, student, teacher)
    return problems


def _shapes(
    recipe: Recipe, role: str, image_size: int, micro_batch: int, with_weights: bool, problems: list[Problem]
) -> Shapes | None:
    """Return the shapes of the taps of one model that exist, or None when the model itself cannot be had."""
    section = getattr(recipe, role)
    spec = student_spec(recipe) if role == "student" else teacher_spec(recipe)
    taps = [
        (f"losses.{key}.pairs.{i}", pair[0 if role == "student" else 1])
        for key, loss in recipe.losses.named()
        for i, pair in enumerate(loss.paths)
    ]
    logits: tuple[int, ...] = ()
    shapes: Shapes | None = None
    found = len(problems)
    with collect(problems, f"{role}.name"):
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
        with collect(problems, f"{role}.weights"):
            check_weights(build_on_meta(spec), spec.name, section.weights)
    if shapes is None:
        shapes = {}
        for path, tap in taps:
            if tap not in shapes:
                with collect(problems, path):
                    shapes[tap] = output_shapes(spec, [tap], image_size)[1][tap]
    return shapes


def _pair_problems(recipe: Recipe, student: Shapes, teacher: Shapes) -> list[Problem]:
    """Return what is wrong with the shapes of pairs: one block for each loss that has rules of shapes. A block calls
    what the loss itself raises, as `token_grid`, so that there is one text."""
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
