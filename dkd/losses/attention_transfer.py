"""Compute activation-based Attention Transfer (AT).

Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.

A feature map A (C, H, W) becomes an attention map F(A) (H, W) over its channels:

    sum    F = Σ_c |A_c|          sum_p  F = Σ_c |A_c|^p          max_p  F = max_c |A_c|^p

Each sample's map is flattened and divided by its L2 norm, Q = F / ‖F‖₂. Over the B samples of the global batch, for one
pair (S, T):

    mean_squared   (1 / (B·H·W)) Σ_i ‖Q_S,i − Q_T,i‖₂²        the authors' code
    paper          (1 / B) Σ_i ½ ‖Q_S,i − Q_T,i‖_q             equation 2; q = `norm`

Pairs are summed. A factor of a sample's map does not change Q, so each map is divided by its largest element: float32
holds neither the squares of numbers beyond 1e19 nor high powers of ordinary numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.global_batch.gram import promoted_dtype
from dkd.losses import attention_of_squares
from dkd.losses.feature_pairs import Features, as_list, as_pairs, needs_plain_autograd, no_autocast
from dkd.losses.sample_form import PairShapes, SampleForm, Shape

# A map of zeros is divided by this number. Smaller numbers have no square in float32; and the gradient of a map of
# zeros must stay finite, so that its product with the features is zero.
_SMALLEST = 1e-19


@dataclass(frozen=True)
class AttentionMaps:
    """Hold normalised attention maps (b, h·w) of a teacher, one for each pair, their resolutions (h, w), and whether
    they were made by attention_of_squares.py."""

    maps: Sequence[torch.Tensor]
    resolutions: Sequence[tuple[int, int]]
    of_squares: bool


class AttentionTransfer(nn.Module):
    """Compute the AT loss over the global batch.

    Args:
        map: `sum`, `sum_p` or `max_p`.
        p: the exponent of `sum_p` and `max_p`; absolute values are taken first, so odd p is right on signed features.
        reduction: `mean_squared` (the authors' code, for which the literature has β = 1000) or `paper`.
        norm: q of the `paper` reduction.
        resize: what to do when the two resolutions differ. `error`; `map`: the larger attention map is interpolated to
            the smaller one (the paper's way; bilinear, antialiased); `features`: the larger feature is average-pooled
            to the smaller resolution before its map is taken (what RepDistiller and mdistiller do).
        weights: one weight for each pair; None: 1.
        class_tokens: for features of tokens (b, N, C), as transformers have: the number of tokens at the front that are
            no part of the image and are left out; the rest must be a square grid, row by row. Two numbers are those of
            student and teacher. None: such features are an error.
        square: the images are square, and so are all maps: a feature (b, H, W, C) with H = W ≠ C, as Swin's, is
            recognised as such. Else every feature of four dimensions is (b, C, H, W).

    The module is called with one tensor (b, C, H, W) of the student and one of the teacher, or with equal-length lists
    of tensors; C may differ. It returns a scalar whose mean over ranks is the loss of the global batch, and whose
    gradient, averaged over ranks as DDP, FSDP and ZeRO do, is that loss's gradient. Without a process group, the scalar
    is the single-process loss. `layout` states which rank holds which rows. Without `layout`, the ranks agree on one by
    one small all-gather, and local batches may be uneven.

    Raises:
        ValueError: the shapes make no pair, or the resolutions differ under `resize="error"`.
        BatchMismatchError: on all ranks, when shapes differ between ranks.

    Example:
        >>> at = AttentionTransfer()
        >>> loss = cross_entropy + 1000 * at(student_map, teacher_map)
    """

    takes_half_precision = True
    """Features of half precision are promoted where they are read, and their gradient is rounded once."""

    def __init__(
        self,
        map: str = "sum_p",
        p: float = 2,
        reduction: str = "mean_squared",
        norm: float = 2,
        resize: str = "error",
        weights: Sequence[float] | None = None,
        class_tokens: int | Sequence[int] | None = None,
        square: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("map", map, ("sum", "sum_p", "max_p")),
            ("reduction", reduction, ("mean_squared", "paper")),
            ("resize", resize, ("error", "map", "features")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        if p < 1 or norm < 1:
            # Below 1 the gradient at 0 is infinite, and features after a ReLU are full of zeros.
            raise ValueError(f"p={p} and norm={norm} must be at least 1")
        self.map, self.p, self.reduction, self.norm = map, p, reduction, norm
        self.resize, self.weights, self.class_tokens, self.square = resize, weights, class_tokens, square

    def extra_repr(self) -> str:
        return (
            f"map={self.map!r}, p={self.p}, reduction={self.reduction!r}, norm={self.norm}, resize={self.resize!r}, "
            f"weights={self.weights}, class_tokens={self.class_tokens}, square={self.square}"
        )

    def forward(
        self, student: Features, teacher: Features | AttentionMaps, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        if isinstance(teacher, AttentionMaps):
            return self._compare_with_maps(as_list(student), teacher, layout)
        # Ranks agree before anything else may raise, so that one rank's wrong shape is every rank's error.
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        of_student, of_teacher = tokens_of_both(self.class_tokens)
        pairs = [
            (self._as_map(s, of_student), self._as_map(t, of_teacher), w)
            for s, t, w in as_pairs(student, teacher, self.weights)
        ]
        students, teachers, weights = [s for s, _, _ in pairs], [t for _, t, _ in pairs], [w for _, _, w in pairs]
        with no_autocast(students[0].device):
            for s in students:
                layout.check(s)
            by_squares = self._is_of_squares([s.shape[2:] for s in students], [t.shape[2:] for t in teachers])
            alike = all(len({promoted_dtype(f.dtype) for f in features}) == 1 for features in (students, teachers))
            if by_squares and alike and not needs_plain_autograd([*students, *teachers]):
                return self._compare_squares(students, [t.detach() for t in teachers], weights, layout)
            return torch.stack([w * layout.mean(self._compare(s, t)) for s, t, w in pairs]).sum()

    def _is_of_squares(self, students: Sequence[Sequence[int]], teachers: Sequence[Sequence[int]]) -> bool:
        """Return whether attention_of_squares.py computes the loss, for resolutions (h, w) of all pairs."""
        settings = (self.map, self.p, self.reduction)
        return settings == ("sum_p", 2, "mean_squared") and list(map(tuple, students)) == list(map(tuple, teachers))

    def _compare_squares(
        self,
        students: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor] | torch.Tensor,
        weights: Sequence[float],
        layout: BatchLayout,
    ) -> torch.Tensor:
        """Return the loss for maps (b, C, h, w) of the student and of the teacher, or the teacher's attention maps as
        attention_of_squares.py has them."""
        layout.check(students[0])
        positions = [s.shape[2] * s.shape[3] for s in students]
        factors = [w * layout.factor / count for w, count in zip(weights, positions, strict=True)]
        if not isinstance(teacher, torch.Tensor) and len({promoted_dtype(f.dtype) for f in (*students, *teacher)}) > 1:
            teacher, _ = attention_of_squares.pack_maps(teacher)

        def plainly(tensors: Sequence[torch.Tensor], packed: torch.Tensor) -> torch.Tensor:
            maps = attention_of_squares.unpack(packed, positions)
            own = [self._normalize_map(s, (s.shape[2], s.shape[3])) for s in tensors]
            each = [c * (q - t).square().sum() for c, q, t in zip(factors, own, maps, strict=True)]
            return torch.stack(each).sum()

        if needs_plain_autograd(students):
            packed = teacher if isinstance(teacher, torch.Tensor) else attention_of_squares.pack_maps(teacher)[0]
            return plainly(students, packed)
        return attention_of_squares.compare(students, teacher, factors, plainly)

    def _compare_with_maps(
        self, student: Sequence[torch.Tensor], teacher: AttentionMaps, layout: BatchLayout | None
    ) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*student, *teacher.maps], loss=self)
        of_student, _ = tokens_of_both(self.class_tokens)
        pairs = as_pairs(student, teacher.maps, self.weights)
        with no_autocast(student[0].device):
            if teacher.of_squares:
                students = [self._as_map(s, of_student) for s, _, _ in pairs]
                packed = attention_of_squares.pack_normalized(teacher.maps)
                return self._compare_squares(students, packed, [w for _, _, w in pairs], layout)
            distances = [
                w * layout.mean(self._distance(self._normalize_map(self._as_map(s, of_student), resolution), q))
                for (s, q, w), resolution in zip(pairs, teacher.resolutions, strict=True)
            ]
            return torch.stack(distances).sum()

    def sample_forms(self, shapes: PairShapes) -> list[SampleForm]:
        """Return the normalised attention map of each pair's teacher feature, at the resolution of the comparison."""
        return [self._sample_form(student, teacher) for student, teacher in shapes]

    def _sample_form(self, student: Shape, teacher: Shape) -> SampleForm:
        tokens = tokens_of_both(self.class_tokens)[1]
        own, resolution = token_grid(teacher, tokens, self.square)[1:], self._resolution(student, teacher)
        facts: dict[str, Any] = {
            "map": self.map,
            "p": self.p,
            "resolution": list(resolution),
            # The other settings do not matter to a map that keeps its resolution, and not to one of four dimensions.
            "resize": None if resolution == own else self.resize,
            "class_tokens": tokens if len(teacher) == 2 else None,
            # Both ways round differently.
            "of_squares": self._is_of_squares(*self._resolutions([(student, teacher)])),
        }
        return SampleForm("attention map", facts, (resolution[0] * resolution[1],))

    @torch.no_grad()
    def take_samples(self, teacher: Sequence[torch.Tensor], shapes: PairShapes) -> list[torch.Tensor]:
        """Return the normalised attention maps (b, h·w) of the teacher's features."""
        _, of_teacher = tokens_of_both(self.class_tokens)
        if self._is_of_squares(*self._resolutions(shapes)):
            maps = [self._as_map(feature, of_teacher) for feature in teacher]
            with no_autocast(maps[0].device):
                packed, _ = attention_of_squares.pack_maps(maps)
            return attention_of_squares.unpack(packed, [each.shape[2] * each.shape[3] for each in maps])
        found = []
        for feature, (student, own) in zip(teacher, shapes, strict=True):
            with no_autocast(feature.device):
                found.append(self._normalize_map(self._as_map(feature, of_teacher), self._resolution(student, own)))
        return found

    def give_samples(self, samples: Sequence[torch.Tensor], shapes: PairShapes) -> AttentionMaps:
        """Return these maps, to be given in the place of the teacher's features."""
        of_squares = self._is_of_squares(*self._resolutions(shapes))
        resolutions = [self._resolution(student, teacher) for student, teacher in shapes]
        return AttentionMaps(list(samples), resolutions, of_squares)

    def _resolutions(self, shapes: PairShapes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the resolutions (h, w) of the student's features, and of the teacher's."""
        of_student, of_teacher = tokens_of_both(self.class_tokens)
        students = [token_grid(student, of_student, self.square)[1:] for student, _ in shapes]
        return students, [token_grid(teacher, of_teacher, self.square)[1:] for _, teacher in shapes]

    def _resolution(self, student: Shape, teacher: Shape) -> tuple[int, int]:
        """Return the resolution at which features of these shapes are compared: the smaller one."""
        tokens = tokens_of_both(self.class_tokens)
        (_, *s), (_, *t) = (
            token_grid(shape, n, self.square) for shape, n in zip((student, teacher), tokens, strict=True)
        )
        return min(s[0], t[0]), min(s[1], t[1])

    def _as_map(self, features: torch.Tensor, class_tokens: int | None) -> torch.Tensor:
        """Turn tokens (b, N, C) and maps (b, H, W, C) into a map (b, C, H, W); return (b, C, H, W) as it is."""
        found = tuple(features.shape[1:])
        shape = token_grid(found, class_tokens, self.square)
        if features.dim() == 4:
            return features if shape == found else features.permute(0, 3, 1, 2)
        return features[:, class_tokens:].transpose(1, 2).reshape(len(features), *shape)

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return (b,), the distance of each sample's normalised maps, from (b, C_S, H, W) and (b, C_T, H, W)."""
        if student.shape[2:] != teacher.shape[2:] and self.resize == "error":
            raise ValueError(
                f"resolutions differ: student {tuple(student.shape[2:])}, teacher {tuple(teacher.shape[2:])}; "
                "ask for resize='map' or resize='features'"
            )
        smaller = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        return self._distance(self._normalize_map(student, smaller), self._normalize_map(teacher.detach(), smaller))

    def _distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return (b,), the distance of normalised maps (b, h·w)."""
        difference = student - teacher
        if self.reduction == "mean_squared":
            return difference.square().mean(1)
        return 0.5 * torch.linalg.vector_norm(difference, ord=self.norm, dim=1)

    def _normalize_map(self, features: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
        """Return (b, h·w), rows of unit L2 norm, from (b, C, H, W)."""
        features = full_precision(features)
        if self.resize == "features" and features.shape[2:] != resolution:
            features = F.adaptive_avg_pool2d(features, resolution)
        # Squares and sums of features fit float32: then it is enough, and far less work, to scale the map. Before
        # higher powers, the features must be scaled.
        early = self.map != "sum" and self.p != 2
        attention = attention_map(_scale(features) if early else features, self.map, self.p)
        if self.resize == "map" and attention.shape[1:] != resolution:
            attention = F.interpolate(attention[:, None], resolution, mode="bilinear", antialias=True)[:, 0]
        return F.normalize((attention if early else _scale(attention)).flatten(1))


def _scale(samples: torch.Tensor) -> torch.Tensor:
    """Divide every sample of (b, ...) by its largest absolute value, which is a constant to the gradient."""
    largest = samples.detach().abs().amax(tuple(range(1, samples.dim())), keepdim=True)
    return samples / largest.clamp_min(_SMALLEST)


def tokens_of_both(class_tokens: int | Sequence[int] | None) -> tuple[int | None, int | None]:
    """Return the numbers of class tokens of student and teacher, which are one number where one is given."""
    if class_tokens is None or isinstance(class_tokens, int):
        return class_tokens, class_tokens
    student, teacher = class_tokens
    return student, teacher


def token_grid(shape: tuple[int, ...], class_tokens: int | None, square: bool = False) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the map of one sample's feature: the feature's own shape, that of (H, W, C) where
    maps are square, or that of tokens (N, C) without the class tokens.

    Args:
        shape: of the feature of one sample.
        class_tokens: number of tokens at the front that are no part of the image.
        square: maps are square: three sizes of which only the first two are equal are (H, W, C).

    Raises:
        ValueError: the shape is neither that of a map nor of tokens, or the tokens make no square.
    """
    if len(shape) == 3:
        channels_last = square and shape[0] == shape[1] != shape[2]
        return (shape[2], *shape[:2]) if channels_last else shape
    if len(shape) != 2 or class_tokens is None:
        raise ValueError(
            f"a map needs a feature of shape (C, H, W), not {shape}"
            + ("; for tokens (N, C) set class_tokens, the number of them at the front" if len(shape) == 2 else "")
        )
    tokens = shape[0] - class_tokens
    side = math.isqrt(max(tokens, 0))
    if side == 0 or side**2 != tokens:
        raise ValueError(
            f"features of shape {shape} are {tokens} tokens without {class_tokens} class tokens: no square grid"
        )
    return shape[1], side, side


def attention_map(features: torch.Tensor, map: str = "sum_p", p: float = 2) -> torch.Tensor:
    """Return the attention map of each sample, (b, H, W) from (b, C, H, W), not normalised. `map` and `p` as in
    AttentionTransfer."""
    if map == "sum":
        return features.abs().sum(1)
    if map == "max_p":
        return features.abs().amax(1).pow(p)
    if p != 2:
        return features.abs().pow(p).sum(1)
    # torch.compile finds the short backward by itself, and traces no function that defines its own forward-mode
    # derivative.
    return features.square().sum(1) if torch.compiler.is_compiling() else _SumOfSquares.apply(features)


class _SumOfSquares(torch.autograd.Function):
    """Compute Σ_c A_c², with a backward 2·A·∂ of one pass over A instead of three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: torch.Tensor) -> torch.Tensor:
        return features.square().sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (features,) = ctx.saved_tensors
        return features * (2 * gradients[0])[:, None]

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:
        (features,) = ctx.saved_tensors
        return 2 * (features * tangents[0]).sum(1)
