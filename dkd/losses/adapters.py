"""Build the modules that losses train beside the student: projections of its features to the teacher's width.

They run inside the student's forward, in its autocast, and are no part of the student that is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrizations

from dkd.losses.feature_forms import FeatureForm, Shape

Kind = Literal["linear", "linear_bn", "conv1x1", "conv1x1_bn", "conv1x1_bn_relu", "mlp", "orthogonal"]
KINDS: tuple[Kind, ...] = ("linear", "linear_bn", "conv1x1", "conv1x1_bn", "conv1x1_bn_relu", "mlp", "orthogonal")


class PairAdapter(nn.Module):
    """Projects the student's feature of each pair to the width of the teacher's.

    Args:
        form: what features are brought into before they are projected.
        projections: one module for each pair.

    The module is called with two lists of features, of the student and of the teacher, whose resolution alone is read.
    It returns a list of maps or vectors.
    """

    def __init__(self, form: FeatureForm, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.form, self.projections = form, nn.ModuleList(projections)

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pairs = zip(student, teacher, self.projections, strict=True)
        projected = [project(self.form.student(s, t)) for s, t, project in pairs]
        for each in projected:
            if not isinstance(each, torch.Tensor):
                raise TypeError(f"the adapter returned {type(each).__name__}, not a tensor")
        return projected


def build_projection(kind: Kind, student: Shape, teacher: Shape) -> nn.Module:
    """Return a module that maps a student's feature to the width of a teacher's.

    Args:
        kind: `linear`, with a bias, at each place of a map; `linear_bn`, without one, and normalised by the batch
            without weights; `conv1x1`, `linear` for maps alone; `conv1x1_bn`, without a bias, and BatchNorm;
            `conv1x1_bn_relu`; `mlp`, two linear layers with GELU between them, as wide as the teacher's feature;
            `orthogonal`, without a bias, with orthonormal columns.
        student, teacher: shapes of one sample's features in their form, (C, H, W) or (C,).

    Raises:
        ValueError: the kind does not exist, or is not for such shapes.
    """
    if kind not in KINDS:
        raise ValueError(f"adapter={kind!r}: must be one of {', '.join(KINDS)}, or module:callable")
    is_map, own, wanted = len(student) == 3, student[0], teacher[0]
    if kind.startswith("conv1x1") and not is_map:
        raise ValueError(f"adapter={kind!r} is for maps (C, H, W), not for vectors {student}; take linear or mlp")

    def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1, bias=bias) if is_map else nn.Linear(inputs, outputs, bias=bias)

    norm = nn.BatchNorm2d if is_map else nn.BatchNorm1d
    match kind:
        case "linear" | "conv1x1":
            return linear(own, wanted)
        case "linear_bn":
            return nn.Sequential(linear(own, wanted, bias=False), norm(wanted, affine=False))
        case "conv1x1_bn":
            return nn.Sequential(linear(own, wanted, bias=False), norm(wanted))
        case "conv1x1_bn_relu":
            return nn.Sequential(linear(own, wanted, bias=False), norm(wanted), nn.ReLU())
        case "mlp":
            return nn.Sequential(linear(own, wanted), nn.GELU(), linear(wanted, wanted))
        case "orthogonal":
            if wanted < own:
                raise ValueError(
                    f"adapter='orthogonal' cannot map {own} numbers to {wanted}: columns that are orthonormal need a "
                    "teacher's feature at least as wide as the student's; take linear or mlp"
                )
            return Orthogonal(own, wanted)


class Orthogonal(nn.Module):
    """Multiplies each vector, or each place of a map, by a matrix with orthonormal columns, so that distances between
    samples are kept. Source: Miles, Elezi & Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections",
    CVPR 2024.

    Args:
        inputs: numbers of the student's vector.
        outputs: of the teacher's, at least as many.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Made orthonormal in float64: what rounding leaves of the number of threads is gone in float32.
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        self.projection = parametrizations.orthogonal(linear).to(torch.get_default_dtype())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # The exponential of a matrix keeps no digits in half precision.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if features.dim() == 2:
                projected: torch.Tensor = self.projection(features)
                return projected
            return self.projection(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_adapter(
    kind: Kind | Callable[[Shape, Shape], nn.Module], form: FeatureForm, shapes: Sequence[tuple[Shape, Shape]]
) -> PairAdapter:
    """Return the adapter of a loss for its pairs.

    Args:
        kind: as `build_projection`, or what is called with the shapes of one pair in their form and returns a module.
        form: of the features.
        shapes: (student, teacher) of each pair, without the batch.

    Raises:
        ValueError: as `build_projection` and `FeatureForm`.
    """
    formed = [form.shapes(student, teacher) for student, teacher in shapes]
    make = kind if callable(kind) else lambda student, teacher: build_projection(kind, student, teacher)
    return PairAdapter(form, [make(student, teacher) for student, teacher in formed])
