"""`dkd evaluate`: measure a trained student on the validation images of its run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dkd import console
from dkd.commands.arguments import add_overrides, add_trust_code
from dkd.commands.command import Command
from dkd.commands.errors import read_launch
from dkd.errors import InputError
from dkd.launch import report_to_launcher

if TYPE_CHECKING:
    from dkd.training.evaluate_student import StudentEvaluation

_WORST_CLASSES = 10
_EXAMPLES = """
examples:
  dkd evaluate runs/quickstart                            the finished student of a run
  dkd evaluate runs/quickstart/checkpoints/step_00000100  the weights after a step
  dkd evaluate runs/quickstart --json > measured.json     with the counts of each class, and the confusion matrix
  dkd evaluate runs/quickstart --teacher                  and how alike student and teacher are
  dkd evaluate runs/quickstart --predictions out.parquet  and what the student predicts for each image
  dkd evaluate runs/quickstart data.validation='other-*.parquet' evaluation.batch=64
  dkd evaluate runs/quickstart evaluation.knn='{}'        and the k-NN accuracy of its features
  dkd launch -n 8 evaluate runs/quickstart                on 8 processes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd evaluate`."""
    parser.add_argument(
        "target", metavar="RUN_OR_CHECKPOINT", help="a run directory, a checkpoint in it, or a student.safetensors"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print no table, and add the counts of each class and the confusion matrix to the line of JSON",
    )
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="also compare the student with the teacher of its recipe, whose weights must be there",
    )
    parser.add_argument(
        "--predictions", metavar="FILE.parquet", help="write a row for each image: label, prediction, scores"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file of predictions")
    add_overrides(parser, "keys of the run's data and evaluation sections, and train.precision")
    add_trust_code(parser, "the module:callable that a student.json names as its architecture")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and return the exit code: 0, or 1 when the loss is not finite or the predictions cannot be written."""
    if options.overwrite and not options.predictions:
        raise InputError("--overwrite replaces a file of predictions: it belongs to --predictions FILE.parquet")
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
        evaluation = evaluate_student(
            options.target,
            options.overrides,
            options.trust_code,
            launch,
            teacher=options.teacher,
            predictions=options.predictions,
            overwrite=options.overwrite,
        )
    try:
        if launch.is_main:
            for note in evaluation.notes:
                console.say(f"dkd: {note}")
            for line in () if options.json else _tabulate(evaluation):
                console.say(line)
            console.show(json.dumps(evaluation.details() if options.json else evaluation.facts()))
    finally:
        leave_process_group()  # the other ranks wait for this one, whether its line could be written or not
    problems = [evaluation.result.problem] if evaluation.result.problem else []
    if evaluation.predictions_problem is not None:
        problems.append(f"{str(evaluation.predictions)!r} cannot be written: {evaluation.predictions_problem}")
    for problem in problems:
        console.say_on_first_rank(f"dkd: {problem}")
        report_to_launcher(console.printable(f"dkd: {problem}"))
    return 1 if problems else 0


def _tabulate(evaluation: StudentEvaluation) -> Iterator[str]:
    """Yield the lines that a person reads: the numbers, and the worst classes."""
    result = evaluation.result
    yield f"{evaluation.weights} on {evaluation.validation}: {result.samples:,} images, in {evaluation.precision}"
    if result.top1 is not None:
        yield f"  top-1  {result.top1:.4f}  {result.top1_correct:,} right"
    if result.top5 is not None:
        yield f"  top-5  {result.top5:.4f}  {result.top5_correct:,} right"
    if result.loss is not None:
        yield f"  loss   {result.loss:.4f}"
    if result.knn is not None:
        yield f"  {result.knn.describe()}"
    if result.agreement is not None:
        yield f"  agreement with the teacher: {result.agreement.describe()}"
    if evaluation.predictions is not None and evaluation.predictions_problem is None:
        yield f"  predictions in {evaluation.predictions}"
    if result.unreadable:
        yield f"  {result.unreadable:,} images cannot be read and do not count"
    classes = result.facts_of_classes(evaluation.class_names).get("classes", [])
    present = sorted((each for each in classes if each["samples"]), key=lambda each: each["top1"])
    if len(present) > 1:
        yield "  classes, the worst first:"
    for each in present[:_WORST_CLASSES] if len(present) > 1 else []:
        name = str(each.get("name", each["label"]))
        yield f"    {each['top1']:.4f}  {each['top1_correct']:,} of {each['samples']:,}  {name}"
    if len(present) > _WORST_CLASSES:
        yield f"    and {len(present) - _WORST_CLASSES:,} better classes"


COMMAND = Command(
    "evaluate",
    "Measure exact top-1, top-5 and loss of a trained student.",
    _EXAMPLES,
    add_arguments,
    run,
    "Measure the exact top-1, top-5 and loss of a trained student: every sample counts once.",
)
