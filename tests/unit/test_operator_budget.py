"""How much a training step asks of torch: operators that compute, and waits of the host for the device."""

import argparse
from collections import Counter

import pytest
import torch
from every_loss import ALL

from benchmarks.launches import OperatorCount, count_step
from benchmarks.step import Row, write_teacher
from dkd import (
    CKA,
    DIST,
    DKD,
    NKD,
    PKT,
    AttentionTransfer,
    BinaryCrossEntropy,
    CorrelationCongruence,
    CrossEntropy,
    FeatureDistance,
    RKDDistance,
    SimilarityPreserving,
    SoftTargets,
)
from dkd.config.loading import validate
from dkd.engines.accelerated import forget_settings
from dkd.training.trainer import Trainer

STEP = {"fp32": 228, "bf16": 238}
"""Operators of one step of wrn_16_2 → wrn_16_1 with AT on three pairs, SP and KD."""


@pytest.mark.parametrize("precision", STEP)
def test_a_step_asks_for_no_more_operators_than_its_budget(tmp_path, precision):
    options = argparse.Namespace(teacher="wrn_16_2", student="wrn_16_1", batch=4, size=32)
    write_teacher(options, tmp_path)
    settings = {"train.precision": precision, "train.channels_last": True}
    found = count_step(Row("", options, tmp_path, settings, loads=False).trainer)
    assert {"teacher", "student", "ce", "at", "sp", "kd", "backward", "update", "numbers"} < set(found.parts)
    assert found.total <= STEP[precision], {part: count.total for part, count in found.parts.items()}
    assert found.parts["update"].total == 1
    assert found.parts["numbers"].total == 1
    assert found.total > 150  # the models alone


def features(pairs):
    shapes = [(16, 16), (32, 8), (64, 4)][:pairs]
    layout = {"memory_format": torch.channels_last}
    students = [torch.randn(4, c, side, side).to(**layout).requires_grad_() for c, side in shapes]
    return students, [torch.randn(4, 2 * c, side, side).to(**layout) for c, side in shapes]


LOGITS = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
LABELS = torch.arange(4)
VECTORS = [torch.randn(4, 32, requires_grad=True)], [torch.randn(4, 32)]
LOSSES = {
    "at, three pairs": (AttentionTransfer(), features(3), 25),
    "at, one pair": (AttentionTransfer(), features(1), 18),
    # As a recipe has it for such maps; else features are copied, which is two more.
    "sp": (SimilarityPreserving(channels_last=True), features(1), 20),
    "kd": (SoftTargets(), LOGITS, 14),
    "ce": (CrossEntropy(), (LOGITS[0], LABELS), 7),
    "bce": (BinaryCrossEntropy(), (LOGITS[0], LABELS), 14),
    "fitnet": (FeatureDistance(), VECTORS, 15),
    "dkd": (DKD(), (*LOGITS, LABELS), 25),
    "nkd": (NKD(), (*LOGITS, LABELS), 46),
    "dist": (DIST(), LOGITS, 49),
    "cc": (CorrelationCongruence(), VECTORS, 59),
    "pkt": (PKT(), VECTORS, 70),
    "cka": (CKA(), VECTORS, 85),
    "rkd, distances": (RKDDistance(), VECTORS, 95),
}
"""Loss, arguments, and the operators of its forward and backward, at most."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_asks_for_no_more_operators_than_its_budget(name):
    loss, arguments, most = LOSSES[name]
    students = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
    for _ in range(2):  # the first call also makes what later ones keep
        with OperatorCount() as found:
            torch.autograd.grad(loss(*arguments), students)
    assert found.total <= most, found.operators
    assert not found.waits


RECIPE = {
    "run": {"trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "cifar", "image_size": 16},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {name: ALL[name] for name in ("ce", "at", "sp", "kd")},
    "train": {"global_batch": 16, "micro_batch": 16, "epochs": 2, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "cosine"},
}
SETTINGS = {
    "accumulation, and two passes of SP": {"train": {"micro_batch": 8}},
    "an average, clipping": {"train": {"ema": {"decay": 0.9}, "clip_grad_norm": 1.0}},
    "adamw, images on the device, a graph": {
        "optimizer": {"name": "adamw", "lr": 1.0e-3},
        "data": {"in_memory": "device"},
        "train": {"graph": True},
    },
    "binary cross-entropy": {"losses": {"ce": None, "bce": {"label_smoothing": 0.1}, "kd": ALL["kd"]}},
    "the teacher's stream": {"train": {"teacher_stream": True}},
    "bf16": {"train": {"precision": "bf16"}},
    "weights of classes": {"losses": {"ce": {"class_weights": "balanced"}, "kd": ALL["kd"]}},
    **{
        f"the loss {name}": {"losses": {"kd": ALL["kd"], name: each}}
        for name, each in ALL.items()
        if name not in ("queue", "crd")
    },
}
ONE_NUMBER = Counter({"_local_scalar_dense": 1})
MAY_WAIT = {
    "skip_nonfinite asks before each update whether the gradient is finite": (
        {"train": {"skip_nonfinite": 1}},
        ONE_NUMBER,
    ),
    # These numbers are on the CPU, wherever the loss is: no GPU is waited for.
    "the queue's place": ({"losses": {"queue": ALL["queue"]}}, ONE_NUMBER),
    "crd's count of steps, and the places of its samples": (
        {"losses": {"crd": ALL["crd"]}},
        ONE_NUMBER + Counter({"tolist": 1}),
    ),
    "mixup draws its proportion, and checks labels that are on a CPU": (
        {"data": {"mixup": 0.2}, "losses": {"kd": ALL["kd"]}},
        Counter({"_local_scalar_dense": 3}),
    ),
}
"""What waits in a step, and how often."""


def waits(folder, changes):
    forget_settings()
    values = {section: dict(keys) for section, keys in RECIPE.items()}
    for section, keys in changes.items():
        values[section] = keys if section in ("losses", "optimizer") else {**values[section], **keys}
    values["run"]["dir"] = str(folder / "run")
    trainer = Trainer.from_recipe(validate(values), if_run_exists="replace")
    try:
        return count_step(trainer).waits
    finally:
        trainer.close()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_lets_the_host_wait_for_the_device(tmp_path, name):
    assert waits(tmp_path, SETTINGS[name]) == Counter()


@pytest.mark.parametrize("name", MAY_WAIT)
def test_what_waits_is_what_the_list_states(tmp_path, name):
    changes, wanted = MAY_WAIT[name]
    assert waits(tmp_path, changes) == wanted


def test_waits_are_counted():
    numbers = torch.arange(6.0)
    with OperatorCount() as found:
        numbers[numbers > 2] += 1
        assert numbers.sum() > 0
        numbers[:2].tolist()
    assert found.waits == Counter({"index by a mask": 2, "_local_scalar_dense": 1, "tolist": 1})
