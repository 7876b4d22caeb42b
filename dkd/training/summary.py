"""What is reported of a training before it begins."""

from __future__ import annotations

from collections.abc import Iterator

from dkd import machine
from dkd.build.data import DataParts
from dkd.config import Recipe
from dkd.config.derived import teacher_views
from dkd.data import DeviceTrainLoader, GlobalBatchSampler, ImageSource, RowGroups, StreamedBatchSampler, is_in_memory
from dkd.data.jpeg import jpeg_decoder
from dkd.data.sampler import TURNS
from dkd.distillation import LazyTeacher, OneTeacher, TeacherGroup
from dkd.distillation.teacher_group import members_of
from dkd.engines.base import Engine
from dkd.engines.sharded_weights import parameter_counts
from dkd.launch import Launch
from dkd.training.schedule import RunSchedule


def summarize(
    recipe: Recipe,
    launch: Launch,
    data: DataParts,
    training: ImageSource,
    schedule: RunSchedule,
    engine: Engine,
    teacher: OneTeacher | TeacherGroup | None,
) -> Iterator[str]:
    """Yield lines: sizes, launch and batches, and what of the recipe makes the result depend on the number of ranks.

    Args:
        training: the training images.
    """
    train, local = recipe.train, launch.local_world_size
    sampler, workers = data.sampler, data.workers
    processes = f"{sampler.world_size} process{'es' if sampler.world_size > 1 else ''}"
    ranks = f"{sampler.world_size} ranks × {sampler.micro_steps} micro-steps"
    batch = f"{train.global_batch} = {sampler.micro_batch} × {ranks}"
    steps = f"{schedule.steps_per_epoch} steps an epoch, {schedule.total_steps} in all"
    yield (
        f"{recipe.run.name}: {_count(parameter_counts(engine.model.model))}, {processes} of {launch.engine} on "
        f"{engine.device.type}, {train.precision}; global batch {batch}; {steps}"
    )
    yield from _list_other_parameters(recipe, engine, teacher)
    yield from _describe_epoch(sampler)
    if len(data.pipeline.sizes) > 1:
        yield f"training images: {data.pipeline.describe_sizes()} pixels"
    if data.validation is None:
        yield "data.validation is null: the student is not evaluated"
    if not is_in_memory(training):
        who = (
            f"{workers} worker process{'es' if workers > 1 else ''} of each rank" if workers else "the ranks themselves"
        )
        yield f"images are loaded by {who}, JPEG files decoded by {jpeg_decoder().name}"
    if isinstance(data.train_loader, DeviceTrainLoader):
        held = data.train_loader.images
        yield f"the training images are held by {held.device}, {held.bytes / 1e6:.0f} MB"
    of_validation = 0 if data.validation is None else data.validation.shared_bytes
    batch_memory = data.train_loader.shared_bytes + of_validation
    if batch_memory * local > machine.memory() / 4:
        yield (
            f"warning: batches that are loaded ahead take up to {batch_memory * local / 1e9:.1f} GB of this machine's "
            f"{machine.memory() / 1e9:.0f} GB; fewer data.workers, or smaller train.micro_batch and evaluation.batch, "
            "need less"
        )
    if isinstance(sampler, StreamedBatchSampler) and isinstance(training, RowGroups):
        yield from summarize_streaming(sampler, training, workers, local)
    yield from _warn(recipe, sampler, schedule.total_steps)


def _describe_epoch(sampler: GlobalBatchSampler) -> Iterator[str]:
    left_out = sampler.samples - sampler.steps_per_epoch * sampler.global_batch
    if sampler.repeats > 1:
        yield (
            f"each epoch has {sampler.images_per_epoch} of {sampler.samples} images, drawn anew, "
            f"{sampler.repeats} times each"
        )
    elif left_out:
        yield (
            f"each epoch leaves out {left_out} of {sampler.samples} samples, drawn anew; training batches are always "
            "full"
        )


