"""Read what weights state of themselves: the input that they were trained on, and the names of their classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dkd.atomic_files import read_json
from dkd.models import hugging_face
from dkd.models.heads import head_keys
from dkd.models.inspection import build_on_meta
from dkd.models.registry import ModelSpec
from dkd.models.student_file import find_wrong
from dkd.models.weights import AS_BUILT, PRETRAINED, find_weight_set, head_size, is_file_name

TORCHVISION, TIMM = "torchvision/", "timm/"


@dataclass(frozen=True)
class StatedInput:
    """The images that a model was trained on.

    Args:
        mean, std: of the three channels, on values from 0 to 1; None: not stated.
        size: side in pixels, where the model takes no other; None: the model takes other sizes.
        source: who states it, in words.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None
    source: str

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return mean and std, or None where they are not stated."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)


@dataclass(frozen=True)
class StatedClasses:
    """The classes that weights were trained on.

    Args:
        names: in the order of the logits.
        by_dkd: whether dkd has written them from the data of a run; other sources name the same classes in words of
            their own.
    """

    names: list[str]
    by_dkd: bool


def stated_input(name: str, weights: str | None, options: Mapping[str, Any] | None = None) -> StatedInput | None:
    """Return the input that a model's weights state, or None where they state none. Errors of places are those of
    loading the weights, and are reported there.

    Args:
        name: of the model.
        weights: as in a recipe.
        options: of the model; an image size among them is the one that it takes.
    """
    if weights in (None, "random"):
        return None
    found = _read_stated(name, weights)
    given = next(
        (size for key in ("img_size", "image_size") if isinstance(size := (options or {}).get(key), int)), None
    )
    if given is None:
        return found
    if found is None:
        return StatedInput(None, None, given, "its options")
    return replace(found, size=given)


def _read_stated(name: str, weights: str | None) -> StatedInput | None:
    if weights not in (AS_BUILT, PRETRAINED) and is_file_name(str(weights)):
        found = _describe_file(Path(str(weights))).get("normalization")
        if isinstance(found, Mapping) and {"mean", "std"} <= set(found):
            size = _library_size(name)
            return StatedInput(tuple(found["mean"]), tuple(found["std"]), size, "its student.json")
    if name.startswith(TORCHVISION) and not is_file_name(str(weights)):
        transforms = find_weight_set(name, str(weights)).transforms()
        if hasattr(transforms, "mean"):  # those of detection and segmentation have none
            return StatedInput(tuple(transforms.mean), tuple(transforms.std), None, f"torchvision's {weights}")
    if name.startswith(TIMM):
        return _stated_by_timm(name.removeprefix(TIMM))
    if hugging_face.is_hugging_face(name):
        values, size = hugging_face.stated_normalization(name), hugging_face.stated_size(name)
        mean, std = (None, None) if values is None else (tuple(values[0]), tuple(values[1]))
        source = "its configuration" if values is None else "its processor"
        return None if values is None and size is None else StatedInput(mean, std, size, source)
    return None


def _library_size(name: str) -> int | None:
    """Return the only size that a library's model takes, as the library states it."""
    if name.startswith(TIMM):
        stated = _stated_by_timm(name.removeprefix(TIMM))
        return None if stated is None else stated.size
    if not hugging_face.is_hugging_face(name):
        return None
    try:
        return hugging_face.stated_size(name)
    except hugging_face.HuggingFaceError:  # the folder of a finished student may be gone
        return None


def _stated_by_timm(name: str) -> StatedInput | None:
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:  # building the model reports this
        return None
    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:  # of a tag that timm does not know, which building the model reports
        return None
    if found is None:
        return None
    size = int(found.input_size[-1]) if found.fixed_input_size else None
    return StatedInput(tuple(found.mean), tuple(found.std), size, "timm's configuration")


def stated_classes(name: str, weights: str | None) -> StatedClasses | None:
    """Return the names of the classes that a model's weights state, or None where they state none.

    Args:
        name, weights: as in a recipe.
    """
    if weights in (None, "random"):
        return None
    if weights not in (AS_BUILT, PRETRAINED) and is_file_name(str(weights)):
        names = _describe_file(Path(str(weights))).get("class_names")
        return StatedClasses(names, by_dkd=True) if names else None
    if name.startswith(TORCHVISION):
        names = find_weight_set(name, str(weights)).meta.get("categories")
        return StatedClasses([str(each) for each in names], by_dkd=False) if names else None
    if hugging_face.is_hugging_face(name):
        names = hugging_face.class_names(name)
        return StatedClasses(names, by_dkd=False) if names else None
    return None


def stated_class_count(spec: ModelSpec, weights: str | None) -> int | None:
    """Return the number of classes that a model's weights state, by names or by the size of the head; None where they
    state none.

    Args:
        spec: of the model, with any number of classes.
        weights: as in a recipe.

    Raises:
        WeightsError: there are no such weights.
        UnknownModelError: there is no such model.
    """
    if weights in (None, "random", AS_BUILT):
        return None
    named = stated_classes(spec.name, weights)
    if named is not None:
        return len(named.names)
    # A model that was trained without labels may have a head of 0 classes.
    return head_size(build_on_meta(spec), spec.name, str(weights), head_keys(spec)) or None


def _describe_file(path: Path) -> dict[str, Any]:
    """Return what is stored of a student in the JSON beside its weights, or in their metadata; empty where the file is
    no student of dkd."""
    if path.is_dir():
        path = path / "student.safetensors"
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    beside, _ = read_json(path.with_suffix(".json"))
    described = dict(beside) if isinstance(beside, dict) and find_wrong(beside) is None else {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        described |= json.loads(metadata.get("student", "{}"))
        if "class_names" in metadata:
            described["class_names"] = json.loads(metadata["class_names"])
    except (SafetensorError, OSError, ValueError):  # loading the weights reports this
        return described
    return described
