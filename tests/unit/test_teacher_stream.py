"""The teacher beside the student, with a stand-in for its stream: what the teacher yields is there after `join`, and
not before."""

import contextlib
import types
import weakref

import pytest
import torch
from every_loss import ALL

from dkd.build.teacher_stream import choose_teacher_stream
from dkd.config.loading import validate
from dkd.distillation.step import DistillationStep
from dkd.engines.accelerated import forget_settings
from dkd.training import components
from dkd.training.trainer import Trainer

RECIPE = {
    "run": {"trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {name: ALL[name] for name in ("ce", "at", "sp", "kd")},
    "train": {"global_batch": 16, "micro_batch": 16, "epochs": 1, "max_steps": 3, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "constant"},
}
RECIPES = {
    "one pass": {},
    "two passes": {"train": {"micro_batch": 8}},
    "all losses, modules among them": {"losses": ALL},
    "all losses in two passes": {"losses": ALL, "train": {"micro_batch": 8}},
    "a teacher of other pixels": {"teacher": {"normalization": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}},
}


def recipe(folder, changes):
    values = {section: {**keys, **changes.get(section, {})} for section, keys in RECIPE.items()}
    values["run"]["dir"] = str(folder)
    return validate(values)


class Withheld:
    """Overwrites what the teacher has yielded until it is asked for, and looks whether the images are kept for it."""

    def __init__(self):
        self.outputs, self.inputs, self.kept, self.joins, self.inside = [], [], [], 0, False

    def watch(self, forward):
        original = forward.teacher

        def teacher(pixels, images):
            assert self.inside
            found = original(pixels, images)
            self.outputs += [each for each in (found.logits, *found.features.values()) if each is not None]
            self.inputs += [weakref.ref(pixels), weakref.ref(images)]
            return found

        forward.teacher = teacher

    @contextlib.contextmanager
    def beside(self):
        self.inside = True
        yield
        self.inside = False
        self.kept = [output.clone() for output in self.outputs]
        for output in self.outputs:
            output.fill_(torch.nan)

    def join(self):
        assert not self.inside
        assert all(images() is not None for images in self.inputs)
        self.joins += bool(self.outputs)
        for output, kept in zip(self.outputs, self.kept, strict=True):
            output.copy_(kept)
        self.outputs, self.inputs, self.kept = [], [], []


def train(folder, changes, stream=None):
    """Return the numbers of three steps, and the weights after them."""
    forget_settings()
    trainer = Trainer.from_recipe(recipe(folder, changes), if_run_exists="replace")
    try:
        if stream is not None:
            stream.watch(trainer.parts.step.forward)
        trainer.load_images(3)
        found = [dict(trainer.train_step().terms) for _ in range(3)]
        return found, [tensor.clone() for tensor in trainer.parts.engine.model.state_dict().values()]
    finally:
        trainer.close()


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_reads_the_teacher_before_it_has_computed(tmp_path, monkeypatch, name):
    wanted, weights = train(tmp_path / "in_order", RECIPES[name])
    stream = Withheld()
    monkeypatch.setattr(components, "choose_teacher_stream", lambda *arguments: (stream, None))
    found, other_weights = train(tmp_path / "beside", RECIPES[name], stream)
    assert stream.joins == 3 * (2 if "two passes" in name else 1)
    for one, other in zip(wanted, found, strict=True):
        assert {key: float(value) for key, value in one.items()} == {key: float(value) for key, value in other.items()}
    for one, other in zip(weights, other_weights, strict=True):
        assert torch.equal(one, other)


def test_a_reader_that_does_not_wait_would_be_noticed(tmp_path, monkeypatch):
    stream = Withheld()
    monkeypatch.setattr(components, "choose_teacher_stream", lambda *arguments: (stream, None))
    original = DistillationStep.loss

    def impatient(step, micro_step):
        with monkeypatch.context() as inside:
            inside.setattr(stream, "join", lambda: None)
            return original(step, micro_step)

    monkeypatch.setattr(DistillationStep, "loss", impatient)
    found, _ = train(tmp_path, RECIPES["one pass"], stream)
    assert torch.tensor(found[0]["at"]).isnan()


GPU = torch.device("cuda")
REASONS = {
    "cpu devices have no streams": ({}, torch.device("cpu")),
    "there is none": ({"teacher": None, "losses": {"ce": {}}}, GPU),
    "a sharded teacher's weights travel on streams of their own": ({"teacher": {"placement": "fsdp2"}}, GPU),
    "modules that losses train read its features in the student's forward": ({"losses": {"vid": ALL["vid"]}}, GPU),
    "train.graph is asked for, which makes one launch of both": ({"train": {"graph": True}}, GPU),
}


@pytest.mark.parametrize("reason", REASONS)
def test_one_line_gives_the_reason_where_the_teacher_computes_first(tmp_path, reason):
    changes, device = REASONS[reason]
    values = {section: dict(keys) for section, keys in RECIPE.items()}
    for section, keys in changes.items():
        values[section] = keys if keys is None or section == "losses" else {**values[section], **keys}
    if values["teacher"] is None:
        del values["teacher"]
    values["run"]["dir"] = str(tmp_path)
    values["train"] = {**values["train"], "teacher_stream": True}
    objective = types.SimpleNamespace(terms=[], adapters={"vid": None} if "vid" in values["losses"] else {})
    _, said = choose_teacher_stream(validate(values), objective, device)
    assert said == f"train.teacher_stream: the teacher computes before the student, because {reason}"
