"""dkd new: the pairs that are chosen for models of this package, torchvision, timm and transformers, and the recipe."""

import json
import shutil

import pytest
import yaml
from few_images import write_images
from PIL import Image

import dkd
from dkd.cli import main
from dkd.commands.new.choices import is_transformer
from dkd.commands.new.models import read_model
from dkd.commands.new.pairs import choose_pairs
from dkd.commands.plan.plan import plan
from dkd.commands.plan.text import describe
from dkd.config import load_recipe
from dkd.models import ModelSpec

pytest.importorskip("timm")
TV_VIT = "encoder.layers.encoder_layer_"
# Student, teacher, sides of their images, the pairs, class tokens, and whether resolutions differ.
PAIRS = [
    ("resnet8", "wrn_16_2", 32, 32, "layer1 block1, layer2 block2, layer3 block3", None, False),
    ("resnet8x4", "resnet32x4", 32, 32, "layer1 layer1, layer2 layer2, layer3 layer3", None, False),
    ("shufflenetv1", "resnet32x4", 32, 32, "layer1 layer2, layer2 layer3", None, False),
    ("mobilenetv2_x0_5", "vgg13_cifar", 32, 32, "blocks.1 block1, blocks.2 block2, blocks.4 block4", None, False),
    ("vgg8_cifar", "resnet50_cifar", 32, 32, "block0 layer1, block1 layer2, block2 layer3, block4 layer4", None, False),
    (
        "torchvision/resnet18",
        "torchvision/resnet34",
        224,
        224,
        "layer1 layer1, layer2 layer2, layer3 layer3, layer4 layer4",
        None,
        False,
    ),
    (
        "torchvision/mobilenet_v3_small",
        "torchvision/resnet50",
        224,
        224,
        "features.1 layer1, features.3 layer2, features.8 layer3, features.12 layer4",
        None,
        False,
    ),
    (
        "torchvision/resnet18",
        "torchvision/vit_b_16",
        224,
        224,
        f"layer1 {TV_VIT}2, layer2 {TV_VIT}5, layer3 {TV_VIT}8, layer4 {TV_VIT}11",
        1,
        True,
    ),
    (
        "torchvision/resnet18",
        "torchvision/swin_t",
        224,
        224,
        "layer1 features.1, layer2 features.3, layer3 features.5, layer4 permute",
        None,
        False,
    ),
    (
        "torchvision/efficientnet_b0",
        "torchvision/convnext_tiny",
        224,
        224,
        "features.2 features.1, features.3 features.3, features.5 features.5, features.8 features.7",
        None,
        False,
    ),
    (
        "torchvision/densenet121",
        "torchvision/regnet_y_400mf",
        224,
        224,
        "features.denseblock1 trunk_output.block1, features.denseblock2 trunk_output.block2, "
        "features.denseblock3 trunk_output.block3, features.denseblock4 trunk_output.block4",
        None,
        False,
    ),
    ("wrn_16_2", "torchvision/resnet18", 32, 224, "block1 layer2, block2 layer3, block3 layer4", None, True),
    (
        "timm/vit_tiny_patch16_224",
        "timm/vit_small_patch16_224",
        224,
        224,
        "blocks.2 blocks.2, blocks.5 blocks.5, blocks.8 blocks.8, blocks.11 blocks.11",
        1,
        False,
    ),
    (
        "timm/deit_tiny_patch16_224",
        "timm/deit_tiny_distilled_patch16_224",
        224,
        224,
        "blocks.2 blocks.2, blocks.5 blocks.5, blocks.8 blocks.8, blocks.11 blocks.11",
        [1, 2],
        False,
    ),
    (
        "timm/mobilenetv3_small_100",
        "timm/swin_tiny_patch4_window7_224",
        224,
        224,
        "blocks.0 layers.0, blocks.1 layers.1, blocks.3 layers.2, blocks.5 norm",
        None,
        False,
    ),
    (
        "timm/resnet18",
        "timm/convnext_atto",
        224,
        224,
        "layer1 stages.0, layer2 stages.1, layer3 stages.2, layer4 stages.3",
        None,
        False,
    ),
]
IDS = [f"{student} from {teacher}" for student, teacher, *_ in PAIRS]
LONG = ("densenet", "convnext_tiny", "vit_small", "deit", "swin", "vit_b_16", "mobilenet_v3_small")
"""Of pairs of these models, three steps take seconds: they are trained by `make test-all`."""