def _list_other_parameters(recipe: Recipe, engine: Engine, teacher: OneTeacher | TeacherGroup | None) -> Iterator[str]:
    own = recipe.optimizer.adapters
    settings = [f"learning rate {own.lr:g}"] if own.lr is not None else []
    settings += [f"weight decay {own.weight_decay:g}"] if own.weight_decay is not None else []
    with_settings = f" ({', '.join(settings)})" if settings else ""
    for name, module in engine.model.named_adapters().items():
        count = _count(parameter_counts(module))
        yield f"the loss {name} trains {count} of its own{with_settings}, which are no part of the student"
    members = members_of(teacher)
    for name, view in teacher_views(recipe):
        assert view.teacher is not None
        what = f"teacher {name}, {view.teacher.name}" if name else f"teacher {view.teacher.name}"
        member = members[name]
        if isinstance(member, LazyTeacher) and not member.is_built:
            yield f"{what}: not built, unless an output is missing in its cache"
        else:
            yield f"{what}: {_count(parameter_counts(member))}, {view.teacher.placement}"


def _warn(recipe: Recipe, sampler: GlobalBatchSampler, steps: int) -> Iterator[str]:
    for _, section in recipe.losses.compared:
        if section.scope != "global" or (section.batch == "micro" and sampler.micro_steps > 1):
            yield (
                f"note: {section.title} with scope {section.scope} and batch {section.batch} sees part of the global "
                "batch: it depends on the number of ranks"
            )
    queue = recipe.losses.queue
    if queue is not None and queue.size > steps * recipe.train.global_batch:
        yield (
            f"note: losses.queue.size={queue.size} vectors, of which the run's {steps} steps replace "
            f"{steps * recipe.train.global_batch}; the others stay random: take a smaller queue"
        )
    for name, view in teacher_views(recipe):
        if view.teacher is not None and view.teacher.weights == "random":
            whose = f" ({name})" if name else ""
            yield f"warning: the teacher's weights are random, as the recipe states; it teaches nothing{whose}"


def summarize_streaming(
    order: StreamedBatchSampler, training: RowGroups, workers: int, local_world_size: int
) -> Iterator[str]:
    """Yield lines of what a streamed data set costs, and where other settings would cost less."""
    held = max(1, workers) * order.row_groups_of_a_worker(workers) * training.bytes_per_group
    on_machine = held * local_world_size
    memory = machine.memory()
    groups, lanes = len(order.group_sizes), order.slices * TURNS
    yield (
        f"streaming: {groups} row group{'s' if groups > 1 else ''} in an order drawn anew each epoch, {lanes} lanes, "
        f"rows shuffled within windows of {order.window}: the same for any number of ranks and workers, and exact when "
        f"resumed. This rank's workers hold up to {held / 1e6:.0f} MB of encoded images"
    )
    if on_machine > memory / 4:
        yield (
            f"warning: all ranks of this machine hold up to {on_machine / 1e9:.0f} GB so, of its {memory / 1e9:.0f} "
            "GB; fewer data.stream_lanes (in a new run) or files with smaller row groups need less"
        )
    readers = order.readers(workers)
    if groups < lanes:
        yield (
            f"note: {groups} row group{'s' if groups > 1 else ''} for {lanes} lanes: several worker processes read and "
            "hold the same ones; files with row groups of 100 to 1000 images are read once and need less memory"
        )
    elif order.repeats > 1:
        yield f"note: up to {readers} worker processes read the same row groups, for the copies of their images"
    elif readers > 1:
        lanes = TURNS * order.global_batch // order.micro_batch
        yield (
            f"note: {readers} worker processes read the same row groups; with data.stream_lanes={lanes} or a multiple "
            f"(in a new run) and data.workers={TURNS} each has its own"
        )


def _count(parameters: tuple[int, int]) -> str:
    local, total = parameters
    return f"{total:,} parameters" + (f", {local:,} on this rank" if local < total else "")
