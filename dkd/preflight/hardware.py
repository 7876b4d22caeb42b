"""What `auto` means on the hardware at hand: precision, memory format, the type of the teacher's weights.

The choice is made once, at the first start of a run, by all ranks together (bfloat16 only where every rank is fast in
it), and stored in
RUN/recipe.yaml. A resumed run keeps it on whatever hardware it resumes: its arithmetic never changes with the machine.

    GPU with bfloat16 units        bf16
    older GPU                      fp16; fp32 where fp16's loss scaling cannot work (FSDP2, DeepSpeed,
                                   losses.gradient_at)
    CPU with bfloat16 units        bf16: AVX512-BF16 or AMX, or others on which a small convolution is measured to be
                                   faster in it
    any other CPU                  fp32: such CPUs emulate bfloat16, at a tenth of the speed of float32

`channels_last: auto` is true everywhere. It was faster on every kind of CPU that was measured, and by so little that a
clock on a busy
machine would choose otherwise now and then: the same command would then be another training in its last bits.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dkd.config import Recipe, RecipeError, load_recipe
from dkd.config.derived import teacher_views, with_teacher
from dkd.engines.arithmetic import device_type
from dkd.engines.rules import rules_of
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch
from dkd.runs import launches
from dkd.runs.launches import IfRunExists

# A convolution of this size takes milliseconds, and shows the difference between units and emulation (2 times faster,
# 10 times slower).
_IMAGES, _CHANNELS, _SIDE = 8, 32, 28
_REPEATS = 5
# A bound far from both sides of what was measured (with units 1.3 to 3, emulated 0.02 to 0.1): a busy machine does not
# choose otherwise.
_NOT_EMULATED = 0.25
_FASTER = 1.0


@dataclass(frozen=True)
class Hardware:
    """What one rank trains on.

    Args:
        device: torch's device type.
        name: of the processor, for people.
        bf16: whether bfloat16 is computed by units of its own.
        bf16_speed: how many times as fast as float32 a convolution was measured to be in bfloat16; None: not measured.
    """

    device: str
    name: str
    bf16: bool
    bf16_speed: float | None = None


Measure = Callable[[torch.dtype, bool], float]
"""Seconds that one forward and backward of a convolution takes, in a type, with channels_last or not."""


def probe(device: str, measure: Measure | None = None, capabilities: Mapping[str, Any] | None = None) -> Hardware:
    """Look at this rank's hardware. Measures for about a tenth of a second on CPUs, draws no random number.

    Args:
        device: torch's device type.
        measure, capabilities: what a test puts in the place of this machine's clock and of its CPU's instructions.
    """
    if device == "cuda":
        return Hardware(device, torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    units = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    seconds = _measured(measure, units) if measure is not None else _measured_here(device, units)
    single, half = (min(seconds[dtype].values()) for dtype in (torch.float32, torch.bfloat16))
    speed = single / half
    on_x86 = str(capabilities.get("architecture", "")).lower() in ("x86_64", "amd64")
    # The instructions may be there, and the library that convolves not use them. Without a list of instructions, the
    # clock decides alone.
    bf16 = units and speed > _NOT_EMULATED if on_x86 else speed > _FASTER
    name = str(capabilities.get("cpu_name") or platform.processor() or platform.machine())
    return Hardware(device, name, bf16, speed)


@functools.cache
def _measured_here(device: str, units: bool) -> dict[torch.dtype, dict[bool, float]]:
    """`_measured`, once in the life of this process: what it trains next meets the same hardware."""
    return _measured(_convolution(device), units)


def _measured(measure: Measure, units: bool) -> dict[torch.dtype, dict[bool, float]]:
    """dtype -> channels_last -> the least seconds of several, taken in turn so that a busy moment meets all of them.

    Args:
        units: whether the processor has units for bfloat16: then one slow measurement is the busy machine's, and all
            are taken.
    """
    least: dict[torch.dtype, dict[bool, float]] = {torch.float32: {}, torch.bfloat16: {}}
    threads = torch.get_num_threads()
    # Several threads wait for each other, and on a busy machine one of them is always late.
    torch.set_num_threads(1)
    try:
        _measure_into(least, measure, units)
    finally:
        torch.set_num_threads(threads)
    return least


def _measure_into(least: dict[torch.dtype, dict[bool, float]], measure: Measure, units: bool) -> None:
    for repeat in range(1 + _REPEATS):
        for dtype, formats in least.items():
            for channels_last in (True, False):
                if not units and repeat > 0 and formats[channels_last] > 8 * min(least[torch.float32].values()):
                    continue  # emulated, beyond doubt: no need to wait for it again
                seconds = measure(dtype, channels_last)
                if repeat <= 1 or seconds < formats[channels_last]:  # the first of each sets things up
                    formats[channels_last] = seconds


def _convolution(device: str) -> Measure:
    images = torch.ones(_IMAGES, _CHANNELS, _SIDE, _SIDE, device=device)
    weight = torch.full((_CHANNELS, _CHANNELS, 3, 3), 0.01, device=device)

    def seconds(dtype: torch.dtype, channels_last: bool) -> float:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        inputs = [tensor.to(memory_format=memory_format, copy=True).requires_grad_() for tensor in (images, weight)]
        _synchronize(device)
        started = time.perf_counter()
        with torch.enable_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = F.relu(F.conv2d(inputs[0], inputs[1], padding=1))
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        _synchronize(device)
        return time.perf_counter() - started

    return seconds


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Choice:
    """What `train.precision: auto` means, and the reason in words."""

    precision: str
    reason: str


def choose(ranks: Sequence[Hardware], fp16_works: bool = True) -> Choice:
    """Return one choice for all ranks: the same answer wherever it is asked, since it is made from what every rank has
    reported.

    Args:
        ranks: of each rank, in rank order.
        fp16_works: whether engine and losses can train with fp16's loss scaling.
    """
    without = next((i for i, rank in enumerate(ranks) if not rank.bf16), None)
    if without is None:
        speed = ranks[0].bf16_speed
        measured = "" if speed is None else f"; a convolution is {speed:.1f} times as fast as in float32"
        return Choice("bf16", f"{ranks[0].name} has bfloat16 units{measured}")
    name, where = (
        ranks[without].name,
        f" of rank {without}" if len(set(ranks)) > 1 and len({r.bf16 for r in ranks}) > 1 else "",
    )
    if all(rank.device == "cuda" for rank in ranks) and fp16_works:
        return Choice("fp16", f"{name}{where} has no bfloat16 units")
    speed = ranks[without].bf16_speed
    slow = (
        ""
        if speed is None
        else f"; a convolution takes {1 / speed:.1f} times as long as in float32"
        if speed < 1
        else ""
    )
    return Choice("fp32", f"{name}{where} has no bfloat16 units{slow}")


AUTO = ("train.precision", "train.channels_last", "teacher.weights_dtype")
"""The keys of a recipe that may say `auto`, and mean something else on other hardware."""


def settled(
    recipe: Recipe, ranks: Sequence[Hardware], stored: Mapping[str, Any] | None = None, fp16_works: bool = True
) -> tuple[Recipe, list[str]]:
    """Return the recipe with nothing left to the hardware, and lines that report what was chosen and why.

    Args:
        ranks: the hardware of each rank.
        stored: what the run that is resumed was begun with: key -> value. None: this is a first start.
        fp16_works: as for `choose`.
    """
    train, lines = recipe.train, []
    choice = choose(ranks, fp16_works and recipe.losses.gradient_at is None)
    precision: Any = train.precision
    channels_last = train.channels_last
    if precision == "auto":
        kept = (stored or {}).get("train.precision", "auto")
        precision = choice.precision if kept == "auto" else kept
        if precision == choice.precision:
            lines.append(f"precision {precision}: {choice.reason}")
        else:
            lines.append(
                f"precision {precision}, as at the run's first start; this hardware alone would choose "
                f"{choice.precision} ({choice.reason})"
            )
    elif precision == "bf16":
        lines += _emulation_warning(ranks)
    if channels_last == "auto":
        kept = (stored or {}).get("train.channels_last", "auto")
        channels_last = kept == "auto" or kept
    train = train.model_copy(update={"precision": precision, "channels_last": channels_last})
    recipe = recipe.model_copy(update={"train": train})
    for name, view in teacher_views(recipe):
        teacher = view.teacher
        if teacher is not None and teacher.weights_dtype == "auto":
            # Of several teachers it follows from the precision, which is kept.
            kept = "auto" if name else (stored or {}).get("teacher.weights_dtype", "auto")
            # Under bf16 autocast a forward rounds them anyway. DeepSpeed keeps a sharded teacher's in float32.
            chosen: Any = "bf16" if precision == "bf16" and teacher.placement != "zero3" else "fp32"
            update = {"weights_dtype": chosen if kept == "auto" else kept}
            recipe = with_teacher(recipe, name, teacher.model_copy(update=update))
    return recipe, lines


def _emulation_warning(ranks: Sequence[Hardware]) -> list[str]:
    slow = [
        (i, rank)
        for i, rank in enumerate(ranks)
        if rank.bf16_speed is not None and not rank.bf16 and rank.bf16_speed < _FASTER
    ]
    if not slow:
        return []
    number, rank = slow[0]
    where = f" (rank {number})" if len(slow) < len(ranks) else ""
    factor = 1 / (rank.bf16_speed or 1.0)
    return [
        f"warning: train.precision is bf16, which {rank.name}{where} emulates: a convolution takes {factor:.1f} times "
        "as long as in float32, measured now; train.precision=fp32 or auto is faster"
    ]


def settle(recipe: Recipe, launch: Launch, if_run_exists: IfRunExists | None = None) -> tuple[Recipe, list[str]]:
    """Settle the recipe, by all ranks together: see `settled`. A collective, where there is a process group; the main
    process decides what is stored.

    Args:
        if_run_exists: what is to become of a run that is in `run.dir`: one that is resumed keeps its first choice.
            None: of no run.
    """
    ranks = all_gather_objects((_probe_own(recipe, launch), launch.start))
    stored = None
    if if_run_exists is not None:
        run_dir, start = Path(recipe.run.dir), launches.together([start for _, start in ranks])
        stored = all_gather_objects(
            stored_choice(run_dir) if launches.in_effect(if_run_exists, run_dir, start) == "resume" else None
        )[0]
    chosen, lines = settled(recipe, [hardware for hardware, _ in ranks], stored, rules_of(launch).scales_losses)
    return chosen, _unused_gpu_here(launch) + lines


def settled_here(recipe: Recipe, launch: Launch, resumes: bool = True) -> tuple[Recipe, list[str]]:
    """Settle the recipe for a launch whose ranks all have this process's hardware. No collective: for commands that
    show what would be."""
    stored = stored_choice(Path(recipe.run.dir)) if resumes else None
    chosen, lines = settled(recipe, [_probe_own(recipe, launch)], stored, rules_of(launch).scales_losses)
    return chosen, _unused_gpu_here(launch) + lines


def unused_gpu(device: str, apple_gpu: bool, asks_for_cpu: bool = False) -> list[str]:
    """Return a line that reports that this machine's GPU is not used, and why; no line where there is none to use.

    Args:
        device: torch's type of the device that this process trains on.
        apple_gpu: whether torch finds Apple's GPU (MPS).
        asks_for_cpu: whether the launch asks for CPUs.
    """
    if device != "cpu" or not apple_gpu or asks_for_cpu:
        return []
    return ["the CPU is used: Apple's GPU (MPS) has no float64, in which evaluation and logs are summed"]


def _unused_gpu_here(launch: Launch) -> list[str]:
    return unused_gpu(device_type(launch.asks_for_cpu), torch.backends.mps.is_available(), launch.asks_for_cpu)


def _probe_own(recipe: Recipe, launch: Launch) -> Hardware:
    device = device_type(launch.asks_for_cpu)
    return probe(device) if needs_probe(recipe) else Hardware(device, device, bf16=True)


def needs_probe(recipe: Recipe) -> bool:
    """Return whether anything of the recipe depends on what the hardware is fast in."""
    return recipe.train.precision in ("auto", "bf16")


def stored_choice(run_dir: Path) -> dict[str, Any] | None:
    """Return what the run in `run_dir` was begun with: key -> value for the keys of AUTO. None: no run was begun there,
    or its recipe cannot be read, which the check of the run directory reports."""
    try:
        before = load_recipe(run_dir / "recipe.yaml")
    except RecipeError:
        return None
    weights = before.teacher.weights_dtype if before.teacher is not None else "auto"
    return dict(zip(AUTO, (before.train.precision, before.train.channels_last, weights), strict=True))
