"""Launches that tests share. Starting ranks costs far more than any case, so a launch runs many cases, and only those
that the selected tests ask for."""

import json
import sys
from pathlib import Path

import pytest
from launched import run, torchrun_command

RUN_CASES = Path(__file__).with_name("run_cases.py")


def launch(world, folder, cases, seconds=600, launcher=True, **variables):
    """Run cases on `world` ranks of this machine and return, for each, the list of what the ranks returned.

    Args:
        cases: name -> ("module:function" of tests/distributed/cases, *arguments that JSON can hold).
        seconds: the time limit on an idle machine.
        launcher: without one, the only process has no process group, as a user's own loop may.
        variables: of the environment.
    """
    words = case_words(Path(folder), cases)
    command = torchrun_command(world, *words) if launcher else [sys.executable, *words]
    run(command, seconds, **{"DS_ACCELERATOR": "cpu", **variables})
    return returned_by_ranks(Path(folder), world, cases)


def case_words(folder, cases):
    """Write down the cases, and return the script that runs them on a rank with its arguments."""
    listed = folder / f"cases_{len(list(folder.iterdir()))}.json"
    listed.write_text(json.dumps({name: [function, arguments] for name, (function, *arguments) in cases.items()}))
    return RUN_CASES, folder, listed


def returned_by_ranks(folder, world, cases):
    """Return, for each case, the list of what the ranks returned."""
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def without_errors(ranks):
    """Return what the ranks returned for a case; an exception in the case fails the test with its traceback."""
    for rank, value in enumerate(ranks):
        if isinstance(value, dict) and "error" in value:
            pytest.fail(f"rank {rank}: {value['error']}")
    return ranks


class SharedLaunches:
    """world size -> case -> what each rank returned. A launch starts once a test asks for its world size.

    Args:
        request: of a fixture; the cases are those that the selected tests of its module use.
        uses: from a collected test to the cases that it uses: pairs of a world size and a mapping as `launch` takes it.
        start: from a world size and all its cases to what the ranks returned.
    """

    def __init__(self, request, uses, start):
        self.cases, self._start, self._found = {}, start, {}
        for item in request.session.items:
            if item.path == request.path:
                for world, cases in uses(item):
                    self.cases.setdefault(world, {}).update(cases)

    def __getitem__(self, world):
        if world not in self._found:
            self._found[world] = self._start(world, self.cases[world])
        return self._found[world]


def uses(cases):
    """Note on a test which cases it uses: `cases` is a function of the test's parameters."""

    def mark(function):
        function.uses = cases
        return function

    return mark


def noted_uses(item):
    """Return what `uses` has noted on a collected test, for its parameters; [] where it has noted nothing."""
    return item.function.uses(**parameters(item)) if hasattr(item.function, "uses") else []


def parameters(item):
    """Return the parameters of a collected test."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def names_in(item, known):
    """Return which of the known names a collected test speaks of, in its parameters, in its own code and in the
    functions inside it."""
    found, codes = {value for value in parameters(item).values() if isinstance(value, str)} & known, []
    codes.append(item.function.__code__)
    while codes:
        for constant in codes.pop().co_consts:
            if hasattr(constant, "co_consts"):
                codes.append(constant)
            elif isinstance(constant, str):
                found |= {constant} & known
            elif isinstance(constant, tuple | frozenset):
                found |= {c for c in constant if isinstance(c, str)} & known
    return found
