"""`dkd compare`: compare runs in a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dkd import console
from dkd.commands.command import Command
from dkd.errors import InputError

_EXAMPLES = """
examples:
  dkd compare runs/a runs/b runs/c                        one column a run, then the keys in which they differ
  dkd compare runs/*                                      every run of a folder
  dkd compare runs/a runs/b --json                        the same for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd compare`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories, finished or not")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the comparison and return exit code 0."""
    from dataclasses import asdict

    from dkd.config.changes import differing_keys
    from dkd.report.comparison import comparison_table, facts_of
    from dkd.report.run_files import labels_of, read_run

    paths = [Path(name) for name in options.runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a run is given twice: name each run once")
    runs = [read_run(path, label) for path, label in zip(paths, labels_of(paths), strict=True)]
    facts = [facts_of(each) for each in runs]
    if not options.json:
        console.show(*comparison_table(runs, facts))
        return 0
    differing = {
        key: {runs[i].label: value for i, value in values.items()}
        for key, values in differing_keys([each.recipe for each in runs]).items()
    }
    listed = [{"run": str(each.path), **asdict(found)} for each, found in zip(runs, facts, strict=True)]
    console.show(*json.dumps({"runs": listed, "differing_keys": differing}, indent=2).split("\n"))
    return 0


COMMAND = Command(
    "compare",
    "Compare runs in a table, and the keys in which they differ.",
    _EXAMPLES,
    add_arguments,
    run,
    "Compare runs in a table: models, losses, batch, time, accuracy, and the keys in which their recipes differ. From "
    "their files alone: no model is built and no image read.",
)
