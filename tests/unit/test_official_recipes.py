"""Every recipe of configs/ can be planned, and compares the features that its models really have."""

import functools
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
# The public weights, beside a cross-entropy of weight 1.
WEIGHTS = {
    "cifar100/pkt": {"weight": 30000, "reference_batch": 64},
    "cifar100/rkd": {"distance": 25, "angle": 50},
    "cifar100/dist": {"weight": 2, "beta": 1, "gamma": 1, "tau": 4},
    "imagenet/rkd": {"distance": 1, "angle": 2},
    "imagenet/dist": {"weight": 2, "beta": 1, "gamma": 1, "tau": 1},
}
# The pairs that DIST's authors have published.
OF_DIST = {
    "resnet32x4-resnet8x4",
    "resnet32x4-shufflenetv1",
    "resnet32x4-shufflenetv2",
    "resnet50_cifar-mobilenetv2_x0_5",
    "resnet56-resnet20",
    "wrn_40_2-wrn_40_1",
}


def test_there_is_a_recipe_for_every_experiment():
    official = [str(path.relative_to(CONFIGS / "official")) for path in RECIPES if "official" in path.parts]
    pairs = {
        method: {path.stem for path in RECIPES if path.parent == CONFIGS / "official/cifar100" / method}
        for method in ("kd", "at", "sp", "pkt", "rkd", "dist")
    }
    assert len(pairs["kd"]) == 13
    assert all(pairs[method] == pairs["kd"] for method in ("at", "sp", "pkt", "rkd"))
    assert pairs["dist"] == OF_DIST
    assert len([path for path in official if path.startswith("imagenet/")]) == 14
    assert len(official) == 138


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
        weight = {"pkt": "weight·B/reference_batch = 30000 · 64 / 64 = 30000", "rkd": section.describe()}
        assert line == f"{ours}  ←  {theirs}   {weight[key]}"


def find_recipes(name):
    folder, key = name.split("/")
    patterns = (f"official/{name}/*.yaml", f"official/{folder}/*_{key}.yaml")
    return [path for path in RECIPES if any(map(path.match, patterns))]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=str(path.relative_to(CONFIGS / "official")))
        for name in WEIGHTS
        for path in find_recipes(name)
    ],
)
def test_a_recipe_has_the_public_weights_and_nothing_else(path, name):
    recipe, key, weights = load_recipe(path), name.split("/")[1], WEIGHTS[name]
    assert [used for used, _ in recipe.losses.named()] == ["ce", key]
    assert recipe.losses.ce.weight == 1
    section = getattr(recipe.losses, key)
    assert {each: getattr(section, each) for each in weights} == weights
    assert section.scope == "global"
    if path.parent.name == key:
        neighbour = load_recipe(path.parent.parent / "sp" / path.name)
        for part in ("data", "student", "teacher", "train", "optimizer", "schedule"):
            assert getattr(recipe, part) == getattr(neighbour, part)


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
