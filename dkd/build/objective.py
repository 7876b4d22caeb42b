"""From a recipe to its objective: which losses, with which weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dkd.build.feature_losses import Given, make_adapter, make_loss, tapped_shapes
from dkd.build.schedules import Schedule, loss_weight
from dkd.config import Recipe, RecipeError
from dkd.config.derived import classes
from dkd.config.losses import (
    AttentionTransferSection,
    BinaryCrossEntropySection,
    CkaSection,
    ComparingSection,
    CorrelationCongruenceSection,
    CrdSection,
    CrossEntropySection,
    CustomLossSection,
    DistSection,
    DkdSection,
    FeatureSection,
    FitNetSection,
    FormSection,
    GradientAttentionSection,
    LossSection,
    NkdSection,
    PktSection,
    QueueSection,
    RelationsSection,
    ReviewSection,
    RkdSection,
    SimilarityPreservingSection,
    SoftTargetsSection,
    SrdSection,
    VidSection,
    VkdSection,
    WeightSchedule,
)
from dkd.data import GlobalBatchSampler, ImageSource
from dkd.distillation import FeatureTerm, InputGradientTerm, LabelTerm, LogitTerm, Objective
from dkd.distillation.objective import Term
from dkd.global_batch import Links, ranks_per_group
from dkd.losses import (
    CKA,
    DIST,
    DKD,
    NKD,
    PKT,
    AttentionTransfer,
    BinaryCrossEntropy,
    CorrelationCongruence,
    CrossEntropy,
    GradientAttention,
    RelationalLoss,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
    SoftTargets,
)
from dkd.losses.feature_forms import Shape
from dkd.losses.relational import scaled_weight
from dkd.user_code import UserCodeError, describe_error, load_callable


def compared_samples(section: ComparingSection, sampler: GlobalBatchSampler) -> int:
    """Return the samples that a loss compares with each other, on the batches of `sampler`."""
    steps = sampler.micro_steps if section.batch == "step" else 1
    return ranks_per_group(section.scope, sampler.world_size) * sampler.micro_batch * steps


def gram_size(recipe: Recipe, sampler: GlobalBatchSampler) -> int:
    """Return B_G, the rows of the Gram matrices that SP forms on the batches of `sampler`; 0 without SP."""
    return 0 if recipe.losses.sp is None else compared_samples(recipe.losses.sp, sampler)


def relational_losses(
    section: RelationsSection, links: Links | None = None, channels_last: bool = False
) -> dict[str, RelationalLoss]:
    """Return the losses of a section that are computed by blocks of a grid, by what their terms' names end with.

    Args:
        section: of the recipe.
        links: the measured speeds of the launch.
        channels_last: whether maps lie so in memory.
    """
    memory = None if section.memory is None else int(section.memory * 1e9)
    comm_dtype = torch.bfloat16 if section.comm_dtype == "bf16" else None
    grid: Any = section.grid
    if isinstance(section, SimilarityPreservingSection) and grid == "auto":
        grid = section.strategy
    base: dict[str, Any] = {
        "scope": section.scope,
        "grid": grid,
        "weights": section.pair_weights,
        "comm_dtype": comm_dtype,
        "memory": memory,
        "links": links,
        "channels_last": channels_last,
    }
    match section:
        case SimilarityPreservingSection():
            return {"": SimilarityPreserving(floor=section.floor, **base)}
        case PktSection():
            return {"": PKT(section.floor, **base)}
        case CorrelationCongruenceSection():
            return {"": CorrelationCongruence(section.gamma, section.max_p, section.floor, **base)}
        case CkaSection():
            return {"": CKA(**base)}
        case RkdSection() if section.distance != 0:
            return {"_distance": RKDDistance(**base)}
    return {}


def custom_loss(section: CustomLossSection, shapes: Sequence[tuple[Shape, Shape]] = ()) -> Callable[..., torch.Tensor]:
    """Return the user's own loss.

    Args:
        section: of the recipe.
        shapes: (student, teacher) of each pair, without the batch, for a callable that has a parameter `shapes`.

    Raises:
        UserCodeError: it cannot be made, or cannot be trained.
    """
    make = load_callable(section.loss)
    wanted = {"shapes": list(shapes)} if "shapes" in _parameters_of(make) and "shapes" not in section.options else {}
    try:
        loss = make(**wanted, **section.options)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = describe_error(error)
        if isinstance(error, TypeError) and "required positional argument" in reason:
            reason += (
                "; it is called once, with the options (and the pairs' shapes, as `shapes`), to make the loss: name a "
                "class or a function that returns it"
            )
        raise UserCodeError(f"{section.loss!r} cannot be made with options {section.options}: {reason}") from error
    if not callable(loss):
        raise UserCodeError(f"{section.loss!r} returned {type(loss).__name__}, which cannot be called")
    _check_parameters(section, loss)
    if getattr(loss, "relational", False) and section.of == "labels":
        raise UserCodeError(
            f"{section.loss!r} is relational: it compares samples, and so takes features (with pairs) or logits, not "
            f"{section.of}"
        )
    return loss


def _parameters_of(make: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        return []


def _trained_module_of(loss: Callable[..., torch.Tensor]) -> nn.Module | None:
    """Return a module with parameters to train in the attributes or the closure of what is no module; None: there is
    none."""
    cells = getattr(loss, "__closure__", None) or ()
    held = [*getattr(loss, "__dict__", {}).values(), *(cell.cell_contents for cell in cells if _is_filled(cell))]
    modules = [each for each in held if isinstance(each, nn.Module)]
    return next((m for m in modules if any(p.requires_grad for p in m.parameters())), None)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def _hides_parameters(value: object) -> bool:
    """Return whether a plain list, tuple or dict holds what a module would have to know of."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(each, nn.Module | nn.Parameter) for each in values)


