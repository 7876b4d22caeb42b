"""Leave parts of a model untrained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dkd.errors import InputError
from dkd.library_internals.torch import NORMS_WITH_STATISTICS
from dkd.text import did_you_mean


class FreezingError(InputError):
    """There is no module or parameter of a name, or nothing would be left to train."""


def freeze(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """Switch the gradient of modules and parameters off.

    Args:
        model: it is changed.
        paths: dotted paths of modules, such as `layer1`, or of single parameters, such as `embeddings.mask_token`.

    Returns:
        The modules among them.

    Raises:
        FreezingError: a path does not exist, or nothing would be left to train.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    found = []
    for path in paths:
        if path in parameters:
            parameters[path].requires_grad_(False)
        elif path in modules and path:
            found.append(modules[path].requires_grad_(False))
        else:
            near = did_you_mean(path, [*modules, *parameters], most=3, cutoff=0.4)
            raise FreezingError(f"{path!r} is neither a module nor a parameter of {type(model).__name__}{near}")
    if paths and not any(parameter.requires_grad for parameter in model.parameters()):
        raise FreezingError(f"with {', '.join(paths)} frozen, nothing is left to train")
    return found


def batch_norms(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers in `modules` that keep running statistics."""
    return [
        inner
        for module in modules
        for inner in module.modules()
        if isinstance(inner, NORMS_WITH_STATISTICS) and inner.track_running_stats
    ]
