"""How alike student and teacher are, against the plain formulas on all samples at once."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import recipe_in

import dkd
from dkd.build.models import build_model, teacher_spec
from dkd.cli import main
from dkd.data import Normalize, build_pipeline, open_source
from dkd.data.samples import Batch
from dkd.distillation import Outputs
from dkd.models import TappedModel
from dkd.training.agreement import MOST_CHANNELS, AgreementMeter

PAIR = ("layer3", "block3")
CPU = torch.device("cpu")


def plain_cka(x, y):
    """Linear CKA by the Gram matrices of all samples: tr(K H L H) / √(tr(K H K H) · tr(L H L H))."""
    grams = []
    for feature in (x, y):
        gram = feature.double() @ feature.double().T
        n = len(gram)
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        grams.append(centre @ gram @ centre)
    k, gram = grams
    return ((k * gram).sum() / ((k * k).sum() * (gram * gram).sum()).sqrt()).item()


def measured(students, teachers, labels, batch=64, padding=0, classes=True):
    meter = AgreementMeter([PAIR], classes, CPU)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        valid = len(labels[rows])
        pad = lambda t, valid=valid: torch.cat([t, torch.full((padding, *t.shape[1:]), 7.0)])  # noqa: E731
        student, teacher = (
            Outputs(pad(logits[rows]), {path: pad(features[rows])})
            for (logits, features), path in zip((students, teachers), PAIR, strict=True)
        )
        meter.add(student, teacher, Batch(torch.empty(0), labels[rows], valid))
    return meter.over_ranks()


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    maps = draw(200, 6, 4, 4)
    features = 3 + maps, draw(6, 5).T @ maps.flatten(2) + 0.5 * draw(200, 5, 16)
    logits = draw(200, 7)
    labels = torch.randint(0, 7, (200,), generator=generator)
    return (logits, features[0]), (logits + draw(200, 7), features[1].unflatten(2, (4, 4))), labels


def test_numbers_are_those_of_the_plain_formulas_whatever_the_batch(outputs):
    (student, x), (teacher, y), labels = outputs
    kl = F.kl_div(F.log_softmax(student.double(), 1), F.softmax(teacher.double(), 1), reduction="batchmean").item()
    cka = plain_cka(x.double().mean((2, 3)), y.double().mean((2, 3)))
    assert 0.1 < cka < 0.99
    for batch, padding in ((200, 0), (64, 0), (7, 5), (1, 2)):
        found = measured(*outputs, batch, padding)
        assert found.top1 == (student.argmax(1) == teacher.argmax(1)).double().mean().item()
        assert found.teacher_top1 == (teacher.argmax(1) == labels).double().mean().item()
        assert found.kl == pytest.approx(kl, rel=1e-12)
        assert found.cka[PAIR] == pytest.approx(cka, rel=1e-10)


def test_cka_is_one_for_features_that_differ_by_rotation_scale_and_offset(outputs):
    (student, x), (teacher, _), labels = outputs
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    turned = 5 * torch.einsum("cd,bdhw->bchw", rotation, x) - 2
    assert measured((student, x), (teacher, turned), labels).cka[PAIR] == pytest.approx(1, abs=1e-9)


def test_tokens_and_vectors_have_their_channels_last(outputs):
    (student, x), (teacher, y), labels = outputs
    tokens, vectors = x.flatten(2).transpose(1, 2), y.mean((2, 3))
    found = measured((student, tokens), (teacher, vectors), labels)
    assert found.cka[PAIR] == pytest.approx(plain_cka(x.mean((2, 3)), vectors), rel=1e-6)


def test_what_is_not_defined_is_none_and_json(outputs):
    (student, x), (teacher, y), labels = outputs
    constant = measured((student, x), (teacher, torch.full_like(y, 0.3)), labels)
    assert constant.cka[PAIR] is None
    wide = measured((student, x), (teacher, torch.randn(200, MOST_CHANNELS + 1)), labels)
    assert wide.cka[PAIR] is None
    broken = measured((student, x * math.nan), (teacher * math.nan, y), labels)
    assert (broken.kl, broken.cka[PAIR]) == (None, None)
    json.dumps(broken.facts(), allow_nan=False)
    other_classes = measured((student, x), (teacher[:, :3], y), labels, classes=False)
    assert (other_classes.top1, other_classes.kl, other_classes.teacher_top1) == (None, None, None)
    assert other_classes.cka[PAIR] is not None
    # A class that the teacher's mask leaves out has probability 0 and adds nothing.
    masked = teacher.clone()
    masked[:, 2] = -math.inf
    assert 0 < measured((student, x), (masked, y), labels).kl < math.inf


TEACHER = {
    "name": "wrn_16_1",
    "weights": "random",
    "normalization": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    "input_size": 12,
}
TAUGHT = {
    "teacher": TEACHER,
    "losses": {"at": {"beta": 100, "pairs": [list(PAIR)], "resize": "map"}},
    "train": {"epochs": 2, "global_batch": 448, "micro_batch": 64, "max_steps": 4, "ema": {"decay": 0.5}},
}


def agreements(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["evaluation"]["steps"]: line["evaluation"].get("agreement") for line in lines if "evaluation" in line}


def plain_agreement(run, recipe):
    """From the exported student and the teacher as the recipe names it, on all images at once."""
    source, pipeline = open_source("digits", training=False), build_pipeline("digits", image_size=8)
    pixels = pipeline.validation(torch.stack([source.image(i) for i in range(len(source))]))
    torch.manual_seed(0)
    teacher = TappedModel(build_model(teacher_spec(recipe)).eval(), [PAIR[1]])
    student = TappedModel(dkd.load_student(run), [PAIR[0]])
    own = Normalize(**{key: tuple(value) for key, value in TEACHER["normalization"].items()})
    with torch.no_grad():
        logits, features = student(pipeline.normalize(pixels))
        larger = F.interpolate(own(pixels), (12, 12), mode="bilinear", antialias=True)
        theirs, their_features = teacher(larger)
    kl = F.kl_div(F.log_softmax(logits.double(), 1), F.softmax(theirs.double(), 1), reduction="batchmean")
    cka = plain_cka(features[PAIR[0]].mean((2, 3)), their_features[PAIR[1]].mean((2, 3)))
    right = (theirs.argmax(1) == torch.from_numpy(source.labels)).double().mean()
    same = (logits.argmax(1) == theirs.argmax(1)).double().mean()
    return {"top1": same.item(), "kl": kl.item(), "teacher_top1": right.item(), "cka": {":".join(PAIR): cka}}


def test_a_run_compares_its_average_with_the_teacher_as_it_was_taught_and_the_command_repeats_it(tmp_path, capsys):
    """No loss uses the teacher's logits here. The teacher has a normalisation and an input size of its own."""
    values = recipe_in(tmp_path / "run", **TAUGHT)
    run = dkd.train(values).run_dir
    found = agreements(run)
    assert [step for step in found if found[step] is not None] == [4]  # the last evaluation, by default
    plain = plain_agreement(run, dkd.load_recipe(run / "recipe.yaml"))
    for numbers in (found[4], dkd.evaluate(run, ["evaluation.batch=100"], teacher=True).facts()["agreement"]):
        assert numbers["cka"][":".join(PAIR)] == pytest.approx(plain["cka"][":".join(PAIR)], rel=1e-4)
        assert numbers["kl"] == pytest.approx(plain["kl"], rel=1e-4)
        assert (numbers["top1"], numbers["teacher_top1"]) == (plain["top1"], plain["teacher_top1"])
    assert "agreement" not in dkd.evaluate(run).facts()
    for switch, steps in ((True, [3, 4]), (False, [])):
        other = dkd.train(values, [f"run.dir={tmp_path / str(switch)}", f"evaluation.agreement={switch}"]).run_dir
        found = agreements(other)
        assert [step for step in found if found[step] is not None] == steps
    assert main(["report", str(tmp_path / "True"), "--images", "20"]) == 0
    assert "Student and teacher on the validation images, after step 4" in (tmp_path / "True/report.html").read_text()
    assert (tmp_path / "True" / "report_pictures" / "agreement_with_the_teacher.png").exists()
    assert main(["evaluate", str(tmp_path / "True")]) == 0  # without the teacher, whatever the recipe measured


