"""Try what a training needs of a launch: a shared run directory, collectives, and ranks of equal speed.

Every function here is a collective: all ranks call it.
"""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from dkd import atomic_files
from dkd.commands.launch_check.findings import Facts, Findings, name_ranks
from dkd.global_batch import Link, collectives
from dkd.global_batch.collectives import all_gather_objects, make_group

_TRIAL_SECONDS = 2.0  # that the measurement of one collective takes, about
_LARGEST_MESSAGE = 2**26  # bytes
_SLOW = 2.0  # a rank that takes this many times the median slows the others down
_SIGHT_SECONDS = 5.0  # that a network file system may need to show a new file on all machines


def try_run_dir(run_dir: Path, rank: int, facts: Facts, found: Findings) -> None:
    """Check that all machines see a file that the main process writes at the place of the run, and report the free
    space there."""
    probe, reason = _write_probe(run_dir) if rank == 0 else (None, None)
    probe, reason = all_gather_objects((probe, reason))[0]
    assert probe is not None
    if reason is not None:
        found.problems.append(f"run.dir {str(run_dir)!r} cannot be written: {reason}")
        return
    end = time.monotonic() + _SIGHT_SECONDS
    while not (sees := probe.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    seen = all_gather_objects(sees)
    if rank == 0:
        with suppress(OSError):  # the file is empty and hidden
            probe.unlink()
    if not all(seen):
        blind = name_ranks([r for r, sees in enumerate(seen) if not sees], facts)
        found.problems.append(
            f"run.dir {str(run_dir)!r} of rank 0 is not seen by {blind}: checkpoints need a file system that all "
            "machines share"
        )
        return
    free = shutil.disk_usage(probe.parent).free / 2**30
    found.lines.append(f"run.dir     {run_dir}, {free:.0f} GB free, seen by all ranks")


def _write_probe(run_dir: Path) -> tuple[Path, str | None]:
    """Write an empty file at the place of the run. Returns its path, and why it could not be written, or None."""
    # The file is written in a folder that exists already, under a name that nobody has looked for: a network file
    # system remembers for a while which names it did not find.
    parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    probe = parent / f".launch-check-{uuid.uuid4().hex}"
    try:
        atomic_files.create(probe, "")
    except OSError as error:
        return probe, str(error)
    return probe, None


def try_collectives(rank: int, world_size: int, device: torch.device, found: Findings) -> None:
    """Check that the collectives of a training give the right numbers, also among some of the ranks, and report how
    fast two of them are."""
    for name, trial in _TRIALS.items():
        bad = [r for r, right in enumerate(all_gather_objects(trial(rank, world_size, device))) if not right]
        if bad:
            found.problems.append(f"{name} gives wrong numbers on rank {', '.join(map(str, bad[:8]))}")
    if found.problems:
        return
    share = (world_size - 1) / world_size  # of a message that a rank sends in an all-to-all; an all-reduce sends twice
    for name, collective, moved in (("all-reduce", _all_reduce, 2 * share), ("all-to-all", _all_to_all, share)):
        size, seconds = _measure(collective, world_size, device)
        found.lines.append(
            f"{name}  {size / 2**20:.0f} MB in {seconds * 1000:.1f} ms: each rank sends and receives "
            f"{moved * size / seconds / 1e9:.2f} GB/s"
        )


def _sums_are_right(rank: int, world_size: int, device: torch.device) -> bool:
    total = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(total)
    return bool((total == world_size * (world_size + 1) / 2).all())


def _blocks_are_right(rank: int, world_size: int, device: torch.device) -> bool:
    sent = torch.arange(world_size, dtype=torch.float32, device=device) + 1000 * rank
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    return bool((got == 1000 * torch.arange(world_size, device=device) + rank).all())


def _rows_are_right(rank: int, world_size: int, device: torch.device) -> bool:
    """Return whether a reduce-scatter and an all-gather of rows work, as losses of relations use them on GPUs."""
    numbers = torch.arange(2 * world_size, dtype=torch.float32, device=device).view(-1, 1)
    with collectives.as_on_gpus():
        reduced = collectives.reduce_scatter_rows(numbers * (rank + 1))
        gathered = collectives.all_gather_rows(reduced)
    return bool((gathered == numbers * (world_size * (world_size + 1) / 2)).all())


def _groups_are_right(rank: int, world_size: int, device: torch.device) -> bool:
    """Return whether each half of the ranks can sum alone, over connections of its own."""
    half = world_size // 2
    members = list(range(half)) if rank < half else list(range(half, world_size))
    total = torch.full((1,), float(rank), device=device)
    dist.all_reduce(total, group=make_group(members, None))
    return bool(total.item() == sum(members))


_TRIALS = {
    "all-reduce": _sums_are_right,
    "all-to-all": _blocks_are_right,
    "reduce-scatter or all-gather": _rows_are_right,
    "all-reduce within half of the ranks": _groups_are_right,
}


def measure_links(local_world_size: int, device: torch.device, found: Findings) -> dict[str, Link]:
    """Measure how fast ranks reach each other inside a machine and between machines, and report it.

    Args:
        local_world_size: ranks on each machine.
        device: of this rank.
        found: receives the lines.

    Returns:
        What there is to measure: not `between` on one machine, not `inside` with one rank on each, and nothing where
        machines have different numbers of ranks.
    """
    world, links = dist.get_world_size(), dict[str, Link]()
    if len(set(all_gather_objects(local_world_size))) > 1 or world % local_world_size:
        found.warnings.append("the speeds of links are not measured: machines have different numbers of ranks")
        return links
    if local_world_size > 1:
        # The ranks of a machine alone make their group: the other ranks need not wait for each machine.
        first = dist.get_rank() // local_world_size * local_world_size
        own = make_group(list(range(first, first + local_world_size)), None)
        links["inside"] = _measure_link(own, local_world_size, 1, device)
    if world > local_world_size:
        links["between"] = _measure_link(None, world, local_world_size, device)
    for name, link in links.items():
        found.lines.append(
            f"links       {name}: {link.bandwidth / 1e9:.2f} GB/s a rank, {link.latency * 1e6:.0f} µs to start"
        )
    return links


def _measure_link(group: dist.ProcessGroup | None, ranks: int, near: int, device: torch.device) -> Link:
    """Return the speed of an all-to-all as the slowest rank sees it, of what comes from further than `near` ranks."""

    def collective(message: torch.Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(message), message, group=group)

    latency = _measure_latency(collective, ranks, device) * 2 / (1 + math.log2(ranks))
    size, seconds = _measure(collective, ranks, device)
    # A large message takes longer than a small one; where noise hides that, half of its time is taken to be wire.
    return Link(latency, size * (ranks - near) / ranks / max(seconds - latency, seconds / 2))


def _measure_latency(collective: Callable[[torch.Tensor], None], ranks: int, device: torch.device) -> float:
    """Return the seconds of a small collective between computations, as in a step: threads that have waited take longer
    to answer than in a loop of collectives alone."""
    small = torch.zeros(ranks, device=device)
    matrix = torch.randn(192 if device.type == "cpu" else 2048, 192 if device.type == "cpu" else 2048, device=device)

    def compute(message: torch.Tensor) -> None:
        for _ in range(8):
            matrix @ matrix

    def both(message: torch.Tensor) -> None:
        for _ in range(8):
            compute(message)
            collective(message)

    def alone(message: torch.Tensor) -> None:
        for _ in range(8):
            compute(message)

    collective(small)
    found = [_time_slowest(both, small) - _time_slowest(alone, small) for _ in range(5)]
    return max(sorted(found)[2] / 8, 1e-6)


def _all_reduce(message: torch.Tensor) -> None:
    dist.all_reduce(message)


def _all_to_all(message: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(message), message)


def _measure(collective: Callable[[torch.Tensor], None], world_size: int, device: torch.device) -> tuple[int, float]:
    """Return the bytes of the largest message that fits the time of a trial, and the seconds of the slowest rank."""
    size = 2**16
    while True:
        message = torch.zeros(size // 4 // world_size * world_size, device=device)
        collective(message)  # connections are opened in the first call, which is not measured
        seconds = _time_slowest(collective, message)
        if size >= _LARGEST_MESSAGE or 6 * seconds > _TRIAL_SECONDS / 2:
            return message.numel() * 4, min(seconds, _time_slowest(collective, message))
        size *= 4


def _time_slowest(collective: Callable[[torch.Tensor], None], message: torch.Tensor) -> float:
    """Return the seconds that the slowest rank takes for one call."""
    _synchronize(message.device)
    dist.barrier()
    begun = time.perf_counter()
    collective(message)
    _synchronize(message.device)
    return max(all_gather_objects(time.perf_counter() - begun))


def compare_speed(device: torch.device, facts: Facts, found: Findings) -> None:
    """Multiply the same matrices on all ranks at once, as in training, and report ranks that are far slower than the
    median: the other ranks would wait for them."""
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.randn(side, side, device=device)
    times = []
    for _ in range(5):
        _synchronize(device)
        begun = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    ranks = all_gather_objects(min(times))
    median = sorted(ranks)[len(ranks) // 2]
    slow = [rank for rank, seconds in enumerate(ranks) if seconds > _SLOW * median]
    found.lines.append(f"compute     {2 * side**3 / median / 1e9:.0f} GFLOP/s a rank, float32, in the median")
    if slow:
        found.warnings.append(
            f"{name_ranks(slow, facts)} computes up to {max(ranks) / median:.1f} times slower than the median: the "
            "others will wait for it"
        )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
