"""`DistillationStep` in a plain loop of one process, as its docstring shows, against the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from plain_reference import attention, features_of, similarity

from dkd.data import Normalize
from dkd.distillation import FeatureTerm, FrozenTeacher, LabelTerm, LogitTerm, Objective
from dkd.distillation.step import STEPS_THAT_COMPARE_PASSES, DistillationStep
from dkd.losses import AttentionTransfer, CrossEntropy, SimilarityPreserving, SoftTargets
from dkd.models import ModelSpec, TappedModel, build_model, weights_fingerprint
from dkd.rng import derive_seed

ROWS, BETA, GAMMA, TEMPERATURE = 12, 100.0, 700.0, 4.0
STUDENT_TAPS, TEACHER_TAPS = ["layer2", "layer3"], ["block2", "block3"]
NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def alpha(step):
    return 0.9 - 0.1 * step


@pytest.fixture
def batches():
    """Images and labels of three steps."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (ROWS,), generator=generator),
        )
        for _ in range(3)
    ]


def student_model(norm="group"):
    torch.manual_seed(1)
    return build_model(ModelSpec("resnet8", 10, norm)).double()


def teacher_model():
    torch.manual_seed(2)
    return build_model(ModelSpec("wrn_16_1", 10)).double()


def objective():
    return Objective(
        [
            LabelTerm("ce", lambda step: 1.0, CrossEntropy()),
            FeatureTerm(
                "at", lambda step: BETA, AttentionTransfer(), list(zip(STUDENT_TAPS, TEACHER_TAPS, strict=True))
            ),
            # All rows are divided by their norm, as the formula has it: no floor.
            FeatureTerm(
                "sp", lambda step: GAMMA, SimilarityPreserving(floor=0), [("layer3", "block3")], relational=True
            ),
            LogitTerm("kd", alpha, SoftTargets(TEMPERATURE)),
        ]
    )


def distillation(model, micro_steps, **more):
    teacher = FrozenTeacher(teacher_model(), TEACHER_TAPS, needs_logits=True)
    return DistillationStep(
        TappedModel(model, STUDENT_TAPS),
        teacher,
        objective(),
        micro_steps=micro_steps,
        normalize=NORMALIZE,
        dtype=torch.float64,
        **more,
    )


def halves(batch, micro_steps):
    """Return the micro-batches of a batch."""
    return list(zip(*(part.split(ROWS // micro_steps) for part in batch), strict=True))


def own_loop(model, batches, micro_steps, **more):
    """Train as the docstring of dkd/distillation/step.py shows it. Returns each step's terms, counts and gradients."""
    step = distillation(model, micro_steps, **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for number, batch in enumerate(batches):
        terms, counts = {}, {}
        optimizer.zero_grad()
        step.begin(halves(batch, micro_steps), number)
        for i in range(micro_steps):
            loss = step.loss(i)
            (loss.total / micro_steps).backward()
            for sums, values in ((terms, loss.terms), (counts, loss.counts)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.item() / micro_steps
        optimizer.step()
        step.end()
        found.append((terms, counts, [p.grad.clone() for p in model.parameters()]))
    return found


def plain_loop(model, batches):
    """Train by the formulas of the papers, on the whole batch at once. Returns as `own_loop`."""
    teacher = teacher_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (NORMALIZE.mean, NORMALIZE.std)
    )
    found = []
    for number, (pixels, labels) in enumerate(batches):
        images = (pixels.double() / 255 - mean) / std
        logits, features = features_of(model, STUDENT_TAPS, images)
        with torch.no_grad():
            teacher_logits, teacher_features = features_of(teacher, TEACHER_TAPS, images)
        maps = [(attention(s) - attention(t)).pow(2).mean() for s, t in zip(features, teacher_features, strict=True)]
        terms = {
            "ce": F.cross_entropy(logits, labels),
            "at": sum(maps),
            "sp": similarity(features[-1], teacher_features[-1]),
            "kd": TEMPERATURE**2
            * F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1),
                F.softmax(teacher_logits / TEMPERATURE, 1),
                reduction="batchmean",
            ),
        }
        total = terms["ce"] + BETA * terms["at"] + GAMMA * terms["sp"] + alpha(number) * terms["kd"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        gradients = [p.grad.clone() for p in model.parameters()]
        found.append(({name: value.item() for name, value in terms.items()}, {"loss": total.item()}, gradients))
    return found


def assert_equal(found, wanted, tolerance=1e-12):
    for (terms, counts, gradients), (wanted_terms, wanted_counts, wanted_gradients) in zip(found, wanted, strict=True):
        assert terms == pytest.approx(wanted_terms, rel=tolerance)
        assert counts["loss"] == pytest.approx(wanted_counts["loss"], rel=tolerance)
        for ours, theirs in zip(gradients, wanted_gradients, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("micro_steps", [1, 2, 3])
def test_a_loop_of_ones_own_trains_as_the_formulas_say(batches, micro_steps):
    """Values, gradients and weights of three steps, the schedule of a weight included; accumulated, in two passes."""
    ours, theirs = student_model(), student_model()
    assert_equal(own_loop(ours, batches, micro_steps), plain_loop(theirs, batches))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_two_passes_over_two_halves_are_one_pass_over_the_whole_batch(batches):
    assert not distillation(student_model(), 1).has_two_passes
    assert distillation(student_model(), 2).has_two_passes
    assert_equal(own_loop(student_model(), batches, 2), own_loop(student_model(), batches, 1))


def test_a_relational_loss_of_halves_alone_would_be_another_one(batches):
    """What the second pass is there for: SP of two halves is not SP of the batch."""
    whole, halved = (own_loop(student_model(), batches[:1], micro_steps)[0][0]["sp"] for micro_steps in (1, 2))
    parts = [own_loop(student_model(), [half], 1)[0][0]["sp"] for half in halves(batches[0], 2)]
    assert halved == pytest.approx(whole, rel=1e-12)
    assert sum(parts) / 2 != pytest.approx(whole, rel=1e-3)


def test_the_second_forward_repeats_the_first_and_that_is_compared_in_the_first_steps(batches):
    many = (batches * 3)[: STEPS_THAT_COMPARE_PASSES + 2]
    differences = [counts["pass_difference"] for _, counts, _ in own_loop(student_model(), many, 2)]
    assert differences == [0.0] * len(many)
    assert "pass_difference" not in own_loop(student_model(), batches[:1], 1)[0][1]

    model, generator = student_model(), torch.Generator()  # whose numbers no seed of torch repeats
    model.register_forward_pre_hook(lambda _, inputs: inputs[0] + torch.randn(inputs[0].shape, generator=generator))
    differences = [counts["pass_difference"] for _, counts, _ in own_loop(model, many, 2)]
    assert all(difference > 1e-2 for difference in differences[:STEPS_THAT_COMPARE_PASSES])
    assert differences[STEPS_THAT_COMPARE_PASSES:] == [0.0, 0.0]  # not compared any more


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_running_statistics_move_once_a_step_unless_its_update_was_left_out(batches, micro_steps):
    model = student_model("batch")
    step = distillation(model, micro_steps, may_skip=True)
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].detach()))
    for number, skipped in enumerate((False, True, False)):
        before, count = norm.running_mean.clone(), norm.num_batches_tracked.item()
        seen.clear()
        step.begin(halves(batches[number], micro_steps), number)
        for i in range(micro_steps):
            (step.loss(i).total / micro_steps).backward()
        step.end(skipped)
        assert len(seen) == (2 * micro_steps if micro_steps > 1 else 1)
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen[-micro_steps:]]).mean(0)
        wanted = before if skipped else 0.9 * before + 0.1 * mean
        torch.testing.assert_close(norm.running_mean, wanted, rtol=1e-12, atol=1e-14)
        assert norm.num_batches_tracked == count + (not skipped)


