"""Losses of logits: values and gradients of the public implementations, plain formulas, and what is refused."""

import pytest
import torch
from reference_material import require_method_losses

from dkd import DKD, NKD, SoftTargets

# Settings of each public implementation. The references add an epsilon: 1e-7 to a standard deviation (standardised KD),
# and they take the logarithm of a sum of probabilities (DKD), where ours is a logsumexp.
CASES = {
    "kd_standardized_T2": (SoftTargets(2.0, standardize=True), 1e-5),
    "kd_standardized_T4": (SoftTargets(4.0, standardize=True), 1e-5),
    "dkd_a1_b8_T4": (DKD(1.0, 8.0, 4.0), 1e-9),
    "dkd_a1_b0.5_T1": (DKD(1.0, 0.5, 1.0), 1e-9),
    "nkd_T1_g1.5": (NKD(1.0, 1.5), 1e-9),
    "nkd_T2_g1": (NKD(2.0, 1.0), 1e-9),
}


def needs_labels(loss):
    return not isinstance(loss, SoftTargets)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_public_implementations(case):
    reference = require_method_losses()
    loss, tolerance = CASES[case]
    sizes = sorted({key.split("/")[0] for key in reference if f"/{case}/" in key})
    assert len(sizes) == 3
    for size in sizes:
        student = reference[f"{size}/student"].double().requires_grad_()
        more = (reference[f"{size}/labels"],) if needs_labels(loss) else ()
        value = loss(student, reference[f"{size}/teacher"].double(), *more)
        (gradient,) = torch.autograd.grad(value, student)
        for name, ours, theirs in (
            ("loss", value, reference[f"{size}/{case}/loss"].double().squeeze()),
            ("gradient", gradient, reference[f"{size}/{case}/grad"].double()),
        ):
            error = float((ours - theirs).detach().norm() / theirs.norm())
            assert error < tolerance, f"{size}: {name} differs by {error:.1e}"


def logits(rows=7, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator, dtype=dtype) * 3
    teacher = torch.randn(rows, classes, generator=generator, dtype=dtype) * 3
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_standardised_logits_with_the_references_epsilon_are_its_own_formula(temperature):
    """With the epsilon that ours leaves out, the formula reproduces the reference to rounding: the difference of the
    case above is that epsilon and nothing else."""
    reference = require_method_losses()
    size, case = "logits_16x10", f"kd_standardized_T{temperature:.0f}"
    student = reference[f"{size}/student"].double().requires_grad_()

    def normalize(z):
        return (z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True))

    s, t = normalize(student) / temperature, normalize(reference[f"{size}/teacher"].double()) / temperature
    value = temperature**2 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, reference[f"{size}/{case}/loss"].double().squeeze(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, reference[f"{size}/{case}/grad"].double(), rtol=1e-9, atol=1e-12)


def test_equal_logits_of_a_sample_are_standardised_without_a_nan():
    student, teacher, _ = logits()
    with torch.no_grad():
        student[0], teacher[1] = 2.5, -1.0
    value = SoftTargets(2.0, standardize=True)(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_decoupled_with_the_teachers_weight_is_plain_soft_targets():
    """KL = TCKD + (1 − p_T,y) NCKD (equation 4 of the paper), sample by sample."""
    student, teacher, labels = logits()
    for row in range(len(labels)):
        s, t, y = student[row : row + 1], teacher[row : row + 1], labels[row : row + 1]
        share = 1 - float(t.softmax(1)[0, y])
        torch.testing.assert_close(DKD(1.0, share, 1.0)(s, t, y), SoftTargets(1.0)(s, t), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [DKD(1.0, 2.0, 1.0), NKD()])
def test_sure_logits_keep_their_digits_in_float32(loss):
    """p_y = 1 − 1e-13: 1 − p_y is 0 in float32, and its logarithm −∞."""
    student = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    teacher, labels = torch.tensor([[29.0, 1.0, 3.0]]), torch.tensor([0])
    value = loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(value, student)
    exact = student.detach().double().requires_grad_()
    expected = loss(exact, teacher.double(), labels)
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [DKD(), NKD()])
def test_what_is_no_class_is_refused(loss):
    student, teacher, labels = logits()
    with pytest.raises(ValueError, match=r"needs the class \(b,\) of each sample"):
        loss(student, teacher, torch.eye(5, dtype=torch.float64)[labels])
    with pytest.raises(ValueError, match="different numbers of rows"):
        loss(student, teacher, labels[:-1])
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        type(loss)(temperature=0)
