"""Write and read state.json, which holds what a checkpoint states about its run.

It is the part of a checkpoint that a resume compares with the recipe before any tensor is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkd import atomic_files
from dkd.checkpoints.folder import CheckpointError, CheckpointFolder
from dkd.config import Recipe, recipe_to_yaml
from dkd.provenance import packages

FORMAT = 1
"""Number of the format of checkpoints. One of another format is refused by name, not guessed at."""
_TYPES: dict[str, Any] = {
    "world_size": int,
    "engine": str,
    "global_batch": int,
    "teacher": (dict, type(None)),
    "data": dict,
    "seconds": (int, float),
    "replaced_images": int,
    "scaler": (dict, type(None)),
}


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 of the resolved recipe in hexadecimal, without `run.dir`: a run may be moved."""
    placeless = recipe.model_copy(update={"run": recipe.run.model_copy(update={"dir": ""})})
    return hashlib.sha256(recipe_to_yaml(placeless).encode()).hexdigest()


def run_facts(recipe: Recipe, teacher: Mapping[str, Any] | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run cannot change without becoming another run.

    Args:
        recipe: the resolved recipe.
        teacher: name, fingerprint and taps; None: there is no teacher.
        data: the number of training images, and a fingerprint of their labels and places.
    """
    return {"global_batch": recipe.train.global_batch, "teacher": teacher, "data": data}


def checkpoint_facts(
    step: int, recipe: Recipe, world_size: int, engine: str, run: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return the content of state.json.

    Args:
        step: number of steps done.
        recipe: the resolved recipe.
        world_size: number of ranks.
        engine: name of the engine.
        run: the result of `run_facts`.
        more: counts that have added up since the first step.
    """
    return {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "engine": engine,
        "recipe_sha256": recipe_hash(recipe),
        "packages": packages(),
        **run,
        **more,
    }


def write_facts(folder: Path, facts: Mapping[str, Any], recipe: Recipe) -> None:
    """Write state.json, given the result of `checkpoint_facts`, and recipe.yaml into the folder of a new checkpoint.
    Raises OSError."""
    atomic_files.create(folder / "state.json", json.dumps(facts, indent=2) + "\n")
    atomic_files.create(folder / "recipe.yaml", recipe_to_yaml(recipe))


def read_facts(folder: CheckpointFolder, step: int) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises CheckpointError when it is missing, damaged, or of
    another format."""
    values, reason = atomic_files.read_json(folder.path_of(step) / "state.json")
    if reason is not None:
        raise CheckpointError(reason)
    try:
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"is of format {values['format']!r}, and this version of dkd reads format {FORMAT}: resume it with the "
                "version that wrote it"
            )
        ours = values["step"] == step
        ours = ours and all(isinstance(values[key], types) for key, types in _TYPES.items())
        ours = ours and isinstance(values.get("stopping"), dict | None)
        ours = ours and {"images", "sha256"} <= set(values["data"])
        ours = ours and (values["teacher"] is None or {"name", "fingerprint"} <= set(values["teacher"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("state.json is damaged") from error
    if not ours:
        raise CheckpointError("state.json is damaged")
    return dict(values)