def _check_parameters(section: CustomLossSection, loss: Callable[..., torch.Tensor]) -> None:
    """Check that what a loss trains can be trained with the student. Raises UserCodeError."""
    adapter = getattr(loss, "adapter", None)
    if adapter is not None and (section.of != "features" or not isinstance(adapter, nn.Module)):
        raise UserCodeError(
            f"{section.loss!r} has an attribute `adapter`, which is a torch.nn.Module of a loss of features"
        )
    if not isinstance(loss, nn.Module):
        held = _trained_module_of(loss)
        if held is not None:
            raise UserCodeError(
                f"{section.loss!r} holds a {type(held).__name__} with parameters and is no torch.nn.Module itself, so "
                "that nothing would train them; derive the loss from torch.nn.Module"
            )
        return
    for inner in loss.modules():
        for name, value in vars(inner).items():
            if not name.startswith("_") and _hides_parameters(value):
                kind = type(value).__name__
                raise UserCodeError(
                    f"{section.loss!r}: {name} is a {kind} of modules or parameters, which nothing would train; use "
                    f"torch.nn.{'ModuleDict' if kind == 'dict' else 'ModuleList'}"
                )
    lazy = [name for name, parameter in loss.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise UserCodeError(
            f"{section.loss!r}: {lazy[0]} gets its shape in the first forward, and an optimizer needs it before; take "
            "the numbers of channels from a parameter `shapes` of the loss"
        )
    within = set() if adapter is None else {id(parameter) for parameter in adapter.parameters()}
    apart = [name for name, parameter in loss.named_parameters() if id(parameter) not in within]
    if apart and adapter is not None:
        raise UserCodeError(
            f"{section.loss!r} has {', '.join(apart[:3])} beside its adapter: a loss with an adapter has all of its "
            "parameters there"
        )
    if apart and getattr(loss, "relational", False):
        raise UserCodeError(
            f"{section.loss!r} is relational and has parameters ({', '.join(apart[:3])}): put them into a module "
            "`adapter`, which is called with the features of each micro-step"
        )


def class_weights(recipe: Recipe, training: ImageSource) -> list[float] | None:
    """Return the weight of each class in the cross-entropy; None: they have none.

    `balanced` is N / (K · n_c), with n_c the training images of class c, so that the mean weight of an image is 1.

    Raises:
        RecipeError: `balanced`, and a class has no training image, as scikit-learn refuses it.
    """
    section = recipe.losses.ce
    if section is None or section.class_weights is None:
        return None
    if not section.balances:
        return [float(each) for each in section.class_weights]
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
    links: Links | None = None,
    dtype: torch.dtype = torch.float32,
    labels: np.ndarray | None = None,
) -> Objective:
    """Return the recipe's losses, on the batches of `sampler`.

    Args:
        total_steps: of all epochs, which the weights' schedules are drawn over.
        device: what losses keep is there; `meta` for a look at terms and weights, with banks of no samples.
        weights: of the classes, as `class_weights` returns them.
        links: the measured speeds of the launch, by which losses of relations choose their grid.
        dtype: of weights and features; what losses keep is of this type where it is float64.
        labels: of the training samples; None: they have none.

    Raises:
        RecipeError: an adapter of a loss cannot be built.
        UserCodeError: a loss of the user's own cannot.
    """
    needs_shapes = any(isinstance(section, FormSection | CustomLossSection) for _, section in recipe.losses.named())
    student, teachers = tapped_shapes(recipe) if needs_shapes else ({}, {})
    samples = 0 if device.type == "meta" else sampler.samples
    given = Given(student, teachers, samples, recipe.run.seed, labels)
    batch = _Batch(sampler, total_steps, weights, links, recipe.train.channels_last is True, given)
    terms = [term for key, section in recipe.losses.named() for term in _terms_of(key, section, batch)]
    for term in terms:
        if isinstance(loss := getattr(term, "loss", None), nn.Module):
            loss.to(device, torch.float64) if dtype == torch.float64 else loss.to(device)
    return Objective(terms)


