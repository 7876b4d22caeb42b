"""Losses on tensors that are on a GPU by name alone: no kernel runs, but each operation checks devices, types and
shapes as on a GPU, and the branches for GPUs are taken. No GPU is needed."""

import pytest
import torch

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
    RKDDistance,
    SimilarityPreserving,
    SoftTargets,
)
from dkd.library_internals.torch import FakeTensorMode

BF16 = torch.bfloat16
TYPES = {"float32": torch.float32, "bfloat16": BF16}


@pytest.fixture(scope="module")
def mode():
    return FakeTensorMode()


@pytest.fixture(autouse=True)
def fake_tensors(mode):
    with mode:
        yield


def on_gpu(*shape, dtype=torch.float32, **more):
    return torch.empty(*shape, device="cuda", dtype=dtype, **more)


def features(dtype):
    layout = {"memory_format": torch.channels_last}
    students = [on_gpu(8, 16, s, s, dtype=dtype, **layout).requires_grad_() for s in (8, 4)]
    return students, [on_gpu(8, 32, s, s, dtype=BF16, **layout) for s in (8, 4)]


def logits(dtype):
    return on_gpu(8, 10, dtype=dtype).requires_grad_(), on_gpu(8, 10, dtype=BF16)


def labels():
    return torch.zeros(8, dtype=torch.int64, device="cuda")


FEATURES = {
    "at": lambda s, t: AttentionTransfer()(s, t),
    "sp": lambda s, t: SimilarityPreserving()(s, t),
    "sp, without a floor": lambda s, t: SimilarityPreserving(floor=0)(s, t),
    "sp, on tensor cores": lambda s, t: SimilarityPreserving()(s, t, sent_as=[BF16, BF16]),
    "pkt": lambda s, t: PKT()(s, t),
    "cc": lambda s, t: CorrelationCongruence()(s, t),
    "cka": lambda s, t: CKA()(s, t),
    "rkd": lambda s, t: RKDDistance()(s, t),
}
LOGITS = {
    "kd": lambda s, t: SoftTargets()(s, t),
    "kd, standardised": lambda s, t: SoftTargets(standardize=True)(s, t),
    "dkd": lambda s, t: DKD()(s, t, labels()),
    "nkd": lambda s, t: NKD()(s, t, labels()),
    "dist": lambda s, t: DIST()(s, t),
    "ce": lambda s, t: CrossEntropy(0.1)(s, labels()),
    "bce": lambda s, t: BinaryCrossEntropy()(s, labels()),
}


def own_backward(value):
    """Return the gradients by the derivative in closed form; the engine of autograd would ask for a real GPU."""
    node = value.grad_fn
    while node is not None and not hasattr(node, "apply"):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return None
    with torch.no_grad():
        return [each for each in node.apply(torch.ones_like(value)) if each is not None]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [*FEATURES, *LOGITS])
def test_losses_fit_a_gpu(name, dtype):
    inputs, targets = features(TYPES[dtype]) if name in FEATURES else logits(TYPES[dtype])
    value = (FEATURES | LOGITS)[name](inputs, targets)
    assert (value.device.type, value.dtype, value.shape) == ("cuda", torch.float32, ())
    gradients, closed = own_backward(value), name not in ("kd, standardised", "nkd", "ce", "bce")
    assert (gradients is not None) == (closed or name == "kd, standardised")
    inputs = inputs if isinstance(inputs, list) else [inputs]
    for gradient, tensor in zip(gradients or inputs, inputs, strict=True):
        assert gradient.device.type == "cuda"
        # Features and logits may be flattened, and promoted, before the closed form.
        assert gradient.numel() == tensor.numel()
