"""In which types, memory formats and modes a recipe's models compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from dkd import launch
from dkd.config import Recipe
from dkd.library_internals.torch import make_inductor_deterministic

Model = TypeVar("Model", bound=torch.nn.Module)


def has_gpu() -> bool:
    """Return whether there is an accelerator to train on. Apple's does not count: it has no float64, in which
    evaluation and logs are summed."""
    return torch.accelerator.is_available() and getattr(torch.accelerator.current_accelerator(), "type", "") != "mps"


def device_type(asks_for_cpu: bool) -> str:
    """Return torch's type of the device that this process trains on.

    Args:
        asks_for_cpu: as `Launch.asks_for_cpu`.
    """
    accelerator = torch.accelerator.current_accelerator() if has_gpu() and not asks_for_cpu else None
    return "cpu" if accelerator is None else accelerator.type


@dataclass(frozen=True)
class Arithmetic:
    """In what a recipe's models compute.

    Args:
        dtype: the type of weights and inputs, before any autocast.
        memory_format: of weights and inputs.
        autocast: the type that models compute in where torch.autocast allows; None: their own type.
    """

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Arithmetic:
        """Return the arithmetic of a recipe.

        Raises:
            ValueError: the precision is still `auto`.
        """
        train = recipe.train
        if train.precision == "auto":
            raise ValueError("train.precision is auto: call hardware.settle first")
        return cls(
            torch.float64 if train.precision == "fp64" else torch.float32,
            torch.channels_last if train.channels_last else torch.contiguous_format,
            {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.precision),
        )

    def place(self, model: Model, device: torch.device, to_be_sharded: bool = False) -> Model:
        """Move `model` to `device`, into this type and memory format. Weights that are to be cut into shards stay
        contiguous; with inputs in channels_last, convolutions work in that format all the same."""
        memory_format = torch.contiguous_format if to_be_sharded else self.memory_format
        return model.to(device, self.dtype).to(memory_format=memory_format)


def set_arithmetic(recipe: Recipe) -> None:
    """Set what float32 means on GPUs, and whether they must repeat their bits. For the whole process."""
    # torch's older switches: mixed with the newer ones they raise, and Inductor reads these.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.train.precision == "tf32"
    if recipe.run.deterministic:
        launch.ask_for_repeatable_gpu_sums()
        torch.use_deterministic_algorithms(True)
        # What torch would do beside, for finding bugs, costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        make_inductor_deterministic()
