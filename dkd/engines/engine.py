"""Accelerate, set up from the recipe. The launch says how many processes and which engine; the recipe says everything
else, and where both speak they must agree."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
)
from torch.nn.parallel import DistributedDataParallel

from dkd import launch
from dkd.build import recipe_objects
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.changes import flat
from dkd.distillation import FrozenTeacher
from dkd.distributed.process_group import open_process_group
from dkd.engines.cpu import sharding_on_cpu
from dkd.engines.ema import WeightAverage
from dkd.engines.sharded_weights import parameter_counts
from dkd.engines.state import TrainingState
from dkd.engines.zero_state import ZeroTrainingState
from dkd.global_batch import ranks_per_group
from dkd.global_batch.collectives import all_gather_objects
from dkd.library_internals.accelerate import reset_accelerate, set_units_of_sharding
from dkd.library_internals.deepspeed import leave_out_shared_memory_op
from dkd.library_internals.torch import make_inductor_deterministic
from dkd.models import TappedModel, block_classes, build_on_meta
from dkd.user_code import describe_error

Model = TypeVar("Model", bound=torch.nn.Module)

# Accelerate's name of the engine that `launch.engine` names.
_TYPES = {"fsdp2": DistributedType.FSDP, **{f"zero{stage}": DistributedType.DEEPSPEED for stage in (1, 2, 3)}}


def has_gpu() -> bool:
    """Whether there is an accelerator to train on. Apple's does not count: it has no float64, in which evaluation and
    logs are summed."""
    return torch.accelerator.is_available() and getattr(torch.accelerator.current_accelerator(), "type", "") != "mps"


def device_type() -> str:
    """Torch's type of the device that this process trains on."""
    accelerator = torch.accelerator.current_accelerator() if has_gpu() and not launch.asks_for_cpu() else None
    return "cpu" if accelerator is None else accelerator.type


def can_scale_losses(name: str) -> bool:
    """Whether an engine trains in fp16, with a scaled loss."""
    return name not in launch.SHARDING_ENGINES


def join(recipe: Recipe) -> None:
    """Open the process group of the launch. A collective: the first thing that the ranks of a start do together.

    Before Accelerate would: its way does not connect again when a launcher restarts its workers.
    """
    open_process_group(device_type() == "cpu", recipe.run.start_timeout)


def set_arithmetic(recipe: Recipe) -> None:
    """Tell torch what float32 means on GPUs, and whether they must repeat their bits. For the whole process."""
    # torch's older switches: mixed with the newer ones they raise, and Inductor reads these.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.train.precision == "tf32"
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # What torch would do beside, for finding bugs, costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        make_inductor_deterministic()


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


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """What models compute in where torch.autocast allows; None: their own type. `auto` must have been settled."""
    if recipe.train.precision == "auto":
        raise ValueError("train.precision is auto: call hardware.settle first")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)


def place(model: Model, recipe: Recipe, device: torch.device, to_be_sharded: bool = False) -> Model:
    """`model` on `device`, in the recipe's dtype and memory format. Weights that are to be cut into shards stay
    contiguous; with inputs in channels_last, convolutions work in that format all the same."""
    memory_format = torch.contiguous_format if to_be_sharded else model_memory_format(recipe)
    return model.to(device, model_dtype(recipe)).to(memory_format=memory_format)


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
        problems.append(
            Problem(
                "data.mixup" if recipe.data.mixup else "data.cutmix", "a micro-batch of 1 image has none to mix it with"
            )
        )
    if recipe.losses.sp is not None:
        try:
            ranks_per_group(recipe.losses.sp.scope, world_size, local_world_size)
        except ValueError as error:
            problems.append(Problem("losses.sp.scope", str(error)))
    return problems


