"""Choose which features of a student are compared with which of a teacher.

1. Both models have their stages (dkd/models/stages.py). A model of one resolution, as a plain ViT, gets as many stages
   as the other one has, at most four, cut by depth.
2. Where the resolutions are common to both, but for one, the stages of these resolutions are pairs.
3. Else the last stages are pairs, the last with the last, and AT resizes the larger map.
4. Four pairs at most: the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from dkd.errors import InputError
from dkd.models import ModelSpec
from dkd.models.stages import Stage, find_stages, split

MOST_PAIRS = 4


@dataclass(frozen=True)
class ChosenPairs:
    """The pairs of a recipe, in the order of the models' forward.

    Args:
        pairs: (student's stage, teacher's stage).
    """

    pairs: list[tuple[Stage, Stage]]

    @property
    def paths(self) -> list[list[str]]:
        """Return [student path, teacher path] of each pair, as a recipe has them."""
        return [[student.path, teacher.path] for student, teacher in self.pairs]

    @property
    def needs_resize(self) -> bool:
        """Return whether maps of two resolutions are compared."""
        return any(student.side != teacher.side for student, teacher in self.pairs)

    @property
    def class_tokens(self) -> int | list[int] | None:
        """Return what `losses.at.class_tokens` has to be; None: no feature is of tokens."""
        found = [{stage.tokens_in_front for stage in stages} - {None} for stages in zip(*self.pairs, strict=True)]
        student, teacher = (next(iter(numbers), None) for numbers in found)
        if student is None or teacher is None or student == teacher:
            return teacher if student is None else student
        return [student, teacher]

    def table(self) -> list[str]:
        """Return one line for each pair: both taps with the shapes of their features."""
        rows = [(_describe(student), _describe(teacher)) for student, teacher in self.pairs]
        width = max(len(student) for student, _ in rows)
        return [f"{student:<{width}}  ←  {teacher}" for student, teacher in rows]


def _describe(stage: Stage) -> str:
    shape = "×".join(map(str, stage.shape))
    if stage.tokens_in_front is None:
        return f"{stage.path} {shape}"
    in_front = f", {stage.tokens_in_front} in front" if stage.tokens_in_front else ""
    return f"{stage.path} {shape} ({stage.side}×{stage.side} tokens{in_front})"


def choose_pairs(student: ModelSpec, teacher: ModelSpec, student_size: int, teacher_size: int) -> ChosenPairs:
    """Choose the pairs of two models.

    Args:
        student, teacher: the models.
        student_size, teacher_size: side of their images, pixels.

    Raises:
        InputError: a model has no features with positions.
        UnknownModelError: there is no such model, or it does not take such images.
    """
    ours, theirs = find_stages(student, student_size), find_stages(teacher, teacher_size)
    for spec, stages in ((student, ours), (teacher, theirs)):
        if not stages:
            raise InputError(
                f"{spec.name!r} has no features with positions to compare; write pairs by hand, from `dkd inspect "
                f"{spec.name}`, or distil its logits alone: --losses kd"
            )
    if 1 in (len(ours), len(theirs)):
        parts, other_parts = (len(theirs), len(ours)) if len(ours) != len(theirs) else (MOST_PAIRS, MOST_PAIRS)
        ours, theirs = (
            _split_single(student, ours, student_size, parts),
            _split_single(teacher, theirs, teacher_size, other_parts),
        )
    common = {stage.side for stage in ours} & {stage.side for stage in theirs}
    if len(common) >= max(2, min(len(ours), len(theirs), MOST_PAIRS) - 1):
        by_side = {stage.side: stage for stage in theirs}
        pairs = [(stage, by_side[stage.side]) for stage in ours if stage.side in common]
    else:
        count = min(len(ours), len(theirs))
        pairs = list(zip(ours[-count:], theirs[-count:], strict=True))
    return ChosenPairs(pairs[-MOST_PAIRS:])


def _split_single(spec: ModelSpec, stages: list[Stage], image_size: int, parts: int) -> list[Stage]:
    """Return the stages of a model; one of a single resolution is cut into parts, at most MOST_PAIRS."""
    return stages if len(stages) > 1 else split(spec, stages[0], image_size, min(parts, MOST_PAIRS))
