"""Define the `losses` of a recipe: every key, its type, default and meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dkd.config.key_types import (
    Count,
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
    """Change a loss weight over the run, from `start` to `end`."""

    start: NonNegative
    """First weight."""
    end: NonNegative = 0.0
    """Last weight."""
    schedule: Literal["linear", "cosine", "step"] = "linear"
    """How the weight changes."""
    milestones: list[Count] = []
    """`step` only: epochs at which the weight is multiplied by `factor`; `end` is not used."""
    factor: Positive = 0.1
    """`step` only: factor of the weight at each milestone."""

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


class LossSection(Section):
    """Be the base of all sections of losses. What other rooms ask of a loss is stated here, and by its section."""

    title: ClassVar[str]
    """Name of the loss in reports."""
    of_samples: ClassVar[bool] = True
    """The loss is a mean over samples: nothing moves between ranks for it."""

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss compares with a teacher."""
        return True

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


def _are_class_weights(value: Any) -> bool:
    """Return whether a value is null, `balanced`, or a list of weights."""
    if not isinstance(value, list):
        return value is None or value == "balanced"
    numbers = [as_number(each) for each in value]
    sound = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
    return sound and any(numbers)


class CrossEntropySection(LossSection):
    """Set the cross-entropy with the labels."""

    title: ClassVar = "cross-entropy"

    weight: Weight = 1.0
    """Weight of the cross-entropy."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the probability that is spread evenly over all classes."""
    class_weights: Annotated[
        str | list[float] | None,
        allow(_are_class_weights, "balanced, or a list with a number from 0 for each class, not all 0"),
    ] = None
    """Weight of each class, in the order of the labels; balanced: N / (K · images of the class), from the training
    labels, as in scikit-learn. null: all are 1. Evaluations stay unweighted."""

    @property
    def needs_teacher(self) -> bool:
        """Return False: the labels teach."""
        return False

    def describe(self) -> str:
        """Return the loss with its weight, and whether classes have weights."""
        weighted = "" if self.class_weights is None else ", balanced" if self.balances else ", weighted classes"
        return f"CE {describe_weight(self.weight)}{weighted}"

    @property
    def balances(self) -> bool:
        """Return whether the weights of classes come from the training labels."""
        return self.class_weights == "balanced"


class _PairsSection(LossSection):
    pairs: Annotated[list[Pair], Field(min_length=1)]
    """One [student path, teacher path] or [student path, teacher path, weight] for each pair of tapped modules."""

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> _PairsSection:
        if (problem := _find_pair_problem(self.pairs)) is not None:
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


def _fill_from_preset(presets: dict[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """Return a validator that takes from the section's preset what is not written in the section."""

    def fill(values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in presets:
            return values
        return {**presets[preset], **values}

    return fill


# Implementations differ in these keys. Every key can still be written beside the preset.
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
PKT_PRESETS: dict[str, dict[str, Any]] = {"repdistiller": {"weight": 30000, "reference_batch": 64}}
RKD_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"distance": 1, "angle": 2},
    "repdistiller": {"distance": 25, "angle": 50},
}
DIST_PRESETS: dict[str, dict[str, Any]] = {
    "cifar": {"weight": 2, "beta": 1, "gamma": 1, "tau": 4},
    "imagenet": {"weight": 2, "beta": 1, "gamma": 1, "tau": 1},
}


def _are_class_tokens(value: Any) -> bool:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    return value is None or all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**6 for n in numbers)


ClassTokens = Annotated[
    int | list[int] | None,
    allow(_are_class_tokens, "a whole number from 0, two of them (student, teacher), or null"),
]


