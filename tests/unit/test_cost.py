"""Which grid a loss of relations takes, what it costs, and which ranks share a batch. test_relations.py compares bytes
with what moves, and this file memory with what is allocated."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dkd.errors import InputError
from dkd.global_batch import GramScope, GramTensor, Grid, Link, Links, Work, all_grids, corner, ranks_per_group
from dkd.global_batch.cost import DEFAULT_LINKS, MOST_CHUNKS, choose, held, moves, received_bytes, seconds, syrk_bound

ROOT = Path(__file__).resolve().parents[2]
SLOW_START, SLOW_WIRE = (Links(link, link) for link in (Link(10.0, 1e9), Link(1e-7, 1e7)))


def pair(width, feature_bytes=4):
    return [GramTensor(width, True, feature_bytes), GramTensor(width, False, feature_bytes)]


def elements(work, grid):
    """Return what a rank receives, without the vectors of one number a sample."""
    return sum(move.elements for move in moves(work, grid) if move.axis != "all")


@pytest.mark.parametrize(
    ("world", "rows", "width", "grid", "millions", "gather", "exchange"),
    [
        (8, 32, 25088, (1, 1, 8), 2.3, 11.2, 2.3),
        (64, 64, 25088, (4, 1, 16), 25.9, 202, 54),
        (512, 64, 25088, (16, 8, 4), 107.6, 1641, 3220),
        (512, 64, 2048, (32, 16, 1), 14.3, 134, 3215),
    ],
)
def test_elements_are_those_of_the_derivation(world, rows, width, grid, millions, gather, exchange):
    """The table of docs/explanations/global_batch.md: the grid that receives least, and the corners."""
    work = Work(pair(width), rows, world)
    found = min(all_grids(world), key=lambda each: elements(work, each))
    assert elements(work, found) <= elements(work, Grid(*grid)) == pytest.approx(1e6 * millions, rel=0.05)
    assert elements(work, corner("gather", world)) == pytest.approx(1e6 * gather, rel=0.01)
    assert elements(work, corner("exchange", world)) == pytest.approx(1e6 * exchange, rel=0.03)


def test_every_grid_has_every_rank_once():
    for world in (1, 2, 6, 12):
        for grid in all_grids(world):
            assert grid.size == world
            assert [grid.rank(grid.place(rank)) for rank in range(world)] == list(range(world))
            for rank in range(world):
                rows, columns = grid.samples_of_rows(rank), grid.samples_of_columns(rank)
                assert len(set(rows)) == len(rows) == world // grid.row_blocks
                assert len(set(columns)) == len(columns) == world // grid.column_blocks
                for axis in (grid.along_slices, grid.along_columns, grid.along_rows):
                    assert rank in axis(rank) == sorted(axis(rank))


@pytest.mark.parametrize("world", [2, 8, 12, 64, 512])
def test_auto_takes_the_least_expected_time(world):
    for links, width in itertools.product((*DEFAULT_LINKS.values(), SLOW_START, SLOW_WIRE), (64, 2048, 25088)):
        work = Work(pair(width), 32, world)
        found = choose(work, links, min(world, 8)).grid
        assert seconds(work, found, links, min(world, 8)) == min(
            seconds(work, grid, links, min(world, 8)) for grid in all_grids(world)
        )


def test_latency_and_bandwidth_lead_to_other_grids():
    work = Work(pair(25088), 64, 64)
    few, small = (choose(work, links, 8).grid for links in (SLOW_START, SLOW_WIRE))
    assert len(moves(work, few)) < len(moves(work, small))
    assert received_bytes(work, few) > received_bytes(work, small)


def test_slices_stay_in_a_machine_where_the_links_between_machines_are_slow():
    links = Links(Link(1e-6, 1e11), Link(1e-6, 1e8))
    work = Work(pair(25088), 64, 64)
    grid = choose(work, links, 8).grid
    assert 8 % grid.slices == 0
    assert grid.slices > 1


def test_a_grid_that_does_not_fit_is_never_taken():
    work = Work(pair(25088), 64, 64)
    sizes = sorted(held(work, grid).bytes for grid in all_grids(64))
    chunked = 0
    for memory in (sizes[0] // 2, *sizes[:: len(sizes) // 5]):
        grid, chunks = choose(work, DEFAULT_LINKS["cuda"], 8, memory)
        assert held(work, grid, chunks).bytes <= memory
        chunked += chunks > 1
    assert chunked > 0
    least, grid = min((held(work, grid, n).bytes, grid) for grid in all_grids(64) for n in (1, MOST_CHUNKS))
    with pytest.raises(InputError) as error:
        choose(work, DEFAULT_LINKS["cuda"], 8, least - 1, "losses.sp")
    assert str(error.value) == (
        f"losses.sp compares 4,096 samples on 64 ranks: the grid {grid.name} needs {least / 1e9:.3g} GB a rank, the "
        f"least of all, and {(least - 1) / 1e9:.3g} GB are allowed; allow more (memory), take a smaller scope, or "
        "compare narrower features"
    )


@pytest.mark.parametrize(("world", "gigabytes", "memory"), [(64, 0.11, 0.13), (512, 0.5, 1.0), (4096, 2.3, 3.0)])
def test_layer4_of_resnet_stays_small_on_many_ranks(world, gigabytes, memory):
    """At 512 ranks, where gather receives 3.3 GB or 4.9, and exchange 12.9 GB and holds 8.6 GB."""
    for feature_bytes in (2, 4):
        work = Work(pair(25088, feature_bytes), 64, world)
        grid = choose(work, DEFAULT_LINKS["cuda"], 8).grid
        assert received_bytes(work, grid) <= gigabytes * 1e9
        assert held(work, grid).bytes < memory * 1e9


def test_the_lower_bound_is_the_least_of_its_inequality():
    """Against a search over all y: x = K/√(2y) numbers of Q are read for y numbers of the result."""
    for batch, width, world in (
        (256, 25088, 8),
        (4096, 512, 64),
        (32768, 25088, 512),
        (8192, 2048, 64),
        (64, 10**6, 4),
    ):
        triangle = batch * (batch - 1) / 2
        products = 2 * triangle * width / world
        first, last = triangle / world, triangle
        steps = [first * (last / first) ** (i / 20000) for i in range(20001)]
        share = batch * width / world
        least = min(max(products / math.sqrt(2 * y) - share, 0) + y for y in steps) - triangle / world
        assert syrk_bound(width, batch, world) == pytest.approx(least, rel=1e-3, abs=1)
    assert syrk_bound(512, 64, 1) == 0


def test_the_lower_bound_has_three_cases():
    """One dimension: few samples of many features; two: many of few; three: between. The known forms of each."""
    b, d, w = 64, 10**6, 4
    assert syrk_bound(d, b, w) == pytest.approx(b * b / 2 * (1 - 1 / w), rel=0.05)
    b, d, w = 32768, 64, 64
    assert syrk_bound(d, b, w) == pytest.approx(b * d / math.sqrt(w) - b * d / w, rel=0.01)
    b, d, w = 4096, 4096, 512
    assert syrk_bound(d, b, w) == pytest.approx(1.5 * (b * b * d / w) ** (2 / 3) - b * d / w - b * b / 2 / w, rel=0.01)


def test_no_grid_receives_less_than_the_lower_bound():
    for world, batch, width in itertools.product((2, 8, 64), (256, 4096), (64, 2048, 25088)):
        work = Work([GramTensor(width, False), GramTensor(width, False)], batch // world, world)
        for grid in all_grids(world):
            assert elements(work, grid) >= 2 * syrk_bound(width, batch, world), (world, batch, width, grid)


def test_what_is_allocated_is_what_the_formula_says():
    """Forward and backward of one rank on torch's fake process group, within 10 %, for every grid."""
    program = [sys.executable, "-m", "benchmarks.relations_memory"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*program, "--world", "12", "--rows", "16", "--widths", "2048,4096", "512,512", "--within", "0.1"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("formula") == len(all_grids(12))


@pytest.mark.parametrize(("widths", "grid"), [("2048,2048", "32,16,1"), ("512,1024", "16,8,4")])
def test_one_rank_of_512_allocates_what_the_formula_says(widths, grid):
    """Of B = 32,768 samples; no tensor is larger than the grid calls for."""
    program = [sys.executable, "-m", "benchmarks.relations_memory", "--world", "512", "--rows", "64"]
    result = subprocess.run(
        [*program, "--widths", widths, "--grid", grid, "--within", "0.1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "formula" in result.stdout


OF_512 = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from dkd import SimilarityPreserving
from dkd.global_batch import BatchLayout, GramTensor, Work, collectives, cost
from dkd.global_batch.choice import GridChoice

dist.init_process_group("fake", rank=511, world_size=512, store=FakeStore())
sp, layout = SimilarityPreserving(grid="auto"), BatchLayout.even(8)
work = Work([GramTensor(512, True), GramTensor(1024, False)], 8, 512, sp.sums())
student, teacher = torch.randn(8, 512).requires_grad_(), torch.randn(8, 1024)
sp(student, teacher, layout=layout).backward()
with collectives.count_received() as received:
    sp(student, teacher, layout=layout).backward()
at = sp.grid.place(layout, work.tensors, work.sums, torch.device("cpu"), "sp")
expected = cost.moves(work, at.grid, at.chunks)
assert (received.bytes, received.collectives) == (sum(move.bytes for move in expected), len(expected)), received
print(at.grid.name, received)
"""


def test_one_rank_of_512_receives_what_the_plan_says():
    result = subprocess.run(
        [sys.executable, "-c", OF_512],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


WITH_A_WHOLE_MATRIX = """
import sys, torch
from benchmarks import relations_memory
from dkd import SimilarityPreserving

forward = SimilarityPreserving.forward

def allocating(self, *features, layout):
    torch.empty(layout.total, layout.total, dtype=torch.int8)
    return forward(self, *features, layout=layout)

SimilarityPreserving.forward = allocating
sys.exit(relations_memory.main())
"""


def test_a_matrix_of_all_samples_would_be_noticed():
    """On ranks whose features together are more than B × B numbers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--world", "64", "--rows", "8", "--widths", "512,512", "--grid", "4,4,4", "--within", "1e9"]
    for program, code in ((["-m", "benchmarks.relations_memory"], 0), (["-c", WITH_A_WHOLE_MATRIX], 1)):
        result = subprocess.run(
            [sys.executable, *program, *options],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stdout + result.stderr
        assert ("larger than the grid calls for" in result.stdout) == bool(code), result.stdout


def test_scopes_are_groups_that_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks_per_group(scope, 8) for scope in ("global", "node", 2, "local")] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="groups of 3 ranks do not divide 8 ranks"):
        ranks_per_group(3, 8)
    with pytest.raises(ValueError, match="must be global, node, local or a number of ranks"):
        GramScope("rack")
