"""The states of random number generators of this process, as tensors.

Training itself needs none of them: order, augmentation, mixing and dropout are seeded by position. They are for what else a user's model
may draw from.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def random_states() -> dict[str, torch.Tensor]:
    """Of torch on the CPU and on this rank's accelerator, of NumPy and of Python."""
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
    """torch's generators that a forward on `device` draws from. As torch.manual_seed, which on a machine without a GPU takes half a
    millisecond to leave word for one."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """What `random_states` returned becomes the state of this process."""
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *numbers = states["python"].tolist()
    spare = states["python_gauss"].item()
    random.setstate((version, tuple(numbers), None if spare != spare else spare))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
