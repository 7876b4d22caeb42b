"""`dkd evaluate`: measure a trained student on the validation images of its run."""

from __future__ import annotations

import argparse

from dkd import console
from dkd.commands.arguments import add_overrides, add_trust_code
from dkd.commands.command import Command
from dkd.commands.errors import read_launch
from dkd.errors import InputError
from dkd.launch import report_to_launcher

_EXAMPLES = """
examples:
  dkd evaluate runs/quickstart                            the finished student of a run
  dkd evaluate runs/quickstart/checkpoints/step_00000100  the weights after a step
  dkd evaluate runs/quickstart data.validation='other-*.parquet' evaluation.batch=64
  dkd launch -n 8 evaluate runs/quickstart                on 8 processes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd evaluate`."""
    parser.add_argument(
        "target", metavar="RUN_OR_CHECKPOINT", help="a run directory, a checkpoint in it, or a student.safetensors"
    )
    add_overrides(parser, "keys of the run's data and evaluation sections, and train.precision")
    add_trust_code(parser, "the module:callable that a student.json names as its architecture")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and return the exit code: 0, or 1 when the loss is not finite."""
    launch = read_launch()
    if launch.dynamo_backend != "no":
        raise InputError(
            "the launch asks for a dynamo_backend (ACCELERATE_DYNAMO_BACKEND), but an evaluation compiles nothing: "
            "remove it from the launch"
        )

    import json

    from dkd.distributed.process_group import announces_refusals
    from dkd.engines.accelerated import leave_process_group
    from dkd.training.evaluate_student import evaluate_student

    with announces_refusals(launch):
        evaluation = evaluate_student(options.target, options.overrides, options.trust_code, launch)
    try:
        if launch.is_main:
            for note in evaluation.notes:
                console.say(f"dkd: {note}")
            console.show(json.dumps(evaluation.facts()))
    finally:
        leave_process_group()  # the other ranks wait for this one, whether its line could be written or not
    problem = evaluation.result.problem
    if problem:
        console.say_on_first_rank(f"dkd: {problem}")
        report_to_launcher(console.printable(f"dkd: {problem}"))
    return 1 if problem else 0


COMMAND = Command(
    "evaluate",
    "Measure exact top-1, top-5 and loss of a trained student.",
    _EXAMPLES,
    add_arguments,
    run,
    "Measure the exact top-1, top-5 and loss of a trained student: every sample counts once.",
)
