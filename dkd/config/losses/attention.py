"""Sections of Attention Transfer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dkd.config.key_types import Number, Switch, allow
from dkd.config.losses.section import LossSection, PairsSection, Weight, describe_weight, fill_from_preset

# Implementations differ in these keys. Every key can still be written beside the preset.
AT_PRESETS: dict[str, dict[str, Any]] = {
    "authors": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
    "paper": {"reduction": "paper", "norm": 2, "map": "sum_p", "p": 2, "resize": "map"},
    "repdistiller": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "features"},
    "torchdistill": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
}


def _are_class_tokens(value: Any) -> bool:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    return value is None or all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**6 for n in numbers)


ClassTokens = Annotated[
    int | list[int] | None,
    allow(_are_class_tokens, "a whole number from 0, two of them (student, teacher), or null"),
]


class AttentionTransferSection(PairsSection):
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

    _from_preset = model_validator(mode="before")(fill_from_preset(AT_PRESETS))

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
    def reads_labels(self) -> bool:
        """Return True: the gradient is that of the cross-entropy."""
        return True

    @property
    def reads_logits(self) -> bool:
        """Return True."""
        return True

    @property
    def needs_teacher_logits(self) -> bool:
        """Return whether the teacher's gradient is taken of its logits."""
        return self.needs_teacher

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"gradient AT β {describe_weight(self.beta)}"
