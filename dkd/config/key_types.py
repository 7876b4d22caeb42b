"""What the keys of a recipe hold: numbers, counts, switches, and sections of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dkd.config.messages import shown

MOST = 10**12
"""The largest whole number of a recipe: products of two such numbers can still be a float."""
LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""
LONGEST_PATH = 4096


def as_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; here it is the number everybody means."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def is_one_line(value: str) -> bool:
    """Whether `value` has no line breaks, no other control characters and no halves of characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value)


def one_line(value: str) -> str:
    if not is_one_line(value):
        raise ValueError(f"must be one line of text without control characters, not {shown(value)}")
    return value


def fits_file_system(value: Any) -> bool:
    """Whether no name of the path is longer than a file's name can be."""
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
    """For keys of more than one type: one message, where a union would give one for each member."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {allowed}, not {shown(value)}")
        return value

    return BeforeValidator(check)


def matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