class AttentionTransferSection(_PairsSection):
    """Set activation-based Attention Transfer; docs/reference/losses.md has its formulas."""

    title: ClassVar = "AT"
    preset: Literal["authors", "paper", "repdistiller", "torchdistill"] | None = None
    """The implementation whose defaults the other keys have; see docs/reference/losses.md. `paper` has no beta."""
    beta: Weight
    """β, the weight of the loss."""
    map: Literal["sum", "sum_p", "max_p"] = "sum_p"
    """How an attention map is made from the channels of a feature."""
    p: Annotated[Number, Field(ge=1)] = 2.0
    """Exponent of `sum_p` and `max_p`."""
    reduction: Literal["mean_squared", "paper"] = "mean_squared"
    """How the difference of two maps becomes a number: as in the authors' code, or as in the paper's equation 2."""
    norm: Annotated[Number, Field(ge=1)] = 2.0
    """reduction: paper. The norm of the difference."""
    resize: Literal["error", "map", "features"] = "error"
    """What to do where two resolutions differ: refuse, resize the larger map, or average-pool the larger feature."""
    class_tokens: ClassTokens = None
    """For features of tokens (N, C), as transformers have: number of tokens at the front that are left out; the other
    tokens make a square grid. [1, 5]: one of the student's, five of the teacher's. null: features of tokens are
    refused. Maps (H, W, C), as Swin's, need no key."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(AT_PRESETS))

    @model_validator(mode="after")
    def _keys_fit_the_map_and_reduction(self) -> AttentionTransferSection:
        if self.reduction != "paper" and self.norm != 2:
            raise ValueError("norm belongs to reduction: paper")
        if self.map == "sum" and self.p != 2:
            raise ValueError("map: sum takes no p; use sum_p")
        return self

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"AT β {describe_weight(self.beta)}"


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

    def _describe_scope(self) -> str:
        return "" if self.scope == "global" else f", {self.scope}"


def _is_grid(value: Any) -> bool:
    if not isinstance(value, list):
        return value in ("auto", "gather", "exchange")
    return len(value) == 3 and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 10**6 for n in value)


class RelationsSection(ComparingSection, _PairsSection):
    """Be the base of losses of the relations between all samples, which ranks compute by blocks of a grid."""

    grid: Annotated[
        str | list[int],
        allow(_is_grid, "auto, gather, exchange or three whole numbers above 0, such as [4, 2, 8]"),
    ] = "auto"
    """How ranks share the relations of all samples, [r, c, k] with r·c·k ranks; `gather` is [W, 1, 1], and `exchange`
    [1, 1, W]. The result is the same. auto: the grid that should take the least time, of those that fit into
    `memory`."""
    memory: Positive | None = None
    """Gigabytes that a rank may hold for this loss beside its own features; null: a quarter of its device's, the least
    of all ranks."""
    comm_dtype: Literal["bf16"] | None = None
    """Type that features and their gradients are rounded to while they are sent between ranks; null: they keep their
    own."""


SampleFloor = Annotated[Number, Field(ge=0, lt=1)]


class SimilarityPreservingSection(RelationsSection):
    """Set the Similarity-Preserving loss; docs/reference/losses.md has its formula."""

    title: ClassVar = "SP"
    preset: Literal["paper", "repdistiller"] | None = None
    """Where gamma and reference_batch come from: the paper, or the public implementation."""
    gamma: Weight
    """γ, the weight of the loss at `reference_batch`."""
    reference_batch: Count
    """Batch that `gamma` was published with: 128 in the paper, 64 in RepDistiller and mdistiller."""
    strategy: Literal["auto", "gather", "exchange"] = "auto"
    """An older name of `grid`, where that is auto."""
    floor: SampleFloor = 0.01
    """Share of the mean row's norm. A shorter row of a Gram matrix is divided by this share instead of its own norm. 0:
    the published formula, in which a sample of zero features has an unbounded gradient."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(SP_PRESETS))

    @model_validator(mode="after")
    def _one_name_of_the_grid(self) -> SimilarityPreservingSection:
        if self.strategy != "auto" and self.grid not in ("auto", self.strategy):
            raise ValueError(f"grid {self.grid} and strategy {self.strategy} contradict each other; remove strategy")
        return self

    def describe(self) -> str:
        """Return the loss with its weight, the batch of that weight, and a scope that is not global."""
        return f"SP γ {describe_weight(self.gamma)} at {self.reference_batch}{self._describe_scope()}"


