"""Build `hf/NAME-OR-FOLDER`: a model of transformers for image classification, by its configuration.

NAME is a model of the Hugging Face hub (or of its cache), FOLDER what `save_pretrained` wrote. Only the configuration
is needed to build a model; weights come from `pretrained` (the same place) or from a file. No code of the hub runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dkd.errors import InputError
from dkd.text import one_line, shorten

PREFIX = "hf/"


class HuggingFaceError(InputError):
    """A model of transformers has no configuration or no weights at its place, or these cannot be read."""


def is_hugging_face(name: str) -> bool:
    """Return whether a model's name is that of a model of transformers."""
    return name.startswith(PREFIX)


def model_config(name: str, classes: int, options: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration of a model.

    Args:
        name: `hf/NAME-OR-FOLDER`.
        classes: outputs of the head.
        options: values that replace those of the configuration, such as image_size.
        stored: the values of the configuration, where a student's description holds them; None: they are read.

    Raises:
        HuggingFaceError: there is no configuration at that place.
    """
    from transformers import AutoConfig

    values = dict(stored) if stored is not None else json.loads(_read_config(name))
    with _naming_errors(name, "its configuration"):
        known = AutoConfig.for_model(values["model_type"])
        if unknown := [key for key in options if not hasattr(known, key)]:
            raise HuggingFaceError(f"{name!r}: its configuration has no {', '.join(unknown)}")
        config = AutoConfig.for_model(**{**values, **options})
    if config.num_labels != classes:
        config.num_labels = classes
    return config


def build(name: str, classes: int, options: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model, initialised at random. Arguments and errors as `model_config`; and what the model's constructor
    raises."""
    from transformers import AutoModelForImageClassification

    config = model_config(name, classes, options, stored)
    return AutoModelForImageClassification.from_config(config, trust_remote_code=False, dtype=torch.get_default_dtype())


def pretrained_state(name: str) -> Mapping[str, torch.Tensor]:
    """Return all tensors of the weights at the model's own place, with the head that they were trained with. Raises
    HuggingFaceError."""
    from transformers import AutoModelForImageClassification

    with _naming_errors(name, "its weights"), _without_progress():
        model, found = AutoModelForImageClassification.from_pretrained(
            _place(name),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    missing = sorted(found["missing_keys"])
    state = dict(model.state_dict())
    for key in missing:  # transformers initialises these at random, and only warns
        state.pop(key, None)
    return state


def class_names(name: str) -> list[str] | None:
    """Return the names of the classes that a model's configuration states, in the order of its logits; None: it has
    only numbers for them. Raises HuggingFaceError."""
    labels = json.loads(_read_config(name)).get("id2label") or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    return None if not names or all(each == f"LABEL_{index}" for index, each in enumerate(names)) else names


def label_count(name: str) -> int:
    """Return the number of classes of the weights at a model's place. Raises HuggingFaceError."""
    return len(json.loads(_read_config(name)).get("id2label") or {})


def stated_normalization(name: str) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation, on values from 0 to 1, of the images that a model's processor makes; None: no
    processor is stored beside the model, or it states none for three channels."""
    processor = _processor(name)
    mean, std = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
    if processor is not None and not getattr(processor, "do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None or len(mean) != 3 or len(std) != 3:
        return None
    # A processor multiplies pixels from 0 to 255 by a factor of its own, most often 1/255.
    factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    scale = 255.0 * float(factor)
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # 0.00392156862745098 is 1/255 rounded
    return [float(value) / scale for value in mean], [float(value) / scale for value in std]


def stated_size(name: str) -> int | None:
    """Return the side of the images of a model, pixels: as its processor makes them, or as its configuration states it;
    None: neither does. Raises HuggingFaceError."""
    processor = _processor(name)
    if processor is not None:
        return _side(processor)
    size = json.loads(_read_config(name)).get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def _processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(_place(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):  # none, or a damaged one
        return None


def _side(processor: Any) -> int | None:
    """Return the side of a processor's square images, in pixels; None: they are not square."""
    for size in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        sides = {key: value for key, value in dict(size or {}).items() if value}
        height, width = sides.get("height"), sides.get("width")
        if height and height == width:
            return int(height)
        if "shortest_edge" in sides and size is getattr(processor, "size", None):
            return int(sides["shortest_edge"])
    return None


def _place(name: str) -> str:
    return name.removeprefix(PREFIX)


@functools.cache  # a finished student's description holds the configuration, and its folder may be gone by then
def _read_config(name: str) -> str:
    """Return the configuration at a model's place as JSON. Raises HuggingFaceError."""
    from transformers import AutoConfig

    with _naming_errors(name, "its configuration"):
        return json.dumps(AutoConfig.from_pretrained(_place(name), trust_remote_code=False).to_dict())


@contextmanager
def _naming_errors(name: str, what: str) -> Iterator[None]:
    """Turn what transformers and the hub's client raise for a place into a HuggingFaceError of one line."""
    try:
        yield
    except HuggingFaceError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise HuggingFaceError(
            f"{name!r}: {what} cannot be read ({shorten(one_line(error), 300)}); name a folder that `save_pretrained` "
            "wrote, as hf/FOLDER, or a model of the hub where there is a network"
        ) from error


@contextmanager
def _without_progress() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
