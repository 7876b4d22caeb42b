"""The images of somebody's own: classes and their names, labels as text, validation, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from few_images import encoded, write_images
from PIL import Image
from safetensors import safe_open

import dkd
from dkd.data import DataError, open_row_groups, open_source
from dkd.data.sources import count_classes, same_images, set_aside
from dkd.training.entry import resolve

NAMES = ("ant", "bee", "cat", "dog")


def write_folder(path, names=NAMES, each=12, pixels=12):
    """PATH/CLASS/NUMBER.png, the pixels of a class around one colour."""
    generator = np.random.default_rng(len(names))
    for place, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for number in range(each):
            image = generator.integers(60 * place, 60 * place + 60, (pixels, pixels, 3), dtype=np.uint8)
            Image.fromarray(image).save(path / name / f"{number:02}.png")
    return path


def write_rows(path, labels, pixels=8, column="label"):
    """A parquet file with a plain column of labels."""
    image = encoded(np.zeros((pixels, pixels, 3), dtype=np.uint8))
    parquet.write_table(pa.table({"image": [image] * len(labels), column: labels}), path)
    return str(path)


def recipe_of(folder, **sections):
    values = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {"train": "digits", "validation": "digits", "transforms": "digits", "image_size": 8},
        "student": {"name": "resnet8"},
        "train": {"global_batch": 16, "epochs": 1, "max_steps": 2, "precision": "fp32"},
        "optimizer": {"name": "sgd", "lr": 0.02},
        "schedule": {"name": "constant"},
    }
    return {key: {**values.get(key, {}), **sections.get(key, {})} for key in {**values, **sections}}


def refuse(values):
    """Return the message of a recipe that cannot be trained, without training it."""
    with pytest.raises(dkd.InputError) as refused:
        dkd.train(values)
    return str(refused.value)


# --- Classes


def test_classes_are_counted_and_their_names_go_everywhere(tmp_path, capsys):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "validation", NAMES[1:3], each=3)  # it lacks classes
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": f"folder:{tmp_path / 'validation'}"}
    result = dkd.train(recipe_of(tmp_path, data=data))
    assert "4 classes, counted in data.train" in capsys.readouterr().err
    run = result.run_dir
    assert result.evaluation.samples == 6
    assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["classes"] == 4
    assert json.loads((run / "student.json").read_text())["class_names"] == list(NAMES)
    with safe_open(run / "student.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list(NAMES)
        assert file.get_slice("fc.weight").get_shape()[0] == 4
    # Evaluated again, from the student's names alone: the validation data have other indices for their classes.
    assert dkd.evaluate(run).result == result.evaluation
    from dkd.export import export_student

    path, _ = export_student(run, "onnx")
    found = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(found["class_names"]) == list(NAMES)
    assert json.loads(found["image_size"]) == 8
    path, _ = export_student(run, "safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["student"])["class_names"] == list(NAMES)


def test_validation_labels_mean_the_training_datas_classes(tmp_path):
    write_folder(tmp_path / "train", each=3)
    few = open_source(f"folder:{write_folder(tmp_path / 'few', ('bee', 'dog'), each=2)}", training=False)
    from dkd.data.sources import match_classes

    match_classes(list(NAMES), few)
    assert few.labels.tolist() == [1, 1, 3, 3]
    write_folder(tmp_path / "other", ("bee", "eel"), each=2)
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": f"folder:{tmp_path / 'other'}"}
    said = refuse(recipe_of(tmp_path, data=data, train={"global_batch": 4}))
    assert "data.validation: it names classes that the training data do not have: eel" in said


def test_a_folder_one_level_too_high_is_refused(tmp_path):
    for part in ("train", "val", "val_missing"):
        write_folder(tmp_path / part, NAMES[:2], each=2)
    said = refuse(recipe_of(tmp_path, data={"train": f"folder:{tmp_path}", "validation": 0.1}))
    assert "train and val are names of parts of a data set: name one of these folders" in said
    said = refuse(recipe_of(tmp_path, data={"train": f"folder:{tmp_path}", "validation": 0.1, "classes": 3}))
    assert "train and val are names of parts of a data set" in said


def test_a_source_that_names_other_classes_than_the_recipe_counts_is_refused(tmp_path):
    write_folder(tmp_path / "train", each=4)
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": 0.25, "classes": 10}
    said = refuse(recipe_of(tmp_path, data=data, train={"global_batch": 4}))
    assert "it names 4 classes (ant, bee, cat, dog), but data.classes is 10; leave data.classes out" in said


@pytest.mark.parametrize("streamed", [False, True])
def test_text_labels_are_classes_sorted_by_name(tmp_path, streamed):
    # Two files: one of them lacks a class.
    write_rows(tmp_path / "a-0.parquet", ["dog", "ant", "dog"])
    write_rows(tmp_path / "a-1.parquet", ["cat", "dog"])
    opened = (open_row_groups if streamed else open_source)(str(tmp_path / "a-*.parquet"), training=True)
    assert opened.class_names == ["ant", "cat", "dog"]
    assert opened.labels.tolist() == [2, 0, 2, 1, 2]
    assert count_classes(opened) == 3


def test_a_column_of_file_names_is_not_taken_for_labels(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ["1.jpg", "2.jpg", "3.jpg"], column="file")
    with pytest.raises(DataError, match=r"has another text in each of 3 rows; set data\.label_column"):
        open_source(path, training=True)
    assert open_source(path, training=True, label_column="file").class_names == ["1.jpg", "2.jpg", "3.jpg"]


def test_a_number_beside_text_is_no_label_unless_its_name_says_so(tmp_path):
    image = encoded(np.zeros((8, 8, 3), dtype=np.uint8))
    columns = {"image": [image] * 4, "kind": ["cat", "dog"] * 2}
    parquet.write_table(pa.table({**columns, "fold": [0, 0, 1, 1]}), tmp_path / "fold.parquet")
    with pytest.raises(DataError, match=r"set data\.label_column; columns that fit: fold, kind"):
        open_source(str(tmp_path / "fold.parquet"), training=True)
    assert open_source(str(tmp_path / "fold.parquet"), training=True, label_column="kind").class_names == ["cat", "dog"]
    parquet.write_table(pa.table({**columns, "coarse_label": [1, 0, 1, 0]}), tmp_path / "label.parquet")
    assert open_source(str(tmp_path / "label.parquet"), training=True).labels.tolist() == [1, 0, 1, 0]


def test_one_class_is_refused(tmp_path):
    write_folder(tmp_path / "photos" / "train", NAMES[:2], each=3)
    said = refuse(recipe_of(tmp_path, data={"train": f"folder:{tmp_path}", "validation": 0.3}))
    assert "all images are of one class, 'photos': name the folder that holds the folders of the classes" in said


def test_a_folder_without_its_kind_is_named_with_it(tmp_path):
    write_folder(tmp_path / "photos", each=1)
    said = refuse(recipe_of(tmp_path, data={"train": str(tmp_path / "photos")}))
    assert f"is a folder: write folder:{tmp_path / 'photos'}" in said
    write_rows(tmp_path / "a.parquet", [0, 1])
    said = refuse(recipe_of(tmp_path, data={"train": str(tmp_path)}))
    assert f"is a folder: write '{tmp_path}/*.parquet'" in said


def test_numbers_that_are_no_class_index_are_explained(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [1, 2, 3, 4] * 8)
    said = refuse(recipe_of(tmp_path, data={"train": path, "validation": 0.25}))
    assert "the labels are 1, 2, 3, 4, which are no class indices: those of 4 classes are 0 … 3" in said
    said = refuse(recipe_of(tmp_path, data={"train": path, "validation": 0.25, "classes": 4}))
    assert "labels go from 1 to 4" in said
    assert "a label is the index of a class, counted from 0" in said


# --- Validation


def test_training_images_are_no_validation_images_unless_said(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [0, 1] * 16)
    write_rows(tmp_path / "b.parquet", [0, 1] * 8)
    same = {"train": str(tmp_path / "*.parquet"), "validation": path}
    said = refuse(recipe_of(tmp_path, data=same))
    assert f"data.validation: its images are training images: both have the file '{path}'" in said
    dkd.train(recipe_of(tmp_path, data={**same, "allow_same_images": True}))


@pytest.mark.parametrize(
    ("training", "validation", "how"),
    [
        ("folder:{0}", "folder:{0}/", "both are"),
        ("folder:{0}", "folder:{0}/val", "lie one in the other"),
        ("folder:{0}/train", "folder:{0}/val", None),
        ("hub:a/b", "hub:a/b", None),
        ("hub:a/b:train", "hub:a/b:train", "both are hub:a/b:train"),
        ("hub:a/b", "hub:a/b:train", "both are hub:a/b"),
        ("disk:{0}", "disk:{0}", "both are disk:"),
        ("disk:{0}:a", "disk:{0}:b", None),
        ("digits", "digits", None),
        ("torchvision:CIFAR10", "torchvision:CIFAR10", None),
    ],
)
def test_places_are_compared_by_what_they_lead_to(tmp_path, training, validation, how):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    found = same_images(training.format(tmp_path), validation.format(tmp_path))
    assert found is None if how is None else how in found


def test_a_fraction_is_drawn_from_the_seed_of_each_class_alike(tmp_path):
    labels = np.repeat([0, 1, 2, 3], [40, 20, 10, 1])
    source = open_source(write_rows(tmp_path / "a.parquet", labels.tolist()), training=True)
    training, validation = set_aside(source, 0.2, seed=7)
    assert np.bincount(validation.labels, minlength=4).tolist() == [
        8,
        4,
        2,
        0,
    ]  # a class of one image stays in training
    assert sorted([*training.indices, *validation.indices]) == list(range(71))
    again, other = set_aside(source, 0.2, seed=7)[1], set_aside(source, 0.2, seed=8)[1]
    assert validation.indices.tolist() == again.indices.tolist() != other.indices.tolist()
    assert validation.name_of(0) == source.name_of(int(validation.indices[0]))
    with pytest.raises(DataError, match="leaves none for validation"):
        set_aside(source, 0.001, seed=7)


def test_a_fraction_is_evaluated_and_the_rest_trained(tmp_path):
    write_folder(tmp_path / "images", each=10)
    data = {"train": f"folder:{tmp_path / 'images'}", "validation": 0.3}
    result = dkd.train(recipe_of(tmp_path, data=data))
    assert result.evaluation.samples == 12
    assert dkd.evaluate(result.run_dir).result == result.evaluation
    # A name that is given instead is evaluated instead.
    assert dkd.evaluate(result.run_dir, [f"data.validation=folder:{tmp_path / 'images'}"]).result.samples == 40


def test_splits_of_a_saved_data_set_are_named_as_for_the_hub(tmp_path):
    from datasets import DatasetDict, load_dataset

    write_images(tmp_path / "a.parquet", 9)
    saved = load_dataset("parquet", data_files={"train": str(tmp_path / "a.parquet")}, split="train")
    DatasetDict({"all": saved, "some": saved.select(range(4))}).save_to_disk(str(tmp_path / "splits"))
    assert len(open_source(f"disk:{tmp_path}/splits:all", training=False)) == 9
    assert len(open_source(f"disk:{tmp_path}/splits:some", training=True)) == 4
    with pytest.raises(DataError, match=r"has no split 'train', but all, some; write disk:.*:SPLIT"):
        open_source(f"disk:{tmp_path}/splits", training=True)


# --- Teachers and their classes


def test_a_teacher_of_soft_targets_must_have_the_datas_classes_in_their_order(tmp_path):
    write_folder(tmp_path / "train")
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": 0.25}
    of_teacher = dkd.train(recipe_of(tmp_path, data=data, run={"dir": str(tmp_path / "teacher")})).run_dir
    teacher = {"name": "resnet8", "weights": str(of_teacher)}
    losses = {"kd": {"alpha": 0.9}}
    dkd.train(recipe_of(tmp_path, data=data, teacher=teacher, losses=losses))
    for place, name in enumerate(reversed(NAMES)):  # the same folders, in another order
        (tmp_path / "train" / name).rename(tmp_path / "train" / f"{place}")
    (tmp_path / "train").rename(tmp_path / "renamed")
    data = {**data, "train": f"folder:{tmp_path / 'renamed'}"}
    run = {"dir": str(tmp_path / "second")}
    said = refuse(recipe_of(tmp_path, data=data, teacher=teacher, losses=losses, run=run))
    assert "teacher.weights: were trained on other classes: logit 0 is 'ant' there and '0' in the data" in said
    dkd.train(recipe_of(tmp_path, data=data, teacher={**teacher, "check_class_names": False}, losses=losses, run=run))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], None),  # synonyms of the teacher's names
        (["n01440764", "n01443537"], "note"),  # in words of another kind
        (["goldfish", "tench"], "refused"),
        (["tench", "goldfish"], None),
    ],
)
def test_names_of_other_sources_are_compared_by_their_synonyms(monkeypatch, names, said):
    from dkd.models import StatedClasses
    from dkd.preflight import models

    stated = StatedClasses(["tench", "goldfish"], by_dkd=False)
    monkeypatch.setattr(models, "stated_classes", lambda name, weights: stated)
    values = recipe_of(
        Path("unused"),
        data={"classes": 2},
        teacher={"name": "torchvision/resnet18", "weights": "IMAGENET1K_V1"},
        losses={"kd": {"alpha": 1}},
    )
    recipe = resolve(values)
    if said == "refused":
        with pytest.raises(dkd.RecipeError, match="the same classes in another order"):
            models.check_class_order(recipe, names)
    else:
        assert [line[:4] for line in models.check_class_order(recipe, names)] == ([said] if said else [])


# --- Weights of other classes, frozen modules


def test_a_head_of_other_classes_starts_anew_and_frozen_modules_stay(tmp_path, capsys):
    write_folder(tmp_path / "train")
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": 0.25}
    first = dkd.train(recipe_of(tmp_path, run={"dir": str(tmp_path / "ten")}, train={"max_steps": 1})).student
    frozen = ["conv1", "bn1", "layer1"]
    student = {"name": "resnet8", "weights": str(first), "freeze": frozen, "freeze_batch_norm": True}
    run = dkd.train(recipe_of(tmp_path, data=data, student=student)).run_dir
    said = capsys.readouterr().err
    assert "a new head of 4 classes (fc.weight, fc.bias); everything else from" in said
    assert "are frozen" in said
    before, after = (dkd.load_student(path).state_dict() for path in (first, run))
    for key, tensor in after.items():
        is_frozen = key.startswith(tuple(f"{path}." for path in frozen))
        if key.startswith("fc."):
            assert tensor.shape[0] == 4
        elif not key.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[key]) == is_frozen, key
    # Without freeze_batch_norm, the statistics of frozen layers follow the images.
    student = {**student, "freeze_batch_norm": False}
    run = dkd.train(recipe_of(tmp_path, data=data, student=student, run={"dir": str(tmp_path / "moving")})).run_dir
    moved = dkd.load_student(run).state_dict()
    assert torch.equal(moved["bn1.weight"], before["bn1.weight"])
    assert not torch.equal(moved["bn1.running_mean"], before["bn1.running_mean"])


def test_what_becomes_of_the_head_can_be_said(tmp_path):
    file = tmp_path / "ten.pth"
    model = dkd.models.build_model(dkd.models.ModelSpec("resnet8", 10))
    torch.save(model.state_dict(), file)

    def student(**keys):
        return recipe_of(tmp_path, data={"classes": 10}, student={"name": "resnet8", "weights": str(file), **keys})

    from dkd.build.models import build_student

    def head(values):
        built, notes = build_student(resolve(values))
        return torch.equal(built.model.fc.weight, model.fc.weight), bool(notes)

    assert head(student()) == head(student(head="keep")) == (True, False)
    assert head(student(head="new")) == (False, True)
    other = recipe_of(tmp_path, data={"classes": 3}, student={"name": "resnet8", "weights": str(file), "head": "keep"})
    assert "2 of another shape: fc.weight (10, 64) for (3, 64)" in refuse(other)
    # A file without a head at all: not by itself, but when asked for.
    torch.save({key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}, file)
    assert "with student.head=new the head starts at random" in refuse(student())
    assert head(student(head="new")) == (False, True)
    # More than the head differs: refused, with everything that does.
    torch.save({**model.state_dict(), "conv1.weight": torch.zeros(8, 3, 3, 3)}, file)
    assert "1 of another shape: conv1.weight" in refuse(student(head="new"))


def test_a_single_parameter_can_be_frozen_so_that_its_model_trains(tmp_path, monkeypatch):
    (tmp_path / "own_unused.py").write_text("""
