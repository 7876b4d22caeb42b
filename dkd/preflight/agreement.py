"""Whether all ranks are about to train the same thing: recipe, teacher, data. Collectives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from dkd.config import Problem, Recipe, RecipeError
from dkd.config.changes import flat
from dkd.global_batch.collectives import all_gather_objects

# A machine may keep its own copies of files; that they are the same is checked by their content.
_MAY_DIFFER = {
    "run.dir",
    "data.train",
    "data.validation",
    "data.root",
    "evaluation.knn.train",
    "evaluation.knn.validation",
    "data.workers",
    "student.weights",
    "teacher.weights",
}


def _may_differ(key: str) -> bool:
    return key in _MAY_DIFFER or (key.startswith("teachers.") and key.endswith(".weights"))


def check_same_recipe(recipe: Recipe) -> None:
    """Check that all ranks have the same recipe, but for places of files: a machine with an older copy would train
    another thing. A collective. Raises RecipeError on every rank."""
    own = {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if not _may_differ(key)}
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


def check_same_data(facts_of: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all ranks have opened the same data. A collective. Raises RecipeError on every rank.

    Args:
        facts_of: key of the recipe -> what `build.data.data_facts` returns of the images that it names.
    """
    for key, facts in facts_of.items():
        ranks = all_gather_objects(dict(facts))
        other = next((rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]), None)
        if other is not None:
            counts = f"{ranks[0]['images']} images there, {ranks[other]['images']} here"
            raise RecipeError.at(key, f"rank {other} has opened other data than rank 0 ({counts}, or other labels)")