def test_a_teacher_that_cannot_be_had_is_refused_before_anything_starts(tmp_path, capsys):
    run = dkd.train(recipe_in(tmp_path / "run")).run_dir
    assert main(["evaluate", str(run), "--teacher"]) == 2
    assert "the run has no teacher to compare with" in capsys.readouterr().err
    recipe = run / "recipe.yaml"
    taught = "teacher: {name: wrn_16_1, weights: gone.safetensors}\nlosses: {kd: {alpha: 1}}\n"
    kept = recipe.read_text().partition("teacher:")[0], recipe.read_text().partition("train:\n")[2]
    recipe.write_text(f"{kept[0]}{taught}train:\n{kept[1]}")
    assert main(["evaluate", str(run), "--teacher"]) == 2
    assert "dkd: teacher.weights: no such file" in capsys.readouterr().err
    assert main(["evaluate", str(run), "teacher.weights=other.safetensors"]) == 2
    assert "teacher.weights: cannot be changed in an evaluation" in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "there is no teacher to compare with"),
        (
            {
                "teacher": {"name": "wrn_16_1", "weights": "random", "classes": 7},
                "losses": {"custom": [{"name": "x", "loss": "m:x", "weight": 1, "of": "logits"}]},
            },
            "there is nothing to compare|is not data.classes",
        ),
    ],
)
def test_agreement_with_nothing_to_compare_is_refused(tmp_path, sections, message):
    with pytest.raises(dkd.InputError, match=message):
        dkd.train(recipe_in(tmp_path / "run", evaluation={"agreement": True}, **sections))