import torch
from dkd.models import ModelSpec, build_model

def model(num_classes):
    model = build_model(ModelSpec("resnet8", num_classes))
    model.unused = torch.nn.Parameter(torch.ones(3))
    return model
""")
    monkeypatch.syspath_prepend(tmp_path)
    student = {"name": "own_unused:model"}
    said = refuse(recipe_of(tmp_path, student=student))
    assert "student.name: 'own_unused:model': no gradient reaches unused from the logits" in said
    assert "name them in student.freeze" in said
    assert dkd.train(recipe_of(tmp_path, student={**student, "freeze": ["unused"]})).steps == 2


COLOURS = """
import numpy as np
import torch


class Colours:
    def __init__(self):
        self.labels = np.arange(64) % 2
        self.classes = ["black", "white"]

    def __getitem__(self, index):
        return np.full((8, 8, 3), 255 * self.labels[index], dtype=np.uint8)


def data(training):
    return Colours()


class Teacher(torch.nn.Module):
    def __init__(self, order):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(order))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * self.scale


def right(num_classes):
    return Teacher([-1.0, 1.0])


def swapped(num_classes):
    return Teacher([1.0, -1.0])
"""


@pytest.mark.parametrize(("teacher", "said"), [("right", "100.0%"), ("swapped", "0.0%")])
def test_a_teacher_that_guesses_is_reported_after_the_first_steps(tmp_path, monkeypatch, capsys, teacher, said):
    (tmp_path / "colours.py").write_text(COLOURS)
    monkeypatch.syspath_prepend(tmp_path)
    values = recipe_of(
        tmp_path,
        data={"train": "python:colours:data", "validation": "python:colours:data"},
        teacher={"name": f"colours:{teacher}", "weights": "as_built"},
        losses={"kd": {"alpha": 1.0}},
        train={"micro_batch": 8, "max_steps": 4},
    )
    dkd.train(values)
    lines = [line for line in capsys.readouterr().err.splitlines() if "first class is right" in line]
    assert len(lines) == 1
    assert f"the teacher's first class is right for {said} of 64 training images" in lines[0]
    assert lines[0].startswith("warning: ") == (teacher == "swapped")


def test_an_evaluation_takes_the_fraction_that_was_set_aside_and_no_other(tmp_path):
    write_folder(tmp_path / "images", each=10)
    run = dkd.train(recipe_of(tmp_path, data={"train": f"folder:{tmp_path / 'images'}", "validation": 0.3})).run_dir
    with pytest.raises(dkd.InputError, match=r"the run has set aside 0\.3, not 0\.5"):
        dkd.evaluate(run, ["data.validation=0.5"])
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "ant" / "more.png")
    with pytest.raises(dkd.InputError, match="was set aside from other images than are there now"):
        dkd.evaluate(run)


def test_labels_of_two_kinds_are_not_mixed(tmp_path):
    write_rows(tmp_path / "a.parquet", ["cat", "dog"] * 16)
    write_rows(tmp_path / "b.parquet", [1, 0] * 4)
    said = refuse(recipe_of(tmp_path, data={"train": f"{tmp_path}/a.parquet", "validation": f"{tmp_path}/b.parquet"}))
    assert "labels are text in one of training and validation data, and numbers in the other" in said


def test_minus_one_is_no_label(tmp_path):
    from dkd.data.sources import match_classes

    source = open_source(write_rows(tmp_path / "a.parquet", [-1, -1]), training=False)
    source.class_names = ["dog", "cat"]
    with pytest.raises(DataError, match="labels go from -1 to -1, but it names 2 classes"):
        match_classes(["cat", "dog"], source)


@pytest.mark.parametrize(
    ("stated", "names", "outcome"),
    [
        (["Cat", "Dog", "Bird", "Fish"], ["cat", "dog", "fish", "bird"], "another order"),
        (["cat", "dog", "bird"], ["cat", "dog", "fish"], "2 of the teacher's 3 classes"),
        (["cat", "dog", "bird"], ["Cat", "dog, hound", "bird"], ""),
    ],
)
def test_one_equal_name_does_not_vouch_for_the_others(stated, names, outcome):
    from dkd.models import StatedClasses
    from dkd.preflight.models import compare_classes

    problem, note = compare_classes(StatedClasses(stated, by_dkd=False), names)
    assert outcome in (problem or note or "")
    assert bool(problem or note) == bool(outcome)
    assert bool(problem) == (outcome == "another order")


@pytest.mark.parametrize("weights", ["as_built", "FILE"])
def test_a_new_head_needs_a_model_that_can_have_one(tmp_path, monkeypatch, weights):
    (tmp_path / "own_fixed.py").write_text("""
