"""Losses that train something: values and gradients against plain restatements, on any number of ranks; adapters, and
what is no part of the student."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from threaded_ranks import on_ranks
from torch import nn

import dkd
from dkd import CRD, SRD, VID, BatchLayout, EmbeddingQueue, FeatureDistance, ReviewKD
from dkd.build.optimizers import build_optimizer
from dkd.config.loading import validate
from dkd.config.schema import SgdSection
from dkd.losses.adapters import KINDS, build_adapter, build_projection
from dkd.losses.feature_forms import FeatureForm
from dkd.losses.knowledge_review import ReviewAdapter
from dkd.losses.teacher_norm import TeacherNorm
from dkd.losses.variational import VariationalAdapter
from dkd.models import Adapter, ModelSpec, TappedModel, build_model

EXACT = {"rtol": 1e-12, "atol": 1e-13}
ROWS = {1: (12,), 2: (7, 5), 4: (4, 1, 0, 7), 6: (2, 2, 2, 2, 2, 2)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(value, *inputs):
    return [value.detach(), *torch.autograd.grad(value, inputs)]


# --- Plain restatements, value and gradient


def test_fitnet_is_the_mean_of_squares_after_a_regressor():
    student, teacher = random(5, 4, 6, 6).requires_grad_(), random(5, 7, 6, 6, seed=1)
    adapter = build_adapter("conv1x1_bn_relu", FeatureForm(), [((4, 6, 6), (7, 6, 6))]).double()
    weight = adapter.projections[0][0].weight
    (projected,) = adapter([student], [teacher])
    ours = with_gradients(FeatureDistance()([projected], [teacher]), student, weight)
    mapped = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], student)
    mean, variance = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), unbiased=False, keepdim=True)
    plain = (((mapped - mean) / (variance + 1e-5).sqrt()).clamp_min(0) - teacher).pow(2).mean()
    for found, wanted in zip(ours, with_gradients(plain, student, weight), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_distances_of_vectors(distance, norm):
    student, teacher = random(6, 5).requires_grad_(), 3 * random(6, 5, seed=1) + 1
    ours = FeatureDistance(distance, FeatureForm("vector"), TeacherNorm(norm))(student, teacher)
    if norm != "none":
        dim = 1 if norm == "layer" else 0
        teacher = teacher - teacher.mean(dim, keepdim=True)
        teacher = teacher / (teacher.pow(2).mean(dim, keepdim=True) + 1e-5).sqrt()
    plain = {
        "mse": lambda: (student - teacher).pow(2).mean(),
        "smooth_l1": lambda: F.smooth_l1_loss(student, teacher),
        "cosine": lambda: 1 - ((student * teacher).sum(1) / student.norm(dim=1) / teacher.norm(dim=1)).mean(),
    }[distance]()
    for found, wanted in zip(with_gradients(ours, student), with_gradients(plain, student), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_vid_is_half_the_scaled_squares_and_the_logarithm_of_the_variance():
    students = [random(5, 4, 8, 8).requires_grad_(), random(5, 6, 4, 4, seed=1).requires_grad_()]
    teachers = [random(5, 3, 4, 4, seed=2), random(5, 5, 4, 4, seed=3)]
    form = FeatureForm("map", resize="pool")
    shapes = [form.shapes(s.shape[1:], t.shape[1:]) for s, t in zip(students, teachers, strict=True)]
    adapter = VariationalAdapter(form, shapes).double()
    first = adapter(students, teachers)[1]
    torch.testing.assert_close(first, torch.full_like(first, 5.0), rtol=1e-6, atol=0)
    with torch.no_grad():
        for scale in adapter.scales:
            scale.copy_(random(len(scale), seed=9))
    parameters = [*adapter.parameters()]
    ours = with_gradients(VID(weights=[1.0, 0.5])(adapter(students, teachers), teachers), *students, *parameters)
    plain = 0.0
    for s, t, regress, scale, weight in zip(
        students, teachers, adapter.regressors, adapter.scales, [1.0, 0.5], strict=True
    ):
        s = s if s.shape[2:] == t.shape[2:] else s.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
        for layer in regress:
            s = (
                s.clamp_min(0)
                if isinstance(layer, nn.ReLU)
                else torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], s)
            )
        variance = (1 + scale.exp()).log().view(1, -1, 1, 1) + 1e-5
        plain = plain + weight * (0.5 * ((s - t).pow(2) / variance + variance.log())).mean()
    for found, wanted in zip(ours, with_gradients(plain, *students, *parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def plain_review(adapter, students, teachers):
    """From the deepest stage on; BatchNorm by the batch; nearest interpolation; pooled squares at 4, 2 and 1."""

    def normalised(values, norm):
        mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), unbiased=False, keepdim=True)
        return (values - mean) / (variance + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)

    def nearest(values, side):
        places = [place * values.shape[2] // side for place in range(side)]
        return values[:, :, places][:, :, :, places]

    total, deeper = 0.0, None
    for stage, s, t in reversed(list(zip(adapter.stages, students, teachers, strict=True))):
        s, t = (f[:, :, None, None] if f.dim() == 2 else f for f in (s, t))
        fused = normalised(torch.einsum("oc,bchw->bohw", stage.reduce[0].weight[:, :, 0, 0], s), stage.reduce[1])
        if deeper is not None:
            deeper = nearest(deeper, fused.shape[2])
            convolution = stage.attention[0]
            shares = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], torch.cat([fused, deeper], 1))
            shares = 1 / (1 + (-shares - convolution.bias.view(1, -1, 1, 1)).exp())
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        fused = nearest(fused, t.shape[2])
        output = normalised(F.conv2d(fused, stage.expand[0].weight, padding=1), stage.expand[1])
        side, values, weights = t.shape[2], [(output - t).pow(2).mean()], [1.0]
        for level in (level for level in (4, 2, 1) if level < side):
            block = side // level
            pooled = [f.unflatten(3, (level, block)).unflatten(2, (level, block)).mean((3, 5)) for f in (output, t)]
            values.append((pooled[0] - pooled[1]).pow(2).mean())
            weights.append(weights[-1] / 2)
        total = total + sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        deeper = fused
    return total


def test_review_fuses_stages_from_the_deepest_one_on():
    shapes = [((3, 8, 8), (4, 8, 8)), ((5, 4, 4), (6, 8, 8)), ((6, 2, 2), (7, 2, 2)), ((6,), (7,))]
    students = [random(4, *s, seed=i).requires_grad_() for i, (s, _) in enumerate(shapes)]
    teachers = [random(4, *t, seed=10 + i) for i, (_, t) in enumerate(shapes)]
    form = FeatureForm()
    formed = [(form.shapes(s, s)[0], form.shapes(t, t)[1]) for s, t in shapes]
    adapter = ReviewAdapter(form, formed).double()
    parameters = [*adapter.parameters()]
    ours = ReviewKD()(adapter(students, teachers), teachers)
    plain = plain_review(adapter, students, teachers)
    for found, wanted in zip(
        with_gradients(ours, *students, *parameters), with_gradients(plain, *students, *parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


# --- Losses of the global batch, on any number of ranks


def cut(tensor, rows, rank):
    return tensor[sum(rows[:rank]) : sum(rows[: rank + 1])]


def over_ranks(rows, function):
    """Mean of the values, and the gradient of all rows as engines average it: function(rank, layout) -> [value,
    gradient of the rank's rows, ...]."""
    found = on_ranks(len(rows), lambda rank, group: function(rank, BatchLayout(rows, rank, group), group))
    value = torch.stack([ranks[0] for ranks in found]).mean()
    gradients = zip(*(ranks[1:] for ranks in found), strict=True)
    return [value, *(torch.cat(parts) / len(rows) for parts in gradients)]


@pytest.mark.parametrize("rows", ROWS.values(), ids=str)
def test_srd_is_one_logarithm_of_the_sum_over_all_ranks(rows):
    students, teachers = random(12, 5), 2 * random(12, 5, seed=1) + 3

    def rank(rank, layout, group):
        own = cut(students, rows, rank).clone().requires_grad_()
        return with_gradients(SRD()(own, cut(teachers, rows, rank), layout=layout), own)

    whole = students.clone().requires_grad_()
    wanted = (teachers - teachers.mean(0)) / (teachers.var(0, unbiased=False) + 1e-5).sqrt()
    plain = with_gradients(2 * (whole - wanted).abs().pow(4).sum().log(), whole)
    for found, expected in zip(over_ranks(rows, rank), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_the_pairs_of_srd_have_weights():
    students, teachers = [random(6, 5), random(6, 4, seed=1)], [random(6, 5, seed=2), random(6, 4, seed=3)]
    alone = [SRD()(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(SRD(weights=[1.0, 0.25])(students, teachers), alone[0] + 0.25 * alone[1], **EXACT)


@pytest.mark.parametrize("rows", ROWS.values(), ids=str)
def test_the_queue_is_one_for_all_ranks(rows):
    """Two steps of 12 vectors into a queue of 16: the second one begins to overwrite the first."""
    students, teachers = random(3, 12, 5), random(3, 12, 5, seed=1)
    steps = []
    first = EmbeddingQueue(5, 16, temperature=0.5, teacher_temperature=0.2, seed=3).double().queue.clone()

    def rank(rank, layout, group):
        queue, found = EmbeddingQueue(5, 16, temperature=0.5, teacher_temperature=0.2, seed=3).double(), []
        for s, t in zip(students, teachers, strict=True):
            own = cut(s, rows, rank).clone().requires_grad_()
            found.append(with_gradients(queue(own, cut(t, rows, rank), layout=layout), own))
            queue.end_step()
        if rank == 0:
            steps.append((queue.queue.clone(), int(queue.state_tensors()["place"])))
        return [torch.stack([value for value, _ in found]), torch.cat([g for _, g in found], 1)]

    values, gradients = on_rows(rows, rank)
    place, queue = 0, first
    for step, (s, t) in enumerate(zip(students, teachers, strict=True)):
        own = s.clone().requires_grad_()
        unit = F.normalize(t)
        p, q = ((F.normalize(x) @ queue.T / T).softmax(1) for x, T in ((t, 0.2), (own, 0.5)))
        value, gradient = with_gradients((p * (p / q).log()).sum(1).mean(), own)
        torch.testing.assert_close(values[step], value, **EXACT)
        torch.testing.assert_close(gradients[:, 5 * step : 5 * step + 5], gradient, **EXACT)
        queue = queue.clone()
        for vector in unit:
            queue[place % 16], place = vector, place + 1
    torch.testing.assert_close(steps[0][0], queue, **EXACT)
    assert steps[0][1] == place % 16


def on_rows(rows, function):
    found = on_ranks(len(rows), lambda rank, group: function(rank, BatchLayout(rows, rank, group), group))
    return torch.stack([f[0] for f in found]).mean(0), torch.cat([f[1] for f in found]) / len(rows)


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 1] * 6], ids=["no labels", "labels"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=str)
def test_the_banks_of_crd_do_not_depend_on_the_number_of_ranks(rows, labels):
    """Three steps on 1, 2, 4 and 6 ranks, in another order of rows: values, gradients, constants and banks are those of
    the formula, whose draws are looked at, too."""
    samples, width, negatives = 30, 4, 9
    places = [torch.randperm(samples, generator=torch.Generator().manual_seed(s))[:12] for s in range(3)]
    vectors = random(3, 2, 12, width)
    banks = {}

    def rank(rank, layout, group):
        crd = CRD(samples, width, negatives, seed=5, labels=labels, group=group).double()
        values, gradients = [], []
        for step in range(3):
            own = [cut(v, rows, rank).clone().requires_grad_() for v in vectors[step]]
            value = crd(own, [], cut(places[step], rows, rank), layout=layout)
            values.append(value.detach())
            gradients += torch.autograd.grad(value, own)
            crd.end_step()
        banks[rank] = (crd.student_bank, crd.teacher_bank, crd.normalizers)
        return [torch.stack(values), torch.cat(gradients, 1)]

    values, gradients = on_rows(rows, rank)
    alone = CRD(samples, width, negatives, seed=5, labels=labels).double()
    whole = [alone.student_bank.clone(), alone.teacher_bank.clone()]
    constants = None
    for step in range(3):
        drawn = alone.draw(places[step])
        alone.end_step()
        for row, others in zip(places[step].tolist(), drawn.tolist(), strict=True):
            assert row not in others
            assert labels is None or labels[row] not in {labels[other] for other in others}
        indices = torch.cat([places[step][:, None], drawn], 1)
        own = [v.clone().requires_grad_() for v in vectors[step]]
        units = [v / v.norm(dim=1, keepdim=True) for v in own]
        scores = [(units[side][:, None] * whole[1 - side][indices]).sum(2).div(0.07).exp() for side in (0, 1)]
        constants = constants or [score.detach().mean() * samples for score in scores]
        noise, plain = negatives / samples, 0.0
        for score, constant in zip(scores, constants, strict=True):
            h = score / constant
            plain = plain - (h[:, 0] / (h[:, 0] + noise)).log().sum() - (noise / (h[:, 1:] + noise)).log().sum()
        value, *wanted = with_gradients(plain / 12, *own)
        torch.testing.assert_close(values[step], value, rtol=1e-10, atol=0)
        found = gradients[:, 2 * width * step : 2 * width * (step + 1)]
        torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-9, atol=1e-12)
        for bank, unit in zip(whole, units, strict=True):
            bank[places[step]] = F.normalize(0.5 * bank[places[step]] + 0.5 * unit.detach())
    for number in (0, 1):
        bank = torch.cat([banks[rank][number] for rank in range(len(rows))])
        torch.testing.assert_close(bank, whole[number], **EXACT)
    assert max(len(banks[rank][0]) for rank in range(len(rows))) == math.ceil(30 / len(rows))


def test_what_crd_draws_for_a_sample_does_not_depend_on_the_order_of_rows():
    """Under accumulation, that order depends on the number of ranks."""
    places, order = torch.tensor([11, 3, 29, 0, 17]), torch.tensor([3, 0, 4, 2, 1])
    crd = CRD(30, 4, 9)
    assert torch.equal(crd.draw(places)[order], crd.draw(places[order]))


# --- Adapters


@pytest.mark.parametrize("kind", KINDS)
def test_projections_map_to_the_teachers_width(kind):
    shapes = [((4, 6, 6), (7, 6, 6))] if kind.startswith("conv") else [((4, 6, 6), (7, 6, 6)), ((4,), (7,))]
    for student, teacher in shapes:
        projection = build_projection(kind, student, teacher)
        assert projection(torch.randn(3, *student)).shape == (3, *teacher)
        assert all(parameter.requires_grad for parameter in projection.parameters())


@pytest.mark.parametrize("shape", [(4,), (4, 3, 3)])
def test_an_orthogonal_projection_keeps_distances_in_training_too(shape):
    projection = build_projection("orthogonal", shape, (6, *shape[1:]))
    optimizer = torch.optim.SGD(projection.parameters(), lr=0.1)
    features = torch.randn(8, *shape)
    for _ in range(5):
        (projection(features) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = [
        f.detach().flatten(2).norm(dim=1) if f.dim() > 2 else f.detach().norm(dim=1)
        for f in (features, projection(features))
    ]
    torch.testing.assert_close(*norms)


def test_forms_of_features():
    tokens, swin, vector = torch.randn(2, 1 + 9, 5), torch.randn(2, 3, 3, 5), torch.randn(2, 5)
    form = FeatureForm("map", class_tokens=1)
    torch.testing.assert_close(form.student(tokens, swin)[1, :, 1, 2], tokens[1, 1 + 5])
    torch.testing.assert_close(form.student(swin, tokens)[1, :, 1, 2], swin[1, 1, 2])
    assert form.student(vector, vector).shape == (2, 5, 1, 1)
    mean, first = FeatureForm("vector", class_tokens=1), FeatureForm("vector", class_tokens=1, pool="class_token")
    torch.testing.assert_close(mean.student(tokens, vector), tokens[:, 1:].mean(1))
    torch.testing.assert_close(first.student(tokens, vector), tokens[:, 0])
    torch.testing.assert_close(mean.student(swin, vector), swin.mean((1, 2)))
    with pytest.raises(ValueError, match="resolutions differ"):
        FeatureForm().student(torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4))
    wide, narrow = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 4, 4)
    pooled = FeatureForm(resize="pool")
    assert pooled.student(wide, narrow).shape == pooled.teacher(narrow, wide).shape == (2, 5, 4, 4)
    assert pooled.student(narrow, wide).shape == pooled.teacher(wide, narrow).shape == (2, 5, 4, 4)
    interpolated = FeatureForm(resize="interpolate")
    assert interpolated.student(narrow, wide).shape == interpolated.teacher(wide, narrow).shape == (2, 5, 8, 8)


