"""Find the blocks of a model: the repeated units that sharding does not divide."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the blocks: the elements of Sequential and ModuleList containers that are made of
    several modules with parameters. Only the outermost are returned: the BasicBlocks of a ResNet, the encoder blocks of
    a ViT."""
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
    """Return the names of the blocks' classes, sorted."""
    return sorted({type(module).__name__ for _, module in blocks(model)})


def _has_parts(module: nn.Module) -> bool:
    return (
        sum(any(True for _ in child.parameters(recurse=False)) for child in module.modules() if child is not module) > 1
    )
