"""Be the base of losses that compare the relations between all samples of a batch.

A loss of this family states which relation it compares and a few elementwise functions
(`dkd.global_batch.relational.Relation`); everything else is here: pairs, process groups, the grid of ranks, types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dkd.global_batch import BatchLayout, GramScope, Links, full_precision
from dkd.global_batch.choice import GridChoice, describe_tensor
from dkd.global_batch.cost import GramTensor, LossSums
from dkd.global_batch.gram import promoted_dtype
from dkd.global_batch.placement import Placement
from dkd.global_batch.relation_rows import to_block, to_rows
from dkd.global_batch.relational import Comparison, Features, Kind, Sums, compare, compare_alone, relate
from dkd.losses.feature_pairs import Features as Tensors
from dkd.losses.feature_pairs import as_list, as_pairs, needs_plain_autograd, no_autocast


class RelationalLoss(nn.Module):
    """Compute a loss of relations on the global batch. A subclass states `relation`, `value` and `slope`, and where it
    needs them `row_sums` and `totals`.

    Args:
        scope: the ranks whose samples are compared: `global`, all ranks; `node`, the ranks of one machine; a number n,
            n neighbouring ranks; `local`, this rank alone, which other code computes and which is another loss. The
            groups' losses are averaged.
        grid: how ranks share the work, (r, c, k) with r·c·k ranks; `gather` and `exchange` name two of them; `auto`:
            the grid that should take the least time and fits into memory. The results are equal up to rounding.
        weights: one weight for each pair; None: 1.
        comm_dtype: torch.bfloat16 rounds features and their gradients to that type on their way between ranks, which
            halves float32's bytes; None: features keep their own type, and gradients full precision. Relations are
            computed and summed in full precision either way.
        memory: bytes that a rank may hold for the loss beside its own features; None: a quarter of its device's.
        links: the speeds of the launch, which `auto` chooses by; None: those of its kind of device.
        channels_last: flatten maps (b, C, H, W) by pixel and not by channel, which copies nothing where they lie so in
            memory. The loss is the same.

    The module is called with one tensor (b, ...) of the student and one of the teacher, or with equal-length lists of
    tensors. All dimensions but the rows are flattened; neither widths nor resolutions of a pair need agree. It returns
    a scalar whose mean over ranks is the loss of the global batch, and whose gradient, averaged over ranks as DDP,
    FSDP and ZeRO do, is that loss's gradient; every rank gives it the same weight. Without a process group, the scalar
    is the single-process loss. `layout` states which rank holds which rows. Without `layout`, the ranks agree on one by
    one small all-gather, and local batches may be uneven.

    Raises:
        ValueError: the tensors make no pair.
        BatchMismatchError: on all ranks, when shapes or settings differ between ranks.
    """

    relational = True
    """The loss compares samples with each other: it is no mean over micro-batches."""
    relation: Kind = "product"
    """What is compared: `product`, `cosine` or `distance`. Products and distances are divided by a number near the
    square of the largest norm: what is computed of them must not depend on a common factor of all features."""
    adds: tuple[int, int] = (0, 0)
    """How many sums of rows, and how many totals, `row_sums` and `totals` return for a pair: `auto` counts them."""
    shift_invariant: bool = False
    """Whether the loss does not change when one vector is added to all features of a model. The mean of all samples is
    then subtracted first, which costs a sum of d numbers over ranks, and products lose no digits to a common offset."""
    floor: float = 0.0
    """relation: cosine. A norm below this share of the mean norm counts as this share."""

    def __init__(
        self,
        scope: str | int = "global",
        grid: str | Sequence[int] = "auto",
        weights: Sequence[float] | None = None,
        comm_dtype: torch.dtype | None = None,
        memory: int | None = None,
        links: Links | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if comm_dtype not in (None, torch.bfloat16):
            # float16's range is too small for a Gram matrix's gradient, and for features above 65,504.
            raise ValueError(f"comm_dtype={comm_dtype}: must be torch.bfloat16 or None")
        self.scope, self.weights, self.comm_dtype = GramScope(scope), weights, comm_dtype
        self.grid, self.channels_last = GridChoice(grid, memory, links), channels_last
        self._compared: list[GramTensor] | None = None

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return sums over the columns of a block of relations, (m,) each. None here."""
        return ()

    def totals(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, ...]:
        """Return scalars, which are added over ranks. None here."""
        return ()

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return the share of a block of relations in the loss: a scalar."""
        raise NotImplementedError

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return the derivative (m, n) of the loss by S_ij plus that by S_ji."""
        raise NotImplementedError

    def compare_whole(self, students: Sequence[torch.Tensor], whole: WholeBatch) -> torch.Tensor | None:
        """Return the loss of one process alone for features (B, d) of the student, where a subclass has a shorter way
        than by blocks; else None."""
        return None

    def _whole(
        self,
        teachers: Sequence[torch.Tensor],
        are_relations: bool,
        weights: Sequence[float],
        types: Sequence[torch.dtype],
    ) -> WholeBatch:
        if not are_relations:
            teachers = [t.to(self.comm_dtype or t.dtype) for t in teachers]

        def plainly(students: Sequence[torch.Tensor]) -> torch.Tensor:
            features, relations = (None, teachers) if are_relations else (teachers, None)
            return compare_alone(self, students, features, weights, self.floor, relations)

        return WholeBatch(teachers, are_relations, weights, types, self.comm_dtype is not None, plainly)

    def settings(self) -> dict[str, object]:
        """Return the settings of this loss beside those of the base, by name."""
        return {}

    def extra_repr(self) -> str:
        shown = {
            **self.settings(),
            "scope": self.scope,
            "grid": self.grid,
            "weights": self.weights,
            "comm_dtype": self.comm_dtype,
            "channels_last": self.channels_last,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def begin(self, teacher: Tensors, layout: BatchLayout) -> TeacherHalf | None:
        """Begin to send the teacher's features, so that they travel while the student computes. Give the result to the
        call in the place of the teacher. A collective.

        Returns:
            None where there is nothing to begin: on one process, and before the first call, which settles the grid.
        """
        teachers = as_list(teacher)
        whole, layout = layout, self.scope.within(layout)
        if layout.world_size == 1 or self._compared is None:
            return None
        with no_autocast(teachers[0].device):
            flat = self._flatten(teachers)
            at = self._place(layout, flat[0].device, whole)
            if self.shift_invariant:
                flat = _center(flat, layout)
            return TeacherHalf(layout, Features(flat, at, [self.comm_dtype or t.dtype for t in flat]))

    def forward(
        self,
        student: Tensors,
        teacher: Tensors | TeacherHalf | TeacherRelations,
        layout: BatchLayout | None = None,
        sent_as: Sequence[torch.dtype] | None = None,
    ) -> torch.Tensor:
        if isinstance(teacher, TeacherRelations):
            return self._compare_with_relations(as_list(student), teacher, sent_as)
        begun = teacher if isinstance(teacher, TeacherHalf) else None
        given = list(begun.features.features) if begun else as_list(teacher)  # type: ignore[arg-type]
        # Ranks agree before anything else may raise, so that one rank's wrong shape is every rank's error.
        whole = layout or BatchLayout.agree([*as_list(student), *given], loss=self)
        pairs = as_pairs(student, given, self.weights)
        whole.check(pairs[0][0])
        layout = begun.layout if begun else self.scope.within(whole)
        with no_autocast(pairs[0][0].device):
            students = self._flatten([s for s, _, _ in pairs])
            teachers = given if begun else self._flatten([t.detach() for _, t, _ in pairs])
            if self.shift_invariant:
                students, sent_as = _center(students, layout), None
                teachers = teachers if begun else _center(teachers, layout)
            types = self._types(students, sent_as, layout)
            half = begun.features if begun else self._send(students, teachers, types, layout, whole)
            weights = [w for _, _, w in pairs]
            if layout.world_size == 1 and needs_plain_autograd(students):
                return compare_alone(self, students, teachers, weights, self.floor)
            if layout.world_size == 1 and half.placement.chunks == 1:
                value = self.compare_whole(students, self._whole(teachers, False, weights, types))
                if value is not None:
                    return value
            # Nothing is rounded twice: a gradient is rounded to the type of its feature after all is added to it.
            gradients = [self.comm_dtype or promoted_dtype(s.dtype) for s in students]
            comparison = Comparison(self, weights, self.floor, half.placement, half, types, gradients)
            return compare(comparison, students)

    def _compare_with_relations(
        self, student: Sequence[torch.Tensor], teacher: TeacherRelations, sent_as: Sequence[torch.dtype] | None
    ) -> torch.Tensor:
        at, blocks = teacher.place, teacher.blocks
        if len(student) != len(blocks):
            raise ValueError(f"{len(student)} student features and {len(blocks)} blocks of relations make no pairs")
        weights = [1.0] * len(blocks) if self.weights is None else list(self.weights)
        with no_autocast(student[0].device):
            students = self._flatten(student)
            if self.shift_invariant:
                students, sent_as = _center(students, at.layout), None
            if at.layout.world_size == 1 and needs_plain_autograd(students):
                return compare_alone(self, students, None, weights, self.floor, blocks)
            types = self._types(students, sent_as, at.layout)
            assert at.placement is not None
            if at.layout.world_size == 1 and at.placement.chunks == 1:
                value = self.compare_whole(students, self._whole(blocks, True, weights, types))
                if value is not None:
                    return value
            gradients = [self.comm_dtype or promoted_dtype(s.dtype) for s in students]
            comparison = Comparison(self, weights, self.floor, at.placement, blocks, types, gradients)
            return compare(comparison, students)

    def relation_facts(self) -> dict[str, Any]:
        """Return, as plain values, on which settings the teacher's relations depend."""
        sent = None if self.comm_dtype is None else str(self.comm_dtype)
        facts = {"relation": self.relation, "centred": self.shift_invariant, "comm_dtype": sent}
        # What relations are divided by: a cache of relations that were divided otherwise differs by rounding.
        return {**facts, **({"floor": self.floor} if self.relation == "cosine" else {"scale": "a power of two"})}

    def settle(self, tensors: Sequence[GramTensor], layout: BatchLayout, device: torch.device) -> RelationPlace:
        """Choose the grid before the first call. A collective of all ranks of `layout`.

        Args:
            tensors: what will be compared: the student's features, then the teacher's.
            layout: of the calls.
            device: of the features.
        """
        whole, layout = layout, self.scope.within(layout)
        if self._compared is None:
            self._compared = list(tensors)
        at = self._place(layout, device, whole)
        return RelationPlace(layout, at.part_samples, at)

    def relate_teacher(
        self, teacher: Tensors, at: RelationPlace
    ) -> tuple[TeacherRelations, torch.Tensor, list[torch.Tensor]]:
        """Compute the teacher's relations. A collective.

        Args:
            teacher: features of all pairs.
            at: as `settle` returned it.

        Returns:
            What the loss is called with in the place of the features; the samples (n,) whose rows of relations this
            rank is to store; and for each pair these rows (n, B).
        """
        assert at.placement is not None
        with no_autocast(as_list(teacher)[0].device):
            flat = self._flatten([t.detach() for t in as_list(teacher)])
            if self.shift_invariant:
                flat = _center(flat, at.layout)
            features = Features(flat, at.placement, [self.comm_dtype or t.dtype for t in flat])
            blocks = relate(features, self.relation, self.floor)
            rows = [to_rows(block, at.placement) for block in blocks]
        return TeacherRelations(at, blocks), rows[0][0], [each for _, each in rows]

    def give_rows(self, rows: Sequence[torch.Tensor], at: RelationPlace) -> TeacherRelations:
        """Return what the loss is called with in the place of the teacher's features, given for each pair the rows of
        relations (n, B) of the samples `at.needed`."""
        assert at.placement is not None
        return TeacherRelations(at, [to_block(each, at.placement) for each in rows])

    def _send(
        self,
        students: Sequence[torch.Tensor],
        teachers: Sequence[torch.Tensor],
        types: Sequence[torch.dtype],
        layout: BatchLayout,
        whole: BatchLayout,
    ) -> Features:
        """Choose a grid, and begin to send the teacher's features."""
        transports = [self.comm_dtype or t.dtype for t in teachers]
        self._compared = [
            *(
                describe_tensor(s.shape[1], s.requires_grad and torch.is_grad_enabled(), s.dtype, sent, self.comm_dtype)
                for s, sent in zip(students, types, strict=True)
            ),
            *(
                describe_tensor(t.shape[1], False, t.dtype, sent, None)
                for t, sent in zip(teachers, transports, strict=True)
            ),
        ]
        return Features(teachers, self._place(layout, students[0].device, whole), transports)

    def _types(
        self, students: Sequence[torch.Tensor], sent_as: Sequence[torch.dtype] | None, layout: BatchLayout
    ) -> list[torch.dtype]:
        """Return the types in which the student's features are sent and multiplied. Where nothing is sent, only a GPU
        gains from a smaller type, which its tensor cores multiply."""
        if layout.world_size == 1 and students[0].device.type == "cpu":
            sent_as = None
        return [self.comm_dtype or each for each in sent_as or [s.dtype for s in students]]

    def _place(self, layout: BatchLayout, device: torch.device, whole: BatchLayout) -> Placement:
        assert self._compared is not None
        return self.grid.place(layout, self._compared, self.sums(), device, type(self).__name__, whole)

    def sums(self) -> LossSums:
        """Return how many sums the loss adds over ranks for a pair."""
        return LossSums(*self.adds, self.relation == "distance", self.shift_invariant)

    def _flatten(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return (b, d) of each feature. The order of columns means nothing to a Gram matrix, if it is the same on all
        ranks."""
        if any(f.dim() < 2 for f in features):
            raise ValueError("features must have the shape (b, ...) with at least one number a sample")
        maps = [f.permute(0, 2, 3, 1) if self.channels_last and f.dim() == 4 else f for f in features]
        return [f.flatten(1) for f in maps]


@dataclass(frozen=True)
class WholeBatch:
    """Hold what the student's features of one process alone are compared with.

    Args:
        teachers: features (B, d) of each pair, or relations (B, B).
        are_relations: whether they are relations.
        weights: of the pairs.
        types: in which the student's features are multiplied.
        rounds: whether these types round them; else they hold every number of them.
        plainly: returns the loss of the student's features by operations that autograd follows, for second derivatives.
    """

    teachers: Sequence[torch.Tensor]
    are_relations: bool
    weights: Sequence[float]
    types: Sequence[torch.dtype]
    rounds: bool
    plainly: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class RelationPlace:
    """Hold where a rank stands in the comparison of samples.

    Args:
        layout: of the ranks whose samples are compared.
        needed: the samples whose rows of relations this rank needs, by their places in the layout.
        placement: on a grid; None: the loss has none.
    """

    layout: BatchLayout
    needed: torch.Tensor
    placement: Placement | None = None


@dataclass(frozen=True)
class TeacherRelations:
    """Hold relations of a teacher in the place of its features: for each pair the block of this rank."""

    place: RelationPlace
    blocks: Sequence[torch.Tensor]


class TeacherHalf:
    """Hold the teacher's features on their way, as `RelationalLoss.begin` returns them.

    Args:
        layout: of the ranks that share them.
        features: on their way.
    """

    def __init__(self, layout: BatchLayout, features: Features) -> None:
        self.layout, self.features = layout, features


def _center(features: Sequence[torch.Tensor], layout: BatchLayout) -> list[torch.Tensor]:
    """Return features (b, d) less the mean of all samples of the layout, in full precision. The mean counts as a
    constant. A collective."""
    full = [full_precision(f) for f in features]
    sums = torch.cat([f.detach().sum(0) for f in full])
    means = (layout.sum(sums) / layout.total).split([f.shape[1] for f in full])
    return [f - mean for f, mean in zip(full, means, strict=True)]


def scaled_weight(weight: float, reference_batch: int, batch: int) -> float:
    """Return weight · B / reference_batch: what keeps, for a loss that falls as 1/B, the weight per sample that the
    published weight had in a batch of `reference_batch` samples.

    Args:
        weight: as published.
        reference_batch: the batch that the weight was published with.
        batch: B, the number of samples that are compared with each other here.
    """
    return weight * batch / reference_batch
