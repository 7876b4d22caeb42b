"""Numbers that follow from a recipe and the number of processes."""

from __future__ import annotations

from dkd.config.losses import LossSection
from dkd.config.schema import Recipe, TeacherSection
from dkd.config.teacher_cache import CacheSection


def classes(recipe: Recipe) -> int:
    """Return K, the number of classes, of a recipe that `dkd.preflight.completion` has completed."""
    assert recipe.data.classes is not None, "the recipe has to be completed first"
    return recipe.data.classes


def teacher_views(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Return, for each teacher, its name and the recipe as if it were the only one, with the losses that read it. One
    teacher alone has no name, and its view is the recipe itself."""
    if not recipe.teachers:
        return [] if recipe.teacher is None else [("", recipe)]
    return [
        (
            name,
            recipe.model_copy(update={"teacher": section, "teachers": {}, "losses": recipe.losses.taught_by(name)}),
        )
        for name, section in recipe.teachers.items()
    ]


def teacher_key(name: str) -> str:
    """Return the key of a teacher's section: of one alone, whose name is empty, or of one of several."""
    return f"teachers.{name}" if name else "teacher"


def with_teacher(recipe: Recipe, name: str, section: TeacherSection) -> Recipe:
    """Return the recipe with another section of a teacher."""
    if not name:
        return recipe.model_copy(update={"teacher": section})
    return recipe.model_copy(update={"teachers": {**recipe.teachers, name: section}})


def caches(recipe: Recipe) -> dict[str, CacheSection]:
    """Return the section of each teacher's cache, by the teacher's name; of one alone, the name is empty."""
    found = {name: view.teacher.cache for name, view in teacher_views(recipe) if view.teacher is not None}
    return {name: section for name, section in found.items() if section is not None}


def without_caches(recipe: Recipe) -> Recipe:
    """Return the recipe with teachers that compute in each step."""
    for name, view in teacher_views(recipe):
        if view.teacher is not None and view.teacher.cache is not None:
            recipe = with_teacher(recipe, name, view.teacher.model_copy(update={"cache": None}))
    return recipe


def view_of(recipe: Recipe, section: LossSection) -> Recipe:
    """Return the recipe as the view of the teacher that a loss compares with."""
    return dict(teacher_views(recipe)).get(section.teacher or "", recipe)


def data_seed(recipe: Recipe) -> int:
    """Return the seed of the order of images, of their augmentation and mixing."""
    return recipe.run.seed if recipe.data.seed is None else recipe.data.seed


def micro_batch(recipe: Recipe, world_size: int) -> int:
    """Return b, the samples of one forward on one rank: as the recipe states, or B/W."""
    return recipe.train.micro_batch or max(1, recipe.train.global_batch // world_size)


def micro_steps(recipe: Recipe, world_size: int) -> int:
    """Return A = B / (b·W), the forwards of one rank in one optimizer step."""
    return recipe.train.global_batch // (micro_batch(recipe, world_size) * world_size)


def run_length(recipe: Recipe, steps_per_epoch: int) -> tuple[int, int]:
    """Return the optimizer steps of all epochs, which schedules are drawn over, and those of the run: fewer where
    `train.max_steps` ends it before."""
    planned = steps_per_epoch * recipe.train.epochs
    return planned, min(planned, recipe.train.max_steps or planned)
