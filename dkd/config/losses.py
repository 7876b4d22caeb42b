"""The `losses` of a recipe: every key, its type, default and meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dkd.config.key_types import (
    Count,
    CountFromZero,
    NonNegative,
    Number,
    Positive,
    Section,
    Switch,
    allow,
    as_number,
    matches,
)


class WeightSchedule(Section):
    """A loss weight that changes over the run, from `start` to `end`."""

    start: NonNegative
    end: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "step"] = "linear"
    milestones: list[Count] = []
    """`step` only: the epochs at which the weight is multiplied by `factor`; `end` is not used."""
    factor: Positive = 0.1

    @model_validator(mode="after")
    def _keys_fit_the_schedule(self) -> WeightSchedule:
        if self.schedule == "step" and (self.end != 0 or not self.milestones):
            raise ValueError("schedule: step needs milestones (and a factor), and no end")
        if self.schedule != "step" and (self.milestones or self.factor != 0.1):
            raise ValueError("milestones and factor belong to schedule: step")
        return self


# Tags in parentheses are left out of the paths in messages.
Weight = Annotated[
    Annotated[NonNegative, Tag("(number)")] | Annotated[WeightSchedule, Tag("(section)")],
    Discriminator(lambda value: "(section)" if isinstance(value, dict | WeightSchedule) else "(number)"),
]

Pair = list[Any]


class CrossEntropySection(Section):
    weight: Weight = 1.0
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class _PairsSection(Section):
    pairs: Annotated[list[Pair], Field(min_length=1)]
    """[student path, teacher path] or [student path, teacher path, weight], one a pair."""

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> _PairsSection:
        if (problem := _pair_problem(self.pairs)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        return [(pair[0], pair[1]) for pair in self.pairs]

    @property
    def pair_weights(self) -> list[float]:
        return [float(as_number(pair[2])) if len(pair) == 3 else 1.0 for pair in self.pairs]


def _fill_from_preset(presets: dict[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """What is not written in the section is taken from its preset."""

    def fill(values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in presets:
            return values
        return {**presets[preset], **values}

    return fill


# How implementations differ. Every key can still be written beside the preset.
AT_PRESETS: dict[str, dict[str, Any]] = {
    "authors": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
    "paper": {"reduction": "paper", "norm": 2, "map": "sum_p", "p": 2, "resize": "map"},
    "repdistiller": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "features"},
    "torchdistill": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
}
SP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"gamma": 3000, "reference_batch": 128},
    "repdistiller": {"gamma": 3000, "reference_batch": 64},
}


class AttentionTransferSection(_PairsSection):
    preset: Literal["authors", "paper", "repdistiller", "torchdistill"] | None = None
    """Defaults of the other keys as an implementation has them; see docs/reference/losses.md. paper has no beta."""
    beta: Weight
    map: Literal["sum", "sum_p", "max_p"] = "sum_p"
    p: Annotated[Number, Field(ge=1)] = 2.0
    reduction: Literal["mean_squared", "paper"] = "mean_squared"
    norm: Annotated[Number, Field(ge=1)] = 2.0
    resize: Literal["error", "map", "features"] = "error"
    class_tokens: CountFromZero | None = None
    """Features of tokens (N, C), as transformers have: how many at the front are left out; the others make a square
    grid. null: refused."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(AT_PRESETS))

    @model_validator(mode="after")
    def _keys_fit_the_map_and_reduction(self) -> AttentionTransferSection:
        if self.reduction != "paper" and self.norm != 2:
            raise ValueError("norm belongs to reduction: paper")
        if self.map == "sum" and self.p != 2:
            raise ValueError("map: sum takes no p; use sum_p")
        return self


class SimilarityPreservingSection(_PairsSection):
    preset: Literal["paper", "repdistiller"] | None = None
    """gamma and reference_batch as published, or as the public implementation has them."""
    gamma: Weight
    reference_batch: Count
    """The batch `gamma` was published with: 128 in the paper, 64 in RepDistiller and mdistiller."""
    scope: Annotated[
        str | int,
        allow(
            lambda v: v in ("global", "node", "local") or (isinstance(v, int) and not isinstance(v, bool) and v > 0),
            "global, node, local or a number of ranks",
        ),
    ] = "global"
    """Whose rows make one Gram matrix: those of all ranks, of one machine, of n neighbouring ranks, or of each rank
    alone. All but global depend on the number of ranks, and local is another loss than the published one."""
    batch: Literal["step", "micro"] = "step"
    """Under accumulation: one Gram matrix of the whole global batch, by two forwards a step; or one of each micro-step,
    averaged, which depends on the number of ranks."""
    strategy: Literal["auto", "gather", "exchange"] = "auto"
    """How ranks bring the rows of the Gram matrix together; the numbers are the same. auto: what moves less."""
    comm_dtype: Literal["bf16"] | None = None
    """Features and their gradients are rounded to this type on their way between ranks; null: they travel in their
    own."""
    floor: Annotated[Number, Field(ge=0, lt=1)] = 0.01
    """Rows of a Gram matrix shorter than this share of the mean row are divided by that share, not by their own norm.
    0: the published formula, in which a sample of zero features has a gradient without bound."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(SP_PRESETS))


class SoftTargetsSection(Section):
    alpha: Weight
    temperature: Positive = 4.0


class GradientAttentionSection(Section):
    """Needs a whole teacher, DDP or one process, and no compiled model: it differentiates a gradient."""

    beta: Weight
    form: Literal["transfer", "symmetric"] = "transfer"
    """Against the teacher's gradient; or of the student alone against that of the mirrored image."""
    squared: Switch = False
    """½‖·‖² instead of ½‖·‖."""


