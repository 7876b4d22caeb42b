"""What a command of `dkd` consists of, and the parser that reads its arguments.

The module of a command imports nothing heavy at its top: `dkd --help` and shell completion import all of these modules.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from dkd import console, launch
from dkd.text import shorten


class CommandLineParser(argparse.ArgumentParser):
    """Parse a command line, and print its errors so that a terminal cannot be commanded by them."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2. Names in arguments may come from a shell's `*`. One of
        the ranks of a machine prints: all have the same arguments."""
        message = console.printable(shorten(message))
        launch.report_to_launcher(f"{self.prog}: error: {message}")
        if not launch.speaks_for_machine():
            self.exit(2)
        super().error(message)


@dataclass(frozen=True)
class Command:
    """One command of `dkd`.

    Args:
        name: the word after `dkd`.
        summary: one line for `dkd --help`, of at most 60 characters.
        examples: the text below the options in `dkd NAME --help`.
        add_arguments: adds the command's arguments to a parser.
        run: does the work and returns the exit code. `run` sets `options.started` once a training has begun: any error
            after that is a bug, not wrong input.
        description: what `dkd NAME --help` states at its top.
        parser: the class of its parser.
    """

    name: str
    summary: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str
    parser: type[CommandLineParser] = CommandLineParser

    def build_parser(self) -> CommandLineParser:
        """Return a parser of the command's arguments."""
        parser = self.parser(
            prog=f"dkd {self.name}",
            description=self.description,
            epilog=self.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_arguments(parser)
        return parser
