"""Compare the losses of a few steps with the live teacher and with its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dkd.config import Recipe
from dkd.config.derived import caches
from dkd.launch import Launch
from dkd.training.components import Components, build_trial


@dataclass(frozen=True)
class TermDifference:
    """Holds a loss term, as means over the steps.

    Args:
        live: with the teacher.
        stored: with the cache.
        largest: absolute difference in a step.
    """

    live: float
    stored: float
    largest: float


@dataclass(frozen=True)
class CacheCheck:
    """Holds what was compared.

    Args:
        steps: from 0.
        terms: by name.
        left_out: terms that keep a state from step to step.
        is_exact: nothing is stored in an approximation, so that nothing may differ.
        other_images: steps whose images are others than those that the teacher saw.
    """

    steps: list[int]
    terms: dict[str, TermDifference]
    left_out: list[str]
    is_exact: bool
    other_images: list[int]


def compare_with_teacher(recipe: Recipe, launch: Launch, steps: int) -> CacheCheck:
    """Return the losses of the untrained student over some stored steps, with the live teacher and with its cache. A
    collective. Arguments and errors as `build_trial`.

    Args:
        steps: to compare, at most.
    """
    parts = build_trial(recipe, launch, with_caches=True)
    stored = parts.step.teaching.stored
    try:
        parts.step.student.train()
        chosen = _choose(parts, steps)
        live: dict[str, list[float]] = {}
        read: dict[str, list[float]] = {}
        other_images = []
        for step in chosen:
            parts.step.teaching.stored = {}
            _add(live, _losses(parts, step))
            parts.step.teaching.stored = stored
            _add(read, _losses(parts, step))
            other_images += [step] * parts.step.teaching.has_other_images
    finally:
        parts.caches.close()
        parts.heartbeat.close()
    keeping = [t.name for t in parts.step.objective.terms if hasattr(getattr(t, "loss", None), "end_step")]
    terms = {
        name: TermDifference(
            sum(values) / len(values),
            sum(read[name]) / len(values),
            max(abs(a - b) for a, b in zip(values, read[name], strict=True)),
        )
        for name, values in live.items()
        if name not in keeping
    }
    exact = all(section.store == "exact" for section in caches(recipe).values())
    return CacheCheck(chosen, terms, keeping, exact, other_images)


def _choose(parts: Components, steps: int) -> list[int]:
    """Return some of the steps that all caches have, spread over those of the first epochs."""
    per_epoch, total = parts.schedule.steps_per_epoch, parts.schedule.total_steps
    listed: list[int] = []
    for first in range(0, total, per_epoch):
        last = min(first + per_epoch, total)
        found = parts.caches.listed(first, last)
        if not any(found):
            break
        listed += [first + i for i, there in enumerate(found) if there]
    if len(listed) <= steps:
        return listed
    return [listed[i * (len(listed) - 1) // max(1, steps - 1)] for i in range(steps)]


def _losses(parts: Components, step: int) -> dict[str, float]:
    """Return the terms of a step, as means over its micro-steps."""
    batches = iter(parts.data.train_loader.steps(step, step + 1))
    micro_batches = [next(batches) for _ in range(parts.step.micro_steps)]
    indices = None
    if parts.step.needs_indices:
        keys = parts.data.sampler.micro_batches(step, step + 1)
        indices = [torch.tensor([index for _, index in each], dtype=torch.int64) for each in keys]
    parts.step.begin(micro_batches, step, indices)
    found: dict[str, float] = {}
    for micro_step in range(len(micro_batches)):
        for name, value in parts.step.loss(micro_step).terms.items():
            found[name] = found.get(name, 0.0) + value.item() / len(micro_batches)
    parts.step.end(skipped=True)
    return found


def _add(to: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        to.setdefault(name, []).append(value)
