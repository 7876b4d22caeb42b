"""What a recipe names, as objects: architectures, taps, images. Needs no process group and no launch.

Of the rooms that know recipes: training, and reports of finished runs.
"""

from __future__ import annotations

from dkd.config import Recipe
from dkd.config.schema import DataSection, StudentSection, TeacherSection
from dkd.data import ImagePipeline, ImageSource, Normalize, build_pipeline, open_row_groups, open_source
from dkd.data.sources import split_spec
from dkd.models import ModelSpec


def student_spec(recipe: Recipe) -> ModelSpec:
    return _spec(recipe.student, recipe.data.classes)


def teacher_spec(recipe: Recipe) -> ModelSpec:
    assert recipe.teacher is not None
    return _spec(recipe.teacher, recipe.teacher.classes or recipe.data.classes)


def _spec(section: StudentSection | TeacherSection, classes: int) -> ModelSpec:
    return ModelSpec(section.name, classes, section.norm, section.options)


def pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """(student path, teacher path) of all feature losses."""
    losses = recipe.losses
    return [pair for section in (losses.at, losses.sp, *losses.custom) if section is not None for pair in section.paths]


def build_image_pipeline(recipe: Recipe) -> ImagePipeline:
    """Transforms and the student's normalisation."""
    data = recipe.data
    return build_pipeline(data.transforms, data.validation_transforms, data.image_size, _normalize(data.normalization))


def teacher_normalize(recipe: Recipe, student: Normalize) -> Normalize:
    """The teacher's own normalisation, or the student's."""
    own = None if recipe.teacher is None else _normalize(recipe.teacher.normalization)
    return own or student


def _normalize(section: object) -> Normalize | None:
    return None if section is None else Normalize(tuple(section.mean), tuple(section.std))  # type: ignore[attr-defined]


def open_part(data: DataSection, part: str) -> ImageSource:
    """Open data.train or data.validation. Raises DataError."""
    spec = data.train if part == "train" else data.validation
    # What is validated on may be of another kind.
    if data.streaming and (part == "train" or split_spec(spec)[0] in ("parquet", "hub")):
        return open_row_groups(
            spec, training=part == "train", image_column=data.image_column, label_column=data.label_column
        )
    return open_source(
        spec, training=part == "train", root=data.root, image_column=data.image_column, label_column=data.label_column
    )