def _pair_problem(pairs: list[Pair], weighted: bool = True) -> str | None:
    """What the first pair that is none looks like; None: all are pairs."""
    for i, pair in enumerate(pairs):
        paths_ok = len(pair) in (2, 3) and all(isinstance(p, str) and p for p in pair[:2])
        weight = as_number(pair[2]) if len(pair) == 3 else 1.0
        weight_ok = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        if not (paths_ok and weight_ok and (weighted or len(pair) == 2)):
            more = " or [student path, teacher path, weight ≥ 0]" if weighted else ""
            return f"pair {i} is {pair!r}: must be [student path, teacher path]{more}"
    return None


class CustomLossSection(Section):
    """A loss of your own: a callable made of `loss` with `options`. See docs/guides/own_loss.md."""

    name: Annotated[str, allow(lambda v: matches(r"[a-z][a-z0-9_]*", v), "a word of small letters, digits and _")]
    """What it is called in metrics.jsonl."""
    loss: Annotated[str, allow(lambda v: matches(r"[\w.]+:\w+", v), "module:attribute")]
    """module:attribute, a class or a function that returns the loss."""
    weight: Weight
    of: Literal["features", "logits", "labels"] = "features"
    """What it is called with: lists of tapped features of student and teacher, their logits, or the student's logits
    and the labels."""
    pairs: list[Pair] = []
    """of: features. [student path, teacher path], one a pair."""
    options: dict[str, Any] = {}
    """Keyword arguments that `loss` is made with."""

    @model_validator(mode="after")
    def _pairs_belong_to_features(self) -> CustomLossSection:
        if self.name in (*_OWN_TERMS, *_LOGGED):
            raise ValueError(f"name {self.name!r} is taken: it means something else in metrics.jsonl")
        if (self.of == "features") != bool(self.pairs):
            raise ValueError("of: features needs pairs" if self.of == "features" else f"of: {self.of} has no pairs")
        if (problem := _pair_problem(self.pairs, weighted=False)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        return [(pair[0], pair[1]) for pair in self.pairs]


_OWN_TERMS = ("ce", "at", "gradient_at", "sp", "kd")
# What else a line of metrics.jsonl with loss terms holds, and the keys by which its other lines are told from it.
_LOGGED = (
    "step", "epoch", "loss", "lr", "images_per_second", "data_wait", "sp_row_difference", "replaced_images",
    "skipped", "evaluation", "checkpoint",
)  # fmt: skip


class LossesSection(Section):
    ce: CrossEntropySection = CrossEntropySection()
    at: AttentionTransferSection | None = None
    gradient_at: GradientAttentionSection | None = None
    sp: SimilarityPreservingSection | None = None
    kd: SoftTargetsSection | None = None
    custom: list[CustomLossSection] = []

    @model_validator(mode="after")
    def _names_differ(self) -> LossesSection:
        names = [section.name for section in self.custom]
        if len(set(names)) < len(names):
            raise ValueError(f"two losses of one name: {', '.join(names)}")
        return self

    @property
    def needs_teacher(self) -> list[str]:
        """Keys of the losses that compare with a teacher."""
        found = [name for name in ("at", "sp", "kd") if getattr(self, name) is not None]
        if self.gradient_at is not None and self.gradient_at.form == "transfer":
            found.append("gradient_at")
        return found + [f"custom.{i}" for i, section in enumerate(self.custom) if section.of != "labels"]

    @property
    def needs_teacher_logits(self) -> list[str]:
        """Keys of the losses that read the teacher's logits."""
        by_logits = [f"custom.{i}" for i, section in enumerate(self.custom) if section.of == "logits"]
        return [key for key in self.needs_teacher if key in ("kd", "gradient_at")] + by_logits
