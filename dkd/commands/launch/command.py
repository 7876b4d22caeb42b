"""`dkd launch`: train on several processes of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dkd.commands import evaluate, find_lr, teach, train
from dkd.commands.arguments import positive, whole
from dkd.commands.command import Command, CommandLineParser
from dkd.commands.launch_check import command as launch_check
from dkd.errors import InputError
from dkd.launch import is_started_by_launcher

_EXAMPLES = """
examples:
  dkd launch recipe.yaml                                  one process for each GPU, DDP; without a GPU, one process
  dkd launch -n 2 recipe.yaml train.epochs=10             two processes; options and overrides of dkd train
  dkd launch --engine zero2 recipe.yaml --dry-run         DeepSpeed's ZeRO-2; fsdp2, zero1 and zero3 likewise
  dkd launch -n 4 --engine cpu recipe.yaml                on CPUs, where there are GPUs, too
  dkd launch -n 2 evaluate runs/quickstart                another command: train, teach, evaluate, find-lr,
                                                          launch-check
  dkd launch -n 8 teach recipe.yaml                       store what the teacher yields
  dkd launch -n 2 -- evaluate runs/mine --trust-code      its options stand after --

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 stop the run after a checkpoint; Ctrl-C again ends it at once. Several machines:
accelerate launch, torchrun or Slurm, with the files that `dkd files launch .` copies.

exit codes: those of dkd train
"""
_COMMANDS: Mapping[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in (train, teach, evaluate, find_lr, launch_check)
}


class _Parser(CommandLineParser):
    """Parse the arguments of `dkd launch`, and leave those after `--` as they are, in `rest`."""

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> argparse.Namespace:
        words = list(args or ())
        end = words.index("--") if "--" in words else len(words)
        command, rest = words[end + 1 : end + 2], words[end + 2 :]
        options = super().parse_intermixed_args([*words[:end], *command], namespace)
        options.rest = rest
        return options

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        if message.startswith("unrecognized arguments"):
            message += "; options of a command stand after --, such as: dkd launch -n 2 -- evaluate RUN --trust-code"
        super().error(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd launch`, and those of `dkd train`."""
    parser.add_argument(
        "-n",
        "--processes",
        type=positive,
        metavar="N",
        help="number of processes (default: one for each GPU, or 1 without a GPU)",
    )
    parser.add_argument(
        "--engine",
        default="ddp",
        metavar="ENGINE",
        help="cpu, ddp, fsdp2, zero1, zero2 or zero3 (default ddp), or a configuration file of Accelerate",
    )
    parser.add_argument(
        "--max-restarts",
        type=whole,
        default=0,
        metavar="N",
        help="how often all processes start again, after the newest checkpoint, when one of them fails (default 0)",
    )
    train.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Start the processes, and return their exit code when all of them have ended."""
    arguments = _arguments_of_ranks(options)
    return start(arguments, options.processes, options.engine, options.max_restarts)


def start(arguments: Sequence[str], processes: int | None = None, engine: str = "ddp", max_restarts: int = 0) -> int:
    """Run a command on several processes of this machine, and return their exit code when all of them have ended: 0
    finished, or stopped when asked; 2 wrong input; 1 failed. Call it in the main thread.

    Args:
        arguments: `train`, `teach`, `evaluate`, `find-lr` or `launch-check`, and its arguments.
        processes: their number; None: one for each GPU, or 1 without a GPU.
        engine: a name of launch/accelerate/, or the path of a configuration file of Accelerate.
        max_restarts: how often all processes start again when one of them fails.

    Raises:
        InputError: the recipe is wrong, or the launch cannot start; nothing was started.
    """
    if is_started_by_launcher():
        raise InputError(
            "a launcher has already started this process (LOCAL_RANK is set): use dkd train in place of "
            "dkd launch, or unset LOCAL_RANK"
        )
    try:
        _check(arguments)
    except SystemExit as parsed:  # usage and message were printed
        return int(parsed.code or 0)

    from dkd.engines import starting

    return starting.run_ranks(arguments, processes or starting.devices(), engine, max_restarts)


def _arguments_of_ranks(options: argparse.Namespace) -> list[str]:
    """Return the command of the ranks with its arguments: `train`, unless RECIPE is the name of another command."""
    words = [options.recipe, *options.overrides, *options.rest]
    chosen = words.pop(0) if words[0] in _COMMANDS else train.COMMAND.name
    switches = [name for name in ("dry_run", "fresh", "overwrite", "allow_recipe_change") if getattr(options, name)]
    picture = [] if options.picture is None else ["--picture", options.picture]
    return [chosen, *words, *(f"--{name.replace('_', '-')}" for name in switches), *picture]


def _check(arguments: Sequence[str]) -> None:
    """Check what a fraction of a second is enough for: the arguments, and the recipe's keys."""
    parsed = _COMMANDS[arguments[0]].build_parser().parse_intermixed_args(list(arguments[1:]))
    if getattr(parsed, "recipe", None) is not None:
        from dkd.config import load_recipe

        load_recipe(parsed.recipe, parsed.overrides)


COMMAND = Command(
    "launch",
    "Train on several processes of this machine.",
    _EXAMPLES,
    add_arguments,
    run,
    "Start a training, an evaluation or a check of the launch on several processes of this machine: what `accelerate "
    "launch` does with dkd's own launch files, which need not be at hand.",
    _Parser,
)
