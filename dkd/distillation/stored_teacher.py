"""Read what the losses need of a teacher from its cache, or compute and store it: what a step computes is the same.

What is stored is what the losses read, and not the features: logits, what a loss makes of each sample's features
(`losses/sample_form.py`), and of losses that compare samples the rows of the teacher's relations. A run that fills a
cache takes the same way from these to its losses as one that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from dkd.distillation.inputs import MicroBatch
from dkd.distillation.objective import FeatureTerm, Objective, Outputs
from dkd.global_batch import BatchLayout
from dkd.losses import RelationalLoss
from dkd.losses.relational import RelationPlace
from dkd.losses.relational_angle import RKDAngle
from dkd.losses.sample_form import PairShapes, ReadsSamples, WholeFeatures
from dkd.teacher_cache import Need, StepCache, Value

IMAGE_SUMS = Value("images", {"what": "sum of the augmented pixels"}, (), torch.int64)
"""A number of each image, by which a run that reads knows that it has the images that the teacher saw."""


def image_sums(images: torch.Tensor) -> torch.Tensor:
    """Return a number (b,) of each uint8 image (b, 3, H, W), int64: the sum of its bytes taken eight at a time. The
    same for any layout in memory."""
    rows = images.contiguous().flatten(1)
    if rows.dtype == torch.uint8 and rows.shape[1] % 8 == 0:
        rows = rows.view(torch.int64)
    return rows.sum(1, dtype=torch.int64)


def reader_of(term: FeatureTerm) -> ReadsSamples | None:
    """Return what states which samples a term reads of the teacher; None: nothing does, and the loss has not asked for
    whole features by an attribute `store`."""
    for owner in (term.loss, term.adapter):
        if isinstance(owner, ReadsSamples):
            return owner
    return WholeFeatures() if getattr(term.loss, "store", False) else None


def compares_relations(term: FeatureTerm) -> bool:
    """Return whether a term reads the relations between a teacher's samples, and not the samples."""
    return isinstance(term.loss, RelationalLoss | RKDAngle)


def is_stored(term: FeatureTerm) -> bool:
    """Return whether a cache stores what a term reads."""
    return compares_relations(term) or reader_of(term) is not None


@dataclass(frozen=True)
class Share:
    """Hold which samples of a step are this rank's.

    Args:
        rank, world_size: r and W.
        micro_batch, micro_steps: b and A.
    """

    rank: int
    world_size: int
    micro_batch: int
    micro_steps: int

    def offset(self, micro_step: int) -> int:
        """Return the place in the global batch of the first sample of a micro-step."""
        return (micro_step * self.world_size + self.rank) * self.micro_batch

    def layout(self, unit: int | None) -> BatchLayout:
        """Return which rank holds which rows: of a micro-step, or with None of the whole step."""
        return BatchLayout.even(self.micro_batch * (self.micro_steps if unit is None else 1))

    def offsets(self, layout: BatchLayout, micro_step: int | None) -> torch.Tensor:
        """Return the places in the global batch of the samples of a layout: of a micro-step, or with None of the whole
        step, in which each rank holds the samples of its micro-steps one after another.

        Args:
            layout: of neighbouring ranks, this one among them.
        """
        rows, first = layout.rows[0], self.rank - layout.rank
        sample = torch.arange(layout.total)
        rank, row = first + sample // rows, sample % rows
        micro = row // self.micro_batch if micro_step is None else torch.full_like(row, micro_step)
        return (micro * self.world_size + rank) * self.micro_batch + row % self.micro_batch


@dataclass(frozen=True)
class SamplesRead:
    """Hold what a term reads of each sample: a value for each pair."""

    term: FeatureTerm
    reader: ReadsSamples
    shapes: PairShapes
    values: Sequence[Value]


