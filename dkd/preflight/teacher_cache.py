"""Whether what a recipe's losses read of a teacher can be stored in its cache, and the folder can be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dkd.build.feature_losses import form_of
from dkd.build.objective import custom_term
from dkd.config import Problem, Recipe
from dkd.config.derived import caches, classes, teacher_key, teacher_views
from dkd.config.losses import CrdSection, CustomLossSection, FormSection, GradientAttentionSection, LossSection
from dkd.config.teacher_cache import CacheSection
from dkd.distillation import FeatureTerm
from dkd.distillation.stored_teacher import is_stored
from dkd.user_code import UserCodeError


def cache_problems(recipe: Recipe, with_folders: bool = True) -> list[Problem]:
    """Return what is wrong with the caches of a completed recipe, whose losses can be made.

    Args:
        with_folders: also that their folders can be used.
    """
    sections = caches(recipe)
    views = dict(teacher_views(recipe))
    found: list[Problem] = []
    for name, section in sections.items():
        key, view = f"{teacher_key(name)}.cache", views[name]
        if with_folders:
            found += [Problem(key, reason) for reason in _place_problems(section)]
        outputs = (view.teacher.classes if view.teacher is not None else None) or classes(recipe)
        if section.top is not None and section.top >= outputs:
            found.append(
                Problem(f"{key}.store", f"{section.store}: there are {outputs} logits; N must be below that, or exact")
            )
        if recipe.data.on_error == "skip":
            found.append(
                Problem(
                    "data.on_error",
                    f"skip puts other images in the place of broken ones, and {key} stores outputs by the image that "
                    "belongs there; take raise, and leave broken images out of the data",
                )
            )
        for path, loss in recipe.losses.named():
            if loss.needs_teacher and (loss.teacher or "") == name:
                found += _loss_problems(f"losses.{path}", loss, key, section)
    return found


def _loss_problems(path: str, loss: LossSection, key: str, section: CacheSection) -> Iterator[Problem]:
    if isinstance(loss, GradientAttentionSection):
        yield Problem(path, f"reads a gradient of the teacher, which {key} does not store; remove one of the two")
    elif isinstance(loss, FormSection) and not isinstance(loss, CrdSection):
        if form_of(loss).kind == "map" and not section.features:
            yield Problem(
                path,
                f"compares maps of features, which are large; allow it to store them with {key}.features=true (`dkd "
                f"plan` shows their size), or remove {key}",
            )
    elif isinstance(loss, CustomLossSection) and loss.of == "features":
        try:
            term = custom_term(loss, lambda step: 1.0)
        except UserCodeError:  # reported by preflight/models.py
            return
        if isinstance(term, FeatureTerm) and not is_stored(term):
            yield Problem(
                f"{path}.loss",
                f"reads the teacher's features, which {key} does not store unasked; give the loss an attribute `store "
                "= True`, and they are stored whole",
            )


def _place_problems(section: CacheSection) -> Iterator[str]:
    folder = Path(section.dir)
    if os.path.lexists(folder) and not folder.is_dir():
        yield f"{section.dir!r} is no folder"
        return
    if not section.fill:
        if not folder.is_dir():
            yield f"{section.dir!r} is not there, and fill is false"
        return
    nearest = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not nearest.is_dir():
        yield f"{section.dir!r} cannot be made: {str(nearest)!r} is no folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield f"{str(nearest)!r} cannot be written to; name another folder, or fill: false to read alone"