def test_both_passes_mix_a_micro_batch_with_the_same_random_numbers(batches):
    seeds = []

    def mixing(images, labels, seed):
        seeds.append(seed)
        return images.double(), labels

    own_loop(student_model(), batches[:2], 2, mixing=mixing, seed=5)
    of_step = [[derive_seed(5, number, place, 1) for place in (0, 1)] for number in (0, 1)]
    assert seeds == [*of_step[0], *of_step[0], *of_step[1], *of_step[1]]


def test_the_teacher_is_not_trained_and_runs_once_for_each_micro_batch(batches):
    step = distillation(student_model(), 2)
    before, calls = weights_fingerprint(step.teacher), []
    step.teacher.register_forward_hook(lambda *_: calls.append(1))
    step.begin(halves(batches[0], 2), 0)
    for i in range(2):
        step.loss(i).total.backward()
    step.end()
    assert len(calls) == 2
    assert weights_fingerprint(step.teacher) == before
    assert all(p.grad is None for p in step.teacher.parameters())


def test_a_student_can_learn_from_labels_alone(batches):
    model = student_model()
    alone = Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy())])
    step = DistillationStep(TappedModel(model, []), None, alone, normalize=NORMALIZE, dtype=torch.float64)
    step.begin([batches[0]], 0)
    loss = step.loss(0)
    step.end()
    assert loss.total.item() == loss.terms["ce"].item() == loss.counts["loss"].item()
    images, labels = batches[0]
    assert F.cross_entropy(step.logits(images), labels).item() == pytest.approx(loss.total.item(), rel=1e-12)


def test_another_number_of_micro_batches_is_refused(batches):
    with pytest.raises(ValueError, match="1 micro-batches for steps of 2"):
        distillation(student_model(), 2).begin([batches[0]], 0)


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("kind", [LabelTerm, LogitTerm])
def test_a_loss_is_given_what_it_asks_for_by_name(batches, micro_steps, kind):
    seen = []

    def asking(logits, other, layout=None, indices=None):
        seen.append(indices.tolist())
        return layout.mean(logits.sum(1) + indices)

    objective = Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy()), kind("asking", lambda step: 1.0, asking)])
    assert objective.needs_indices
    student = TappedModel(student_model(), [])
    teacher = FrozenTeacher(teacher_model(), [], True)
    step = DistillationStep(student, teacher, objective, micro_steps=micro_steps, dtype=torch.float64)
    indices = torch.arange(100, 100 + ROWS)
    step.begin(halves(batches[0], micro_steps), 0, indices.chunk(micro_steps))
    for i in range(micro_steps):
        step.loss(i)
    assert seen == [part.tolist() for part in indices.chunk(micro_steps)]
    step.end()
    step.begin(halves(batches[1], micro_steps), 1)
    with pytest.raises(ValueError, match="the loss 'asking' asks for indices: give them to"):
        step.loss(0)


def test_a_name_among_the_first_two_parameters_is_no_question():
    def loss(logits, labels, layout=None):
        return logits.sum()

    assert LabelTerm("mine", lambda step: 1.0, loss).asked == ()
    assert LabelTerm("ce", lambda step: 1.0, CrossEntropy()).asked == ()
