"""Losses by few operations: derivatives of first and second order, transforms, ends of the range, and updates by one
kernel."""

import weakref

import pytest
import torch
from torch import nn

from dkd import DIST, DKD, AttentionTransfer, BatchLayout, CrossEntropy, SimilarityPreserving, SoftTargets
from dkd.build.optimizers import build_optimizer
from dkd.config.optimizers import SgdSection
from dkd.distillation.batch_norm import BatchNormStatistics
from dkd.library_internals.torch import FakeTensorMode


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def at_of_two(first, second):
    return AttentionTransfer(weights=[1.0, 0.3])([first, second], [double(3, 5, 4, 4), double(3, 2, 2, 3)])


def sp_of_two(first, second):
    return SimilarityPreserving(floor=0.0)([first, second], [double(4, 5), double(4, 3)])


def kd(logits):
    return SoftTargets(4.0)(logits, double(3, 6))


def dkd(logits):
    return DKD(1.0, 3.0, 2.0)(logits, double(3, 6), torch.tensor([0, 5, 2]))


def dist(logits):
    return DIST(2.0, 0.5, 3.0)(logits, double(4, 6))


CASES = {
    "at": (at_of_two, [double(3, 2, 4, 4), double(3, 4, 2, 3)]),
    "sp": (sp_of_two, [double(4, 7), double(4, 2)]),
    "kd": (kd, [double(3, 6) + 1]),
    "dkd": (dkd, [double(3, 6) + 1]),
    "dist": (dist, [double(4, 6) + 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives(name):
    loss, inputs = CASES[name]
    inputs = [each.clone().requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_transforms_may_follow_the_teacher_too():
    features, targets = double(5, 3, 2, 4, 4), double(5, 3, 6, 4, 4)
    at = AttentionTransfer()
    layout = BatchLayout((3,))
    one_by_one = torch.stack([at(s, t, layout=layout) for s, t in zip(features, targets, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda s, t: at(s, t, layout=layout))(features, targets), one_by_one)
    z, w = double(5, 3, 6), double(5, 3, 6) * 2
    loss = SoftTargets()
    one_by_one = torch.stack([loss(s, t, layout=layout) for s, t in zip(z, w, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda s, t: loss(s, t, layout=layout))(z, w), one_by_one)
    torch.testing.assert_close(torch.vmap(lambda t: loss(z[0], t, layout=layout))(w)[0], one_by_one[0])


def test_a_teacher_of_inference_mode_teaches():
    student = double(3, 6).requires_grad_()
    with torch.inference_mode():
        teacher = double(3, 6) * 3
    for loss, more in ((SoftTargets(), ()), (DKD(), (torch.tensor([1, 0, 5]),)), (DIST(), ())):
        student.grad = None
        loss(student, teacher, *more).backward()
        assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [1e18, 1e12, 1e-12])
def test_attention_of_long_and_short_features_is_that_of_others(size):
    """Their squares still fit float32."""
    student, teacher = double(2, 64, 8, 8).float(), double(2, 32, 8, 8).float()
    wanted, found = student.clone().requires_grad_(), (student * size).requires_grad_()
    at = AttentionTransfer()
    value, scaled = at(wanted, teacher), at(found, teacher * size)
    torch.testing.assert_close(scaled, value, rtol=1e-4, atol=0)
    value.backward()
    scaled.backward()
    torch.testing.assert_close(found.grad.double() * size, wanted.grad.double(), rtol=1e-2, atol=1e-9)


def test_pairs_of_several_types_are_those_of_one_type():
    types = (torch.float32, torch.float64, torch.bfloat16)
    students, teachers = [double(5, 7) for _ in types], [double(5, 4) for _ in types]
    wanted = SimilarityPreserving()(students, teachers)
    mixed = [s.to(type_).requires_grad_() for s, type_ in zip(students, types, strict=True)]
    found = SimilarityPreserving()(mixed, [t.to(type_) for t, type_ in zip(teachers, types[::-1], strict=True)])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=0)
    for gradient, type_ in zip(torch.autograd.grad(found, mixed), types, strict=True):
        assert gradient.dtype == type_
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("loss", [SimilarityPreserving(), AttentionTransfer(), SoftTargets(), DKD(), DIST()])
def test_a_value_keeps_no_memory_but_its_own(loss):
    """A list of values of steps, as a user may keep one, must not keep what they were computed of."""
    shape = (6, 3, 4, 4) if isinstance(loss, AttentionTransfer) else (6, 9)
    more = (torch.arange(6),) if isinstance(loss, DKD) else ()
    value = loss(double(*shape).float().requires_grad_(), double(*shape).float() * 2, *more)
    assert value.detach().untyped_storage().nbytes() <= 8


def test_attention_keeps_maps_of_the_teacher_and_not_its_features():
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    kept = weakref.ref(teacher)
    value = AttentionTransfer()(student, teacher)
    del teacher
    assert kept() is None
    value.backward()


@pytest.mark.parametrize("floor", [0.01, 0.0])
@pytest.mark.parametrize("weight", [1.0, 1e4])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("type_", [torch.float32, torch.float64])
def test_similarities_of_features_that_are_all_zero_have_a_finite_gradient(floor, weight, rows, type_):
    student = torch.zeros(rows, 5, dtype=type_, requires_grad=True)
    value = SimilarityPreserving(floor=floor, weights=[weight])(student, double(rows, 4).to(type_))
    (gradient,) = torch.autograd.grad(3000 * value, student)
    assert value.isfinite()
    assert (gradient == 0).all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("gap", [50, 150, 200, 300, 360, 800])
def test_dist_of_sure_models_is_a_number(gap, create_graph):
    student, teacher = double(5, 4), double(5, 4) * 2
    student[:, 1] += gap
    teacher[:, 1] += gap
    student.requires_grad_()
    value = DIST()(student, teacher)
    (gradient,) = torch.autograd.grad(value, student, create_graph=create_graph)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_dkd_keeps_its_digits_where_the_other_classes_count_little():
    """A student that is sure of the label, and a teacher that nearly is."""
    student, labels = double(6, 9).float(), torch.arange(6)
    student[torch.arange(6), labels] += 1e4
    teacher = double(6, 9).float()
    teacher[torch.arange(6), labels] += 100
    for alpha, beta in ((1.0, 0.0), (9.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        loss = DKD(alpha, beta)
        exact = loss(student.double(), teacher.double(), labels)
        # float32 has logits of 1e4 to 1e-3.
        torch.testing.assert_close(loss(student, teacher, labels).double(), exact, rtol=1e-3, atol=1e-9)
    student[:, 7] = -torch.inf  # and the teacher not
    assert DKD(0.0, 1.0)(student, teacher, labels) == torch.inf


def test_tensors_that_are_kept_for_all_calls_are_no_fake_ones():
    features, more = double(3, 2, 4, 4), double(3, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for loss, each in ((AttentionTransfer(), features), (DIST(), more)):
            fake = mode.from_tensor(each).requires_grad_()
            loss(fake, mode.from_tensor(each)).backward()
    for loss, each in ((AttentionTransfer(), features), (DIST(), more)):
        loss(each.clone().requires_grad_(), each * 2).backward()


@pytest.mark.parametrize("floor", [0.01, 0.0])
@pytest.mark.parametrize("size", [1e-17, 1e17])
@pytest.mark.parametrize("type_", [torch.float32, torch.float64])
def test_similarities_of_long_and_short_features_are_those_of_others(size, type_, floor):
    student, teacher = double(6, 5).to(type_), double(6, 4).to(type_)
    sp = SimilarityPreserving(floor=floor)
    wanted, found = student.clone().requires_grad_(), (student * size).requires_grad_()
    value, scaled = sp(wanted, teacher), sp(found, teacher * size)
    torch.testing.assert_close(scaled, value, rtol=1e-3, atol=0)
    value.backward()
    scaled.backward()
    torch.testing.assert_close(found.grad.double() * size, wanted.grad.double(), rtol=1e-2, atol=1e-6)


def test_the_gradient_of_a_sample_of_zeros_is_that_of_blocks():
    """Without a floor it is huge, and depends on what relations are divided by."""
    student, teacher = double(6, 5), double(6, 4)
    student[2] = 0
    sp, found = SimilarityPreserving(floor=0.0), []
    for more in ({}, {"create_graph": True}):
        own = student.clone().requires_grad_()
        found.append(torch.autograd.grad(sp(own, teacher), own, **more)[0].detach())
    assert found[0][2].norm() > 1e6
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_labels_that_are_ignored_count_as_samples():
    """The loss is divided by B: how many labels of all ranks are not ignored is not known without a message."""
    logits, labels = double(6, 4), torch.tensor([0, 1, -100, 3, 2, 1])
    known = CrossEntropy()(logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(CrossEntropy()(logits, labels), known * 5 / 6)
    assert CrossEntropy()(logits, torch.full_like(labels, -100)) == 0


def test_rows_that_do_not_fit_a_given_layout_are_refused_for_every_pair():
    features = [torch.randn(4, 2, 3, 3), torch.randn(3, 2, 3, 3)]
    with pytest.raises(ValueError, match="holds 4 rows"):
        AttentionTransfer()(features, [f.clone() for f in features], layout=BatchLayout((4,)))


def test_stored_relations_of_several_pairs_of_odd_widths_are_the_live_ones_bit_for_bit():
    for seed in range(20):
        torch.manual_seed(seed)
        rows = 5 + seed % 9
        students = [torch.randn(rows, width, requires_grad=True) for width in (3, 16, 7)]
        teachers = [torch.randn(rows, width) for width in (16, 3, 33)]
        loss, layout = SimilarityPreserving(), BatchLayout((rows,))
        live = loss(students, teachers, layout=layout)
        place = loss.settle([], layout, torch.device("cpu"))
        relations, _, _ = loss.relate_teacher(teachers, place)
        stored = loss(students, relations, layout=layout)
        assert torch.equal(live, stored)
        for one, other in zip(torch.autograd.grad(live, students), torch.autograd.grad(stored, students), strict=True):
            assert torch.equal(one, other)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.later = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, step):
        return self.always(x) + (self.later(x) if step > 1 else 0)


def test_one_kernel_updates_what_gets_its_first_gradient_later():
    """As torch's plain SGD does, which makes the momentum of a parameter then."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Branches().double()
        section = SgdSection(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        optimizer = build_optimizer(section, model, fused)
        for step in range(5):
            optimizer.zero_grad()
            model(double(4, 3), step).square().sum().backward()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_counts_of_batches_do_not_depend_on_accumulation_and_leave_out_frozen_layers(micro_steps):
    trained, frozen = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    model = nn.Sequential(trained, frozen)
    statistics = BatchNormStatistics(model, micro_steps, world_size=1)
    for step in range(4):
        if step == 1:
            frozen.eval()
        statistics.start_step()
        for _ in range(micro_steps):
            with statistics.forward():
                assert trained.num_batches_tracked is None
                model(torch.randn(3, 2, 2, 2))
            if micro_steps > 1:
                model(torch.randn(3, 2, 2, 2))  # as recomputed activations do in a backward
            statistics.finish_micro_batch()
        statistics.finish_step()
    assert trained.num_batches_tracked == 4
    if micro_steps == 1:
        assert frozen.num_batches_tracked == 1
