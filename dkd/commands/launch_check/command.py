"""`dkd launch-check`: check that a launch can train."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkd import atomic_files, console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe, seconds
from dkd.commands.command import Command
from dkd.commands.errors import load_recipe_on_all_ranks, read_launch

if TYPE_CHECKING:
    from dkd.commands.launch_check.findings import Findings

_EXAMPLES = """
examples:
  dkd launch-check recipe.yaml                            this process alone
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd launch-check recipe.yaml
  torchrun --nproc_per_node 8 -m dkd launch-check --json links.json

exit codes: 0 all is well; 1 a rank did not join, differs from the others, or cannot reach them; 2 the recipe is wrong
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd launch-check`."""
    parser.add_argument(
        "--seconds", type=seconds, default=50, metavar="N", help="longest time that the check may take (default 50)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="measure the speeds of links between ranks, and write what was found to FILE, for train.links of a recipe",
    )
    add_recipe(parser, optional=True, note=": the recipe is checked, too, and all ranks look for its run.dir")


def run(options: argparse.Namespace) -> int:
    """Check the launch, and return the exit code: 0 when it can train, else 1."""
    launch = read_launch()
    recipe = None if options.recipe is None else load_recipe_on_all_ranks(options)

    from dkd.commands.launch_check.check import check_launch
    from dkd.engines.accelerated import leave_process_group

    try:
        found = check_launch(recipe, launch, options.seconds, options.json is not None)
    except RuntimeError as error:
        console.say(f"dkd: launch-check: rank {launch.rank}: {error}")
        os._exit(1)  # the other ranks may be out of reach: nothing may wait for them
    try:
        if launch.is_main:
            console.show(*found.lines)
            for warning in found.warnings:
                console.say(f"dkd: warning: {warning}")
            if options.json is not None:
                _write(Path(options.json), found)
            for problem in found.problems:
                console.say(f"dkd: launch-check: {problem}")
            console.show("launch-check: this launch cannot train" if found.problems else "launch-check: all is well")
    finally:
        leave_process_group()  # the other ranks wait for this one, whether its lines could be written or not
    return 1 if found.problems else 0


def _write(path: Path, found: Findings) -> None:
    """Write what was found as JSON; a file that cannot be written is a problem that is reported."""
    content: dict[str, Any] = {"lines": found.lines, "warnings": found.warnings, "problems": list(found.problems)}
    content["links"] = {name: link._asdict() for name, link in found.links.items()}
    try:
        atomic_files.replace_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        found.problems.append(f"{str(path)!r} cannot be written: {error.strerror}")
        return
    if found.links:
        console.show(f"json        {path}; train.links={path} makes losses of relations choose their grid by it")
    else:
        console.show(f"json        {path}; it holds no speeds of links, which are measured on several processes")


COMMAND = Command(
    "launch-check",
    "Check that all ranks of a launch join and can train.",
    _EXAMPLES,
    add_arguments,
    run,
    "Check under the launcher of a training that all ranks join, are alike and can reach each other. Takes less than a "
    f"minute. With a RECIPE: {IMPORTS_CODE}",
)
