"""Every recipe of configs/ can be planned, and compares the features that its models really have."""

import functools
import itertools
import re
from pathlib import Path

import pytest

from dkd.cli import main
from dkd.config import load_recipe

# A test below reads all recipes of a data set for each of them.
load_recipe = functools.cache(load_recipe)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# photos_*, whose images and teachers are the user's, are checked by test_library_models.py.
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("photos_"))

# The stages of each family, in order: path and (channels, pixels) at 32×32, or at 224×224 for the models of ImageNet.
# From the papers.
WIDE = {1: (16, 32, 64), 2: (32, 64, 128), 8: (128, 256, 512)}
STAGES = {
    **{
        f"wrn_{d}_{k}": [(f"block{i + 1}", c, 32 >> i) for i, c in enumerate(WIDE[k])]
        for d, k in ((16, 1), (16, 2), (16, 8), (40, 1), (40, 2))
    },
    **{f"resnet{d}": [(f"layer{i + 1}", 16 << i, 32 >> i) for i in range(3)] for d in (8, 20, 32, 56, 110)},
    **{f"resnet{d}x4": [(f"layer{i + 1}", 64 << i, 32 >> i) for i in range(3)] for d in (8, 32)},
    "resnet50_cifar": [(f"layer{i + 1}", 256 << i, 32 >> i) for i in range(4)],
    **{
        f"vgg{d}_cifar": [("block1", 128, 16), ("block2", 256, 8), ("block3", 512, 4), ("block4", 512, 4)]
        for d in (8, 13)
    },
    "mobilenetv2_x0_5": [("blocks.1", 12, 16), ("blocks.2", 16, 8), ("blocks.4", 48, 4), ("blocks.6", 160, 2)],
    "shufflenetv1": [("layer1", 240, 16), ("layer2", 480, 8), ("layer3", 960, 4)],
    "shufflenetv2": [("layer1", 116, 16), ("layer2", 232, 8), ("layer3", 464, 4)],
    "nin_wide": [("block1", 96, 32), ("block2", 192, 16), ("block3", 192, 8)],
    "nin_thin": [("block1", 48, 32), ("block2", 96, 16), ("block3", 96, 8)],
    **{f"torchvision/resnet{d}": [(f"layer{i + 1}", 64 << i, 56 >> i) for i in range(4)] for d in (18, 34)},
    "torchvision/resnet50": [(f"layer{i + 1}", 256 << i, 56 >> i) for i in range(4)],
    "mobilenetv1": [("stage1", 128, 56), ("stage2", 256, 28), ("stage3", 512, 14), ("stage4", 1024, 7)],
}
# The pooled features: the channels of the last stage, but for models with a convolution after it.
POOLED = {
    name: ("avgpool", f"{stages[-1][1]}×1×1") if "torchvision" in name else ("pool", f"{stages[-1][1]}")
    for name, stages in STAGES.items()
} | {"mobilenetv2_x0_5": ("pool", "1280"), "shufflenetv2": ("pool", "1024")}
# The public weights, by folder: of the cross-entropy, and of the loss of this key.
WEIGHTS = {
    "cifar100/pkt": (1, "pkt", {"weight": 30000, "reference_batch": 64}),
    "cifar100/rkd": (1, "rkd", {"distance": 25, "angle": 50}),
    "cifar100/dist": (1, "dist", {"weight": 2, "beta": 1, "gamma": 1, "tau": 4}),
    "cifar100/fitnet": (1, "fitnet", {"weight": 100, "adapter": "conv1x1_bn_relu", "teacher_norm": "none"}),
    "cifar100/vid": (1, "vid", {"weight": 1}),
    "cifar100/crd": (
        1,
        "crd",
        {"weight": 0.8, "width": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5},
    ),
    "cifar100/dkd": (1, "dkd", {"alpha": 1, "temperature": 4}),
    "cifar100/kd_ls": (0.1, "kd", {"alpha": 9, "temperature": 2, "standardize": True}),
    "cifar100/review": (1, "review", {"width": None}),
    "imagenet/rkd": (1, "rkd", {"distance": 1, "angle": 2}),
    "imagenet/dist": (1, "dist", {"weight": 2, "beta": 1, "gamma": 1, "tau": 1}),
    "imagenet/crd": (
        1,
        "crd",
        {"weight": 0.8, "width": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5},
    ),
    "imagenet/dkd": (1, "dkd", {"weight": 1, "alpha": 1, "beta": 0.5, "temperature": 1}),
    "imagenet/kd_ls": (1, "kd", {"alpha": 9, "temperature": 2, "standardize": True}),
    "imagenet/review": (1, "review", {"weight": 1, "width": None}),
}
# Batch and learning rate on ImageNet where they are not 256 and 0.1.
LARGE = {"imagenet/dkd": (512, 0.2), "imagenet/kd_ls": (512, 0.2)}
# Weights that depend on the pair: β of DKD, by mdistiller, and the weight of ReviewKD, by its authors' script.
BETAS = {
    "resnet110-resnet32": 2,
    "resnet32x4-resnet8x4": 8,
    "resnet32x4-shufflenetv1": 8,
    "resnet32x4-shufflenetv2": 8,
    "resnet50_cifar-mobilenetv2_x0_5": 8,
    "resnet56-resnet20": 2,
    "vgg13_cifar-mobilenetv2_x0_5": 6,
    "vgg13_cifar-vgg8_cifar": 6,
    "wrn_40_2-shufflenetv1": 8,
    "wrn_40_2-wrn_16_2": 6,
    "wrn_40_2-wrn_40_1": 6,
}
REVIEWS = {
    "resnet110-resnet32": 1,
    "resnet32x4-resnet8x4": 5,
    "resnet32x4-shufflenetv1": 5,
    "resnet32x4-shufflenetv2": 8,
    "resnet56-resnet20": 0.6,
    "wrn_40_2-shufflenetv1": 5,
    "wrn_40_2-wrn_16_2": 5,
    "wrn_40_2-wrn_40_1": 5,
}
# Published top-1 on CIFAR-100: RepDistiller's README, last epoch; DKD: mdistiller's README, best epoch; DIST and KD-LS:
# the authors' READMEs. None: no number for the pair, and no recipe.
COLUMNS = ("kd", "at", "sp", "pkt", "rkd", "fitnet", "vid", "crd", "dist", "dkd", "kd_ls")
PUBLISHED = {
    "wrn_40_2-wrn_16_2": (74.92, 74.08, 73.83, 74.54, 73.35, 73.58, 74.11, 75.48, None, 76.23, 76.11),
    "wrn_40_2-wrn_40_1": (73.54, 72.77, 72.43, 73.45, 72.22, 72.24, 73.30, 74.14, 74.43, 74.81, 74.37),
    "resnet56-resnet20": (70.66, 70.55, 69.67, 70.34, 69.61, 69.21, 70.38, 71.16, 71.75, 71.97, 71.43),
    "resnet110-resnet20": (70.67, 70.22, 70.04, 70.25, 69.25, 68.99, 70.16, 71.46, None, None, 71.48),
    "resnet110-resnet32": (73.08, 72.31, 72.69, 72.61, 71.82, 71.06, 72.61, 73.48, None, 74.11, 74.17),
    "resnet32x4-resnet8x4": (73.33, 73.44, 72.94, 73.64, 71.90, 73.50, 73.09, 75.51, 76.31, 76.32, 76.62),
    "vgg13_cifar-vgg8_cifar": (72.98, 71.43, 72.68, 72.88, 71.48, 71.02, 71.23, 73.94, None, 74.68, 74.36),
    "vgg13_cifar-mobilenetv2_x0_5": (67.37, 59.40, 66.30, 67.13, 64.52, 64.14, 65.56, 69.73, None, 69.71, 68.61),
    "resnet50_cifar-mobilenetv2_x0_5": (67.35, 58.58, 68.08, 66.52, 64.43, 63.16, 67.57, 69.11, 68.66, 70.35, 69.02),
    "resnet50_cifar-vgg8_cifar": (73.81, 71.84, 73.34, 73.01, 71.50, 70.69, 70.30, 74.30, None, None, None),
    "resnet32x4-shufflenetv1": (74.07, 71.73, 73.48, 74.10, 72.28, 73.59, 73.38, 75.11, 76.34, 76.45, None),
    "resnet32x4-shufflenetv2": (74.45, 72.73, 74.56, 74.69, 73.21, 73.54, 73.40, 75.65, 77.35, 77.07, 75.56),
    "wrn_40_2-shufflenetv1": (74.83, 73.32, 74.52, 73.89, 72.21, 73.73, 73.61, 76.05, None, 76.70, None),
}
ALONE = {
    "mobilenetv2_x0_5": 64.60,
    "resnet110": 74.31,
    "resnet20": 69.06,
    "resnet32": 71.14,
    "resnet32x4": 79.42,
    "resnet50_cifar": 79.34,
    "resnet56": 72.34,
    "resnet8x4": 72.50,
    "shufflenetv1": 70.50,
    "shufflenetv2": 71.82,
    "vgg13_cifar": 74.64,
    "vgg8_cifar": 70.36,
    "wrn_16_2": 73.26,
    "wrn_40_1": 71.98,
    "wrn_40_2": 75.61,
}
# Published top-1 of ResNet-34 → ResNet-18 on ImageNet, the sources that the recipes name in turn.
PUBLISHED_R34_R18 = {
    "kd": [71.37],
    "rkd": [71.34],
    "dist": [72.07, 71.95],
    "crd": [71.17],
    "dkd": [71.70],
    "kd_ls": [71.42, 71.23],
    "review": [71.61],
}


