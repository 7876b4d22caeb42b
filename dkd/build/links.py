"""Read the speeds of links between ranks, which `dkd launch-check --json` has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkd.config import Recipe, RecipeError
from dkd.global_batch import Link, Links
from dkd.global_batch.cost import DEFAULT_LINKS


def read_links(recipe: Recipe, device_type: str) -> tuple[Links, str]:
    """Return the speeds by which grids are chosen, and where they are from, in words: the file of `train.links`, and
    for what it does not hold, or without a file, those that are assumed for a type of device. Raises RecipeError."""
    assumed = DEFAULT_LINKS.get(device_type, DEFAULT_LINKS["cuda"])
    if recipe.train.links is None:
        return assumed, "assumed; dkd launch-check --json measures them"
    path = Path(recipe.train.links)
    try:
        found = _read_measured(json.loads(path.read_text()))
    except OSError as error:
        raise RecipeError.at("train.links", f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError.at(
            "train.links", f"{str(path)!r} is not a file of dkd launch-check --json: {error}"
        ) from error
    if not found:
        raise RecipeError.at(
            "train.links",
            f"{str(path)!r} holds no speeds of links: dkd launch-check measures them on several processes, the same "
            "number on each machine",
        )
    names = {"inside": "inside a machine", "between": "between machines"}
    missing = " and ".join(words for name, words in names.items() if name not in found)
    return assumed._replace(**found), f"measured, {path}" + (f"; {missing} assumed" if missing else "")


def _read_measured(content: Any) -> dict[str, Link]:
    """Return the links that a file holds. Raises ValueError, KeyError, TypeError."""
    if not isinstance(content, Mapping) or "problems" not in content:
        raise ValueError("it is no report of a launch")
    return {name: _read_link(name, link) for name, link in (content.get("links") or {}).items()}


def _read_link(name: str, found: Any) -> Link:
    if name not in Links._fields:
        raise ValueError(f"links.{name} is no link")
    link = Link(float(found["latency"]), float(found["bandwidth"]))
    if not (link.latency >= 0 and link.bandwidth > 0):
        raise ValueError(f"links.{name} is {found}")
    return link
