"""`dkd distill`: write a recipe and train it, in one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from dkd import console
from dkd.commands import train
from dkd.commands.arguments import add_overrides, positive
from dkd.commands.command import Command
from dkd.commands.launch.command import start
from dkd.commands.new.command import add_choices, describe, make_recipe, write_recipe
from dkd.errors import InputError

_EXAMPLES = """
examples:
  dkd distill --teacher torchvision/resnet34 --student torchvision/resnet18 --data photos
  dkd distill --teacher runs/teacher --student wrn_16_1 --data photos --epochs 30 -n 2
  dkd distill --student torchvision/resnet34=pretrained --data photos --epochs 10
                                                          no teacher: fine-tune a model, which may teach another
  dkd distill --teacher timm/vit_small_patch16_224 --student torchvision/resnet18 --data photos train.max_steps=100

The same command again resumes the run. `dkd new` writes the recipe alone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd distill`."""
    add_choices(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="the recipe (default: the name of the run, with .yaml)")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument(
        "-n",
        "--processes",
        type=positive,
        metavar="N",
        help="number of processes (default: one for each GPU, or 1 without a GPU)",
    )
    parser.add_argument("--engine", metavar="ENGINE", help="as for dkd launch (default ddp)")
    add_overrides(parser, "keys of the written recipe to override in this training")


def run(options: argparse.Namespace) -> int:
    """Write the recipe, train it, and return the exit code of the training."""
    chosen, text = make_recipe(options)
    path = Path(options.output or f"{chosen.name}.yaml")
    command = str(path) if not str(path).startswith("-") else f"./{path}"  # a name that begins as an option
    for line in describe(chosen):
        console.say(line)
    _write(path, text, options.force)

    from dkd.engines import starting

    processes = options.processes or starting.devices()
    if processes > 1 or options.engine is not None:
        return start(["train", command, *options.overrides], processes, options.engine or "ddp")
    # One process needs no launcher, which would import everything once more.
    trained = train.COMMAND.build_parser().parse_intermixed_args([command, *options.overrides])
    trained.started = False
    try:
        return train.run(trained)
    finally:
        options.started = trained.started


def _write(path: Path, text: str, force: bool) -> None:
    """Write the recipe, unless it is there already. Raises InputError when another file is."""
    if path.exists() and not force:
        if path.is_file() and path.read_bytes() == text.encode():
            return
        raise InputError(
            f"{str(path)!r} exists and is not what these options make; train it as it is with dkd launch {path}, "
            "replace it with --force, or name another -o FILE"
        )
    write_recipe(path, text)
    console.say(f"{'written':<12} {path}")


COMMAND = Command(
    "distill",
    "Write a recipe as `dkd new` does, and train it.",
    _EXAMPLES,
    add_arguments,
    run,
    "Write a recipe for a student, a teacher and images, and train it on this machine: `dkd new` and `dkd launch` in "
    "one command. A model or data set that is named as module:callable is imported and called: its code runs.",
)
