"""NCCL between ranks that share one GPU: engines, resuming, lost ranks. `make test-gpu`.

Without a GPU nothing is checked. `make rehearse-gpu` runs the same tests on CPUs with gloo, which shows that the tests
themselves work, and nothing of NCCL.
"""

import json
import math
import os
import platform
import re
import signal
import time

import pytest
import shared_launches
import torch
from engines import ENGINES, References, assert_same_training, case, name_of, returned
from launched import limit, ranks, until
from one_gpu import REHEARSAL, Ranks, finish, launch_cases
from shared_launches import SharedLaunches, noted_uses, without_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REHEARSAL,
        reason="there is no GPU: nothing is checked; make rehearse-gpu runs it on CPUs",
    ),
]
HOST = platform.node()
TIMEOUT = 20  # seconds: run.collective_timeout
STEPS = 12

# Engines


def matrix():
    """Return world size -> cases: every engine with whole and sharded teachers, and DDP on more ranks."""
    two = [case(engine, 8, teacher, strategy="exchange") for engine in ENGINES for teacher in ("replicated", "fsdp2")]
    two += [case(engine, 8, "zero3", strategy="exchange") for engine in ENGINES[2:]]
    two.append(case("ddp", 16, strategy="gather"))
    return {2: two, 4: [case("ddp", 8, strategy="exchange"), case("ddp", 4, strategy="gather")]}


TRAININGS = [(world, tried) for world, cases in matrix().items() for tried in cases]
DDP = {**case("ddp", 8, strategy="exchange"), "precision": "fp32"}
FEATURES = {"features": "all"}


def by_name(world, *cases):
    return [(world, {name_of(each): ("engine_cases:run", each) for each in cases})]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    return SharedLaunches(
        request, noted_uses, lambda world, cases: launch_cases(world, tmp_path_factory.mktemp(f"ranks{world}"), cases)
    )


@pytest.fixture(scope="module")
def reference():
    return References()


@pytest.mark.parametrize(
    ("world", "tried"), TRAININGS, ids=lambda value: name_of(value) if isinstance(value, dict) else None
)
@shared_launches.uses(lambda world, tried: by_name(world, tried, *([DDP] if tried["precision"] == "fp32" else [])))
def test_training_is_that_of_a_plain_loop(results, reference, world, tried):
    ddp = returned(results[world], DDP) if tried["precision"] == "fp32" else None
    assert_same_training(returned(results[world], tried), tried, reference, world, ddp)


@shared_launches.uses(lambda: by_name(2, FEATURES))
def test_features_of_a_sharded_teacher_are_those_of_the_whole_one_bit_for_bit(results):
    """The message of a failure names each pair that differs. On CPUs, a transformer's attention is float32 where its
    weights are: bfloat16 weights then differ by their rounding."""
    for rank in returned(results[2], FEATURES):
        different = {name: found for name, found in rank.items() if not found["equal"]}
        assert not {name: found for name, found in different.items() if not (REHEARSAL and found.get("attends"))}


@pytest.mark.parametrize("world", [2, 4])
@shared_launches.uses(lambda world: [(world, {"formulas": ("gpu_way_cases:losses_beside_plain_formulas",)})])
def test_losses_of_relations_are_those_of_plain_formulas(results, world):
    for errors in without_errors(results[world]["formulas"]):
        assert len(errors) == 2 * 7 * {2: 3, 4: 6}[world]
        assert max(max(pair) for pair in errors.values()) < 1e-12, errors


@shared_launches.uses(lambda: [(2, {"products": ("gpu_cases:products_of_bfloat16",)})])
def test_products_of_bfloat16_features_are_those_of_float32(results):
    for found in without_errors(results[2]["products"]):
        assert found["dtype"] == "torch.float32"
        assert found["difference"] < 1e-5, found


@pytest.mark.parametrize("deterministic", [True, False])
def test_equal_forwards_have_equal_bits(tmp_path, deterministic):
    """With `run.deterministic`, gradients too. Without it nothing is promised; the numbers are printed (pytest -s)."""
    (found,) = without_errors(launch_cases(1, tmp_path, {"hashes": ("gpu_cases:hashes", deterministic)})["hashes"])
    print(f"deterministic {deterministic}: {found}")
    assert set(found) == {"fp32", "tf32", "bf16"}
    if deterministic:
        assert found == {precision: {"forwards": 1, "gradients": 1} for precision in found}


TAUGHT = """
run: {trackers: [], start_timeout: 180, deterministic: true}
data: {train: digits, validation: digits, classes: 10, transforms: digits, image_size: 16}
student: {name: resnet8}
teacher: {name: wrn_16_1, weights: random}
losses:
  kd: {alpha: 0.5}
  at: {beta: 100, pairs: [[layer2, block2], [layer3, block3]]}
  sp: {gamma: 30, reference_batch: 64, pairs: [[layer3, block3]]}
train: {global_batch: 64, micro_batch: 16, epochs: 2, max_steps: 30, precision: bf16}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
schedule: {name: constant}
"""


