"""`dkd report`: write a page of figures of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dkd import console
from dkd.commands.arguments import add_trust_code, positive
from dkd.commands.command import Command
from dkd.errors import InputError
from dkd.installation import command_for

_EXAMPLES = """
examples:
  dkd report runs/quickstart                              writes runs/quickstart/report.html
  dkd report runs/a runs/b runs/c --output compared.html  compares several runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd report`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="validation images to classify (default: 2000, or 20 a class where that is more)",
    )
    add_trust_code(parser, "each module:callable that recipes and student.json files name")


def run(options: argparse.Namespace) -> int:
    """Write the report and return exit code 0."""
    output = Path(options.output) if options.output else Path(options.runs[0]) / "report.html"
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output {str(output)!r} must end in .html")
    try:
        from dkd.report.write import write_report
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        raise InputError(f"dkd report draws with matplotlib, which is not installed: {command_for('report')}") from None

    def show_progress(message: str) -> None:
        console.say(f"{message} ...")

    written = write_report(
        [Path(run) for run in options.runs], output, options.images, options.trust_code, show_progress
    )
    console.show(f"{written[0]}, and {len(written) - 1} pictures in {written[0].stem}_pictures/")
    return 0


COMMAND = Command(
    "report",
    "Write an HTML page of figures of one or several runs.",
    _EXAMPLES,
    add_arguments,
    run,
    "Write one self-contained HTML page, and PNGs, of one or several runs: curves, attention maps, Gram matrices.",
)
