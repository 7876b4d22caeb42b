"""Several teachers of one student: each with an input of its own, one pass a micro-batch; what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F

import dkd
from dkd import (
    AttentionTransfer,
    DistillationStep,
    FeatureTerm,
    FrozenTeacher,
    LogitTerm,
    Objective,
    SoftTargets,
    TappedModel,
)
from dkd.cli import main
from dkd.config import losses
from dkd.config.loading import validate
from dkd.data import Normalize
from dkd.distillation import TeacherGroup, objective
from dkd.models import ModelSpec, build_model

RECIPE = {
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8"},
    "teachers": {
        "wide": {"name": "wrn_16_1", "weights": "random"},
        "deep": {
            "name": "resnet14",
            "weights": "random",
            "input_size": 24,
            "normalization": {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]},
        },
    },
    "losses": {
        "kd": {"alpha": 0.9, "teacher": "ensemble"},
        "at": {"beta": 100, "teacher": "wide", "pairs": [["layer2", "block2"]]},
        "sp": {"preset": "paper", "teacher": "deep", "pairs": [["layer3", "layer3"]]},
        "fitnet": {
            "preset": "repdistiller",
            "teacher": "deep",
            "resize": "interpolate",
            "pairs": [["layer2", "layer2"]],
        },
    },
    "train": {"global_batch": 32, "micro_batch": 16, "epochs": 1, "max_steps": 3, "precision": "fp64"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "cosine"},
}


def build(name, seed):
    torch.manual_seed(seed)
    return build_model(ModelSpec(name, 10)).double().eval()


def test_the_words_of_both_rooms_are_one():
    assert losses.ENSEMBLE == objective.ENSEMBLE


def test_each_loss_compares_with_its_own_teacher():
    """One step of two micro-batches against plain forwards."""
    wide, deep, student = build("wrn_16_1", 1), build("resnet14", 2), build("resnet8", 3)
    group = TeacherGroup(
        {
            "wide": FrozenTeacher(wide, ["block2"], needs_logits=True),
            "deep": FrozenTeacher(deep, ["layer3"], needs_logits=True, input_size=24),
        }
    )
    terms = [
        LogitTerm("kd", lambda step: 1.0, SoftTargets(4.0), teacher="ensemble"),
        LogitTerm("own", lambda step: 1.0, SoftTargets(2.0), teacher="deep"),
        FeatureTerm("at", lambda step: 1.0, AttentionTransfer(), [("layer2", "block2")], teacher="wide"),
        FeatureTerm("sp", lambda step: 1.0, dkd.SimilarityPreserving(), [("layer3", "layer3")], True, teacher="deep"),
    ]
    own = Normalize((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    shared = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tapped = TappedModel(student, ["layer2", "layer3"]).eval()
    step = DistillationStep(
        tapped, group, Objective(terms), micro_steps=2, normalize=shared,
        teacher_normalize={"wide": shared, "deep": own}, dtype=torch.float64,
    )  # fmt: skip
    pixels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.int64)
    step.begin([(pixels[:4], labels[:4]), (pixels[4:], labels[4:])], 0)
    found = [step.loss(i) for i in (0, 1)]
    step.end()
    images, theirs = (
        (pixels.double() / 255 - torch.tensor(n.mean).double().view(3, 1, 1))
        / torch.tensor(n.std).double().view(3, 1, 1)
        for n in (shared, own)
    )
    theirs = F.interpolate(theirs, (24, 24), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits, features = tapped(images)
        of_wide, maps = TappedModel(wide, ["block2"])(images)
        of_deep, rows = TappedModel(deep, ["layer3"])(theirs)
    wanted = {
        "kd": SoftTargets(4.0)(logits, (of_wide + of_deep) / 2),
        "own": SoftTargets(2.0)(logits, of_deep),
        "at": AttentionTransfer()(features["layer2"], maps["block2"]),
        "sp": dkd.SimilarityPreserving()(features["layer3"], rows["layer3"]),
    }
    for name, value in wanted.items():
        mean = torch.stack([loss.terms[name] for loss in found]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-6 if name in ("kd", "own") else 1e-5, atol=1e-12)


def test_a_student_learns_from_two_teachers_and_resumes(tmp_path, capsys):
    values = {**RECIPE, "run": {"dir": str(tmp_path / "run"), "trackers": []}, "checkpoint": {"every_steps": 1}}
    result = dkd.train(values)
    said = capsys.readouterr().err
    assert "teacher wide, wrn_16_1: 175,066 parameters, replicated" in said
    assert "warning: the teacher's weights are random, as the recipe states; it teaches nothing (deep)" in said
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line and "kd" in line]
    assert len(steps) == 3
    state = json.loads(max((result.run_dir / "checkpoints").glob("step_*/state.json")).read_text())
    assert set(state["teacher"]["teachers"]) == {"wide", "deep"}
    resumed = dkd.train({**values, "train": {**values["train"], "max_steps": 4}}, allow_recipe_change=True)
    assert resumed.evaluation is not None
    alone = dkd.evaluate(result.run_dir).result  # of a recipe whose losses and teachers are left out
    assert alone.loss == pytest.approx(resumed.evaluation.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": {"name": "wrn_16_1", "weights": "random"}}, "teacher: there are `teachers`, too"),
        ({"losses": {"kd": {"alpha": 1}}}, "losses.kd.teacher: is required with several teachers; take one of wide, deep"),
        ({"losses": {"kd": {"alpha": 1, "teacher": "wid"}}}, "losses.kd.teacher: 'wid' is none of teachers: wide, deep; did you mean wide?"),
        ({"losses": {"kd": {"alpha": 1, "teacher": "wide"}}}, "teachers.deep: no loss names it; add one with `teacher: deep`, or remove it"),
        ({"losses": {**RECIPE["losses"], "ce": {"teacher": "wide"}}}, "losses.ce.teacher: 'wide': this loss compares with no teacher"),
        ({"losses": {**RECIPE["losses"], "at": {**RECIPE["losses"]["at"], "teacher": "ensemble"}}}, "losses.at.teacher: ensemble is the mean of the logits of several teachers"),
        ({"losses": {**RECIPE["losses"], "at": {**RECIPE["losses"]["at"], "teacher": "deep"}}}, "losses.at.pairs.0: 'block2' is not a module of CifarResNet"),
        ({"teachers": {"Wide": {"name": "wrn_16_1", "weights": "random"}}}, "a word of small letters, digits and _, and not ensemble"),
        ({"teachers": {"ensemble": {"name": "wrn_16_1", "weights": "random"}}}, "a word of small letters, digits and _, and not ensemble"),
        ({"teachers": {**RECIPE["teachers"], "wide": {"name": "wrn_16_1", "weights": "no/such"}}}, "teachers.wide.weights: no such file: 'no/such'"),
        ({"teachers": {**RECIPE["teachers"], "wide": {"name": "wrn_16_1", "weights": "random", "classes": 7}}}, "teachers.wide.classes: 7 is not data.classes=10, which losses.kd needs"),
        ({"teachers": {**RECIPE["teachers"], "wide": {"name": "wrn_16_1", "weights": "random", "mesh": "node"}}}, "teachers.wide.mesh: belongs to teacher.placement=fsdp2"),
        ({"data": {**RECIPE["data"], "labels": False, "classes": 10}, "losses": {**RECIPE["losses"], "ce": None}}, "data.validation: has no labels, and the agreement with several teachers is not measured"),
        ({"evaluation": {"agreement": True}}, "evaluation.agreement: is measured with one `teacher`, and there are several"),
        ({"teachers": {}, "teacher": {"name": "wrn_16_1", "weights": "random"}}, "losses.kd.teacher: 'ensemble' is one of several teachers, and there are no `teachers`"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    with pytest.raises(dkd.RecipeError) as refused:
        dkd.train({**RECIPE, "run": {"dir": str(tmp_path / "run"), "trackers": []}, **change})
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_plan_and_dry_run_name_each_teacher(tmp_path, capsys):
    path = tmp_path / "two.yaml"
    path.write_text(
        json.dumps({**RECIPE, "run": {"dir": str(tmp_path / "run")}, "train": {"global_batch": 32, "epochs": 1}})
    )
    assert main(["plan", str(path), "--nodes", "1", "--gpus-per-node", "2"]) == 0
    planned = capsys.readouterr().out
    assert "wide: wrn_16_1, 175,066 parameters" in planned
    assert "deep: resnet14" in planned
    assert main(["train", str(path), "--dry-run"]) == 0
    tried = capsys.readouterr().out
    assert "teacher     deep: resnet14" in tried
    assert "layer3 64×4×4  ←  layer3 64×6×6" in tried


def test_a_recipe_of_two_teachers_reads_back_to_itself():
    recipe = validate(RECIPE)
    assert validate(recipe.model_dump(mode="json")) == recipe
