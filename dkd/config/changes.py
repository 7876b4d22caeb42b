"""What differs between two recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dkd.config.problems import Problem
from dkd.config.schema import Recipe

_WHERE_NOT_WHAT = {"run.dir"}  # a run may be moved


def recipe_changes(before: Recipe, after: Recipe) -> list[Problem]:
    """One entry a key that differs, but for the run's own place: its path, and both values."""
    old, new = flat(before.model_dump(mode="json")), flat(after.model_dump(mode="json"))
    absent = "(not there)"
    return [
        Problem(key, f"{_shown(old.get(key, absent))} before, {_shown(new.get(key, absent))} now")
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key, absent) != new.get(key, absent) and key not in _WHERE_NOT_WHAT
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; lists and empty sections stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
