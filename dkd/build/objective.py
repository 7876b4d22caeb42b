"""From a recipe to its objective: which losses, with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dkd.build.schedules import Schedule, loss_weight
from dkd.config import Recipe, RecipeError
from dkd.config.derived import classes
from dkd.config.losses import (
    AttentionTransferSection,
    CrossEntropySection,
    CustomLossSection,
    GradientAttentionSection,
    LossSection,
    SimilarityPreservingSection,
    SoftTargetsSection,
    WeightSchedule,
)
from dkd.data import GlobalBatchSampler, ImageSource
from dkd.distillation import FeatureTerm, InputGradientTerm, LabelTerm, LogitTerm, Objective
from dkd.distillation.objective import Term
from dkd.global_batch import ranks_per_group
from dkd.losses import AttentionTransfer, CrossEntropy, GradientAttention, SimilarityPreserving, SoftTargets
from dkd.losses.similarity_preserving import effective_gamma
from dkd.user_code import UserCodeError, describe_error, load_callable


def gram_size(recipe: Recipe, sampler: GlobalBatchSampler) -> int:
    """Return B_G, the rows of the Gram matrices that SP forms on the batches of `sampler`; 0 without SP."""
    sp = recipe.losses.sp
    if sp is None:
        return 0
    steps = sampler.micro_steps if sp.batch == "step" else 1
    return ranks_per_group(sp.scope, sampler.world_size) * sampler.micro_batch * steps


def comm_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the type that SP's features are rounded to on their way between ranks; None: they are not rounded."""
    return None if recipe.losses.sp is None else _dtype_between_ranks(recipe.losses.sp)


def _dtype_between_ranks(sp: SimilarityPreservingSection) -> torch.dtype | None:
    return torch.bfloat16 if sp.comm_dtype == "bf16" else None


def custom_loss(section: CustomLossSection) -> Callable[..., torch.Tensor]:
    """Return the user's own loss. Raises UserCodeError."""
    make = load_callable(section.loss)
    try:
        loss = make(**section.options)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = describe_error(error)
        if isinstance(error, TypeError) and "required positional argument" in reason:
            reason += (
                "; it is called once, with the options, to make the loss: name a class or a function that returns it"
            )
        raise UserCodeError(f"{section.loss!r} cannot be made with options {section.options}: {reason}") from error
    if not callable(loss):
        raise UserCodeError(f"{section.loss!r} returned {type(loss).__name__}, which cannot be called")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise UserCodeError(
            f"{section.loss!r} has parameters of its own, which nothing would train; put them into the student"
        )
    if getattr(loss, "relational", False) and section.of != "features":
        raise UserCodeError(
            f"{section.loss!r} is relational: it compares samples, and so takes features (with pairs), not {section.of}"
        )
    return loss


def class_weights(recipe: Recipe, training: ImageSource) -> list[float] | None:
    """Return the weight of each class in the cross-entropy; None: they have none.

    `balanced` is N / (K · n_c), with n_c the training images of class c, so that the mean weight of an image is 1.

    Raises:
        RecipeError: `balanced`, and a class has no training image, as scikit-learn refuses it.
    """
    section = recipe.losses.ce
    if not section.balances:
        return None if section.class_weights is None else [float(each) for each in section.class_weights]
    counts = np.bincount(training.labels, minlength=classes(recipe))
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        names = training.class_names or [str(label) for label in range(len(counts))]
        shown = ", ".join(names[label] for label in absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise RecipeError.at(
            "losses.ce.class_weights",
            f"balanced needs training images of each class, and there is none of {len(absent)} of {len(counts)} "
            f"classes ({shown}); write the weights as a list, or leave these classes out of the data",
        )
    return [float(weight) for weight in len(training) / (len(counts) * counts)]


def build_objective(
    recipe: Recipe,
    sampler: GlobalBatchSampler,
    total_steps: int,
    device: torch.device,
    weights: Sequence[float] | None = None,
) -> Objective:
    """Return the recipe's losses, on the batches of `sampler`.

    Cross-entropy is always a term, if with weight 0: it is what ties the student's head to the total.

    Args:
        total_steps: of all epochs, which the weights' schedules are drawn over.
        device: a loss of the user's own may have buffers, which are moved there.
        weights: of the classes, as `class_weights` returns them.
    """
    batch = _Batch(sampler, total_steps, gram_size(recipe, sampler), weights)
    terms = [TERMS[type(section)](key, section, batch) for key, section in recipe.losses.named()]
    for term in terms:
        if isinstance(loss := getattr(term, "loss", None), nn.Module):
            loss.to(device)
    return Objective(terms)


@dataclass(frozen=True)
class _Batch:
    """Holds what a term needs to know of a training beside its section."""

    sampler: GlobalBatchSampler
    total_steps: int
    gram_size: int
    class_weights: Sequence[float] | None = None

    def schedule(self, value: float | WeightSchedule, factor: float = 1.0) -> Schedule:
        """Return the weight of each step, times a factor."""
        weight = loss_weight(value, self.sampler.steps_per_epoch, self.total_steps)
        return lambda step: factor * weight(step)


def _label_term(key: str, ce: CrossEntropySection, batch: _Batch) -> Term:
    return LabelTerm(key, batch.schedule(ce.weight), CrossEntropy(ce.label_smoothing, batch.class_weights))


def _attention_term(key: str, at: AttentionTransferSection, batch: _Batch) -> Term:
    # The images of a recipe are square.
    loss = AttentionTransfer(
        at.map, at.p, at.reduction, at.norm, at.resize, at.pair_weights, at.class_tokens, square=True
    )
    return FeatureTerm(key, batch.schedule(at.beta), loss, at.paths)


def _similarity_term(key: str, sp: SimilarityPreservingSection, batch: _Batch) -> Term:
    scale = effective_gamma(1.0, sp.reference_batch, batch.gram_size)
    loss = SimilarityPreserving(sp.scope, sp.strategy, sp.pair_weights, _dtype_between_ranks(sp), sp.floor)
    return FeatureTerm(key, batch.schedule(sp.gamma, scale), loss, sp.paths, relational=sp.batch == "step")


def _gradient_term(key: str, section: GradientAttentionSection, batch: _Batch) -> Term:
    loss = GradientAttention(section.form, section.squared)
    return InputGradientTerm(key, batch.schedule(section.beta), loss, section.form == "symmetric")


def _logit_term(key: str, kd: SoftTargetsSection, batch: _Batch) -> Term:
    return LogitTerm(key, batch.schedule(kd.alpha), SoftTargets(kd.temperature))


def _custom_term(key: str, section: CustomLossSection, batch: _Batch) -> Term:
    return custom_term(section, batch.schedule(section.weight))


def custom_term(section: CustomLossSection, weight: Schedule) -> Term:
    """Return the term of a user's own loss. Raises UserCodeError."""
    loss = custom_loss(section)
    if section.of == "features":
        return FeatureTerm(section.name, weight, loss, section.paths, getattr(loss, "relational", False))
    return (LogitTerm if section.of == "logits" else LabelTerm)(section.name, weight, loss)


# Section of a loss -> what makes its term of it.
TERMS: dict[type[LossSection], Callable[[str, Any, _Batch], Term]] = {
    CrossEntropySection: _label_term,
    AttentionTransferSection: _attention_term,
    GradientAttentionSection: _gradient_term,
    SimilarityPreservingSection: _similarity_term,
    SoftTargetsSection: _logit_term,
    CustomLossSection: _custom_term,
}
