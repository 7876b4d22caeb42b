"""Copy the tensors of a GPU to the host through one piece of page-locked memory.

Each copy of a tensor into ordinary memory waits for the GPU, and goes through a small page-locked buffer of CUDA's.
Here all copies are asked for at once, and waited for once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

_ALIGNED = 64
"""Bytes at whose multiples tensors begin."""


class HostBuffer:
    """Copies tensors into memory that is kept for the next time.

    Args:
        make: returns ordinary or page-locked memory, uint8 (bytes,).
    """

    def __init__(self, make: Callable[[int], torch.Tensor] | None = None) -> None:
        self._make = make or page_locked
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies on the CPU by name, of the same shapes and layouts. They last until the next call. Waits for
        the devices of the tensors."""
        spans = {
            name: tensor for name, tensor in tensors.items() if tensor.is_contiguous() or _fills_its_memory(tensor)
        }
        starts, size = {}, 0
        for name, tensor in spans.items():
            starts[name] = size
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # let go of before more is taken
            self._memory = self._make(size)
        found = {}
        for name, tensor in tensors.items():
            if name not in spans:
                found[name] = tensor.detach().to("cpu", copy=True)
                continue
            part = self._memory[starts[name] : starts[name] + tensor.numel() * tensor.element_size()]
            found[name] = part.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            found[name].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in spans.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return found


def page_locked(size: int) -> torch.Tensor:
    """Return page-locked memory, uint8 (size,); ordinary memory where the system gives no more of it. torch takes a
    power of two of it, at least `size`."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


def _fills_its_memory(tensor: torch.Tensor) -> bool:
    """Return whether the numbers of a tensor lie without gaps, in whatever order of dimensions."""
    wanted = 1
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count != 1 and stride != wanted:
            return False
        wanted *= count
    return True