def _terms_of(key: str, section: LossSection, batch: _Batch) -> list[Term]:
    """Return the terms of a loss, with the name of its teacher, where there are several."""
    terms = TERMS[type(section)](key, section, batch)
    if section.teacher is None:
        return terms
    return [replace(term, teacher=section.teacher) for term in terms]  # type: ignore[type-var]


@dataclass(frozen=True)
class _Batch:
    """Holds what a term needs to know of a training beside its section."""

    sampler: GlobalBatchSampler
    total_steps: int
    class_weights: Sequence[float] | None = None
    links: Links | None = None
    channels_last: bool = False
    given: Given = field(default_factory=lambda: Given({}, {}))

    def schedule(self, value: float | WeightSchedule, factor: float = 1.0) -> Schedule:
        """Return the weight of each step, times a factor."""
        weight = loss_weight(value, self.sampler.steps_per_epoch, self.total_steps)
        return lambda step: factor * weight(step)


def _label_terms(key: str, ce: CrossEntropySection, batch: _Batch) -> list[Term]:
    return [LabelTerm(key, batch.schedule(ce.weight), CrossEntropy(ce.label_smoothing, batch.class_weights))]


def _binary_terms(key: str, bce: BinaryCrossEntropySection, batch: _Batch) -> list[Term]:
    loss = BinaryCrossEntropy(bce.label_smoothing, bce.target_threshold, bce.sum_classes)
    return [LabelTerm(key, batch.schedule(bce.weight), loss)]


def _attention_terms(key: str, at: AttentionTransferSection, batch: _Batch) -> list[Term]:
    # The images of a recipe are square.
    loss = AttentionTransfer(
        at.map, at.p, at.reduction, at.norm, at.resize, at.pair_weights, at.class_tokens, square=True
    )
    return [FeatureTerm(key, batch.schedule(at.beta), loss, at.paths)]


def _relations_terms(key: str, section: RelationsSection, batch: _Batch) -> list[Term]:
    weight, scale = _weight_of(section), 1.0
    if isinstance(section, SimilarityPreservingSection | PktSection):
        scale = scaled_weight(1.0, section.reference_batch, compared_samples(section, batch.sampler))
    whole = section.batch == "step"
    terms: list[Term] = [
        FeatureTerm(key + suffix, batch.schedule(weight, scale), loss, section.paths, relational=whole)
        for suffix, loss in relational_losses(section, batch.links, batch.channels_last).items()
    ]
    if isinstance(section, RkdSection) and section.angle != 0:
        angle = RKDAngle(section.scope, section.pair_weights)
        terms.append(FeatureTerm(f"{key}_angle", batch.schedule(section.angle), angle, section.paths, relational=whole))
    return terms