@pytest.mark.parametrize("micro_batch", [32, 16])
def test_a_teacher_on_a_stream_of_its_own_and_its_messages_change_no_loss(tmp_path, micro_batch):
    """In one pass, where the exchange begins on that stream, and in two."""
    path = tmp_path / "taught.yaml"
    path.write_text(TAUGHT)
    runs = {name: tmp_path / name for name in ("false", "true")}
    for name, run in runs.items():
        more = (f"train.micro_batch={micro_batch}", f"train.teacher_stream={name}")
        said = finish(2, tmp_path, *train(path, run), *more)
        assert ("devices have no streams" in said) == (REHEARSAL and name == "true"), said
    assert len(losses(runs["true"])) == 30
    assert losses(runs["true"]) == losses(runs["false"])


# Launches that are disturbed


def recipe(folder, model="Slow", **train):
    """Write a recipe whose steps are the same on any number of ranks that divides 4; return its path."""
    path = folder / f"{model}.yaml"
    path.write_text(f"""
run: {{trackers: [], start_timeout: 180, collective_timeout: {TIMEOUT}}}
data: {{train: digits, validation: digits, classes: 10, transforms: digits, image_size: 8}}
student: {{name: "small_models:{model}"}}
train: {{global_batch: 32, micro_batch: 8, epochs: 1, max_steps: {STEPS}, precision: fp64}}
optimizer: {{name: sgd, lr: 0.05, momentum: 0.9}}
schedule: {{name: cosine}}
checkpoint: {{every_epochs: null, every_steps: 4}}
""")
    return path


def losses(run):
    """Return step -> loss, as the run has logged them so far."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def until_step(run, step, started):
    until(lambda: max(losses(run), default=0) >= step, limit(120), started.launches[0])


def train(path, run):
    return "-m", "dkd", "train", path, f"run.dir={run}"


def test_a_launch_check_finds_all_well_and_says_that_the_gpu_is_shared(tmp_path):
    said = finish(2, tmp_path, "-m", "dkd", "launch-check", recipe(tmp_path), f"run.dir={tmp_path / 'run'}")
    assert "launch-check: all is well" in said, said
    shared = f"dkd: warning: rank 0 and rank 1 have the same GPU of {HOST}, as the environment asks NCCL to allow"
    assert (shared in said) == (not REHEARSAL), said


def test_two_ranks_of_one_gpu_are_refused_unless_that_was_asked_for(tmp_path):
    if REHEARSAL:
        pytest.skip("CPUs are shared by all ranks; tests/unit/test_rendezvous.py has the same with names of GPUs")
    alike = {"NCCL_HOSTID": "one", "NCCL_MULTI_RANK_GPU_ENABLE": "0"}
    with Ranks(2, tmp_path, *train(recipe(tmp_path), tmp_path / "run"), **alike) as started:
        assert all(started.wait(limit(120)))
        said = started.said(0)
    assert "it has the same GPU as rank 0: start one process for each GPU" in said, said
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_is_named_and_four_ranks_finish_what_two_have_begun(tmp_path):
    path, whole, run = recipe(tmp_path), tmp_path / "whole", tmp_path / "run"
    finish(2, tmp_path, *train(path, whole))
    with Ranks(2, tmp_path, *train(path, run)) as started:
        until_step(run, 6, started)
        os.kill(ranks(run)[1], signal.SIGKILL)
        assert all(started.wait(limit(TIMEOUT + 60)))
        said = started.said(0)
    assert re.search(rf"rank 1 on {HOST}: (no heartbeat|ended)", said), said
    finish(4, tmp_path, *train(path, run))
    starts = json.loads((run / "provenance.json").read_text())
    assert [start["step"] for start in starts] in ([0, 4], [0, 8])
    found, wanted = losses(run), losses(whole)
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
    for step, loss in wanted.items():
        assert math.isclose(found[step], loss, rel_tol=1e-9), (step, found[step], loss)


def test_a_suspended_rank_is_named_and_the_other_stops_in_time(tmp_path):
    path, run = recipe(tmp_path), tmp_path / "run"
    with Ranks(2, tmp_path, *train(path, run)) as started:
        until_step(run, 3, started)
        os.kill(ranks(run)[1], signal.SIGSTOP)
        begun = time.monotonic()
        assert all(started.wait(limit(TIMEOUT + 60), ranks=[0]))
        assert time.monotonic() - begun > 0.5 * TIMEOUT
        said = started.said(0)
    assert f"rank 1 on {HOST}: no heartbeat, last seen at" in said, said
    # What torch's flight recorder of NCCL remembers lies in the run.
    assert (run / "flight_recorder_rank_0").is_file() == (not REHEARSAL)


def test_a_rank_whose_memory_is_full_says_so_in_one_line_and_the_other_names_it(tmp_path):
    path, run = recipe(tmp_path, "FillsTheMemory"), tmp_path / "run"
    with Ranks(2, tmp_path, *train(path, run)) as started:
        assert all(started.wait(limit(TIMEOUT + 90)))
        first, second = started.said(0), started.said(1)
    reason = "the GPU's memory is full (CUDA out of memory."
    assert len(re.findall(rf"^dkd: rank 1 cannot continue: {re.escape(reason)}", second, re.MULTILINE)) == 1, second
    assert "take a smaller train.micro_batch" in second
    assert re.search(
        rf"^dkd: rank 0 cannot continue: .*rank 1 on {HOST}: ended at .*{re.escape(reason)}", first, re.M
    ), first
