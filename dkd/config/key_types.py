"""What the keys of a recipe hold: numbers, counts, switches, and sections of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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


Number = Annotated[float, BeforeValidator(as_number), BeforeValidator(no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(strict=True, gt=0)]
CountFromZero = Annotated[int, Field(strict=True, ge=0)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]


def allow(test: Callable[[Any], bool], allowed: str) -> BeforeValidator:
    """For keys of more than one type: one message, where a union would give one for each member."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {allowed}, not {value!r}")
        return value

    return BeforeValidator(check)


def matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
