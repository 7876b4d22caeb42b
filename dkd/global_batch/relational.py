"""Compute a loss of the relations between all samples of a global batch, and its gradient.

A relational loss compares, for every pair of samples i and j, the relation S_ij of the student's features with the
relation T_ij of the teacher's. A relation is one of

    product    q_i · q_j
    cosine     q_i · q_j / (‖q_i‖ ‖q_j‖)
    distance   ‖q_i − q_j‖²

and a loss is a few elementwise functions of S and T (`Relation`). Every rank computes the relations of one block of
samples (gram.py). What a loss needs of whole rows, and of all samples, are sums: vectors of one number a sample, which
are added over ranks. The derivative of a loss by S_ij is known where S_ij is, so the backward exchanges no derivative
but M itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from dkd.global_batch import collectives
from dkd.global_batch.gram import (
    Panels,
    add_slices,
    chunk,
    full_precision,
    gather_derivatives,
    multiply,
    promoted_dtype,
    send_home,
)
from dkd.global_batch.placement import Placement
from dkd.global_batch.scale import NEAREST, Kind, Norms, Scale, least_norm, next_power_of_two

Backward = TypeVar("Backward", bound=Callable[..., Any])


@dataclass(frozen=True)
class Sums:
    """Hold what a relational loss may know of all samples, beside the block of S and T.

    Args:
        batch: B, the samples of the global batch.
        rows: by the order of `Relation.row_sums`, the sums of all rows, (B,) each.
        row_samples: the samples (m,) that are the rows of the block.
        column_samples: the samples (n,) that are the columns of the block.
        totals: by the order of `Relation.totals`, the totals of all ranks: scalars.
        is_whole: whether the block has all samples, in their order.
        kept: what a loss has computed of the block in one of its functions, for the next one.
    """

    batch: int
    rows: tuple[torch.Tensor, ...]
    row_samples: torch.Tensor
    column_samples: torch.Tensor
    totals: tuple[torch.Tensor, ...] = ()
    is_whole: bool = False
    kept: dict[str, Any] = field(default_factory=dict, compare=False)

    def of_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return, of numbers (B,) of all samples, those of the rows of the block: (m, 1)."""
        return numbers[:, None] if self.is_whole else numbers[self.row_samples, None]

    def of_columns(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return, of numbers (B,) of all samples, those of the columns of the block: (1, n)."""
        return numbers[None, :] if self.is_whole else numbers[None, self.column_samples]

    def of_both(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return x_i + x_j for numbers x (B,) of all samples: (m, n)."""
        return self.of_rows(numbers) + self.of_columns(numbers)


class Relation(Protocol):
    """State a relational loss: elementwise functions of a block of relations (m, n), S of the student and T of the
    teacher.

    S and T are symmetric. Every function is called with the same block of both, and may use all of torch that is
    elementwise or a sum.
    """

    relation: Kind
    """The relation that S_ij and T_ij hold."""

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return sums over the columns of the block, (m,) each, which are added over ranks to sums of whole rows."""
        ...

    def totals(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, ...]:
        """Return scalars, which are added over ranks. `at.rows` is there."""
        ...

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return the share of the block in the loss: a scalar. The sum over all blocks is the loss. `at.rows` and
        `at.totals` are there."""
        ...

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return the derivative (m, n) of the loss by S_ij plus that by S_ji, which are one number, of everything that
        depends on it: the row sums and totals, too."""
        ...


class Features:
    """Hold the features of one model that a loss compares, on their way between ranks. Making the object begins to send
    them.

    Args:
        features: (b, d) of each pair.
        placement: of this rank.
        transports: the type in which the features of each pair are sent, and in which they are compared.
    """

    def __init__(
        self, features: Sequence[torch.Tensor], placement: Placement, transports: Sequence[torch.dtype]
    ) -> None:
        self.features, self.placement, self.transports = features, placement, transports
        by_type: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for i, (feature, transport) in enumerate(zip(features, transports, strict=True)):
            by_type.setdefault((transport, promoted_dtype(feature.dtype)), []).append(i)
        # Where nothing is sent, the features are multiplied where they lie.
        self.members = [[i] for i in range(len(features))] if placement.is_whole else list(by_type.values())
        """The pairs of each message."""
        self._begun: list[Panels | None] = [self._begin(message, 0) for message in range(len(self.members))]

    def _begin(self, message: int, number: int) -> Panels:
        """Begin to send a chunk of the features of a message."""
        members, chunks = self.members[message], self.placement.chunks
        own = [chunk(self.features[i].detach(), number, chunks) for i in members]
        return Panels(own, self.placement, self.transports[members[0]])

    def multiply(self, keep_columns: bool = False) -> tuple[list[torch.Tensor], list[list[list[torch.Tensor]]]]:
        """Return, for each pair, the rows of the Gram matrix that this rank keeps, in full precision; and, for each
        message and chunk, the features of the columns, where they are to be kept. A collective."""
        products: list[torch.Tensor] = [torch.empty(0)] * len(self.features)
        kept: list[list[list[torch.Tensor]]] = []
        for message, members in enumerate(self.members):
            partial, columns = self._multiply_chunks(message, keep_columns)
            kept.append(columns)
            for i, product in zip(members, add_slices(partial, self.placement), strict=True):
                products[i] = product
        return products, kept

    def _multiply_chunks(self, message: int, keep_columns: bool) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        partial: list[torch.Tensor] = []
        kept: list[list[torch.Tensor]] = []
        chunks = self.placement.chunks
        panels = self._begun[message]
        if panels is None:
            raise RuntimeError("what was begun with a teacher's features is used once, by one call of the loss")
        self._begun[message] = None  # what has arrived is not to live on
        for number in range(chunks):
            rows, columns = panels.wait()
            if number + 1 < chunks:
                panels = self._begin(message, number + 1)
            found = [multiply(r, c) for r, c in zip(rows, columns, strict=True)]
            rows.clear()
            partial = [p.add_(f) for p, f in zip(partial, found, strict=True)] if partial else found
            if keep_columns:
                kept.append(columns)
        return partial, kept


@dataclass(frozen=True)
class Comparison:
    """State what one call of a relational loss compares.

    Args:
        relation: the loss.
        weights: of each pair.
        floor: of the norms of samples, for cosines.
        placement: of this rank.
        teacher: the teacher's features, on their way; or its relations, the block of this rank for each pair.
        transports: the types in which the student's features are sent.
        gradient_transports: the types in which the student's gradients are sent.
    """

    relation: Relation
    weights: Sequence[float]
    floor: float
    placement: Placement
    teacher: Features | Sequence[torch.Tensor]
    transports: Sequence[torch.dtype]
    gradient_transports: Sequence[torch.dtype]


def compare(comparison: Comparison, students: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return this rank's share of a relational loss, times W: the mean over ranks is the loss. Differentiable, once. A
    collective, and where a gradient is asked for, its backward too."""
    value: torch.Tensor = _Compare.apply(comparison, *students)
    return value


def _full_precision_backward(backward: Backward) -> Backward:
    """Keep a backward from computing in half precision where it is called under autocast."""

    @functools.wraps(backward)
    def without_autocast(ctx: Any, saved: Sequence[torch.Tensor], *grads: torch.Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, saved, *grads)

    return without_autocast  # type: ignore[return-value]


class _Compare(torch.autograd.Function):
    """Compute value and derivative by blocks together, and the gradient of features in the backward."""

    @staticmethod
    def forward(ctx: Any, comparison: Comparison, *students: torch.Tensor) -> torch.Tensor:
        at, relation = comparison.placement, comparison.relation
        layout = at.layout
        teachers = comparison.teacher
        own = Features(students, at, comparison.transports)
        compared = [*students, *(teachers.features if isinstance(teachers, Features) else ())]
        transports = [*comparison.transports, *(teachers.transports if isinstance(teachers, Features) else ())]
        # Of what is multiplied, which may be rounded for its way.
        gathering = Norms([f.detach().to(type_) for f, type_ in zip(compared, transports, strict=True)], layout)
        products_t = teachers.multiply()[0] if isinstance(teachers, Features) else []
        products_s, columns = own.multiply(keep_columns=any(ctx.needs_input_grad[1:]))
        scales = [Scale(relation.relation, each, comparison.floor, at) for each in gathering.wait()]
        pairs = len(students)
        s = [scale.relate(p) for scale, p in zip(scales[:pairs], products_s, strict=True)]
        t = [scale.relate(p) for scale, p in zip(scales[pairs:], products_t, strict=True)]
        if not isinstance(teachers, Features):
            t = list(teachers)
        facts = _sums(relation, s, t, at)
        factors = [weight * layout.world_size for weight in comparison.weights]
        shares = [_times(f, relation.value(a, b, sums)) for f, a, b, sums in zip(factors, s, t, facts, strict=True)]
        value = shares[0] if pairs == 1 else torch.stack(shares).sum()
        if not any(ctx.needs_input_grad[1:]):
            return value
        slopes = []
        for factor, a, b, sums, scale in zip(factors, s, t, facts, scales[:pairs], strict=True):
            slope = _times(factor, relation.slope(a, b, sums))
            if factor == 1 and any(slope is each for each in (a, b)):
                slope = slope.clone()  # a loss of the user's own may return one of its arguments
            slopes.append(scale.through(slope, a))
        totals = _row_totals(slopes, at) if relation.relation == "distance" else [None] * pairs
        ctx.scales, ctx.totals, ctx.members, ctx.placement = scales[:pairs], totals, own.members, at
        ctx.transports, ctx.gradient_transports = comparison.transports, comparison.gradient_transports
        if layout.world_size == 1:  # for second derivatives
            ctx.relation, ctx.weights, ctx.floor = relation, comparison.weights, comparison.floor
            ctx.teachers, ctx.relations = (teachers.features, None) if isinstance(teachers, Features) else (None, t)
        flat = [column for message in columns for chunk_of in message for column in chunk_of]
        ctx.save_for_backward(*slopes, *flat, *students)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes them when they are asked for
        pairs = len(ctx.scales)
        students = saved[-pairs:]
        if torch.is_grad_enabled() and ctx.placement.layout.world_size == 1:
            return None, *_differentiable_gradients(ctx, students, grads[0])
        gradients = compute_gradients(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return None, *gradients
        return None, *(None if g is None else _Once.apply(g, s) for g, s in zip(gradients, students, strict=True))


def _times(factor: float, numbers: torch.Tensor) -> torch.Tensor:
    return numbers if factor == 1 else numbers * factor


def _differentiable_gradients(
    ctx: Any, students: Sequence[torch.Tensor], grad: torch.Tensor
) -> Sequence[torch.Tensor | None]:
    """Return the gradients on one process by operations that autograd follows, for second derivatives."""
    value = compare_alone(ctx.relation, students, ctx.teachers, ctx.weights, ctx.floor, ctx.relations)
    wanted = [s for s, needed in zip(students, ctx.needs_input_grad[1:], strict=True) if needed]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[1:]]


class _Once(torch.autograd.Function):
    """Return a gradient, which is a function of the features that nothing here can differentiate: a second derivative
    would take collectives of its own."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        raise RuntimeError("a loss of relations has no second derivative: its gradient cannot be differentiated")


@torch.no_grad()
@_full_precision_backward
def compute_gradients(ctx: Any, saved: Sequence[torch.Tensor], *grads: torch.Tensor) -> list[torch.Tensor | None]:
    pairs = len(ctx.scales)
    slopes, columns, students = saved[:pairs], iter(saved[pairs:-pairs]), saved[-pairs:]
    gradients: list[torch.Tensor | None] = [None] * pairs
    at = ctx.placement
    for members in ctx.members:
        derivatives = gather_derivatives([slopes[i] for i in members], at)
        transport = ctx.gradient_transports[members[0]]
        by_chunk = []
        for number in range(at.chunks):
            here = [next(columns) for _ in members]
            widths = [chunk(students[i], number, at.chunks).shape[1] for i in members]
            by_chunk.append(send_home(derivatives, here, widths, at, transport))
        for place, i in enumerate(members):
            parts = [sums[place] for sums in by_chunk]
            sums = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            own = students[i].to(ctx.transports[i])
            gradient = ctx.scales[i].home(sums, own, ctx.totals[i])
            gradients[i] = gradient.mul_(grads[0]).to(students[i].dtype)
    return [g if n else None for g, n in zip(gradients, ctx.needs_input_grad[1:], strict=True)]


@torch.no_grad()
def relate(features: Features, kind: Kind, floor: float) -> list[torch.Tensor]:
    """Return the block of relations (m, n) that this rank computes of each tensor, as `compare` computes those of a
    teacher. A collective.

    Args:
        features: on their way.
        kind, floor: as Scale.
    """
    at = features.placement
    sent = [f.detach().to(type_) for f, type_ in zip(features.features, features.transports, strict=True)]
    gathering = Norms(sent, at.layout)
    products, _ = features.multiply()
    scales = [Scale(kind, norms, floor, at) for norms in gathering.wait()]
    return [scale.relate(product) for scale, product in zip(scales, products, strict=True)]


def _sums(relation: Relation, s: Sequence[torch.Tensor], t: Sequence[torch.Tensor], at: Placement) -> list[Sums]:
    """Return, for each pair, the sums that its loss asks for, over all ranks."""
    rows = add_by_sample([relation.row_sums(a, b) for a, b in zip(s, t, strict=True)], at)
    facts = [Sums(at.layout.total, each, at.part_samples, at.column_samples, is_whole=at.is_whole) for each in rows]
    totals = [relation.totals(a, b, sums) for a, b, sums in zip(s, t, facts, strict=True)]
    if totals[0]:
        added = _add(torch.stack([number for each in totals for number in each]), at).unbind()
        size = len(totals[0])
        totals = [added[i * size : (i + 1) * size] for i in range(len(totals))]
    return [replace(found, totals=tuple(each)) for found, each in zip(facts, totals, strict=True)]


def _add(numbers: torch.Tensor, at: Placement) -> torch.Tensor:
    """Add a few numbers over all ranks. A collective."""
    if at.layout.world_size == 1:
        return numbers
    return collectives.all_gather_rows(numbers[None], at.layout.group).sum(0)


def _row_totals(slopes: Sequence[torch.Tensor], at: Placement) -> list[torch.Tensor]:
    """Return Σ_j M_ij of all samples, (B,), for each pair."""
    return [each for (each,) in add_by_sample([(slope.sum(1),) for slope in slopes], at)]


def add_by_sample(sums: Sequence[tuple[torch.Tensor, ...]], at: Placement) -> list[tuple[torch.Tensor, ...]]:
    """Add sums (m,) of the rows that this rank keeps over all ranks, to vectors (B,). A collective."""
    each = len(sums[0])
    if not each or at.layout.world_size == 1:
        return list(sums)
    mine = torch.stack([numbers for pair in sums for numbers in pair], dim=1)
    missing = at.most_part_rows - len(mine)
    padded = torch.cat([mine, mine.new_zeros(missing, mine.shape[1])]) if missing else mine
    # By one all-gather and not by an all-reduce: one trip of messages, and half the bytes where c is 1.
    (r, c, k), everyone = at.grid, collectives.all_gather_rows(padded, at.layout.group)
    rows = everyone.view(r, c, k * at.most_part_rows, -1).sum(1).flatten(0, 1)
    added = (rows if at.row_of_sample is None else rows[at.row_of_sample]).T.contiguous().unbind()
    return [tuple(added[i * each : (i + 1) * each]) for i in range(len(sums))]


def compare_alone(
    relation: Relation,
    students: Sequence[torch.Tensor],
    teachers: Sequence[torch.Tensor] | None,
    weights: Sequence[float],
    floor: float,
    relations: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return a relational loss of one process, by operations that autograd follows: `slope` is not asked for. This is
    what `compare` computes, for compiled models, transforms of torch.func, forward-mode and second derivatives.

    Args:
        teachers: features; None: `relations` of the teacher are given in their place.
    """
    shares = []
    if relations is None:
        assert teachers is not None
        relations = [_relate_alone(relation.relation, full_precision(f), floor) for f in teachers]
    for student, t, weight in zip(students, relations, weights, strict=True):
        s = _relate_alone(relation.relation, full_precision(student), floor)
        rows, samples = relation.row_sums(s, t), torch.arange(len(s), device=s.device)
        at = Sums(len(s), rows, samples, samples, is_whole=True)
        shares.append(weight * relation.value(s, t, replace(at, totals=relation.totals(s, t, at))))
    return torch.stack(shares).sum()


def _relate_alone(kind: Kind, features: torch.Tensor, floor: float) -> torch.Tensor:
    lengths = torch.linalg.vector_norm(features, dim=1)
    if kind == "cosine":
        units = features / torch.maximum(lengths, least_norm(lengths.detach(), floor))[:, None]
        return units @ units.T
    scaled = features / next_power_of_two(lengths.detach().max())
    products = scaled @ scaled.T
    if kind == "product":
        return products
    squares = scaled.square().sum(1)
    same = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_min(NEAREST).masked_fill(same, 0.0)
