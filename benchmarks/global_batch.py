"""SP over the global batch: what each way moves, takes and holds.

    python -m benchmarks.global_batch            2, 4 and 8 ranks, over loopback and two shaped links (needs root)
    python -m benchmarks.global_batch --worlds 8 --links loopback --shapes layer4

Forward and backward of SimilarityPreserving on random features, on the CPU with gloo, one thread a rank, in these ways:

    common      common practice: a differentiable all-gather of the features (its backward is a reduce-scatter), then
                the whole B×B Gram matrix and loss on every rank
    r × c × k   every grid of the ranks; gather and exchange are two of them
    auto        the grid that is chosen by the speeds of the link, which are measured first as `dkd launch-check --json`
                does

Bytes are counted at the collective calls, memory by following every tensor that is allocated. Times are medians over
rounds of the slowest rank, the ways in turn within each round. On shaped links the ranks are in two network namespaces,
half of them in each, joined by a link that lets 1 Gbit/s, or 200 Mbit/s with 10 ms of delay, through.

Exit code 1 when bytes are not those of the formula, when the ways disagree on loss or gradient, or when the grid of
`auto` takes more than 1.15 (`--slower`) times as long as the best grid in a row.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.peak_memory import PeakMemory
from benchmarks.shaped_links import two_namespaces
from dkd import SimilarityPreserving
from dkd.commands.launch_check.findings import Findings
from dkd.commands.launch_check.trials import measure_links
from dkd.global_batch import BatchLayout, GramTensor, Grid, Links, Work, all_grids, collectives, received_bytes
from dkd.global_batch.cost import DEFAULT_LINKS, choose, held

# Rows a rank, and (student, teacher) features of each pair.
SHAPES: dict[str, tuple[str, int, list[tuple[int, int]]]] = {
    "layer4": ("ResNet-34 → ResNet-18, layer4", 32, [(25088, 25088)]),
    "layer3": ("ResNet-34 → ResNet-18, layer3", 32, [(50176, 50176)]),
    "pooled": ("pooled features, 2,048", 64, [(2048, 2048)]),
    "wrn3": ("WRN-16-2 → WRN-16-1, block3", 64, [(4096, 8192)]),
    "wrn": ("the same, block1 to block3", 32, [(16384, 32768), (8192, 16384), (4096, 8192)]),
    "many": ("many samples of 512 features", 256, [(512, 512)]),
}
LINKS = {"loopback": None, "1gbit": (1e9 / 8, 0.0), "wide_area": (2e8 / 8, 0.01)}
"""Name of each link, its bytes a second, and its seconds of delay in each direction."""
SLOWER_THAN_BEST = 1.15  # times that the grid of auto may take
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


def gram_tensors(pairs: list[tuple[int, int]]) -> list[GramTensor]:
    return [*(GramTensor(s, True) for s, _ in pairs), *(GramTensor(t, False) for _, t in pairs)]


def work_of(rows: int, pairs: list[tuple[int, int]], world: int) -> Work:
    return Work([*(GramTensor(s, True) for s, _ in pairs), *(GramTensor(t, False) for _, t in pairs)], rows, world)


def grid_of(way: str) -> Grid:
    return Grid(*(int(number) for number in way.split(" × ")))


def expected_bytes(way: str, work: Work) -> int:
    """Bytes that a rank receives, by the formulas of docs/explanations/global_batch.md."""
    if way == "common":
        return sum((work.world_size - 1) * work.rows * t.width * 4 * (1 + t.backward) for t in work.tensors)
    return received_bytes(work, grid_of(way))


def expected_memory(way: str, work: Work, pairs: list[tuple[int, int]]) -> int:
    """Bytes that a rank holds at once at most, by the formulas of docs/explanations/global_batch.md."""
    if way == "common":
        # All features, the gathered gradient in two terms, and Gram matrices.
        batch = work.batch
        return 4 * sum(batch * (s + max(t, 2 * s)) + 4 * batch**2 for s, t in pairs)
    return held(work, grid_of(way)).bytes


def worker(options: argparse.Namespace) -> None:
    """One rank: measures every shape and way; rank 0 writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    links = DEFAULT_LINKS["cpu"]._replace(**measure_links(local, torch.device("cpu"), Findings()))
    found = {shape: measure(*SHAPES[shape][1:], world, rank, options.rounds, links) for shape in options.shapes}
    if rank == 0:
        Path(options.worker).write_text(json.dumps({"links": links, "shapes": found}))
    dist.barrier()
    # At once. A thread of gloo that still has to let go of a tensor when the interpreter shuts down aborts the process,
    # after all is done.
    os._exit(0)


