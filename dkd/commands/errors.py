"""How a command refuses wrong input: one line for each problem, exit code 2, and the same refusal on every rank of a
launch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dkd import launch as launches
from dkd.errors import InputError
from dkd.launch import Launch
from dkd.text import one_line, shorten

if TYPE_CHECKING:
    from dkd.config import Recipe


def describe_in_one_line(error: BaseException) -> str:
    """Return the message of an error as one line of readable length, or the name of its class where it has no
    message."""
    return shorten(one_line(error)) or type(error).__name__


def list_problems(error: BaseException) -> list[str] | None:
    """Return one line for each thing that is wrong with the input of this process, or None for any other error, which
    is a bug of dkd."""
    problems = getattr(error, "problems", None)
    if isinstance(error, InputError):
        return [str(problem) for problem in problems] if problems else [describe_in_one_line(error)]
    if isinstance(error, OSError):
        files = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        if files and error.strerror:
            return [shorten(f"{files}: {error.strerror}")]
        return [f"{type(error).__name__}: {describe_in_one_line(error)}"]
    if isinstance(error, SystemExit):  # dkd itself raises none here
        from dkd.user_code import describe_error

        return [f"code that the recipe or the command names ended the program: {describe_error(error)}"]
    return None


def is_data_error(error: BaseException) -> bool:
    """Return whether an image or a data file could not be read. Imports nothing: without dkd.data there is no such
    error."""
    data = sys.modules.get("dkd.data")
    return data is not None and isinstance(error, data.DataError)


@contextmanager
def input_errors_as_recipe_errors() -> Iterator[None]:
    """Convert every error of input to a RecipeError, the only error that the ranks of a launch send to each other."""
    from dkd.config import Problem, RecipeError

    try:
        yield
    except (Exception, SystemExit) as error:
        problems = None if isinstance(error, RecipeError) else list_problems(error)
        if problems is None:
            raise
        raise RecipeError([Problem("", problem) for problem in problems]) from error


@contextmanager
def refused_on_all_ranks() -> Iterator[None]:
    """Convert every error of input to a RecipeError, and send it to the other ranks, before the process group is open:
    the problem may exist on one machine only."""
    from dkd.config import RecipeError

    try:
        with input_errors_as_recipe_errors():
            yield
    except RecipeError:
        launch = Launch.read_ranks() if launches.ranks_can_meet() else Launch()
        if launch.world_size == 1:
            raise
        from dkd.distributed.process_group import announces_refusals

        with announces_refusals(launch):
            raise


def read_launch() -> Launch:
    """Return this process's launch, for commands that a launcher may start. Raises RecipeError on all ranks when one of
    them cannot train."""
    with refused_on_all_ranks():
        return Launch.read()


def load_recipe_on_all_ranks(options: argparse.Namespace) -> Recipe:
    """Return the recipe that `options` names, for a command that all ranks run together. Raises RecipeError on all
    ranks when one of them cannot load it."""
    from dkd.config import load_recipe

    with refused_on_all_ranks():
        return load_recipe(options.recipe, options.overrides)