class PktSection(RelationsSection):
    """Set Probabilistic Knowledge Transfer; docs/reference/losses.md has its formula."""

    title: ClassVar = "PKT"
    preset: Literal["repdistiller"] | None = None
    """Where weight and reference_batch come from: the public implementation."""
    weight: Weight
    """Weight of the loss at `reference_batch`."""
    reference_batch: Count
    """Batch that `weight` was published with: 64 in RepDistiller and mdistiller."""
    floor: SampleFloor = 0.01
    """Share of the mean norm of features. A smaller norm counts as this share. 0: the published formula, in which a
    sample of zero features has an unbounded gradient."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(PKT_PRESETS))

    def describe(self) -> str:
        """Return the loss with its weight and the batch of that weight."""
        return f"PKT {describe_weight(self.weight)} at {self.reference_batch}{self._describe_scope()}"


class CorrelationCongruenceSection(RelationsSection):
    """Set Correlation Congruence; docs/reference/losses.md has its formula."""

    title: ClassVar = "CC"
    weight: Weight
    """Weight of the loss."""
    gamma: Positive = 0.4
    """γ of the Gaussian kernel."""
    max_p: Annotated[Count, Field(le=100)] = 2
    """Last power of the kernel's Taylor series."""
    floor: SampleFloor = 0.01
    """Share of the mean norm of features. A smaller norm counts as this share. 0: the published formula."""

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"CC {describe_weight(self.weight)}{self._describe_scope()}"


class CkaSection(RelationsSection):
    """Set centred kernel alignment as a loss; docs/reference/losses.md has its formula."""

    title: ClassVar = "CKA"
    weight: Weight
    """Weight of the loss, which is between 0 and 1."""

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"CKA {describe_weight(self.weight)}{self._describe_scope()}"


class RkdSection(RelationsSection):
    """Set Relational Knowledge Distillation; docs/reference/losses.md has its formulas. `distance` and `angle` are two
    terms, rkd_distance and rkd_angle; `grid` and `memory` are those of the distances."""

    title: ClassVar = "RKD"
    preset: Literal["paper", "repdistiller"] | None = None
    """Where distance and angle come from: the paper (1, 2), or the public implementations (25, 50)."""
    distance: Weight
    """Weight of the loss of distances; 0: not computed."""
    angle: Weight
    """Weight of the loss of angles; 0: not computed. Angles are computed for 2,048 samples at most; with more, set a
    smaller `scope`."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(RKD_PRESETS))

    @model_validator(mode="after")
    def _has_a_part(self) -> RkdSection:
        if self.distance == 0 and self.angle == 0:
            raise ValueError("distance and angle are both 0; remove the loss, or give one of the two a weight")
        return self

    def describe(self) -> str:
        """Return the loss with its weights."""
        return (
            f"RKD distance {describe_weight(self.distance)}, angle {describe_weight(self.angle)}"
            f"{self._describe_scope()}"
        )


class DistSection(ComparingSection):
    """Set DIST, the correlation of logits between classes and between samples; docs/reference/losses.md has its
    formula."""

    title: ClassVar = "DIST"
    preset: Literal["cifar", "imagenet"] | None = None
    """Where weight, beta, gamma and tau come from: the authors' settings for CIFAR-100 or for ImageNet."""
    weight: Weight
    """Weight of the loss."""
    beta: NonNegative = 1.0
    """β, the weight of the part between the classes of a sample."""
    gamma: NonNegative = 1.0
    """γ, the weight of the part between the samples of a class."""
    tau: Positive = 1.0
    """τ, which divides the logits."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(DIST_PRESETS))

    @property
    def needs_teacher_logits(self) -> bool:
        """Return True."""
        return True

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"DIST {describe_weight(self.weight)}, τ {self.tau:g}{self._describe_scope()}"


class SoftTargetsSection(LossSection):
    """Set the loss of soft targets (KD)."""

    title: ClassVar = "KD"
    alpha: Weight
    """α, the weight of the loss."""
    temperature: Positive = 4.0
    """T, which divides the logits."""

    @property
    def needs_teacher_logits(self) -> bool:
        """Return True."""
        return True

    def describe(self) -> str:
        """Return the loss with its weight and temperature."""
        return f"KD α {describe_weight(self.alpha)}, T {self.temperature:g}"


class GradientAttentionSection(LossSection):
    """Set gradient-based Attention Transfer. It differentiates a gradient, and so needs a whole teacher, DDP or one
    process, and no compiled model."""

    title: ClassVar = "gradient AT"
    beta: Weight
    """β, the weight of the loss."""
    form: Literal["transfer", "symmetric"] = "transfer"
    """transfer: compare with the teacher's gradient. symmetric: compare the student's gradient with that of the
    mirrored image."""
    squared: Switch = False
    """Whether the loss is ½‖·‖² instead of ½‖·‖."""

    @property
    def needs_teacher(self) -> bool:
        """Return whether the student is compared with a teacher, and not with itself on mirrored images."""
        return self.form == "transfer"

    @property
    def needs_teacher_logits(self) -> bool:
        """Return whether the teacher's gradient is taken of its logits."""
        return self.needs_teacher

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"gradient AT β {describe_weight(self.beta)}"