@pytest.mark.parametrize("rows", ROWS.values(), ids=str)
def test_standardised_features_have_mean_0_and_mean_variance_1(rows):
    features = 5 * random(12, 3, 4, 4) + torch.tensor([1.0, -20.0, 300.0]).view(1, 3, 1, 1).double()
    features[:, 1] *= 7

    norm = TeacherNorm("standardize", [3]).double()
    assert norm([features])[0].isnan().all()
    norm.measure([features[:5]])
    norm.measure([features[5:]])
    norm.finish_measuring()
    (found,) = norm([features])
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        found.var((0, 2, 3), unbiased=False).mean(), torch.tensor(1.0).double(), rtol=1e-9, atol=0
    )


# --- Beside the student, and no part of it


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapters = nn.Linear(3, 4)  # a student's own module of that name is no adapter
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.adapters(images.mean((2, 3))))


def test_adapters_run_in_forwards_that_are_given_something():
    adapter = Adapter(nn.Linear(4, 6), lambda logits, features, given: (features["adapters"] + given["shift"],))
    tapped = TappedModel(Net(), ["adapters"], adapters={"mine": adapter})
    images = torch.randn(5, 3, 2, 2)
    assert set(tapped(images)[1]) == {"adapters"}
    _, features = tapped(images, {"shift": 1.0, "rows": 3})
    torch.testing.assert_close(features["losses/mine/0"], adapter.module(features["adapters"][:3] + 1))
    assert set(tapped(images, {"adapters": []})[1]) == {"adapters"}


