"""Find out which parts of an epoch hold which positions, and read them."""

from __future__ import annotations

import os
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from dkd.teacher_cache.key import epoch_folder
from dkd.teacher_cache.part import SUFFIX, DamagedPartError, Part
from dkd.teacher_cache.value import Value


class Found(NamedTuple):
    """Hold numbers as they are stored, (rows, ...), the type that they were computed in, and the order of their
    dimensions in memory, as `memory_order`."""

    stored: torch.Tensor
    dtype: torch.dtype
    order: tuple[int, ...] | None


Run = tuple[int, int]
"""A first position in an epoch, and a number of consecutive positions."""


class _Place(NamedTuple):
    """Hold where a piece is; sorted by its first position."""

    position: int
    rows: int
    part: int
    piece: int


class _Taken(NamedTuple):
    """Hold which rows of which piece are taken."""

    place: _Place
    first_row: int
    rows: int


@dataclass
class _Pieces:
    """Hold the pieces of one value."""

    places: list[_Place] = field(default_factory=list)
    longest: int = 0

    def add(self, place: _Place) -> None:
        """Add a piece."""
        insort(self.places, place)
        self.longest = max(self.longest, place.rows)

    def cover(self, run: Run, damaged: set[int]) -> list[_Taken] | None:
        """Return pieces of parts that are not damaged, which hold a run; None: there are none."""
        position, end = run[0], run[0] + run[1]
        found = []
        while position < end:
            place = self._at(position, damaged)
            if place is None:
                return None
            skipped = position - place.position
            rows = min(place.rows - skipped, end - position)
            found.append(_Taken(place, skipped, rows))
            position += rows
        return found

    def _at(self, position: int, damaged: set[int]) -> _Place | None:
        here = bisect_right(self.places, position, key=lambda place: place.position) - 1
        while here >= 0 and self.places[here].position > position - self.longest:
            place = self.places[here]
            if position < place.position + place.rows and place.part not in damaged:
                return place
            here -= 1
        return None


class EpochIndex:
    """Hold what the parts of one epoch list, and which of them are damaged.

    Args:
        folder: of the key.
        epoch: of the period.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        self.epoch, self._key = epoch, folder.name
        self._folder = epoch_folder(folder, epoch)
        self._parts: list[Part] = []
        self._seen: set[str] = set()
        self._damaged: set[int] = set()
        self._pieces: dict[str, _Pieces] = {}
        self.problems: list[str] = []
        """What was found to be damaged since the list was emptied, a line each."""

    def look(self) -> None:
        """List the parts that have appeared since the last look. A folder that cannot be read holds none."""
        try:
            names = sorted(os.listdir(self._folder))
        except OSError:
            return
        for name in names:
            if name in self._seen or not name.startswith("part_") or not name.endswith(SUFFIX):
                continue
            self._seen.add(name)
            try:
                part = Part(self._folder / name, self._key, self.epoch)
            except (DamagedPartError, OSError) as error:
                self.problems.append(f"{self._folder / name}: {error}")
                continue
            number = len(self._parts)
            self._parts.append(part)
            for value, stored in part.values.items():
                pieces = self._pieces.setdefault(value, _Pieces())
                for i, piece in enumerate(stored.pieces):
                    pieces.add(_Place(piece.position, piece.rows, number, i))

    def read(self, wanted: Sequence[Mapping[Value, Sequence[Run]]]) -> list[dict[str, Found] | None]:
        """Return, for each of several groups of runs, by the id of a value the numbers in the order of the runs; None
        for a group of which something is missing or damaged."""
        while True:
            damaged = len(self._damaged)
            plans = [self._plan(group) for group in wanted]
            content = self._read_pieces([plan for plan in plans if plan is not None])
            if len(self._damaged) == damaged:
                return [
                    None if plan is None else self._join(group, plan, content)
                    for group, plan in zip(wanted, plans, strict=True)
                ]

    def lists(self, wanted: Sequence[Mapping[Value, Sequence[Run]]]) -> list[bool]:
        """Return, for each of several groups of runs, whether the parts list all of it."""
        return [self._plan(group) is not None for group in wanted]

    def _plan(self, group: Mapping[Value, Sequence[Run]]) -> dict[str, list[_Taken]] | None:
        plan: dict[str, list[_Taken]] = {}
        for value, runs in group.items():
            pieces = self._pieces.get(value.id, _Pieces())
            for run in runs:
                taken = pieces.cover(run, self._damaged)
                if taken is None:
                    return None
                plan.setdefault(value.id, []).extend(taken)
            parts = [self._parts[each.place.part].values[value.id] for each in plan.get(value.id, [])]
            if any(p.dtype != parts[0].dtype or p.row_bytes != value.row_bytes(p.dtype) for p in parts):
                return None
        return plan

    def _read_pieces(self, plans: Sequence[Mapping[str, list[_Taken]]]) -> dict[tuple[str, int, int], bytearray]:
        """Return the bytes of pieces by value, part and number. A part that turns out to be damaged is noted."""
        needed: dict[tuple[int, str], set[int]] = {}
        for plan in plans:
            for value, taken in plan.items():
                for each in taken:
                    needed.setdefault((each.place.part, value), set()).add(each.place.piece)
        content: dict[tuple[str, int, int], bytearray] = {}
        for (part, value), numbers in sorted(needed.items()):
            if part in self._damaged:
                continue
            try:
                found = self._parts[part].read(value, numbers)
            except (DamagedPartError, OSError) as error:
                self._damaged.add(part)
                self.problems.append(f"{self._parts[part].path}: {error}")
                continue
            content |= {(value, part, number): each for number, each in found.items()}
        return content

    def _join(
        self,
        group: Mapping[Value, Sequence[Run]],
        plan: Mapping[str, list[_Taken]],
        content: Mapping[tuple[str, int, int], bytearray],
    ) -> dict[str, Found]:
        found = {}
        for value in group:
            parts = []
            described = self._parts[plan[value.id][0].place.part].values[value.id]
            dtype = described.dtype
            for place, first, rows in plan[value.id]:
                flat = torch.frombuffer(content[value.id, place.part, place.piece], dtype=value.stored_dtype(dtype))
                parts.append(flat.view(place.rows, *value.stored_shape(dtype))[first : first + rows])
            whole = len(parts) == 1 and plan[value.id][0].rows == plan[value.id][0].place.rows
            # A copy, where rows of the piece are not needed, which else would be kept.
            found[value.id] = Found(parts[0] if whole else torch.cat(parts), dtype, described.order)
        return found