def _weight_of(section: RelationsSection) -> float | WeightSchedule:
    if isinstance(section, SimilarityPreservingSection):
        return section.gamma
    if isinstance(section, RkdSection):
        return section.distance
    assert isinstance(section, PktSection | CorrelationCongruenceSection | CkaSection)
    return section.weight


def _form_terms(key: str, section: FormSection, batch: _Batch) -> list[Term]:
    try:
        loss, adapter = make_loss(key, section, batch.given), make_adapter(key, section, batch.given)
    except (ValueError, RuntimeError) as error:  # torch's, of a size that no memory holds
        raise RecipeError.at(f"losses.{key}", error) from error
    weight = batch.schedule(section.weight)
    return [FeatureTerm(key, weight, loss, section.paths, relational=section.whole_batch, adapter=adapter)]


def _dist_terms(key: str, dist: DistSection, batch: _Batch) -> list[Term]:
    loss = DIST(dist.beta, dist.gamma, dist.tau, dist.scope)
    return [LogitTerm(key, batch.schedule(dist.weight), loss, relational=dist.batch == "step")]


def _gradient_terms(key: str, section: GradientAttentionSection, batch: _Batch) -> list[Term]:
    loss = GradientAttention(section.form, section.squared)
    return [InputGradientTerm(key, batch.schedule(section.beta), loss, section.form == "symmetric")]


def _logit_terms(key: str, kd: SoftTargetsSection, batch: _Batch) -> list[Term]:
    return [LogitTerm(key, batch.schedule(kd.alpha), SoftTargets(kd.temperature, kd.standardize))]


def _decoupled_terms(key: str, dkd: DkdSection, batch: _Batch) -> list[Term]:
    return [LogitTerm(key, batch.schedule(dkd.weight), DKD(dkd.alpha, dkd.beta, dkd.temperature))]


def _normalized_terms(key: str, nkd: NkdSection, batch: _Batch) -> list[Term]:
    return [LogitTerm(key, batch.schedule(nkd.weight), NKD(nkd.temperature, nkd.gamma))]


def _custom_terms(key: str, section: CustomLossSection, batch: _Batch) -> list[Term]:
    return [custom_term(section, batch.schedule(section.weight), batch.given)]


def custom_term(section: CustomLossSection, weight: Schedule, given: Given | None = None) -> Term:
    """Return the term of a user's own loss, drawn from the seed in `given`. Raises UserCodeError."""
    given = given or Given({}, {})
    theirs = given.teachers.get(section.teacher or "", {})
    shapes = [(given.student[s], theirs[t]) for s, t in section.paths if s in given.student and t in theirs]
    with given.seeded(section.name):
        loss = custom_loss(section, shapes)
    teacher = section.teacher or ""
    if section.of == "features":
        relational, adapter = getattr(loss, "relational", False), getattr(loss, "adapter", None)
        return FeatureTerm(section.name, weight, loss, section.paths, relational, adapter, teacher=teacher)
    if section.of == "logits":
        return LogitTerm(section.name, weight, loss, getattr(loss, "relational", False), teacher=teacher)
    return LabelTerm(section.name, weight, loss)


# Section of a loss -> what makes its terms of it.
TERMS: dict[type[LossSection], Callable[[str, Any, _Batch], list[Term]]] = {
    CrossEntropySection: _label_terms,
    BinaryCrossEntropySection: _binary_terms,
    AttentionTransferSection: _attention_terms,
    GradientAttentionSection: _gradient_terms,
    SimilarityPreservingSection: _relations_terms,
    PktSection: _relations_terms,
    CorrelationCongruenceSection: _relations_terms,
    CkaSection: _relations_terms,
    RkdSection: _relations_terms,
    DistSection: _dist_terms,
    SoftTargetsSection: _logit_terms,
    DkdSection: _decoupled_terms,
    NkdSection: _normalized_terms,
    FitNetSection: _form_terms,
    FeatureSection: _form_terms,
    VkdSection: _form_terms,
    SrdSection: _form_terms,
    VidSection: _form_terms,
    ReviewSection: _form_terms,
    CrdSection: _form_terms,
    QueueSection: _form_terms,
    CustomLossSection: _custom_terms,
}
