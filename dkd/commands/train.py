"""`dkd train`: train a student from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe
from dkd.commands.command import Command
from dkd.commands.errors import load_recipe_on_all_ranks, read_launch
from dkd.commands.ranks import run_on_ranks
from dkd.errors import InputError
from dkd.preflight.refusals import input_errors_as_recipe_errors

if TYPE_CHECKING:
    from dkd.config import Recipe
    from dkd.launch import Launch
    from dkd.runs.launches import IfRunExists
    from dkd.training.trainer import Trainer

_EXAMPLES = """
examples:
  dkd train recipe.yaml                                   one process
  dkd train recipe.yaml train.epochs=10 optimizer.lr=0.05 override keys of the recipe; values are YAML
  dkd train recipe.yaml teacher=null losses.at=null       remove sections
  dkd train recipe.yaml --dry-run                         check files, models and taps; train nothing
  dkd train recipe.yaml --dry-run --picture batch.png     draw the images that the first step will train on, too
  dkd train recipe.yaml                                   again: resume from the newest checkpoint in run.dir
  dkd train recipe.yaml train.epochs=20 --allow-recipe-change   resume, but train longer
  dkd train recipe.yaml --overwrite                       start anew
  dkd launch -n 8 recipe.yaml                             8 processes on this machine; also by accelerate launch
                                                          and torchrun
  sbatch launch/slurm/train.sbatch recipe.yaml            on a cluster
  touch RUN/STOP                                          stop after a checkpoint (exit code 0), as SIGTERM, SIGUSR1
                                                          and SIGHUP do
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd train`."""
    add_recipe(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"check everything that can be checked without training; print what would run. {IMPORTS_CODE}",
    )
    parser.add_argument(
        "--picture",
        metavar="FILE.png",
        help="with --dry-run: draw the first micro-batch of step 1, as the models see it, with its classes",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start anew; refused where run.dir holds a run, unless --overwrite is given",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew and replace the run in run.dir")
    parser.add_argument(
        "--allow-recipe-change",
        action="store_true",
        help="resume the run in run.dir although the recipe has changed",
    )


def run(options: argparse.Namespace) -> int:
    """Train, and return the exit code: 0 finished, or stopped when asked (or DKD_STOP_EXIT_CODE), 1 failed."""
    console.never_fail()  # training continues whatever happens to the log
    launch = read_launch()
    picture = _picture(options, launch)
    recipe = load_recipe_on_all_ranks(options)

    from dkd.distributed.process_group import announces_refusals
    from dkd.preflight.check import check
    from dkd.preflight.completion import complete

    if_run_exists: IfRunExists = "replace" if options.overwrite else "refuse" if options.fresh else "resume"
    with announces_refusals(launch), input_errors_as_recipe_errors():
        recipe, completed = complete(recipe)
        changes = check(recipe, launch, if_run_exists, options.allow_recipe_change)
    for line in completed:
        console.say_on_first_rank(f"dkd: {line}")
    for change in changes:
        console.say_on_first_rank(f"dkd: the run resumes with a changed recipe: {change}")
    if options.dry_run:
        return _print_dry_run(recipe, launch, picture)
    return _train(recipe, launch, if_run_exists, options)


def _train(recipe: Recipe, launch: Launch, if_run_exists: IfRunExists, options: argparse.Namespace) -> int:
    def build() -> Trainer:
        from dkd.training.trainer import Trainer

        return Trainer.from_recipe(recipe, launch, if_run_exists, options.allow_recipe_change)

    return run_on_ranks(launch, options, build, lambda trainer: trainer.fit())


def _picture(options: argparse.Namespace, launch: Launch) -> Path | None:
    """Return where a picture is to be written. Raises InputError where none can be. Ranks of a dry run wait for no
    other rank."""
    if options.picture is None:
        return None
    if not options.dry_run:
        raise InputError("--picture draws what a dry run has loaded: add --dry-run")
    if launch.is_main:
        from dkd.commands import pictures

        pictures.check_place(Path(options.picture), pictures.DRY_RUN)
    return Path(options.picture)


def _print_dry_run(recipe: Recipe, launch: Launch, picture: Path | None) -> int:
    from dkd.commands.dry_run import describe
    from dkd.config import recipe_to_yaml

    described = describe(recipe, launch, picture)  # on all ranks: what is wrong may be wrong on one machine only
    if launch.is_main:
        console.show(*recipe_to_yaml(recipe).split("\n"), *described.split("\n"))
    return 0


COMMAND = Command(
    "train",
    "Train a student from a recipe, or resume its run.",
    _EXAMPLES,
    add_arguments,
    run,
    "Train a student from a recipe, or resume the run in run.dir from its newest checkpoint.",
)
