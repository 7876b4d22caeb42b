"""The losses on one process: what they do where the plain formula fails, and what they refuse."""

import copy
import math
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from dkd import AttentionTransfer, CrossEntropy, GradientAttention, SimilarityPreserving, SoftTargets
from dkd.config.losses import SimilarityPreservingSection


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradient(loss, student, *others):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *others)
    value.backward()
    return value.detach(), leaf.grad


# Similarity-preserving: rows of a Gram matrix that are nearly zero


def small_rows():
    """Features of 6 samples, of which the second of the student's is zero."""
    student, teacher = randn(6, 10, seed=1), randn(6, 12, seed=2)
    student[1] = 0
    return student, teacher


def test_the_gradient_of_a_sample_without_features_is_bounded_by_the_floor():
    student, teacher = small_rows()
    bound = {}
    for floor in (0.0, 0.01, 0.1):
        value, gradient = value_and_gradient(SimilarityPreserving(floor=floor), student, teacher)
        dead, others = gradient[1].norm().item(), gradient.norm(dim=1)[[0, 2, 3, 4, 5]].mean().item()
        bound[floor] = dead / others
        assert value == pytest.approx(
            SimilarityPreserving(floor=0)(student, teacher).item(), rel=1e-12
        )  # a row of zeros stays one
    assert bound[0.0] > 1e9  # what the published formula does, silently
    assert bound[0.01] < 10 / 0.01
    assert bound[0.1] < 10 / 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 10), (5, 4, 3, 3)])
def test_the_floor_changes_no_bit_where_no_row_is_below_it(dtype, shape):
    student, teacher = randn(*shape, seed=3, dtype=dtype), randn(*shape, seed=4, dtype=dtype)
    wanted = value_and_gradient(SimilarityPreserving(floor=0), student, teacher)
    for floor in (SimilarityPreserving().floor, 0.1):
        found = value_and_gradient(SimilarityPreserving(floor=floor), student, teacher)
        assert found[0] == wanted[0]
        assert torch.equal(found[1], wanted[1])


def test_the_floor_is_a_constant_to_the_gradient():
    """Against autograd of the formula as docs/reference/losses.md writes it, most rows below the floor in one and none
    in the other."""
    student, teacher = small_rows()
    for floor in (0.01, 0.9):

        def rows(features, floor=floor):
            gram = features @ features.T
            norms = gram.norm(dim=1, keepdim=True)
            return gram / torch.maximum(norms, floor * norms.mean().detach())

        wanted = value_and_gradient(lambda s, t: (rows(s) - rows(t)).square().sum() / 36, student, teacher)
        found = value_and_gradient(SimilarityPreserving(floor=floor), student, teacher)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_models_that_agree_lose_nothing_by_the_floor():
    features = randn(6, 10)
    features[2] *= 1e-4
    assert SimilarityPreserving()(features, features).item() == 0


def test_features_that_are_all_zero_have_a_gradient_that_is_a_number():
    for loss, shape in (
        (SimilarityPreserving(), (4, 5)),
        (AttentionTransfer(), (4, 5, 3, 3)),
        (AttentionTransfer(p=4), (4, 5, 3, 3)),
    ):
        _, gradient = value_and_gradient(loss, torch.zeros(shape), randn(*shape, dtype=torch.float32))
        assert torch.equal(gradient, torch.zeros(shape)), loss


def test_a_recipe_and_a_loop_of_ones_own_have_the_same_floor():
    section = SimilarityPreservingSection(pairs=[["a", "b"]], gamma=1, reference_batch=1)
    assert section.floor == SimilarityPreserving().floor
    for floor in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="a share of the mean norm of the rows"):
            SimilarityPreserving(floor=floor)


# Numbers that float32 cannot square


@pytest.mark.parametrize(
    ("loss", "scales"),
    [
        (AttentionTransfer(), (1e-15, 1e-7, 1e9, 1e15)),
        (AttentionTransfer(reduction="paper"), (1e-15, 1e-7, 1e9, 1e15)),
        (AttentionTransfer(map="sum"), (1e-15, 1e15)),
        (AttentionTransfer(p=4), (1e-15, 1e-4, 1e5, 1e15)),
        (AttentionTransfer(map="max_p", p=8), (1e-15, 1e-2, 1e3, 1e15)),
        (AttentionTransfer(p=4, resize="map"), (1e-15, 1e-4, 1e5, 1e15)),
        (SimilarityPreserving(), (1e-15, 1e-7, 1e10, 1e15)),
    ],
    ids=repr,
)
def test_values_and_gradients_do_not_depend_on_the_scale_of_features(loss, scales):
    """Both losses normalise: k times the features leave the value, and make the gradient 1/k of what it was."""
    side = 4 if getattr(loss, "resize", "") == "map" else 3
    student, teacher = (
        randn(3, 4, 3, 3, seed=5, dtype=torch.float32),
        randn(3, 6, side, side, seed=6, dtype=torch.float32),
    )
    value, gradient = value_and_gradient(loss, student, teacher)
    for scale in scales:
        scaled, scaled_gradient = value_and_gradient(loss, student * scale, teacher * scale)
        assert scaled.item() == pytest.approx(value.item(), rel=1e-5), scale
        torch.testing.assert_close(scaled_gradient.double() * scale, gradient.double(), rtol=1e-4, atol=1e-6)


# Soft targets


