"""The engines on GPUs: NCCL, bfloat16, compilation, channels_last. `make test-gpu`; one GPU is enough for one
process."""

import pytest
import shared_launches
import torch
from engines import ENGINES, References, assert_same_training, case, launch, name_of, returned
from shared_launches import SharedLaunches, noted_uses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: nothing is checked"),
]

WORLD = min(4, 2 ** (torch.cuda.device_count().bit_length() - 1)) if torch.cuda.is_available() else 1
PARITY = [
    case(engine, 32 // WORLD // 2, teacher, strategy=s)
    for engine in ENGINES
    for teacher in ("replicated", "fsdp2")
    for s in ("gather", "exchange")
]
PARITY += [case(engine, 8, "zero3", strategy="exchange") for engine in ("zero2", "zero3")]
SHORT = {"max_steps": 3}
PARITY.append({**case("ddp", 16), "precision": "fp32"})
DDP = {
    name_of(c): {**case("ddp", c["micro_batch"], strategy=c["strategy"]), "precision": "fp32"}
    for c in PARITY
    if c["precision"] == "fp32"
}
FLOAT32 = {**case("ddp", 8), "precision": "fp32", "train": SHORT}
FAST = [
    {**FLOAT32, "precision": "bf16", "train": {**SHORT, "channels_last": True}},
    {**FLOAT32, "precision": "fp16", "train": SHORT},
    {
        **FLOAT32,
        "precision": "bf16",
        "train": {**SHORT, "channels_last": True, "compile": {"student": True, "teacher": True}},
    },
    *(
        {**case(engine, 8, "fsdp2"), "precision": "bf16", "train": {**SHORT, "channels_last": True}}
        for engine in ENGINES[1:]
    ),
]
FEATURES = {"features": "all"}


def uses(cases):
    """Note on a test which cases it uses: a function of its parameters."""
    return shared_launches.uses(lambda **values: [(WORLD, {name_of(case): case for case in cases(**values)})])


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Name of a case -> what each rank returned."""

    def start(world, cases):
        return launch(world, tmp_path_factory.mktemp("gpus"), list(cases.values()), seconds=1800, gpus=True)

    return SharedLaunches(request, noted_uses, start)[WORLD]


@pytest.fixture(scope="module")
def reference():
    return References()


@pytest.mark.parametrize("tried", PARITY, ids=name_of)
@uses(lambda tried: [tried, *([DDP[name_of(tried)]] if tried["precision"] == "fp32" else [])])
def test_training_is_that_of_a_plain_loop(results, reference, tried):
    ddp = returned(results, DDP[name_of(tried)]) if tried["precision"] == "fp32" else None
    assert_same_training(returned(results, tried), tried, reference, WORLD, ddp)


@pytest.mark.parametrize("tried", FAST, ids=name_of)
@uses(lambda tried: [FLOAT32, tried])
def test_half_precision_and_compilation_stay_near_float32(results, tried):
    """The first loss within bfloat16's rounding; the losses of 3 steps within a few of those."""
    wanted, lines = (returned(results, c)[0]["lines"] for c in (FLOAT32, tried))
    assert lines[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-2)
    assert lines[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=5e-2)


@uses(lambda: [FEATURES])
def test_features_of_a_sharded_teacher_are_those_of_the_whole_one_bit_for_bit(results):
    for rank in returned(results, FEATURES):
        assert not {name: found for name, found in rank.items() if not found["equal"]}
