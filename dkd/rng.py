"""Derive seeds from a position in training, and save the states of this process's generators as tensors.

Order, augmentation, mixing and dropout are seeded by position, and need no saved state. A checkpoint stores the states
of the generators for whatever else a user's model draws from them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

_MASK = 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def derive_seed(*numbers: int) -> int:
    """Return one 63-bit seed from several whole numbers, equal on every machine (splitmix64 of each in turn)."""
    return _last_state(numbers) >> 1


def _last_state(numbers: Sequence[int]) -> int:
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + _STEP & _MASK
        state = (state ^ state >> 30) * _FIRST & _MASK
        state = (state ^ state >> 27) * _SECOND & _MASK
        state ^= state >> 31
    return state


def derive_seeds(numbers: Sequence[int], last: np.ndarray) -> np.ndarray:
    """Return, as uint64, `derive_seed(*numbers, n)` for each n of `last`, all at once."""
    state = np.full(len(last), _last_state(numbers), dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = (state ^ last.astype(np.int64).view(np.uint64)) + np.uint64(_STEP)
        state = (state ^ state >> np.uint64(30)) * np.uint64(_FIRST)
        state = (state ^ state >> np.uint64(27)) * np.uint64(_SECOND)
        state ^= state >> np.uint64(31)
    return state >> np.uint64(1)


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of the generators of torch on the CPU and on this rank's GPU, of NumPy and of Python."""
    _name, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, spare = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor(float(gauss), dtype=torch.float64),
        "python": torch.tensor([version, *numbers]),
        "python_gauss": torch.tensor(float("nan") if spare is None else spare, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def seed_device(device: torch.device, seed: int) -> None:
    """Seed those of torch's generators that a forward on `device` draws from. torch.manual_seed does the same, but on a
    machine without a GPU it takes half a millisecond to queue a call for a GPU."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set the generators of this process to the states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *numbers = states["python"].tolist()
    spare = states["python_gauss"].item()
    random.setstate((version, tuple(numbers), None if spare != spare else spare))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