def test_a_class_that_the_teacher_rules_out_adds_nothing():
    """A logit of −∞: the loss is that of the other classes, the student's own probability of it included."""
    student, teacher = randn(4, 6, seed=7), randn(4, 6, seed=8)
    teacher[:, 2] = -math.inf
    teacher[0, 4] = -math.inf
    value, gradient = value_and_gradient(SoftTargets(2.0), student, teacher)
    probabilities = (teacher / 2).softmax(1)
    log_student = (student / 2).log_softmax(1)
    wanted = 4 * torch.special.xlogy(probabilities, probabilities).sub(probabilities * log_student).sum(1).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(gradient, 2 * ((student / 2).softmax(1) - probabilities) / 4, rtol=1e-12, atol=1e-15)
    # Both rule it out, as with a mask on both.
    student[:, 2] = -math.inf
    value, gradient = value_and_gradient(SoftTargets(2.0), student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()


# What is refused


LOGITS, LABELS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
MAPS, MAP_LABELS = torch.zeros(2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CrossEntropy()(MAPS, MAP_LABELS), r"logits must have the shape \(b, K\).* not \(2, 5, 3, 3\)"),
        (lambda: CrossEntropy()(MAPS, MAPS), r"logits must have the shape \(b, K\)"),
        (
            lambda: CrossEntropy()(LOGITS, torch.zeros(2, 1, dtype=torch.int64)),
            r"labels must be whole numbers of shape \(2,\)",
        ),
        (lambda: CrossEntropy()(LOGITS, torch.zeros(2, 4)), r"labels must be .* not float32 of shape \(2, 4\)"),
        (lambda: SoftTargets()(MAPS, MAPS), r"student logits must have the shape \(b, K\)"),
        (lambda: SoftTargets()(LOGITS[0], LOGITS[0]), r"student logits must have the shape \(b, K\).* not \(5,\)"),
        (
            lambda: SoftTargets()(LOGITS.cfloat(), LOGITS.cfloat()),
            "student logits must be real floating-point numbers, not complex64",
        ),
        (lambda: GradientAttention()(MAPS, MAPS, MAPS, MAP_LABELS), r"logits must have the shape \(b, K\)"),
        (
            lambda: SimilarityPreserving()(LOGITS.cfloat(), LOGITS),
            "features must be real floating-point numbers, not complex64",
        ),
        (
            lambda: AttentionTransfer()(MAPS, MAPS.cdouble()),
            "features must be real floating-point numbers, not complex128",
        ),
        (lambda: AttentionTransfer()(MAPS.long(), MAPS), "features must be real floating-point numbers, not int64"),
        (lambda: SimilarityPreserving()([], []), "a loss needs at least one tensor of each model, and got none"),
        (lambda: AttentionTransfer()([], []), "a loss needs at least one tensor of each model, and got none"),
        (lambda: SimilarityPreserving()(torch.zeros(()), torch.zeros(())), r"tensors of shape \(b, ...\)"),
    ],
)
def test_what_is_no_input_of_a_loss_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What autograd and Python do with a loss


@pytest.mark.parametrize("loss", [AttentionTransfer(), AttentionTransfer(p=3), SimilarityPreserving()], ids=repr)
def test_forward_mode_derivatives_are_those_of_reverse_mode(loss):
    student, teacher, direction = randn(3, 4, 3, 3, seed=9), randn(3, 5, 3, 3, seed=10), randn(3, 4, 3, 3, seed=11)
    _, gradient = value_and_gradient(loss, student, teacher)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(student, direction), teacher)).tangent
    assert tangent.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-12)
    _, tangent = torch.func.jvp(lambda s: loss(s, teacher), (student,), (direction,))
    assert tangent.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-12)


@pytest.mark.parametrize("loss", [AttentionTransfer(), AttentionTransfer(p=3), SimilarityPreserving()], ids=repr)
def test_a_loss_compiles_into_one_graph(loss):
    student, teacher = randn(3, 4, 3, 3, seed=9), randn(3, 5, 3, 3, seed=10)
    torch.compiler.reset()
    compiled = torch.compile(lambda s: loss(s, teacher), fullgraph=True, backend="aot_eager")
    wanted, found = (value_and_gradient(function, student) for function in (lambda s: loss(s, teacher), compiled))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_loss_can_be_copied_and_pickled():
    """With process groups, too: test_ranks.py."""
    sp = SimilarityPreserving(scope=1, weights=[2.0], floor=0.1)
    student, teacher = randn(4, 5), randn(4, 6)
    wanted = sp(student, teacher)
    for twin in (copy.deepcopy(sp), pickle.loads(pickle.dumps(sp))):
        assert repr(twin) == repr(sp)
        assert twin(student, teacher) == wanted


def test_the_scope_of_a_machine_needs_no_launch(monkeypatch):
    """One process is alone, whatever the launch of its parent said."""
    student, teacher = randn(4, 5), randn(4, 6)
    for said in ("2", "4", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert SimilarityPreserving(scope="node")(student, teacher) == SimilarityPreserving()(student, teacher)


def test_a_loss_names_its_settings():
    """They are what ranks compare before they begin."""
    assert repr(SoftTargets(3)) == "SoftTargets(temperature=3)"
    shown = "SimilarityPreserving(floor=0.01, scope=2, grid=[1, 2, 4], weights=None, comm_dtype=None"
    assert repr(SimilarityPreserving(scope=2, grid=(1, 2, 4))).startswith(shown)
