"""Images without labels: every kind of source, a whole training, its evaluations by the teacher alone."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from few_images import encoded, write_images
from PIL import Image

import dkd
from dkd.build.data import data_facts
from dkd.cli import main
from dkd.config.loading import validate
from dkd.data import DataError, MixupCutmix, in_memory, open_row_groups, open_source
from dkd.data.sources import NO_LABEL, has_labels, set_aside
from dkd.training.agreement import Agreement
from dkd.training.evaluation import Evaluation


def write_unlabelled_folder(path, count=24, pixels=8):
    """PATH/**/NAME.png, some of the images in folders of folders."""
    generator = np.random.default_rng(5)
    for number in range(count):
        folder = path / ("" if number % 3 == 0 else "2024" if number % 3 == 1 else "2024/may")
        folder.mkdir(parents=True, exist_ok=True)
        image = generator.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return path


def write_unlabelled_parquet(path, count=48):
    write_images(path, count, pixels=8)
    parquet.write_table(parquet.read_table(path).drop_columns(["label"]), path, row_group_size=8)
    return str(path)


def recipe_of(folder, **sections):
    values = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "train": "digits", "validation": "digits", "labels": False, "transforms": "digits", "image_size": 8,
            "classes": 10,
        },
        "student": {"name": "resnet8"},
        "teacher": {"name": "wrn_16_1", "weights": "random"},
        "losses": {
            "ce": None,
            "at": {"beta": 100, "pairs": [["layer2", "block2"]]},
            "sp": {"gamma": 10, "reference_batch": 16, "pairs": [["layer3", "block3"]]},
            "kd": {"alpha": 0.9},
        },
        "train": {"global_batch": 16, "epochs": 2, "max_steps": 4, "precision": "fp32"},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": {"name": "constant"},
    }  # fmt: skip
    return {key: {**values.get(key, {}), **sections.get(key, {})} for key in {**values, **sections}}


def evaluations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


# --- Sources


def check_unlabelled(source, count):
    assert len(source) == count
    assert source.labels.dtype == np.int64
    assert set(source.labels.tolist()) == {NO_LABEL}
    assert source.class_names is None
    assert not has_labels(source)
    assert source.image(count - 1).dtype == torch.uint8


def test_a_folder_is_all_images_below_it(tmp_path):
    path = write_unlabelled_folder(tmp_path / "images")
    (path / "notes.txt").write_text("no image")
    (path / "2024" / "again").symlink_to(path)  # a link to a folder above would never end
    source = open_source(f"folder:{path}", training=True, labels=False)
    check_unlabelled(source, 24)
    names = [source.name_of(index) for index in range(24)]
    assert names == sorted(names, key=lambda name: (name.rpartition("/")[0], name))
    assert names[0] == f"{path}/00.png"
    assert names[-1] == f"{path}/2024/may/23.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in it or its folders"):
        open_source(f"folder:{tmp_path / 'empty'}", training=True, labels=False)


def test_a_folder_of_images_alone_is_refused_with_the_cure(tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match=r"for images without labels, set data\.labels=false"):
        open_source(f"folder:{tmp_path / 'flat'}", training=True)


@pytest.mark.parametrize("opened", [open_source, open_row_groups])
def test_parquet_needs_no_label_column_and_ignores_one(tmp_path, opened):
    without = write_unlabelled_parquet(tmp_path / "without.parquet")
    write_images(tmp_path / "with.parquet", 48, pixels=8)
    with pytest.raises(
        DataError, match=r"columns that fit: none .*; for images without labels, set data\.labels=false"
    ):
        opened(without, training=True)
    for path in (without, str(tmp_path / "with.parquet")):
        check_unlabelled(opened(path, training=True, labels=False), 48)
    a, b = (opened(path, training=True, labels=False).image(3) for path in (without, str(tmp_path / "with.parquet")))
    assert torch.equal(a, b)


def test_tar_saved_digits_and_code_need_no_labels(tmp_path, monkeypatch):
    import tarfile

    from datasets import load_dataset

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            file = tmp_path / f"{number}.png"
            file.write_bytes(encoded(np.full((8, 8, 3), number, dtype=np.uint8)))
            tar.add(file, file.name)
    check_unlabelled(open_source(str(tmp_path / "a.tar"), training=True, labels=False), 4)
    path = write_unlabelled_parquet(tmp_path / "a.parquet")
    load_dataset("parquet", data_files={"train": path}, split="train").save_to_disk(str(tmp_path / "saved"))
    check_unlabelled(open_source(f"disk:{tmp_path / 'saved'}", training=True, labels=False), 48)
    check_unlabelled(open_source("digits", training=False, labels=False), 449)
    (tmp_path / "bare_images.py").write_text(
        "import numpy as np\n"
        "def images(training):\n    return [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(6)]\n"
        "def nothing(training):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check_unlabelled(open_source("python:bare_images:images", training=True, labels=False), 6)
    with pytest.raises(DataError, match=r"for images without labels, set data\.labels=false"):
        open_source("python:bare_images:images", training=True)
    with pytest.raises(DataError, match="without a length and images by index"):
        open_source("python:bare_images:nothing", training=True, labels=False)
    sys.modules.pop("bare_images", None)


def test_torchvision_needs_no_list_of_labels(tmp_path, monkeypatch):
    import torchvision

    class Bare:
        def __init__(self, root, train):
            pass

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), None

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Bare)
    check_unlabelled(open_source("torchvision:CIFAR10", training=True, labels=False), 5)
    with pytest.raises(DataError, match=r"Set data\.labels=false to read its images alone"):
        open_source("torchvision:CIFAR10", training=True)


def test_a_fraction_is_drawn_from_all_images_and_facts_follow_their_places(tmp_path):
    path = write_unlabelled_folder(tmp_path / "images")
    source = open_source(f"folder:{path}", training=True, labels=False)
    training, validation = set_aside(source, 0.25, seed=3)
    assert (len(training), len(validation)) == (18, 6)
    assert sorted([*training.indices, *validation.indices]) == list(range(24))
    again = set_aside(source, 0.25, seed=3)[1]
    assert again.indices.tolist() == validation.indices.tolist()
    with pytest.raises(DataError, match=r"0\.01 of 24 training images leaves none for validation"):
        set_aside(source, 0.01, seed=3)
    facts = data_facts(source)
    assert facts["images"] == 24
    assert data_facts(in_memory(source)) == facts  # decoded into memory, they are the same images
    assert data_facts(training) == data_facts(set_aside(source, 0.25, seed=3)[0]) != facts
    assert data_facts(training) != data_facts(set_aside(source, 0.25, seed=4)[0])
    path.rename(tmp_path / "moved")
    moved = open_source(f"folder:{tmp_path / 'moved'}", training=True, labels=False)
    assert data_facts(moved) == facts
    (tmp_path / "moved" / "00.png").rename(tmp_path / "moved" / "renamed.png")
    assert data_facts(open_source(f"folder:{tmp_path / 'moved'}", training=True, labels=False)) != facts


def test_images_are_mixed_alone_and_as_with_labels():
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for ways in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0)):
        mixed, labels = MixupCutmix(10, *ways, labels=False)(images, torch.full((6,), NO_LABEL), seed=9)
        wanted, _ = MixupCutmix(10, *ways)(images, torch.arange(6), seed=9)
        assert torch.equal(mixed, wanted)
        assert labels.tolist() == [NO_LABEL] * 6


# --- Training


def test_a_run_measures_agreement_alone_and_repeats_from_a_checkpoint(tmp_path, capsys):
    """Features and soft targets, mixed images, a fraction for validation, and a run that was interrupted."""
    data = {
        "validation": 0.3,
        "mixup": 0.4,
        "cutmix": 1.0,
        "train": f"folder:{write_unlabelled_folder(tmp_path / 'i', 60)}",
    }
    sections = {"data": data, "checkpoint": {"every_steps": 1, "keep_last": 2, "keep_best": 1}}
    train = {"train": {"epochs": 3, "max_steps": None}}
    whole = dkd.train(recipe_of(tmp_path, run={"dir": str(tmp_path / "whole")}, **sections, **train))
    said = capsys.readouterr().err
    assert "the teacher's first class is right" not in said
    assert "18 images without labels" in said
    assert f"agreement {whole.evaluation.agreement.top1:.4f}" in said.splitlines()[-1]
    result = whole.evaluation
    assert (result.samples, result.top1, result.top5, result.loss, result.classes) == (18, None, None, None, None)
    assert result.problem is None
    assert result.score == result.agreement.top1
    assert result.agreement.teacher_top1 is None
    found = evaluations(whole.run_dir)
    assert [each["steps"] for each in found] == [2, 4, 6]  # each evaluation, not the last alone
    assert all(each["agreement"]["kl"] > 0 and each["top1"] is None for each in found)
    assert all(math.isfinite(each["agreement"]["cka"]["layer3:block3"]) for each in found)
    assert json.loads((whole.run_dir / "student.json").read_text())["evaluation"]["top1"] is None
    # Interrupted after step 3, and resumed: the same weights, bit for bit.
    values = recipe_of(tmp_path, run={"dir": str(tmp_path / "parts")}, **sections, **train)
    dkd.train(values, ["train.max_steps=3"])
    parts = dkd.train(values, allow_recipe_change=True)
    assert parts.evaluation == whole.evaluation
    a, b = (dkd.load_student(each.run_dir).state_dict() for each in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    best = max(found, key=lambda each: (each["agreement"]["top1"], each["steps"]))["steps"]
    kept = {int(path.name.split("_")[1]) for path in (whole.run_dir / "checkpoints").iterdir()}
    assert {5, 6, best} == kept


def test_readers_of_a_run_without_labels(tmp_path, capsys):
    run = str(dkd.train(recipe_of(tmp_path)).run_dir)
    assert main(["status", run]) == 0
    assert "agreement 0." in capsys.readouterr().out
    assert main(["compare", run, run + "/../run/"]) == 2
    assert main(["compare", run]) == 0
    assert "agreement" in capsys.readouterr().out
    assert main(["report", run, "--images", "20"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Student and teacher on the validation images, after step 4" in page
    assert "Accuracy of each class" not in page
    assert (tmp_path / "run" / "report_pictures" / "attention_maps.png").exists()
    capsys.readouterr()
    assert main(["evaluate", run]) == 2
    assert (
        "data.labels: the run's images have no labels: compare the student with its teacher" in capsys.readouterr().err
    )
    assert dkd.evaluate(run, ["data.labels=true"]).result.top1 is not None
    labelled = dkd.evaluate(run, ["data.labels=true"]).result
    assert labelled.samples == 449


def test_a_teacher_with_weights_is_compared_again_by_the_command(tmp_path, capsys):
    teacher = dkd.train(
        recipe_of(tmp_path, run={"dir": str(tmp_path / "teacher")}, data={"labels": True}, losses={"ce": {}})
        | {"teacher": None, "losses": {}}
    ).run_dir
    values = recipe_of(tmp_path, teacher={"name": "resnet8", "weights": str(teacher)})
    values["losses"] = {"ce": None, "kd": {"alpha": 1}}
    values["data"]["classes"] = None  # the teacher's weights state them
    run = dkd.train(values)
    assert "10 classes, as the teacher's weights state" in capsys.readouterr().err
    assert yaml.safe_load((run.run_dir / "recipe.yaml").read_text())["data"]["classes"] == 10
    # Of a plain file, the head of the weights does.
    torch.save(dkd.load_student(teacher).state_dict(), tmp_path / "teacher.pth")
    plain = {
        **values,
        "run": {"dir": str(tmp_path / "plain")},
        "teacher": {"name": "resnet8", "weights": str(tmp_path / "teacher.pth")},
    }
    assert dkd.train(plain).evaluation == run.evaluation
    found = dkd.evaluate(run.run_dir, teacher=True).result
    assert found == run.evaluation
    assert found.agreement.top1 == run.evaluation.agreement.top1
    assert main(["evaluate", str(run.run_dir), "--teacher"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["agreement"]["top1"] == run.evaluation.agreement.top1
    dkd.evaluate(run.run_dir, teacher=True, predictions=tmp_path / "predictions.parquet")
    rows = parquet.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert rows["label"] == [None] * 449
    assert all(0 <= each < 10 for each in rows["prediction"])
    assert "agreement with the teacher: same class first" in printed.err
    with_labels = dkd.evaluate(run.run_dir, ["data.labels=true"], teacher=True).result
    assert with_labels.agreement.teacher_top1 is not None


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_without_a_label_column_trains(tmp_path, streaming):
    path = write_unlabelled_parquet(tmp_path / "a.parquet")
    write_unlabelled_parquet(tmp_path / "b.parquet", 16)
    data = {"train": path, "validation": str(tmp_path / "b.parquet"), "streaming": streaming}
    result = dkd.train(recipe_of(tmp_path, data=data))
    assert result.evaluation.samples == 16
    assert result.steps == 4


def test_a_run_stops_when_the_agreement_no_longer_improves(tmp_path):
    stop_when = {"metric": "agreement", "threshold": 0.0}
    train = {"stop_when": stop_when, "max_steps": 200, "global_batch": 448}
    result = dkd.train(recipe_of(tmp_path, train=train))
    assert result.steps == 3
    assert json.loads((result.run_dir / "student.json").read_text())["stopped_early"].startswith(
        "agreement has reached 0"
    )


def test_the_dry_run_and_its_picture_need_no_labels(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path)))
    assert main(["train", str(path), "--dry-run", "--picture", str(tmp_path / "batch.png")]) == 0
    assert "1348 training images without labels, 449 for validation, 10 classes" in capsys.readouterr().out
    assert (tmp_path / "batch.png").exists()
    assert main(["plan", str(path), "--gpus-per-node", "2", "data.mixup=0.2"]) == 0


# --- A recipe of one's own


def test_dkd_new_writes_a_recipe_for_images_without_labels(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    values = recipe_of(tmp_path, run={"dir": str(teacher)}, data={"labels": True}, train={"max_steps": 1})
    dkd.train({**values, "teacher": None, "losses": {}})
    write_unlabelled_folder(tmp_path / "photos", 64, pixels=32)
    path = tmp_path / "recipe.yaml"
    asked = ["new", "--student", "resnet8", "--data", str(tmp_path / "photos"), "-o", str(path)]
    taught = [*asked, "--teacher", str(teacher), "--no-labels"]
    assert main(taught) == 0
    said = capsys.readouterr().out
    assert "64 images without labels" in said
    assert "losses       at, sp, kd" in said
    recipe = dkd.load_recipe(path)
    assert (recipe.data.labels, recipe.data.classes, recipe.losses.ce) == (False, 10, None)
    assert "# the student's outputs, as many as the teacher has" in path.read_text()
    run = [f"run.dir={tmp_path / 'run'}", "run.trackers=[]", "train.max_steps=1", "train.precision=fp32"]
    assert dkd.train(path, run).evaluation.agreement.top1 is not None
    # Weights that state no classes: features alone are compared.
    random = [*asked, "--teacher", "resnet8=random", "--no-labels", "--force"]
    assert main(random) == 0
    assert "no kd: the teacher's weights state no classes" in capsys.readouterr().out
    assert dkd.load_recipe(path).data.classes == 1000
    assert main([*asked, "--no-labels", "--force"]) == 2
    assert "--no-labels needs --teacher" in capsys.readouterr().err
    assert main([*taught, "--label-column", "y", "--force"]) == 2
    assert "leave one of the two out" in capsys.readouterr().err
    flat = write_unlabelled_folder(tmp_path / "flat", 1)
    assert main(["new", "--student", "resnet8", "--data", str(flat), "-o", str(tmp_path / "b.yaml")]) == 2
    assert "for images without labels, add --no-labels" in capsys.readouterr().err


def test_the_recipe_of_the_guide_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "no_labels.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipe = validate(yaml.safe_load(text))
    assert recipe.losses.reads_labels == []
    # Its models and pairs are there; its images are this test's.
    write_unlabelled_folder(tmp_path / "photos", 40, pixels=32)
    for part in ("train", "val"):
        for name in ("a", "b"):
            write_unlabelled_folder(tmp_path / "probe" / part / name, 3, pixels=32)
    values = yaml.safe_load(text.replace("folder:probe", f"folder:{tmp_path / 'probe'}"))
    values["data"] |= {"train": f"folder:{tmp_path / 'photos'}", "validation": 0.25}
    values["teacher"]["weights"] = "random"
    values["train"] = {**values["train"], "global_batch": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "run": {"dir": str(tmp_path / "run")}}))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0


def test_numbers_of_broken_logits_are_reported_as_a_problem():
    for kl, problem in ((0.5, False), (None, True)):
        found = Evaluation(9, None, None, None, agreement=Agreement(0.3, kl, None)).problem
        assert (found is not None) == problem
        assert found is None or "KL(teacher ‖ student) is not finite" in found
    assert Evaluation(9, None, None, None, agreement=Agreement(None, None, None)).problem is None


def test_a_run_with_labels_that_stops_by_agreement_measures_it_each_time(tmp_path):
    train = {"stop_when": {"metric": "agreement", "patience": 9}, "max_steps": None, "global_batch": 448}
    values = recipe_of(tmp_path, data={"labels": True}, losses={"ce": {}}, train=train)
    run = dkd.train(values).run_dir
    assert [each["agreement"]["top1"] is not None for each in evaluations(run)] == [True, True]
