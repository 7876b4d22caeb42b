"""Compute CRD. Source: Tian, Krishnan & Isola, "Contrastive Representation Distillation", ICLR 2020.

s_i and t_i are unit vectors of D numbers, of student and teacher, each after a linear layer that is trained. Two banks
hold a unit vector of every training sample for each of them. With h(u, v) = exp(u·v / τ) / Z, K samples n drawn for
sample i, and c = K / N for N training samples:

    L_S = −(1/B) Σ_i [ log h(s_i, T_i) / (h(s_i, T_i) + c)  +  Σ_n log c / (h(s_i, T_n) + c) ]

T the teacher's bank; L_T has t_i and the student's bank S, and L_CRD = L_S + L_T. Z is N times the mean of exp(u·v / τ)
over the first global batch, one number for each of the two. After a step, the rows of its samples become the unit
vector of m·old + (1 − m)·new.

Each rank holds an N/W-th of the banks. The vectors of all ranks are gathered, exactly and with their gradient, and each
rank computes the terms whose rows it holds: what is drawn, Z and the banks do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dkd.global_batch import BatchLayout, collectives, full_precision, gather_rows
from dkd.losses.feature_forms import FeatureForm, Shape
from dkd.losses.feature_pairs import Features, as_list, no_autocast
from dkd.losses.formed_features import FormedFeatures
from dkd.rng import derive_seed

_BLOCK = 2**14
"""Rows of a bank that are drawn from one seed: a rank draws only what it holds."""
_BANK, _DRAWS = 0, 1  # purposes of random numbers: each has its own


class ContrastiveAdapter(FormedFeatures, nn.Module):
    """Maps the features of student and teacher to vectors of one width, by a linear layer each.

    Args:
        form: vectors.
        shapes: (student, teacher) of the one pair in that form.
        width: D.

    The module is called with two lists of one feature. It returns two vectors (b, D).
    """

    promotes_teacher = False

    def __init__(self, form: FeatureForm, shapes: Sequence[tuple[Shape, Shape]], width: int = 128) -> None:
        super().__init__()
        ((student, teacher),) = shapes
        self.form = form
        self.student, self.teacher = nn.Linear(student[0], width), nn.Linear(teacher[0], width)

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        (s,), (t,) = student, teacher
        wanted = self.form.teacher(t, s)
        return [self.student(self.form.student(s, t)), self.teacher(wanted.to(self.teacher.weight.dtype))]


class CRD(nn.Module):
    """Compute L_CRD over the global batch.

    Args:
        samples: N, the training samples.
        width: D.
        negatives: K.
        temperature: τ.
        momentum: m.
        seed: of the banks' first content, and of what is drawn.
        labels: (N,) classes of the training samples: what is drawn for a sample is of other classes; None: any other
            samples.
        group: the ranks that share the banks; None: all ranks. A `layout` names the same ranks.

    The module is called with what ContrastiveAdapter yields, the teacher's features, which are not read, and `indices`,
    the places (b,) of the samples in the training data. It returns a scalar whose mean over ranks is L_CRD of the
    global batch. `end_step` updates the banks: all ranks call it together, after each step, as DistillationStep does.
    Under accumulation, one call covers the whole global batch.

    Raises:
        ValueError: these are not two vectors of D numbers.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    relational = True
    student_bank: torch.Tensor
    teacher_bank: torch.Tensor
    normalizers: torch.Tensor

    def __init__(
        self,
        samples: int,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
        labels: Sequence[int] | np.ndarray | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.samples, self.width, self.negatives = samples, width, negatives
        self.temperature, self.momentum, self.seed = temperature, momentum, seed
        self._others = _OtherSamples(samples, labels)
        self._world_size, rank = collectives.world_size(group), collectives.rank(group)
        share = -(-samples // self._world_size)  # as DTensor cuts rows
        self._first, end = min(samples, rank * share), min(samples, (rank + 1) * share)
        for number, name in enumerate(("student_bank", "teacher_bank")):
            self.register_buffer(name, _draw_rows(self._first, end, width, seed, number), persistent=False)
        self.register_buffer("normalizers", torch.zeros(2), persistent=False)
        # On the CPU, wherever the banks are: it is read in every step.
        self._steps = torch.zeros((), dtype=torch.int64)
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._mesh: DeviceMesh | None = None

    def extra_repr(self) -> str:
        return (
            f"samples={self.samples}, width={self.width}, negatives={self.negatives}, temperature={self.temperature}, "
            f"momentum={self.momentum}"
        )

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps: the banks, of which each rank holds a part, Z of both, and the steps done."""
        whole = {"normalizers": self.normalizers, "steps": self._steps}
        if self._world_size == 1:
            return {"student_bank": self.student_bank, "teacher_bank": self.teacher_bank, **whole}
        mesh = self._mesh = self._mesh or init_device_mesh(self.student_bank.device.type, (self._world_size,))
        shape, stride = torch.Size((self.samples, self.width)), (self.width, 1)
        banks = {"student_bank": self.student_bank, "teacher_bank": self.teacher_bank}
        return whole | {
            name: DTensor.from_local(bank, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
            for name, bank in banks.items()
        }

    def forward(
        self, student: Features, teacher: Features, indices: torch.Tensor, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        vectors = as_list(student)
        layout = layout or BatchLayout.agree([*vectors, indices], loss=self)
        if len(vectors) != 2 or any(v.dim() != 2 or v.shape[1] != self.width for v in vectors):
            shapes = ", ".join(str(tuple(v.shape)) for v in vectors)
            raise ValueError(f"CRD takes two vectors of {self.width} numbers, its adapter's, and got {shapes}")
        with no_autocast(vectors[0].device):
            s, t = (gather_rows(F.normalize(full_precision(v)), layout) for v in vectors)
            places = gather_rows(indices, layout)
            if torch.is_grad_enabled():
                self._seen.append((places, s.detach(), t.detach()))
            drawn = torch.cat([places[:, None], self.draw(places)], 1)
            own = drawn - self._first
            held = (own >= 0) & (own < len(self.student_bank))
            scores = [self._score(rows, bank, own) for rows, bank in ((s, self.teacher_bank), (t, self.student_bank))]
            self._set_normalizers(scores, held, layout)
            sums = [
                self._sum_of_logarithms(score - normalizer.to(score.dtype).log(), held)
                for score, normalizer in zip(scores, self.normalizers, strict=True)
            ]
            return -torch.stack(sums).sum() * (layout.world_size / len(places))

    def draw(self, places: torch.Tensor) -> torch.Tensor:
        """Return (B, K) other samples, with which each sample of the global batch is compared in this step: the same on
        all ranks."""
        generator = torch.Generator(places.device).manual_seed(derive_seed(self.seed, int(self._steps), _DRAWS))
        numbers = torch.randint(2**62, (len(places), self.negatives), generator=generator, device=places.device)
        # In the order of the samples' places: the order of rows depends on the ranks, under accumulation.
        return self._others.of(places, numbers[places.argsort().argsort()])

    def _score(self, rows: torch.Tensor, bank: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return (u·v − 1) / τ of each row with the rows of the bank that were drawn for it; of those that another rank
        holds, numbers without meaning. The 1 is a factor of Z, too, and keeps the exponential in range."""
        if not len(bank):
            return rows.sum(1, keepdim=True).mul(0.0).expand_as(own)
        products = rows @ bank.to(rows.dtype).T
        return (products.gather(1, own.clamp(0, len(bank) - 1)) - 1) / self.temperature

    @torch.no_grad()
    def _set_normalizers(self, scores: Sequence[torch.Tensor], held: torch.Tensor, layout: BatchLayout) -> None:
        """Set Z from the first global batch; leave it as it is afterwards."""
        sums = layout.sum(torch.stack([score.double().exp().masked_fill(~held, 0.0).sum() for score in scores]))
        found = (sums / held.numel() * self.samples).to(self.normalizers.dtype)
        self.normalizers.copy_(torch.where(self.normalizers > 0, self.normalizers, found))

    def _sum_of_logarithms(self, log_density: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Return the sum over the terms whose rows this rank holds, of log h (B, 1 + K): log h/(h + c) of the first
        column, log c/(h + c) of the others."""
        ratio = log_density - math.log(self.negatives / self.samples)
        signed = torch.cat([-ratio[:, :1], ratio[:, 1:]], 1)
        return -torch.logaddexp(signed, torch.zeros_like(signed)).masked_fill(~held, 0.0).sum()

    @torch.no_grad()
    def end_step(self) -> None:
        """Update the rows of the samples of this step in the banks."""
        for places, s, t in self._seen:
            own = places - self._first
            # A step whose update was left out may have brought vectors that are not finite: the same on all ranks.
            finite = (s.sum(1) + t.sum(1)).isfinite()
            held = (own >= 0) & (own < len(self.student_bank)) & finite
            for bank, rows in ((self.student_bank, s), (self.teacher_bank, t)):
                if self._world_size == 1:  # all rows are here: no mask, whose length a GPU would be asked for
                    before = bank[own]
                    mixed = self.momentum * before + (1 - self.momentum) * rows.to(bank.dtype)
                    bank[own] = torch.where(finite[:, None], F.normalize(mixed), before)
                    continue
                mixed = self.momentum * bank[own[held]] + (1 - self.momentum) * rows[held].to(bank.dtype)
                bank[own[held]] = F.normalize(mixed)
        self._seen = []
        self._steps += 1


class _OtherSamples:
    """Chooses, for a sample, others by number: of other classes, or any others."""

    def __init__(self, samples: int, labels: Sequence[int] | np.ndarray | None) -> None:
        # Without labels, each sample is a class of its own.
        classes = np.arange(samples) if labels is None else np.asarray(labels)
        self._order = torch.from_numpy(np.argsort(classes, kind="stable"))
        ordered = classes[self._order.numpy()]
        self._first = torch.from_numpy(np.searchsorted(ordered, classes, side="left"))
        self._count = torch.from_numpy(np.searchsorted(ordered, classes, side="right")) - self._first
        if samples and int(self._count.max()) == samples:
            raise ValueError("CRD draws samples of other classes, and the training data show one class")

    def of(self, places: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return a sample of another class for each number (B, K) of the sample of its row."""
        if self._order.device != places.device:
            self._order, self._first, self._count = (
                each.to(places.device) for each in (self._order, self._first, self._count)
            )
        first, count = self._first[places][:, None], self._count[places][:, None]
        chosen = numbers % (len(self._order) - count)
        return self._order[chosen + (chosen >= first) * count]


def _draw_rows(first: int, end: int, width: int, seed: int, bank: int) -> torch.Tensor:
    """Return rows `first` to `end` of a bank's first content, unit vectors."""
    blocks = []
    for block in range(first // _BLOCK, -(-end // _BLOCK)):
        generator = torch.Generator().manual_seed(derive_seed(seed, bank, block, _BANK))
        rows = torch.rand(_BLOCK, width, generator=generator) * 2 - 1
        blocks.append(rows[max(0, first - block * _BLOCK) : end - block * _BLOCK])
    return F.normalize(torch.cat(blocks)) if first < end else torch.zeros(0, width)
