"""Gradient-based attention transfer against a closed form and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dkd import GradientAttention
from dkd.losses.gradient_attention import input_gradient

CLASSES, PIXELS = 4, (3, 5, 6)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, *PIXELS, dtype=torch.float64), torch.randint(0, CLASSES, (6,))


def linear(seed):
    torch.manual_seed(seed)
    return torch.randn(CLASSES, 90, dtype=torch.float64, requires_grad=True)


def closed_form(weight, images, labels):
    """z = W x: J_i = Wᵀ (softmax(z_i) − y_i); returns J (b, 90), the residuals and the probabilities (b, K)."""
    probabilities = (images.flatten(1) @ weight.T).softmax(1)
    residual = probabilities - F.one_hot(labels, CLASSES)
    return residual @ weight, residual, probabilities


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_gradient_of_a_linear_model_is_its_closed_form(batch, probabilities):
    images, labels = batch
    weight = linear(1)
    leaf = images.clone().requires_grad_()
    targets = F.one_hot(labels, CLASSES).double() if probabilities else labels
    found = input_gradient(leaf.flatten(1) @ weight.T, leaf, targets, differentiable=True)
    assert torch.allclose(found.flatten(1), closed_form(weight, images, labels)[0], rtol=1e-12)


@pytest.mark.parametrize("squared", [False, True])
def test_value_and_gradient_on_linear_models_are_the_closed_forms(batch, squared):
    """d(½‖D‖²)/dW = r Dᵀ + S W D xᵀ with D = J_S − J_T, S = diag(p) − p pᵀ; for ½‖D‖, that times ½ / ‖D‖."""
    images, labels = batch
    student, teacher = linear(1), linear(2)
    leaf = images.clone().requires_grad_()
    loss = GradientAttention(squared=squared)(leaf.flatten(1) @ student.T, leaf.flatten(1) @ teacher.T, leaf, labels)
    (found,) = torch.autograd.grad(loss, student)
    with torch.no_grad():
        own, residual, p = closed_form(student, images, labels)
        difference = own - closed_form(teacher, images, labels)[0]
        norms = difference.norm(dim=1)
        wanted = torch.zeros_like(student)
        for i, x in enumerate(images.flatten(1)):
            spread = torch.diag(p[i]) - torch.outer(p[i], p[i])
            squares = torch.outer(residual[i], difference[i]) + torch.outer(spread @ (student @ difference[i]), x)
            wanted += squares / len(images) * (1 if squared else 0.5 / norms[i])
        value = (0.5 * (norms**2 if squared else norms)).mean()
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


class Small(nn.Module):
    """Everything smooth, so that finite differences converge."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.conv2, self.head = nn.Conv2d(4, 4, 3, stride=2), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        return self.head(self.conv2(F.gelu(self.norm(self.conv1(x)))).tanh().mean((2, 3)))


@pytest.mark.parametrize("form", ["transfer", "symmetric"])
@pytest.mark.parametrize("squared", [False, True])
def test_finite_differences_agree(batch, form, squared):
    """Central differences of the loss in every weight of the student."""
    images, labels = batch
    student, teacher = Small(1), Small(2)
    gradient_at = GradientAttention(form, squared)

    def loss():
        leaf = images.clone().requires_grad_()
        other = teacher(leaf) if form == "transfer" else student(leaf.flip(-1))
        return gradient_at(student(leaf), other, leaf, labels)

    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    step = 1e-5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            flat[i] += step
            above = loss().item()
            flat[i] -= 2 * step
            below = loss().item()
            flat[i] += step
            found = 0.0 if gradient is None else gradient.flatten()[i].item()
            assert found == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)


def test_the_teacher_and_the_size_of_the_batch_are_constants(batch):
    images, labels = batch
    student, teacher = Small(1), Small(2)

    def loss(rows):
        leaf = images[rows].clone().requires_grad_()
        return GradientAttention()(student(leaf), teacher(leaf), leaf, labels[rows])

    loss(slice(None)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    halves = [loss(slice(0, 3)).item(), loss(slice(3, 6)).item()]
    assert loss(slice(None)).item() == pytest.approx(sum(halves) / 2, rel=1e-12)


def test_a_symmetric_network_costs_nothing(batch):
    """Means over columns do not see which way an image is turned."""
    images, labels = batch
    weight = linear(1)[:, :15]
    leaf = images.clone().requires_grad_()

    def model(x):
        return x.mean(-1).flatten(1) @ weight.T

    assert GradientAttention("symmetric")(model(leaf), model(leaf.flip(-1)), leaf, labels).item() < 1e-12


def test_wrong_use_is_refused(batch):
    images, labels = batch
    logits = torch.zeros(6, CLASSES, dtype=torch.float64)
    with pytest.raises(ValueError, match="images require no gradient"):
        GradientAttention()(logits, logits, images, labels)
    with pytest.raises(ValueError, match="form='flip'"):
        GradientAttention("flip")
