"""What differs between two recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dkd.config.messages import Problem
from dkd.config.schema import Recipe

# A run may be moved; a preset is only where other keys had their values from.
_WHERE_NOT_WHAT = {"run.dir", "losses.at.preset", "losses.sp.preset"}
# A run keeps what these meant at its first start; see dkd/preflight/hardware.py.
_LEFT_TO_HARDWARE = {"train.precision", "train.channels_last", "teacher.weights_dtype"}


def recipe_changes(before: Recipe, after: Recipe) -> list[Problem]:
    """One entry a key that differs, but for the run's own place: its path, and both values."""
    return [
        Problem(path, f"{_shown(old)} before, {_shown(new)} now")
        for path, old, new in _differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if path not in _WHERE_NOT_WHAT and not (path in _LEFT_TO_HARDWARE and new == "auto")
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


def _differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, before, after


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)
