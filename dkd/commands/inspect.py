"""`dkd inspect`: list the modules of a model that can be tapped."""

from __future__ import annotations

import argparse

from dkd import console
from dkd.commands.arguments import positive
from dkd.commands.command import Command
from dkd.errors import InputError

_EXAMPLES = """
examples:
  dkd inspect torchvision/resnet34                        paths, output shapes and parameters
  dkd inspect wrn_40_2 --image-size 32 --classes 100
  dkd inspect --list                                      names of models
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd inspect`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a name as in student.name of a recipe")
    parser.add_argument("--list", action="store_true", help="list the known names")
    parser.add_argument(
        "--classes", type=positive, default=1000, metavar="N", help="outputs of the head (default 1000)"
    )
    parser.add_argument(
        "--image-size", type=positive, default=224, metavar="PIXELS", help="side of the image (default 224)"
    )
    parser.add_argument(
        "--norm", choices=("batch", "group", "none"), help="normalisation of the CIFAR models (none: nin_* only)"
    )


def run(options: argparse.Namespace) -> int:
    """Print one line for each module of the model, and return exit code 0."""
    from dkd.models import ModelSpec, known_names, module_rows

    if options.list:
        console.show(*known_names())
        return 0
    if options.model is None:
        raise InputError("no model is given: name one, such as wrn_16_2, or list the known names with --list")
    rows = module_rows(ModelSpec(options.model, options.classes, options.norm), options.image_size)
    width = max(len(row.path) for row in rows)
    lines = [f"{'path':{width}}  {'output':>18}  {'parameters':>12}  class"]
    for row in rows:
        shape = "×".join(map(str, row.shape)) if row.shape is not None else "-"
        called = "" if row.calls == 1 else f"  (called {row.calls} times: no tap)"
        lines.append(f"{row.path or '.':{width}}  {shape:>18}  {row.parameters:>12,}  {row.kind}{called}")
    console.show(*lines)
    return 0


COMMAND = Command(
    "inspect",
    "List the modules of a model that can be tapped.",
    _EXAMPLES,
    add_arguments,
    run,
    "List the modules of a model that can be tapped, with output shapes and parameters. A MODEL of the form "
    "module:callable is imported and called: its code runs.",
)
