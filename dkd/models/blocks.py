"""The blocks of a model: the repeated units that sharding keeps whole."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the elements of Sequential and ModuleList containers that are made of several modules with
    parameters, outermost
    ones only: the BasicBlocks of a ResNet, the encoder blocks of a ViT."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if isinstance(module, _CONTAINERS):
            for name, child in module.named_children():
                if not isinstance(child, _CONTAINERS) and _has_parts(child):
                    found.append((f"{path}.{name}" if path else name, child))
    return found


def block_classes(model: nn.Module) -> list[str]:
    """Names of the blocks' classes."""
    return sorted({type(module).__name__ for _, module in blocks(model)})


def _has_parts(module: nn.Module) -> bool:
    return (
        sum(any(True for _ in child.parameters(recurse=False)) for child in module.modules() if child is not module) > 1
    )
