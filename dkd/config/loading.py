"""A recipe from YAML and `key=value` overrides; its problems as sentences."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dkd.config import yaml_text
from dkd.config.messages import Problem, RecipeError, shown
from dkd.config.schema import Recipe
from dkd.text import did_you_mean

_MOST_PROBLEMS = 20
_BEGINS_YAML = tuple("*&!%@`|>,?[{")  # characters that begin something else than text, and that names of files have


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, the value in YAML; later ones win. `section=null` removes a section.

    Raises:
        RecipeError: with every problem found.
    """
    return build_recipe(_read_yaml(Path(path)), overrides, name=Path(path).stem)


def build_recipe(values: dict[str, Any], overrides: Sequence[str] = (), name: str | None = None) -> Recipe:
    """Return a recipe from plain values, such as a YAML file holds. The values are changed by the overrides.

    Args:
        name: of the run, where the values have none.

    Raises:
        RecipeError: with every problem found.
    """
    for keys, value in parse_overrides(overrides):
        _set(values, keys, value)
    if not isinstance(values.get("run", {}), Mapping):
        raise RecipeError.at("run", f"must be a section (keys and values), not {values['run']!r}")
    values.setdefault("run", {})
    if name is not None:
        values["run"].setdefault("name", name)
    return validate(values)


def validate(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from plain values. Raises RecipeError with every problem found."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        more = (
            [Problem("", f"and {len(details) - _MOST_PROBLEMS} more problems")] if len(details) > _MOST_PROBLEMS else []
        )
        raise RecipeError([*map(_problem, details[:_MOST_PROBLEMS]), *more]) from None
    problems = list(_disagreements(recipe))
    if problems:
        raise RecipeError(problems)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out; `load_recipe` reads it back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`a.b=value` -> (["a", "b"], value). Raises RecipeError for what is not of that form."""
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


# What pydantic reports, as a sentence with the value, what is allowed, and the nearest name.


def _problem(detail: Any) -> Problem:
    model, path = _walk(detail["loc"])
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields(model)
        elsewhere = [
            dotted for dotted in _all_paths() if dotted.rpartition(".")[2] == path[-1] and dotted != ".".join(path)
        ]
        nearest = did_you_mean(str(path[-1]), known)
        if nearest:
            nearest = (
                f"; did you mean {'.'.join([*path[:-1], nearest.removeprefix('; did you mean ').removesuffix('?')])}?"
            )
        elif elsewhere:
            nearest = f"; did you mean {' or '.join(elsewhere)}?"
        return Problem(".".join(path), "unknown key" + (nearest or f"; allowed here: {', '.join(known)}"))
    if kind == "missing":
        return Problem(".".join(path), "is required and missing")
    if kind == "union_tag_not_found":
        return Problem(".".join([*path, "name"]), f"is required and missing; allowed: {_tags(path)}")
    if kind == "union_tag_invalid":
        tags = _tags(path)
        return Problem(".".join([*path, "name"]), _not_allowed(value.get("name"), tags))
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        return Problem(".".join(path), _not_allowed(value, allowed))
    if kind == "string_too_short":
        return Problem(".".join(path), "must not be empty")
    if kind == "invalid_key":
        return Problem(".".join(path), f"{value!r} is not a key; keys are text")
    if kind in ("too_short", "too_long"):
        bounds = [
            f"{word} {context[key]}"
            for word, key in (("at least", "min_length"), ("at most", "max_length"))
            if key in context
        ]
        return Problem(".".join(path), f"must have {bounds[0]} items, not {value!r}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(".".join(path), f"must be a section (keys and values), not {value!r}")
    if kind == "value_error":
        return Problem(".".join(path), str(context["error"]))
    wording = detail["msg"].rpartition("should ")[2].removeprefix("be a valid ").removeprefix("be ").partition(",")[0]
    return Problem(".".join(path), f"must be {_PLAIN_WORDS.get(wording, wording)}, not {value!r}")


_PLAIN_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "list": "a list",
}


def _not_allowed(value: object, allowed: str) -> str:
    hint = did_you_mean(value, allowed.split(", ")) if isinstance(value, str) else ""
    return f"{value!r} is not allowed; allowed: {allowed}{hint}"


def _walk(location: Sequence[Any]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section a location ends in, and its path as the user wrote it: pydantic adds the names of union members to
    it."""
    model: type[BaseModel] | None = Recipe
    path: list[str] = []
    for part in location:
        if isinstance(part, str) and part.startswith("("):
            continue
        if model is None:
            path.append(str(part))
        elif part in model.model_fields:
            path.append(part)
            members = _sections(model.model_fields[part].annotation)
            model = members[0] if len(members) == 1 else _Union(members) if members else None  # type: ignore[assignment]
        elif isinstance(model, _Union):
            model = model.member(part)
        else:
            path.append(str(part))
    return model, path


