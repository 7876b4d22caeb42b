"""The one base of all errors that a person can mend: a wrong recipe, file, name, argument or environment variable.

A leaf that every room may import. `dkd.cli.main` prints such an error as one line and ends with exit code 2. Any other error is a bug, and
shows its traceback.
"""

from __future__ import annotations


class InputError(ValueError):
    """Something that was given to dkd is missing, cannot be read, or does not fit. The message says what, and what was expected."""


def shorten(text: str, longest: int = 1000) -> str:
    """Return `text`, without its middle where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 3]} … {text[-end:]}"