def launch_problems(recipe: Recipe, world_size: int) -> list[Problem]:
    """Where recipe and launch do not go together. Needs no process group."""
    problems = batch_problems(recipe, world_size, launch.local_world_size()) + launch.problems(
        recipe, micro_batch(recipe, world_size), micro_steps(recipe, world_size)
    )
    train = recipe.train
    if recipe.losses.gradient_at is not None and _engine_or_none() in launch.SHARDING_ENGINES:
        problems.append(
            Problem(
                "losses.gradient_at",
                "differentiates twice, which FSDP2 and DeepSpeed cannot; use launch/accelerate/ddp.yaml",
            )
        )
    if train.sync_batch_norm and (not has_gpu() or "ddp" not in _engine_or_none()):
        problems.append(Problem("train.sync_batch_norm", "needs DDP on GPUs: launch/accelerate/ddp.yaml"))
    if train.precision in ("fp16", "tf32") and device_type() == "cpu":
        problems.append(Problem("train.precision", f"{train.precision} needs a GPU; use auto, bf16 or fp32"))
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if accumulation not in (None, "auto", str(micro_steps(recipe, world_size))) and not problems:
        problems.append(
            Problem(
                "train.micro_batch",
                f"the launch asks for {accumulation} accumulation steps (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), the "
                "recipe for "
                f"{micro_steps(recipe, world_size)}; leave it out of the launch",
            )
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", train.precision):  # auto is the hardware's choice, not the launch's
        problems.append(
            Problem(
                "train.precision",
                f"the launch asks for mixed_precision {precision}, the recipe for {train.precision}; leave it out of "
                "the launch, or write "
                f"train.precision={precision}",
            )
        )
    return problems


def _engine_or_none() -> str:
    """The launch's engine; empty for a launch that is wrong, which is said elsewhere."""
    try:
        return launch.engine()
    except RecipeError:
        return ""


def start_trackers(accelerator: Accelerator, recipe: Recipe, identity: str, again: bool, first_step: int) -> None:
    """Start the recipe's trackers, under the run's name; a resumed run continues in them where they allow it. A
    collective.

    Args:
        identity: of the run, the same at each start.
        again: this is not the first start.
        first_step: steps done by earlier starts; what TensorBoard has of later ones is superseded.

    Raises:
        RecipeError: on every rank: a tracker does not start, such as one whose server cannot be reached.
    """
    if not recipe.run.trackers:
        return
    more = {
        "tensorboard": {"purge_step": first_step + 1} if again else {},
        "wandb": {"id": identity, "resume": "allow"},
    }
    settings = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flat(recipe.model_dump()).items()
    }
    kwargs = {name: values for name, values in more.items() if name in recipe.run.trackers}
    own = None
    try:
        accelerator.init_trackers(recipe.run.name, config=settings, init_kwargs=kwargs)
    except (
        Exception
    ) as error:  # a tracker's own code, which runs on the main process alone: the others are to hear of it
        own = describe_error(error)
    for reason in all_gather_objects(own):
        if reason is not None:
            raise RecipeError.at(
                "run.trackers", f"{', '.join(recipe.run.trackers)} cannot start: {reason}; leave it out, or mend it"
            )


def training_state(
    wrapped: torch.nn.Module, student: torch.nn.Module, optimizer: Any, average: WeightAverage | None
) -> TrainingState | ZeroTrainingState:
    """What a checkpoint holds of a prepared student and optimizer, whatever the engine."""
    if launch.engine().startswith("zero"):
        return ZeroTrainingState(wrapped, student, average)
    return TrainingState(wrapped, student, getattr(optimizer, "optimizer", optimizer), average)


def warn_after(accelerator: Accelerator, timeout: float) -> float | None:
    """For `Heartbeat`: seconds of waiting after which to say for whom, shortly before the group's timeout; None where
    that raises an error, as gloo does. Other backends end the process without one."""
    return None if accelerator.device.type == "cpu" else 0.9 * timeout


def leave_process_group() -> None:
    """All ranks call it, at the end. Accelerate's settings of this process go too, so that it can start anew."""
    if dist.is_initialized():
        # DDP keeps gloo's threads alive beyond the group. One that still has to let go of a tensor when the interpreter
        # shuts down aborts the process, after all is done. Behind a barrier, and with the interpreter idle for a
        # moment, none has.
        dist.barrier()
        time.sleep(0.1)
        dist.destroy_process_group()
    reset_accelerate()


