"""The examples of long trainings: their settings are those of their sources, and what their comments name can be run.

Source of the numbers: Wightman, Touvron & Jégou, 2021 (A2, A3); Touvron et al., ICML 2021 (DeiT).
"""

import shlex
from pathlib import Path

import pytest
from few_images import write_images

import dkd
from dkd.config import load_recipe
from dkd.data import GlobalBatchSampler

EXAMPLES = Path(__file__).resolve().parents[2] / "configs" / "examples"
RSB, DEIT = (EXAMPLES / f"imagenet_{name}.yaml" for name in ("resnet50_resnet18_rsb", "regnet_vit_small_deit"))


def overrides_in(path, text):
    """The overrides that follow a text in the comments of a recipe, up to the end of the sentence or line."""
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    (place,) = [number for number, line in enumerate(comment) if text in line]
    words = shlex.split(comment[place].partition(text)[2])
    for line in comment[place + 1 :] if not words else []:
        found = shlex.split(line)
        if not all("=" in word for word in found):
            break
        words += found
    return words


def augmentation(recipe):
    stages = {}
    for stage in recipe.data.transforms:
        stages |= stage if isinstance(stage, dict) else {stage: {}}
    return stages


def test_resnet18_is_trained_by_procedure_a2():
    recipe = load_recipe(RSB)
    data, train, optimizer = recipe.data, recipe.train, recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.decay_norm_and_bias) == (
        "lamb",
        5e-3,
        0.02,
        False,
    )
    assert (train.epochs, recipe.schedule.name, recipe.schedule.warmup_epochs) == (300, "cosine", 5)
    assert (data.mixup, data.cutmix, data.repeated_augmentation, data.image_size) == (0.1, 1.0, 3, 224)
    assert augmentation(recipe)["RandAugment"] == {"num_ops": 2, "magnitude": 7 * 3}
    assert recipe.student.options == {"drop_path_rate": 0.05}
    assert (recipe.losses.bce.target_threshold, recipe.losses.bce.label_smoothing) == (0.2, 0.0)
    assert train.clip_grad_norm == 1.0  # the default of timm's LAMB
    alone = load_recipe(RSB, overrides_in(RSB, "Procedure A2 alone:"))
    assert alone.teacher is None
    assert [name for name, _ in alone.losses.named()] == ["bce"]
    assert (alone.losses.bce.weight, alone.losses.bce.sum_classes, alone.losses.bce.target_threshold) == (1, False, 0.2)
    shorter = load_recipe(RSB, overrides_in(RSB, "A3 is shorter, and trains at 160 pixels:"))
    assert (shorter.train.epochs, shorter.optimizer.lr, shorter.data.train_image_size) == (100, 8e-3, 160)
    assert (shorter.data.repeated_augmentation, shorter.data.image_size) == (1, 224)
    assert shorter.student.options == {"drop_path_rate": 0}


def test_vit_small_is_trained_as_deit():
    recipe = load_recipe(DEIT)
    data, train, optimizer = recipe.data, recipe.train, recipe.optimizer
    assert (optimizer.name, optimizer.weight_decay, optimizer.decay_norm_and_bias) == ("adamw", 0.05, False)
    assert optimizer.lr == pytest.approx(5e-4 * train.global_batch / 512, rel=0.02)
    assert (train.epochs, recipe.schedule.name, recipe.schedule.warmup_epochs) == (300, "cosine", 5)
    assert optimizer.lr * recipe.schedule.final == pytest.approx(1e-5)
    assert (data.mixup, data.cutmix, data.repeated_augmentation, data.image_size) == (0.8, 1.0, 3, 224)
    assert augmentation(recipe)["RandAugment"] == {"num_ops": 2, "magnitude": 9 * 3}
    assert augmentation(recipe)["RandomErasing"] == {"p": 0.25}
    assert recipe.student.options == {"drop_path_rate": 0.1}
    assert recipe.losses.ce.label_smoothing == 0.1
    alone = load_recipe(DEIT, overrides_in(DEIT, "DeiT alone:"))
    assert (alone.teacher, alone.losses.ce.weight, alone.losses.kd) == (None, 1, None)


@pytest.mark.parametrize("path", [RSB, DEIT], ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24])
def test_no_micro_batch_has_two_copies_of_an_image(path, world):
    recipe = load_recipe(path)
    batch, micro_batch, repeats = recipe.train.global_batch, recipe.train.micro_batch, recipe.data.repeated_augmentation
    for rank in range(world):
        order = GlobalBatchSampler(2 * batch, 0, batch, micro_batch, rank, world, repeats=repeats)
        for keys in order.micro_batches(0, 1):
            assert len({index for _, index in keys}) == micro_batch


@pytest.mark.parametrize(
    ("path", "text"),
    [(RSB, None), (RSB, "Procedure A2 alone:"), (RSB, "A3 is shorter, and trains at 160 pixels:"), (DEIT, None)],
    ids=["rsb", "a2", "a3", "deit"],
)
def test_an_example_trains_two_steps_of_few_images(tmp_path, path, text):
    write_images(tmp_path / "few.parquet", 40, pixels=48)
    few = [
        f"data.train={tmp_path}/few.parquet", f"data.validation={tmp_path}/few.parquet",
        "data.allow_same_images=true", "data.classes=10", "data.workers=0", "evaluation.batch=20",
        "train.global_batch=12", "train.micro_batch=4", "train.max_steps=2", "train.precision=fp32",
        "run.trackers=[]", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    named = [] if text is None else overrides_in(path, text)
    if "teacher=null" not in named:
        few.append("teacher={name: torchvision/resnet18, weights: random}")
    if path == DEIT:
        few.append("student.options={drop_path_rate: 0.1, depth: 2, embed_dim: 48, num_heads: 2}")
    assert dkd.train(path, [*named, *few]).steps == 2
