"""From a loaded micro-batch to what student and teacher yield for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dkd.data import Normalize
from dkd.data.samples import Batch
from dkd.distillation import FrozenTeacher, InputGradientTerm, Objective
from dkd.distillation.objective import Outputs
from dkd.global_batch import full_precision


class Forward:
    """Both models' forwards on micro-batches that are on this rank's device.

    Args:
        student: wrapped by its engine.
        teacher: or None.
        normalize, teacher_normalize: of their inputs.
        dtype, memory_format: of their inputs.
        objective: whose terms say whether images need a gradient, and mirror images a forward.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: FrozenTeacher | None,
        normalize: Normalize,
        teacher_normalize: Normalize,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        objective: Objective,
    ) -> None:
        self.model, self.teacher_model = student, teacher
        self.normalize, self.teacher_normalize = normalize, teacher_normalize
        self.dtype, self.memory_format = dtype, memory_format
        by_images = [term for term in objective.terms if isinstance(term, InputGradientTerm)]
        self.differentiates_images = bool(by_images)
        self.mirrors = any(term.mirrored for term in by_images)
        self._teacher_differentiates = any(not term.mirrored for term in by_images)

    def images(self, batch: Batch) -> torch.Tensor:
        """The student's input; it requires gradient where a loss differentiates by it."""
        images = self._as_input(self.normalize(batch.images, self.dtype))
        return images.requires_grad_() if self.differentiates_images and torch.is_grad_enabled() else images

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The student's alone."""
        logits: torch.Tensor = self.model(images)[0]
        return logits

    def student(self, images: torch.Tensor) -> Outputs:
        with self._twice_differentiable():
            return self._student(images)

    def _student(self, images: torch.Tensor) -> Outputs:
        mirrored = None
        if self.mirrors:
            # Images and their mirror images in one forward: engines expect one for each backward.
            (logits, mirrored), features = _halves(*self.model(torch.cat([images, images.flip(-1)])))
        else:
            logits, features = self.model(images)
        # Promoted here, once: the gradients of several losses then add up in float32 and are rounded to half precision
        # once.
        return Outputs(logits, {path: full_precision(feature) for path, feature in features.items()}, images, mirrored)

    def teacher(self, batch: Batch, images: torch.Tensor) -> Outputs | None:
        """None without a teacher.

        Args:
            batch: where the teacher's own normalisation starts.
            images: the student's input, which the teacher takes over where both are normalised alike, or where
                gradients are to reach it.
        """
        if self.teacher_model is None:
            return None
        if not self._teacher_differentiates:
            images = images.detach()
        if self.teacher_normalize != self.normalize:
            # From the pixels, whether gradients are to reach the student's input or not: the same features to the last
            # bit. What is added is 0, and its derivative that of one normalisation by the other.
            own = self._as_input(self.teacher_normalize(batch.images, self.dtype))
            images = own + (images - images.detach()) * self._slope(images) if images.requires_grad else own
        with self._twice_differentiable():
            return Outputs(*self.teacher_model(images))

    def _twice_differentiable(self) -> AbstractContextManager[None]:
        """Fused attention has no second derivative."""
        return sdpa_kernel(SDPBackend.MATH) if self.differentiates_images else nullcontext()

    def _slope(self, images: torch.Tensor) -> torch.Tensor:
        """(1, 3, 1, 1): ∂ of the teacher's input by the student's, std_S / std_T."""
        ratios = [s / t for s, t in zip(self.normalize.std, self.teacher_normalize.std, strict=True)]
        return torch.tensor(ratios, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)

    def _as_input(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(memory_format=self.memory_format)


def _halves(
    logits: torch.Tensor, features: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of the first and of the second half of the rows; the features of the first."""
    rows = len(logits) // 2
    return (logits[:rows], logits[rows:]), {path: feature[:rows] for path, feature in features.items()}
