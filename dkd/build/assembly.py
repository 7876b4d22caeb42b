"""From a recipe to the objects it names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dkd import launch, machine
from dkd.build import recipe_objects
from dkd.build.schedules import Schedule, loss_weight
from dkd.config import Recipe, RecipeError
from dkd.config.losses import CustomLossSection
from dkd.config.schema import DataSection
from dkd.data import (
    DataError,
    GlobalBatchSampler,
    ImageSource,
    MixupCutmix,
    RowGroups,
    StreamedBatchSampler,
    in_memory,
    is_in_memory,
)
from dkd.data.sampler import TURNS
from dkd.distillation import (
    FeatureTerm,
    FrozenTeacher,
    InputGradientTerm,
    LabelTerm,
    LogitTerm,
    Objective,
    fill,
    halve_weights,
    shard,
    shard_mesh,
)
from dkd.distillation.objective import Term
from dkd.engines import engine
from dkd.engines.sharded_weights import parameter_counts
from dkd.global_batch import ranks_per_group
from dkd.losses import AttentionTransfer, CrossEntropy, GradientAttention, SimilarityPreserving, SoftTargets
from dkd.losses.similarity_preserving import effective_gamma
from dkd.models import (
    Fingerprint,
    TappedModel,
    WeightsError,
    build_model,
    build_on_meta,
    load_weights,
    stream_weights,
    weights_fingerprint,
)
from dkd.user_code import UserCodeError, describe_error, load_callable


def build_models(recipe: Recipe, device: torch.device) -> tuple[TappedModel, FrozenTeacher | None]:
    """The student on the CPU and the teacher on its device, with their weights, which may have to be downloaded. Raises
    RecipeError."""
    role = "student"
    try:
        student, role = build_student(recipe), "teacher"
        return student, build_teacher(recipe, device, launch.world_size(), launch.local_world_size())
    except WeightsError as error:
        raise RecipeError.at(f"{role}.weights", error) from error


def build_student(recipe: Recipe) -> TappedModel:
    """The student, on the CPU, its initial weights drawn from the run's seed: the same on every rank."""
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe_objects.student_spec(recipe))
    if recipe.student.weights is not None and recipe.student.weights != "random":
        load_weights(model, recipe.student.name, recipe.student.weights)
    if recipe.train.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # float16's autocast comes with Accelerate's loss scaling.
    autocast = torch.bfloat16 if recipe.train.precision == "bf16" else None
    return TappedModel(model, [student for student, _ in recipe_objects.pairs(recipe)], autocast=autocast)


def build_teacher(
    recipe: Recipe, device: torch.device, world_size: int = 1, local_world_size: int = 1
) -> FrozenTeacher | None:
    """The teacher on its device, whole or in shards as `teacher.placement` says, or None for a recipe without one. A
    collective when it is cut into shards. On one rank there is nothing to share, and every placement is the whole
    teacher."""
    section = recipe.teacher
    if section is None:
        return None
    spec = recipe_objects.teacher_spec(recipe)
    taps = [teacher for _, teacher in recipe_objects.pairs(recipe)]
    needs_logits = bool(recipe.losses.needs_teacher_logits)
    sharded = section.placement if world_size > 1 else "replicated"

    def wrapped(model: nn.Module, fingerprint: str = "") -> FrozenTeacher:
        if section.weights_dtype == "bf16":
            halve_weights(model)
        # ZeRO-3 learns the order of a forward's modules; it goes to the end.
        to_its_end = needs_logits or sharded == "zero3"
        return FrozenTeacher(model, taps, to_its_end, section.input_size, engine.autocast_dtype(recipe), fingerprint)

    torch.manual_seed(recipe.run.seed)
    on_meta = build_on_meta(spec) if sharded == "fsdp2" and section.weights != "random" else None
    if on_meta is not None and _filled_by_its_state(on_meta):
        weights = stream_weights(on_meta, section.name, section.weights)
        teacher = wrapped(on_meta.to(engine.model_dtype(recipe)))
        shard(teacher, shard_mesh(section.mesh, device.type, local_world_size))
        teacher.to_empty(device=device)
        fingerprint = Fingerprint()
        fill(teacher.tapped.model, fingerprint.adding(weights))
        teacher.fingerprint = fingerprint.hexdigest()
        return _checked(teacher, sharded, section.mesh, world_size, local_world_size)
    model = build_model(spec)
    if section.weights != "random":
        load_weights(model, section.name, section.weights)
    fingerprint_of_all = weights_fingerprint(model)
    model = engine.place(model, recipe, device, to_be_sharded=sharded != "replicated")
    teacher = wrapped(model, fingerprint_of_all)
    if sharded == "fsdp2":
        shard(teacher, shard_mesh(section.mesh, device.type, local_world_size))
    elif sharded == "zero3":
        engine.shard_by_zero3(teacher)
    return _checked(teacher, sharded, section.mesh, world_size, local_world_size)


