"""Read the models that a recipe is to be written for, as `NAME[=WEIGHTS]` names them on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dkd.errors import InputError
from dkd.models import (
    PRETRAINED,
    ModelSpec,
    StatedInput,
    WeightsError,
    build_on_meta,
    head_keys,
    head_size,
    read_description,
    stated_class_count,
    stated_classes,
    stated_input,
    student_spec,
)
from dkd.models.registry import runs_user_code

LIBRARIES = ("torchvision/", "timm/", "hf/")


@dataclass(frozen=True)
class NamedModel:
    """A model of the recipe to be written.

    Args:
        name, weights: as in a recipe; weights may be None for a student.
        options: keyword arguments of the model.
        norm: of the CIFAR models of this package.
        stated: the input that its weights, or its library, state; None: nothing is stated.
        image_size: side of the images of a run of dkd that made the weights, pixels; None: not known.
    """

    name: str
    weights: str | None
    options: dict[str, Any]
    norm: str | None
    stated: StatedInput | None
    image_size: int | None = None

    @property
    def is_of_a_library(self) -> bool:
        """Return whether the model is made for photographs of 224 pixels: those of this package are for small ones."""
        return self.name.startswith((*LIBRARIES, "mobilenetv1")) or ":" in self.name

    @property
    def fixed_size(self) -> int | None:
        """Return the only side of images that the model takes, pixels; None: it takes several."""
        for key in ("img_size", "image_size"):  # timm's and transformers' own option for it
            if isinstance(size := self.options.get(key), int):
                return size
        return None if self.stated is None else self.stated.size

    def spec(self, classes: int) -> ModelSpec:
        """Return the architecture with so many outputs."""
        return ModelSpec(self.name, classes, self.norm, self.options)

    def count_classes(self, classes: int) -> int:
        """Return the number of outputs of the model's head in its weights; `classes` where the weights do not show it.

        Raises:
            UnknownModelError, WeightsError: there is no such model, or no such file.
        """
        if self.weights in (None, "random", "as_built"):
            return classes
        assert self.weights is not None
        stated = stated_classes(self.name, self.weights)
        if stated is not None:
            return len(stated.names)
        spec = self.spec(classes)
        return head_size(build_on_meta(spec), self.name, self.weights, head_keys(spec)) or classes

    def known_classes(self) -> int | None:
        """Return the number of outputs of the model's head in its weights; None where the weights do not show it.
        Errors as `count_classes`."""
        return stated_class_count(self.spec(2), self.weights)


def read_model(text: str, is_teacher: bool, options: dict[str, Any] | None = None) -> NamedModel:
    """Read `NAME[=WEIGHTS]`, or a run of dkd whose student it is.

    Args:
        text: as the command line gives it.
        is_teacher: whether weights are needed.
        options: keyword arguments of the model.

    Raises:
        InputError: a teacher has no weights; or the run has no student.
    """
    if _is_run(text):
        of_run = _read_run(text)
        return replace(of_run, options={**of_run.options, **(options or {})})
    name, equals, weights = text.partition("=")
    if not equals and "/" in name and not name.startswith(LIBRARIES) and ":" not in name and Path(name).exists():
        raise InputError(f"{name!r} is no run of dkd with a finished student: student.safetensors and student.json")
    if equals and not weights:
        raise InputError(f"{text!r}: name weights after =, such as {name}={PRETRAINED}, or leave = out")
    if not equals and is_teacher:
        weights = PRETRAINED if name.startswith(LIBRARIES) else "as_built" if ":" in name else ""
        if not weights:
            raise InputError(
                f"--teacher {name}: a model of this package has no weights of its own; name a file, {name}=FILE, or "
                "the run that trained it, --teacher runs/NAME"
            )
    chosen = weights or None
    given, norm, image_size = dict(options or {}), None, None
    if chosen is not None and _is_run(chosen):
        of_run = _read_run(chosen)
        if of_run.name == name:
            given, norm, image_size = {**of_run.options, **given}, of_run.norm, of_run.image_size
    return NamedModel(name, chosen, given, norm, stated_input(name, chosen or _as_library(name), given), image_size)


def _as_library(name: str) -> str | None:
    """Return what states a model's input where it has no weights: the configuration of timm and of transformers."""
    return "as_built" if name.startswith(("timm/", "hf/")) else None


def _is_run(text: str) -> bool:
    path = Path(text)
    file = path / "student.safetensors" if path.is_dir() else path
    return file.suffix == ".safetensors" and file.is_file() and file.with_suffix(".json").is_file()


def _read_run(text: str) -> NamedModel:
    """Return the student of a run of dkd. Raises InputError."""
    path = Path(text)
    weights = path / "student.safetensors" if path.is_dir() else path
    try:
        description = read_description(weights)
        spec = student_spec(description)
    except WeightsError as error:
        raise InputError(str(error)) from error
    if runs_user_code(spec.name):
        raise InputError(
            f"the student of {text!r} is {spec.name!r}, code to be imported and run; name it yourself: "
            f"{spec.name}={text}"
        )
    size = description.get("image_size")
    stated = stated_input(spec.name, str(weights))
    return NamedModel(spec.name, str(weights), dict(spec.options), spec.norm, stated, size)
