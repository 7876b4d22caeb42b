"""Sections of the losses of relations between samples, which ranks compute by blocks of a grid."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dkd.config.key_types import Count, Number, Positive, allow
from dkd.config.losses.section import ComparingSection, PairsSection, Weight, describe_weight, fill_from_preset

SP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"gamma": 3000, "reference_batch": 128},
    "repdistiller": {"gamma": 3000, "reference_batch": 64},
}


PKT_PRESETS: dict[str, dict[str, Any]] = {"repdistiller": {"weight": 30000, "reference_batch": 64}}


RKD_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"distance": 1, "angle": 2},
    "repdistiller": {"distance": 25, "angle": 50},
}


def _is_grid(value: Any) -> bool:
    if not isinstance(value, list):
        return value in ("auto", "gather", "exchange")
    return len(value) == 3 and all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 10**6 for n in value)


class RelationsSection(ComparingSection, PairsSection):
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

    _from_preset = model_validator(mode="before")(fill_from_preset(SP_PRESETS))

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

    _from_preset = model_validator(mode="before")(fill_from_preset(PKT_PRESETS))

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

    _from_preset = model_validator(mode="before")(fill_from_preset(RKD_PRESETS))

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
