"""Find what differs between two recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dkd.config.losses import LOSSES
from dkd.config.messages import Problem
from dkd.config.schema import Recipe

# A run may be moved; a preset only names the source of other keys' values. How ranks share relations depends on the
# cluster, and changes no result beyond rounding.
_WHERE_NOT_WHAT = {"run.dir", "train.links", "losses.at.preset", "losses.sp.strategy"} | {
    f"losses.{key}.{what}"
    for key, section in LOSSES.items()
    for what in ("preset", "grid", "memory")
    if what in section.model_fields
}
# A run keeps what these keys meant at its first start; see dkd/preflight/hardware.py.
_LEFT_TO_HARDWARE = {"train.precision", "train.channels_last", "teacher.weights_dtype"}


def _is_left_to_hardware(path: str) -> bool:
    return path in _LEFT_TO_HARDWARE or (path.startswith("teachers.") and path.endswith(".weights_dtype"))


def recipe_changes(before: Recipe, after: Recipe) -> list[Problem]:
    """Return one entry for each key that differs, with both values. The run's own directory is left out."""
    return [
        Problem(path, f"{_show(old)} before, {_show(new)} now")
        for path, old, new in _find_differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if path not in _WHERE_NOT_WHAT
        and not (_is_left_to_hardware(path) and new == "auto")
        and not _stores_exactly(path, old, new)
    ]


def _stores_exactly(path: str, *values: Any) -> bool:
    """Return whether a key only decides where a teacher's outputs are stored, and not what is trained with."""
    if re.fullmatch(r"teacher(s\.\w+)?\.cache\.(dir|fill|features)", path):
        return True
    is_section = re.fullmatch(r"teacher(s\.\w+)?\.cache", path) is not None
    return is_section and all(value is None or value["store"] == "exact" for value in values)


def differing_keys(recipes: Sequence[Recipe]) -> dict[str, dict[int, Any]]:
    """Return the keys in which recipes differ: dotted key -> place of the recipe -> value. A recipe that lacks the
    section of a key is missing there. The names and folders of runs are left out."""
    flats = [flat(recipe.model_dump(mode="json")) for recipe in recipes]
    found = {}
    for key in dict.fromkeys(key for values in flats for key in values):
        values = {i: each[key] for i, each in enumerate(flats) if key in each}
        same = len(values) == len(flats) and all(value == values[0] for value in values.values())
        # A section that one recipe has and another does not: its keys follow.
        absent = len(values) < len(flats) and all(value is None or value == {} for value in values.values())
        if not same and not absent and key not in _WHERE_NOT_WHAT and key != "run.name":
            found[key] = values
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping with dotted keys. Lists and empty sections stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _find_differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _find_differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, before, after


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)
