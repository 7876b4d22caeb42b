"""`dkd plan`: print what a recipe would cost on a cluster."""

from __future__ import annotations

import argparse

from dkd import console
from dkd.commands.arguments import IMPORTS_CODE, add_recipe, number, positive
from dkd.commands.command import Command

_EXAMPLES = """
examples:
  dkd plan recipe.yaml --gpus-per-node 8                  one machine with 8 GPUs
  dkd plan recipe.yaml --nodes 8 --gpus-per-node 8        64 processes
  dkd plan recipe.yaml --nodes 8 train.global_batch=4096 losses.sp.comm_dtype=bf16
  dkd plan recipe.yaml teacher.cache=/data/taught --images 1281167 --tflops 150
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd plan`."""
    add_recipe(parser)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=positive,
        default=8,
        metavar="G",
        help="GPUs of each machine, with one process for each GPU (default 8)",
    )
    parser.add_argument("--images", type=positive, metavar="N", help="training images, for the size of teacher.cache")
    parser.add_argument(
        "--tflops", type=number, metavar="T", help="what a GPU reaches, in TFLOP/s, for the times with teacher.cache"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan and return exit code 0."""
    from dkd.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from dkd.commands.plan.caches import Speed
    from dkd.commands.plan.plan import plan
    from dkd.commands.plan.text import describe
    from dkd.preflight.completion import complete

    recipe, _ = complete(recipe)
    told = Speed(options.images, options.tflops)
    console.show(*describe(plan(recipe, options.nodes, options.gpus_per_node, told=told)).split("\n"))
    return 0


COMMAND = Command(
    "plan",
    "Print what a recipe would cost on a cluster.",
    _EXAMPLES,
    add_arguments,
    run,
    "Print what a recipe would send between ranks, hold and compute on a cluster. Opens neither data (but to "
    f"count classes, where data.classes is left out) nor weights, and needs no GPU. {IMPORTS_CODE}",
)
