"""Whether the recipe's models exist, and their taps and pairs fit. On meta tensors: seconds, no memory."""

from __future__ import annotations

from collections.abc import Sequence

from dkd.build.feature_losses import Given, adapter_problem
from dkd.build.models import student_head, student_spec, teacher_spec
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import teacher_key, teacher_views
from dkd.config.losses import FormSection
from dkd.losses.attention_transfer import token_grid, tokens_of_both
from dkd.models import (
    AS_BUILT,
    FreezingError,
    Head,
    StatedClasses,
    TapError,
    UnknownModelError,
    build_on_meta,
    check_weights,
    head_keys,
    output_shapes,
    stated_classes,
    unreached_parameters,
)
from dkd.models.feature_reader import feature_width
from dkd.preflight.collecting import collect, input_errors_at
from dkd.preflight.custom_losses import check_custom_loss

Shapes = dict[str, tuple[int, ...]]


def problems_at_sizes(
    recipe: Recipe, image_sizes: Sequence[int], micro_batch: int, with_weights: bool = True
) -> list[Problem]:
    """Return what is wrong with models, taps and pairs at the first of several image sizes at which anything is.
    Arguments as `model_problems`."""
    for number, size in enumerate(image_sizes):
        found = model_problems(recipe, size, micro_batch, with_weights and number == 0)
        if found:
            return found
    return []


def model_problems(recipe: Recipe, image_size: int, micro_batch: int, with_weights: bool = True) -> list[Problem]:
    """Return what is wrong with models, taps and pairs.

    Args:
        image_size: pixels, of the student's input.
        micro_batch: b.
        with_weights: also that files of weights are there and fit.
    """
    problems: list[Problem] = []
    student = _shapes(recipe, "student", image_size, micro_batch, with_weights, problems)
    teachers: dict[str, Shapes | None] = {}
    for name, view in teacher_views(recipe):
        assert view.teacher is not None
        found: list[Problem] = []
        size = view.teacher.input_size or image_size
        teachers[name] = teacher = _shapes(view, "teacher", size, micro_batch, with_weights, found)
        if student is not None and teacher is not None:
            found += _pair_problems(view, student, teacher, name, min(2, micro_batch))
        problems += [_renamed(problem, name, recipe, view) for problem in found]
    for i, custom in enumerate(recipe.losses.custom):
        with collect(problems, f"losses.custom.{i}.loss"):
            check_custom_loss(recipe, custom, student, teachers.get(custom.teacher or ""), min(2, micro_batch))
    if student is not None and recipe.evaluation.knn is not None:
        with collect(problems, "evaluation.knn.tap"):
            feature_width(student_spec(recipe), recipe.evaluation.knn.tap, image_size)
    return problems


def _renamed(problem: Problem, name: str, recipe: Recipe, view: Recipe) -> Problem:
    """Return a problem of the view of one teacher with the paths of the whole recipe."""
    path = problem.path
    if path.split(".")[0] == "teacher":
        path = teacher_key(name) + path.removeprefix("teacher")
    for number, custom in enumerate(view.losses.custom):
        if path.startswith(f"losses.custom.{number}."):
            rest = path.removeprefix(f"losses.custom.{number}.")
            return Problem(f"losses.custom.{recipe.losses.custom.index(custom)}.{rest}", problem.message)
    return Problem(path, problem.message)


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
            try:
                _check_reached(recipe, micro_batch, image_size, list(shapes or ()))
            except FreezingError as error:
                problems.append(Problem("student.freeze", str(error)))
    if len(problems) > found:
        return None
    if logits != (spec.classes,):
        problems.append(
            Problem(
                f"{role}.name", f"{spec.name!r} yields logits of shape {logits} for one image, not ({spec.classes},)"
            )
        )
    if role == "student" and recipe.student.head == "new":
        with collect(problems, "student.head"):
            if recipe.student.weights == AS_BUILT or not head_keys(spec):
                raise UnknownModelError(
                    "new needs a model that is built with any number of classes, and weights that are loaded into it"
                )
    if with_weights and section.weights not in (None, "random"):
        with collect(problems, f"{role}.weights"):
            keeps = role == "teacher" or recipe.student.head == "keep"
            head = Head(head_keys(spec), "keep") if keeps else student_head(recipe)
            check_weights(build_on_meta(spec), spec.name, section.weights, head)
    if shapes is None:
        shapes = {}
        for path, tap in taps:
            if tap not in shapes:
                with collect(problems, path):
                    shapes[tap] = output_shapes(spec, [tap], image_size)[1][tap]
    return shapes


def _check_reached(recipe: Recipe, micro_batch: int, image_size: int, taps: list[str]) -> None:
    """Check that gradients reach the student's parameters: an error in DDP where they do not.

    Raises:
        FreezingError: of student.freeze.
        UnknownModelError: no gradient reaches a parameter from what the losses read.
    """
    spec, reads_logits = student_spec(recipe), bool(recipe.losses.reads_logits)
    unreached = unreached_parameters(spec, micro_batch, image_size, recipe.student.freeze, taps, reads_logits)
    named = ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
    if unreached and reads_logits:
        tapped = " or the tapped features" if taps else ""
        raise UnknownModelError(
            f"{spec.name!r}: no gradient reaches {named} from the logits{tapped}; remove them, or name them in "
            "student.freeze"
        )


