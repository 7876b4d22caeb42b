"""SP over the global batch: what each way moves, takes and holds.

    python -m benchmarks.global_batch            2, 4 and 8 ranks, over loopback and over a 1 Gbit/s link (needs root)
    python -m benchmarks.global_batch --worlds 8 --links loopback --shapes layer4

Forward and backward of SimilarityPreserving on random features, on the CPU with gloo, one thread a rank, in these ways:

    common      common practice: a differentiable all-gather of the features (its backward is a reduce-scatter), then
                the whole B×B Gram
                matrix and loss on every rank
    gather, exchange, auto      this package's

Bytes are counted at the collective calls, memory by following every tensor that is allocated. Times are medians over
rounds of the slowest rank, the ways in turn within each round. On the second link the ranks are in two network
namespaces, half of them in each, joined by a link that lets 1 Gbit/s through.

Exit code 1 when bytes are not those of the formula, when the ways disagree on loss or gradient, or when `exchange` is
not at least 4 times as fast as common practice for layer4 on 8 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dkd import SimilarityPreserving
from dkd.global_batch import BatchLayout, GramTensor, cheapest_strategies, collectives, received_bytes
from dkd.global_batch.cost import held

# Rows a rank, and (student, teacher) features of each pair.
SHAPES: dict[str, tuple[str, int, list[tuple[int, int]]]] = {
    "layer4": ("ResNet-34 → ResNet-18, layer4", 32, [(25088, 25088)]),
    "layer3": ("ResNet-34 → ResNet-18, layer3", 32, [(50176, 50176)]),
    "pooled": ("pooled features, 2,048", 64, [(2048, 2048)]),
    "wrn3": ("WRN-16-2 → WRN-16-1, block3", 64, [(4096, 8192)]),
    "wrn": ("the same, block1 to block3", 32, [(16384, 32768), (8192, 16384), (4096, 8192)]),
}
WAYS = ("common", "gather", "exchange", "auto")
LINKS = ("loopback", "1gbit")
NEEDED_SPEEDUP = 4.0
SHORT = 0.05  # seconds; what takes less is measured five times as often
LARGEST_DISAGREEMENT = 1e-4  # of loss and gradient in float32, relative; sums over 50,000 features in another order


# torch 2.14 has new names for these two, and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherWithGradient(torch.autograd.Function):
    """What `torch.distributed.nn.functional.all_gather` did, by the faster flat collectives."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(dist.get_world_size() * len(rows), rows.shape[1])
        collectives.count(out)
        _all_gather(out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        out = grads[0].new_empty(len(grads[0]) // dist.get_world_size(), grads[0].shape[1])
        collectives.count(grads[0])
        _reduce_scatter(out, grads[0].contiguous())
        return out


def common_practice(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> torch.Tensor:
    """L_SP of the gathered batch, the same on every rank. Its gradient is summed over ranks, as ours times W is."""
    total = torch.zeros(())
    for student, teacher in zip(students, teachers, strict=True):
        s, t = _GatherWithGradient.apply(student), _GatherWithGradient.apply(teacher)
        total = total + (F.normalize(t @ t.T) - F.normalize(s @ s.T)).square().sum() / len(s) ** 2
    return total


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors allocated inside and alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes in was there before, or was counted when it came out.
        for value in args:
            if isinstance(value, torch.Tensor):
                self._seen.add(value.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


def gram_tensors(pairs: list[tuple[int, int]]) -> list[GramTensor]:
    return [*(GramTensor(s, True) for s, _ in pairs), *(GramTensor(t, False) for _, t in pairs)]


def strategies_of(way: str, tensors: list[GramTensor], rows: int, world: int) -> tuple[str, ...]:
    return cheapest_strategies(tensors, rows, world) if way == "auto" else (way,) * len(tensors)


def expected_bytes(way: str, rows: int, pairs: list[tuple[int, int]], world: int) -> int:
    """Bytes that a rank receives, by the formulas of docs/explanations/global_batch.md."""
    tensors = gram_tensors(pairs)
    if way == "common":
        return sum((world - 1) * rows * t.width * 4 * (1 + t.backward) for t in tensors)
    strategies = strategies_of(way, tensors, rows, world)
    return sum(received_bytes(s, t, rows, world) for s, t in zip(strategies, tensors, strict=True))


def expected_memory(way: str, rows: int, pairs: list[tuple[int, int]], world: int) -> int:
    """Bytes that a rank holds at once at most, by the formulas of docs/explanations/global_batch.md."""
    if way == "common":
        # All features, the gathered gradient in two terms, and Gram matrices.
        batch = rows * world
        return 4 * sum(batch * (s + max(t, 2 * s)) + 4 * batch**2 for s, t in pairs)
    tensors = gram_tensors(pairs)
    return held(strategies_of(way, tensors, rows, world), tensors, rows, world).bytes


def worker(options: argparse.Namespace) -> None:
    """One rank: measures every shape and way; rank 0 writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    found = {shape: measure(*SHAPES[shape][1:], world, rank, options.rounds) for shape in options.shapes}
    if rank == 0:
        Path(options.worker).write_text(json.dumps(found))
    dist.barrier()
    # At once. A thread of gloo that still has to let go of a tensor when the interpreter shuts down aborts the process,
    # after all is done.
    os._exit(0)


def measure(rows: int, pairs: list[tuple[int, int]], world: int, rank: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    students = [torch.randn(rows, s, generator=generator).relu().requires_grad_() for s, _ in pairs]
    teachers = [torch.randn(rows, t, generator=generator).relu() for _, t in pairs]
    layout = BatchLayout.even(rows)

    def run(way: str, comm_dtype: torch.dtype | None = None) -> torch.Tensor:
        for student in students:
            student.grad = None
        if way == "common":
            loss = common_practice(students, teachers)
        else:
            loss = SimilarityPreserving(strategy=way, comm_dtype=comm_dtype)(students, teachers, layout=layout)
        loss.backward()
        return loss.detach()

    def gradient() -> torch.Tensor:
        return torch.cat([student.grad.flatten() for student in students])  # type: ignore[union-attr]

    ways: dict[str, Any] = {}
    wanted: tuple[torch.Tensor, torch.Tensor] | None = None
    for way in WAYS:
        with collectives.count_received() as counted, PeakMemory() as memory:
            value = run(way)
        value = mean_over_ranks(value)
        wanted = wanted or (value, gradient())
        ways[way] = {
            "bytes": counted.bytes,
            "collectives": counted.collectives,
            "strategies": [] if way == "common" else strategies_of(way, gram_tensors(pairs), rows, world),
            "expected_bytes": expected_bytes(way, rows, pairs, world),
            "memory": int(max_over_ranks(memory.peak)),
            "expected_memory": expected_memory(way, rows, pairs, world),
            "disagreement": max_over_ranks(max(relative(value, wanted[0]), relative(gradient(), wanted[1]))),
            "seconds": [],
        }
    while len(ways["auto"]["seconds"]) < rounds * (5 if ways["auto"]["seconds"][:1] < [SHORT] else 1):
        for way in WAYS:
            ways[way]["seconds"].append(timed(partial(run, way)))
    assert wanted is not None
    value = run("exchange", torch.bfloat16)
    bf16 = [
        max_over_ranks(relative(mean_over_ranks(value), wanted[0])),
        max_over_ranks(relative(gradient(), wanted[1])),
    ]
    return {"ways": ways, "bf16": bf16}


def timed(run: Callable[[], Any]) -> float:
    dist.barrier()
    started = time.perf_counter()
    run()
    return max_over_ranks(time.perf_counter() - started)


def max_over_ranks(value: float) -> float:
    numbers = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.item()


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(value)
    return value / dist.get_world_size()


def relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((value - wanted).norm() / wanted.norm()).item()


@contextmanager
def two_namespaces() -> Iterator[list[tuple[list[str], str, str]]]:
    """Two network namespaces joined by a link of 1 Gbit/s: for each the command prefix, its interface, and the first
    one's address."""
    names = [f"dkd{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            ["ip", "link", "add", "lnk0", "netns", names[0], "type", "veth", "peer", "name", "lnk1", "netns", names[1]],
            check=True,
        )
        for i, name in enumerate(names):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
            subprocess.run([*inside, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"lnk{i}"], check=True)
            subprocess.run([*inside, "link", "set", f"lnk{i}", "up"], check=True)
            shape = [
                "tc",
                "-n",
                name,
                "qdisc",
                "add",
                "dev",
                f"lnk{i}",
                "root",
                "tbf",
                "rate",
                "1gbit",
                "burst",
                "64kb",
                "latency",
                "200ms",
            ]
            subprocess.run(shape, check=True)
        yield [(["nsenter", f"--net=/var/run/netns/{name}"], f"lnk{i}", "10.77.0.1") for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def launch(world: int, link: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure on `world` ranks over one link."""
    result = folder / f"{link}_{world}.json"
    worker_command = [
        "-m",
        "benchmarks.global_batch",
        "--worker",
        str(result),
        "--rounds",
        str(options.rounds),
        "--shapes",
        *options.shapes,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if link == "loopback":
        commands = [([*torchrun, "--standalone", "--nproc_per_node", str(world), *worker_command], environment)]
        return _run(commands, result)
    with two_namespaces() as sides:
        commands = []
        for node, (prefix, interface, address) in enumerate(sides):
            place = ["--nnodes", "2", "--node_rank", str(node), "--master_addr", address, "--master_port", "29400"]
            command = [*prefix, *torchrun, *place, "--nproc_per_node", str(world // 2), *worker_command]
            commands.append((command, {**environment, "GLOO_SOCKET_IFNAME": interface}))
        return _run(commands, result)


def _run(commands: list[tuple[list[str], dict[str, str]]], result: Path) -> dict[str, Any]:
    processes = [
        subprocess.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c, e in commands
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"a measurement failed:\n{output[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def why_no_namespaces() -> str:
    """Why the second link cannot be had here; empty when it can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (iproute2, util-linux)"
    try:
        with two_namespaces():
            return ""
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces cannot be made: {error}"


def milliseconds(found: dict[str, Any], way: str) -> float:
    return 1000 * median(found["ways"][way]["seconds"])


def table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    lines = [
        "| shape, rows a rank | W | link | common, ms | gather, ms | exchange, ms | auto, ms | common/auto "
        "| received, MB: common | gather | exchange |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (shape, world, link), result in found.items():
        times = {way: milliseconds(result, way) for way in WAYS}
        received = [f"{result['ways'][way]['bytes'] / 1e6:.1f}" for way in WAYS[:3]]
        lines.append(
            f"| {SHAPES[shape][0]}, {SHAPES[shape][1]} | {world} | {link} | "
            + " | ".join(f"{times[way]:.0f}" for way in WAYS)
            + f" | {times['common'] / times['auto']:.1f} | {' | '.join(received)} |"
        )
    return "\n".join(lines)


def memory_table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    lines = ["| shape, rows a rank | W | common, MB | gather, MB | exchange, MB |", "|---|---|---|---|---|"]
    for (shape, world, link), result in found.items():
        if link == "loopback":
            cells = [
                f"{result['ways'][w]['memory'] / 1e6:.1f} ({result['ways'][w]['expected_memory'] / 1e6:.1f})"
                for w in WAYS[:3]
            ]
            lines.append(f"| {SHAPES[shape][0]}, {SHAPES[shape][1]} | {world} | {' | '.join(cells)} |")
    return "\n".join([*lines, "(in brackets: by the formula)"])


def failures(found: dict[tuple[str, int, str], dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What makes this benchmark fail, and what is only worth saying."""
    broken, notes = [], []
    for (shape, world, link), result in found.items():
        where = f"{shape}, {world} ranks, {link}"
        for way, numbers in result["ways"].items():
            if numbers["bytes"] != numbers["expected_bytes"]:
                broken.append(
                    f"{where}: {way} received {numbers['bytes']} bytes, by the formula {numbers['expected_bytes']}"
                )
            if not numbers["disagreement"] < LARGEST_DISAGREEMENT:
                broken.append(f"{where}: {way} differs from common practice by {numbers['disagreement']:.1e}")
        speedup = milliseconds(result, "common") / milliseconds(result, "exchange")
        if (shape, world) == ("layer4", 8) and speedup < NEEDED_SPEEDUP:
            broken.append(
                f"{where}: exchange is {speedup:.1f} times as fast as common practice, not {NEEDED_SPEEDUP:g}"
            )
        better = min(("gather", "exchange"), key=lambda way: milliseconds(result, way))
        chosen = set(result["ways"]["auto"]["strategies"])
        # Where it is one of the two, that one's own time is the same code's: what differs from it is noise.
        ratio = milliseconds(result, chosen.pop() if len(chosen) == 1 else "auto") / milliseconds(result, better)
        if ratio > 1.15:
            notes.append(f"{where}: what auto takes needs {ratio:.2f} times as long as {better}")
    return broken, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[2, 4, 8], metavar="W", help="numbers of ranks, even (default 2 4 8)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write everything measured here as well")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    if any(world < 2 or world % 2 for world in options.worlds) or options.rounds < 1:
        parser.error("--worlds takes even numbers from 2, --rounds a number from 1")
    links = list(options.links)
    if "1gbit" in links and (reason := why_no_namespaces()):
        print(f"the 1 Gbit/s link is skipped: {reason}")
        links.remove("1gbit")
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for link in links:
            for world in options.worlds:
                print(f"measuring {world} ranks, {link} ...", file=sys.stderr, flush=True)
                for shape, result in launch(world, link, options, Path(folder)).items():
                    found[shape, world, link] = result
    found = dict(
        sorted(found.items(), key=lambda item: (list(SHAPES).index(item[0][0]), item[0][1], LINKS.index(item[0][2])))
    )
    print(f"{os.cpu_count()} cores, torch {torch.__version__}\n\n{table(found)}\n")
    print(f"Most memory held at once by the tensors of one rank:\n\n{memory_table(found)}\n")
    loss, gradient = (max(result["bf16"][i] for result in found.values()) for i in (0, 1))
    print(
        f"comm_dtype=bfloat16 (exchange) changes the loss by up to {loss:.1e} and its gradient by up to "
        f"{gradient:.1e}, relative."
    )
    if options.json:
        Path(options.json).write_text(
            json.dumps([{"shape": s, "world": w, "link": n, **r} for (s, w, n), r in found.items()], indent=1)
        )
    broken, notes = failures(found)
    for note in notes:
        print(f"note: {note}")
    for failure in broken:
        print(f"FAILED: {failure}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
