"""`dkd check-loss`: check that a loss of one's own is the same on any number of processes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dkd import console
from dkd.commands.arguments import positive, seconds
from dkd.commands.command import Command
from dkd.errors import InputError

if TYPE_CHECKING:
    from dkd.commands.loss_trial import LossTrial, Verdict

_EXAMPLES = """
examples:
  dkd check-loss my_losses:PositionSimilarity --student 16,8,8 --teacher 32,8,8
  dkd check-loss my_losses:InfoNCE temperature=0.07 --student 64,4,4 --teacher 64,4,4 -n 4
  dkd check-loss my_losses:Pairs --student 16,8,8 --teacher 32,8,8 --student 32,4,4 --teacher 64,4,4
  dkd check-loss my_losses:Margin --of logits --classes 100
"""
_MOST_PROCESSES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd check-loss`."""
    parser.add_argument("loss", metavar="MODULE:CLASS", help="as losses.custom.loss; its code is imported and run")
    parser.add_argument("options", metavar="key=value", nargs="*", help="as losses.custom.options; values are YAML")
    for model in ("student", "teacher"):
        parser.add_argument(
            f"--{model}",
            action="append",
            type=_shape,
            default=[],
            metavar="C,H,W",
            help=f"shape of a feature of the {model} for one image; once for each pair",
        )
    parser.add_argument(
        "--of", choices=("features", "logits", "labels"), default="features", help="as losses.custom.of"
    )
    parser.add_argument("--classes", type=positive, default=10, metavar="K", help="of labels and logits (default: 10)")
    parser.add_argument("--batch", type=positive, default=8, metavar="B", help="samples of the batch (default: 8)")
    parser.add_argument("-n", "--processes", type=positive, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument(
        "--seconds", type=seconds, default=60, metavar="S", help="that a process waits for another (default: 60)"
    )


def run(options: argparse.Namespace) -> int:
    """Compare, and return the exit code: 0 where value and gradient are the same, else 1."""
    from dkd.commands.loss_trial import (
        TOLERANCE,
        is_relational,
        judge,
        measure,
        measure_alone,
        measure_on_ranks,
        scale_error,
        slope_error,
    )
    from dkd.global_batch import BatchLayout

    trial, processes = _trial(options), options.processes
    if processes < 2 or processes > _MOST_PROCESSES or trial.batch % processes or trial.batch == processes:
        raise InputError(
            f"--batch {trial.batch} on {processes} processes: N is from 2 to {_MOST_PROCESSES}, and B a multiple of "
            "it, at least 2·N"
        )
    whole = measure(trial, slice(None), BatchLayout((trial.batch,)))
    verdict = judge(whole, measure_on_ranks(trial, processes, options.seconds), measure_alone(trial, processes))
    console.show(*_describe(trial, processes, verdict))
    if verdict.cause is None and verdict.compares and trial.of == "features" and not is_relational(trial):
        console.show(
            "the loss compares samples and does not state it: set relational = True on its class, or a step of several "
            "micro-batches computes it on each of them alone"
        )
    if (error := slope_error(trial)) is not None and error > TOLERANCE:
        console.show(
            f"slope differs from the derivative of value: the gradient by slope is {error:.1e} from that by autograd, "
            "relative; slope is the derivative by S_ij plus that by S_ji, with all that sums and totals add to it"
        )
        return 1
    if (error := scale_error(trial)) is not None and error > TOLERANCE:
        console.show(
            f"the loss changes by {error:.1e} of its value where all features of a model are multiplied by 1.5: "
            "relations are divided by a number near the largest, so that it must not depend on a common factor; divide "
            "s and t by what grows with them, such as their mean"
        )
        return 1
    return 0 if verdict.cause is None else 1


def _trial(options: argparse.Namespace) -> LossTrial:
    """Return the loss and the batch that the arguments name. Raises InputError."""
    from pydantic import ValidationError

    from dkd.commands.loss_trial import LossTrial
    from dkd.config import parse_overrides

    student, teacher = options.student, options.teacher
    if options.of == "features" and (not student or len(student) != len(teacher)):
        raise InputError(
            f"{len(student)} --student and {len(teacher)} --teacher: give one of each for every pair of features"
        )
    if options.of != "features":
        if student or teacher:
            raise InputError(f"--of {options.of} has logits of --classes numbers, and no --student or --teacher")
        student = [(options.classes,)]
        teacher = student if options.of == "logits" else []
    given: dict[str, Any] = {}
    for keys, value in parse_overrides(options.options):
        if len(keys) != 1:
            raise InputError(f"{'.'.join(keys)!r} is no keyword argument of {options.loss!r}")
        given[keys[0]] = value
    trial = LossTrial(options.loss, student, teacher, options.of, options.batch, options.classes, given)
    try:
        trial.section()
    except ValidationError as error:
        raise InputError(f"{options.loss!r}: {error.errors()[0]['msg']}; write module:attribute") from error
    return trial


def _shape(text: str) -> tuple[int, ...]:
    """Convert 16,8,8 to a shape. Raises ArgumentTypeError."""
    return tuple(positive(number) for number in text.split(","))


def _describe(trial: LossTrial, processes: int, verdict: Verdict) -> list[str]:
    from dkd.commands.loss_trial import TOLERANCE

    head = ("", "1 process", f"{processes} processes", "relative error")
    rows = [
        ("value", verdict.whole, verdict.parts, verdict.value_error),
        ("gradient, L2 norm", verdict.whole_norm, verdict.parts_norm, verdict.gradient_error),
    ]
    lines = [f"{trial.loss} on {trial.batch} random samples, float64, tolerance {TOLERANCE:g}"]
    lines.append("{:<18} {:>14} {:>14} {:>15}".format(*head))
    lines += [f"{name:<18} {one:>14.6g} {many:>14.6g} {error:>15.1e}" for name, one, many, error in rows]
    if verdict.cause is None:
        return [*lines, f"the loss is the same on 1 and on {processes} processes"]
    return [*lines, f"the loss differs: {verdict.cause}"]


COMMAND = Command(
    "check-loss",
    "Check that your own loss is the same on all process counts.",
    _EXAMPLES,
    add_arguments,
    run,
    "Compute a loss of your own on random features, on one process as a whole batch and on several that share the "
    "batch, and compare value and gradient. Where they differ, the likely cause is printed, and the exit code is 1.",
)
