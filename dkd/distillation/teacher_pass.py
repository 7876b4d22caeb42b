"""Compute and store what losses read of teachers, without a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dkd.data import Normalize
from dkd.distillation.forward import Forward
from dkd.distillation.grad_cache import join_teachers
from dkd.distillation.inputs import Inputs, MicroBatch
from dkd.distillation.objective import Objective, Outputs
from dkd.distillation.stored_teacher import StoredTeacher, Teaching
from dkd.distillation.teacher_group import OneTeacher, TeacherGroup
from dkd.global_batch import BatchLayout


class TeacherPass:
    """Runs the teachers that have a cache, as DistillationStep does. All ranks make one, and call it together.

    Args:
        teacher: all teachers of the objective.
        objective: the losses, which name what is stored.
        stored: the caches, by the name of a teacher.
        inputs: of this rank.
        micro_steps: A.
        normalize, teacher_normalize, dtype, memory_format: as Forward.
    """

    def __init__(
        self,
        teacher: OneTeacher | TeacherGroup,
        objective: Objective,
        stored: Mapping[str, StoredTeacher],
        inputs: Inputs,
        micro_steps: int,
        normalize: Normalize,
        teacher_normalize: Mapping[str, Normalize],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        # The student is not run; only its input is made, from which the teachers' are.
        nobody = torch.nn.Identity()
        self._forward = Forward(nobody, teacher, objective, normalize, teacher_normalize, dtype, memory_format)
        self._teaching = Teaching([name for name in self._forward.teacher_names if name in stored], self._run)
        self._teaching.stored = stored
        kept = [term for term in objective.terms if getattr(term, "teacher", "") in stored]
        self._separable, self._relational = Objective(kept).split()
        self._inputs, self._micro_steps = inputs, micro_steps

    def _run(self, name: str, pixels: torch.Tensor, images: torch.Tensor) -> Outputs:
        return self._forward.one_teacher(name, pixels, images)

    @torch.no_grad()
    def __call__(self, micro_batches: Sequence[MicroBatch], step: int) -> None:
        """Compute what is stored of a step. A collective.

        Args:
            micro_batches: A of them, on any device.
            step: from 0.
        """
        self._teaching.begin(step, micro_batches, compute=True)
        found = []
        for micro_step, batch in enumerate(micro_batches):
            pixels, _ = self._inputs.load(batch, step, micro_step)
            outputs = self._teaching.outputs(micro_step, pixels, self._forward.images(pixels))
            assert outputs is not None
            found.append(outputs)
        layout = BatchLayout.even(len(micro_batches[0][1]))
        whole = bool(self._relational.terms) and self._micro_steps > 1
        each = self._separable if whole else Objective([*self._separable.terms, *self._relational.terms])
        for micro_step, outputs in enumerate(found):
            self._teaching.begin_terms(each, outputs, layout, micro_step)
        if whole:
            paths = {path for term in self._relational.terms for _, path in getattr(term, "pairs", [])}
            rows = BatchLayout.even(layout.rows[0] * self._micro_steps)
            self._teaching.begin_terms(self._relational, join_teachers(found, paths, False), rows, None)