from dkd.models import ModelSpec, build_model

def ten(num_classes):
    return build_model(ModelSpec("resnet8", 10))
""")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(dkd.models.build_model(dkd.models.ModelSpec("resnet8", 10)).state_dict(), tmp_path / "ten.pth")
    student = {"name": "own_fixed:ten", "weights": weights.replace("FILE", f"{tmp_path}/ten.pth"), "head": "new"}
    said = refuse(recipe_of(tmp_path, data={"classes": 10}, student=student))
    assert "student.head: new needs a model that is built with any number of classes" in said


@pytest.mark.parametrize(
    "name", ["torchvision/resnet999", "torchvision/fasterrcnn_resnet50_fpn", "timm/resnet18.nonsense"]
)
def test_a_misspelled_teacher_is_refused_in_lines(tmp_path, capsys, name):
    from dkd.cli import main

    recipe = tmp_path / "recipe.yaml"
    teacher = {"name": name, "weights": "pretrained"}
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path, teacher=teacher, losses={"kd": {"alpha": 1.0}})))
    assert main(["train", str(recipe), "--dry-run"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("dkd: ") for line in lines)
    assert any(line.startswith("dkd: teacher.") for line in lines)


def test_a_dry_run_reports_what_the_start_will(tmp_path, capsys):
    from dkd.cli import main

    write_folder(tmp_path / "train")
    file = tmp_path / "ten.pth"
    torch.save(dkd.models.build_model(dkd.models.ModelSpec("resnet8", 10)).state_dict(), file)
    student = {"name": "resnet8", "weights": str(file), "freeze": ["conv1"]}
    recipe = tmp_path / "recipe.yaml"
    data = {"train": f"folder:{tmp_path / 'train'}", "validation": 0.25}
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path, data=data, student=student)))
    assert main(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "student: a new head of 4 classes (fc.weight, fc.bias); everything else from" in said
    assert "those of conv1 are frozen" in said


def test_timms_average_of_weights_is_taken_as_timm_takes_it(tmp_path):
    raw, average = (dkd.models.build_model(dkd.models.ModelSpec("resnet8", 4)) for _ in range(2))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "last.pth.tar")
    model = dkd.models.build_model(dkd.models.ModelSpec("resnet8", 4))
    dkd.models.load_weights(model, "resnet8", str(tmp_path / "last.pth.tar"))
    assert torch.equal(model.fc.weight, average.fc.weight)


def test_a_layout_of_another_batch_is_refused_by_every_loss():
    layout = dkd.BatchLayout.even(4)
    maps, logits, labels = torch.rand(3, 2, 4, 4), torch.rand(3, 5), torch.tensor([0, 1, 2])
    for loss, tensors in (
        (dkd.AttentionTransfer(), (maps, maps)),
        (dkd.SimilarityPreserving(), (maps, maps)),
        (dkd.SoftTargets(4.0), (logits, logits)),
        (dkd.CrossEntropy(), (logits, labels)),
    ):
        with pytest.raises(ValueError, match="for a layout in which this rank holds 4 rows"):
            loss(*tensors, layout=layout)
