"""`dkd find-lr`: find a learning rate by a range test."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe, number, positive
from dkd.commands.command import Command
from dkd.commands.errors import load_recipe_on_all_ranks, read_launch
from dkd.errors import InputError
from dkd.installation import command_for
from dkd.preflight.refusals import input_errors_as_recipe_errors, refused_on_all_ranks

if TYPE_CHECKING:
    from dkd.config import Recipe
    from dkd.launch import Launch
    from dkd.training.lr_range import LearningRates, LossCurve

_EXAMPLES = """
examples:
  dkd find-lr recipe.yaml                                 a table, and optimizer.lr=... to copy
  dkd find-lr recipe.yaml --picture lr.png                and the curve as a picture
  dkd find-lr recipe.yaml optimizer.name=adamw --lowest 1e-7 --highest 0.1 --steps 200
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd find-lr recipe.yaml
"""
_ROWS = 20  # of the table, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd find-lr`."""
    add_recipe(parser, note=f". {IMPORTS_CODE}")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="optimizer steps (default: 100)")
    parser.add_argument("--lowest", type=number, default=1e-6, metavar="LR", help="first rate (default: 1e-6)")
    parser.add_argument("--highest", type=number, default=10.0, metavar="LR", help="last rate (default: 10)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the curve (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Run the test, and return the exit code: 0, or 1 where there is no suggestion."""
    from dkd.training.lr_range import LearningRates

    rates = LearningRates(options.lowest, options.highest, options.steps)
    picture = None if options.picture is None else Path(options.picture)
    launch = read_launch()
    with refused_on_all_ranks():
        _check(rates, picture, launch)
    recipe = load_recipe_on_all_ranks(options)

    from dkd.distributed.process_group import announces_refusals
    from dkd.preflight.check import check
    from dkd.preflight.completion import complete

    with announces_refusals(launch), input_errors_as_recipe_errors():
        recipe, completed = complete(recipe)
        check(recipe, launch, None)
    for line in completed:
        console.say_on_first_rank(f"dkd: {line}")

    from dkd.engines.accelerated import leave_process_group

    curve = _measure(recipe, launch, rates, options)
    drawn = True
    try:
        if launch.is_main and curve is not None:
            _show(curve, rates)
            drawn = picture is None or _draw(curve, picture, recipe.run.name)
    finally:
        leave_process_group()  # the other ranks wait for this one, whether its lines could be written or not
    return 0 if drawn and curve is not None and curve.suggestion is not None else 1


def _check(rates: LearningRates, picture: Path | None, launch: Launch) -> None:
    """Check the options. Raises InputError."""
    if rates.steps < 10:
        raise InputError(f"--steps {rates.steps}: a test needs at least 10 steps")
    if rates.lowest >= rates.highest:
        raise InputError(f"--lowest {rates.lowest:g} must be below --highest {rates.highest:g}")
    if picture is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"--picture draws with matplotlib, which is not installed: {command_for('report')}")
    if launch.is_main:
        from dkd.commands import pictures

        pictures.check_place(picture, pictures.FIND_LR)


def _measure(recipe: Recipe, launch: Launch, rates: LearningRates, options: argparse.Namespace) -> LossCurve | None:
    """Run the test, on all ranks. Returns None where it cannot continue, which was reported."""
    from dkd.distributed.process_group import announces_refusals
    from dkd.distributed.rendezvous import RendezvousError
    from dkd.errors import LostRankError, TrainingError
    from dkd.training.components import build_trial
    from dkd.training.lr_range import measure

    try:
        with announces_refusals(launch), input_errors_as_recipe_errors():
            parts = build_trial(recipe, launch)
        options.started = True
        for note in parts.notes:
            parts.log.say(note)
        return measure(parts, rates)
    except TrainingError as error:
        console.say_on_first_rank(f"dkd: {error}")
    except (LostRankError, RendezvousError) as error:
        console.say(f"dkd: rank {launch.rank} cannot continue: {error}")
        # End at once: code that waits for the other ranks at exit would wait for a rank that is gone.
        os._exit(1)
    return None


def _show(curve: LossCurve, rates: LearningRates) -> None:
    """Print the curve as a table, and the suggestion."""
    smoothed, count = curve.smoothed, len(curve.losses)
    rows = sorted({*range(0, count, max(1, math.ceil(count / _ROWS))), *([count - 1] if count else [])})
    lines = ["learning rate          loss      smoothed"]
    lines += [f"{curve.rates[i]:13.3g}  {curve.losses[i]:12.5g}  {smoothed[i]:12.5g}" for i in rows]
    if curve.diverged:
        lines.append(f"the loss diverged at {rates.at(count):.3g}, after {count} of {rates.steps} steps")
    suggestion = curve.suggestion
    if suggestion is None:
        lines.append("no suggestion: the loss did not fall clearly; try other --lowest and --highest, or more --steps")
    else:
        lines.append(
            f"the smoothed loss falls most steeply at {curve.steepest:g}, and is lowest at {curve.lowest:.2g}; a tenth "
            "of the latter is"
        )
        lines.append(f"optimizer.lr={suggestion:g}")
        if curve.begins_too_high:
            lines.append("this is the beginning of the range: repeat the test with a lower --lowest")
    console.show(*lines)


def _draw(curve: LossCurve, picture: Path, title: str) -> bool:
    """Draw the curve, where there is one, and return whether the file was written."""
    from dkd.commands import pictures
    from dkd.report.loss_curve import draw_loss_curve

    if not curve.losses:
        return False
    try:
        pictures.write(picture, draw_loss_curve(curve, title), pictures.FIND_LR)
    except InputError as error:
        console.say(f"dkd: {error}")
        return False
    console.show(f"picture: {picture}")
    return True


COMMAND = Command(
    "find-lr",
    "Find a learning rate by a range test of some steps.",
    _EXAMPLES,
    add_arguments,
    run,
    "Train for some steps while the learning rate grows from --lowest to --highest, and suggest a tenth of the rate "
    "at which the loss is lowest (Smith 2017). Losses, teacher, engine, batch and data are the recipe's; run.dir is "
    "not touched, and nothing is evaluated.",
)
