"""What a model is made of: paths, output shapes, parameter counts. On meta tensors where the model allows it: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from dkd.models.registry import ModelSpec, build_model
from dkd.models.tapped import TappedModel


@dataclass(frozen=True)
class ModuleRow:
    """One submodule: its dotted path, class, the shape of its output for one image (None: not one tensor), parameters, calls."""

    path: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    calls: int


T = TypeVar("T")


def _on_meta(run: Callable[[], T]) -> T:
    """`run` with meta tensors; a model that cannot work with those (it reads values) runs on the CPU instead."""
    try:
        with torch.device("meta"), torch.no_grad():
            return run()
    except (NotImplementedError, RuntimeError):
        with torch.no_grad():
            return run()


def build_on_meta(spec: ModelSpec) -> nn.Module:
    """The architecture without memory or time; on the CPU where it cannot be built on the meta device."""
    return _on_meta(lambda: build_model(spec))


def output_shapes(spec: ModelSpec, taps: Sequence[str], image_size: int) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Shapes for one image: of the logits, and of each tapped feature, batch dimension left out. Checks the taps as TappedModel does.

    Raises:
        UnknownModelError, TapError: no such model or tap.
    """

    def run() -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        logits, features = TappedModel(build_model(spec), taps).eval()(torch.zeros(1, 3, image_size, image_size))
        return tuple(logits.shape[1:]), {tap: tuple(feature.shape[1:]) for tap, feature in features.items()}

    return _on_meta(run)


def module_rows(spec: ModelSpec, image_size: int) -> list[ModuleRow]:
    """Every submodule of the model, in the order of definition.

    Args:
        spec: which model.
        image_size: side of the square input image, pixels.

    Raises:
        UnknownModelError: no such model.
    """

    def run() -> list[ModuleRow]:
        model = build_model(spec).eval()
        shapes: dict[str, tuple[int, ...] | None] = {}
        calls: dict[str, int] = {}

        def note(path: str, output: object) -> None:
            shapes[path] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else None
            calls[path] = calls.get(path, 0) + 1

        for path, module in model.named_modules():
            module.register_forward_hook(lambda _module, _inputs, output, path=path: note(path, output))
        model(torch.zeros(1, 3, image_size, image_size))
        return [
            ModuleRow(path, type(module).__name__, shapes.get(path), sum(p.numel() for p in module.parameters()), calls.get(path, 0))
            for path, module in model.named_modules()
        ]

    return _on_meta(run)
