"""Find the stages of a model: for each resolution the module whose output ends it, and how far into the model it is.

How stages are found, from one forward on meta tensors:

1. A module counts when it is called once and yields a map (C, H, W), a map (H, W, C) or tokens (N, C) with a square
   grid of more than one position. Modules inside a block whose own output has another resolution do not count: the
   first convolution of a block that halves the resolution still has the old one.
2. The stage of a resolution is the module that ends last at that resolution: of those that end together the outermost
   that holds no other stage. Where a change in place comes after it, the module before it.
3. A stage has at least two layers with weights, where the model has two such stages: a stem of one convolution is none.
   The head, whose size follows the number of classes, belongs to no stage.
4. Where all blocks have one resolution, as in a plain ViT, `split` cuts the blocks into stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dkd.models.blocks import blocks
from dkd.models.heads import head_keys
from dkd.models.inspection import naming_errors, run_on_meta
from dkd.models.registry import ModelSpec, build_model
from dkd.models.tapped import TapError, TappedModel, feature_of

MOST_TOKENS_IN_FRONT = 16
"""Class, distillation and register tokens that are looked for at the front of a grid of tokens."""
_DO_NOTHING = (nn.Identity, nn.Dropout)  # in eval mode
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Stage:
    """The end of a stage.

    Args:
        path: the module to tap.
        shape: of its output for one image.
        side: positions along a side of its map.
        tokens_in_front: of a feature of tokens, those that are no positions; None: the feature is a map.
        depth: share of the model's layers that are done when the stage ends.
    """

    path: str
    shape: tuple[int, ...]
    side: int
    tokens_in_front: int | None
    depth: float


@dataclass(frozen=True)
class _Call:
    """One module's output, in the order in which modules end."""

    path: str
    module: nn.Module
    stage: Stage


def find_stages(spec: ModelSpec, image_size: int) -> list[Stage]:
    """Return the stages of a model in the order of its forward.

    Args:
        spec: the model.
        image_size: side of an image, pixels.

    Raises:
        UnknownModelError: there is no such model, or it cannot take such images.
    """
    model, calls = _record(spec, image_size)
    units = _sides_of_units(model, calls)
    heads = {key.rpartition(".")[0] for key in head_keys(spec)}
    by_side: dict[int, list[_Call]] = {}
    for call in calls:
        if call.path in heads:
            break
        if all(side == call.stage.side for side in _outer_sides(call.path, units)):
            by_side.setdefault(call.stage.side, []).append(call)
    layers = {side: sum(_has_weights(call.module) for call in ended) for side, ended in by_side.items()}
    least = 2 if sum(count >= 2 for count in layers.values()) > 1 else 1
    by_side = {side: ended for side, ended in by_side.items() if layers[side] >= least}
    ends = {ended[-1].path for ended in by_side.values()}
    found = []
    for ended in by_side.values():
        # A body of all stages ends with its last one, which then is the better name.
        named = [call for call in ended if not any(other.startswith(f"{call.path}.") for other in ends)]
        tapped = (c.stage for c in reversed(named or ended) if _can_be_tapped(spec, c.stage.path, image_size))
        if (stage := next(tapped, None)) is not None:
            found.append(stage)
    return sorted(found, key=lambda stage: stage.depth)


def split(spec: ModelSpec, stage: Stage, image_size: int, count: int) -> list[Stage]:
    """Return `count` stages of a model whose blocks all have the resolution of `stage`: the last block of each part.
    Fewer where there are fewer blocks."""
    model, calls = _record(spec, image_size)
    ends = {call.path: call.stage for call in calls if call.stage.shape == stage.shape}
    paths = [path for path, _ in blocks(model) if path in ends]
    if not paths:
        return [stage]
    count = min(count, len(paths))
    chosen = [math.ceil(len(paths) * (part + 1) / count) - 1 for part in range(count)]
    return [ends[paths[place]] for place in chosen]


def _record(spec: ModelSpec, image_size: int) -> tuple[nn.Module, list[_Call]]:
    """Run a forward, and return the outputs that are maps or tokens, in the order in which their modules end."""

    def run() -> tuple[nn.Module, list[_Call]]:
        model = build_model(spec).eval()
        ended: list[tuple[str, nn.Module, tuple[int, ...]]] = []

        def note(path: str, module: nn.Module, output: Any) -> None:
            feature = feature_of(output)
            whole = feature is not None and feature.shape[:1] == (1,)  # not cut into windows
            ended.append((path, module, tuple(feature.shape[1:]) if feature is not None and whole else ()))

        for path, module in model.named_modules():
            module.register_forward_hook(lambda module, _, output, path=path: note(path, module, output))
        model(torch.zeros(1, 3, image_size, image_size))
        return model, list(_read(ended))

    with naming_errors(spec, f"one image of {image_size}×{image_size}"):
        return run_on_meta(run)


def _read(ended: list[tuple[str, nn.Module, tuple[int, ...]]]) -> Iterator[_Call]:
    times: dict[str, int] = {}
    for path, _, _ in ended:
        times[path] = times.get(path, 0) + 1
    layers = sum(_has_weights(module) for _, module, _ in ended) or 1
    done = 0
    for path, module, shape in ended:
        done += _has_weights(module)
        found = _grid(shape)
        if found is not None and times[path] == 1 and path and not isinstance(module, _DO_NOTHING):
            yield _Call(path, module, Stage(path, shape, *found, depth=done / layers))


def _grid(shape: tuple[int, ...]) -> tuple[int, int | None] | None:
    """Return the side of a feature's map and the tokens in front of it, or None where there is no square map."""
    if len(shape) == 3 and shape[1] == shape[2] > 1:
        return shape[1], None
    if len(shape) == 3 and shape[0] == shape[1] > 1:
        return shape[0], None
    if len(shape) == 2:
        side = math.isqrt(shape[0])
        front = shape[0] - side**2
        if side > 1 and front <= MOST_TOKENS_IN_FRONT:
            return side, front
    return None


def _sides_of_units(model: nn.Module, calls: list[_Call]) -> dict[str, int]:
    """Return the side of the output of each block and each reduction of the resolution."""
    modules, sides = dict(model.named_modules()), {call.path: call.stage.side for call in calls}
    return {
        path: side for path, side in sides.items() if len(list(modules[path].children())) and _is_unit(modules[path])
    }


def _outer_sides(path: str, units: dict[str, int]) -> Iterator[int]:
    """Yield the sides of the units that a module lies in."""
    parts = path.split(".")
    for count in range(1, len(parts)):
        outer = ".".join(parts[:count])
        if outer in units:
            yield units[outer]


def _is_unit(module: nn.Module) -> bool:
    """Return whether a module is one block or one reduction of the resolution, and not a body of several blocks."""
    if type(module) in _CONTAINERS:
        return sum(_has_weights(inner) for inner in module.modules()) <= 2
    return not any(isinstance(child, _CONTAINERS) and len(blocks(child)) > 1 for child in module.modules())


def _has_weights(module: nn.Module) -> int:
    """Return 1 for a layer with weights that mixes channels or positions, else 0."""
    return int(any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)))


def _can_be_tapped(spec: ModelSpec, path: str, image_size: int) -> bool:
    """Return whether a tap of a module yields its output unchanged: no activation in place comes after it."""

    def run() -> bool:
        try:
            TappedModel(build_model(spec), [path]).eval()(torch.zeros(1, 3, image_size, image_size))
        except TapError:
            return False
        return True

    return run_on_meta(run)
