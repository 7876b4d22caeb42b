"""A teacher's cache on ranks: filled on two, read on one, two and four; grids, engines and placements; damage that one
rank meets; two jobs at once."""

import json
import subprocess
from pathlib import Path

import pytest
import shared_launches
from launched import DKD, ROOT, child_environment, limit
from shared_launches import SharedLaunches, noted_uses, without_errors

PAIRS = [["layer3", "block3"]]
GRID = {"sp": {"gamma": 3000, "reference_batch": 128, "pairs": PAIRS, "grid": [1, 2, 1]}}
FAMILY = {
    "pkt": {"preset": "repdistiller", "pairs": PAIRS, "grid": [1, 2, 1]},
    "rkd": {"preset": "repdistiller", "pairs": PAIRS},
    "dist": {"preset": "cifar", "weight": 0.5},
}
MIXED = {"mixup": 0.3, "cutmix": 1.0, "augmentation_period": 1}
# What is special about a training that is run live, while its cache is filled, and while it is read.
VARIANTS = {
    "one pass": {"micro_batch": 16},
    "two passes": {"micro_batch": 8},
    "mixed": {"micro_batch": 8, "data": MIXED},
    "columns of a grid": {"micro_batch": 8, "losses": {**GRID, **FAMILY}},
    "columns, one pass": {"micro_batch": 16, "losses": {**GRID, **FAMILY}},
    "FSDP2": {"micro_batch": 8, "engine": "fsdp2", "placement": "fsdp2"},
    "ZeRO-3": {"micro_batch": 16, "engine": "zero3", "placement": "zero3"},
    "a rank alone": {"micro_batch": 8, "losses": {"sp": {**GRID["sp"], "grid": "auto", "scope": "local"}}},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def results(request, tmp_path_factory, caches):
    """World size -> case -> what it returned."""

    def start(world, cases):
        folder = tmp_path_factory.mktemp(f"cached{world}")
        for _, case in cases.values():
            if case.get("cache"):
                case["cache"] = str(caches / case["cache"])
        return shared_launches.launch(world, folder, cases)

    return SharedLaunches(request, noted_uses, start)


def case(run, function="train", **more):
    return f"teacher_cache_cases:{function}", {"run": run, "engine": "ddp", **more}


def three(name):
    """Live, filled, read."""
    variant = VARIANTS[name]
    return {
        f"{name}, live": case(f"{name}, live", **variant),
        f"{name}, filled": case(f"{name}, filled", cache=name, **variant),
        f"{name}, read": case(f"{name}, read", cache=name, **variant),
    }


def returned(results, world, name):
    ranks = without_errors(results[world][name])
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


@pytest.mark.parametrize("name", VARIANTS)
@shared_launches.uses(lambda name: [(2, three(name))])
def test_training_is_the_same_on_two_ranks(results, name):
    live, filled, read = (returned(results, 2, f"{name}, {which}") for which in ("live", "filled", "read"))
    assert len(live["lines"]) == 6
    for found in (filled, read):
        assert found["lines"] == live["lines"]
        assert found["sha256"] == live["sha256"]
    assert (filled["read"], filled["computed"], filled["built"]) == ([0], [6], True)
    assert (read["read"], read["computed"], read["built"]) == ([6], [0], False)


ELSEWHERE = {"micro_batch": 8}


@pytest.mark.parametrize("world", [1, 4])
@shared_launches.uses(
    lambda world: [
        (2, three("two passes")),
        (
            world,
            {
                f"live on {world}": case(f"live on {world}", **ELSEWHERE),
                f"read on {world}": case(f"read on {world}", cache="two passes", **ELSEWHERE),
            },
        ),
    ]
)
def test_a_cache_of_two_ranks_is_read_on_others(results, world):
    assert returned(results, 2, "two passes, filled")["computed"] == [6]
    live, read = (returned(results, world, f"{which} on {world}") for which in ("live", "read"))
    assert (read["read"], read["computed"], read["built"]) == ([6], [0], False)
    # The teacher's part of each micro-batch has the same bits on any number of ranks, and so have relations here: one
    # rank multiplies all of a block, whatever the grid.
    assert read["lines"] == live["lines"]
    assert read["sha256"] == live["sha256"]


@shared_launches.uses(
    lambda: [
        (
            2,
            {
                **three("one pass"),
                "taught": case("taught", "teach", cache="taught", micro_batch=16),
                "taught again": case("taught again", "teach", cache="taught", micro_batch=16),
                "after teaching": case("after teaching", cache="taught", micro_batch=16),
            },
        )
    ]
)
def test_dkd_teach_on_two_ranks(results):
    taught, again = (without_errors(results[2][name])[0] for name in ("taught", "taught again"))
    assert (taught["computed"], taught["found"]) == (6, 0)
    assert (again["computed"], again["found"]) == (0, 6)
    live, after = returned(results, 2, "one pass, live"), returned(results, 2, "after teaching")
    assert after["read"] == [6]
    assert after["sha256"] == live["sha256"]


@shared_launches.uses(
    lambda: [
        (
            2,
            {
                **three("one pass"),
                "hurt": case("hurt", "teach", cache="hurt", micro_batch=16),
                "damage": case("damage", "damage", cache="hurt"),
                "damaged": case("damaged", cache="hurt", micro_batch=16),
                "mended": case("mended", cache="hurt", micro_batch=16),
                "one rank sees nothing": case("blind", cache="taught", micro_batch=16, blind_rank=1),
            },
        )
    ]
)
def test_what_one_rank_cannot_read_all_compute(results):
    live = returned(results, 2, "one pass, live")
    without_errors(results[2]["damage"])
    damaged, mended, blind = (returned(results, 2, name) for name in ("damaged", "mended", "one rank sees nothing"))
    assert damaged["computed"][0] > 0
    assert mended["computed"] == [0]
    assert blind["computed"] == [6]
    assert damaged["sha256"] == mended["sha256"] == blind["sha256"] == live["sha256"]


def test_two_jobs_fill_one_cache_at_once(tmp_path):
    base = [
        *DKD,
        "train",
        "configs/quickstart.yaml",
        "teacher.weights=random",
        "train.precision=fp32",
        "run.trackers=[]",
    ]
    base += ["train.max_steps=8", "train.micro_batch=16", "evaluation.agreement=false"]

    def start(name, *more):
        log = (tmp_path / f"{name}.log").open("w")
        return subprocess.Popen(
            [*base, f"run.dir={tmp_path / name}", *more], cwd=ROOT, env=child_environment(), stdout=log, stderr=log
        )

    cache = f"teacher.cache={tmp_path / 'cache'}"
    jobs = [start("a", cache), start("b", cache)]
    assert [job.wait(limit(120)) for job in jobs] == [0, 0]
    assert [start(name, *more).wait(limit(120)) for name, more in (("read", [cache]), ("live", []))] == [0, 0]
    found = {name: (tmp_path / name / "student.safetensors").read_bytes() for name in ("a", "b", "read", "live")}
    assert len(set(found.values())) == 1
    assert "not built" in (tmp_path / "read.log").read_text()
    assert len([path for path in (tmp_path / "cache").iterdir() if Path(path).is_dir()]) == 1
    logged = [json.loads(line) for line in (tmp_path / "read" / "metrics.jsonl").read_text().splitlines()]
    assert sum("ce" in line for line in logged) == 8
