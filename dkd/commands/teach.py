"""`dkd teach`: store what a teacher yields, before any student is trained."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe, positive
from dkd.commands.command import Command
from dkd.commands.errors import load_recipe_on_all_ranks, read_launch
from dkd.launch import report_to_launcher
from dkd.preflight.refusals import input_errors_as_recipe_errors

if TYPE_CHECKING:
    from dkd.config import Recipe
    from dkd.launch import Launch

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
    from dkd.distributed import stop_signals

    stop_signals.note_signals(launch)

    from dkd.distributed.process_group import announces_refusals
    from dkd.distributed.rendezvous import RendezvousError
    from dkd.engines.accelerated import leave_process_group
    from dkd.errors import LostRankError, Stopped, TrainingError
    from dkd.training.teach import Filling, report

    code = 0
    try:
        with announces_refusals(launch), input_errors_as_recipe_errors():
            filling = Filling(recipe, launch, options.epochs)
        options.started = True
        report(filling)
    except (TrainingError, Stopped) as error:
        console.say_on_first_rank(f"dkd: {error}")
        code = stop_signals.exit_code(launch) if isinstance(error, Stopped) else 1
        if code:
            report_to_launcher(console.printable(f"dkd: {error}"))
    except (LostRankError, RendezvousError) as error:
        reason = f"dkd: rank {launch.rank} cannot continue: {error}"
        console.say(reason)
        report_to_launcher(console.printable(reason))
        # End at once: code that waits for the other ranks at exit would wait for a rank that is gone.
        os._exit(1)
    finally:
        stop_signals.stop_noting(launch)
    leave_process_group()
    return code


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
