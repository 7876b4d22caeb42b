"""Shape text for people: one line of a readable length, with the nearest known name where a name was misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: object) -> str:
    """Return `text` with every run of white space, line ends included, replaced by one space."""
    return " ".join(str(text).split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, which may be empty."""
    return (str(error).splitlines() or [""])[0]


def shorten(text: str, longest: int = 1000) -> str:
    """Return `text`, without its middle where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 3]} … {text[-end:]}"


def did_you_mean(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """Return `; did you mean X?` with the nearest known names, or an empty string where none is near.

    Args:
        most: names that are returned at most.
        cutoff: how near a name must be, from 0 to 1 (difflib's ratio).
    """
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def size_in_bytes(count: float) -> str:
    """Return a number of bytes in a unit that people read, such as 3.1 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
