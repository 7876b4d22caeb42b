"""Sections of the losses of features, most of which train an adapter beside the student."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dkd.config.key_types import Count, Number, Positive, allow, matches
from dkd.config.losses.attention import ClassTokens
from dkd.config.losses.section import PairsSection, Weight, describe_weight, fill_from_preset

ADAPTERS = ("linear", "linear_bn", "conv1x1", "conv1x1_bn", "conv1x1_bn_relu", "mlp", "orthogonal")


def _is_adapter(value: Any) -> bool:
    return value in ADAPTERS or (isinstance(value, str) and matches(r"[\w.]+:\w+", value))


AdapterName = Annotated[str, allow(_is_adapter, f"{', '.join(ADAPTERS)} or module:callable")]
Resize = Literal["error", "pool", "interpolate"]

FITNET_PRESETS: dict[str, dict[str, Any]] = {"repdistiller": {"weight": 100, "adapter": "conv1x1_bn_relu"}}
VID_PRESETS: dict[str, dict[str, Any]] = {"repdistiller": {"weight": 1}}
CRD_PRESETS: dict[str, dict[str, Any]] = {
    "repdistiller": {"weight": 0.8, "width": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5}
}


def check_one_pair(section: PairsSection) -> None:
    """Check that a loss has one pair, without a weight of its own. Raises ValueError."""
    if len(section.pairs) != 1:
        raise ValueError(f"{len(section.pairs)} pairs: this loss has one")
    if section.pair_weights != [1.0]:
        raise ValueError(f"pair 0 has the weight {section.pair_weights[0]:g}: with one pair, write it as `weight`")


class FormSection(PairsSection):
    """Be the base of losses that bring the features of a pair into one form."""

    weight: Weight
    """Weight of the loss."""
    class_tokens: ClassTokens = None
    """For features of tokens (N, C), as transformers have: number of tokens at the front that are no part of the image.
    [1, 5]: one of the student's, five of the teacher's. null: a map of tokens is refused, and a vector is the mean of
    all of them."""

    @property
    def form(self) -> Literal["map", "vector"]:
        """Return whether the loss compares maps, or one vector for each sample."""
        return "map"

    @property
    def trains(self) -> bool:
        """Return whether the loss trains a module beside the student."""
        return True

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"{self.title} {describe_weight(self.weight)}"


class AdaptedSection(FormSection):
    """Be the base of losses that compare features after an adapter of the student's."""

    adapter_options: dict[str, Any] = {}
    """Keyword arguments of an adapter that is module:callable, after the shapes of student and teacher."""

    @model_validator(mode="after")
    def _options_belong_to_a_callable(self) -> AdaptedSection:
        adapter = getattr(self, "adapter", None)
        if self.adapter_options and (adapter is None or ":" not in adapter):
            raise ValueError(f"adapter_options belong to an adapter that is module:callable, not to {adapter}")
        return self


class _DistanceSection(AdaptedSection):
    resize: Resize = "error"
    """What to do where the resolutions of two maps differ: refuse; average-pool the larger one; or interpolate the
    student's to the teacher's."""
    teacher_norm: Literal["none", "layer", "batch", "standardize"] = "none"
    """How the teacher's features are normalised: not; each place by its channels; each channel by the micro-batch; or
    by mean and deviation that are measured at the start of the run."""
    measured_images: Count = 1024
    """teacher_norm: standardize. Training images over which the teacher is measured, rounded up to whole batches."""

    @property
    def images_to_measure(self) -> int:
        """Return the images over which statistics of the teacher are measured before the first step; 0: none are."""
        return self.measured_images if self.teacher_norm == "standardize" else 0


class FitNetSection(_DistanceSection):
    """Set FitNet, the squared distance of maps after a regressor; docs/reference/losses.md has its formula."""

    title: ClassVar = "FitNet"
    preset: Literal["repdistiller"] | None = None
    """Where weight and adapter come from: the public implementation."""
    adapter: AdapterName = "conv1x1_bn_relu"
    """The regressor, a module that is trained beside the student."""

    _from_preset = model_validator(mode="before")(fill_from_preset(FITNET_PRESETS))


class FeatureSection(_DistanceSection):
    """Set a distance of features; docs/reference/losses.md has its formulas."""

    title: ClassVar = "features"
    distance: Literal["mse", "smooth_l1", "cosine"] = "mse"
    """How features are compared."""
    of: Literal["maps", "vectors"] = "maps"
    """Whether maps are compared place by place, or one vector for each sample: the mean of a map or of tokens."""
    pool: Literal["mean", "class_token"] = "mean"
    """of: vectors. The vector of tokens: the mean of those that are no class tokens, or the first class token."""
    adapter: AdapterName | None = "linear"
    """A module that is trained beside the student and maps its features to the teacher's width; null: the features have
    one width, and are compared as they are."""

    @property
    def form(self) -> Literal["map", "vector"]:
        """Return whether the loss compares maps, or one vector for each sample."""
        return "map" if self.of == "maps" else "vector"

    @property
    def trains(self) -> bool:
        """Return whether there is an adapter."""
        return self.adapter is not None

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"{self.distance} of {self.of} {describe_weight(self.weight)}"


