"""`dkd teach`: store what a teacher yields, before any student is trained."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe, positive
from dkd.commands.command import Command
from dkd.commands.errors import load_recipe_on_all_ranks, read_launch
from dkd.commands.ranks import run_on_ranks
from dkd.preflight.refusals import input_errors_as_recipe_errors

if TYPE_CHECKING:
    from dkd.config import Recipe
    from dkd.launch import Launch
    from dkd.training.teach import Filling

_EXAMPLES = """
examples:
  dkd teach recipe.yaml teacher.cache=/data/taught        store the outputs for all epochs of the recipe
  dkd teach recipe.yaml                                   the recipe names teacher.cache; again: resume
  dkd teach recipe.yaml data.augmentation_period=10       10 epochs, which repeat; write the key into the recipe
  dkd teach recipe.yaml --epochs 1                        the first epoch alone, to see how large it is
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd teach recipe.yaml
  dkd cache list /data/taught                             what is there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd teach`."""
    add_recipe(parser, note=f". {IMPORTS_CODE}")
    parser.add_argument("--epochs", type=positive, metavar="N", help="fill the first N epochs alone")


def run(options: argparse.Namespace) -> int:
    """Fill the caches, and return the exit code: 0 filled, or stopped when asked; 1 failed."""
    launch = read_launch()
    recipe = load_recipe_on_all_ranks(options)

    from dkd.config import RecipeError
    from dkd.config.derived import caches
    from dkd.distributed.process_group import announces_refusals
    from dkd.preflight.check import check
    from dkd.preflight.completion import complete

    with announces_refusals(launch), input_errors_as_recipe_errors():
        if not caches(recipe):
            raise RecipeError.at("teacher.cache", "is missing: name a folder, such as teacher.cache=/data/taught")
        if not all(section.fill for section in caches(recipe).values()):
            raise RecipeError.at("teacher.cache.fill", "is false, which forbids to fill the cache")
        recipe, completed = complete(recipe)
        check(recipe, launch, None)
    for line in completed:
        console.say_on_first_rank(f"dkd: {line}")
    return _fill(recipe, launch, options)


def _fill(recipe: Recipe, launch: Launch, options: argparse.Namespace) -> int:
    def build() -> Filling:
        from dkd.training.teach import Filling

        return Filling(recipe, launch, options.epochs)

    return run_on_ranks(launch, options, build, lambda filling: filling.report())


COMMAND = Command(
    "teach",
    "Store what a teacher yields, for students to come.",
    _EXAMPLES,
    add_arguments,
    run,
    "Compute what the losses of a recipe read of its teacher, and store it in teacher.cache, without a student. Steps "
    "that are stored already are left out, so that the same command resumes. Later runs of the recipe, with this or "
    "another student, read it and need no teacher. See docs/guides/teach_once.md.",
)
