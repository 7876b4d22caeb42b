"""Fill in what a recipe leaves to its data and models: the number of classes, and the teacher's own input.

Everything after this reads these from the recipe, and RUN/recipe.yaml states them.
"""

from __future__ import annotations

from dkd.build.data import build_image_pipeline
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import teacher_key, teacher_views, with_teacher
from dkd.config.rules import broken_rules
from dkd.config.schema import Normalization, StudentSection, TeacherSection
from dkd.errors import InputError
from dkd.models import ModelSpec, StatedInput, UnknownModelError, stated_class_count, stated_input
from dkd.preflight.data import count_classes_of, image_pipeline


def complete(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with everything that its data and its models state, and lines that report it. A complete recipe
    stays as it is.

    Raises:
        RecipeError: the data cannot be opened to count their classes, or what they show breaks a rule.
    """
    lines: list[str] = []
    if recipe.data.classes is None:
        counted, where = (
            (count_classes_of(recipe), "counted in data.train") if recipe.data.labels else _teachers_classes(recipe)
        )
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": counted})})
        lines.append(f"{counted} classes, {where}")
        if problems := broken_rules(recipe):
            raise RecipeError(problems)
    wrong: list[Problem] = []
    if image_pipeline(recipe, wrong) is None:
        return recipe, lines  # `check` reports these problems, with the others
    for name, view in teacher_views(recipe):
        completed, about_teacher = _complete_teacher(view)
        assert completed.teacher is not None
        recipe = with_teacher(recipe, name, completed.teacher)
        lines += [line.replace("teacher.", f"{teacher_key(name)}.") if name else line for line in about_teacher]
    return recipe, lines


def _teachers_classes(recipe: Recipe) -> tuple[int, str]:
    """Return the number of classes of the teacher, and where it is stated, for images without labels. Raises
    RecipeError."""
    teacher = recipe.teacher
    assert teacher is not None  # without labels, each loss needs one
    if teacher.classes is not None:
        return teacher.classes, "as teacher.classes states"
    spec = ModelSpec(teacher.name, 2, teacher.norm, teacher.options)
    try:
        found = stated_class_count(spec, teacher.weights)
    except UnknownModelError as error:
        raise RecipeError.at("teacher.name", error) from error
    except InputError as error:
        raise RecipeError.at("teacher.weights", error) from error
    if found is None:
        raise RecipeError.at(
            "data.classes",
            "the images have no labels to count, and the teacher's weights state no classes; write teacher.classes, "
            "the outputs of the teacher's head, or data.classes, those of the student's (any number, where no loss "
            "reads logits)",
        )
    return found, "as the teacher's weights state"


def _complete_teacher(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Give the teacher the input that its weights state, where the recipe names none and the student's is another."""
    teacher = recipe.teacher
    if teacher is None or (teacher.normalization is not None and teacher.input_size is not None):
        return recipe, []
    stated = _stated(teacher)
    if stated is None or (stated.normalization is None and stated.size is None):
        return recipe, _note_unstated(recipe)
    pipeline, update, lines = build_image_pipeline(recipe), dict[str, object](), list[str]()
    normalize = pipeline.normalize
    if stated.normalization is None:
        lines += _note_unstated(recipe)
    elif teacher.normalization is None and stated.normalization != (tuple(normalize.mean), tuple(normalize.std)):
        mean, std = stated.normalization
        update["normalization"] = Normalization(mean=list(mean), std=list(std))
        lines.append(f"teacher.normalization: mean {_show(mean)}, std {_show(std)}, as {stated.source} states")
    if teacher.input_size is None and stated.size is not None and pipeline.sizes != [stated.size]:
        update["input_size"] = stated.size
        lines.append(f"teacher.input_size: {stated.size} pixels, as {stated.source} states")
    return recipe.model_copy(update={"teacher": teacher.model_copy(update=update)}), lines


def _note_unstated(recipe: Recipe) -> list[str]:
    """Return a line where nothing states the input that a teacher was trained on."""
    teacher = recipe.teacher
    if teacher is None or teacher.normalization is not None or teacher.weights == "random":
        return []
    normalize = build_image_pipeline(recipe).normalize
    return [
        f"note: the teacher's weights state no normalisation; it gets the student's, mean {_show(normalize.mean)} and "
        f"std {_show(normalize.std)}; set teacher.normalization where it was trained with another one"
    ]


def compare_student(recipe: Recipe) -> list[str]:
    """Return a line where the student's weights were trained on another normalisation than the recipe's."""
    stated = _stated(recipe.student)
    normalize = build_image_pipeline(recipe).normalize
    found = None if stated is None else stated.normalization
    if stated is None or found is None or found == (tuple(normalize.mean), tuple(normalize.std)):
        return []
    return [
        f"note: the student's weights were trained with mean {_show(found[0])} and std {_show(found[1])} "
        f"({stated.source}), the recipe normalises by mean {_show(normalize.mean)} and std {_show(normalize.std)}; "
        "set data.normalization to keep the weights' own"
    ]


def _stated(section: StudentSection | TeacherSection) -> StatedInput | None:
    """Return the input that a model's weights state. What is wrong with the weights, `check` reports with everything
    else that is wrong."""
    try:
        return stated_input(section.name, section.weights, section.options)
    except (InputError, OSError):
        return None


def _show(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
