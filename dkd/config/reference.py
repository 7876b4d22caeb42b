"""Generate the list of all keys of a recipe from the schema, for docs/reference/recipe.md.

    python -m dkd.config.reference docs/reference/recipe.md        replaces the generated part of that page

The meaning of a key is its docstring in the schema. Keys that have no docstring there have their meaning here.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from dkd.config.losses import WeightSchedule
from dkd.config.schema import Recipe

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
WIDTH = 100
"""Columns of a line of the page."""
_DEFAULTS = {"run.name": "the name of the recipe's file", "run.dir": "`runs/NAME`"}
"""Defaults that depend on other keys or on the file."""

# Meanings of the keys that have no docstring in the schema. `*` stands for any section.
_MEANINGS = {
    "run": "Names the run and says how it starts, logs and waits.",
    "run.dir": "The folder of the run. A run that is already there is resumed.",
    "run.seed": "Seed of initial weights, order of samples, augmentation and dropout.",
    "data": "The images, their labels, and what is done to them before the models see them.",
    "data.image_column": "Column of the images (parquet, hub). Default: the only column of that type.",
    "data.label_column": "Column of the labels (parquet, hub). Default: the only column of that type.",
    "student": "The model that is trained.",
    "student.norm": "Normalisation layers of the CIFAR models. Default: the model's own, `batch`.",
    "teacher": "The frozen model that the student is compared with. Leave the section out to train a student alone.",
    "teacher.name": "As `student.name`.",
    "teacher.norm": "As `student.norm`.",
    "teacher.options": "Further keyword arguments of the model.",
    "losses": "What is minimised: each loss that is present, times its weight.",
    "losses.ce": "Cross-entropy with the labels.",
    "losses.ce.weight": "Weight of the loss.",
    "losses.ce.label_smoothing": "Share of the label's probability that is spread over all classes.",
    "losses.at": "Attention transfer.",
    "losses.at.beta": "β: weight of the loss.",
    "losses.at.map": "How a feature becomes a map: Σ|A|, Σ|A|^p or max|A|^p over the channels.",
    "losses.at.p": "The power p of the map.",
    "losses.at.reduction": "How maps are compared: the mean of squared differences, as in the authors' code; or half "
    "the norm of the difference, as in the paper.",
    "losses.at.norm": "Order of the norm of `reduction: paper`.",
    "losses.at.resize": "What to do where resolutions differ: refuse, interpolate the map, or pool the larger feature.",
    "losses.sp": "Similarity-preserving distillation.",
    "losses.sp.gamma": "γ: weight of the loss at `reference_batch` rows.",
    "losses.kd": "Soft targets.",
    "losses.kd.alpha": "α: weight of the loss.",
    "losses.kd.temperature": "T: temperature of both softmaxes.",
    "losses.gradient_at.beta": "β: weight of the loss.",
    "losses.custom": "A list of losses of your own.",
    "losses.custom[].weight": "Weight of the loss.",
    "train": "How many samples a step has, how many steps there are, and the arithmetic.",
    "train.global_batch": "Samples of one optimizer step, over all processes and micro-steps.",
    "train.epochs": "Epochs of the run, and of its schedules.",
    "train.clip_grad_norm": "Largest norm of the gradient; a longer one is scaled down to it. null: no clipping.",
    "train.compile": "Which models `torch.compile` compiles.",
    "train.compile.student": "Compile the student.",
    "train.compile.teacher": "Compile the teacher.",
    "train.ema.decay": "Share of the average that stays in each step.",
    "evaluation": "How validation images are counted.",
    "evaluation.every_epochs": "Epochs between evaluations; the last step always has one.",
    "optimizer: sgd": "Stochastic gradient descent.",
    "optimizer: adamw": "AdamW.",
    "optimizer.lr": "Learning rate, before its schedule.",
    "optimizer.momentum": "Share of the last update that stays in the next one.",
    "optimizer.nesterov": "Whether momentum takes Nesterov's form.",
    "optimizer.weight_decay": "Weight decay: added to the gradient by `sgd`, decoupled from it in `adamw`.",
    "optimizer.decay_norm_and_bias": "Whether normalisation layers and biases decay too.",
    "optimizer.betas": "Decay rates of the two moving averages.",
    "optimizer.eps": "Added to the denominator.",
    "optimizer.name": "Which optimizer.",
    "schedule: constant": "The learning rate stays at `optimizer.lr`.",
    "schedule: step": "The learning rate is multiplied by `factor` at each milestone.",
    "schedule: cosine": "The learning rate follows half a cosine to its last value.",
    "schedule: one_cycle": "The learning rate rises to `optimizer.lr` and falls again.",
    "schedule.start": "The first learning rate, as a fraction of `optimizer.lr`.",
    "schedule.name": "Which schedule.",
    "schedule.warmup_epochs": "Epochs in which the learning rate rises linearly to its first value.",
    "schedule.factor": "What the learning rate is multiplied by at each milestone.",
    "checkpoint.every_epochs": "Epochs between checkpoints. null: none by epochs.",
    "checkpoint.every_steps": "Steps between further checkpoints. null: none by steps.",
    "checkpoint.every_minutes": "Minutes between further checkpoints, by the clock of the main process. null: none.",
    "checkpoint.keep_last": "Newest checkpoints that are kept.",
    "schedule of a loss weight": "Every weight of a loss is a number, or a section with these keys, such as "
    "`losses.at.beta={start: 1000, end: 0, schedule: linear}`.",
    "*.mean": "Mean of each channel.",
    "*.std": "Standard deviation of each channel.",
    "*.start": "The weight at the first step.",
    "*.end": "The weight at the last step.",
    "*.schedule": "The law by which the weight changes.",
    "*.factor": "What the weight is multiplied by at each milestone.",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    path: str
    """The dotted path, as an override names the key."""
    values: str
    """What the key may hold, in words."""
    default: str | None
    """The default in Markdown, or None for a required key."""
    meaning: str
    """What the key does: sentences."""


def recipe_keys() -> Iterator[tuple[str, list[Key]]]:
    """Yield the sections of a recipe in order: a heading and the keys of the section."""
    for name, field in Recipe.model_fields.items():
        sections = _sections(field.annotation)
        if name == "losses":
            yield name, []
            for loss, inner in sections[0].model_fields.items():
                (section,) = _sections(inner.annotation)
                path = "losses.custom[]" if loss == "custom" else f"losses.{loss}"
                yield f"losses.{loss}", list(_keys(section, path))
        elif len(sections) > 1:
            for section in sections:
                (tag,) = get_args(section.model_fields["name"].annotation)
                yield f"{name}: {tag}", list(_keys(section, name))
        else:
            yield name, list(_keys(sections[0], name))
    yield "schedule of a loss weight", list(_keys(WeightSchedule, "WEIGHT"))


def recipe_reference() -> str:
    """Return the list of all keys as Markdown: for each its values, its default and its meaning."""
    lines: list[str] = []
    for heading, keys in recipe_keys():
        lines += [f"### {heading}", ""]
        meaning = _section_meaning(heading)
        if meaning:
            lines += [*textwrap.wrap(meaning, WIDTH, break_long_words=False, break_on_hyphens=False), ""]
        lines += [line for key in keys for line in _item(key)]
        lines += [""] if keys else []
    return "\n".join(lines)


def replace_generated(page: str) -> str:
    """Return a page with its generated part made anew.

    Raises:
        ValueError: the page has no part that is marked as generated.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no generated part; mark one by the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{recipe_reference()}\n{END}{after}"