def test_adapters_have_a_learning_rate_and_a_weight_decay_of_their_own():
    tapped = TappedModel(Net(), [], adapters={"mine": Adapter(nn.Linear(4, 6), lambda *given: ())})
    section = SgdSection.model_validate(
        {
            "name": "sgd",
            "lr": 0.1,
            "weight_decay": 0.01,
            "decay_norm_and_bias": False,
            "adapters": {"lr": 0.4, "weight_decay": 0.5},
        }
    )
    groups = build_optimizer(section, tapped).param_groups
    assert [(group["weight_decay"], group.get("lr_scale", 1.0), group["lr"]) for group in groups] == [
        (0.01, 1.0, 0.1), (0.0, 1.0, 0.1), (0.5, 4.0, 0.4), (0.0, 4.0, 0.4),
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(list(tapped.parameters()))
    alike = SgdSection.model_validate({"name": "sgd", "lr": 0.1})
    (group,) = build_optimizer(alike, tapped).param_groups
    assert len(group["params"]) == len(list(tapped.parameters()))


RECIPE = {
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {
        "fitnet": {
            "preset": "repdistiller",
            "pairs": [["layer2", "block2"]],
            "teacher_norm": "standardize",
            "measured_images": 100,
        },
        "vid": {"weight": 1, "pairs": [["layer1", "block1"], ["layer2", "block2"]]},
        "review": {"weight": 1, "pairs": [["layer2", "block2"], ["layer3", "block3"], ["pool", "pool"]]},
        "crd": {"preset": "repdistiller", "negatives": 64, "pairs": [["pool", "pool"]]},
        "queue": {"weight": 1, "size": 64, "pairs": [["pool", "pool"]]},
    },
    "train": {
        "global_batch": 32, "micro_batch": 16, "epochs": 1, "max_steps": 3, "precision": "fp32", "ema": {"decay": 0.9},
    },
    "optimizer": {"name": "sgd", "lr": 0.01, "adapters": {"lr": 0.05}},
    "schedule": {"name": "cosine"},
}  # fmt: skip


def test_a_student_trained_with_adapters_is_exported_without_them(tmp_path, capsys):
    result = dkd.train({**RECIPE, "run": {"dir": str(tmp_path / "run"), "trackers": []}})
    said = capsys.readouterr().err
    assert "measured the teacher's features over 128 training images" in said
    assert "the loss crd trains 16,640 parameters of its own (learning rate 0.05), which are no part of the" in said
    state = load_file(result.student)
    bare = build_model(ModelSpec("resnet8", 10))
    assert set(state) == set(bare.state_dict())
    description = json.loads((result.run_dir / "student.json").read_text())
    assert description["parameters"] == sum(p.numel() for p in bare.parameters())
    assert "78,042 parameters" in said
    # The logits are those of the student in the checkpoint, bit for bit, in the plain model.
    bare.load_state_dict(state)
    images = torch.randn(4, 3, 16, 16)
    loaded = dkd.load_student(result.run_dir)
    assert torch.equal(bare.eval()(images), loaded(images))
    assert dkd.evaluate(result.run_dir).result == result.evaluation
    from dkd.export import export_student

    export_student(result.run_dir, "safetensors", tmp_path / "exported.safetensors")
    exported = load_file(tmp_path / "exported.safetensors")
    assert set(exported) == set(state)
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())


def test_the_learning_rate_of_adapters_follows_the_schedule(tmp_path):
    trainer = dkd.Trainer.from_recipe(validate({**RECIPE, "run": {"dir": str(tmp_path / "run"), "trackers": []}}))
    trainer.load_images(2)
    trainer.parts.step.student.train()
    trainer.train_step()
    rates = {group.get("lr_scale", 1.0): group["lr"] for group in trainer.parts.engine.optimizer.param_groups}
    trainer.train_step()
    later = {group.get("lr_scale", 1.0): group["lr"] for group in trainer.parts.engine.optimizer.param_groups}
    trainer.close()
    assert set(rates) == {1.0, 5.0}
    for found in (rates, later):
        assert found[5.0] == pytest.approx(5 * found[1.0])
    assert later[1.0] < rates[1.0]
