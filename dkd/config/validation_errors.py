"""Describe what pydantic finds wrong as sentences: the value, what is allowed, and the nearest name."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from dkd.config.messages import Problem
from dkd.config.schema import Recipe
from dkd.text import did_you_mean


def to_problem(detail: Any) -> Problem:
    """Return one entry of pydantic's `ValidationError.errors()` as a problem: its path and a sentence."""
    model, path = _walk(detail["loc"])
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _list_fields(model)
        elsewhere = [
            dotted for dotted in _list_paths() if dotted.rpartition(".")[2] == path[-1] and dotted != ".".join(path)
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
        return Problem(".".join(path), f"is required and missing{_HINTS.get('.'.join(path), '')}")
    if kind == "union_tag_not_found":
        return Problem(".".join([*path, "name"]), f"is required and missing; allowed: {_list_tags(path)}")
    if kind == "union_tag_invalid":
        tags = _list_tags(path)
        return Problem(".".join([*path, "name"]), _describe_not_allowed(value.get("name"), tags))
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        return Problem(".".join(path), _describe_not_allowed(value, allowed))
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


_HINTS = {
    "data.validation": "; name images, or a fraction of the training images such as 0.1, or null for no evaluation",
    "data.train": "; name images, such as folder:PATH",
}
"""What to write for a required key, where its type alone does not show it."""

_PLAIN_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "list": "a list",
}


def _describe_not_allowed(value: object, allowed: str) -> str:
    hint = did_you_mean(value, allowed.split(", ")) if isinstance(value, str) else ""
    return f"{value!r} is not allowed; allowed: {allowed}{hint}"


def _walk(location: Sequence[Any]) -> tuple[type[BaseModel] | None, list[str]]:
    """Return the section that a location ends in, and the location's path as the user wrote it: pydantic adds the names
    of union members to the path."""
    model: type[BaseModel] | None = Recipe
    path: list[str] = []
    for part in location:
        if isinstance(part, str) and part.startswith("("):
            continue
        if model is None:
            path.append(str(part))
        elif part in model.model_fields:
            path.append(part)
            members = _find_sections(model.model_fields[part].annotation)
            model = members[0] if len(members) == 1 else _Union(members) if members else None  # type: ignore[assignment]
        elif isinstance(model, _Union):
            model = model.member(part)
        else:
            path.append(str(part))
    return model, path


class _Union:
    """Hold several sections that may stand in one place, which their `name` distinguishes."""

    def __init__(self, members: list[type[BaseModel]]) -> None:
        self.members = members
        self.model_fields: dict[str, Any] = {}

    def member(self, tag: object) -> type[BaseModel] | None:
        return next((m for m in self.members if tag in get_args(m.model_fields["name"].annotation)), None)


def _find_sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, list):
        return _find_sections(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [section for member in get_args(annotation) for section in _find_sections(member)]
    return []


def _list_fields(model: Any) -> list[str]:
    return list(model.model_fields) if model is not None else []


def _list_tags(path: Sequence[str]) -> str:
    members = _find_sections(Recipe.model_fields[path[0]].annotation)
    return ", ".join(tag for member in members for tag in get_args(member.model_fields["name"].annotation))


def _list_paths(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for section in _find_sections(field.annotation):
            paths += [path for path in _list_paths(section, f"{prefix}{name}.") if path not in paths]
    return paths
