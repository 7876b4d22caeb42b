"""From the pixels of a micro-batch to what student and teacher return for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dkd.data import Normalize
from dkd.distillation.objective import FeatureTerm, InputGradientTerm, LabelTerm, LogitTerm, Objective, Outputs
from dkd.distillation.teacher_group import OneTeacher, TeacherGroup, members_of
from dkd.global_batch import full_precision
from dkd.models import ADAPTERS


class Forward:
    """Runs both models' forwards on micro-batches that are on this rank's device.

    Args:
        student: wrapped by its engine; returns (logits, features) as TappedModel does.
        teacher: or None.
        objective: its terms state whether images need a gradient, and whether mirror images need a forward.
        normalize: of the student's input; None: images arrive as the student takes them.
        teacher_normalize: of the teacher's input; None: the same input as the student's. Of several teachers: by name.
        dtype, memory_format: of both models' inputs.
        keeps_types: features of the student that need no promoted copy (`unpromoted_taps`) keep their type; so do their
            gradients.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: OneTeacher | TeacherGroup | None,
        objective: Objective,
        normalize: Normalize | None = None,
        teacher_normalize: Normalize | Mapping[str, Normalize] | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        keeps_types: bool = False,
    ) -> None:
        self._student, self._teachers = student, members_of(teacher)
        self._normalize = normalize
        theirs = teacher_normalize if isinstance(teacher_normalize, Mapping) else {"": teacher_normalize}
        self._teacher_normalize = {name: each for name, each in theirs.items() if each not in (None, normalize)}
        self._dtype, self._memory_format = dtype, memory_format
        self._unpromoted = unpromoted_taps(objective) if keeps_types else frozenset()
        by_images = [term for term in objective.terms if isinstance(term, InputGradientTerm)]
        self._differentiates_images = bool(by_images)
        self._mirrors = any(term.mirrored for term in by_images)
        self._teacher_differentiates = any(not term.mirrored for term in by_images)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the student's input (b, 3, H, W) for these pixels; it requires gradient where a loss differentiates by
        it."""
        images = self._as_input(self._normalize, pixels)
        return images.requires_grad_() if self._differentiates_images and torch.is_grad_enabled() else images

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the student's logits (b, K) alone."""
        logits: torch.Tensor = self._student(self.images(pixels))[0]
        return logits

    def both(self, pixels: torch.Tensor, rows: int) -> tuple[Outputs, Outputs | None]:
        """Return what student and teacher yield for the same pixels, for evaluation.

        Args:
            rows: samples that the teacher takes in one forward, at most: a batch that the student alone fits in memory
                may not be one for its teacher.
        """
        images = self.images(pixels)
        logits, features = self._student(images)
        parts = [self.teacher(*part) for part in zip(pixels.split(rows), images.split(rows), strict=True)]
        return Outputs(logits, features), join_outputs([part for part in parts if part is not None])

    def student(self, images: torch.Tensor, given: Mapping[str, Any] | None = None) -> Outputs:
        """Return what the student yields for its input.

        Args:
            images: the student's input (b, 3, H, W).
            given: what the adapters of losses read, as `given_to_adapters`; None: there are none.
        """
        with self._twice_differentiable():
            return self._run_student(images, () if given is None else (given,))

    def _run_student(self, images: torch.Tensor, given: tuple[Mapping[str, Any], ...]) -> Outputs:
        logits: torch.Tensor | None
        mirrored: torch.Tensor | None = None
        if self._mirrors:
            # Images and their mirror images in one forward: engines expect one for each backward.
            (logits, mirrored), features = _halve(*self._student(torch.cat([images, images.flip(-1)]), *given))
        else:
            logits, features = self._student(images, *given)
        # Promoted here, once: the gradients of several losses then add up in float32, and are rounded to half precision
        # once.
        logits, mirrored = (None if each is None else full_precision(each) for each in (logits, mirrored))
        promoted = {k: each if k in self._unpromoted else full_precision(each) for k, each in features.items()}
        types = {path: feature.dtype for path, feature in features.items()}
        return Outputs(logits, promoted, images, mirrored, types)

    def teacher(self, pixels: torch.Tensor, images: torch.Tensor) -> Outputs | None:
        """Return what the teacher yields; None without a teacher.

        Args:
            pixels: the teacher's own normalisation starts from them.
            images: the student's input, which is also the teacher's where both are normalised alike, or where gradients
                are to reach it.
        """
        if not self._teachers:
            return None
        found = {name: self.one_teacher(name, pixels, images) for name in self._teachers}
        return found[""] if "" in found else Outputs(None, {}, members=found)

    @property
    def teacher_names(self) -> list[str]:
        """Return the names of the teachers; of one alone, the name is empty."""
        return list(self._teachers)

    def one_teacher(self, name: str, pixels: torch.Tensor, images: torch.Tensor) -> Outputs:
        """Return what one teacher yields. Arguments as `teacher`."""
        if not self._teacher_differentiates:
            images = images.detach()
        normalize = self._teacher_normalize.get(name)
        if normalize is not None:
            # From the pixels, whether gradients are to reach the student's input or not: the same features to the last
            # bit. What is added is 0, and its derivative is that of one normalisation by the other.
            own = self._as_input(normalize, pixels)
            images = own + (images - images.detach()) * self._slope(images, normalize) if images.requires_grad else own
        with self._twice_differentiable():
            return Outputs(*self._teachers[name](images))

    def _twice_differentiable(self) -> AbstractContextManager[None]:
        """Choose attention that has a second derivative where one is needed: fused attention has none."""
        return sdpa_kernel(SDPBackend.MATH) if self._differentiates_images else nullcontext()

    def _slope(self, images: torch.Tensor, normalize: Normalize) -> torch.Tensor:
        """Return (1, 3, 1, 1): the derivative of the teacher's input by the student's, std_S / std_T."""
        std = (1.0, 1.0, 1.0) if self._normalize is None else self._normalize.std
        ratios = [s / t for s, t in zip(std, normalize.std, strict=True)]
        return torch.tensor(ratios, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)

    def _as_input(self, normalize: Normalize | None, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.to(self._dtype) if normalize is None else normalize(pixels, self._dtype)
        return images.to(memory_format=self._memory_format)


def unpromoted_taps(objective: Objective) -> set[str]:
    """Return the paths of the student's features that one loss alone reads, and reads in half precision: a promoted
    copy would be work for nothing."""
    readers: Counter[str] = Counter()
    taking: set[str] = set()
    for term in objective.terms:
        if isinstance(term, FeatureTerm) and term.trained is None:
            paths = [student for student, _ in term.pairs]
            readers.update(paths)
            # Stated by its own class: a class that is derived from it may read them in another way.
            taking.update(paths if vars(type(term.loss)).get("takes_half_precision") else ())
        elif not isinstance(term, FeatureTerm | LogitTerm | LabelTerm | InputGradientTerm):
            return set()  # what it reads is not known
    return {path for path in taking if readers[path] == 1}


def join_outputs(parts: Sequence[Outputs]) -> Outputs | None:
    """Return the outputs for the samples of all parts, in order; None for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    logits = [part.logits for part in parts if part.logits is not None]
    features = {path: torch.cat([part.features[path] for part in parts]) for path in parts[0].features}
    members = {name: join_outputs([part.members[name] for part in parts]) for name in parts[0].members}
    several = {name: joined for name, joined in members.items() if joined is not None}
    return Outputs(torch.cat(logits) if logits else None, features, members=several)


def _halve(
    logits: torch.Tensor, features: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the logits of the first and of the second half of the rows, and the features of the first half."""
    rows = len(logits) // 2
    # What adapters yield is of the first half already, and may be the value of a loss.
    halves = {k: f if k.startswith(ADAPTERS) else f[:rows] for k, f in features.items()}
    return (logits[:rows], logits[rows:]), halves
