"""Accelerate, set up from the recipe. The launch says how many processes and which engine; the recipe says everything else, and where both
speak they must agree."""

from __future__ import annotations

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from dkd.config import Problem, Recipe, RecipeError
from dkd.global_batch import ranks_per_group

Model = TypeVar("Model", bound=torch.nn.Module)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp64": "no"}
_ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def launched_world_size() -> int:
    """The number of processes of this launch, as its environment says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_world_size() -> int:
    """The number of processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def has_gpu() -> bool:
    """Whether there is an accelerator to train on. Apple's does not count: it has no float64, in which evaluation and logs are summed."""
    return torch.accelerator.is_available() and getattr(torch.accelerator.current_accelerator(), "type", "") != "mps"


def micro_batch(recipe: Recipe, world_size: int) -> int:
    """b: as the recipe says, or B/W."""
    return recipe.train.micro_batch or max(1, recipe.train.global_batch // world_size)


def micro_steps(recipe: Recipe, world_size: int) -> int:
    """A = B / (b·W)."""
    return recipe.train.global_batch // (micro_batch(recipe, world_size) * world_size)


def model_dtype(recipe: Recipe) -> torch.dtype:
    """Of weights and inputs, before any autocast."""
    return torch.float64 if recipe.train.precision == "fp64" else torch.float32


def model_memory_format(recipe: Recipe) -> torch.memory_format:
    """Of weights and inputs."""
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def place(model: Model, recipe: Recipe, device: torch.device) -> Model:
    """`model` on `device`, in the recipe's dtype and memory format."""
    return model.to(device, model_dtype(recipe)).to(memory_format=model_memory_format(recipe))


def batch_problems(recipe: Recipe, world_size: int, local_world_size: int) -> list[Problem]:
    """Where the recipe's batches do not go together with a number of processes, in all and on one machine."""
    problems = []
    train = recipe.train
    per_step = micro_batch(recipe, world_size) * world_size
    if train.global_batch % per_step:
        what = "train.micro_batch" if train.micro_batch else "train.global_batch"
        problems.append(
            Problem(
                what,
                f"train.global_batch={train.global_batch} is not a multiple of {per_step} = "
                f"micro_batch {micro_batch(recipe, world_size)} × {world_size} processes; change one of the three",
            )
        )
    if (recipe.data.mixup or recipe.data.cutmix) and micro_batch(recipe, world_size) == 1:
        problems.append(Problem("data.mixup" if recipe.data.mixup else "data.cutmix", "a micro-batch of 1 image has none to mix it with"))
    if recipe.losses.sp is not None:
        try:
            ranks_per_group(recipe.losses.sp.scope, world_size, local_world_size)
        except ValueError as error:
            problems.append(Problem("losses.sp.scope", str(error)))
    return problems


def launch_problems(recipe: Recipe, world_size: int) -> list[Problem]:
    """Where recipe and launch do not go together. Needs no process group."""
    problems = batch_problems(recipe, world_size, launched_local_world_size())
    train = recipe.train
    if train.precision == "fp16" and not has_gpu():
        problems.append(Problem("train.precision", "fp16 needs a GPU; use bf16 or fp32"))
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if accumulation not in (None, "auto", str(micro_steps(recipe, world_size))) and not problems:
        problems.append(
            Problem(
                "train.micro_batch",
                f"the launch asks for {accumulation} accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), the recipe for "
                f"{micro_steps(recipe, world_size)}; leave it out of the launch",
            )
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", _PRECISION[train.precision]):
        problems.append(
            Problem(
                "train.precision",
                f"the launch asks for mixed_precision {precision}, the recipe for {train.precision}; leave it out of the launch",
            )
        )
    for engine, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            problems.append(
                Problem("", f"the launch asks for {engine}; train with DDP: --config_file launch/accelerate/cpu.yaml or ddp.yaml")
            )
    return problems


def start_trackers(accelerator: Accelerator, recipe: Recipe, settings: dict[str, Any]) -> None:
    """The recipe's trackers, under the run's name."""
    if recipe.run.trackers:
        accelerator.init_trackers(recipe.run.name, config=settings)


def leave_process_group() -> None:
    """All ranks call it, at the end. Accelerate's settings of this process go too, so that it can start anew."""
    if dist.is_initialized():
        # DDP keeps gloo's threads alive beyond the group. One that still has to let go of a tensor when the interpreter shuts down aborts
        # the process, after all is done. Behind a barrier, and with the interpreter idle for a moment, none has.
        dist.barrier()
        time.sleep(0.1)
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepare(
    accelerator: Accelerator, student: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Student and optimizer, wrapped by the launch's engine. Nothing else is ever given to Accelerate to prepare."""
    with warnings.catch_warnings():
        # torch renames broadcast_buffers, and Accelerate has no other name for it yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        student, optimizer = accelerator.prepare(student, optimizer)
    return student, optimizer


def build_accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """Opens the process group.

    Raises:
        RecipeError: when Accelerate made something else of the launch than what was asked for.
    """
    world_size = launched_world_size()
    if not has_gpu():
        # Accelerate imports DeepSpeed when it unwraps a model; told, DeepSpeed does not look for a GPU and warn that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = Accelerator(
        # Without this flag, Accelerate makes of N processes on CPUs N trainings that know nothing of each other.
        cpu=not has_gpu(),
        mixed_precision=_PRECISION[recipe.train.precision],
        gradient_accumulation_steps=micro_steps(recipe, world_size),
        log_with=list(recipe.run.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
        # batch_statistics.py keeps buffers equal; a broadcast of rank 0's in every forward would be work for nothing.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.run.collective_timeout)),
        ],
    )
    if accelerator.num_processes != world_size or accelerator.distributed_type not in _ENGINES:
        raise RecipeError.at(
            "",
            f"{world_size} processes were launched, but Accelerate runs {accelerator.distributed_type} with {accelerator.num_processes}; "
            "launch with: accelerate launch --config_file launch/accelerate/cpu.yaml (or ddp.yaml) --num_processes N -m dkd train RECIPE",
        )
    if recipe.train.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError.at(
            "train.precision", "fp16 needs a GPU, and the launch asks for CPUs; use bf16 or fp32, or launch/accelerate/ddp.yaml"
        )
    if accelerator.gradient_accumulation_steps != micro_steps(recipe, world_size):
        raise RecipeError.at("train.micro_batch", f"Accelerate accumulates over {accelerator.gradient_accumulation_steps} steps")
    return accelerator