def prepare(
    accelerator: Accelerator, student: TappedModel, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Student and optimizer, wrapped by the launch's engine. Nothing else is ever given to Accelerate to prepare.

    Raises:
        RecipeError: when the weights are not sharded as the launch asked for.
    """
    set_units_of_sharding(student, block_classes(student.model))
    with warnings.catch_warnings():
        # torch renames broadcast_buffers, and Accelerate has no other name for it yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped, optimizer = accelerator.prepare(student, optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        _settle_buckets(wrapped, student)
    local, total = parameter_counts(accelerator.unwrap_model(wrapped))
    world_size, name = accelerator.num_processes, launch.engine()
    if name in ("fsdp2", "zero3") and world_size > 1 and local > 0.9 * total:
        raise RecipeError.at(
            "", f"the launch asks for {name}, but each of {world_size} ranks keeps {local:,} of {total:,} parameters"
        )
    if name.startswith("zero") and wrapped.gradient_accumulation_steps() != accelerator.gradient_accumulation_steps:
        raise RecipeError.at(
            "train.micro_batch", f"DeepSpeed accumulates over {wrapped.gradient_accumulation_steps()} steps"
        )
    return wrapped, optimizer


def _settle_buckets(wrapped: DistributedDataParallel, student: torch.nn.Module) -> None:
    """DDP lays out its buckets anew after its first backward, in the order in which gradients came, and the last bits
    of a sum over four or
    more ranks depend on the layout: the first step of every start would be summed as no other. So it has a first
    backward here, in which
    each parameter comes once and the model itself does not run."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    before = student.__dict__.get("forward")
    student.forward = lambda images: torch.stack([p.sum() for p in parameters]).sum()
    try:
        # DDP moves an argument to its GPU, and fails without one.
        wrapped(torch.empty(0)).backward()
    finally:
        if before is None:
            del student.forward
        else:
            student.forward = before
    student.zero_grad()


def build_accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """Opens the process group.

    Raises:
        RecipeError: when Accelerate made something else of the launch than what was asked for.
    """
    world_size, name = launch.world_size(), launch.engine()
    on_cpu = not has_gpu()
    if on_cpu:
        # Accelerate imports DeepSpeed when it unwraps a model; told, DeepSpeed does not look for a GPU and warn that
        # there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = None
    if name.startswith("zero"):
        if on_cpu:
            leave_out_shared_memory_op()
        parameters = sum(
            parameter.numel() for parameter in build_on_meta(recipe_objects.student_spec(recipe)).parameters()
        )
        settings = launch.filled_deepspeed_settings(
            recipe, micro_batch(recipe, world_size), micro_steps(recipe, world_size), parameters, on_gpu=not on_cpu
        )
        deepspeed = DeepSpeedPlugin(hf_ds_config=settings)
    set_arithmetic(recipe)
    join(recipe)
    with sharding_on_cpu() if on_cpu and name in _TYPES else nullcontext():
        accelerator = Accelerator(
            # Without this flag, Accelerate makes of N processes on CPUs N trainings that know nothing of each other.
            cpu=on_cpu and name not in _TYPES,
            # bfloat16 autocast is inside the student (TappedModel), the same for every engine; float16's needs
            # Accelerate's loss scaling.
            mixed_precision="fp16" if recipe.train.precision == "fp16" else "no",
            gradient_accumulation_steps=micro_steps(recipe, world_size),
            deepspeed_plugin=deepspeed,
            log_with=list(recipe.run.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
            # batch_statistics.py keeps buffers equal; a broadcast of rank 0's in every forward would be work for
            # nothing.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    allowed = (
        (_TYPES[name],)
        if name in _TYPES
        else (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    )
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != world_size or accelerator.num_processes != world_size or accelerator.distributed_type not in allowed:
        what = "cpu.yaml (or ddp.yaml)" if name in ("single", "ddp") else f"{name}.yaml"
        raise RecipeError.at(
            "",
            f"{world_size} processes of {name} were launched, but Accelerate runs {accelerator.distributed_type} with "
            f"{accelerator.num_processes}; launch with: accelerate launch --config_file launch/accelerate/{what} "
            "--num_processes N "
            "-m dkd train RECIPE",
        )
    if recipe.train.precision in ("fp16", "tf32") and accelerator.device.type == "cpu":
        raise RecipeError.at(
            "train.precision",
            f"{recipe.train.precision} needs a GPU, and this launch trains on CPUs; use auto, bf16 or fp32, or "
            "launch/accelerate/ddp.yaml",
        )
    if recipe.train.sync_batch_norm and accelerator.device.type == "cpu":
        raise RecipeError.at(
            "train.sync_batch_norm", "needs GPUs, and the launch asks for CPUs; take launch/accelerate/ddp.yaml"
        )
    if accelerator.gradient_accumulation_steps != micro_steps(recipe, world_size):
        raise RecipeError.at(
            "train.micro_batch", f"Accelerate accumulates over {accelerator.gradient_accumulation_steps} steps"
        )
    return accelerator


def shard_by_zero3(teacher: FrozenTeacher) -> None:
    """Cut the teacher into shards by a second DeepSpeed engine, without optimizer. A collective; needs a student under
    DeepSpeed."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no meaning without training
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    sharded, *_ = deepspeed.initialize(model=teacher.tapped, config=settings)
    teacher.tapped = sharded
    teacher.eval()
