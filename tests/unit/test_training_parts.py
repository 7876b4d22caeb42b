import math

import numpy as np
import pytest
import torch
from torch import nn

from dkd.build.optimizers import build_optimizer
from dkd.build.schedules import learning_rate, loss_weight
from dkd.config.losses import WeightSchedule
from dkd.config.schema import AdamWSection, ConstantSchedule, CosineSchedule, OneCycleSchedule, SgdSection, StepSchedule
from dkd.distillation import FrozenTeacher
from dkd.distillation.batch_norm import BatchNormStatistics
from dkd.engines.ema import WeightAverage
from dkd.models import ModelSpec, build_model, weights_fingerprint


def curve(schedule, peak=1.0, steps_per_epoch=10, total=100):
    lr = learning_rate(schedule, peak, steps_per_epoch, total)
    return [lr(step) for step in range(total)]


def test_step_schedule_is_torchs_multi_step():
    ours = curve(StepSchedule(name="step", milestones=[3, 6], factor=0.2), peak=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60], 0.2)
    for value in ours:
        assert math.isclose(value, theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_cosine_ends_at_its_final_value():
    values = curve(CosineSchedule(name="cosine", final=0.1))
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)


def test_one_cycle_is_torchs():
    for share in (0.3, 0.25):
        ours = curve(OneCycleSchedule(name="one_cycle", peak=share, start=0.04, final=1e-4), peak=0.5)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.5, total_steps=100, pct_start=share, div_factor=25, final_div_factor=400
        )
        for step, value in enumerate(ours):
            assert math.isclose(value, theirs.get_last_lr()[0], rel_tol=1e-9), step
            optimizer.step()
            if step < 99:
                theirs.step()


def test_warm_up_is_linear_and_ends_at_the_peak():
    values = curve(ConstantSchedule(name="constant", warmup_epochs=2))
    assert values[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert set(values[20:]) == {1.0}


def test_loss_weights_over_the_run():
    def at(weight, step):
        return loss_weight(weight, 10, 101)(step)

    assert at(3.0, 50) == 3
    linear = WeightSchedule(start=2, end=1)
    assert [at(linear, s) for s in (0, 50, 100)] == [2, 1.5, 1]
    cosine = WeightSchedule(start=2, end=0, schedule="cosine")
    assert [at(cosine, s) for s in (0, 50, 100)] == pytest.approx([2, 1, 0])
    warmup = WeightSchedule(start=0, end=8, schedule="warmup", warmup_epochs=4)
    assert [at(warmup, s) for s in (0, 9, 10, 29, 30, 99)] == [2, 2, 4, 6, 8, 8]
    step = WeightSchedule(start=2, schedule="step", milestones=[5], factor=0.5)
    assert [at(step, s) for s in (49, 50)] == [2, 1]


def test_weight_decay_can_leave_norm_and_bias_alone():
    model = build_model(ModelSpec("resnet8", 10))
    for section in (
        SgdSection(name="sgd", lr=0.1, weight_decay=0.1, decay_norm_and_bias=False),
        AdamWSection(name="adamw", lr=0.1, weight_decay=0.1, decay_norm_and_bias=False),
    ):
        decayed, others = build_optimizer(section, model).param_groups
        assert decayed["weight_decay"] == 0.1
        assert others["weight_decay"] == 0
        assert all(p.dim() > 1 for p in decayed["params"])
        assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_average_follows_the_formula_and_gives_the_weights_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.9)
    expected = model[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 1
        average.update()
        expected = 0.9 * expected + 0.1 * model[0].weight.detach()
    live = model[0].weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight.detach(), live)


def test_running_statistics_move_once_a_step_by_the_mean_over_micro_batches():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    micro_batches = torch.randn(4, 5, 3, 2, 2)
    statistics = BatchNormStatistics(norm, micro_steps=4, world_size=1)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(2):
        statistics.start_step()
        for images in micro_batches:
            with statistics.forward():
                norm(images)
            statistics.finish_micro_batch()
        statistics.finish_step()
        mean = 0.7 * mean + 0.3 * torch.stack([m.mean((0, 2, 3)) for m in micro_batches]).mean(0)
        var = 0.7 * var + 0.3 * torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in micro_batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == step + 1


def test_a_teacher_never_trains_and_never_changes():
    teacher = FrozenTeacher(build_model(ModelSpec("wrn_16_1", 10)), ["block2"], needs_logits=True, input_size=32)
    before = weights_fingerprint(teacher)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    logits, features = teacher(torch.randn(2, 3, 16, 16))
    assert not logits.requires_grad
    assert features["block2"].shape == (2, 32, 16, 16)  # the images were resized to 32
    images = torch.randn(2, 3, 16, 16, requires_grad=True)  # as gradient-based attention transfer asks for it
    teacher(images)[0].sum().backward()
    assert images.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert weights_fingerprint(teacher) == before


def test_a_fingerprint_sees_one_bit():
    model = build_model(ModelSpec("resnet8", 10))
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.fc.bias[3] += 1e-7
    assert weights_fingerprint(model) != before


def test_random_states_come_back():
    import random

    from dkd.rng import random_states, restore_random_states

    def draw():
        return torch.rand(2).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()

    draw()  # an odd number of normal ones: each generator holds a spare one
    states = random_states()
    drawn = draw()
    assert draw() != drawn
    restore_random_states(states)
    assert draw() == drawn


def test_buckets_are_settled_without_the_model_and_where_ddp_moves_its_inputs():
    """As on GPUs: DDP then moves its first argument, and must have one."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from dkd.engines.ddp import settle_buckets

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        model[0].bias.requires_grad_(False)
        wrapped = DistributedDataParallel(model)
        wrapped.device_ids, wrapped.device_type = [0], "cpu"
        before = weights_fingerprint(model)
        settle_buckets(wrapped, model)
        assert weights_fingerprint(model) == before
        assert all(p.grad is None for p in model.parameters())
        wrapped.device_ids = None
        assert wrapped(torch.zeros(1, 3, 4, 4)).shape == (1, 4, 2, 2)  # its own forward is back
    finally:
        dist.destroy_process_group()


def test_every_loss_of_a_recipe_has_its_section_its_term_and_its_name():
    from dkd.build.objective import TERMS
    from dkd.config.losses import LOSSES, CustomLossSection, LossesSection, LossSection

    assert set(LOSSES) == set(LossesSection.model_fields) - {"custom"}
    assert set(TERMS) == {*LOSSES.values(), CustomLossSection}
    assert len({section.title for section in LOSSES.values()}) == len(LOSSES)
    assert all(section.describe is not LossSection.describe for section in LOSSES.values())


def test_overrides_leave_the_callers_values_as_they_are():
    from dkd.config.loading import build_recipe

    values = {
        "data": {"train": "digits", "validation": "digits", "transforms": "digits"},
        "student": {"name": "resnet8"},
        "train": {"global_batch": 32, "epochs": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant"},
    }
    before = {key: dict(section) for key, section in values.items()}
    assert build_recipe(values, ["train.epochs=7", "run.seed=3"]).train.epochs == 7
    assert values == before