def _find_pair_problem(pairs: list[Pair], weighted: bool = True) -> str | None:
    """Return a sentence about the first item that is no pair; None: all are pairs."""
    for i, pair in enumerate(pairs):
        paths_ok = len(pair) in (2, 3) and all(isinstance(p, str) and p for p in pair[:2])
        weight = as_number(pair[2]) if len(pair) == 3 else 1.0
        weight_ok = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        if not (paths_ok and weight_ok and (weighted or len(pair) == 2)):
            more = " or [student path, teacher path, weight ≥ 0]" if weighted else ""
            return f"pair {i} is {pair!r}: must be [student path, teacher path]{more}"
    return None


class CustomLossSection(LossSection):
    """Add a loss of your own: `loss`, called with `options`, makes the function of the loss. A function that has a
    parameter `labels` or `indices` after its first two is given this rank's labels, or the places of its samples in the
    training data. See docs/guides/own_loss.md."""

    title: ClassVar = "custom"
    of_samples: ClassVar = False  # what it moves is its own
    name: Annotated[str, allow(lambda v: matches(r"[a-z][a-z0-9_]*", v), "a word of small letters, digits and _")]
    """Name of the loss in metrics.jsonl."""
    loss: Annotated[str, allow(lambda v: matches(r"[\w.]+:\w+", v), "module:attribute")]
    """module:attribute, a class or a function that returns the loss."""
    weight: Weight
    """Weight of the loss."""
    of: Literal["features", "logits", "labels"] = "features"
    """Arguments of the loss: lists of tapped features of student and teacher, their logits, or the student's logits and
    the labels."""
    pairs: list[Pair] = []
    """of: features. One [student path, teacher path] for each pair of tapped modules."""
    options: dict[str, Any] = {}
    """Keyword arguments of `loss`."""

    @model_validator(mode="after")
    def _pairs_belong_to_features(self) -> CustomLossSection:
        if self.name in (*LossesSection.model_fields, *_LOGGED):
            raise ValueError(f"name {self.name!r} is taken: it means something else in metrics.jsonl")
        if (self.of == "features") != bool(self.pairs):
            raise ValueError("of: features needs pairs" if self.of == "features" else f"of: {self.of} has no pairs")
        if (problem := _find_pair_problem(self.pairs, weighted=False)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Return (student path, teacher path) of each pair."""
        return [(pair[0], pair[1]) for pair in self.pairs]

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss reads more than the student's logits and the labels."""
        return self.of != "labels"

    @property
    def needs_teacher_logits(self) -> bool:
        """Return whether the loss reads logits of both."""
        return self.of == "logits"

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"{self.name} {describe_weight(self.weight)}"


# Further keys of a line of metrics.jsonl with loss terms, and keys that distinguish the other lines from it.
_LOGGED = (
    "rkd_distance", "rkd_angle",
    "step", "epoch", "loss", "lr", "images_per_second", "data_wait", "sp_row_difference", "replaced_images",
    "skipped", "evaluation", "checkpoint",
)  # fmt: skip


class LossesSection(Section):
    """Set the losses, whose weighted sum is minimised."""

    ce: CrossEntropySection = CrossEntropySection()
    """Cross-entropy with the labels."""
    at: AttentionTransferSection | None = None
    """Activation-based Attention Transfer; null: not used."""
    gradient_at: GradientAttentionSection | None = None
    """Gradient-based Attention Transfer; null: not used."""
    sp: SimilarityPreservingSection | None = None
    """Similarity-Preserving loss; null: not used."""
    pkt: PktSection | None = None
    """Probabilistic Knowledge Transfer; null: not used."""
    cc: CorrelationCongruenceSection | None = None
    """Correlation Congruence; null: not used."""
    cka: CkaSection | None = None
    """Centred kernel alignment; null: not used."""
    rkd: RkdSection | None = None
    """Relational Knowledge Distillation; null: not used."""
    dist: DistSection | None = None
    """DIST; null: not used."""
    kd: SoftTargetsSection | None = None
    """Soft targets; null: not used."""
    custom: list[CustomLossSection] = []
    """Losses of your own."""

    @model_validator(mode="after")
    def _names_differ(self) -> LossesSection:
        names = [section.name for section in self.custom]
        if len(set(names)) < len(names):
            raise ValueError(f"two losses of one name: {', '.join(names)}")
        return self

    @property
    def compared(self) -> list[tuple[str, ComparingSection]]:
        """Return the losses that compare samples, each with its key."""
        return [(key, section) for key, section in self.named() if isinstance(section, ComparingSection)]

    def named(self) -> list[tuple[str, LossSection]]:
        """Return the losses that are used, each with its key below `losses`: `at`, `custom.0`."""
        own = [(key, getattr(self, key)) for key in LOSSES]
        return [(key, section) for key, section in own if section is not None] + [
            (f"custom.{i}", section) for i, section in enumerate(self.custom)
        ]

    @property
    def needs_teacher(self) -> list[str]:
        """Return the keys of the losses that compare with a teacher."""
        return [key for key, section in self.named() if section.needs_teacher]

    @property
    def needs_teacher_logits(self) -> list[str]:
        """Return the keys of the losses that read the teacher's logits."""
        return [key for key, section in self.named() if section.needs_teacher_logits]


LOSSES: dict[str, type[LossSection]] = {
    "ce": CrossEntropySection,
    "at": AttentionTransferSection,
    "sp": SimilarityPreservingSection,
    "pkt": PktSection,
    "cc": CorrelationCongruenceSection,
    "cka": CkaSection,
    "rkd": RkdSection,
    "dist": DistSection,
    "gradient_at": GradientAttentionSection,
    "kd": SoftTargetsSection,
}
"""The recipe's own losses, in the order in which their terms are summed: key -> section."""


def with_constant_weights(losses: LossesSection) -> LossesSection:
    """Return the losses with the highest value of each scheduled weight in place of its schedule."""

    def constant(section: LossSection) -> LossSection:
        changed = {
            key: max(value.start, value.end)
            for key in type(section).model_fields
            if isinstance(value := getattr(section, key), WeightSchedule)
        }
        return section.model_copy(update=changed)

    named = {key: constant(section) for key in LOSSES if (section := getattr(losses, key)) is not None}
    return losses.model_copy(update={**named, "custom": [constant(section) for section in losses.custom]})
