"""Cases of the trainer under each engine, launched together, and what they must agree with."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS = 20
LEARNING_RATE = 0.002


def case(engine, micro_batch=8, teacher="replicated", model="plain", strategy="gather", **more):
    """DeepSpeed keeps its weights in float32; the others compute in float64 here."""
    precision = "fp32" if engine.startswith("zero") else "fp64"
    values = {"engine": engine, "micro_batch": micro_batch, "teacher": teacher, "model": model, "strategy": strategy}
    return {**values, "precision": precision, "lr": LEARNING_RATE, **more}


def name_of(case):
    return "_".join(str(value) for value in case.values()).replace("/", "_").replace(".", "_")


def matrix(world):
    """Everything: engines × accumulation × placements of the teacher × strategies, and the model with BatchNorm, dropout and mixup."""
    cases = []
    for engine in ENGINES:
        placements = ["replicated", "fsdp2", *(["zero3"] if engine.startswith("zero") else [])]
        for teacher, micro_steps, strategy in itertools.product(placements, (1, 2), ("gather", "exchange")):
            cases.append(case(engine, 32 // world // micro_steps, teacher, "plain", strategy))
        cases += [case(engine, 8, teacher, "regularized") for teacher in placements]
    return cases


def launch(world, folder, cases, time_limit=900, gpus=False):
    """Run the cases in `folder` on `world` processes, on CPUs or a GPU each. Returns, for each, what the ranks returned."""
    listed = Path(folder) / f"cases_{len(os.listdir(folder))}.json"
    listed.write_text(json.dumps(cases))
    script = TESTS / "ranks" / "engine_cases.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), script, folder, listed]
    paths = os.pathsep.join([str(TESTS), str(TESTS / "ranks"), *map(str, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=time_limit, env=environment, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(world)]
    return {name_of(case): [rank[name_of(case)] for rank in ranks] for case in cases}


def returned(results, case):
    for rank, value in enumerate(results[name_of(case)]):
        if "error" in value:
            pytest.fail(f"rank {rank}: {value['error']}")
    return results[name_of(case)]


def references():
    """model -> (lines, state) of the plain loop in float64."""
    import plain_reference
    from ranks import trainer_cases

    recipe = {**trainer_cases.RECIPE, "optimizer": {**trainer_cases.RECIPE["optimizer"], "lr": LEARNING_RATE}}
    regularized = {**recipe, **{key: {**recipe[key], **value} for key, value in trainer_cases.REGULARIZED.items()}}
    return {
        "plain": plain_reference.train(recipe, STEPS, micro_batch=32),
        "regularized": plain_reference.train(regularized, STEPS, micro_batch=8),
    }


def assert_same_training(ranks, case, reference, world, first_steps=2e-5):
    """Loss terms of every step and the final weights are those of the plain loop.

    `first_steps` is the tolerance of a float32 term in the first 5 steps.

    float64: 1e-9 of a term and 1e-7 of a weight, for sums in another order.

    float32: 2e-5 of a term in the first 5 steps (measured: up to 8e-6, under DDP as under ZeRO), in which a wrong factor anywhere in a
    gradient would show by far more. Then 2e-3 of a term, and at the end 5e-3 of a tensor's largest weight: training amplifies rounding, a
    ReLU on the other side of 0 at a time. Measured: up to 6e-4 and 2.4e-3, in biases that began at 0, and to the last digit the same under
    DDP in float32 as under ZeRO.
    """
    lines, state = reference[case["model"]]
    exact = case["precision"] == "fp64"
    weight = 1e-7 if exact else 5e-3
    assert len(ranks[0]["lines"]) == len(lines) == STEPS
    for step, (ours, plain) in enumerate(zip(ranks[0]["lines"], lines, strict=True)):
        term = 1e-9 if exact else first_steps if step < 5 else 2e-3
        for key, value in plain.items():
            assert math.isclose(ours[key], value, rel_tol=term), (ours["step"], key, ours[key], value)
    assert set(ranks[0]["state"]) == set(state)
    for key, values in state.items():
        wanted = values.double().flatten()[:64].tolist()
        assert ranks[0]["state"][key] == pytest.approx(wanted, rel=weight, abs=weight * max(map(abs, wanted)) + 1e-12), key
    # BatchNorm's running statistics are on every rank, and the same.
    for rank in ranks:
        assert rank["buffers"] == ranks[0]["buffers"]
    kept, total = ranks[0]["parameters"]
    assert (kept < 0.6 * total) == (case["engine"] in ("fsdp2", "zero3") and world > 1)
    kept, total = ranks[0]["teacher"]
    assert (kept < 0.6 * total) == (case["teacher"] != "replicated" and world > 1)
