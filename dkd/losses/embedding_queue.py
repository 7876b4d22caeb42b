"""Compare the neighbours of a sample's embedding, without labels: the distribution of its similarities to a queue of
embeddings of the teacher.

Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021.

s_i and t_i are unit vectors of student and teacher, and Q (N, D) holds the last N unit vectors of the teacher, of the
samples of the steps before, in the order of the global batches:

    L_queue = (1/B) Σ_i KL( softmax(Q t_i / τ_T) ‖ softmax(Q s_i / τ_S) )

The queue is one for all ranks: its content is a function of the steps done. It begins with N unit vectors drawn from
the seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision, gather_rows
from dkd.losses.feature_forms import FeatureForm
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast
from dkd.losses.formed_features import FormedFeatures
from dkd.losses.soft_targets import divergence


class EmbeddingQueue(FormedFeatures, nn.Module):
    """Compute L_queue as a mean over the global batch.

    Args:
        width: D, the numbers of the teacher's vector.
        size: N.
        temperature: τ_S.
        teacher_temperature: τ_T; None: τ_S.
        seed: of the first content.
        form: what features are brought into; None: vectors.

    The module is called with one feature of the student, after its adapter, and one of the teacher. It returns a scalar
    with the same meaning over ranks as AttentionTransfer's. `end_step` puts the teacher's vectors of all calls since
    the last one into the queue: all ranks call it together, after each step, as DistillationStep does.

    Raises:
        ValueError: the shapes make no pair, or the step has more samples than the queue holds.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    queue: torch.Tensor

    def __init__(
        self,
        width: int,
        size: int = 8192,
        temperature: float = 0.07,
        teacher_temperature: float | None = None,
        seed: int = 0,
        form: FeatureForm | None = None,
    ) -> None:
        super().__init__()
        if min(temperature, teacher_temperature or temperature) <= 0:
            raise ValueError(f"temperatures {temperature} and {teacher_temperature}: must be above 0")
        self.size, self.form = size, form or FeatureForm("vector")
        self.temperature, self.teacher_temperature = temperature, teacher_temperature or temperature
        first = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("queue", F.normalize(first), persistent=False)
        # On the CPU, wherever the queue is: it is read in every step.
        self._place = torch.zeros((), dtype=torch.int64)
        self._seen: list[tuple[torch.Tensor, BatchLayout]] = []

    def extra_repr(self) -> str:
        return f"size={self.size}, temperature={self.temperature}, teacher_temperature={self.teacher_temperature}"

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps: the queue, and the place of the next vector in it."""
        return {"queue": self.queue, "place": self._place}

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        ((s, t, _),) = as_pairs(student, teacher, None)
        with no_autocast(s.device):
            own = F.normalize(self.form.student(full_precision(s), t))
            wanted = F.normalize(self.form.teacher(full_precision(t.detach()), s))
            if own.shape != wanted.shape:
                raise ValueError(
                    f"vectors of {own.shape[1]} and {wanted.shape[1]} numbers cannot be compared: the student's need "
                    "an adapter"
                )
            if torch.is_grad_enabled():
                self._seen.append((wanted, layout))
            queue = self.queue.to(wanted.dtype).T
            log_student = F.log_softmax(own @ queue / self.temperature, 1)
            return layout.mean(divergence(log_student, F.log_softmax(wanted @ queue / self.teacher_temperature, 1)))

    @torch.no_grad()
    def end_step(self) -> None:
        """Put the teacher's vectors of this step into the queue, those of all ranks. A collective."""
        seen = [gather_rows(rows, layout) for rows, layout in self._seen]
        self._seen = []
        if not seen:
            return
        rows = torch.cat(seen)
        if len(rows) > self.size:
            raise ValueError(f"a step of {len(rows)} samples is more than the queue of {self.size} holds")
        places = (torch.arange(len(rows)) + int(self._place)) % self.size
        self.queue[places.to(self.queue.device)] = rows.to(self.queue.dtype)
        self._place.copy_((self._place + len(rows)) % self.size)
