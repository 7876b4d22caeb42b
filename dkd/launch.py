"""What the launch asks for: how many processes, which engine. Read from the environment that `accelerate launch` makes.

The launch says nothing else. Where it also speaks of batches, accumulation, clipping or precision and disagrees with
the recipe, that is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dkd.config import Problem, Recipe, RecipeError

ZERO_ENGINES = ("zero1", "zero2", "zero3")
SHARDING_ENGINES = ("fsdp2", *ZERO_ENGINES)
LAUNCH_FILES = "launch/accelerate/{cpu,ddp,fsdp2,zero1,zero2,zero3}.yaml"


_YES = ("true", "1")
_NO_FSDP = (
    ("FSDP_ACTIVATION_CHECKPOINTING", _YES, "BatchNorm would see every batch twice"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", _YES, "Accelerate cannot do that with BatchNorm's buffers"),
    ("FSDP_OFFLOAD_PARAMS", _YES, "not supported"),
    (
        "FSDP_AUTO_WRAP_POLICY",
        ("size_based_wrap",),
        "not supported; TRANSFORMER_BASED_WRAP finds the blocks of any model",
    ),
)


def world_size() -> int:
    """The number of processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def engine() -> str:
    """What wraps the student: `single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`.

    Raises:
        RecipeError: an engine that is not supported, or one that needs a launcher and has none.
    """
    if _asked("ACCELERATE_USE_CPU") and "LOCAL_RANK" not in os.environ:
        raise RecipeError.at(
            "",
            "`accelerate launch --cpu` starts one process, whatever --num_processes and the engine say; launch with: "
            "accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes N -m dkd train RECIPE "
            "(or fsdp2.yaml, zero1.yaml, ...), or for one process: dkd train RECIPE",
        )
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        stage = deepspeed_settings().get("zero_optimization", {}).get("stage", 0)
        if stage not in (1, 2, 3):
            raise RecipeError.at(
                "", f"the launch asks for DeepSpeed with ZeRO stage {stage!r}; take stage 1, 2 or 3: {LAUNCH_FILES}"
            )
        name = f"zero{stage}"
    elif _asked("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise RecipeError.at(
                "",
                f"the launch asks for FSDP version {version}; only version 2 is supported: "
                "launch/accelerate/fsdp2.yaml",
            )
        for variable, wrong, reason in _NO_FSDP:
            if os.environ.get(variable, "").lower() in wrong:
                value = os.environ[variable]
                raise RecipeError.at(
                    "", f"the launch says {variable}={value}: {reason}; see launch/accelerate/fsdp2.yaml"
                )
        name = "fsdp2"
    else:
        return "ddp" if "LOCAL_RANK" in os.environ and world_size() > 1 else "single"
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError.at(
            "",
            f"the launch asks for {name}, but started one process without a launcher; "
            f"launch with: accelerate launch --config_file launch/accelerate/{name}.yaml --num_processes N -m dkd "
            "train RECIPE",
        )
    return name


def asks_for_cpu() -> bool:
    """Whether training is to run on CPUs although there may be a GPU."""
    return _asked("ACCELERATE_USE_CPU")


def deepspeed_settings() -> dict[str, Any]:
    """The launch's DeepSpeed file.

    Raises:
        RecipeError: no file (Accelerate's flags in its place would be half of one), or one that is no JSON object.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        raise RecipeError.at(
            "", f"the launch asks for DeepSpeed without a DeepSpeed file; launch with one of {LAUNCH_FILES}"
        )
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise RecipeError.at(
            "",
            f"the launch's DeepSpeed file {path!r} cannot be read: {error}; paths are relative to the folder of the "
            "launch",
        ) from error
    if not isinstance(settings, dict):
        raise RecipeError.at("", f"the launch's DeepSpeed file {path!r} holds no JSON object")
    return settings


LARGEST_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffers for gradients on their way, its own default: 2 GB in float32, whatever the size of
the model."""


