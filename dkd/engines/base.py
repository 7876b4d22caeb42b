"""What training asks of an engine. Everything that differs between DDP, FSDP2 and DeepSpeed is an implementation of
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from dkd.checkpoints import SavedTensor
from dkd.engines.ema import WeightAverage
from dkd.engines.rules import EngineRules
from dkd.models import TappedModel

Tensors = dict[str, torch.Tensor]


class TrainingTensors(Protocol):
    """Everything that training changes, as named tensors: the same names and whole shapes under every engine."""

    def collect(self) -> Tensors:
        """Copy this rank's part to the CPU. All ranks call it together."""
        ...

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None:
        """Put what was saved in the place of the present state. All ranks call it together, before the first step."""
        ...


class Engine(Protocol):
    """Trains one student on the ranks of one launch."""

    rules: EngineRules
    device: torch.device
    """The device of this rank."""
    student: nn.Module
    """The student as the engine wraps it: what forwards go through. Set by `wrap`."""
    model: TappedModel
    """The student without the wrapper, its tensors being those that the engine trains. Set by `wrap`."""
    optimizer: torch.optim.Optimizer
    """Set by `wrap`."""

    def wrap(self, student: TappedModel, optimizer: torch.optim.Optimizer) -> None:
        """Take a student and its optimizer for training. A collective.

        Raises:
            RecipeError: the weights are not sharded as the launch asked for.
        """
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Enter one micro-step: gradients are exchanged between ranks in the last one of a step only."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate a micro-step's loss; its gradient is averaged over micro-steps and ranks."""
        ...

    def step(self, max_norm: float | None, skip_nonfinite: bool) -> bool:
        """Finish a micro-step: update the weights when it was the last of its step, and clear the gradient.

        Before it, and in a step's last micro-step only, DDP and FSDP2 keep the gradient in `parameter.grad` (FSDP2 a
        shard of it, as a DTensor). In fp16 it is multiplied by the loss scale until it is clipped or unscaled, and a
        scaler refuses to unscale twice in one step. DeepSpeed has clipped, stepped and cleared in `backward` already;
        of the gradient it keeps the norm before clipping, `student.get_global_grad_norm()`.

        Args:
            max_norm: the gradient's 2-norm is cut down to it; None: it is not.
            skip_nonfinite: leave the update out where the gradient is not finite.

        Returns:
            Whether the update was left out: the same on every rank.
        """
        ...

    @property
    def fuses_updates(self) -> bool:
        """Return whether one kernel may update all parameters."""
        ...

    @property
    def leaves_out_updates(self) -> bool:
        """Return whether it leaves out updates by design, as the scaling of fp16's loss does now and then."""
        ...

    def training_tensors(self, average: WeightAverage | None) -> TrainingTensors:
        """Return what a checkpoint holds of student, optimizer and moving average."""
        ...

    def full_weights(self) -> Tensors:
        """Return the student's whole weights by their plain names, on the CPU of the main process; other ranks get
        nothing. A collective."""
        ...

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the state of the gradient scaler, or None where there is none."""
        ...

    def load_scaler_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `scaler_state` returned."""
        ...

    def warn_after(self, timeout: float) -> float | None:
        """Return the seconds of waiting after which a rank reports where all ranks are, shortly before the collectives'
        timeout; None where a timeout raises an error, as it does with gloo. Other backends end the process without
        one."""
        ...
