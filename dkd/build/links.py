"""Read the speeds of links between ranks, which `dkd launch-check --json` has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dkd.config import Recipe, RecipeError
from dkd.global_batch import Link, Links


def read_links(recipe: Recipe) -> Links | None:
    """Return the speeds in the file of `train.links`; None: the recipe names no file. Raises RecipeError."""
    if recipe.train.links is None:
        return None
    path = Path(recipe.train.links)
    try:
        return Links(*(_read_link(json.loads(path.read_text()), name) for name in Links._fields))
    except OSError as error:
        raise RecipeError.at("train.links", f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError.at(
            "train.links", f"{str(path)!r} is not a file of dkd launch-check --json: {error}"
        ) from error


def _read_link(content: Any, name: str) -> Link:
    found = content["links"][name]
    link = Link(float(found["latency"]), float(found["bandwidth"]))
    if not (link.latency >= 0 and link.bandwidth > 0):
        raise ValueError(f"links.{name} is {found}")
    return link


def describe_links(links: Links) -> dict[str, dict[str, float]]:
    """Return what `read_links` reads, for JSON."""
    return {name: link._asdict() for name, link in links._asdict().items()}