def filled_deepspeed_settings(
    recipe: Recipe, micro_batch: int, micro_steps: int, parameters: int | None = None, on_gpu: bool = False
) -> dict[str, Any]:
    """The DeepSpeed file with what the recipe says of batches and clipping, and with buffers that fit the student where
    the file leaves them open.

    Args:
        parameters: of the student; None: not known yet, nothing is said of buffers.
        on_gpu: where gradients can travel while the backward computes.

    Raises:
        RecipeError: where the file says something else, or turns on half-precision weights.
    """
    settings = deepspeed_settings()
    filled = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": recipe.train.global_batch,
        "gradient_clipping": float(recipe.train.clip_grad_norm or 0.0),
    }
    for key, value in filled.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise RecipeError.at(
                "",
                f'the launch\'s DeepSpeed file says {key} = {settings[key]!r}, the recipe {value!r}; write "auto" there',
            )
    for key in ("bf16", "fp16", "torch_autocast"):
        if settings.get(key, {}).get("enabled") in (True, "true"):
            raise RecipeError.at(
                "",
                f"the launch's DeepSpeed file turns on {key}; leave it out: train.precision says it, and weights stay "
                "float32",
            )
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise RecipeError.at("", f"the launch's DeepSpeed file holds {key!r}; leave it out: the recipe says it")
    zero = {**settings.get("zero_optimization", {})}
    if parameters is not None:
        if zero.get("reduce_bucket_size", "auto") == "auto":
            zero["reduce_bucket_size"] = min(LARGEST_BUCKET, max(1, parameters))
        if zero.get("overlap_comm", "auto") == "auto":
            zero["overlap_comm"] = on_gpu
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = (
            True  # the name of old: it gathers the whole weights, of whatever type
        )
    return {
        **settings,
        **filled,
        "zero_optimization": zero,
        # The optimizer is torch's own, as the recipe says.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def problems(recipe: Recipe, micro_batch: int, micro_steps: int) -> list[Problem]:
    """What the engine cannot do that the recipe asks for, its batches being micro_batch × processes × micro_steps."""
    found: list[Problem] = []
    try:
        name = engine()
        if name.startswith("zero"):
            filled_deepspeed_settings(recipe, micro_batch, micro_steps)
    except RecipeError as error:
        return error.problems
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        found.append(
            Problem(
                "train.compile", "the launch asks for a dynamo_backend; leave it out: train.compile.student says it"
            )
        )
    teacher = recipe.teacher
    if teacher is not None:
        if teacher.placement == "zero3" and not name.startswith("zero"):
            found.append(
                Problem(
                    "teacher.placement",
                    f"zero3 needs a student under DeepSpeed ({LAUNCH_FILES}); take fsdp2 under {name}",
                )
            )
        if teacher.placement != "replicated" and recipe.train.compile.teacher:
            found.append(
                Problem("train.compile.teacher", f"is not supported with teacher.placement={teacher.placement}")
            )
        if teacher.mesh != "world" and teacher.placement != "fsdp2":
            found.append(Problem("teacher.mesh", f"belongs to teacher.placement=fsdp2, not {teacher.placement}"))
        if teacher.mesh == "node" and world_size() % local_world_size():
            found.append(
                Problem("teacher.mesh", f"{world_size()} processes are not {local_world_size()} on every machine")
            )
        if teacher.weights_dtype == "bf16" and recipe.train.precision not in ("bf16", "auto"):
            found.append(
                Problem("teacher.weights_dtype", f"bf16 needs train.precision=bf16, not {recipe.train.precision}")
            )
        if teacher.placement == "zero3" and teacher.weights_dtype == "bf16":
            found.append(Problem("teacher.weights_dtype", "is fp32 under ZeRO-3; take teacher.placement=fsdp2"))
    if name in SHARDING_ENGINES:
        if recipe.train.compile.student:
            found.append(
                Problem("train.compile.student", f"is not supported under {name}; compile under DDP, or leave it out")
            )
        if recipe.train.precision == "fp16":
            found.append(Problem("train.precision", f"fp16 needs DDP's loss scaling; use bf16 or fp32 under {name}"))
    if name.startswith("zero") and recipe.train.precision == "fp64":
        found.append(
            Problem(
                "train.precision",
                f"DeepSpeed keeps its weights in float32; use fp32 under {name}, or fp64 under DDP or FSDP2",
            )
        )
    return found


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in _YES
