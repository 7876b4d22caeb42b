"""Trainings that are interrupted and go on: bit for bit the same on as many processes, and the same up to rounding on
others.

An interruption here ends the trainer between two steps; test_crash.py kills processes.
"""

import math

import plain_trained
import pytest
import shared_launches
from engines import ENGINES
from few_images import write_images
from launched import LONG
from shared_launches import SharedLaunches, noted_uses, without_errors

SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "decay_norm_and_bias": False}
LAMB = {"name": "lamb", "lr": 5e-3, "weight_decay": 0.02, "decay_norm_and_bias": False}
# 12 steps in epochs of 5, a checkpoint every 3 steps and at the end of each epoch.
MID_EPOCH = [4, 5, 8, None]  # before 8, step 7 is logged, which is computed again from the checkpoint after 6
EVERY_STEP = [*range(1, 12), None]
# Where each start goes on: at the newest checkpoint before the interruption. The one after step 6 fails on the full
# disk.
ON_FULL_DISK = [8, 11, None]
STARTS = {
    tuple(MID_EPOCH): [0, 3, 5, 6],
    (7, None): [0, 6],
    (8, None): [0, 5],  # the one after step 6 was not written
    tuple(EVERY_STEP): list(range(12)),
    tuple(ON_FULL_DISK): [0, 5, 10],
}


def case(run, engine, interruptions, **more):
    values = {
        "run": run,
        "engine": engine,
        "interruptions": interruptions,
        "model": "regularized",
        "workers": 0,
        "micro_batch": 8,
    }
    return {**values, "precision": "fp32", "optimizer": ADAMW, **more}


def variants(world):
    """name -> what is special about a training that is run without and with interruptions."""
    found = {}
    for engine in ENGINES:
        found[f"{engine}, accumulated, AdamW, average"] = {"engine": engine}
        found[f"{engine}, worker processes, SGD"] = {
            "engine": engine,
            "workers": 2,
            "micro_batch": 32 // world,
            "optimizer": SGD,
            "model": "plain",
            "interruptions": [7, None],
        }
        found[f"{engine}, tied and frozen weights"] = {"engine": engine, "model": "awkward", "interruptions": [7, None]}
        found[f"{engine}, losses that train"] = {"engine": engine, "model": "trained", "optimizer": SGD}
    for engine in ("ddp", "fsdp2"):
        found[f"{engine}, a strong recipe"] = {"engine": engine, "model": "strong", "optimizer": LAMB, "workers": 2}
    found["any step"] = {"engine": "ddp", "interruptions": EVERY_STEP, "checkpoint": {"every_steps": 1}}
    found["bf16, checkpoints not in the background"] = {
        "engine": "ddp", "precision": "bf16", "checkpoint": {"background": False}, "interruptions": [7, None],
    }  # fmt: skip
    for ranks in ([0], [world - 1]):
        full = {"ranks": ranks, "from": 5, "to": 8}  # the checkpoint after step 6 fails
        found[f"full disk of rank {ranks[0]}"] = {"engine": "ddp", "full_disk": full, "interruptions": ON_FULL_DISK}
    if world > 1:
        found["a rank stays away"] = {"engine": "ddp", "absent": {"rank": 1, "step": 6}, "interruptions": [8, None]}
    found["streaming"] = {"engine": "ddp", "streaming": True, "workers": 2}
    return found


# What `make test-all` adds: engines that share the code of one that runs (the stages of ZeRO that of each other); one
# process, on which engines other than DDP have nothing to share, for what two processes show as well; and two processes
# for what one shows.
SHORTENED = {
    1: ("fsdp2, ", "zero1, ", "zero2, ", "zero3, ", "ddp, worker", "ddp, tied", "full disk", "streaming"),
    2: (
        "zero1, losses",
        "zero2, losses",
        "zero1, worker",
        "zero1, tied",
        "zero2, accumulated",
        "zero2, tied",
        "fsdp2, worker",
        "any step",
        "bf16",
    ),
}


def tried(world):
    """Names of the variants that run."""
    return [name for name in variants(world) if LONG or not name.startswith(SHORTENED[world])]


def pair(name, variant):
    variant = {"interruptions": MID_EPOCH, **variant}
    return case(f"{name}, whole", **{**variant, "interruptions": [None]}), case(f"{name}, interrupted", **variant)


