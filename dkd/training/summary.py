"""What is said of a training before it begins."""

from __future__ import annotations

from collections.abc import Iterator

from dkd import launch, machine
from dkd.config import Recipe
from dkd.data import GlobalBatchSampler, ImageSource, RowGroups, StreamedBatchSampler, is_in_memory
from dkd.data.jpeg import jpeg_decoder
from dkd.data.sampler import TURNS
from dkd.distillation import FrozenTeacher
from dkd.engines.sharded_weights import parameter_counts


def announcement(
    recipe: Recipe,
    order: GlobalBatchSampler,
    training: ImageSource,
    workers: int,
    parameters: tuple[int, int],
    teacher: FrozenTeacher | None,
    device: str,
    total_steps: int,
    batch_memory: int = 0,
) -> Iterator[str]:
    """Lines: sizes, launch and batches, and what of the recipe makes the result depend on the number of ranks.

    Args:
        workers: processes of this rank that load training images.
        parameters: of the student, kept on this rank and in all.
        device: its type.
        batch_memory: bytes that this rank shares with its worker processes, at most.
    """
    train = recipe.train
    processes = f"{order.world_size} process{'es' if order.world_size > 1 else ''}"
    batch = f"{train.global_batch} = {order.micro_batch} × {order.world_size} ranks × {order.micro_steps} micro-steps"
    yield (
        f"{recipe.run.name}: {_counted(parameters)}, {processes} of {launch.engine()} on {device}, {train.precision}; "
        f"global batch {batch};"
        f" {order.steps_per_epoch} steps an epoch, {total_steps} in all"
    )
    if teacher is not None and recipe.teacher is not None:
        yield f"teacher {recipe.teacher.name}: {_counted(parameter_counts(teacher))}, {recipe.teacher.placement}"
    left_out = order.samples - order.steps_per_epoch * order.global_batch
    if left_out:
        yield f"each epoch leaves out {left_out} of {order.samples} samples, drawn anew; training batches are always full"
    if not is_in_memory(training):
        who = (
            f"{workers} worker process{'es' if workers > 1 else ''} of each rank" if workers else "the ranks themselves"
        )
        yield f"images are loaded by {who}, JPEG files decoded by {jpeg_decoder().name}"
    if batch_memory * launch.local_world_size() > machine.memory() / 4:
        yield (
            f"warning: batches that are loaded ahead take up to {batch_memory * launch.local_world_size() / 1e9:.1f} "
            "GB of this machine's "
            f"{machine.memory() / 1e9:.0f} GB; fewer data.workers, or smaller train.micro_batch and evaluation.batch, "
            "need less"
        )
    if isinstance(order, StreamedBatchSampler) and isinstance(training, RowGroups):
        yield from _streaming(order, training, workers)
    sp = recipe.losses.sp
    if sp is not None and (sp.scope != "global" or (sp.batch == "micro" and order.micro_steps > 1)):
        yield f"note: SP with scope {sp.scope} and batch {sp.batch} sees part of the global batch: it depends on the number of ranks"
    if recipe.teacher is not None and recipe.teacher.weights == "random":
        yield "warning: the teacher's weights are random, as the recipe says; it teaches nothing"


def _streaming(order: StreamedBatchSampler, training: RowGroups, workers: int) -> Iterator[str]:
    held = max(1, workers) * order.row_groups_of_a_worker(workers) * training.bytes_per_group
    on_machine = held * launch.local_world_size()
    memory = machine.memory()
    groups, lanes = len(order.group_sizes), order.slices * TURNS
    yield (
        f"streaming: {groups} row group{'s' if groups > 1 else ''} in an order drawn anew each epoch, {lanes} lanes, "
        "rows shuffled "
        f"within windows of {order.window}: the same for any number of ranks and workers, and exact when resumed. This "
        "rank's workers hold "
        f"up to {held / 1e6:.0f} MB of encoded images"
    )
    if on_machine > memory / 4:
        yield (
            f"warning: all ranks of this machine hold up to {on_machine / 1e9:.0f} GB so, of its {memory / 1e9:.0f} "
            "GB; fewer "
            "data.stream_lanes (in a new run) or files with smaller row groups need less"
        )
    readers = order.readers(workers)
    if groups < lanes:
        yield (
            f"note: {groups} row group{'s' if groups > 1 else ''} for {lanes} lanes: several worker processes read and "
            "hold the same ones; "
            "files with row groups of 100 to 1000 images are read once and need less memory"
        )
    elif readers > 1:
        lanes = TURNS * order.global_batch // order.micro_batch
        yield (
            f"note: {readers} worker processes read the same row groups; with data.stream_lanes={lanes} or a multiple "
            "(in a new run) and "
            f"data.workers={TURNS} each has its own"
        )


def _counted(parameters: tuple[int, int]) -> str:
    local, total = parameters
    return f"{total:,} parameters" + (f", {local:,} on this rank" if local < total else "")
