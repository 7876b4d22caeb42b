"""What all sections of losses have in common: weights, pairs of tapped modules, presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dkd.config.key_types import Count, NonNegative, Positive, Section, allow, as_number


class WeightSchedule(Section):
    """Change a loss weight over the run, from `start` to `end`."""

    start: NonNegative
    """First weight."""
    end: NonNegative = 0.0
    """Last weight."""
    schedule: Literal["linear", "cosine", "step", "warmup"] = "linear"
    """How the weight changes. warmup: it rises from epoch to epoch, and is `end` from epoch number `warmup_epochs`
    on."""
    milestones: list[Count] = []
    """`step` only: epochs at which the weight is multiplied by `factor`; `end` is not used."""
    factor: Positive = 0.1
    """`step` only: factor of the weight at each milestone."""
    warmup_epochs: Count | None = None
    """`warmup` only: the weight of epoch e, from 1, is start + (end − start) · min(1, e / warmup_epochs)."""

    @model_validator(mode="after")
    def _keys_fit_the_schedule(self) -> WeightSchedule:
        if self.schedule == "step" and (self.end != 0 or not self.milestones):
            raise ValueError("schedule: step needs milestones (and a factor), and no end")
        if self.schedule != "step" and (self.milestones or self.factor != 0.1):
            raise ValueError("milestones and factor belong to schedule: step")
        if (self.schedule == "warmup") != (self.warmup_epochs is not None):
            raise ValueError("schedule: warmup needs warmup_epochs, and no other schedule has them")
        return self


# Tags in parentheses are left out of the paths in messages.
Weight = Annotated[
    Annotated[NonNegative, Tag("(number)")] | Annotated[WeightSchedule, Tag("(section)")],
    Discriminator(lambda value: "(section)" if isinstance(value, dict | WeightSchedule) else "(number)"),
]


Pair = list[Any]


class LossSection(Section):
    """Be the base of all sections of losses. What other rooms ask of a loss is stated here, and by its section."""

    title: ClassVar[str]
    """Name of the loss in reports."""
    of_samples: ClassVar[bool] = True
    """The loss is a mean over samples: nothing moves between ranks for it."""
    teacher: Annotated[str, Field(min_length=1)] | None = None
    """Name of one of `teachers`, with which the loss compares, or for losses of logits `ensemble`, the mean of all
    teachers' logits; null: the recipe has one `teacher`."""

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss compares with a teacher."""
        return True

    @property
    def reads_labels(self) -> bool:
        """Return whether the loss reads the labels of the images."""
        return False

    @property
    def whole_batch(self) -> bool:
        """Return whether the loss is one of the whole global batch: under accumulation, a step then has two
        forwards."""
        return False

    @property
    def reads_logits(self) -> bool:
        """Return whether the loss reads the student's logits, so that its gradient reaches the student's head."""
        return self.needs_teacher_logits

    @property
    def needs_teacher_logits(self) -> bool:
        """Return whether the loss reads the teacher's logits."""
        return False

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Return (student path, teacher path) of each pair of tapped modules; none where features are not read."""
        return []

    def describe(self) -> str:
        """Return the loss with its weight, as reports show it."""
        raise NotImplementedError


def describe_weight(weight: float | WeightSchedule) -> str:
    """Return a weight, or the first and last value of a scheduled one."""
    return f"{weight.start:g} → {weight.end:g}" if isinstance(weight, WeightSchedule) else f"{weight:g}"


def find_pair_problem(pairs: list[Pair], weighted: bool = True) -> str | None:
    """Return a sentence about the first item that is no pair; None: all are pairs."""
    for i, pair in enumerate(pairs):
        paths_ok = len(pair) in (2, 3) and all(isinstance(p, str) and p for p in pair[:2])
        weight = as_number(pair[2]) if len(pair) == 3 else 1.0
        weight_ok = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        if not (paths_ok and weight_ok and (weighted or len(pair) == 2)):
            more = " or [student path, teacher path, weight ≥ 0]" if weighted else ""
            return f"pair {i} is {pair!r}: must be [student path, teacher path]{more}"
    return None


class PairsSection(LossSection):
    pairs: Annotated[list[Pair], Field(min_length=1)]
    """One [student path, teacher path] or [student path, teacher path, weight] for each pair of tapped modules."""

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> PairsSection:
        if (problem := find_pair_problem(self.pairs)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Return (student path, teacher path) of each pair."""
        return [(pair[0], pair[1]) for pair in self.pairs]

    @property
    def pair_weights(self) -> list[float]:
        """Return the weight of each pair; 1 where none is written."""
        return [float(as_number(pair[2])) if len(pair) == 3 else 1.0 for pair in self.pairs]


def fill_from_preset(presets: dict[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """Return a validator that takes from the section's preset what is not written in the section."""

    def fill(values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in presets:
            return values
        return {**presets[preset], **values}

    return fill


class ComparingSection(LossSection):
    """Be the base of losses that compare samples with each other."""

    of_samples: ClassVar = False
    scope: Annotated[
        str | int,
        allow(
            lambda v: v in ("global", "node", "local") or (isinstance(v, int) and not isinstance(v, bool) and v > 0),
            "global, node, local or a number of ranks",
        ),
    ] = "global"
    """The ranks whose samples are compared with each other: all ranks, those of one machine, n neighbouring ranks, or
    each rank alone. All scopes but `global` depend on the number of ranks, and `local` is another loss than the
    published one."""
    batch: Literal["step", "micro"] = "step"
    """Under accumulation. step: the whole global batch is compared, by two forwards a step. micro: each micro-step's
    samples are, and the losses averaged, which depends on the number of ranks."""

    @property
    def whole_batch(self) -> bool:
        """Return whether the whole global batch is compared, and not each micro-step's samples."""
        return self.batch == "step"

    def _describe_scope(self) -> str:
        return "" if self.scope == "global" else f", {self.scope}"
