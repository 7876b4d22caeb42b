"""What a model is made of: paths, output shapes, parameter counts. On meta tensors where the model allows it: nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dkd.models.registry import ModelSpec, build_model


@dataclass(frozen=True)
class ModuleRow:
    """One submodule: its dotted path, class, the shape of its output for one image (None: not one tensor), parameters, calls."""

    path: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    calls: int


def build_for_inspection(spec: ModelSpec) -> nn.Module:
    """The model on the meta device: shapes without memory or time. A model that cannot be built there is built on the CPU."""
    try:
        with torch.device("meta"):
            return build_model(spec)
    except (NotImplementedError, RuntimeError):
        return build_model(spec)


def run_for_inspection(model: nn.Module, image_size: int) -> object:
    """Forward of one blank image in eval mode, without gradient. Returns the model's output."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        model.train(was_training)


def module_rows(spec: ModelSpec, image_size: int) -> list[ModuleRow]:
    """Every submodule of the model, in the order of definition.

    Args:
        spec: which model.
        image_size: side of the square input image, pixels.

    Raises:
        UnknownModelError: no such model.
    """
    model = build_for_inspection(spec)
    shapes: dict[str, tuple[int, ...] | None] = {}
    calls: dict[str, int] = {}

    def note(path: str, output: object) -> None:
        shapes[path] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else None
        calls[path] = calls.get(path, 0) + 1

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, path=path: note(path, output))
    run_for_inspection(model, image_size)
    return [
        ModuleRow(path, type(module).__name__, shapes.get(path), sum(p.numel() for p in module.parameters()), calls.get(path, 0))
        for path, module in model.named_modules()
    ]