def measure(
    rows: int, pairs: list[tuple[int, int]], world: int, rank: int, rounds: int, links: Links
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    students = [torch.randn(rows, s, generator=generator).relu().requires_grad_() for s, _ in pairs]
    teachers = [torch.randn(rows, t, generator=generator).relu() for _, t in pairs]
    layout, work = BatchLayout.even(rows), work_of(rows, pairs, world)
    ways = ["common", *(grid.name for grid in all_grids(world))]
    losses = {way: SimilarityPreserving(grid=grid_of(way)) for way in ways[1:]}

    def run(way: str) -> torch.Tensor:
        for student in students:
            student.grad = None
        loss = common_practice(students, teachers) if way == "common" else losses[way](students, teachers, layout)
        loss.backward()
        return loss.detach()

    def gradient() -> torch.Tensor:
        return torch.cat([student.grad.flatten() for student in students])  # type: ignore[union-attr]

    found: dict[str, Any] = {}
    wanted: tuple[torch.Tensor, torch.Tensor] | None = None
    for way in ways:
        run(way)  # process groups are made once
        with collectives.count_received() as counted, PeakMemory() as memory:
            value = run(way)
        value = mean_over_ranks(value)
        wanted = wanted or (value, gradient())
        found[way] = {
            "bytes": counted.bytes,
            "collectives": counted.collectives,
            "expected_bytes": expected_bytes(way, work),
            "memory": int(max_over_ranks(memory.peak)),
            "expected_memory": expected_memory(way, work, pairs),
            "disagreement": max_over_ranks(max(relative(value, wanted[0]), relative(gradient(), wanted[1]))),
            "seconds": [],
        }
    # What takes long is measured less often, decided from a number that is the same on all ranks.
    first = {way: timed(partial(run, way)) for way in ways}
    for _ in range(rounds * (5 if min(first.values()) < SHORT else 1)):
        for way in ways:
            found[way]["seconds"].append(timed(partial(run, way)))
    auto = choose(work, links, int(os.environ["LOCAL_WORLD_SIZE"])).grid.name
    rounded = SimilarityPreserving(grid="exchange", comm_dtype=torch.bfloat16)
    assert wanted is not None
    for student in students:
        student.grad = None
    value = rounded(students, teachers, layout)
    value.backward()
    bf16 = [
        max_over_ranks(relative(mean_over_ranks(value.detach()), wanted[0])),
        max_over_ranks(relative(gradient(), wanted[1])),
    ]
    return {"ways": found, "auto": auto, "bf16": bf16}


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
    shape = LINKS[link]
    assert shape is not None
    with two_namespaces(*shape) as sides:
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


def why_no_namespaces(link: str) -> str:
    """Why a shaped link cannot be had here; empty when it can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} (iproute2, util-linux)"
    try:
        with two_namespaces(*(LINKS[link] or (1e9, 0.0))):
            return ""
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces cannot be made: {error}"


def milliseconds(found: dict[str, Any], way: str) -> float:
    return 1000 * median(found["ways"][way]["seconds"])


def best_grid(found: dict[str, Any]) -> str:
    return min((way for way in found["ways"] if way != "common"), key=lambda way: milliseconds(found, way))


def corners(world: int) -> list[str]:
    return [f"{world} × 1 × 1", f"1 × 1 × {world}"]


def table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    lines = [
        "| shape, rows a rank | W | link | common, ms | gather, ms | exchange, ms | best grid, ms | auto, ms "
        "| common/auto | received, MB: common | gather | exchange | least |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (shape, world, link), result in found.items():
        best, auto = best_grid(result), result["auto"]
        times = [f"{milliseconds(result, way):.0f}" for way in ("common", *corners(world))]
        times += [f"{way}: {milliseconds(result, way):.0f}" for way in (best, auto)]
        received = {way: numbers["bytes"] / 1e6 for way, numbers in result["ways"].items()}
        least = min((way for way in received if way != "common"), key=received.__getitem__)
        moved = [f"{received[way]:.1f}" for way in ("common", *corners(world))] + [f"{least}: {received[least]:.1f}"]
        speedup = milliseconds(result, "common") / milliseconds(result, auto)
        lines.append(
            f"| {SHAPES[shape][0]}, {SHAPES[shape][1]} | {world} | {link} | {' | '.join(times)} | {speedup:.1f} "
            f"| {' | '.join(moved)} |"
        )
    return "\n".join(lines)


def memory_table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    lines = [
        "| shape, rows a rank | W | common, MB | gather, MB | exchange, MB | auto, MB |",
        "|---|---|---|---|---|---|",
    ]
    for (shape, world, link), result in found.items():
        if link == next(iter(LINKS)):
            cells = [
                f"{result['ways'][w]['memory'] / 1e6:.1f} ({result['ways'][w]['expected_memory'] / 1e6:.1f})"
                for w in ("common", *corners(world), result["auto"])
            ]
            lines.append(f"| {SHAPES[shape][0]}, {SHAPES[shape][1]} | {world} | {' | '.join(cells)} |")
    return "\n".join([*lines, "(in brackets: by the formula)"])


def failures(found: dict[tuple[str, int, str], dict[str, Any]], slower: float) -> list[str]:
    """What makes this benchmark fail; `slower` is how many times as long as the best grid that of auto may take."""
    broken = []
    for (shape, world, link), result in found.items():
        where = f"{shape}, {world} ranks, {link}"
        for way, numbers in result["ways"].items():
            if numbers["bytes"] != numbers["expected_bytes"]:
                broken.append(
                    f"{where}: {way} received {numbers['bytes']} bytes, by the formula {numbers['expected_bytes']}"
                )
            if not numbers["disagreement"] < LARGEST_DISAGREEMENT:
                broken.append(f"{where}: {way} differs from common practice by {numbers['disagreement']:.1e}")
        best, auto = best_grid(result), result["auto"]
        ratio = milliseconds(result, auto) / milliseconds(result, best)
        if ratio > slower:
            broken.append(f"{where}: auto, {auto}, takes {ratio:.2f} times as long as the best grid, {best}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[2, 4, 8], metavar="W", help="numbers of ranks, even (default 2 4 8)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--slower",
        type=float,
        default=SLOWER_THAN_BEST,
        metavar="TIMES",
        help=f"how many times as long as the best grid that of auto may take (default {SLOWER_THAN_BEST})",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured here as well")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return 0
    if any(world < 2 or world % 2 for world in options.worlds) or options.rounds < 1:
        parser.error("--worlds takes even numbers from 2, --rounds a number from 1")
    links = list(options.links)
    shaped = [link for link in links if LINKS[link]]
    if shaped and (reason := why_no_namespaces(shaped[0])):
        print(f"the shaped links are skipped: {reason}")
        links = [link for link in links if not LINKS[link]]
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for link in links:
            for world in options.worlds:
                print(f"measuring {world} ranks, {link} ...", file=sys.stderr, flush=True)
                result = launch(world, link, options, Path(folder))
                print(f"    links {result['links']}", file=sys.stderr, flush=True)
                for shape, numbers in result["shapes"].items():
                    found[shape, world, link] = numbers
    found = dict(
        sorted(
            found.items(), key=lambda item: (list(SHAPES).index(item[0][0]), item[0][1], list(LINKS).index(item[0][2]))
        )
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
    broken = failures(found, options.slower)
    for failure in broken:
        print(f"FAILED: {failure}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
