"""The `losses` of a recipe: every loss that a recipe may have."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import model_validator

from dkd.config.key_types import Section, allow, matches
from dkd.config.losses.attention import AttentionTransferSection, GradientAttentionSection
from dkd.config.losses.features import (
    CrdSection,
    FeatureSection,
    FitNetSection,
    QueueSection,
    ReviewSection,
    SrdSection,
    VidSection,
    VkdSection,
)
from dkd.config.losses.labels import BinaryCrossEntropySection, CrossEntropySection
from dkd.config.losses.logits import DistSection, DkdSection, NkdSection, SoftTargetsSection
from dkd.config.losses.relations import (
    CkaSection,
    CorrelationCongruenceSection,
    PktSection,
    RkdSection,
    SimilarityPreservingSection,
)
from dkd.config.losses.section import (
    ComparingSection,
    LossSection,
    Pair,
    Weight,
    WeightSchedule,
    describe_weight,
    find_pair_problem,
)


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
        if (problem := find_pair_problem(self.pairs, weighted=False)) is not None:
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
    def reads_labels(self) -> bool:
        """Return whether labels are an argument of the loss."""
        return self.of == "labels"

    @property
    def reads_logits(self) -> bool:
        """Return whether the student's logits are an argument of the loss."""
        return self.of != "features"

    @property
    def needs_teacher_logits(self) -> bool:
        """Return whether the loss reads logits of both."""
        return self.of == "logits"

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"{self.name} {describe_weight(self.weight)}"


ENSEMBLE = "ensemble"
"""In the place of a teacher's name: the mean of all teachers' logits."""

# Further keys of a line of metrics.jsonl with loss terms, and keys that distinguish the other lines from it.
_LOGGED = (
    "rkd_distance", "rkd_angle",
    "step", "epoch", "loss", "lr", "images_per_second", "data_wait", "sp_row_difference", "replaced_images",
    "skipped", "evaluation", "checkpoint",
)  # fmt: skip


class LossesSection(Section):
    """Set the losses, whose weighted sum is minimised."""

    ce: CrossEntropySection | None = CrossEntropySection()
    """Cross-entropy with the labels; null: not used, and then another loss has to be there."""
    bce: BinaryCrossEntropySection | None = None
    """Binary cross-entropy with the labels, in the place of `ce: null`; null: not used."""
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
    fitnet: FitNetSection | None = None
    """FitNet; null: not used."""
    feature: FeatureSection | None = None
    """A distance of features; null: not used."""
    vkd: VkdSection | None = None
    """VkD; null: not used."""
    srd: SrdSection | None = None
    """SRD; null: not used."""
    vid: VidSection | None = None
    """VID; null: not used."""
    review: ReviewSection | None = None
    """ReviewKD; null: not used."""
    crd: CrdSection | None = None
    """CRD; null: not used."""
    queue: QueueSection | None = None
    """Similarities to a queue of the teacher's vectors; null: not used."""
    dist: DistSection | None = None
    """DIST; null: not used."""
    kd: SoftTargetsSection | None = None
    """Soft targets; null: not used."""
    dkd: DkdSection | None = None
    """Decoupled Knowledge Distillation; null: not used."""
    nkd: NkdSection | None = None
    """Normalised Knowledge Distillation; null: not used."""
    custom: list[CustomLossSection] = []
    """Losses of your own."""

    @model_validator(mode="after")
    def _names_differ(self) -> LossesSection:
        names = [section.name for section in self.custom]
        if len(set(names)) < len(names):
            raise ValueError(f"two losses of one name: {', '.join(names)}")
        if not self.named():
            raise ValueError("ce is null, and there is no other loss: nothing would be learned")
        return self

    def taught_by(self, name: str) -> LossesSection:
        """Return the losses that compare with one of several teachers, or with the mean of all of them."""
        kept = {key: None for key, section in self.named() if "." not in key and not _reads(section, name)}
        return self.model_copy(update={**kept, "custom": [each for each in self.custom if _reads(each, name)]})

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
    def reads_labels(self) -> list[str]:
        """Return the keys of the losses that read the labels of the images."""
        return [key for key, section in self.named() if section.reads_labels]

    @property
    def reads_logits(self) -> list[str]:
        """Return the keys of the losses that read the student's logits."""
        return [key for key, section in self.named() if section.reads_logits]

    @property
    def needs_teacher_logits(self) -> list[str]:
        """Return the keys of the losses that read the teacher's logits."""
        return [key for key, section in self.named() if section.needs_teacher_logits]


def _reads(section: LossSection, teacher: str) -> bool:
    return section.needs_teacher and section.teacher in (teacher, ENSEMBLE)


LOSSES: dict[str, type[LossSection]] = {
    "ce": CrossEntropySection,
    "bce": BinaryCrossEntropySection,
    "at": AttentionTransferSection,
    "sp": SimilarityPreservingSection,
    "pkt": PktSection,
    "cc": CorrelationCongruenceSection,
    "cka": CkaSection,
    "rkd": RkdSection,
    "fitnet": FitNetSection,
    "feature": FeatureSection,
    "vkd": VkdSection,
    "srd": SrdSection,
    "vid": VidSection,
    "review": ReviewSection,
    "crd": CrdSection,
    "queue": QueueSection,
    "dist": DistSection,
    "gradient_at": GradientAttentionSection,
    "kd": SoftTargetsSection,
    "dkd": DkdSection,
    "nkd": NkdSection,
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
