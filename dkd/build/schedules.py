"""Learning rate and loss weights as functions of the global step: no state, so any step can be resumed or replayed."""

from __future__ import annotations

import math
from collections.abc import Callable

from dkd.config.losses import WeightSchedule
from dkd.config.schema import (
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    StepSchedule,
)

Schedule = Callable[[int], float]


def learning_rate(
    schedule: ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule,
    peak: float,
    steps_per_epoch: int,
    total_steps: int,
) -> Schedule:
    """Return the learning rate of each global step.

    Args:
        schedule: the recipe's section.
        peak: `optimizer.lr`.
        steps_per_epoch: optimizer steps an epoch.
        total_steps: optimizer steps of all epochs. A run that ends earlier (`train.max_steps`) walks the same curve,
            only not to its end.
    """
    if isinstance(schedule, OneCycleSchedule):
        top = max(1.0, schedule.peak * total_steps - 1)  # where torch's OneCycleLR has it

        def one_cycle(step: int) -> float:
            if step < top:
                return peak * _cosine(schedule.start, 1.0, step / top)
            return peak * _cosine(1.0, schedule.final, (step - top) / max(1.0, total_steps - 1 - top))

        return one_cycle

    warmup = round(schedule.warmup_epochs * steps_per_epoch)

    def after_warmup(step: int) -> float:
        if isinstance(schedule, StepSchedule):
            return schedule.factor ** sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        if isinstance(schedule, CosineSchedule):
            return _cosine(1.0, schedule.final, (step - warmup) / max(1, total_steps - 1 - warmup))
        return 1.0

    return lambda step: peak * ((step + 1) / warmup if step < warmup else after_warmup(step))


def loss_weight(weight: float | WeightSchedule, steps_per_epoch: int, total_steps: int) -> Schedule:
    """Return a loss weight at each global step. Arguments as `learning_rate`."""
    if not isinstance(weight, WeightSchedule):
        return lambda step: weight
    schedule = weight
    if schedule.schedule == "step":
        return lambda step: (
            schedule.start * schedule.factor ** sum(step >= m * steps_per_epoch for m in schedule.milestones)
        )
    rise = schedule.end - schedule.start
    if (epochs := schedule.warmup_epochs) is not None:
        return lambda step: schedule.start + rise * min(1.0, (step // steps_per_epoch + 1) / epochs)
    last = max(1, total_steps - 1)
    if schedule.schedule == "cosine":
        return lambda step: _cosine(schedule.start, schedule.end, step / last)
    return lambda step: schedule.start + rise * min(1.0, step / last)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
