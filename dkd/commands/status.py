"""`dkd status`: report the state of a run, or of all runs in a folder, from their files alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import add_overrides
from dkd.commands.command import Command
from dkd.errors import InputError

if TYPE_CHECKING:
    from dkd.runs.status import RunStatus

_EXAMPLES = """
examples:
  dkd status runs/quickstart
  dkd status runs/                                        one line for each run in the folder
  dkd status runs/quickstart --json                       the same facts for programs
  dkd status recipe.yaml run.name=other                   the run that `dkd train` starts with the same arguments
  dkd status recipe.yaml --print-directory                its folder alone, for scripts; the file FINISHED, PREEMPTED or
                                                          STOPPED in that folder states how the run ended
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd status`."""
    parser.add_argument(
        "target", metavar="RUN_OR_RECIPE", help="a run directory, a folder of runs, or the recipe of a run"
    )
    add_overrides(parser, "with a recipe: the overrides that were given to train")
    parser.add_argument("--print-directory", action="store_true", help="print the run's folder and nothing else")
    parser.add_argument("--json", action="store_true", help="print JSON: an object, or a list for a folder of runs")


def run(options: argparse.Namespace) -> int:
    """Print the state of a run and return exit code 0."""
    from dkd.config import load_recipe

    target = Path(options.target)
    if target.is_dir() and options.overrides:
        raise InputError(
            f"{options.overrides[0]!r} overrides a key of a recipe, but {str(target)!r} is a run directory: name the "
            "recipe, or leave the override out"
        )
    run_dir = target if target.is_dir() else Path(load_recipe(target, options.overrides).run.dir)
    if options.print_directory:
        console.show(str(run_dir))
        return 0

    from dkd.runs.status import describe, describe_together, read_status, runs_in

    several = runs_in(run_dir) if target.is_dir() else []
    if several:
        statuses, unreadable = _read_each(several)
    else:
        statuses, unreadable = [read_status(run_dir)], []
    if options.json:
        facts = [*(status.facts() for status in statuses), *unreadable]
        console.show(*json.dumps(facts if several else facts[0], indent=2).split("\n"))
    else:
        console.show(*(describe_together(statuses) if several else describe(statuses[0])))
        for each in unreadable:
            console.show(f"{Path(each['run']).name}  unreadable: {each['reason']}")
    return 0


def _read_each(runs: Sequence[Path]) -> tuple[list[RunStatus], list[dict[str, str]]]:
    """Return the states of those runs that can be read, and of the others the reason why not."""
    from dkd.config import RecipeError
    from dkd.runs.status import read_status

    statuses, unreadable = [], []
    for path in runs:
        try:
            statuses.append(read_status(path))
        except RecipeError as error:
            reason = "; ".join(map(str, error.problems))
            unreadable.append({"run": str(path), "state": "unreadable", "reason": reason})
    return statuses, unreadable


COMMAND = Command(
    "status",
    "Report the state of a run and its last metrics.",
    _EXAMPLES,
    add_arguments,
    run,
    "Report whether a run is running, was interrupted, preempted or stopped, or finished, with its progress, newest "
    "checkpoint and last metrics.",
)
