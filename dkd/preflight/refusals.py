"""How wrong input is refused: one line for each problem, and the same refusal on every rank of a launch.

Imports nothing heavy before it is needed: a wrong argument is refused in a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dkd.errors import InputError
from dkd.launch import Launch
from dkd.text import one_line, shorten


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
        launch = Launch.read_rendezvous()
        if launch.world_size == 1:
            raise
        from dkd.distributed.process_group import announces_refusals

        with announces_refusals(launch):
            raise