@pytest.mark.parametrize(("student", "teacher", "size", "teacher_size", "pairs", "tokens", "resize"), PAIRS, ids=IDS)
def test_the_last_module_of_each_resolution_is_paired(student, teacher, size, teacher_size, pairs, tokens, resize):
    chosen = choose_pairs(ModelSpec(student, 10), ModelSpec(teacher, 10), size, teacher_size)
    assert ", ".join(" ".join(pair) for pair in chosen.paths) == pairs
    assert chosen.class_tokens == tokens
    assert chosen.needs_resize == resize


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """PHOTOS/train/CLASS/NUMBER.jpg and PHOTOS/val/CLASS/NUMBER.jpg, images of 48 pixels; two classes."""
    path = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (64, 48), (number, 99, 9)).save(path / part / name / f"{number}.jpg")
    return path


def new(*arguments):
    return main(["new", *map(str, arguments)])


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        pytest.param(*row[:3], marks=pytest.mark.slow if any(n in "".join(row[:2]) for n in LONG) else ())
        for row in PAIRS
    ],
    ids=IDS,
)
def test_a_new_recipe_is_planned_and_trained(photos, tmp_path, student, teacher, size):
    file = tmp_path / "recipe.yaml"
    arguments = ("--student", student, "--teacher", f"{teacher}=random", "--data", photos, "--image-size", size)
    assert new(*arguments, "--batch", 4, "-o", file) == 0
    recipe = load_recipe(file)
    assert recipe.data.train == f"folder:{photos / 'train'}"
    assert recipe.data.validation == f"folder:{photos / 'val'}"
    assert recipe.data.classes == 2
    assert {"at", "sp", "kd"} <= {key for key, _ in recipe.losses.named()}
    assert "ranks" in describe(plan(recipe, 1, 2))
    more = ["train.max_steps=3", "train.precision=fp32", "run.trackers=[]", f"run.dir={tmp_path / 'run'}"]
    assert dkd.train(file, more).steps == 3


