"""Keep constant numbers on the device: a copy from the host in every step would make the host wait for the device."""

from __future__ import annotations

import functools

import torch

Pieces = tuple[tuple[float, int], ...]
"""Numbers, each with how often it is repeated."""


def numbers_beside(like: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """Return numbers (n,) of the type and on the device of a tensor; the same tensor for the same numbers, which nobody
    may change."""
    make = _kept if type(like) is torch.Tensor else _kept.__wrapped__  # fake tensors are not to be kept
    return make(pieces, like.dtype, like.device)


@functools.cache  # for ever: a captured graph reads them where they lie
def _kept(pieces: Pieces, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    numbers = [number for number, times in pieces for _ in range(times)]
    return torch.tensor(numbers, dtype=dtype, device=device)