def test_there_is_a_recipe_for_every_experiment():
    official = [str(path.relative_to(CONFIGS / "official")) for path in RECIPES if "official" in path.parts]
    pairs = {
        method: {path.stem for path in RECIPES if path.parent == CONFIGS / "official/cifar100" / method}
        for method in (*COLUMNS, "review")
    }
    assert len(pairs["kd"]) == 13
    for number, method in enumerate(COLUMNS):
        assert pairs[method] == {pair for pair, found in PUBLISHED.items() if found[number] is not None}, method
    assert pairs["dkd"] == set(BETAS)
    assert pairs["review"] == set(REVIEWS)
    assert len([path for path in official if path.startswith("imagenet/")]) == 18
    assert len(official) == 214


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_passes_dkd_plan_and_its_tap_table_is_right(path, capsys):
    assert main(["plan", str(path), "--gpus-per-node", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    recipe = load_recipe(path)
    for key in ("at", "sp"):
        section = getattr(recipe.losses, key)
        if section is None:
            continue
        reduced = 32 // recipe.data.image_size if recipe.data.image_size else 1
        student, teacher = (
            [(tap, channels, side // reduced) for tap, channels, side in STAGES[model.name]]
            for model in (recipe.student, recipe.teacher)
        )
        shown = [line.removeprefix(f"{key} ").strip() for line in lines if line.startswith(f"{key} ") and "←" in line]
        assert len(shown) == len(section.paths)
        for line, (s, t) in zip(shown, section.paths, strict=True):
            (i, ours), (j, theirs) = (
                next((i, stage) for i, stage in enumerate(stages) if stage[0] == tap)
                for stages, tap in ((student, s), (teacher, t))
            )
            assert i == j, f"{s} and {t} are stages {i + 1} and {j + 1}"
            wanted = f"{s} {ours[1]}×{ours[2]}×{ours[2]}  ←  {t} {theirs[1]}×{theirs[2]}×{theirs[2]}"
            assert line.startswith(wanted), (line, wanted)
            if key == "at":
                assert ours[2] == theirs[2] or section.resize != "error"
                beta = getattr(section.beta, "start", section.beta)
                assert f"= {beta / min(ours[2], theirs[2]) ** 2:.4g} a sample's squared distance" in line
            else:
                assert (
                    line.endswith(f"= {section.gamma * recipe.train.global_batch / section.reference_batch:g}")
                    or section.scope == "local"
                )
    for key in ("pkt", "rkd"):
        section = getattr(recipe.losses, key)
        if section is None:
            continue
        (line,) = (line.removeprefix(key).strip() for line in lines if line.startswith(f"{key} ") and "←" in line)
        ours, theirs = (" ".join(POOLED[model.name]) for model in (recipe.student, recipe.teacher))
        batch = recipe.train.global_batch
        scaled = f"weight·B/reference_batch = 30000 · {batch} / 64 = {30000 * batch / 64:g}"
        weight = {"pkt": scaled, "rkd": section.describe()}
        assert line == f"{ours}  ←  {theirs}   {weight[key]}"
    for key in ("fitnet", "vid", "crd", "review"):
        if (section := getattr(recipe.losses, key)) is not None:
            shown = [line.removeprefix(key).strip() for line in lines if line.startswith(f"{key} ") and "←" in line]
            assert shown == [f"{pair}   {section.describe()}" for pair in wanted_pairs(key, recipe)]
    if (section := recipe.losses.fitnet) is not None:
        sides = {STAGES[model.name][1][2] for model in (recipe.student, recipe.teacher)}
        assert section.resize == ("pool" if len(sides) == 2 else "error")


def wanted_pairs(key, recipe):
    """Return what `dkd plan` shows of each pair: the second stage for FitNet, which RepDistiller counts as its hint
    layer 2; all stages for VID and ReviewKD; the pooled features for CRD, and last for ReviewKD."""
    both = [
        [f"{tap} {channels}×{side}×{side}" for tap, channels, side in STAGES[model.name]]
        + [" ".join(POOLED[model.name])]
        for model in (recipe.student, recipe.teacher)
    ]
    assert len(both[0]) == len(both[1])
    all_pairs = [f"{ours}  ←  {theirs}" for ours, theirs in zip(*both, strict=True)]
    return {"fitnet": all_pairs[1:2], "vid": all_pairs[:-1], "crd": all_pairs[-1:], "review": all_pairs}[key]


def find_recipes(name):
    folder, key = name.split("/")
    official = CONFIGS / "official" / folder
    pairs = {"r34_r18", "r50_mobilenetv1"}
    return [
        path
        for path in RECIPES
        if path.parent == official / key or (path.parent == official and path.stem in {f"{p}_{key}" for p in pairs})
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=str(path.relative_to(CONFIGS / "official")))
        for name in WEIGHTS
        for path in find_recipes(name)
    ],
)
def test_a_recipe_has_the_public_weights_and_nothing_else(path, name):
    recipe, (ce, key, weights) = load_recipe(path), WEIGHTS[name]
    assert [used for used, _ in recipe.losses.named()] == ["ce", key]
    assert recipe.losses.ce.weight == ce
    section = getattr(recipe.losses, key)
    assert {each: getattr(section, each) for each in weights} == weights
    assert getattr(section, "scope", "global") == "global"
    if name.startswith("imagenet/"):
        batch, lr = LARGE.get(name, (256, 0.1))
        assert (recipe.train.global_batch, recipe.optimizer.lr, recipe.optimizer.weight_decay) == (batch, lr, 1e-4)
        assert (recipe.train.epochs, recipe.schedule.milestones, recipe.schedule.factor) == (100, [30, 60, 90], 0.1)
        return
    if key in ("dkd", "review"):
        end = 1 if key == "dkd" else REVIEWS[path.stem]
        wanted = {"start": 0, "end": end, "schedule": "warmup", "milestones": [], "factor": 0.1, "warmup_epochs": 20}
        assert section.weight.model_dump() == wanted
        assert key == "review" or section.beta == BETAS[path.stem]
    neighbour = load_recipe(path.parent.parent / "sp" / path.name)
    for part in ("data", "student", "teacher", "train", "optimizer", "schedule"):
        assert getattr(recipe, part) == getattr(neighbour, part)


def comment_of(path):
    """Return the comment at the top of a recipe, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def published_in(comment):
    """Return the percentages after `Published:`, up to those of student and teacher."""
    return [float(number) for number in re.findall(r"(\d\d\.\d\d) %", comment.partition("Published:")[2])]


@pytest.mark.parametrize("pair", PUBLISHED)
def test_comments_give_the_published_numbers_of_a_pair(pair):
    teacher, student = pair.split("-")
    models = [ALONE[student], ALONE[teacher]]
    for method, number in zip(COLUMNS, PUBLISHED[pair], strict=True):
        path = CONFIGS / "official/cifar100" / method / f"{pair}.yaml"
        if number is None:
            assert not path.exists()
            continue
        comment = comment_of(path)
        assert published_in(comment) == [number, *models], path
        assert ("below the student alone" in comment) == (number < ALONE[student]), path
        assert ("mdistiller's README, best epoch" in comment) == (method == "dkd"), path
    if pair in REVIEWS:
        comment = comment_of(CONFIGS / "official/cifar100/review" / f"{pair}.yaml")
        assert published_in(comment) == []
        assert re.findall(r"(\d\d\.\d\d) %", comment) == [f"{number:.2f}" for number in models]


def test_comments_give_the_published_numbers_of_other_models():
    for model, number in ALONE.items():
        assert published_in(comment_of(CONFIGS / "official/cifar100/alone" / f"{model}.yaml")) == [number], model
    for method, numbers in PUBLISHED_R34_R18.items():
        comment = comment_of(CONFIGS / "official/imagenet" / f"r34_r18_{method}.yaml")
        assert [number for number in published_in(comment) if number != 69.75] == numbers, method


def test_the_readme_gives_the_published_numbers():
    text = (CONFIGS / "official/README.md").read_text()
    section = text.partition("## CIFAR-100: published top-1")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "→" in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 14
    titles = ["KD", "AT", "SP", "PKT", "RKD", "FitNet", "VID", "CRD", "DIST", "DKD", "KD-LS"]
    assert rows[0] == ["teacher → student", "teacher", "student", *titles]
    for (pair, numbers), row in zip(PUBLISHED.items(), rows[1:], strict=True):
        teacher, student = pair.split("-")
        written = ["-" if number is None else f"{number:.2f}" for number in (ALONE[teacher], ALONE[student], *numbers)]
        assert row[1:] == written, row


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if "official" in path.parts], ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_the_teacher_of_a_recipe_is_what_another_recipe_leaves(path):
    recipe = load_recipe(path)
    if recipe.teacher is None or recipe.teacher.weights == "IMAGENET1K_V1":
        return
    teachers = [load_recipe(other) for other in path.parent.parent.rglob("*.yaml")]
    (found,) = [other for other in teachers if f"{other.run.dir}/student.safetensors" == recipe.teacher.weights]
    assert (found.student.name, found.student.norm) == (recipe.teacher.name, recipe.teacher.norm)
    assert (found.data.classes, found.data.normalization) == (recipe.data.classes, recipe.data.normalization)
