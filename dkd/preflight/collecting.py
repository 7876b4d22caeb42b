"""Many checks, one list: what is wrong with a recipe is reported together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dkd.config import Problem, RecipeError
from dkd.errors import InputError


@contextmanager
def input_errors_at(path: str) -> Iterator[None]:
    """Turn an error of input into a RecipeError at a key."""
    try:
        yield
    except RecipeError:
        raise
    except InputError as error:
        raise RecipeError.at(path, error) from error


@contextmanager
def collect(problems: list[Problem], path: str = "", *expected: type[Exception]) -> Iterator[None]:
    """Make a problem at `path` of an error of input, or of the file system, or of another library that is `expected` to
    raise such errors. Any other error is a bug, and is raised."""
    errors: tuple[type[Exception], ...] = (InputError, OSError, *expected)
    try:
        yield
    except RecipeError as error:
        problems += error.problems
    except errors as error:
        problems += RecipeError.at(path, error).problems
