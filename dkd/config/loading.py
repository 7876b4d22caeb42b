"""Load a recipe from YAML and `key=value` overrides."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dkd.config import yaml_text
from dkd.config.messages import Problem, RecipeError, shown
from dkd.config.rules import broken_rules
from dkd.config.schema import Recipe
from dkd.config.validation_errors import to_problem
from dkd.text import did_you_mean

_MOST_PROBLEMS = 20
_BEGINS_YAML = tuple("*&!%@`|>,?[{")  # characters of file names that begin something else than text in YAML


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and validate the result.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, the value in YAML; a later override replaces an earlier one. `section=null`
            removes a section.

    Raises:
        RecipeError: with every problem found.
    """
    return build_recipe(_read_yaml(Path(path)), overrides, name=Path(path).stem)


def build_recipe(values: dict[str, Any], overrides: Sequence[str] = (), name: str | None = None) -> Recipe:
    """Return a recipe from plain values, such as a YAML file holds, with the overrides. The values stay as they are.

    Args:
        name: of the run, where the values have none.

    Raises:
        RecipeError: with every problem found.
    """
    values = copy.deepcopy(values)
    for keys, value in parse_overrides(overrides):
        _set(values, keys, value)
    if not isinstance(values.get("run", {}), Mapping):
        raise RecipeError.at("run", f"must be a section (keys and values), not {values['run']!r}")
    values.setdefault("run", {})
    if name is not None:
        values["run"].setdefault("name", name)
    return validate(values)


def validate(values: Mapping[str, Any]) -> Recipe:
    """Return a Recipe from plain values. Raises RecipeError with every problem found."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        more = (
            [Problem("", f"and {len(details) - _MOST_PROBLEMS} more problems")] if len(details) > _MOST_PROBLEMS else []
        )
        raise RecipeError([*map(to_problem, details[:_MOST_PROBLEMS]), *more]) from None
    problems = broken_rules(recipe)
    if problems:
        raise RecipeError(problems)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every default written out; `load_recipe` reads the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Return (["a", "b"], value) for each override `a.b=value`. Raises RecipeError for any other form."""
    parsed, problems = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys) or len(keys) > yaml_text.DEEPEST:
            problems.append(Problem("", f"{override!r} is not an override; write key=value, such as train.epochs=10"))
            continue
        try:
            parsed.append((keys, yaml_text.read_argument(text)))
        except yaml_text.YamlTextError as error:
            hint = "; write text in quotes of its own: key='\"text\"'" if text[:1] in _BEGINS_YAML else ""
            problems.append(Problem(key, f"{shown(text)} {error}{hint}"))
    if problems:
        raise RecipeError(problems)
    return parsed


def _read_yaml(path: Path) -> dict[str, Any]:
    name = shown(str(path))
    try:
        if path.is_dir():
            raise RecipeError.at("", f"{name} is a folder, not a recipe")
        if not path.is_file() and "=" in str(path):
            raise RecipeError.at("", f"no such recipe: {name}; the recipe comes first, then the overrides")
        if not path.is_file():
            beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise RecipeError.at("", f"no such recipe: {name}{did_you_mean(str(path), beside)}")
        with path.open(encoding="utf-8") as file:
            values = yaml_text.read(file.read(yaml_text.MOST_CHARACTERS + 1))
    except UnicodeDecodeError:
        raise RecipeError.at("", f"{name} is not UTF-8 text") from None
    except yaml_text.YamlTextError as error:
        raise RecipeError.at("", f"{name} {error}") from None
    except OSError as error:
        raise RecipeError.at("", f"{name} cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise RecipeError.at(
            "", f"{name} holds no recipe: a recipe is keys and values at the top, such as `student: {{name: ...}}`"
        )
    return values


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = value
