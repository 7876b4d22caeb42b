"""The trainer under DDP, FSDP2 and DeepSpeed ZeRO, with whole and sharded teachers, on real launches of 1, 2 and 4
processes.

Here is a part of the matrix; `make test-matrix` runs all of it.
"""

import pytest
import shared_launches
from engines import ENGINES, References, assert_same_training, case, launch, matrix, name_of, returned
from launched import LONG, STEPS
from measured import as_measured
from shared_launches import SharedLaunches, noted_uses

PARITY = {
    1: [
        case("fsdp2", 16, "fsdp2"),
        case("zero3", 16, "zero3", strategy="exchange"),
        case("zero1", 32, "fsdp2"),
        case("ddp", 16, model="trained"),
    ],
    2: [
        case("ddp", 8, "fsdp2"),
        case("fsdp2", 8, "replicated", strategy="exchange"),
        case("fsdp2", 8, "fsdp2", "regularized", "exchange"),
        case("zero1", 8, "zero3", strategy="exchange"),
        case("zero2", 16, "fsdp2"),
        case("zero2", 8, "replicated", "regularized"),
        case("zero3", 8, "zero3", strategy="exchange"),
        case("zero3", 8, "replicated", "regularized"),
        *(case(engine, 16 if engine == "zero1" else 8, model="trained") for engine in ENGINES),
    ],
    4: [
        case("fsdp2", 4, "fsdp2", strategy="exchange"),
        case("zero3", 8, "replicated"),
        case("zero1", 4, "fsdp2"),
        case("fsdp2", 8, model="trained"),
        case("zero3", 4, model="trained"),
    ],
}
# Three epochs of 3 steps: training resumes after evaluations on the average, with no checkpoint between that would put
# things right.
SHORT = {"epochs": 3, "max_steps": 9, "clip_grad_norm": 1.0, "ema": {"decay": 0.5}}
AVERAGED = [
    {
        **case(engine, 8, strategy="exchange"),
        "precision": "fp32",
        "images": 96,
        "train": SHORT,
        "checkpoint": {"every_epochs": 100},
    }
    for engine in ENGINES
]
# The losses of every engine that computes in float32 are held to those of DDP in float32; only DDP's are held to the
# plain loop in float64.
FLOAT32 = {
    name_of(tried): {
        **case("ddp", tried["micro_batch"], "replicated", tried["model"], tried["strategy"]),
        "precision": "fp32",
    }
    for cases in PARITY.values()
    for tried in cases
    if tried["precision"] == "fp32"
}
FROZEN = [
    {
        **case(engine, 4, strategy="exchange"),
        "precision": "fp32",
        "freeze": "conv1 layer1",
        "train": {"max_steps": 3},
    }
    for engine in ENGINES
]
BF16 = [{**case(engine, 8, "fsdp2"), "precision": "bf16", "train": {"max_steps": 2}} for engine in ENGINES]
FEW = [{**case("fsdp2", 8, "fsdp2"), "samples": samples, "train": {"max_steps": 1}} for samples in (1, 7)] + [
    {**case("zero3", 8, "replicated"), "samples": samples, "train": {"max_steps": 1}} for samples in (1, 7)
]
VIT_TRAINING = {"max_steps": 1, "global_batch": 4}
VIT = [
    {**case("fsdp2", 2, teacher, "vit"), "precision": "fp32", "samples": 2, "train": VIT_TRAINING}
    for teacher in ("replicated", "fsdp2")
]
# BatchNorm, accumulation, an average; steps 3 and 4 are broken, of which two in a row are allowed, and in another run
# steps 3 to 5.
SKIPPING = {"max_steps": 7, "skip_nonfinite": 2, "ema": {"decay": 0.5}}
BROKEN = {
    engine: {**case(engine, 8, model="regularized"), "nonfinite": [3, 4], "train": SKIPPING} for engine in ENGINES
}
TOO_BROKEN = {engine: {**BROKEN[engine], "nonfinite": [3, 4, 5]} for engine in ENGINES}
GRADIENTS = {"gradients": "sharded"}
OTHER = {"other": "engine"}
FEATURES = {"features": "all"}
MODES = {engine: {"modes": engine} for engine in ENGINES}
UNLABELLED = {engine: {"unlabelled": engine, "of": "no labels"} for engine in ENGINES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {world: tmp_path_factory.mktemp(f"engines{world}") for world in PARITY}


def uses(cases):
    """Note on a test what it uses of the launch of its world size (default 2): a function of its other parameters."""
    return shared_launches.uses(lambda world=2, **values: [(world, {name_of(case): case for case in cases(**values)})])


@pytest.fixture(scope="module")
def results(request, folders):
    """World size -> name of a case -> what each rank returned."""
    return SharedLaunches(request, noted_uses, lambda world, cases: launch(world, folders[world], list(cases.values())))


@pytest.fixture(scope="module")
def reference():
    return References()


@pytest.mark.parametrize(
    ("world", "tried"),
    [(w, c) for w, cases in PARITY.items() for c in cases],
    ids=lambda v: v if isinstance(v, int) else name_of(v),
)
@uses(lambda tried: [tried, *([FLOAT32[name_of(tried)]] if tried["precision"] == "fp32" else [])])
def test_training_is_that_of_a_plain_loop(results, reference, world, tried):
    ddp = returned(results[world], FLOAT32[name_of(tried)]) if tried["precision"] == "fp32" else None
    assert_same_training(returned(results[world], tried), tried, reference, world, ddp)


@pytest.mark.parametrize("tried", AVERAGED, ids=name_of)
@uses(lambda tried: [AVERAGED[0], tried])
def test_clipping_and_averaged_weights_are_those_of_ddp(results, tried):
    """In float32, 9 steps: sums in another order."""
    ddp, ranks = (returned(results[2], c) for c in (AVERAGED[0], tried))
    for ours, theirs in zip(ranks[0]["lines"], ddp[0]["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for rank in ranks:  # evaluated on the average, on every rank alike
        assert rank["evaluation"] == ranks[0]["evaluation"]
    assert ranks[0]["evaluation"]["loss"] == pytest.approx(ddp[0]["evaluation"]["loss"], rel=1e-5)


@pytest.mark.parametrize("tried", FROZEN, ids=name_of)
@uses(lambda tried: [FROZEN[0], tried])
def test_frozen_modules_stay_as_they_were_under_every_engine(results, tried):
    """Four micro-steps on two ranks, over which statistics are averaged. The rest is trained as under DDP."""
    ddp, ranks = (returned(results[2], c) for c in (FROZEN[0], tried))
    for ours, theirs in zip(ranks[0]["lines"], ddp[0]["lines"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for rank in ranks:
        frozen, moving = (
            {key: value for key, value in rank["buffers"].items() if key.startswith("layer1.") == inside}
            for inside in (True, False)
        )
        assert frozen
        for key, value in frozen.items():
            assert set(value) == {1.0 if key.endswith("running_var") else 0.0}, key
        assert all(set(value) != {0.0} for key, value in moving.items() if key.endswith("running_mean"))
        for key, value in rank["state"].items():
            if key.startswith(("conv1.", "layer1.")):
                assert value == ddp[0]["state"][key], key
    first, last = (
        returned(results[2], FROZEN[0])[0]["state"][key] for key in ("layer1.0.bn1.weight", "layer2.0.bn1.weight")
    )
    assert set(first) == {1.0}
    assert set(last) != {1.0}


@pytest.mark.parametrize("tried", BF16, ids=name_of)
@uses(lambda tried: [BF16[0], tried])
def test_bf16_autocast_is_the_same_under_every_engine(results, tried):
    """The forwards are equal; bfloat16 gradients are summed in another order."""
    ddp, ranks = (returned(results[2], c)[0]["lines"] for c in (BF16[0], tried))
    assert ranks[0]["loss"] == pytest.approx(ddp[0]["loss"], rel=1e-6)
    assert ranks[1]["loss"] == pytest.approx(ddp[1]["loss"], rel=1e-2)


@pytest.mark.parametrize("tried", FEW, ids=name_of)
@uses(lambda tried: [tried])
def test_evaluation_of_fewer_samples_than_ranks_need_counts_each_once(results, tried):
    ranks = returned(results[2], tried)
    assert {rank["evaluation"]["samples"] for rank in ranks} == {tried["samples"]}
    assert len({str(rank["evaluation"]) for rank in ranks}) == 1


@uses(lambda: [FEATURES])
def test_features_of_a_sharded_teacher_are_those_of_the_whole_one_bit_for_bit(results):
    for rank in returned(results[2], FEATURES):
        assert len(rank) == 9
        for name, found in rank.items():
            kept, total = found["kept"]
            # On CPUs, torch computes the attention of float32 weights in float32 even under autocast: bfloat16 weights
            # then differ by their rounding.
            assert found["equal"] or (found.get("attends") and found["difference"] < 2**-7), (name, found)
            # In bytes, with weights in bfloat16: half of a half, and the norms, which stay float32.
            share = 0.25 if "bfloat16" in name else 0.5
            assert 0.99 * share * total < kept < 1.04 * share * total, name


@uses(lambda: VIT)
def test_a_sharded_vision_transformer_teaches_by_its_tokens(results):
    """SP on flattened tokens, AT on their grid without the class token; the blocks are the units of sharding."""
    whole, sharded = (returned(results[2], tried) for tried in VIT)
    for term in ("loss", "at", "sp", "kd"):
        assert sharded[0]["lines"][0][term] == pytest.approx(whole[0]["lines"][0][term], rel=1e-6)
    kept, total = sharded[0]["teacher"]
    assert total > (85_000_000 if LONG else 100_000)
    assert kept < 0.51 * total


@pytest.mark.parametrize("engine", ENGINES)
@uses(lambda engine: [UNLABELLED["ddp"], UNLABELLED[engine]])
def test_images_without_labels_are_evaluated_alike_under_every_engine(results, engine):
    ddp, ranks = (returned(results[2], UNLABELLED[each]) for each in ("ddp", engine))
    assert all(rank == ranks[0] for rank in ranks)
    found, wanted = ranks[0], ddp[0]
    assert (found["samples"], found["top1"], found["loss"]) == (449, None, None)
    few = 2.5 / 449  # engines sum gradients in another order
    for key in ("knn_top1", "knn_top5"):
        assert found[key] == pytest.approx(wanted[key], abs=few)
    assert found["agreement"]["top1"] == pytest.approx(wanted["agreement"]["top1"], abs=few)
    assert found["agreement"]["kl"] == pytest.approx(wanted["agreement"]["kl"], rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@uses(lambda engine: [BROKEN[engine], TOO_BROKEN[engine]])
def test_an_update_whose_gradient_is_not_finite_leaves_no_trace(results, engine):
    """Neither in weights nor in statistics, optimizer, average. The rank where it began is named; a third one in a row
    ends all ranks."""
    ranks = returned(results[2], BROKEN[engine])
    for rank in ranks:
        hashes = rank["hashes"]
        assert hashes["3"] == hashes["4"] == hashes["5"]
        assert len(set(hashes.values())) == 5
    lines = {line["step"]: line for line in ranks[0]["lines"]}
    assert sorted(lines) == list(range(1, 8))
    assert [(step, lines[step]["skipped"], lines[step]["ranks"]) for step in lines if "skipped" in lines[step]] == [
        (4, "loss", [1]),
        (5, "loss", [1]),
    ]
    ended = {rank["ended"] for rank in returned(results[2], TOO_BROKEN[engine])}
    assert len(ended) == 1
    assert "the loss is not finite at step 6 (on rank 1; " in (message := ended.pop())
    assert "3 steps in a row" in message


@pytest.mark.parametrize("engine", ENGINES)
@uses(lambda engine: [MODES[engine]])
def test_the_student_trains_again_after_an_evaluation(results, engine):
    for modes in returned(results[2], MODES[engine]):
        assert modes == {"training": [True], "evaluation": [False]}


@uses(lambda: [GRADIENTS])
def test_a_gradient_that_is_not_finite_in_one_shard_is_found_on_all_ranks(results):
    for rank in returned(results[2], GRADIENTS):
        assert rank["answers"] == [True, False, False]


@uses(lambda: [OTHER])
def test_getting_another_engine_than_asked_for_is_an_error_with_the_right_command(results):
    for rank in returned(results[2], OTHER):
        assert "2 processes of fsdp2 were launched, but Accelerate runs" in rank["message"]
        assert (
            "accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes N -m dkd train RECIPE"
            in rank["message"]
        )


TRAINED = [c for c in PARITY[2] if c["model"] == "regularized"] + AVERAGED


@uses(lambda: TRAINED)
def test_a_fresh_launch_evaluates_every_engines_student_as_training_did(results, folders):
    trained = TRAINED
    results[2]
    fresh = launch(2, folders[2], [{"evaluate": name_of(c)} for c in trained])
    for tried in trained:
        for rank in returned(fresh, {"evaluate": name_of(tried)}):
            expected = returned(results[2], tried)[0]["evaluation"]
            assert rank["agreement"]["kl"] > 0  # beside a sharded teacher, too
            assert rank == as_measured(expected, loss=1e-6, agreement=1e-4, shares=0.005)


@pytest.mark.matrix
@pytest.mark.parametrize("world", PARITY)
@pytest.mark.parametrize("model", ["plain", "regularized", "trained"])
def test_the_whole_matrix(world, model, reference, tmp_path):
    cases = [case for case in matrix(world) if case["model"] == model]
    ddp = {
        name_of(c): {**case("ddp", c["micro_batch"], "replicated", c["model"], c["strategy"]), "precision": "fp32"}
        for c in cases
    }
    found = launch(world, tmp_path, [*cases, *{name_of(c): c for c in ddp.values()}.values()], seconds=3600)
    wrong = {}
    for tried in cases:
        try:
            float32 = returned(found, ddp[name_of(tried)]) if tried["precision"] == "fp32" else None
            assert_same_training(returned(found, tried), tried, reference, world, float32)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong[name_of(tried)] = str(error)[-300:]
    print(f"{model}: {len(cases)} trainings of {STEPS} steps on {world} processes, {len(wrong)} differ")
    assert not wrong