def test_what_is_chosen_is_printed_and_explained_in_the_recipe(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new("--student", "resnet8", "--teacher", "wrn_16_2=random", "--data", photos) == 0
    said = capsys.readouterr().out
    for line in (
        f"data         40 images of 2 classes (cat, dog); validation folder:{photos / 'val'}",
        "pairs        layer1 16×32×32  ←  block1 32×32×32",
        "losses       ce, at, sp, kd",
        "written      recipe.yaml",
    ):
        assert line in said.splitlines()
    text = (tmp_path / "recipe.yaml").read_text()
    assert "classes: 2  # counted in the training images: cat, dog" in text
    assert load_recipe(tmp_path / "recipe.yaml").run.name == "resnet8_from_wrn_16_2"
    # Nothing of the user's is replaced unasked.
    assert new("--student", "resnet8", "--data", photos) == 2
    assert "'recipe.yaml' exists; choose another -o FILE, or replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == text
    assert new("--student", "resnet8", "--data", photos, "--force") == 0
    assert load_recipe(tmp_path / "recipe.yaml").teacher is None


def test_a_run_teaches_with_its_own_size_and_normalisation(photos, tmp_path, capsys):
    file = tmp_path / "teacher.yaml"
    new("--student", "wrn_16_1", "--data", photos, "--image-size", 16, "--batch", 8, "-o", file)
    run = dkd.train(file, ["train.max_steps=1", f"run.dir={tmp_path / 'teacher'}", "run.trackers=[]"]).run_dir
    capsys.readouterr()
    assert new("--student", "resnet8", "--teacher", run, "--data", photos, "-o", "-") == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["teacher"] == {"name": "wrn_16_1", "weights": f"{run}/student.safetensors", "input_size": 16}
    assert values["losses"]["kd"] == {"alpha": 0.9, "temperature": 4}
    named = read_model(str(run), is_teacher=True, options={"dropout": 0.5})
    assert named.options["dropout"] == 0.5


def test_soft_targets_are_left_out_where_the_teachers_logits_are_of_other_names(photos, tmp_path, capsys):
    file = tmp_path / "teacher.yaml"
    new("--student", "wrn_16_1", "--data", photos, "--image-size", 16, "--batch", 8, "-o", file)
    run = dkd.train(file, ["train.max_steps=1", f"run.dir={tmp_path / 'teacher'}", "run.trackers=[]"]).run_dir
    others = shutil.copytree(photos, tmp_path / "others")
    for part in ("train", "val"):
        (others / part / "cat").rename(others / part / "zebra")
    capsys.readouterr()
    arguments = ("--student", "resnet8", "--teacher", run, "--data", others, "-o", tmp_path / "a.yaml")
    assert new(*arguments) == 0
    why = "the teacher's weights were trained on other classes: logit 0 is 'cat' there and 'dog' in the data"
    assert f"no kd: {why}" in capsys.readouterr().out
    assert load_recipe(tmp_path / "a.yaml").losses.kd is None
    assert new(*arguments, "--losses", "at,kd", "--force") == 2
    assert f"--losses kd compares logits, but {why}; leave kd out" in capsys.readouterr().err


def test_soft_targets_are_left_out_where_the_teacher_has_other_classes(photos, tmp_path, capsys):
    arguments = ("--student", "resnet8", "--teacher", "timm/resnet18", "--data", photos, "-o", tmp_path / "a.yaml")
    assert new(*arguments) == 0
    assert "no kd: the teacher's head has 1000 classes, the data have 2" in capsys.readouterr().out
    recipe = load_recipe(tmp_path / "a.yaml")
    assert recipe.teacher.classes == 1000
    assert recipe.teacher.input_size == 224
    assert recipe.losses.kd is None
    assert new(*arguments, "--force", "--losses", "kd") == 2
    assert "--losses kd compares logits, but the teacher's head has 1000 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--teacher", "wrn_16_2", "--data", "digits"), "a model of this package has no weights of its own"),
        (("--teacher", "wrn_16_2=", "--data", "digits"), "name weights after ="),
        (("--data", "/no/such/folder"), "no such file or folder"),
        (("--data", "foto"), "names no data set"),
        (("--data", "digits", "--validation", "1.5"), "a fraction lies between 0 and 1"),
        (("--data", "digits", "--losses", "at"), "--losses at needs --teacher"),
        (("--data", "digits", "--teacher", "wrn_16_2=random", "--losses", "mse"), "must be some of at, sp, kd"),
        (("--data", "digits", "--teacher", "resnet999=random"), "'resnet999' is not a known model"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert new("--student", "resnet8", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_folders_of_parquet_files_are_found(tmp_path, capsys):
    write_images(tmp_path / "train-0.parquet", 60)
    write_images(tmp_path / "test-0.parquet", 20, seed=1)
    assert new("--student", "resnet8", "--data", tmp_path, "-o", "-") == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["train"] == f"{tmp_path}/train*.parquet"
    assert data["validation"] == f"{tmp_path}/test*.parquet"
    (tmp_path / "test-0.parquet").unlink()
    assert new("--student", "resnet8", "--data", tmp_path, "-o", "-") == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["validation"] == 0.1


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("torchvision/mobilenet_v3_small", 64, False),  # its first stage has as many channels as positions on a side
        ("torchvision/resnet18", 224, False),
        ("timm/efficientvit_b0", 224, False),
        ("torchvision/swin_t", 224, True),
        ("torchvision/vit_b_16", 224, True),
        ("timm/xcit_nano_12_p16_224", 224, True),
    ],
)
def test_a_transformer_is_told_by_its_features(name, size, found):
    assert is_transformer(ModelSpec(name, 10), size) == found


def test_data_in_columns_and_options_of_models(tmp_path, capsys):
    write_images(tmp_path / "train-0.parquet", 60)
    arguments = ("--student", "resnet8", "--data", tmp_path, "--label-column", "label", "-o", "-")
    assert new(*arguments, "--teacher", "timm/vit_tiny_patch16_224=random", "--teacher-options", "{img_size: 64}") == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["data"]["label_column"] == "label"
    assert values["teacher"]["options"] == {"img_size": 64}
    assert values["teacher"]["input_size"] == 64
    assert new(*arguments, "--student-options", "norm") == 2
    assert "--student-options 'norm': write a mapping" in capsys.readouterr().err


def test_a_run_of_code_is_not_imported_unasked(tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student.safetensors").write_bytes(b"")
    description = {"architecture": {"name": "evil:model", "classes": 10}, "image_size": 8}
    (tmp_path / "run" / "student.json").write_text(json.dumps(description))
    assert new("--student", "resnet8", "--teacher", tmp_path / "run", "--data", "digits", "-o", "-") == 2
    assert "is 'evil:model', code to be imported and run; name it yourself" in capsys.readouterr().err
