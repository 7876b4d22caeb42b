"""Engines by Accelerate: what DDP, FSDP2 and DeepSpeed have in common."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from torch import nn

from dkd.config import Recipe, RecipeError
from dkd.config.derived import micro_steps
from dkd.engines.arithmetic import has_gpu, set_arithmetic
from dkd.engines.base import Tensors, TrainingTensors
from dkd.engines.cpu import sharding_on_cpu
from dkd.engines.ema import WeightAverage
from dkd.engines.gradient_check import gradient_is_finite
from dkd.engines.rules import rules_of
from dkd.engines.sharded_weights import full_state, parameter_counts
from dkd.engines.state import TrainingState
from dkd.engines.trackers import Trackers, log_with
from dkd.launch import Launch, keep_deepspeed_on_cpu
from dkd.library_internals.accelerate import reset_accelerate, set_units_of_sharding
from dkd.models import TappedModel, block_classes


class AcceleratedEngine:
    """An engine that Accelerate sets up. Nothing but the student and its optimizer is ever given to Accelerate to
    prepare.

    Args:
        recipe: with nothing left to the hardware.
        launch: of this process; its process group is open.
        run_dir: where trackers write.
        student_parameters: of the student; asked for only where the engine's buffers depend on it.

    Raises:
        RecipeError: Accelerate made something else of the launch than what was asked for.
    """

    kinds: ClassVar[tuple[DistributedType, ...]]
    """What Accelerate may call it."""
    checks_gradients: ClassVar[bool] = False
    """Whether the engine leaves out updates of gradients that are not finite by a check of its own."""

    student: nn.Module
    model: TappedModel
    optimizer: torch.optim.Optimizer

    def __init__(self, recipe: Recipe, launch: Launch, run_dir: Path, student_parameters: Any = None) -> None:
        self.rules, self._launch = rules_of(launch), launch
        on_cpu = not has_gpu()
        if on_cpu:
            # Accelerate imports DeepSpeed when it unwraps a model, whatever the engine.
            keep_deepspeed_on_cpu()
        self._micro_steps = micro_steps(recipe, launch.world_size)
        options = self._options(recipe, on_cpu, student_parameters)
        set_arithmetic(recipe)
        with sharding_on_cpu() if on_cpu and self.rules.shards_training else nullcontext():
            self.accelerator = Accelerator(
                # bfloat16 autocast is inside the student (TappedModel), the same for every engine; float16's needs
                # Accelerate's loss scaling.
                mixed_precision="fp16" if recipe.train.precision == "fp16" else "no",
                gradient_accumulation_steps=self._micro_steps,
                log_with=log_with(recipe.run.trackers, recipe.run.name, run_dir) or None,
                project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
                # BatchNormStatistics keeps buffers equal; a broadcast of rank 0's in every forward would be work for
                # nothing.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
                **options,
            )
        self.device: torch.device = self.accelerator.device
        self.trackers = Trackers(self.accelerator)
        self._check(recipe)

    def _options(self, recipe: Recipe, on_cpu: bool, student_parameters: Any) -> dict[str, Any]:
        """Return what else the Accelerator is given."""
        return {"cpu": False}

    def _check(self, recipe: Recipe) -> None:
        """Compare what Accelerate made with what was asked for. `preflight/launch.py` refuses before what it can know
        of the device; here the device is known. Raises RecipeError."""
        accelerator, world_size = self.accelerator, self._launch.world_size
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if (
            ranks != world_size
            or accelerator.num_processes != world_size
            or accelerator.distributed_type not in self.kinds
        ):
            raise RecipeError.at(
                "",
                f"{world_size} processes of {self.rules.name} were launched, but Accelerate runs "
                f"{accelerator.distributed_type} with {accelerator.num_processes}; launch with: "
                f"accelerate launch --config_file {self.rules.launch_file} --num_processes N -m dkd train RECIPE",
            )
        if recipe.train.precision in ("fp16", "tf32") and self.device.type == "cpu":
            raise RecipeError.at(
                "train.precision",
                f"{recipe.train.precision} needs a GPU, and this launch trains on CPUs; use auto, bf16 or fp32, or "
                "launch/accelerate/ddp.yaml",
            )
        if recipe.train.sync_batch_norm and self.device.type == "cpu":
            raise RecipeError.at(
                "train.sync_batch_norm", "needs GPUs, and the launch asks for CPUs; take launch/accelerate/ddp.yaml"
            )
        if accelerator.gradient_accumulation_steps != self._micro_steps:
            raise RecipeError.at(
                "train.micro_batch", f"Accelerate accumulates over {accelerator.gradient_accumulation_steps} steps"
            )

    def wrap(self, student: TappedModel, optimizer: torch.optim.Optimizer) -> None:
        set_units_of_sharding(student, block_classes(student.model))
        with warnings.catch_warnings():
            # torch renames broadcast_buffers, and Accelerate has no other name for it yet.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        # After preparing: it may put other tensors in the place of a model's buffers.
        self.model = self.accelerator.unwrap_model(self.student)
        self._after_wrapping(student)
        local, total = parameter_counts(self.model)
        world_size = self._launch.world_size
        if self.rules.shards_weights and world_size > 1 and local > 0.9 * total:
            raise RecipeError.at(
                "",
                f"the launch asks for {self.rules.name}, but each of {world_size} ranks keeps {local:,} of {total:,} "
                "parameters",
            )

    def _after_wrapping(self, student: TappedModel) -> None:
        """Do what else the engine needs before the first step."""

    def accumulate(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate(self.student)

    def backward(self, loss: torch.Tensor) -> None:
        if self._micro_steps == 1 and self.accelerator.scaler is None and not self.checks_gradients:
            loss.backward()  # Accelerate would divide by 1, which is two launches on a GPU
        else:
            self.accelerator.backward(loss)

    def step(self, max_norm: float | None, skip_nonfinite: bool) -> bool:
        last = self.accelerator.sync_gradients
        if last and max_norm is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), max_norm)
        # A gradient scaler makes its own check, and overflows by design.
        checked_here = not self.checks_gradients and not self.leaves_out_updates
        if last and checked_here and skip_nonfinite and not gradient_is_finite(self.student):
            self.optimizer.zero_grad()
            return True
        self.optimizer.step()
        self.optimizer.zero_grad()
        return last and not checked_here and self.accelerator.optimizer_step_was_skipped

    @property
    def fuses_updates(self) -> bool:
        if self.rules.shards_training:
            return False  # torch's fused SGD takes no DTensors
        # Accelerate learns from the optimizer whether an update was left out; a fused one leaves it out by itself.
        return self.accelerator.scaler is None and self.device.type in ("cpu", "cuda")

    @property
    def leaves_out_updates(self) -> bool:
        return self.accelerator.scaler is not None

    def training_tensors(self, average: WeightAverage | None) -> TrainingTensors:
        torchs_own = getattr(self.optimizer, "optimizer", self.optimizer)
        return TrainingState(self.student, self.model, torchs_own, average)

    def full_weights(self) -> Tensors:
        return full_state(self.accelerator, self.student)

    def scaler_state(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: Mapping[str, Any] | None) -> None:
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state))

    def warn_after(self, timeout: float) -> float | None:
        return None if self.device.type == "cpu" else 0.9 * timeout


def leave_process_group() -> None:
    """Leave the process group. All ranks call it together, at the end. Accelerate's settings of this process go too, so
    that it can start anew."""
    if dist.is_initialized():
        # DDP keeps gloo's threads alive beyond the group. One that still has to let go of a tensor when the interpreter
        # shuts down aborts the process, after all is done. After a barrier, and with the interpreter idle for a moment,
        # none has.
        dist.barrier()
        time.sleep(0.1)
        dist.destroy_process_group()
    forget_settings()


def forget_settings() -> None:
    """Forget Accelerate's settings of this process, so that the next training can have others."""
    reset_accelerate()
