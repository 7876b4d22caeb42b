"""Whether a launch can train: every rank there, alike, and able to talk to every other. Under a minute, before a long
job begins."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dkd
from dkd import atomic_files, console, launch
from dkd.checkpoints.facts import recipe_hash
from dkd.config import Recipe, RecipeError
from dkd.distributed import process_group
from dkd.distributed.rendezvous import Refused, RendezvousError
from dkd.engines import engine
from dkd.global_batch.collectives import all_gather_objects
from dkd.preflight import checks, hardware
from dkd.provenance import packages
from dkd.text import first_line

_BUDGET = 2.0  # seconds that one measurement takes, about
_LARGEST = 2**26  # bytes of one message
_SLOW = 2.0  # times the median: a rank that computes so slowly holds up the others


Facts = Sequence[Mapping[str, Any]]  # one a rank


@dataclass
class Findings:
    """What was found, the same on every rank."""

    lines: list[str] = field(default_factory=list)
    """What there is, in words."""
    problems: list[str] = field(default_factory=list)
    """What is wrong: one clear sentence each."""
    warnings: list[str] = field(default_factory=list)


def check_launch(recipe: Recipe | None, seconds: float = 50.0) -> Findings:
    """Opens the process group and tries it. A collective.

    Args:
        recipe: what is to be trained; its hash, its data's files and the place of its run are compared. None: nothing
            of that.
        seconds: after which this process ends, with exit code 1 and what it was about.

    Raises:
        RecipeError: what is wrong with the recipe or the engine, on this rank or another.
        RuntimeError: a rank did not come, or cannot be talked to. Says so.
    """
    with _Limit(seconds) as limit:
        with process_group.tells_refusals():
            launch.engine()
            if recipe is not None:
                checks.check(recipe, allow_recipe_change=True)
        on_cpu = not engine.has_gpu() or launch.asks_for_cpu()
        limit.phase = "waiting for all ranks"
        if not on_cpu and launch.local_world_size() > torch.accelerator.device_count():
            with process_group.tells_refusals():
                raise RecipeError.at(
                    "",
                    f"{launch.local_world_size()} processes on {platform.node()}, which has "
                    f"{torch.accelerator.device_count()} GPUs",
                )
        try:
            process_group.open_process_group(on_cpu, seconds - 5)
        except Refused as refused:
            raise RecipeError.at("", refused) from refused
        except RendezvousError:
            raise
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = f"nothing answers at {address}, where rank 0's launcher should be ({first_line(error)})"
            raise RuntimeError(f"{platform.node()}: {reason}") from error
        except RuntimeError as error:
            raise RuntimeError(
                f"{platform.node()}: the ranks meet at {os.environ.get('MASTER_ADDR')}, but cannot connect to each "
                "other "
                f"({first_line(error)}); is a firewall between them? "
                "Name the network that joins them in GLOO_SOCKET_IFNAME, and with GPUs in NCCL_SOCKET_IFNAME"
            ) from error
        limit.phase = "comparing ranks"
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        device = torch.device("cpu" if on_cpu else torch.accelerator.current_accelerator() or "cpu")
        found = Findings()
        facts = all_gather_objects(_facts(recipe, device))
        compare(facts, found)
        found.lines += _precision(device, recipe)
        if recipe is not None:
            _look_for_run_dir(Path(recipe.run.dir), rank, facts, found)
        if world_size > 1 and not found.problems:
            limit.phase = "trying all-reduce and all-to-all"
            _try_collectives(rank, world_size, device, found)
        limit.phase = "comparing how fast ranks compute"
        _compare_speed(device, facts, found)
        return found


def _precision(device: torch.device, recipe: Recipe | None) -> list[str]:
    """What train.precision=auto means on these ranks, or what is wrong with the one asked for. A collective."""
    ranks = all_gather_objects(hardware.probe(device.type))
    if recipe is not None and recipe.train.precision != "auto":
        _, lines = hardware.settled(recipe, ranks)
        return [f"precision   {recipe.train.precision}, as the recipe says", *(f"precision   {line}" for line in lines)]
    choice = hardware.choose(ranks, engine.can_scale_losses(launch.engine()))
    return [f"precision   auto is {choice.precision} here: {choice.reason}"]


class _Limit:
    """Ends this process when its time is over. Some of what a library waits for knows no timeout."""

    def __init__(self, seconds: float) -> None:
        self.phase, self._seconds = "checking the recipe", seconds
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> _Limit:
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        rank = os.environ.get("RANK", "0")
        said = f"rank {rank} on {platform.node()} was still {self.phase} after {self._seconds:g} s"
        console.say(f"dkd: launch-check: {said}")
        os._exit(1)


def _facts(recipe: Recipe | None, device: torch.device) -> dict[str, Any]:
    """What one rank is."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "engine": launch.engine(),
        "device": device.type,
        "device_name": _device_name(device),
        "device_id": None,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "code": _hash_of_code(),
        **{f"package {name}": version for name, version in packages().items()},
        "clock": time.time(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["device_id"] = str(getattr(properties, "uuid", torch.cuda.current_device()))
        facts["memory"] = round(properties.total_memory / 2**30)
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if recipe is not None:
        facts["recipe"] = recipe_hash(recipe)[:12]
    return facts


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()


def _hash_of_code() -> str:
    """Of the package that runs: a machine with an older copy would train another thing."""
    folder = Path(dkd.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


_MUST_AGREE = ("engine", "device", "nccl", "python", "code", "recipe")
_SHOULD_AGREE = ("device_name", "memory")


def compare(facts: Facts, found: Findings) -> None:
    """Ranks that are not alike, devices that two ranks share.

    Args:
        facts: `_facts` of every rank, in their order.
        found: is added to.
    """
    keys = [*_MUST_AGREE, *_SHOULD_AGREE, *(key for key in facts[0] if key.startswith("package "))]
    for key in keys:
        values: dict[Any, list[int]] = {}
        for rank, fact in enumerate(facts):
            values.setdefault(fact.get(key), []).append(rank)
        if len(values) > 1:
            told = "; ".join(f"{value} on {_ranks(ranks, facts)}" for value, ranks in values.items())
            told_of = found.warnings if key in _SHOULD_AGREE else found.problems
            told_of.append(
                f"{_WORDS.get(key, key.removeprefix('package '))} differ{'s' if key not in _PLURAL else ''}: {told}"
            )
    seen: dict[tuple[str, Any], int] = {}
    for rank, fact in enumerate(facts):
        if fact["device_id"] is not None:
            other = seen.setdefault((fact["host"], fact["device_id"]), rank)
            if other != rank:
                found.problems.append(
                    f"rank {other} and rank {rank} have the same GPU of {fact['host']}: give each process one of its "
                    "own"
                )
    clocks = [fact["clock"] for fact in facts]
    if max(clocks) - min(clocks) > 60:
        late = facts[clocks.index(min(clocks))]["host"]
        found.warnings.append(
            f"clocks differ by {max(clocks) - min(clocks):.0f} s, or ranks came so late; {late} is behind"
        )
    hosts: dict[str, int] = {}
    for fact in facts:
        hosts[fact["host"]] = hosts.get(fact["host"], 0) + 1
    found.lines.append(f"ranks       {len(facts)}: " + ", ".join(f"{count} on {host}" for host, count in hosts.items()))
    if len(set(hosts.values())) > 1:
        found.warnings.append(
            "machines have different numbers of ranks: sp.scope=node and teacher.mesh=node need the same on each"
        )
    memory = f", {facts[0]['memory']} GB" if "memory" in facts[0] else ""
    found.lines.append(
        f"devices     {facts[0]['device']} ({facts[0]['device_name']}{memory}), engine {facts[0]['engine']}"
    )
    versions = {
        key.removeprefix("package "): value for key, value in facts[0].items() if key.startswith("package ") and value
    }
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    found.lines.append(f"software    Python {facts[0]['python']}, {told}")
    found.lines.append(
        f"code        {facts[0]['code']}" + (f", recipe {facts[0]['recipe']}" if "recipe" in facts[0] else "")
    )


_WORDS = {
    "code": "the code of dkd",
    "recipe": "the recipe",
    "device": "the kind of device",
    "device_name": "the devices",
    "memory": "GPU memory (GB)",
}
_PLURAL = ("device_name",)


def _ranks(ranks: list[int], facts: Facts) -> str:
    """rank 0, 1 (node1)"""
    hosts = list(dict.fromkeys(facts[rank]["host"] for rank in ranks))
    shown = [
        ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else ""),
        ", ".join(hosts[:4]) + (" …" if len(hosts) > 4 else ""),
    ]
    return f"rank {shown[0]} ({shown[1]})"


def _look_for_run_dir(run_dir: Path, rank: int, facts: Facts, found: Findings) -> None:
    """Whether all machines see what the main process writes at the place of the run, and have room there."""
    probe, reason = None, None
    if rank == 0:
        # In a folder that is there already, under a name that nobody has looked for: a file system over a network
        # remembers for a while what it did not find.
        parent = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
        probe = parent / f".launch-check-{uuid.uuid4().hex}"
        try:
            atomic_files.create(probe, "")
        except OSError as error:
            reason = str(error)
    probe, reason = all_gather_objects((probe, reason))[0]
    assert probe is not None
    if reason is not None:
        found.problems.append(f"run.dir {str(run_dir)!r} cannot be written: {reason}")
        return
    end = time.monotonic() + 5
    while not (sees := probe.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    seen = all_gather_objects(sees)
    if rank == 0:
        with suppress(OSError):  # it is empty, and hidden
            probe.unlink()
    if not all(seen):
        blind = _ranks([r for r, sees in enumerate(seen) if not sees], facts)
        found.problems.append(
            f"run.dir {str(run_dir)!r} of rank 0 is not seen by {blind}: checkpoints need a file system that all "
            "machines share"
        )
        return
    found.lines.append(
        f"run.dir     {run_dir}, {shutil.disk_usage(probe.parent).free / 2**30:.0f} GB free, seen by all ranks"
    )


def _try_collectives(rank: int, world_size: int, device: torch.device, found: Findings) -> None:
    """All-reduce and all-to-all give the right numbers; how fast they are."""
    total = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(total)
    wrong = not bool((total == world_size * (world_size + 1) / 2).all())
    sent = torch.arange(world_size, dtype=torch.float32, device=device) + 1000 * rank
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    wrong_blocks = not bool((got == 1000 * torch.arange(world_size, device=device) + rank).all())
    for name, flags in (("all-reduce", all_gather_objects(wrong)), ("all-to-all", all_gather_objects(wrong_blocks))):
        bad = [r for r, flag in enumerate(flags) if flag]
        if bad:
            found.problems.append(f"{name} gives wrong numbers on rank {', '.join(map(str, bad[:8]))}")
    if found.problems:
        return
    for name, collective in (("all-reduce", _all_reduce), ("all-to-all", _all_to_all)):
        size, seconds = _measured(collective, world_size, device)
        moved = {"all-reduce": 2 * (world_size - 1) / world_size, "all-to-all": (world_size - 1) / world_size}[
            name
        ] * size
        found.lines.append(
            f"{name}  {size / 2**20:.0f} MB in {seconds * 1000:.1f} ms: each rank sends and receives "
            f"{moved / seconds / 1e9:.2f} GB/s"
        )


def _all_reduce(message: torch.Tensor) -> None:
    dist.all_reduce(message)


def _all_to_all(message: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(message), message)


def _measured(collective: Callable[[torch.Tensor], None], world_size: int, device: torch.device) -> tuple[int, float]:
    """Bytes of the largest message that fits the time there is, and seconds it took, on the slowest rank."""
    size = 2**16
    while True:
        message = torch.zeros(size // 4 // world_size * world_size, device=device)
        collective(message)  # what is set up when first used does not count
        seconds = _slowest(collective, message)
        if size >= _LARGEST or 6 * seconds > _BUDGET / 2:
            return message.numel() * 4, min(seconds, _slowest(collective, message))
        size *= 4


def _slowest(collective: Callable[[torch.Tensor], None], message: torch.Tensor) -> float:
    _finish(message.device)
    dist.barrier()
    begun = time.perf_counter()
    collective(message)
    _finish(message.device)
    return max(all_gather_objects(time.perf_counter() - begun))


def _compare_speed(device: torch.device, facts: Facts, found: Findings) -> None:
    """All ranks multiply the same matrices, at once, as in training. One that is far slower than the others would hold
    them up."""
    matrix = torch.randn(512 if device.type == "cpu" else 4096, 512 if device.type == "cpu" else 4096, device=device)
    times = []
    for _ in range(5):
        _finish(device)
        begun = time.perf_counter()
        matrix @ matrix
        _finish(device)
        times.append(time.perf_counter() - begun)
    ranks = all_gather_objects(min(times))
    median = sorted(ranks)[len(ranks) // 2]
    slow = [rank for rank, seconds in enumerate(ranks) if seconds > _SLOW * median]
    found.lines.append(
        f"compute     {2 * matrix.shape[0] ** 3 / median / 1e9:.0f} GFLOP/s a rank, float32, in the median"
    )
    if slow:
        found.warnings.append(
            f"{_ranks(slow, facts)} computes up to {max(ranks) / median:.1f} times slower than the median: the others "
            "will wait for it"
        )


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