def check_class_order(recipe: Recipe, class_names: list[str] | None) -> list[str]:
    """Compare the classes that each teacher's weights state with those of the data, where a loss learns from its
    logits.

    Args:
        class_names: of the data; None: they name none.

    Returns:
        A line to report for each teacher where the two cannot be compared.

    Raises:
        RecipeError: they are other classes, or in another order.
    """
    lines = []
    for name, view in teacher_views(recipe):
        lines += _check_class_order(view, class_names, f"{teacher_key(name)}.weights")
    return lines


def _check_class_order(recipe: Recipe, class_names: list[str] | None, path: str) -> list[str]:
    teacher = recipe.teacher
    if (
        teacher is None
        or not recipe.losses.needs_teacher_logits
        or class_names is None
        or not teacher.check_class_names
    ):
        return []
    with input_errors_at(path):
        stated = stated_classes(teacher.name, teacher.weights)
    if stated is None:
        if teacher.weights == "random":
            return []
        return [
            f"note: the teacher's weights name no classes; its logits are taken to be {_begin(class_names)}, in order"
        ]
    problem, note = compare_classes(stated, class_names)
    if problem is not None:
        raise RecipeError.at(
            path,
            f"{problem}, and losses.{recipe.losses.needs_teacher_logits[0]} compares logits by place; take a teacher "
            "of these classes, or give teacher.check_class_names=false where only the names differ",
        )
    return [] if note is None else [note]


def compare_classes(stated: StatedClasses, class_names: list[str]) -> tuple[str | None, str | None]:
    """Compare the classes that weights state with those of the data.

    Returns:
        How they differ, as a clause about the weights, or None; and a line to report where they cannot be compared, or
        None.
    """
    if stated.names == class_names:
        return None, None
    same, moved = _places(stated.names, class_names)
    # Other sources describe the same classes in words of their own: ImageNet's have lists of synonyms, of which a few
    # are those of two classes.
    if not stated.by_dkd and moved <= len(class_names) // 100:
        if same + moved == len(class_names):
            return None, None
        return None, (
            f"note: {same} of the teacher's {len(stated.names)} classes ({_begin(stated.names)}) have the names of the "
            f"data's ({_begin(class_names)}); all are taken to be the same ones, in the same order"
        )
    different = [i for i, (a, b) in enumerate(zip(stated.names, class_names, strict=False)) if a != b]
    place = different[0] if different else min(len(stated.names), len(class_names))
    theirs, ours = (names[place] if place < len(names) else "no class" for names in (stated.names, class_names))
    same_set = {name.lower() for name in stated.names} == {name.lower() for name in class_names}
    what = "the same classes in another order" if same_set or not stated.by_dkd else "other classes"
    return f"were trained on {what}: logit {place} is {theirs!r} there and {ours!r} in the data", None


def _places(stated: list[str], names: list[str]) -> tuple[int, int]:
    """Count the classes whose names are at the same place of both lists, and those that are at another one. A name may
    be a list of synonyms with commas between them."""
    places: dict[str, set[int]] = {}
    for place, name in enumerate(names):
        for word in _synonyms(name):
            places.setdefault(word, set()).add(place)
    found = [set().union(*(places.get(word, set()) for word in _synonyms(name))) for name in stated]
    same = sum(place in candidates for place, candidates in enumerate(found))
    return same, sum(bool(candidates) for candidates in found) - same


def _synonyms(name: str) -> set[str]:
    return {word.strip().lower() for word in name.split(",")}


def _begin(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _pair_problems(recipe: Recipe, student: Shapes, teacher: Shapes, name: str, rows: int) -> list[Problem]:
    """Return what is wrong with the shapes of pairs: one block for each loss that has rules of shapes. A block calls
    what the loss itself raises, as `token_grid`, so that there is one text."""
    problems = []
    given = Given(student, {name: teacher}, seed=recipe.run.seed)
    for key, section in recipe.losses.named():
        if isinstance(section, FormSection) and all(s in student and t in teacher for s, t in section.paths):
            problem = adapter_problem(key, section, given, rows)
            problems += [] if problem is None else [Problem(f"losses.{key}", problem)]
    at = recipe.losses.at
    for i, (s, t) in enumerate(at.paths if at is not None else []):
        if s not in student or t not in teacher:
            continue
        shapes = f"{s!r} yields {student[s]}, {t!r} yields {teacher[t]}"
        try:
            tokens = tokens_of_both(at.class_tokens if at else None)
            maps = [
                token_grid(shape, count, square=True)
                for shape, count in zip((student[s], teacher[t]), tokens, strict=True)
            ]
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