def _checked(
    teacher: FrozenTeacher, placement: str, mesh: str, world_size: int, local_world_size: int
) -> FrozenTeacher:
    """The teacher, when a rank keeps as much of it as its placement says. Raises RecipeError."""
    local, total = parameter_counts(teacher)
    shards = 1 if placement == "replicated" else local_world_size if mesh == "node" else world_size
    if shards > 1 and local > 0.9 * total:
        raise RecipeError.at(
            "teacher.placement", f"{placement} over {shards} ranks, but each keeps {local:,} of {total:,} parameters"
        )
    return teacher


def _filled_by_its_state(model: nn.Module) -> bool:
    """Whether a file of weights fills everything that the model holds: not so with buffers that it computes for
    itself."""
    state = model.state_dict()
    return all(tensor.is_meta for tensor in state.values()) and all(name in state for name, _ in model.named_buffers())


def gram_rows(recipe: Recipe, order: GlobalBatchSampler) -> int:
    """B_G, the rows of the Gram matrices that SP forms on this launch; 0 without SP."""
    sp = recipe.losses.sp
    if sp is None:
        return 0
    steps = order.micro_steps if sp.batch == "step" else 1
    return ranks_per_group(sp.scope, order.world_size) * order.micro_batch * steps


def comm_dtype(recipe: Recipe) -> torch.dtype | None:
    """What SP's features are rounded to on their way between ranks; None: nothing."""
    return torch.bfloat16 if recipe.losses.sp and recipe.losses.sp.comm_dtype == "bf16" else None


def custom_loss(section: CustomLossSection) -> Callable[..., torch.Tensor]:
    """The user's own loss. Raises UserCodeError."""
    make = load_callable(section.loss)
    try:
        loss = make(**section.options)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserCodeError(
            f"{section.loss!r} cannot be made with options {section.options}: {describe_error(error)}"
        ) from error
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


def build_objective(recipe: Recipe, order: GlobalBatchSampler, total_steps: int) -> Objective:
    """The recipe's losses, on the batches of `order`.

    Cross-entropy is always a term, if with weight 0: it is what ties the student's head to the total.
    """
    losses = recipe.losses

    def weight(value: object, factor: float = 1.0) -> Schedule:
        schedule = loss_weight(value, order.steps_per_epoch, total_steps)  # type: ignore[arg-type]
        return lambda step: factor * schedule(step)

    terms: list[Term] = [LabelTerm("ce", weight(losses.ce.weight), CrossEntropy(losses.ce.label_smoothing))]
    if losses.at is not None:
        at = losses.at
        at_loss = AttentionTransfer(at.map, at.p, at.reduction, at.norm, at.resize, at.pair_weights, at.class_tokens)
        terms.append(FeatureTerm("at", weight(at.beta), at_loss, at.paths))
    if losses.sp is not None:
        sp = losses.sp
        scale = effective_gamma(1.0, sp.reference_batch, gram_rows(recipe, order))
        sp_loss = SimilarityPreserving(sp.scope, sp.strategy, sp.pair_weights, comm_dtype(recipe), sp.floor)
        terms.append(FeatureTerm("sp", weight(sp.gamma, scale), sp_loss, sp.paths, relational=sp.batch == "step"))
    if losses.gradient_at is not None:
        section = losses.gradient_at
        gradient_loss = GradientAttention(section.form, section.squared)
        terms.append(InputGradientTerm("gradient_at", weight(section.beta), gradient_loss, section.form == "symmetric"))
    if losses.kd is not None:
        terms.append(LogitTerm("kd", weight(losses.kd.alpha), SoftTargets(losses.kd.temperature)))
    for custom in losses.custom:
        loss, share = custom_loss(custom), weight(custom.weight)
        if custom.of == "features":
            terms.append(FeatureTerm(custom.name, share, loss, custom.paths, getattr(loss, "relational", False)))
        else:
            terms.append((LogitTerm if custom.of == "logits" else LabelTerm)(custom.name, share, loss))
    return Objective(terms)


