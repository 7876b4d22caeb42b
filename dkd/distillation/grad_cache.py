"""The gradient of a relational loss over the whole global batch, where a rank computes the batch in several
micro-steps.

A relational loss over B samples is no sum over micro-batches, and the graphs of all micro-steps do not fit into memory
at once. So a step has two passes over the images, as in GradCache (Gao et al., 2021):

    1. forward of every micro-batch without graph; the tapped features are kept, and what the teacher yields.
    2. the loss on all of them, and its gradient with respect to the features: one exchange between ranks a step.
    3. forward of each micro-batch again, with the same random numbers and BatchNorm buffers; ⟨feature, gradient⟩ joins
    its
       loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dkd.distillation.objective import Objective, Outputs
from dkd.global_batch import BatchLayout


@dataclass(frozen=True)
class CachedGradient:
    """Holds what pass 2 computes for pass 3.

    Args:
        total: the weighted relational loss, this rank's share times W.
        terms: its terms before their weights.
        features: of each micro-step, by path, as pass 1 saw them.
        gradients: ∂total/∂feature of each micro-step, by path.
        teachers: the teacher's outputs of each micro-step; the teacher runs once.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    features: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]
    teachers: Sequence[Outputs]

    def loss(self, micro_step: int, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return A·⟨feature, ∂total/∂feature⟩ for one micro-step: averaged over A micro-steps and W ranks, its gradient
        is that of the relational loss."""
        gradients = self.gradients[micro_step]
        products = [(features[path].to(gradient.dtype) * gradient).sum() for path, gradient in gradients.items()]
        return len(self.gradients) * torch.stack(products).sum()

    def difference(self, micro_step: int, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return how far pass 3's features are from pass 1's, relative to their norm: 0 when the second forward repeats
        the first."""
        pairs = [(features[path].detach().float(), seen.float()) for path, seen in self.features[micro_step].items()]
        return torch.stack([(now - seen).norm() / seen.norm().clamp_min(1e-12) for now, seen in pairs]).max()


def cache_gradient(
    objective: Objective,
    students: Sequence[dict[str, torch.Tensor]],
    teachers: Sequence[Outputs],
    labels: torch.Tensor,
    step: int,
    indices: torch.Tensor | None = None,
) -> CachedGradient:
    """Compute pass 2. A collective.

    Args:
        objective: relational terms only.
        students: the student's features of each micro-step, without graph.
        teachers: the teacher's outputs of each micro-step.
        labels: of all micro-steps, in order.
        step: the global step.
        indices: of the samples of all micro-steps, in order; None: no term asks for them.
    """
    paths = objective.student_taps
    kept = [{path: features[path].detach() for path in paths} for features in students]
    joined = {path: torch.cat([features[path] for features in kept]).requires_grad_() for path in paths}
    teacher_paths = {teacher for term in objective.terms for _, teacher in getattr(term, "pairs", [])}
    teacher = Outputs(
        None, {path: torch.cat([outputs.features[path] for outputs in teachers]) for path in teacher_paths}
    )
    layout = BatchLayout.even(len(labels))
    total, terms = objective(Outputs(None, joined), teacher, labels, step=step, layout=layout, indices=indices)
    # A term need not use all of its pairs.
    gradients = torch.autograd.grad(total, list(joined.values()), materialize_grads=True)
    rows = [len(features[paths[0]]) for features in kept]
    split = {path: gradient.split(rows) for path, gradient in zip(paths, gradients, strict=True)}
    by_micro_step = [{path: split[path][i] for path in paths} for i in range(len(kept))]
    return CachedGradient(total.detach(), terms, kept, by_micro_step, teachers)
