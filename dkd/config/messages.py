"""Hold what is wrong with a recipe, one line for each problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dkd.errors import InputError
from dkd.text import one_line, shorten


def shown(value: object) -> str:
    """Return a value of the user as a message quotes it."""
    return shorten(repr(value), longest=200)


@dataclass(frozen=True)
class Problem:
    """Hold one problem of a recipe."""

    path: str
    """Dotted path in the recipe; empty: the recipe as a whole."""
    message: str
    """A sentence that states what is wrong, and what is allowed."""

    def __str__(self) -> str:
        """Return one line of a readable length."""
        return shorten(f"{self.path}: {self.message}" if self.path else self.message)


class RecipeError(InputError):
    """A recipe cannot be run. `problems` holds everything that was found. The command line prints the problems and
    stops with exit code 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)

    @classmethod
    def at(cls, path: str, message: object) -> RecipeError:
        """Return an error with one problem."""
        return cls([Problem(path, one_line(message))])
