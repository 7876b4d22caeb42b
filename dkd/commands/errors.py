"""How a command refuses wrong input: one line for each problem, exit code 2, and the same refusal on every rank of a
launch."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dkd import console
from dkd.launch import Launch
from dkd.preflight.refusals import refused_on_all_ranks

if TYPE_CHECKING:
    from dkd.config import Recipe


def is_data_error(error: BaseException) -> bool:
    """Return whether an image or a data file could not be read. Imports nothing: without dkd.data there is no such
    error."""
    data = sys.modules.get("dkd.data")
    return data is not None and isinstance(error, data.DataError)


def read_launch() -> Launch:
    """Return this process's launch, for commands that a launcher may start, and report its notes. Raises RecipeError on
    all ranks when one of them cannot train."""
    with refused_on_all_ranks():
        launch = Launch.read()
    for note in launch.notes:
        console.say_on_first_rank(f"dkd: {note}")
    return launch


def load_recipe_on_all_ranks(options: argparse.Namespace) -> Recipe:
    """Return the recipe that `options` names, for a command that all ranks run together. Raises RecipeError on all
    ranks when one of them cannot load it."""
    from dkd.config import load_recipe

    with refused_on_all_ranks():
        return load_recipe(options.recipe, options.overrides)
