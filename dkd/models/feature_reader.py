"""Read one pooled feature of a model while its forward runs, without changing what the forward returns.

A training taps its features by TappedModel. What is read here is asked for in evaluations alone: the hook is there only
inside `reading`, and the forward still goes through whatever wraps the model (DDP, FSDP2, ZeRO).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dkd.models.heads import head_module
from dkd.models.inspection import naming_errors, run_on_meta
from dkd.models.registry import ModelSpec, build_model
from dkd.models.tapped import TapError, feature_of
from dkd.text import did_you_mean


def pool(feature: torch.Tensor) -> torch.Tensor:
    """Return (b, C): a feature averaged over its positions. Maps are (b, C, h, w), or (b, h, w, C) where only h and w
    are equal, and tokens are (b, N, C): all N of them are averaged, class tokens included."""
    if feature.dim() == 4 and feature.shape[1] == feature.shape[2] != feature.shape[3]:
        return feature.mean((1, 2))
    if feature.dim() == 3:
        return feature.mean(1)
    return feature if feature.dim() == 2 else feature.flatten(2).mean(2)


class FeatureReader:
    """Read the pooled output of a module, or the pooled input of the model's head.

    Args:
        model: the plain model, without its wrappers.
        spec: of the model.
        tap: dotted path of the module; None: the input of the head.

    Raises:
        TapError: there is no such module, or no single module is the head.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, tap: str | None) -> None:
        self._of_input = tap is None
        self._path = find_head(spec) if tap is None else tap
        modules = dict(model.named_modules())
        if not self._path or self._path not in modules:
            near = did_you_mean(self._path, modules, most=3, cutoff=0.4)
            raise TapError(f"{self._path!r} is not a module of {type(model).__name__}{near}")
        self._module = modules[self._path]
        self._read: list[torch.Tensor] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the features of all forwards inside."""
        add: Any = self._module.register_forward_pre_hook if self._of_input else self._module.register_forward_hook
        hook = add(self._keep_input if self._of_input else self._keep_output, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._read = []

    def take(self) -> torch.Tensor:
        """Return the pooled feature (b, C) of the forward since the last call. Raises TapError unless the module was
        called once."""
        read, self._read = self._read, []
        if len(read) != 1:
            raise TapError(f"{self._path!r} fired {len(read)} times in one forward; a tap must fire exactly once")
        return read[0]

    def _keep_input(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        given = [value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)]
        self._keep(given[0] if given else None, "is given")

    def _keep_output(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        self._keep(feature_of(output), "yields")

    def _keep(self, feature: torch.Tensor | None, verb: str) -> None:
        if feature is None or feature.dim() < 2:
            raise TapError(f"{self._path!r} {verb} no tensor of one row for each image; tap a module inside it")
        # Pooled at once: a module after it may change the tensor in place.
        self._read.append(pool(feature))


def find_head(spec: ModelSpec) -> str:
    """Return the path of the module that is the model's head. Raises TapError where no single module is."""
    path = head_module(spec)
    if path is None:
        raise TapError(f"no single module is the head of {spec.name!r}; name the module whose output is the feature")
    return path


def feature_width(spec: ModelSpec, tap: str | None, image_size: int) -> int:
    """Return C, the numbers of the pooled feature of one image.

    Args:
        spec, tap: as FeatureReader.
        image_size: side of an image, pixels.

    Raises:
        TapError: the feature cannot be read.
        UnknownModelError: there is no such model.
    """

    def run() -> int:
        model = build_model(spec).eval()
        reader = FeatureReader(model, spec, tap)
        with reader.reading():
            model(torch.zeros(1, 3, image_size, image_size))
            return reader.take().shape[1]

    with naming_errors(spec, f"one image of {image_size}×{image_size}"):
        return run_on_meta(run)
