# PYTHON_ARGCOMPLETE_OK
"""The command line: find the command, run it, and turn its errors into lines and exit codes.

Each command is a module of dkd/commands/. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dkd import __version__, console, launch
from dkd.commands import (
    check_loss,
    compare,
    distill,
    evaluate,
    export,
    files,
    find_lr,
    inspect,
    report,
    status,
    teach,
    train,
)
from dkd.commands.cache import command as cache
from dkd.commands.command import Command, CommandLineParser
from dkd.commands.errors import is_data_error
from dkd.commands.launch import command as launch_command
from dkd.commands.launch_check import command as launch_check
from dkd.commands.new import command as new
from dkd.commands.plan import command as plan
from dkd.errors import InputError
from dkd.preflight.refusals import describe_in_one_line, list_problems

BAD_INPUT = 2
INTERRUPTED = 130
"""Exit code after SIGINT, as in shells."""
OPEN_FILES = 256
"""Open files that a process may need at once: for 8 worker processes, their batches, and libraries that are loaded
while it runs."""

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (
        new,
        distill,
        train,
        teach,
        launch_command,
        evaluate,
        status,
        inspect,
        plan,
        find_lr,
        cache,
        compare,
        report,
        export,
        check_loss,
        launch_check,
        files,
    )
}

_EPILOG = """
examples:
  dkd train configs/quickstart.yaml --dry-run
  dkd launch -n 2 configs/quickstart.yaml
  dkd teach configs/quickstart.yaml teacher.cache=/data/taught
  dkd cache list /data/taught
  dkd evaluate runs/quickstart
  dkd inspect torchvision/resnet18
  dkd plan configs/examples/imagenet_r34_r18_at_sp.yaml --nodes 8 --gpus-per-node 8
  dkd find-lr configs/quickstart.yaml
  dkd status runs/quickstart
  dkd compare runs/quickstart runs/quickstart_teacher
  dkd report runs/quickstart
  dkd export runs/quickstart --format onnx
  dkd files launch .
  dkd check-loss my_losses:InfoNCE --student 64,4,4 --teacher 64,4,4

shell completion: eval "$(register-python-argcomplete dkd)"

exit codes: 0 done, or stopped when asked (the same command resumes the run; DKD_STOP_EXIT_CODE sets another code for
a stop); 2 wrong input (a recipe, file, name, argument or environment variable), nothing was started; 1 anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the command and its arguments; default: those of this process.
    """
    console.accept_all_letters()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell that asks for completions
        import argcomplete

        argcomplete.autocomplete(_build_parser())
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        parser = _build_parser()
        parser.parse_args(arguments)
        parser.error("the command must come first")
    command = COMMANDS[arguments[0]]
    # Intermixed: options and overrides may be given in any order.
    options = command.build_parser().parse_intermixed_args(arguments[1:])
    options.started = False
    try:
        if any("\0" in argument for argument in arguments):  # from Python code: a shell cannot pass one
            raise InputError("an argument holds a zero byte, which no name can hold")
        _allow_open_files()
        return command.run(options)
    except KeyboardInterrupt:
        if launch.speaks_for_machine():
            console.say("")
            console.say("dkd: interrupted; files that were written stay")
        os._exit(INTERRUPTED)  # without waiting for threads and other ranks
    except console.Unwritable as error:
        if error.reason:
            console.say(f"dkd: the result cannot be written to standard output: {error.reason}")
        return 1
    except (Exception, SystemExit) as error:
        return _report_error(error, started=options.started)
    finally:
        console.settle()


def _report_error(error: Exception | SystemExit, started: bool) -> int:
    """Print the lines of an error and return the exit code. Raises the error again when it is a bug of dkd.

    Args:
        started: whether a training had begun: then only an unreadable image is no bug.
    """
    if is_data_error(error):
        # Any rank may read the image that cannot be read: that rank prints the line, and the launcher ends the others.
        reason = f"dkd: rank {launch.named_rank()}: {describe_in_one_line(error)}"
        console.say(reason)
        launch.report_to_launcher(console.printable(reason))
        return 1
    problems = None if started else list_problems(error)
    if problems is None:
        launch.report_to_launcher(console.printable(f"{type(error).__name__}: {describe_in_one_line(error)}"))
        raise error
    launch.report_to_launcher("\n".join(console.printable(f"dkd: {problem}") for problem in problems))
    # One process of each machine prints: the input of its neighbours is the same.
    if launch.speaks_for_machine():
        for problem in problems:
            console.say(f"dkd: {problem}")
    return BAD_INPUT


class _OneLineEach(argparse.RawDescriptionHelpFormatter):
    """Print each command and its summary on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        # argparse leaves out the indent of commands when it measures their names, and breaks the line of the longest.
        self._action_max_length = 4 + max(map(len, COMMANDS))


def _build_parser() -> CommandLineParser:
    """Return the parser of all commands, for `dkd --help`, wrong commands and shell completion."""
    parser = CommandLineParser(
        prog="dkd",
        description="Distributed knowledge distillation for vision models.",
        epilog=_EPILOG,
        formatter_class=_OneLineEach,
    )
    parser.add_argument("--version", action="version", version=f"dkd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", help="each has its own --help", required=True)
    for command in COMMANDS.values():
        command.add_arguments(commands.add_parser(command.name, help=command.summary))
    return parser


def _allow_open_files() -> None:
    """Raise this process's limit of open files where the limit is low. Raises InputError where the system does not
    allow that."""
    import resource

    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if limit == unlimited or limit >= OPEN_FILES:
        return
    if highest != unlimited and highest < OPEN_FILES:
        raise InputError(
            f"this process may open {highest} files at once, and dkd needs {OPEN_FILES}; raise the limit: ulimit -n "
            f"{4 * OPEN_FILES}"
        )
    wanted = 4 * OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if highest == unlimited else min(highest, wanted), highest))
