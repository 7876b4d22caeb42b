"""Sections of the losses that read labels alone."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dkd.config.key_types import Number, Switch, allow, as_number
from dkd.config.losses.section import LossSection, Weight, describe_weight


def _are_class_weights(value: Any) -> bool:
    """Return whether a value is null, `balanced`, or a list of weights."""
    if not isinstance(value, list):
        return value is None or value == "balanced"
    numbers = [as_number(each) for each in value]
    sound = all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf for n in numbers)
    return sound and any(numbers)


_Share = Annotated[Number, Field(ge=0, lt=1)]


class LabelSection(LossSection):
    """Be the base of losses of the student's logits and the labels."""

    @property
    def needs_teacher(self) -> bool:
        """Return False: the labels teach."""
        return False

    @property
    def reads_labels(self) -> bool:
        """Return True."""
        return True

    @property
    def reads_logits(self) -> bool:
        """Return True."""
        return True


class CrossEntropySection(LabelSection):
    """Set the cross-entropy with the labels."""

    title: ClassVar = "cross-entropy"

    weight: Weight = 1.0
    """Weight of the cross-entropy."""
    label_smoothing: _Share = 0.0
    """Share of the probability that is spread evenly over all classes; with mixup and CutMix, of the mixed labels'."""
    class_weights: Annotated[
        str | list[float] | None,
        allow(_are_class_weights, "balanced, or a list with a number from 0 for each class, not all 0"),
    ] = None
    """Weight of each class, in the order of the labels; balanced: N / (K · images of the class), from the training
    labels, as in scikit-learn. null: all are 1. Evaluations stay unweighted."""

    def describe(self) -> str:
        """Return the loss with its weight, and whether classes have weights."""
        weighted = "" if self.class_weights is None else ", balanced" if self.balances else ", weighted classes"
        return f"CE {describe_weight(self.weight)}{weighted}"

    @property
    def balances(self) -> bool:
        """Return whether the weights of classes come from the training labels."""
        return self.class_weights == "balanced"


class BinaryCrossEntropySection(LabelSection):
    """Set the binary cross-entropy of each class with the labels, which takes the place of `losses.ce`."""

    title: ClassVar = "binary cross-entropy"

    weight: Weight = 1.0
    """Weight of the binary cross-entropy."""
    label_smoothing: _Share = 0.0
    """ε: the target of a class is (1 − ε) y + ε / K, with y the label's 0 or 1, or under mixup and CutMix the class's
    probability."""
    target_threshold: _Share | None = None
    """A target above this number becomes 1, and every other 0; null: targets stay as they are."""
    sum_classes: Switch = False
    """Whether the losses of an image's classes are summed; false: they are averaged, which is 1 / K of the sum."""

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"BCE {describe_weight(self.weight)}" + (", summed over classes" if self.sum_classes else "")