class _Union:
    """Several sections in one place, told apart by `name`."""

    def __init__(self, members: list[type[BaseModel]]) -> None:
        self.members = members
        self.model_fields: dict[str, Any] = {}

    def member(self, tag: object) -> type[BaseModel] | None:
        return next((m for m in self.members if tag in get_args(m.model_fields["name"].annotation)), None)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, list):
        return _sections(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [section for member in get_args(annotation) for section in _sections(member)]
    return []


def _fields(model: Any) -> list[str]:
    return list(model.model_fields) if model is not None else []


def _tags(path: Sequence[str]) -> str:
    members = _sections(Recipe.model_fields[path[0]].annotation)
    return ", ".join(tag for member in members for tag in get_args(member.model_fields["name"].annotation))


def _all_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for section in _sections(field.annotation):
            paths += [path for path in _all_paths(section, f"{prefix}{name}.") if path not in paths]
    return paths


def _disagreements(recipe: Recipe) -> list[Problem]:
    """What no single key shows: keys that do not go together."""
    problems = []
    losses, train = recipe.losses, recipe.train
    for name in losses.needs_teacher if recipe.teacher is None else []:
        removed = "" if "." in name else f", or remove it with losses.{name}=null"
        problems.append(Problem(f"losses.{name}", f"needs a teacher; add `teacher`{removed}"))
    if recipe.teacher is not None and not losses.needs_teacher:
        problems.append(
            Problem(
                "teacher",
                "no loss uses it; add one that does, such as losses.at, losses.sp or losses.kd, or remove it with "
                "teacher=null",
            )
        )
    if (
        recipe.teacher is not None
        and losses.needs_teacher_logits
        and recipe.teacher.classes not in (None, recipe.data.classes)
    ):
        needs = losses.needs_teacher_logits[0]
        problems.append(
            Problem(
                "teacher.classes",
                f"{recipe.teacher.classes} is not data.classes={recipe.data.classes}, which losses.{needs} needs",
            )
        )
    if losses.gradient_at is not None:
        transfers = losses.gradient_at.form == "transfer"
        for key, on in (("student", train.compile.student), ("teacher", train.compile.teacher and transfers)):
            if on:
                problems.append(
                    Problem(
                        f"train.compile.{key}",
                        "losses.gradient_at differentiates twice, which a compiled model cannot; set it to false",
                    )
                )
        if train.sync_batch_norm:
            problems.append(
                Problem("train.sync_batch_norm", "losses.gradient_at differentiates twice, which SyncBatchNorm cannot")
            )
        if train.precision == "fp16":
            problems.append(
                Problem(
                    "train.precision",
                    "losses.gradient_at: gradients of images vanish in fp16, without its loss scaling; use bf16 or "
                    "fp32",
                )
            )
        if transfers and recipe.teacher is not None and recipe.teacher.placement != "replicated":
            problems.append(
                Problem("teacher.placement", "losses.gradient_at needs a whole teacher on every rank: replicated")
            )
    if train.micro_batch is not None and train.global_batch % train.micro_batch:
        problems.append(
            Problem("train.micro_batch", f"{train.micro_batch} does not divide train.global_batch={train.global_batch}")
        )
    if recipe.data.streaming and recipe.data.in_memory is True:
        problems.append(Problem("data.in_memory", "does not go with data.streaming; remove one of the two"))
    if isinstance(recipe.data.transforms, list):
        for key in ("validation_transforms", "image_size", "normalization"):
            if getattr(recipe.data, key) is None:
                problems.append(Problem(f"data.{key}", "is required when data.transforms is a list"))
        if isinstance(recipe.data.validation_transforms, str):
            problems.append(Problem("data.validation_transforms", "must be a list too when data.transforms is one"))
    elif recipe.data.validation_transforms is not None:
        problems.append(
            Problem(
                "data.validation_transforms",
                f"belongs to a list of data.transforms, not to the preset {recipe.data.transforms!r}",
            )
        )
    return problems