@dataclass(frozen=True)
class RelationsRead:
    """Hold what a term reads of the relations between samples.

    Args:
        term: its loss is a RelationalLoss or RKDAngle.
        whole: whether the samples of the whole step are compared, and not those of each micro-step.
        place: of this rank.
        share: of this rank.
        values: of each pair, the rows of relations. Their columns are in the order of places in the global batch.
    """

    term: FeatureTerm
    whole: bool
    place: RelationPlace
    share: Share
    values: Sequence[Value]
    _columns: list[torch.Tensor] = field(default_factory=list)

    def need(self, value: Value) -> Need:
        """Return what this rank reads of a value."""
        units = [None] if self.whole else range(self.share.micro_steps)
        needed = self.place.needed.cpu()
        found = [self.share.offsets(self.place.layout, unit)[needed] for unit in units]
        return Need(value, tuple(tuple(runs_of(offsets)) for offsets in found))

    def stored(self, samples: torch.Tensor, rows: torch.Tensor, unit: int | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what is to be stored of the rows (n, B) of some samples: the first place of a run, and its rows."""
        rows = rows[:, self._order(rows.device)]
        begun = 0
        for offset, count in runs_of(self.share.offsets(self.place.layout, unit)[samples.cpu()]):
            yield offset, rows[begun : begun + count]
            begun += count

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return stored rows (n, B) with their columns in the order of the layout."""
        return rows[:, self._order(rows.device).argsort()]

    def _order(self, device: torch.device) -> torch.Tensor:
        """Return, by their places in the global batch, the samples of the layout."""
        if not self._columns:
            unit = None if self.whole else 0
            self._columns.append(self.share.offsets(self.place.layout, unit).argsort().to(device))
        return self._columns[0]


@dataclass(frozen=True)
class Reads:
    """Hold everything that is read of one teacher: by the losses, and numbers of the images."""

    logits: Value | None
    samples: Sequence[SamplesRead]
    relations: Sequence[RelationsRead]
    share: Share
    images: Value

    def bytes_per_sample(self) -> int:
        """Return the bytes that are stored of one sample in one epoch."""
        return sum(value.bytes_per_sample for value in self.values())

    def values(self) -> list[Value]:
        """Return everything that is stored, once."""
        found = [value for read in self.samples for value in read.values]
        found += [value for read in self.relations for value in read.values]
        return list(dict.fromkeys([self.images, *([self.logits] if self.logits else []), *found]))

    def needs(self) -> list[Need]:
        """Return what this rank reads in a step."""
        share = self.share
        micro = tuple(((share.offset(a), share.micro_batch),) for a in range(share.micro_steps))
        each = [value for read in self.samples for value in read.values]
        whole = [self.images, *([self.logits] if self.logits else []), *each]
        found = {value.id: Need(value, micro) for value in whole}
        of_relations = {value.id: read.need(value) for read in self.relations for value in read.values}
        return [*found.values(), *of_relations.values()]


class StoredTeacher:
    """Give what the losses read of one teacher. All ranks make one, and call its methods together.

    Args:
        reads: what the losses read.
        cache: where it is stored.
    """

    def __init__(self, reads: Reads, cache: StepCache) -> None:
        self.reads, self.cache = reads, cache
        self.is_read = False
        """Whether this step is read, and not computed."""
        self._relations = {read.term.name: read for read in reads.relations}
        self._put: set[tuple[str, int | None]] = set()

    def begin(self, step: int, micro_batches: Sequence[MicroBatch], compute: bool = False) -> bool:
        """Begin a step. Arguments as Teaching.begin. Returns whether the images of a step that is read are those that
        the teacher saw."""
        self.is_read = False
        if compute:
            self.cache.begin_computing(step)
        else:
            self.is_read = self.cache.begin(step)
        self._put = set()
        sums = [image_sums(images) for images, *_ in micro_batches]
        if self.is_read:
            seen = [self.cache.numbers(self.reads.images, unit) for unit in range(len(sums))]
            return torch.equal(torch.cat(seen), torch.cat(sums).cpu())
        for micro_step, each in enumerate(sums):
            self._store(self.reads.images, micro_step, each)
        return True

    def outputs(
        self, micro_step: int, device: torch.device, compute: Callable[[], Outputs]
    ) -> tuple[Outputs, dict[str, Any]]:
        """Return logits and, where this step is computed, features; and by the name of a term what its loss is called
        with in the place of the teacher's features.

        Args:
            compute: runs the teacher.
        """
        live = None if self.is_read else compute()
        begun = {}
        for read in self.reads.samples:
            if live is None:
                samples = [self._read(value, micro_step, device) for value in read.values]
            else:
                features = [live.features[path] for _, path in read.term.pairs]
                taken = read.reader.take_samples(features, read.shapes)
                samples = [self._store(value, micro_step, each) for value, each in zip(read.values, taken, strict=True)]
            begun[read.term.name] = read.reader.give_samples(samples, read.shapes)
        logits = self.reads.logits
        if live is None:
            return Outputs(None if logits is None else self._read(logits, micro_step, device), {}), begun
        if logits is not None:
            assert live.logits is not None
            live = replace(live, logits=self._store(logits, micro_step, live.logits))
        return live, begun

    def relations(self, term: FeatureTerm, teacher: Outputs, unit: int | None, device: torch.device) -> Any:
        """Return what the loss of a term is called with in the place of the teacher's features; None: the term reads no
        relations.

        Args:
            teacher: features of the unit, where this step is computed.
            unit: the micro-step; None: the whole step.
        """
        read = self._relations.get(term.name)
        if read is None or read.whole != (unit is None):
            return None
        loss: Any = term.loss
        if self.is_read:
            rows = [self._read(value, unit or 0, device) for value in read.values]
            return loss.give_rows([read.read(each) for each in rows], read.place)
        given, samples, computed = loss.relate_teacher([teacher.features[path] for _, path in term.pairs], read.place)
        for value, each in zip(read.values, computed, strict=True):
            if self._is_new(value, unit):
                for offset, part in read.stored(samples, each, unit):
                    self.cache.put(value, offset, part)
        if all(value.form == "exact" for value in read.values):
            return given
        rounded = [_as_read(value, block) for value, block in zip(read.values, given.blocks, strict=True)]
        return replace(given, blocks=rounded)

    def _read(self, value: Value, unit: int, device: torch.device) -> torch.Tensor:
        return self.cache.numbers(value, unit).to(device, non_blocking=True)

    def _store(self, value: Value, micro_step: int, numbers: torch.Tensor) -> torch.Tensor:
        if self._is_new(value, micro_step):
            self.cache.put(value, self.reads.share.offset(micro_step), numbers)
        return value.as_read(numbers)

    def _is_new(self, value: Value, unit: int | None) -> bool:
        """Return whether a value of this unit was not stored yet: two losses may read the same one."""
        key = value.id, unit
        new = key not in self._put
        self._put.add(key)
        return new


def _as_read(value: Value, block: torch.Tensor) -> torch.Tensor:
    """Return a block of relations as it will be read."""
    return block.to(torch.bfloat16).to(block.dtype) if value.form == "bf16" else block


def runs_of(offsets: torch.Tensor) -> list[tuple[int, int]]:
    """Return numbers, in their order, as (first, count) of consecutive ones."""
    numbers = offsets.tolist()
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    return [(numbers[first], last - first) for first, last in pairwise(cuts) if last > first]


class Teaching:
    """Give a step what its losses read of its teachers: computed, or from caches.

    Args:
        names: of the teachers; of one alone, the name is empty.
        compute: runs one of them, given its name and the student's pixels and images.
    """

    def __init__(self, names: Sequence[str], compute: Callable[[str, torch.Tensor, torch.Tensor], Outputs]) -> None:
        self._names, self._compute = names, compute
        self.stored: Mapping[str, StoredTeacher] = {}
        """Those that have a cache, by name."""
        self.has_other_images = False
        """Whether images of this step are others than those that a teacher's cache was filled with."""
        self._device = torch.device("cpu")

    def begin(self, step: int, micro_batches: Sequence[MicroBatch], compute: bool = False) -> None:
        """Begin a step. A collective.

        Args:
            micro_batches: of the step, before they are mixed.
            compute: whether everything is computed, whatever is stored.
        """
        known = [teacher.begin(step, micro_batches, compute) for teacher in self.stored.values()]
        self.has_other_images = not all(known)

    def outputs(
        self, micro_step: int, pixels: torch.Tensor, images: torch.Tensor, first: Outputs | None = None
    ) -> Outputs | None:
        """Return what the teachers yield for a micro-batch; None without a teacher.

        Args:
            first: what was returned for it in a first pass, of which teachers with a cache are not asked again.
        """
        found: dict[str, Outputs] = {}
        begun: dict[str, Any] = {} if first is None else dict(first.begun)
        self._device = pixels.device
        for name in self._names:
            stored = self.stored.get(name)

            def compute(name: str = name) -> Outputs:
                return self._compute(name, pixels, images)

            if stored is None:
                found[name] = compute()
            elif first is not None:
                found[name] = first.of(name)
            else:
                found[name], more = stored.outputs(micro_step, pixels.device, compute)
                begun |= more
        if not found:
            return None
        outputs = found[""] if "" in found else Outputs(None, {}, members=found)
        return replace(outputs, begun={**outputs.begun, **begun})

    def begin_terms(self, objective: Objective, teacher: Outputs, layout: BatchLayout, unit: int | None) -> Outputs:
        """Begin what of the terms needs no student, as Objective.begin; and give terms that have a cache the relations
        of their teacher. A collective.

        Args:
            unit: the micro-step of these outputs; None: they are those of the whole step.
        """
        begun = dict(teacher.begun)
        for term in objective.terms:
            stored = self.stored.get(getattr(term, "teacher", ""))
            if stored is not None and isinstance(term, FeatureTerm):
                given = stored.relations(term, teacher.of(term.teacher), unit, self._device)
                if given is not None:
                    begun[term.name] = given
        return objective.begin(replace(teacher, begun=begun), layout)
