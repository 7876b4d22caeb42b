"""The gradient of a relational loss over the whole global batch, where a rank computes the batch in several
micro-steps.

A relational loss over B samples is no sum over micro-batches, and the graphs of all micro-steps do not fit into memory
at once. So a step has two passes over the images, as in GradCache (Gao et al., 2021):

    1. forward of every micro-batch without graph; the tapped features and logits that such a loss reads are kept, and
       what the teacher yields.
    2. the loss on all of them, and its gradient with respect to them: one exchange between ranks a step.
    3. forward of each micro-batch again, with the same random numbers and BatchNorm buffers; ⟨tensor, gradient⟩ joins
       its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from dkd.distillation.objective import Objective, Outputs
from dkd.global_batch import BatchLayout

LOGITS = ""
"""The key of logits among the tensors of a micro-step, where features have their path."""


def compared_tensors(objective: Objective, student: Outputs) -> dict[str, torch.Tensor]:
    """Return what the terms of a relational objective read of a student: features by path, and logits under LOGITS."""
    found = {key: student.features[key] for key in objective.keys(student.features)}
    if objective.compares_logits:
        assert student.logits is not None
        found[LOGITS] = student.logits
    return found


@dataclass(frozen=True)
class CachedGradient:
    """Holds what pass 2 computes for pass 3.

    Args:
        total: the weighted relational loss, this rank's share times W.
        terms: its terms before their weights.
        tensors: of each micro-step, as pass 1 saw them.
        gradients: ∂total/∂tensor of each micro-step.
        teachers: the teacher's outputs of each micro-step; the teacher runs once.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    tensors: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]
    teachers: Sequence[Outputs]

    def loss(self, micro_step: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return A·⟨tensor, ∂total/∂tensor⟩ for one micro-step: averaged over A micro-steps and W ranks, its gradient
        is that of the relational loss."""
        gradients = self.gradients[micro_step]
        products = [(tensors[key].to(gradient.dtype) * gradient).sum() for key, gradient in gradients.items()]
        return len(self.gradients) * torch.stack(products).sum()

    def difference(self, micro_step: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return how far pass 3's tensors are from pass 1's, relative to their norm: 0 when the second forward repeats
        the first."""
        pairs = [(tensors[key].detach().float(), seen.float()) for key, seen in self.tensors[micro_step].items()]
        return torch.stack([(now - seen).norm() / seen.norm().clamp_min(1e-12) for now, seen in pairs]).max()


def join_teachers(teachers: Sequence[Outputs], paths: Collection[str], with_logits: bool) -> Outputs:
    """Return the teacher's outputs of all micro-steps as one, as far as relational terms read them."""
    members = {
        name: join_teachers([outputs.members[name] for outputs in teachers], paths, with_logits)
        for name in teachers[0].members
    }
    logits = [outputs.logits for outputs in teachers if outputs.logits is not None and with_logits]
    features = {
        path: torch.cat([outputs.features[path] for outputs in teachers])
        for path in teachers[0].features
        if path in paths
    }
    # What stands in the place of features is a list of tensors (b, ...), but for terms that are no relational ones.
    listed = [name for name, each in teachers[0].begun.items() if isinstance(each, list)]
    begun = {name: _join_lists([outputs.begun[name] for outputs in teachers]) for name in listed}
    return Outputs(torch.cat(logits) if logits else None, features, begun=begun, members=members)


def _join_lists(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def cache_gradient(
    objective: Objective,
    students: Sequence[Outputs],
    teachers: Sequence[Outputs],
    labels: torch.Tensor,
    step: int,
    indices: torch.Tensor | None = None,
    begin: Callable[[Outputs, BatchLayout], Outputs] = lambda teacher, _: teacher,
) -> CachedGradient:
    """Compute pass 2. A collective.

    Args:
        objective: relational terms only.
        students: what of the student they read of each micro-step, without graph.
        teachers: the teacher's outputs of each micro-step.
        labels: of all micro-steps, in order.
        step: the global step.
        indices: of the samples of all micro-steps, in order; None: no term asks for them.
        begin: given the teacher's outputs of all micro-steps as one, returns them with what was begun of the terms.
    """
    kept = [{k: v.detach() for k, v in compared_tensors(objective, student).items()} for student in students]
    keys = list(kept[0])
    joined = {key: torch.cat([tensors[key] for tensors in kept]).requires_grad_() for key in keys}
    teacher_paths = {teacher for term in objective.terms for _, teacher in getattr(term, "pairs", [])}
    teacher = join_teachers(teachers, teacher_paths, LOGITS in joined)
    features = {key: tensor for key, tensor in joined.items() if key != LOGITS}
    student = Outputs(joined.get(LOGITS), features, types=students[0].types)
    layout = BatchLayout.even(len(labels))
    total, terms = objective(student, begin(teacher, layout), labels, step=step, layout=layout, indices=indices)
    # A term need not use all of its pairs.
    gradients = torch.autograd.grad(total, list(joined.values()), materialize_grads=True)
    rows = [len(tensors[keys[0]]) for tensors in kept]
    split = {key: gradient.split(rows) for key, gradient in zip(keys, gradients, strict=True)}
    by_micro_step = [{key: split[key][i] for key in keys} for i in range(len(kept))]
    return CachedGradient(total.detach(), terms, kept, by_micro_step, teachers)
