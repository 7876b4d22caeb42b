"""Find a model's head: the tensors whose shapes follow the number of classes."""

from __future__ import annotations

from dataclasses import replace

from dkd.models.inspection import build_on_meta
from dkd.models.registry import ModelSpec, UnknownModelError


def head_keys(spec: ModelSpec) -> tuple[str, ...]:
    """Return the keys of the tensors that have another shape in the same model with one class more. Empty for a model
    that is built with one number of classes only.

    Raises:
        UnknownModelError: the model itself cannot be built.
    """
    own = build_on_meta(spec).state_dict()
    try:
        other = build_on_meta(replace(spec, classes=spec.classes + 1)).state_dict()
    except UnknownModelError:
        return ()
    return tuple(key for key, tensor in own.items() if key in other and other[key].shape != tensor.shape)


def head_module(spec: ModelSpec) -> str | None:
    """Return the path of the module that holds all tensors of the head; None where several modules or none do.

    Raises:
        UnknownModelError: the model itself cannot be built.
    """
    paths = {key.rpartition(".")[0] for key in head_keys(spec)}
    return paths.pop() if len(paths) == 1 else None
