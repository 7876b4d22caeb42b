"""Arguments that several commands share, and the types of their numbers."""

from __future__ import annotations

import argparse
import math
from typing import Any

IMPORTS_CODE = (
    "Anything that the recipe names as module:callable (models, losses, data) is imported and called: its code runs."
)
_MOST_DIGITS = 12
_MOST_SECONDS = 86_400


def add_recipe(parser: argparse.ArgumentParser, optional: bool = False, note: str = "") -> None:
    """Add RECIPE and the overrides of its keys.

    Args:
        optional: whether the command runs without a recipe, too.
        note: what to add to the help of RECIPE.
    """
    recipe: Any = parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?" if optional else None, help=f"a YAML file{note}"
    )
    recipe.completer = complete_recipe
    add_overrides(parser, "keys of the recipe to override")


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the arguments of the form key=value."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=help_text)


def add_trust_code(parser: argparse.ArgumentParser, names: str) -> None:
    """Add --trust-code.

    Args:
        names: which module:callable the option allows to import.
    """
    parser.add_argument("--trust-code", action="store_true", help=f"import {names}")


def complete_recipe(**context: Any) -> list[str]:
    """Return the folders and YAML files that shell completion offers for RECIPE."""
    from argcomplete.completers import FilesCompleter

    return FilesCompleter(("yaml", "yml"))(**context)


def positive(text: str) -> int:
    """Convert an argument to a whole number above 0. Raises ArgumentTypeError."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, of at most {_MOST_DIGITS} digits")
    return int(text)


def whole(text: str) -> int:
    """Convert an argument to a whole number from 0. Raises ArgumentTypeError."""
    return 0 if text == "0" else positive(text)


def number(text: str) -> float:
    """Convert an argument to a finite number above 0. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def seconds(text: str) -> int:
    """Convert an argument to a number of seconds, at most a day. Raises ArgumentTypeError."""
    if positive(text) > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_SECONDS:,} seconds")
    return int(text)