def _item(key: Key) -> list[str]:
    default = "required" if key.default is None else f"default {key.default}"
    text = f"- **`{key.path}`** ({key.values}; {default}): {key.meaning}"
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _keys(section: type[BaseModel], path: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        own = f"{path}.{name}"
        inner = _sections(field.annotation)
        if inner and inner[0] is not WeightSchedule:
            null = _allows_null(field.annotation)
            values, default = ("section or null", "`null`") if null else ("section", "as below")
            yield Key(own, values, default, _meaning(own, section, name))
            yield from _keys(inner[0], own)
        else:
            values = _describe(field.annotation, field.metadata)
            yield Key(own, values, _default(own, field), _meaning(own, section, name))


def _default(path: str, field: FieldInfo) -> str | None:
    if path in _DEFAULTS:
        return _DEFAULTS[path]
    if field.is_required():
        return None
    shown = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{shown}`"


def _meaning(path: str, section: type[BaseModel], key: str) -> str:
    for cls in section.__mro__:
        if key in _docstrings(cls):
            return _docstrings(cls)[key]
    return _MEANINGS.get(path) or _MEANINGS.get(f"*.{key}", "")


def _section_meaning(heading: str) -> str:
    name = heading.split(":")[0]
    if name == heading and "." not in name and name in Recipe.model_fields:
        (section,) = _sections(Recipe.model_fields[name].annotation)
    elif name.startswith("losses."):
        losses = _sections(Recipe.model_fields["losses"].annotation)[0]
        (section,) = _sections(losses.model_fields[name.removeprefix("losses.")].annotation)
    else:
        return _MEANINGS.get(heading, "")
    return _MEANINGS.get(name) or " ".join((section.__doc__ or "").split())


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings under the fields of a class."""
    if not issubclass(cls, BaseModel) or cls is BaseModel:
        return {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _allows_null(annotation: Any) -> bool:
    return annotation is NoneType or any(_allows_null(argument) for argument in get_args(annotation))


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return in words what a key of this type may hold."""
    for constraint in metadata:
        if isinstance(constraint, BeforeValidator):
            # The words of the message that refuses other values: see `allow` in key_types.py.
            allowed = inspect.getclosurevars(constraint.func).nonlocals.get("allowed")
            if allowed is not None:
                return str(allowed)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if WeightSchedule in _sections(annotation):
        return "number ≥ 0 or a schedule"
    if origin is Annotated:
        return _describe(arguments[0], [*_flat(arguments[1:]), *metadata])
    if origin in (Union, UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(f"`{argument}`" for argument in arguments)
    if origin is list and get_origin(arguments[0]) is list:
        return "list of lists"
    if origin is list:
        return "list of " + _describe(arguments[0]).replace("number", "numbers").replace("text", "texts")
    if origin is dict:
        return "keys and values"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null", Any: "values"}
    return words[annotation] + _bounds(metadata)


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for constraint in metadata:
        yield from constraint.metadata if isinstance(constraint, FieldInfo) else (constraint,)


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a number. Bounds that only keep a number computable are left out."""
    signs = {
        annotated_types.Gt: (">", "gt"),
        annotated_types.Ge: ("≥", "ge"),
        annotated_types.Lt: ("<", "lt"),
        annotated_types.Le: ("≤", "le"),
    }
    found = []
    for constraint in metadata:
        if type(constraint) in signs:
            sign, attribute = signs[type(constraint)]
            value = getattr(constraint, attribute)
            if value < 10**7:
                found.append(f"{sign} {value:g}")
    return " " + ", ".join(found) if found else ""


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(replace_generated(page.read_text(encoding="utf-8")), encoding="utf-8")
