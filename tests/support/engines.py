"""Cases of the trainer under each engine, launched together, and what they must agree with."""

import itertools
import math

import pytest
import shared_launches
from launched import STEPS

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LEARNING_RATE = 0.002


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def environment(engine):
    """What `accelerate launch` tells its ranks with the project's own files (test_launch_files.py compares)."""
    if engine == "fsdp2":
        return FSDP2
    if engine.startswith("zero"):
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"launch/deepspeed/{engine}.json",
        }
    return {}


def case(engine, micro_batch=8, teacher="replicated", model="plain", strategy="gather", **more):
    """DeepSpeed keeps its weights in float32; the others compute in float64 here."""
    precision = "fp32" if engine.startswith("zero") else "fp64"
    values = {"engine": engine, "micro_batch": micro_batch, "teacher": teacher, "model": model, "strategy": strategy}
    return {**values, "precision": precision, "lr": LEARNING_RATE, **more}


def name_of(case):
    return "_".join(str(value) for value in case.values()).replace("/", "_").replace(".", "_")


def matrix(world):
    """Everything: engines × accumulation × placements of the teacher × strategies, and the model with BatchNorm,
    dropout and mixup."""
    cases = []
    for engine in ENGINES:
        placements = ["replicated", "fsdp2", *(["zero3"] if engine.startswith("zero") else [])]
        for teacher, micro_steps, strategy in itertools.product(placements, (1, 2), ("gather", "exchange")):
            cases.append(case(engine, 32 // world // micro_steps, teacher, "plain", strategy))
        cases += [case(engine, 8, teacher, "regularized") for teacher in placements]
        cases += [case(engine, 32 // world // micro_steps, model="trained") for micro_steps in (1, 2)]
    return cases


def launch(world, folder, cases, seconds=600, gpus=False):
    """Run the cases in `folder` on `world` processes, on CPUs or a GPU each. Returns, for each, what the ranks
    returned."""
    # None: as in the environment of the tests.
    variables = {"CUDA_VISIBLE_DEVICES": None, "DS_ACCELERATOR": None} if gpus else {}
    calls = {name_of(case): ("engine_cases:run", case) for case in cases}
    return shared_launches.launch(world, folder, calls, seconds, **variables)


def returned(results, case):
    return shared_launches.without_errors(results[name_of(case)])


class References:
    """What the plain loop in float64 yields for a case, (lines, state): made when it is asked for first."""

    def __init__(self):
        self._found = {}

    def of(self, case):
        # Only BatchNorm depends on the micro-batch: that of the student, or of an adapter.
        key = case["model"], case["micro_batch"] if case["model"] == "trained" else None
        if key not in self._found:
            self._found[key] = self._train(*key)
        return self._found[key]

    def _train(self, model, micro_batch):
        import plain_reference
        import plain_trained
        import trainer_cases

        recipe = {**trainer_cases.RECIPE, "optimizer": {**trainer_cases.RECIPE["optimizer"], "lr": LEARNING_RATE}}
        if model == "trained":
            return plain_trained.train({**recipe, "losses": plain_trained.LOSSES}, STEPS, micro_batch)
        if model == "regularized":
            recipe |= {key: {**recipe[key], **value} for key, value in trainer_cases.REGULARIZED.items()}
            return plain_reference.train(recipe, STEPS, micro_batch=8)
        return plain_reference.train(recipe, STEPS, micro_batch=32)


def assert_same_training(ranks, case, reference, world, ddp=None):
    """Loss terms of every step and the final weights are those of the plain loop in float64.

    float64: 1e-9 of a term and 1e-7 of a weight, for sums in another order.

    float32: training amplifies rounding, and where depends on the machine: a ReLU on the other side of 0 moved AT by
    4e-5 in step 5, on one
    CPU under every engine alike, on another under ZeRO-3 alone. So an engine is held to `ddp`, the same training under
    DDP in float32 in
    the same launch: 1e-5 of a term in the first 3 steps (measured: up to 2.1e-6, since engines sum gradients in another
    order), in which a
    wrong factor anywhere in a gradient would show by far more; then 2e-3 of a term, and 5e-3 of a tensor's largest
    weight at the end. DDP
    itself is held to the plain loop: 2e-4 of a term in the first 5 steps, 2e-3 later.
    """
    lines, state = reference.of(case)
    exact = case["precision"] == "fp64"
    assert len(ranks[0]["lines"]) == len(lines) == STEPS
    for step, (ours, plain) in enumerate(zip(ranks[0]["lines"], lines, strict=True)):
        for key, value in plain.items():
            if exact:
                assert math.isclose(ours[key], value, rel_tol=1e-9), (ours["step"], key, ours[key], value)
                continue
            other = ddp[0]["lines"][step][key]
            assert math.isclose(other, value, rel_tol=2e-4 if step < 5 else 2e-3), (ours["step"], key, other, value)
            assert math.isclose(ours[key], other, rel_tol=1e-5 if step < 3 else 2e-3), (
                ours["step"],
                key,
                ours[key],
                other,
            )
    assert set(ranks[0]["state"]) == set(state)
    assert not any(rank["state"] for rank in ranks[1:])  # only the main process copies the whole weights
    for key, values in state.items():
        wanted = values.double().flatten()[:64].tolist() if exact else ddp[0]["state"][key]
        weight = 1e-7 if exact else 5e-3
        assert ranks[0]["state"][key] == pytest.approx(
            wanted, rel=weight, abs=weight * max(map(abs, wanted)) + 1e-12
        ), key
    # BatchNorm's running statistics are on every rank, and the same.
    for rank in ranks:
        assert rank["buffers"] == ranks[0]["buffers"]
    kept, total = ranks[0]["parameters"]
    assert (kept < 0.6 * total) == (case["engine"] in ("fsdp2", "zero3") and world > 1)
    kept, total = ranks[0]["teacher"]
    assert (kept < 0.6 * total) == (case["teacher"] != "replicated" and world > 1)
