"""Define the types of a recipe's keys: numbers, counts, switches, and sections."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dkd.config.messages import shown

MOST = 10**12
"""Largest whole number of a recipe: the product of two such numbers still fits a float."""
LONGEST_NAME = 255
"""Bytes of a file's name, at most, on all common file systems."""
LONGEST_PATH = 4096
"""Bytes of a path, at most."""


def as_number(value: Any) -> Any:
    """Return the number that a text such as `1e-4` means, which YAML 1.1 reads as text. Any other value stays."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def no_bool(value: Any) -> Any:
    """Refuse true and false, which Python counts as numbers. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def is_one_line(value: str) -> bool:
    """Return whether `value` has no line breaks, no other control characters and no halves of characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value)


def one_line(value: str) -> str:
    """Refuse text that is not one line. Raises ValueError."""
    if not is_one_line(value):
        raise ValueError(f"must be one line of text without control characters, not {shown(value)}")
    return value


def fits_file_system(value: Any) -> bool:
    """Return whether a path, and each name in it, is as short as file systems need."""
    if not isinstance(value, str):
        return True
    encoded = value.encode("utf-8", "replace")
    return len(encoded) <= LONGEST_PATH and all(len(name) <= LONGEST_NAME for name in encoded.split(b"/"))


Number = Annotated[float, BeforeValidator(as_number), BeforeValidator(no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(strict=True, gt=0, le=MOST)]
CountFromZero = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1), AfterValidator(one_line)]


def allow(test: Callable[[Any], bool], allowed: str) -> BeforeValidator:
    """Return a validator for keys of more than one type, with one message, where a union would give a message for each
    type.

    Args:
        test: whether a value is allowed.
        allowed: what is allowed, in words.
    """

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {allowed}, not {shown(value)}")
        return value

    return BeforeValidator(check)


def matches(pattern: str, value: Any) -> bool:
    """Return whether `value` is text that matches a pattern as a whole."""
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


class Section(BaseModel):
    """Be the base of all sections: unknown keys are refused, and values are not changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