def launch(world, folder, cases):
    """Return what the main process has returned of each training, or the error of any rank."""
    if not (folder / "few.parquet").exists():
        write_images(folder / "few.parquet", 170)  # 5 steps of 32, and 10 left over
    found = shared_launches.launch(world, folder, {case["run"]: ("resume_cases:train", case) for case in cases})
    return {name: next((rank for rank in ranks if "error" in rank), ranks[0]) for name, ranks in found.items()}


def returned(results, name):
    return without_errors([results[name]])[0]


def uses(trainings):
    """Note on a test which trainings it uses: a function of its parameters to (world size, name)."""
    return shared_launches.uses(
        lambda **values: [(world, {name: pair(name, variants(world)[name])}) for world, name in trainings(**values)]
    )


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """World size -> training -> what it returned."""

    def start(world, pairs):
        return launch(
            world, tmp_path_factory.mktemp(f"resume{world}"), [case for both in pairs.values() for case in both]
        )

    return SharedLaunches(request, noted_uses, start)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (1, 2) for name in tried(world)])
@uses(lambda world, name: [(world, name)])
def test_an_interrupted_training_is_the_uninterrupted_one_bit_for_bit(results, world, name):
    whole, interrupted = (returned(results[world], f"{name}, {which}") for which in ("whole", "interrupted"))
    assert interrupted["finished"]
    assert whole["starts"] == [0]
    assert interrupted["starts"] == STARTS[tuple(variants(world)[name].get("interruptions", MID_EPOCH))]
    assert len(whole["steps"]) == 12
    assert len(whole["images"]) == 12 * 32
    assert [line["evaluation"]["steps"] for line in whole["evaluations"]] == [5, 10, 12]
    assert interrupted["steps"] == whole["steps"]
    assert interrupted["evaluations"] == whole["evaluations"]
    assert interrupted["images"] == whole["images"]
    assert interrupted["sha256"] == whole["sha256"]
    assert interrupted["kept"] == whole["kept"]
    assert ("loss/crd/teacher_bank" in whole["kept"]) == (variants(world)[name].get("model") == "trained")


@pytest.mark.parametrize(("world", "rank"), [*([(1, 0)] if LONG else []), (2, 0), (2, 1)])
@uses(lambda world, rank: [(world, f"full disk of rank {rank}")])
def test_a_checkpoint_that_a_full_disk_does_not_take_ends_nothing(results, world, rank):
    """Nor does it harm the one before, from which the interrupted run goes on."""
    whole, interrupted = (
        returned(results[world], f"full disk of rank {rank}, {which}") for which in ("whole", "interrupted")
    )
    errors = dict(whole["written"])
    assert list(errors) == [3, 5, 6, 9, 10, 12]
    assert "File too large" in errors.pop(6)
    assert set(errors.values()) == {None}
    assert [step for step, _ in interrupted["written"]] == [3, 5, 6, 9, 10, 12]
    assert interrupted["starts"] == [0, 5, 10]


@uses(lambda: [(2, "a rank stays away")])
def test_checkpoints_after_one_that_a_rank_stayed_away_from_are_written(results):
    """Its process group is of no use any more: another takes its place."""
    whole = returned(results[2], "a rank stays away, whole")
    errors = dict(whole["written"])
    assert errors.pop(6) is not None
    assert set(errors.values()) == {None}
    assert list(errors) == [3, 5, 9, 10, 12]


# Launches that a run goes through: processes and engine of each, and the step before which it ends.
LAUNCHES = [(2, 4), (4, 9), (1, None)]
MOVES = {
    "ddp": ("ddp", "ddp", "ddp"),
    "fsdp2": ("fsdp2", "fsdp2", "fsdp2"),
    "zero3": ("zero3", "zero3", "zero3"),
    "between engines": ("zero3", "fsdp2", "zero1"),
    "losses that train, ddp": ("ddp", "ddp", "ddp"),
    "losses that train, between engines": ("zero3", "fsdp2", "zero1"),
    "a strong recipe, between engines": ("fsdp2", "ddp", "fsdp2"),
    **({"zero1": ("zero1", "zero1", "zero1"), "zero2": ("zero2", "zero2", "zero2")} if LONG else {}),
}


