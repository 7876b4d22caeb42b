"""From a recipe to its objective: which losses, with which weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dkd.build.schedules import Schedule, loss_weight
from dkd.config import Recipe
from dkd.config.losses import CustomLossSection
from dkd.data import GlobalBatchSampler
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
    return torch.bfloat16 if recipe.losses.sp and recipe.losses.sp.comm_dtype == "bf16" else None


def custom_loss(section: CustomLossSection) -> Callable[..., torch.Tensor]:
    """Return the user's own loss. Raises UserCodeError."""
    make = load_callable(section.loss)
    try:
        loss = make(**section.options)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = describe_error(error)
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


def build_objective(recipe: Recipe, sampler: GlobalBatchSampler, total_steps: int, device: torch.device) -> Objective:
    """Return the recipe's losses, on the batches of `sampler`.

    Cross-entropy is always a term, if with weight 0: it is what ties the student's head to the total.

    Args:
        total_steps: of all epochs, which the weights' schedules are drawn over.
        device: a loss of the user's own may have buffers, which are moved there.
    """
    losses = recipe.losses

    def weight(value: object, factor: float = 1.0) -> Schedule:
        schedule = loss_weight(value, sampler.steps_per_epoch, total_steps)  # type: ignore[arg-type]
        return lambda step: factor * schedule(step)

    terms: list[Term] = [LabelTerm("ce", weight(losses.ce.weight), CrossEntropy(losses.ce.label_smoothing))]
    if losses.at is not None:
        at = losses.at
        at_loss = AttentionTransfer(at.map, at.p, at.reduction, at.norm, at.resize, at.pair_weights, at.class_tokens)
        terms.append(FeatureTerm("at", weight(at.beta), at_loss, at.paths))
    if losses.sp is not None:
        sp = losses.sp
        scale = effective_gamma(1.0, sp.reference_batch, gram_size(recipe, sampler))
        sp_loss = SimilarityPreserving(sp.scope, sp.strategy, sp.pair_weights, comm_dtype(recipe), sp.floor)
        terms.append(FeatureTerm("sp", weight(sp.gamma, scale), sp_loss, sp.paths, relational=sp.batch == "step"))
    if losses.gradient_at is not None:
        section = losses.gradient_at
        gradient_loss = GradientAttention(section.form, section.squared)
        terms.append(InputGradientTerm("gradient_at", weight(section.beta), gradient_loss, section.form == "symmetric"))
    if losses.kd is not None:
        terms.append(LogitTerm("kd", weight(losses.kd.alpha), SoftTargets(losses.kd.temperature)))
    terms += [_custom_term(custom, weight(custom.weight)) for custom in losses.custom]
    for term in terms:
        if isinstance(loss := getattr(term, "loss", None), nn.Module):
            loss.to(device)
    return Objective(terms)


def _custom_term(section: CustomLossSection, weight: Schedule) -> Term:
    loss = custom_loss(section)
    if section.of == "features":
        return FeatureTerm(section.name, weight, loss, section.paths, getattr(loss, "relational", False))
    return (LogitTerm if section.of == "logits" else LabelTerm)(section.name, weight, loss)