def build_mixing(recipe: Recipe) -> MixupCutmix | None:
    """Mixup and CutMix of micro-batches, or None for a recipe without them."""
    data = recipe.data
    return (
        MixupCutmix(data.classes, data.mixup, data.cutmix, engine.model_dtype(recipe))
        if data.mixup or data.cutmix
        else None
    )


def build_order(recipe: Recipe, source: ImageSource, rank: int, world_size: int) -> GlobalBatchSampler:
    """Who computes which training samples."""
    train, data = recipe.train, recipe.data
    batches = (
        len(source),
        recipe.run.seed,
        train.global_batch,
        engine.micro_batch(recipe, world_size),
        rank,
        world_size,
    )
    if isinstance(source, RowGroups):
        return StreamedBatchSampler(*batches, tuple(source.sizes.tolist()), data.stream_lanes, data.shuffle_window)
    return GlobalBatchSampler(*batches)


def data_facts(source: ImageSource) -> dict[str, Any]:
    """The number of images, and a fingerprint of what the order of samples rests on: labels, and row groups where they
    count."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    if isinstance(source, RowGroups):
        digest.update(source.sizes.tobytes())
    return {"images": len(source), "sha256": digest.hexdigest()}


def teacher_facts(recipe: Recipe, teacher: FrozenTeacher | None) -> dict[str, Any] | None:
    """Name, fingerprint and taps, or None for a recipe without a teacher."""
    if teacher is None or recipe.teacher is None:
        return None
    return {
        "name": recipe.teacher.name,
        "fingerprint": teacher.fingerprint,
        "taps": sorted({teacher for _, teacher in recipe_objects.pairs(recipe)}),
    }


def decode_into_memory(data: DataSection, source: ImageSource) -> ImageSource:
    """The training images decoded once, where `data.in_memory` allows and they fit; else the source as it is. Raises
    DataError."""
    if data.in_memory is False or data.streaming:
        return source
    try:
        decoded = in_memory(
            source, limit_bytes=None if data.in_memory is True else _most_in_memory(launch.local_world_size())
        )
    except DataError:
        if data.on_error == "raise" or data.in_memory is True:
            raise
        return source  # read one by one, broken ones are skipped
    if decoded is None and data.in_memory is True:
        raise DataError("data.in_memory is true, but the images have several sizes")
    return decoded or source


def _most_in_memory(local_world_size: int) -> int:
    """Return how many bytes of decoded images a rank keeps unasked: 1 GiB, and where memory is short, its share of an
    eighth of it. Each rank of a machine keeps its own."""
    return min(2**30, machine.memory() // 8 // local_world_size)


MOST_WORKERS = 16  # of a rank, unasked; above it, the rank itself is what takes the time


def loader_workers(data: DataSection, source: ImageSource, local_world_size: int) -> int:
    """Count the worker processes of this rank: as the recipe says; by default none for images in memory, else a share
    of the cores that the ranks of this machine may run on."""
    if data.workers != "auto":
        return data.workers
    if is_in_memory(source):
        return 0
    workers = max(1, machine.cores() // local_world_size)
    # For row groups, so many that each worker has lanes of its own (StreamedBatchSampler.readers).
    return min(TURNS, 2 ** (workers.bit_length() - 1)) if isinstance(source, RowGroups) else min(MOST_WORKERS, workers)