def moved(name, engine, until):
    precision = "fp64" if all(e in ("ddp", "fsdp2") for e in MOVES[name]) else "fp32"
    streaming = name in ("fsdp2", "zero2")
    more = {"model": "trained", "optimizer": SGD} if name.startswith("losses") else {}
    if name.startswith("a strong recipe"):
        more = {"model": "strong", "optimizer": LAMB}
    workers = 2 if streaming else 0
    return case(f"moved {name}", engine, [until], precision=precision, streaming=streaming, workers=workers, **more)


def by_default_batch(streaming, until):
    """Micro-batches of global_batch / processes: the unit of batch statistics changes with the launch, what is sampled
    does not."""
    return case(f"default batch {streaming}", "ddp", [until], micro_batch=None, streaming=streaming, model="plain")


def undisturbed(precision, streaming, model="regularized"):
    optimizer = {"trained": SGD, "strong": LAMB}.get(model, ADAMW)
    more = {"model": model, "optimizer": optimizer}
    name = f"whole {precision} {streaming} {model}"
    return case(name, "ddp", [None], precision=precision, streaming=streaming, **more)


def move(name):
    """Return the cases of one move: for each of LAUNCHES, and undisturbed on one process."""
    whole = moved(name, "ddp", None)
    legs = [moved(name, engine, until) for engine, (_, until) in zip(MOVES[name], LAUNCHES, strict=True)]
    return {f"moved {name}": [undisturbed(whole["precision"], whole["streaming"], whole["model"]), *legs]}


def move_by_default_batch(streaming):
    legs = [by_default_batch(streaming, until) for _, until in LAUNCHES]
    return {f"default batch {streaming}": [undisturbed("fp32", streaming), *legs]}


@pytest.fixture(scope="module")
def moves(request, tmp_path_factory):
    """Training -> what it returned; those that the selected tests use, together in four launches."""

    def start(_, legs):
        folder, found = tmp_path_factory.mktemp("moved"), {}
        for number, world in enumerate([1, *(world for world, _ in LAUNCHES)]):
            found |= launch(world, folder, list({one[number]["run"]: one[number] for one in legs.values()}.values()))
        return found

    return SharedLaunches(request, noted_uses, start)["moves"]


@pytest.mark.parametrize("name", MOVES)
@shared_launches.uses(lambda name: [("moves", move(name))])
def test_a_training_goes_on_with_another_number_of_processes(moves, name):
    """2 processes, then 4, then 1: each image of each step is the same, and so is its augmentation; terms and weights
    up to the order of sums.

    float64: 1e-9. float32: 2e-4 of a term and 1e-3 of a tensor's largest weight, since AdamW's first steps divide a
    small gradient by its
    own size and so pass its rounding on as it is.
    """
    ours = returned(moves, f"moved {name}")
    first = moved(name, "ddp", None)
    whole = returned(moves, f"whole {first['precision']} {first['streaming']} {first['model']}")
    assert ours["finished"]
    assert ours["starts"] == [0, 3, 9]
    assert ours["images"] == whole["images"]
    exact = first["precision"] == "fp64"
    assert len(ours["steps"]) == len(whole["steps"]) == 12
    for line, wanted in zip(ours["steps"], whole["steps"], strict=True):
        for key in {"loss", "ce", "at", "sp", "kd", *plain_trained.LOSSES} & set(wanted):
            assert math.isclose(line[key], wanted[key], rel_tol=1e-9 if exact else 2e-4), (
                line["step"],
                key,
                line[key],
                wanted[key],
            )
    assert set(ours["kept"]) == set(whole["kept"])
    for key, values in [*whole["state"].items(), *whole["kept"].items()]:
        found, largest = ours["kept" if key in whole["kept"] else "state"][key], max(map(abs, values))
        assert found == pytest.approx(values, rel=0, abs=(1e-9 if exact else 1e-3) * largest + 1e-12), key


@pytest.mark.parametrize("streaming", [False, True])
@shared_launches.uses(lambda streaming: [("moves", move_by_default_batch(streaming))])
def test_which_images_are_seen_depends_on_neither_processes_nor_micro_batches(moves, streaming):
    assert (
        returned(moves, f"default batch {streaming}")["images"]
        == returned(moves, f"whole fp32 {streaming} regularized")["images"]
    )
