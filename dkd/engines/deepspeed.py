"""DeepSpeed's ZeRO: stage 1 shards the optimizer's state, stage 2 gradients too, stage 3 weights too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from accelerate.utils import DeepSpeedPlugin, DistributedType

from dkd.config import Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps
from dkd.distillation import FrozenTeacher
from dkd.engines.accelerated import AcceleratedEngine
from dkd.engines.base import TrainingTensors
from dkd.engines.ema import WeightAverage
from dkd.engines.zero_state import ZeroTrainingState
from dkd.launch import Launch
from dkd.library_internals.deepspeed import leave_out_shared_memory_op
from dkd.models import TappedModel

LARGEST_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffers for gradients that travel, its own default: 2 GB in float32, whatever the model's
size.

`allgather_bucket_size` is left alone: where torch gathers into one tensor, DeepSpeed 0.19 makes no buffer of that size,
and it refuses an odd number."""


class ZeroEngine(AcceleratedEngine):
    """A student under DeepSpeed, with torch's own optimizer."""

    kinds: ClassVar = (DistributedType.DEEPSPEED,)
    checks_gradients: ClassVar = True

    def _options(self, recipe: Recipe, on_cpu: bool, student_parameters: Callable[[], int] | None) -> dict[str, Any]:
        if on_cpu:
            leave_out_shared_memory_op()
        parameters = None if student_parameters is None else student_parameters()
        settings = filled_settings(recipe, self._launch, parameters, on_gpu=not on_cpu)
        return {"cpu": False, "deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)}

    def _after_wrapping(self, student: TappedModel) -> None:
        steps: Any = self.student.gradient_accumulation_steps
        if steps() != self.accelerator.gradient_accumulation_steps:
            raise RecipeError.at("train.micro_batch", f"DeepSpeed accumulates over {steps()} steps")

    def training_tensors(self, average: WeightAverage | None) -> TrainingTensors:
        return ZeroTrainingState(self.student, self.model, average)


def filled_settings(
    recipe: Recipe, launch: Launch, parameters: int | None = None, on_gpu: bool = False
) -> dict[str, Any]:
    """Return the launch's DeepSpeed file with what the recipe states of batches and clipping, and with buffers that fit
    the student where the file leaves them open.

    Args:
        parameters: of the student; None: not known yet, buffers are left open.
        on_gpu: where gradients can travel while the backward computes.

    Raises:
        RecipeError: the file states something else than the recipe, or turns on half-precision weights.
    """
    settings: Mapping[str, Any] = launch.deepspeed or {}
    filled = {
        "train_micro_batch_size_per_gpu": micro_batch(recipe, launch.world_size),
        "gradient_accumulation_steps": micro_steps(recipe, launch.world_size),
        "train_batch_size": recipe.train.global_batch,
        "gradient_clipping": float(recipe.train.clip_grad_norm or 0.0),
    }
    _check_settings(settings, filled)
    zero = {**settings.get("zero_optimization", {})}
    if parameters is not None:
        if zero.get("reduce_bucket_size", "auto") == "auto":
            zero["reduce_bucket_size"] = min(LARGEST_BUCKET, max(1, parameters))
        if zero.get("overlap_comm", "auto") == "auto":
            zero["overlap_comm"] = on_gpu
    if zero.get("stage") == 3:
        # The name is old: it gathers the whole weights, of whatever type.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        **settings,
        **filled,
        "zero_optimization": zero,
        # The optimizer is torch's own, as the recipe states.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _check_settings(settings: Mapping[str, Any], filled: Mapping[str, Any]) -> None:
    for key, value in filled.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise RecipeError.at(
                "",
                f"the launch's DeepSpeed file sets {key} = {settings[key]!r}, the recipe {value!r}; "
                'write "auto" there',
            )
    for key in ("bf16", "fp16", "torch_autocast"):
        if settings.get(key, {}).get("enabled") in (True, "true"):
            raise RecipeError.at(
                "",
                f"the launch's DeepSpeed file turns on {key}; leave it out: train.precision states it, and weights "
                "stay float32",
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise RecipeError.at("", f"the launch's DeepSpeed file holds {key!r}; leave it out: the recipe states it")


def shard_teacher(teacher: FrozenTeacher) -> None:
    """Cut the teacher into shards by a second DeepSpeed engine, without optimizer. A collective; needs a student under
    DeepSpeed."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,  # required, and without meaning where nothing is trained
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    sharded, *_ = deepspeed.initialize(model=teacher.tapped, config=settings)
    teacher.tapped = sharded
    teacher.eval()
