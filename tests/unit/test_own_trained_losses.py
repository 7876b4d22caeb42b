"""Losses of one's own with parameters: what trains, what is kept, and what is refused before anything starts."""

import json

import pytest
import torch

import dkd
from dkd import CRD
from dkd.checkpoints.tensors import load_tensors, saved_tensors
from dkd.cli import main

MODULE = '''
import torch
import torch.nn.functional as F
from torch import nn

from dkd import gather_rows


class Fit(nn.Module):
    """The mean square after a regressor."""

    def __init__(self, shapes, dropout=0.0):
        super().__init__()
        self.regressors = nn.ModuleList(nn.Conv2d(s[0], t[0], 1) for s, t in shapes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, student, teacher, layout=None):
        pairs = zip(self.regressors, student, teacher)
        return sum(layout.mean((self.dropout(r(s)) - t).square().mean((1, 2, 3))) for r, s, t in pairs)


class Plain(Fit):
    def __init__(self, shapes):
        nn.Module.__init__(self)
        self.regressors = [nn.Conv2d(s[0], t[0], 1) for s, t in shapes]


class Forgotten(Fit):
    """Covers the first of two pairs."""

    def __init__(self, shapes):
        super().__init__(shapes[:1])


class Unused(Fit):
    def __init__(self, shapes):
        super().__init__(shapes)
        self.a, self.b, self.c, self.d = (nn.Linear(2, 2, bias=False) for _ in range(4))


class Lazy(Fit):
    def __init__(self, shapes):
        super().__init__(shapes)
        self.regressors = nn.ModuleList(nn.LazyConv2d(t[0], 1) for _, t in shapes)


class Vector(Fit):
    def forward(self, student, teacher, layout=None):
        return (self.regressors[0](student[0]) - teacher[0]).square().mean((1, 2, 3))


class Nothing(Fit):
    def forward(self, student, teacher, layout=None):
        super().forward(student, teacher, layout)


class Wrong(Fit):
    def __init__(self, shapes):
        super().__init__([(s, (7,)) for s, _ in shapes])


class Relational(Fit):
    relational = True


class Beside(nn.Module):
    """Has a parameter beside its adapter."""

    def __init__(self, shapes):
        super().__init__()
        self.adapter, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, layout=None):
        return self.scale


class Projections(nn.Module):
    def __init__(self, shapes, scale, dropout=0.0):
        super().__init__()
        self.student = nn.Linear(shapes[0][0][0], shapes[0][1][0])
        self.scale, self.dropout = nn.Parameter(torch.ones(1)) if scale else None, nn.Dropout(dropout)

    def forward(self, student, teacher):
        projected = [self.dropout(self.student(student[0].mean((2, 3))))]
        return projected if self.scale is None else [*projected, self.scale]


class Contrast(nn.Module):
    relational = True

    def __init__(self, shapes, scale=False, dropout=0.0):
        super().__init__()
        self.adapter = Projections(shapes, scale, dropout)

    def forward(self, projected, teacher, layout=None):
        t = gather_rows(teacher[0].mean((2, 3)).to(projected[0].dtype), layout)
        own = layout.first_row + torch.arange(len(projected[0]))
        return layout.mean(F.cross_entropy(projected[0] @ t.T, own, reduction="none"))


class Center(nn.Module):
    """A running mean of the teacher's logits, another tensor at each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(10))

    def forward(self, student, teacher, layout=None):
        self.center = 0.5 * self.center + 0.5 * teacher.detach().float().mean(0)
        return layout.mean((student - teacher + self.center).square().mean(1))


class Holder:
    def __init__(self, shapes):
        self.inner = Fit(shapes)

    def __call__(self, student, teacher, layout=None):
        return self.inner(student, teacher, layout)


def closure(shapes):
    inner = Fit(shapes)
    return lambda student, teacher, layout=None: inner(student, teacher, layout)


class OnLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits, labels, layout=None):
        return layout.mean(F.cross_entropy(logits * self.temperature, labels, reduction="none"))
'''
PAIRS = [["layer2", "block2"]]
RECIPE = {
    "data": {"train": "digits", "validation": None, "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "train": {"global_batch": 32, "micro_batch": 16, "epochs": 1, "max_steps": 3, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "constant"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "own_trained.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def recipe_of(place, *losses, **more):
    run = {"dir": str(place / "run"), "trackers": []}
    return {**RECIPE, "run": run, "losses": {"custom": list(losses), **more.pop("losses", {})}, **more}


def loss(name, pairs=PAIRS, **more):
    return {"name": "mine", "loss": f"own_trained:{name}", "weight": 1, "pairs": pairs, **more}


def lines_of(result):
    return [
        json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]


TWO = [["layer1", "block1"], ["layer2", "block2"]]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            loss("Plain"),
            "regressors is a list of modules or parameters, which nothing would train; use torch.nn.ModuleList",
        ),
        (
            loss("Forgotten", TWO),
            "no gradient reaches the student's feature of pair student layer2 (32, 8, 8), teacher block2 (32, 8, 8)",
        ),
        (
            loss("Unused"),
            "no gradient reaches its parameters a.weight, b.weight, c.weight and 1 more; use them in forward, or remove them",
        ),
        (loss("Lazy"), "regressors.0.weight gets its shape in the first forward, and an optimizer needs it before"),
        (
            loss("Vector"),
            "LossValueError: the loss 'mine' returned a tensor of shape (2,), not a scalar tensor; layout.mean(per_sample) makes one",
        ),
        (loss("Nothing"), "LossValueError: the loss 'mine' returned NoneType, not a scalar tensor"),
        (loss("Wrong"), "(student layer2 (32, 8, 8), teacher block2 (32, 8, 8))"),
        (
            loss("Relational"),
            "is relational and has parameters (regressors.0.weight, regressors.0.bias): put them into a module `adapter`",
        ),
        (loss("Beside"), "has scale beside its adapter"),
        (loss("Holder"), "holds a Fit with parameters and is no torch.nn.Module itself"),
        (loss("closure"), "holds a Fit with parameters and is no torch.nn.Module itself"),
        (
            loss("Contrast", options={"scale": True}),
            "yields tensors of one row for each sample, and one of shape (1,) for 2 samples",
        ),
        (
            loss("Beside", [], of="logits"),
            "has an attribute `adapter`, which is a torch.nn.Module of a loss of features",
        ),
    ],
    ids=lambda value: value["loss"] if isinstance(value, dict) else "",
)
def test_what_would_not_train_is_refused_before_anything_starts(place, capsys, section, said):
    (place / "recipe.yaml").write_text(json.dumps(recipe_of(place, section)))
    assert main(["train", "recipe.yaml", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["pop", "keys", "training", "update", "type"])
def test_a_loss_may_have_the_name_of_an_attribute_of_modules(place, name):
    result = dkd.train(recipe_of(place, {**loss("Fit"), "name": name}))
    first, *_, last = lines_of(result)
    assert 0 < last[name] != first[name]
    folder = max((result.run_dir / "checkpoints").glob("step_*")) / "training"
    assert f"model/losses/{name}.loss.regressors.0.weight" in saved_tensors(folder)


def test_a_loss_of_labels_has_parameters_too(place):
    result = dkd.train(recipe_of(place, {**loss("OnLabels", []), "of": "labels"}, teacher=None))
    values = [line["mine"] for line in lines_of(result)]
    assert values[0] == pytest.approx(lines_of(result)[0]["ce"], rel=1e-6)
    assert values[-1] != pytest.approx(lines_of(result)[-1]["ce"], rel=1e-6)


def test_random_adapters_of_both_kinds_draw_the_same_numbers_in_both_passes(place):
    """The adapter of the relational loss runs in both passes, the other in the second alone."""
    mine, contrast = loss("Fit", options={"dropout": 0.5}), loss("Contrast", options={"dropout": 0.5})
    result = dkd.train(recipe_of(place, mine, {**contrast, "name": "contrast"}))
    assert len(lines_of(result)) == 3


@pytest.mark.parametrize(
    "only", [{"srd": {"weight": 0.1, "pairs": PAIRS}}, {"sp": {"preset": "paper", "pairs": PAIRS}}]
)
def test_all_losses_may_be_those_of_the_whole_batch(place, only):
    lines = lines_of(dkd.train(recipe_of(place, losses={"ce": None, **only})))
    (name,) = only
    assert all(line["loss"] == pytest.approx(line[name] * line[f"weight/{name}"], rel=1e-5) for line in lines)


def test_a_buffer_that_is_replaced_at_each_step_is_kept_as_it_is(place):
    result = dkd.train(recipe_of(place, {**loss("Center", []), "of": "logits"}))
    folder = max((result.run_dir / "checkpoints").glob("step_*")) / "training"
    kept = {"loss/mine/center": torch.zeros(10)}
    load_tensors(folder, kept, None)
    assert kept["loss/mine/center"].abs().min() > 0


def test_batch_norm_of_an_adapter_needs_more_than_one_sample(place, capsys):
    values = recipe_of(
        place, losses={"srd": {"weight": 1, "pairs": PAIRS}}, student={"name": "resnet8", "norm": "group"}
    )
    values["train"] = {**values["train"], "micro_batch": 1}
    (place / "recipe.yaml").write_text(json.dumps(values))
    assert main(["train", "recipe.yaml", "--dry-run"]) == 2
    assert "losses.srd: Expected more than 1 value per channel when training" in capsys.readouterr().err


def test_a_step_that_is_left_out_does_not_reach_the_banks():
    crd = CRD(40, 8, 16)
    student, teacher, places = torch.randn(4, 8), torch.randn(4, 8), torch.arange(4)
    student[1] = torch.nan
    crd([student.requires_grad_(), teacher], [], places)
    before = crd.student_bank.clone()
    crd.end_step()
    assert crd.student_bank.isfinite().all()
    assert torch.equal(crd.student_bank[1], before[1])
    assert not torch.equal(crd.student_bank[0], before[0])


@pytest.mark.parametrize("temperature", [0.07, 0.005])
def test_small_temperatures_stay_in_the_range_of_float32(temperature):
    values = []
    for dtype in (torch.float32, torch.float64):
        crd = CRD(40, 8, 16, temperature=temperature).to(dtype)
        generator = torch.Generator().manual_seed(0)
        vectors = [torch.randn(4, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
        value = crd(vectors, [], torch.arange(4))
        values.append([value, *torch.autograd.grad(value, vectors)])
    for ours, exact in zip(*values, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4)


def test_a_queue_that_the_run_does_not_fill_is_reported(place, capsys):
    queue = {"weight": 1, "size": 4096, "pairs": [["pool", "pool"]]}
    dkd.train(recipe_of(place, losses={"queue": queue}))
    said = capsys.readouterr().err
    assert "note: losses.queue.size=4096 vectors, of which the run's 3 steps replace 96; the others stay random" in said