class _VectorSection(AdaptedSection):
    pool: Literal["mean", "class_token"] = "mean"
    """The vector of tokens: the mean of those that are no class tokens, or the first class token."""

    @property
    def form(self) -> Literal["map", "vector"]:
        """Return vector."""
        return "vector"


class VkdSection(_VectorSection):
    """Set VkD, the distance of vectors after an orthogonal projection; docs/reference/losses.md has its formula."""

    title: ClassVar = "VkD"
    adapter: AdapterName = "orthogonal"
    """The projection, a module that is trained beside the student."""
    teacher_norm: Literal["none", "layer", "batch", "standardize"] = "layer"
    """How the teacher's vectors are normalised, as for `feature`."""
    measured_images: Count = 1024
    """teacher_norm: standardize. Training images over which the teacher is measured, rounded up to whole batches."""

    @property
    def images_to_measure(self) -> int:
        """Return the images over which statistics of the teacher are measured before the first step; 0: none are."""
        return self.measured_images if self.teacher_norm == "standardize" else 0


class SrdSection(_VectorSection):
    """Set SRD; docs/reference/losses.md has its formula. Its sum is over the global batch: under accumulation, a step
    has two forwards."""

    title: ClassVar = "SRD"
    of_samples: ClassVar = False
    adapter: AdapterName = "linear_bn"
    """The projection, a module that is trained beside the student."""
    alpha: Annotated[Number, Field(ge=1)] = 4.0
    """α, the exponent."""

    @property
    def whole_batch(self) -> bool:
        """Return True."""
        return True


class VidSection(FormSection):
    """Set VID; docs/reference/losses.md has its formula. The larger of two maps is average-pooled."""

    title: ClassVar = "VID"
    preset: Literal["repdistiller"] | None = None
    """Where the weight comes from: the public implementation."""

    _from_preset = model_validator(mode="before")(fill_from_preset(VID_PRESETS))


class ReviewSection(FormSection):
    """Set ReviewKD; docs/reference/losses.md has its formula. Pairs are listed from the shallowest to the deepest."""

    title: ClassVar = "ReviewKD"
    width: Count | None = None
    """Channels in which stages are fused; null: those of the student's deepest stage, at most 512."""


class CrdSection(FormSection):
    """Set CRD; docs/reference/losses.md has its formula. Two banks hold a vector of each training sample, and each rank
    a part of them. Under accumulation, a step has two forwards."""

    title: ClassVar = "CRD"
    of_samples: ClassVar = False
    preset: Literal["repdistiller"] | None = None
    """Where the other keys come from: the public implementation."""
    width: Count = 128
    """Numbers of the vectors that are compared."""
    negatives: Count = 16384
    """Samples that each sample is compared with, drawn from the other classes, or without labels from all others."""
    temperature: Positive = 0.07
    """τ, which divides the similarities."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    """Share of a sample's old vector that stays in the bank."""
    pool: Literal["mean", "class_token"] = "mean"
    """The vector of tokens: the mean of those that are no class tokens, or the first class token."""

    _from_preset = model_validator(mode="before")(fill_from_preset(CRD_PRESETS))

    @model_validator(mode="after")
    def _has_one_pair(self) -> CrdSection:
        check_one_pair(self)
        return self

    @property
    def form(self) -> Literal["map", "vector"]:
        """Return vector."""
        return "vector"

    @property
    def whole_batch(self) -> bool:
        """Return True."""
        return True


class QueueSection(_VectorSection):
    """Compare similarities to a queue of the teacher's vectors, without labels; docs/reference/losses.md has the
    formula. The queue is one for all ranks."""

    title: ClassVar = "queue"
    adapter: AdapterName | None = "mlp"
    """A module that is trained beside the student and maps its vector to the teacher's width; null: they have one
    width."""
    size: Count = 8192
    """Vectors of the teacher in the queue, at least train.global_batch."""
    temperature: Positive = 0.07
    """τ_S, which divides the student's similarities."""
    teacher_temperature: Positive | None = None
    """τ_T, which divides the teacher's; null: as `temperature`."""

    @model_validator(mode="after")
    def _has_one_pair(self) -> QueueSection:
        check_one_pair(self)
        return self

    @property
    def trains(self) -> bool:
        """Return whether there is an adapter."""
        return self.adapter is not None
