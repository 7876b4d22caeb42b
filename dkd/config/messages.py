"""What is wrong with a recipe, one line a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dkd.errors import InputError
from dkd.text import one_line, shorten


def shown(value: object) -> str:
    """Return a value that somebody wrote as a message quotes it."""
    return shorten(repr(value), longest=200)


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the dotted path in the recipe (empty: the recipe as a whole) and a sentence saying what, and
    what is allowed."""

    path: str
    message: str

    def __str__(self) -> str:
        """One line of a length that can be read."""
        return shorten(f"{self.path}: {self.message}" if self.path else self.message)


class RecipeError(InputError):
    """A recipe that cannot be run. `problems` holds all that was found. The command line prints them and ends with exit
    code 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)

    @classmethod
    def at(cls, path: str, message: object) -> RecipeError:
        """One problem at one place."""
        return cls([Problem(path, one_line(message))])
