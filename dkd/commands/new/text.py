"""Write the chosen recipe as commented YAML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from dkd.commands.new.choices import Choices
from dkd.commands.new.models import NamedModel
from dkd.text import shorten


def recipe_text(chosen: Choices) -> str:
    """Return the recipe, with a comment for each choice. `dkd.config.load_recipe` reads it."""
    blocks = (_head, _data, _models, _losses, _training)
    return "\n".join(line for block in blocks for line in block(chosen)) + "\n"


def _head(chosen: Choices) -> Iterator[str]:
    what = f"{chosen.student.name} on {chosen.images.train}"
    teacher = "" if chosen.teacher is None else f", taught by {chosen.teacher.name}"
    yield f"# {what}{teacher}."
    yield "# Change any key here, or on the command line as key=value: docs/reference/recipe.md lists all of them."
    yield f"run: {{name: {_yaml(chosen.name)}, seed: 0}}"


def _data(chosen: Choices) -> Iterator[str]:
    images = chosen.images
    yield "data:"
    yield f"  train: {_yaml(images.train)}  # {images.count:,} images"
    validation = {
        float: "a fraction of the training images, drawn by run.seed"
        + (", the same of each class" if images.labels else ""),
        type(None): "nothing is evaluated",
    }.get(type(images.validation), "")
    yield f"  validation: {_yaml(images.validation)}" + (f"  # {validation}" if validation else "")
    names = "" if images.class_names is None else f": {shorten(', '.join(images.class_names), 60)}"
    if not images.labels:
        yield "  labels: false  # the images have none: the teacher alone is learned from"
        yield f"  classes: {images.classes}  # the student's outputs{_why_outputs(chosen)}"
    else:
        yield f"  classes: {images.classes}  # counted in the training images{_comment(names)}"
    for key, column in images.columns.items():
        yield f"  {key}: {_yaml(column)}"
    yield f"  transforms: {chosen.transforms}"
    fixed = chosen.image_size in (chosen.student.fixed_size, chosen.student.image_size)
    why = (
        "as the student's library or run states it"
        if fixed
        else f"the median image has {images.side} on its shorter side"
    )
    yield f"  image_size: {chosen.image_size}  # pixels; {why}"
    if chosen.mean_std is not None:
        yield from _normalization(chosen.mean_std, "  ")


def _why_outputs(chosen: Choices) -> str:
    return ", as many as the teacher has" if "kd" in chosen.losses else ", which no loss reads"


def _models(chosen: Choices) -> Iterator[str]:
    student, teacher = chosen.student, chosen.teacher
    yield "student:"
    yield f"  name: {_yaml(student.name)}"
    yield from _details(student)
    if student.weights is None and student.is_of_a_library:
        yield "  # weights: pretrained   # or a file; a head of other classes starts anew"
    elif student.weights is not None:
        yield f"  weights: {_yaml(student.weights)}  # a head of other classes starts anew"
    if teacher is None:
        return
    yield "teacher:"
    yield f"  name: {_yaml(teacher.name)}"
    yield f"  weights: {_yaml(teacher.weights)}"
    yield from _details(teacher)
    if chosen.teacher_classes not in (None, chosen.images.classes):
        yield f"  classes: {chosen.teacher_classes}  # of its own head, which no loss here reads"
    if chosen.teacher_mean_std is not None:
        yield from _normalization(chosen.teacher_mean_std, "  ")
    if chosen.teacher_size is not None:
        yield f"  input_size: {chosen.teacher_size}  # images are resized for it"
    yield "  # cache: taught  # stores what the losses read of it: later students of this data need no teacher"


def _details(model: NamedModel) -> Iterator[str]:
    if model.norm is not None:
        yield f"  norm: {model.norm}"
    if model.options:
        yield f"  options: {_yaml(dict(model.options))}"


def _losses(chosen: Choices) -> Iterator[str]:
    yield "losses:"
    if chosen.images.labels:
        yield "  ce: {weight: 1.0}  # cross-entropy with the labels"
    else:
        yield "  ce: null  # cross-entropy needs labels"
    pairs = chosen.pairs
    if pairs is not None and "at" in chosen.losses:
        yield "  at:  # attention transfer; pairs of [student, teacher]: the last module of each resolution"
        yield "    beta: 1000"
        if pairs.class_tokens is not None:
            yield f"    class_tokens: {_yaml(pairs.class_tokens)}  # tokens in front of the image's"
        if pairs.needs_resize:
            yield "    resize: map  # the larger map is interpolated to the smaller one"
        yield "    pairs:"
        for pair, line in zip(pairs.paths, pairs.table(), strict=True):
            yield f"    - {_yaml(pair)}  # {' '.join(line.split())}"
    if pairs is not None and "sp" in chosen.losses:
        yield "  sp:  # similarity-preserving: the Gram matrix of the whole global batch"
        yield "    gamma: 3000"
        yield "    reference_batch: 128  # the batch that this gamma was published with"
        yield f"    pairs: [{_yaml(pairs.paths[-1])}]"
    if "kd" in chosen.losses:
        yield "  kd: {alpha: 0.9, temperature: 4}  # soft targets"


def _training(chosen: Choices) -> Iterator[str]:
    yield "train:"
    yield f"  global_batch: {chosen.global_batch}  # samples of a step, over all processes"
    if chosen.has_batch_norm:
        yield f"  # micro_batch: {max(1, chosen.global_batch // 4)}   # BatchNorm's batch: written out, any number of"
        yield "  # processes that it fits is the same training; else it is global_batch / processes"
    yield f"  epochs: {chosen.epochs}"
    yield "  precision: auto  # what the hardware is fast in: bf16, fp16 or fp32"
    if chosen.adamw:
        yield "  clip_grad_norm: 1.0"
        yield f"optimizer: {{name: adamw, lr: {_number(chosen.lr)}, weight_decay: 0.05, decay_norm_and_bias: false}}"
    else:
        decay = "5.0e-4" if chosen.image_size <= 64 else "1.0e-4"
        yield (
            f"optimizer: {{name: sgd, lr: {_number(chosen.lr)}, momentum: 0.9, nesterov: true, weight_decay: {decay}}}"
        )
    warmup = min(5, chosen.epochs // 10)
    yield f"schedule: {{name: cosine, warmup_epochs: {warmup}}}"


def _normalization(stated: tuple[tuple[float, ...], tuple[float, ...], str], indent: str) -> Iterator[str]:
    mean, std, source = stated
    yield f"{indent}normalization: {{mean: {_yaml(list(mean))}, std: {_yaml(list(std))}}}  # {_comment(source)}"


def _number(value: float) -> str:
    """Return a number as YAML reads it back: `5e-05` would be text."""
    text = f"{value:g}"
    return text if "e" not in text or "." in text else text.replace("e", ".0e")


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _comment(text: str) -> str:
    """Return text that cannot end a comment: names of classes are the data's."""
    return "".join(c if c.isprintable() else " " for c in text)
