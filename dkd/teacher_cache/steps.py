"""Decide, step by step, whether what is needed of a teacher is read or computed: the same on all ranks.

Steps are taken in segments of an epoch. While one segment is trained, a thread reads the next one and compares its
digests. Where a segment begins, ranks tell each other for which of its steps they have everything; a step is read where
all of them have. So a part that is damaged, or that one machine does not see, costs a computation and no rank waits in
a collective that another has left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dkd import console
from dkd.global_batch.collectives import all_gather_objects
from dkd.teacher_cache.index import EpochIndex, Found, Run
from dkd.teacher_cache.key import CacheKey, open_folder
from dkd.teacher_cache.value import Value, in_order
from dkd.teacher_cache.writer import PART_BYTES, PartWriter

SEGMENT_BYTES = 64 * 2**20
"""Bytes that a rank reads for a segment, about; it holds two segments."""
_MOST_STEPS = 512
Loaded = dict[str, Found]


@dataclass(frozen=True)
class Turn:
    """Hold how positions follow from steps.

    Args:
        global_batch: B, the positions of a step.
        steps_per_epoch: of the order of samples.
        period: epochs after which the order repeats; None: never.
        last_step: of the run; nothing is read for later steps.
    """

    global_batch: int
    steps_per_epoch: int
    period: int | None
    last_step: int

    def epoch(self, step: int) -> int:
        """Return the epoch of the period that a step belongs to."""
        epoch = step // self.steps_per_epoch
        return epoch if self.period is None else epoch % self.period

    def first_position(self, step: int) -> int:
        """Return the first position of a step in its epoch."""
        return step % self.steps_per_epoch * self.global_batch


@dataclass(frozen=True)
class Need:
    """Hold what a rank needs of one value in each step.

    Args:
        value: what it is.
        units: for each part of a step that reads for itself, such as a micro-step, runs of positions, counted from the
            first position of the step.
    """

    value: Value
    units: tuple[tuple[Run, ...], ...]

    @property
    def rows(self) -> list[int]:
        """Return the rows of each unit."""
        return [sum(count for _, count in runs) for runs in self.units]


@dataclass
class _Segment:
    """Hold consecutive steps of one epoch, and what was loaded for each; None: it is to be computed."""

    first: int
    last: int
    loaded: list[Loaded | None] = field(default_factory=list)
    there: list[set[str]] = field(default_factory=list)
    """Of each step, the values that are stored, though others are missing."""


class StepCache:
    """Read and write what is needed of one teacher. All ranks make one, and call its methods together where a docstring
    says so.

    Args:
        root: the folder of the cache.
        key: of its content.
        needs: of this rank, as many rows on each rank.
        turn: how positions follow from steps.
        fill: whether what is computed is written.
        made_by: as write_part.
        report: takes a line about a problem.
        part_bytes, segment_bytes: as PART_BYTES and SEGMENT_BYTES.

    Raises:
        CacheError, OSError: the folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        key: CacheKey,
        needs: Sequence[Need],
        turn: Turn,
        fill: bool = True,
        made_by: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = console.say,
        part_bytes: int = PART_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.key = key
        self.folder = open_folder(root, key) if fill else root / key.name
        self._needs, self._turn, self._report = {need.value.id: need for need in needs}, turn, report
        self.writer = PartWriter(self.folder, made_by or {}, part_bytes) if fill else None
        self._indexes: dict[int, EpochIndex] = {}
        in_step = sum(sum(need.rows) * need.value.bytes_per_sample for need in needs)
        self._segment_steps = max(1, min(_MOST_STEPS, segment_bytes // max(1, in_step), turn.steps_per_epoch))
        self._segment: _Segment | None = None
        self._current: Loaded | None = None
        self._step = 0
        self._there: set[str] = set()
        self._computed: set[tuple[int, int]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache-reader")
        self._reading: tuple[int, Future[list[Loaded | None]]] | None = None
        self._reported: str | None = None
        self.read_steps = 0
        """Steps of this process that were read."""
        self.computed_steps = 0
        """Steps of this process that were computed."""

    def has(self, step: int) -> bool:
        """Return whether a step will be read; nothing is begun. A collective."""
        segment = self._enter(step)
        return segment.loaded[step - segment.first] is not None

    def begin(self, step: int) -> bool:
        """Begin a step. A collective.

        Returns:
            Whether what is needed of it is read; else it is to be computed, and given to `put`.
        """
        segment = self._enter(step)
        self._step, self._current = step, segment.loaded[step - segment.first]
        segment.loaded[step - segment.first] = None  # what was read is not to be kept
        self._there = segment.there[step - segment.first]
        if self._current is None:
            self.computed_steps += 1
            if self._turn.period is not None:
                self._computed.add(self._slot(step))
        else:
            self.read_steps += 1
        return self._current is not None

    def begin_computing(self, step: int) -> None:
        """Begin a step that is computed, whether it is stored or not."""
        self._step, self._current, self._there = step, None, self._listed_values(step)
        self.computed_steps += 1

    def listed(self, first: int, last: int) -> list[bool]:
        """Return, for steps of one epoch, whether the parts list everything that all ranks need of each; their numbers
        are not read. A collective."""
        index = self._index(self._turn.epoch(first))
        index.look()
        mine = index.lists([self._wanted(step) for step in range(first, last)])
        self._report_problems()
        return [all(ranks) for ranks in zip(*all_gather_objects(mine), strict=True)]

    def numbers(self, value: Value, unit: int = 0) -> torch.Tensor:
        """Return numbers (rows, ...) of this step on the CPU, in the order of the runs of a unit."""
        assert self._current is not None
        need, (stored, dtype, order) = self._needs[value.id], self._current[value.id]
        first = sum(need.rows[:unit])
        return in_order(value.decode(stored[first : first + need.rows[unit]], dtype), order)

    def put(self, value: Value, offset: int, numbers: torch.Tensor) -> None:
        """Take what was computed, of consecutive positions.

        Args:
            value: what it is.
            offset: of the first row, from the first position of the step.
            numbers: (b, ...) on any device.
        """
        if self.writer is not None and value.id not in self._there:
            turn, step = self._turn, self._step
            self.writer.add(step, turn.epoch(step), value, turn.first_position(step) + offset, numbers)
            self._report_problem()

    def confirm(self, steps: int) -> None:
        """Note that the steps before `steps` were right on all ranks: what they have computed may be written."""
        if self.writer is not None:
            self.writer.confirm(steps)
            self._report_problem()

    def flush(self) -> None:
        """Write what is confirmed, and wait until it is on the disk."""
        if self.writer is not None:
            self.writer.flush()
            self._report_problem()

    def wait(self) -> None:
        """Wait until no thread reads or writes, such as before a fork."""
        if self._reading is not None:
            self._reading[1].exception()
        if self.writer is not None:
            self.writer.wait()
            self._report_problem()

    def close(self) -> None:
        """End the threads. What is not confirmed is lost."""
        self._thread.shutdown()
        if self.writer is not None:
            self.writer.close()

    def _enter(self, step: int) -> _Segment:
        """Return the segment of a step. A collective where another one was open."""
        if self._segment is None or not self._segment.first <= step < self._segment.last:
            self._segment = self._open(step)
        return self._segment

    def _open(self, step: int) -> _Segment:
        segment = self._bounds(step)
        if self._reading is not None and self._reading[0] == segment.first:
            segment.loaded = self._reading[1].result()
        else:
            self.wait()
            segment.loaded = self._load(segment.first, segment.last)
        self._reading = None
        self._agree(segment)
        again = [
            each
            for each in range(segment.first, segment.last)
            if segment.loaded[each - segment.first] is None and self._slot(each) in self._computed
        ]
        if again:
            # These ranks have computed these steps before, in an epoch that now repeats.
            self.flush()
            all_gather_objects(None)  # what the others have computed is on the disk, too
            for each in again:
                segment.loaded[each - segment.first] = self._load(each, each + 1)[0]
            self._agree(segment)
        segment.there = [
            self._listed_values(each) if segment.loaded[each - segment.first] is None else set()
            for each in range(segment.first, segment.last)
        ]
        self._report_problems()
        following = self._bounds(segment.last) if segment.last < self._turn.last_step else None
        if following is not None:
            self._reading = (
                following.first, self._thread.submit(self._load, following.first, following.last)
            )  # fmt: skip
        return segment

    def _bounds(self, step: int) -> _Segment:
        """Return the segment, still empty, that a step belongs to, from that step on."""
        epoch_begin = step - step % self._turn.steps_per_epoch
        within = (step - epoch_begin) // self._segment_steps + 1
        last = min(
            epoch_begin + min(within * self._segment_steps, self._turn.steps_per_epoch),
            max(self._turn.last_step, step + 1),
        )
        return _Segment(step, last)

    def _agree(self, segment: _Segment) -> None:
        """Leave of a segment the steps that every rank has loaded. A collective."""
        mine = sum(1 << i for i, loaded in enumerate(segment.loaded) if loaded is not None)
        for theirs in all_gather_objects(mine):
            mine &= theirs
        segment.loaded = [loaded if mine >> i & 1 else None for i, loaded in enumerate(segment.loaded)]

    def _slot(self, step: int) -> tuple[int, int]:
        return self._turn.epoch(step), step % self._turn.steps_per_epoch

    def _load(self, first: int, last: int) -> list[Loaded | None]:
        """Read some steps of one epoch."""
        index = self._index(self._turn.epoch(first))
        index.look()
        return index.read([self._wanted(step) for step in range(first, last)])

    def _listed_values(self, step: int) -> set[str]:
        """Return the values of a step that this rank has stored already. Not while the thread reads."""
        index, wanted = self._index(self._turn.epoch(step)), self._wanted(step)
        return {value.id for value, runs in wanted.items() if index.lists([{value: runs}])[0]}

    def _index(self, epoch: int) -> EpochIndex:
        if epoch not in self._indexes:
            self._indexes = {epoch: EpochIndex(self.folder, epoch)}
        return self._indexes[epoch]

    def _wanted(self, step: int) -> dict[Value, list[Run]]:
        """Return the runs of positions that this rank needs of a step."""
        begin = self._turn.first_position(step)
        return {
            need.value: [(begin + offset, rows) for runs in need.units for offset, rows in runs]
            for need in self._needs.values()
        }

    def _report_problems(self) -> None:
        """Report what was damaged. Not while the thread reads."""
        for index in self._indexes.values():
            for problem in index.problems:
                self._report(
                    f"warning: the teacher's cache: {problem}; what cannot be read is computed again (`dkd cache "
                    "prune` removes damaged parts)"
                )
            index.problems.clear()

    def _report_problem(self) -> None:
        problem = None if self.writer is None else self.writer.problem
        if problem is not None and self._reported is None:
            self._reported = problem
            self._report(
                f"warning: the teacher's cache cannot be written any more ({problem}); runs compute what is missing"
            )
