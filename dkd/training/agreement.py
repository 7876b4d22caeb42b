"""How alike student and teacher are on a data set: equal answers, KL, and linear CKA of tapped features.

CKA is that of Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, eq. 4, for all
samples of the data set at once:

    CKA(X, Y) = ‖XᵀY‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F)

X (n, p) and Y (n, q) are the features of student and teacher, averaged over positions and with the mean of each column
taken off. XᵀX, YᵀY and XᵀY are sums over samples, which add up over batches and ranks: the value depends on neither,
but for rounding in float64. No sample is compared with a part of the others only, as estimators of minibatches do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dkd.data.samples import Batch
from dkd.distillation import Outputs
from dkd.models.feature_reader import pool

MOST_CHANNELS = 4096
"""Channels up to which CKA is measured: a pair takes 8·(p² + q² + p·q) bytes on each rank."""
_CONSTANT = 1e-12  # share of the uncentred products that is left of a feature that does not change, by rounding


@dataclass(frozen=True)
class Agreement:
    """Holds how alike student and teacher are; None: not measured, or not defined.

    Args:
        top1: share of samples for which both name the same class first.
        kl: mean KL(teacher ‖ student) of the class probabilities at temperature 1, in nats.
        teacher_top1: share of samples for which the teacher is right; None for samples without labels, too.
        cka: (student path, teacher path) -> linear CKA.
    """

    top1: float | None
    kl: float | None
    teacher_top1: float | None
    cka: dict[tuple[str, str], float | None] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what JSON can hold of it."""
        cka = {f"{student}:{teacher}": value for (student, teacher), value in self.cka.items()}
        return {"top1": self.top1, "kl": self.kl, "teacher_top1": self.teacher_top1, "cka": cka}

    def tracked(self) -> dict[str, float]:
        """Return what trackers get, by name. Some of them allow few signs in a name."""
        values = {key: value for key, value in self.facts().items() if key != "cka"}
        values |= {f"cka/{student}-{teacher}": value for (student, teacher), value in self.cka.items()}
        return {f"evaluation/teacher/{name}": value for name, value in values.items() if value is not None}

    def describe(self) -> str:
        """Return the numbers in one line."""
        named = [("same class first", self.top1), ("KL", self.kl), ("teacher's top-1", self.teacher_top1)]
        named += [(f"CKA {student}:{teacher}", value) for (student, teacher), value in self.cka.items()]
        return ", ".join(f"{name} {value:.4f}" for name, value in named if value is not None)


class AgreementMeter:
    """Adds up, on each rank, what the agreement of student and teacher is computed from.

    Args:
        pairs: (student path, teacher path) of tapped modules.
        classes: whether both models have the same classes.
        device: where both models' outputs are.
        labels: whether the samples have labels.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], classes: bool, device: torch.device, labels: bool = True
    ) -> None:
        self._products: dict[tuple[str, str], _Products | None] = dict.fromkeys(pairs)
        self._classes, self._device, self._labels = classes, device, labels
        self._numbers = torch.zeros(4, dtype=torch.float64, device=device)  # samples, same class, KL, teacher right

    @torch.no_grad()
    def add(self, student: Outputs, teacher: Outputs, batch: Batch) -> None:
        """Add the samples of a batch; its padding does not count."""
        valid = batch.valid
        if self._classes and student.logits is not None and teacher.logits is not None:
            labels = batch.labels[:valid].to(self._device, non_blocking=True)
            self._numbers += _compare(student.logits[:valid].double(), teacher.logits[:valid].double(), labels)
        for pair in self._products:
            x, y = (
                pool(side.features[path][:valid].double()) for side, path in zip((student, teacher), pair, strict=True)
            )
            if max(x.shape[1], y.shape[1]) > MOST_CHANNELS:
                continue
            products = self._products[pair] or _Products.zeros(x.shape[1], y.shape[1], self._device)
            products.add(x, y)
            self._products[pair] = products

    def over_ranks(self) -> Agreement:
        """Return the agreement over the samples of all ranks, the same on every rank. A collective."""
        samples, same, kl, right = _sum(self._numbers).tolist()
        cka = {pair: None if found is None else found.over_ranks().cka() for pair, found in self._products.items()}
        if not samples:
            return Agreement(None, None, None, cka)
        mean_kl = kl / samples
        teacher_right = right / samples if self._labels else None
        return Agreement(same / samples, mean_kl if math.isfinite(mean_kl) else None, teacher_right, cka)


def _compare(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sums over samples of: 1, same class first, KL(teacher ‖ student), teacher right."""
    log_student, log_teacher = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    by_class = log_teacher.exp() * (log_teacher - log_student)
    # p·log(p/q) is 0 at p = 0, but is computed as 0·∞.
    kl = by_class.masked_fill(log_teacher.exp() == 0, 0.0).sum()
    first = teacher.argmax(1)
    same, right = (first == student.argmax(1)).sum(), (first == labels).sum()
    return torch.stack([kl.new_full((), len(labels)), same.double(), kl, right.double()])


def _sum(numbers: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


@dataclass
class _Products:
    """Holds sums over n samples of features x (n, p) and y (n, q), in float64."""

    samples: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    yy: torch.Tensor
    xy: torch.Tensor

    @classmethod
    def zeros(cls, p: int, q: int, device: torch.device) -> _Products:
        shapes = ((), (p,), (q,), (p, p), (q, q), (p, q))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.samples += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.yy += y.T @ y
        self.xy += x.T @ y

    def over_ranks(self) -> _Products:
        return _Products(*map(_sum, (self.samples, self.x, self.y, self.xx, self.yy, self.xy)))

    def cka(self) -> float | None:
        """Return linear CKA; None where a feature is the same for all samples, or is not finite."""

        def centre(products: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return products - torch.outer(left, right) / self.samples

        own, theirs = centre(self.xx, self.x, self.x).norm(), centre(self.yy, self.y, self.y).norm()
        if own <= _CONSTANT * self.xx.norm() or theirs <= _CONSTANT * self.yy.norm():
            return None
        value = (centre(self.xy, self.x, self.y).norm() ** 2 / (own * theirs)).item()
        return value if math.isfinite(value) else None
