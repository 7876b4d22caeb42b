"""Training images whose size changes with the epoch: which batches have which, in which memory, and in a whole run."""

import json

import pytest
import torch
from few_images import write_images
from interrupted import train_in_starts
from safetensors.torch import save_file
from test_evaluation import recipe_in
from test_teacher_cache import train, values_of

import dkd
from dkd.cli import main
from dkd.config import load_recipe, recipe_to_yaml
from dkd.config.changes import recipe_changes
from dkd.config.loading import validate
from dkd.data import (
    GlobalBatchSampler,
    StreamedBatchSampler,
    TrainLoader,
    build_pipeline,
    open_row_groups,
    open_source,
)
from dkd.data import samples as loading_samples
from dkd.models import ModelSpec, build_model
from dkd.rng import derive_seed

SIZES = {0: 16, 1: 24, 3: 32}
OF_STEPS = 2 * [16] + 4 * [24] + 4 * [32]  # 2 steps an epoch


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.parquet"
    write_images(path, 70, pixels=40, row_group=10)
    return str(path)


def loaded(source, world=1, workers=0, first=0, repeats=1, preset="imagenet"):
    """The global batches of steps, from all ranks."""
    pipeline = build_pipeline(preset, train_sizes=SIZES)
    per_rank = []
    for rank in range(world):
        position = (len(source), 5, 32, 16 // world, rank, world)
        order = (
            StreamedBatchSampler(*position, tuple(source.sizes.tolist()), 8, 8, repeats=repeats)
            if hasattr(source, "sizes")
            else GlobalBatchSampler(*position, repeats=repeats)
        )
        loader = TrainLoader(source, pipeline.train, order, workers, by_epoch=pipeline.by_epoch)
        per_rank.append([batch.images.clone() for batch in loader.steps(first, 10)])
        assert all(batch.failure == "" for batch in loader.steps(9, 10))
    parts = [image for batches in zip(*per_rank, strict=True) for image in batches]
    of_step = 2 * world
    return [torch.cat(parts[i : i + of_step]) for i in range(0, len(parts), of_step)]


@pytest.mark.parametrize("opened", [open_source, open_row_groups])
@pytest.mark.parametrize("repeats", [1, 4])
def test_each_step_has_the_size_of_its_epoch_on_any_ranks_and_workers(file, opened, repeats):
    source = opened(file, training=True)
    found = loaded(source, repeats=repeats)
    assert [tuple(step.shape) for step in found] == [(32, 3, size, size) for size in OF_STEPS]
    for world, workers, first in ((2, 0, 0), (1, 2, 3), (2, 3, 1)):
        again = loaded(source, world, workers, first, repeats)
        assert all(map(torch.equal, again, found[first:])), (world, workers)


def test_pixels_are_those_of_a_transform_of_that_size(file):
    source = open_source(file, training=True)
    keys = list(GlobalBatchSampler(70, 5, 32, 32).micro_batches(0, 10))
    for step, images in enumerate(loaded(source)):
        transform = build_pipeline("imagenet", image_size=OF_STEPS[step]).train
        for (epoch, index), image in list(zip(keys[step], images, strict=True))[:4]:
            torch.manual_seed(derive_seed(5, epoch, index))
            assert torch.equal(image, transform(source.image(index)))


def test_images_in_memory_change_their_size_too():
    source = open_source("digits", training=True)
    order, pipeline = GlobalBatchSampler(len(source), 1, 512, 256), build_pipeline("digits", train_sizes={0: 8, 1: 16})
    loader = TrainLoader(source, pipeline.train, order, by_epoch=pipeline.by_epoch)
    assert [batch.images.shape[-1] for batch in loader.steps(1, 3)] == [8, 8, 16, 16]


def test_small_batches_lie_in_the_memory_that_large_ones_need(file, monkeypatch):
    """Workers that had to take memory of their own would fail here."""

    def none(size):
        raise RuntimeError("no memory")

    monkeypatch.setattr(loading_samples, "new_shared_memory", none)
    source, pipeline = open_source(file, training=True), build_pipeline("cifar", train_sizes=SIZES)
    order = GlobalBatchSampler(70, 5, 32, 16)
    loader = TrainLoader(source, pipeline.train, order, 1, by_epoch=pipeline.by_epoch)
    assert loader.shared_bytes > 3 * 16 * 3 * 32 * 32
    sizes = []
    for batch in loader.steps(0, 10):
        assert batch.failure == ""
        sizes.append(batch.images.shape[-1])
    assert sizes == [size for size in OF_STEPS for _ in range(2)]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_stands_for_a_batch_that_failed_has_the_size_of_its_step(file, workers):
    source = open_source(file, training=True)
    order, pipeline = GlobalBatchSampler(70, 5, 32, 16), build_pipeline("imagenet", train_sizes=SIZES)
    failing = next(order.micro_batches(2, 3))[3][1]  # of step 2, with 24 pixels

    class Failing:
        labels, class_names, neighbours = source.labels, None, source.neighbours

        def __len__(self):
            return 70

        def image(self, index):
            if index == failing:
                raise RuntimeError("gone")
            return source.image(index)

    loader = TrainLoader(Failing(), pipeline.train, order, workers, by_epoch=pipeline.by_epoch)
    found = list(loader.steps(0, 10))
    failed = [number for number, batch in enumerate(found) if batch.failure]
    assert {OF_STEPS[number // 2] for number in failed} == {16, 24, 32}
    for number in failed:
        assert tuple(found[number].images.shape) == (16, 3, OF_STEPS[number // 2], OF_STEPS[number // 2])


def test_the_last_size_is_that_of_evaluations_where_the_recipe_names_none():
    pipeline = build_pipeline("imagenet", train_sizes=SIZES)
    assert (pipeline.image_size, pipeline.train_size, pipeline.sizes) == (32, 32, [32, 16, 24])
    assert pipeline.describe_sizes() == "16×16, from epoch 1 on 24×24, from epoch 3 on 32×32, evaluated at 32×32"
    other = build_pipeline("imagenet", image_size=40, train_sizes={0: 24})
    assert (other.image_size, other.train_size) == (40, 24)
    assert other.describe_sizes() == "24×24, evaluated at 40×40"
    assert build_pipeline("imagenet").sizes == [224]
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    assert other.train(image).shape[-1] == 24
    assert other.validation(image).shape[-1] == 40


def test_a_list_of_transforms_names_the_size():
    stages = [{"RandomResizedCrop": {"size": "image_size"}}, {"CenterCrop": {"size": ["image_size", "image_size"]}}]
    pipeline = build_pipeline(stages, stages, 40, build_pipeline("cifar").normalize, SIZES)
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    assert [each.transform(image).shape[-1] for each in pipeline.by_epoch] == [16, 24, 32]
    assert pipeline.validation(image).shape[-1] == 40


def test_a_list_that_does_not_name_the_size_is_refused(tmp_path, file):
    values = values_of("random", file, tmp_path / "run")
    values["data"]["train_image_size"] = {0: 12, 1: 16}
    with pytest.raises(dkd.InputError, match=r"data\.transforms: .* data\.train_image_size asks for .*\(3, 12, 12\)"):
        dkd.train(values)


def recipe_of(folder, **sections):
    data = {"train_image_size": {0: 8, 1: 16}, "image_size": None, **sections.pop("data", {})}
    return recipe_in(
        folder,
        data=data,
        teacher={"name": "wrn_16_1", "weights": "random"},
        losses={
            "at": {"beta": 100, "pairs": [["layer2", "block2"]]},
            "sp": {"preset": "paper", "pairs": [["layer3", "block3"]]},
            "kd": {"alpha": 1},
            "review": {"weight": 1, "pairs": [["layer2", "block2"], ["layer3", "block3"]]},
            "srd": {"weight": 0.1, "adapter": "linear_bn", "pairs": [["layer3", "block3"]]},
        },
        train={"global_batch": 512, "micro_batch": 128, "epochs": 3, "max_steps": 5},
        checkpoint={"every_steps": 1},
        **sections,
    )


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path):
    """Of 2 steps an epoch: interrupted before the size changes, and after it."""
    whole = train_in_starts(recipe_of(tmp_path / "whole", evaluation={"agreement": True}))
    again = recipe_of(tmp_path / "again", evaluation={"agreement": True})
    assert train_in_starts(again, [1, 2, 3, None]) == whole
    assert len(whole[0]) == 5
    facts = json.loads((tmp_path / "whole" / "student.json").read_text())
    assert facts["image_size"] == 16
    small = train_in_starts(recipe_of(tmp_path / "small", data={"train_image_size": 8, "image_size": 16}))
    assert small[0][:2] == whole[0][:2]
    assert small[0][2] != whole[0][2]


def test_both_models_see_images_of_the_size(tmp_path, monkeypatch):
    seen = []
    forward = dkd.DistillationStep.loss

    def loss(self, micro_step):
        sizes = {}

        def note(who):
            def hook(module, args):
                sizes.setdefault(who, args[0].shape[-1])

            return hook

        hooks = [
            self.student.register_forward_pre_hook(note("student")),
            self.teacher.tapped.register_forward_pre_hook(note("teacher")),
        ]
        found = forward(self, micro_step)
        for hook in hooks:
            hook.remove()
        seen.append(sizes)
        return found

    monkeypatch.setattr(dkd.DistillationStep, "loss", loss)
    values = recipe_of(tmp_path / "run")
    values["losses"] = {"kd": {"alpha": 1}}
    values["train"]["micro_batch"] = 512
    dkd.train(values)
    assert [each["student"] for each in seen] == [8, 8, 16, 16, 16]
    assert all(each["student"] == each["teacher"] for each in seen)


def test_a_teachers_cache_is_of_images_of_the_training_size(tmp_path):
    torch.manual_seed(1)
    teacher = tmp_path / "teacher.safetensors"
    save_file(build_model(ModelSpec("wrn_16_1", 10)).state_dict(), teacher)
    write_images(tmp_path / "few.parquet", 100)
    stages = [{"RandomCrop": {"size": "image_size", "padding": 2}}, "RandomHorizontalFlip"]

    def run(folder, size, **more):
        values = values_of(teacher, tmp_path / "few.parquet", tmp_path)["data"]
        data = {**values, "transforms": stages, "train_image_size": size}
        return train(teacher, tmp_path / "few.parquet", tmp_path / folder, data=data, **more)

    cache = {"teacher__cache": {"dir": str(tmp_path / "cache")}}
    live, _ = run("live", 12)
    fill, filled = run("fill", 12, **cache)
    read, was_read = run("read", 12, **cache)
    assert (filled, was_read) == ([(0, 12)], [(12, 0)])
    assert live == fill == read
    assert run("other", 16, **cache)[1] == [(0, 12)]


def test_a_recipe_with_sizes_is_written_and_read_again(tmp_path):
    recipe = validate(recipe_of(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.data.train_image_size == {0: 8, 1: 16}
    other = load_recipe(tmp_path / "recipe.yaml", ["data.train_image_size={0: 8, 2: 16}"])
    assert recipe_changes(recipe, other)
    assert not recipe_changes(recipe, load_recipe(tmp_path / "recipe.yaml"))


def test_the_sizes_are_reported(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(validate(recipe_of(tmp_path / "run"))))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "8×8, from epoch 1 on 16×16, evaluated at 16×16" in capsys.readouterr().out
    assert main(["train", str(path), "train.max_steps=1"]) == 0
    assert "training images: 8×8, from epoch 1 on 16×16, evaluated at 16×16 pixels" in capsys.readouterr().err


def test_a_transformer_of_any_size_trains_with_a_schedule(tmp_path):
    values = recipe_of(tmp_path / "run", data={"train_image_size": {0: 32, 1: 48}})
    student = {"img_size": 32, "dynamic_img_size": True, "depth": 1, "embed_dim": 24, "num_heads": 2}
    values["student"] = {"name": "timm/vit_tiny_patch16_224", "options": student}
    values |= {"losses": {"ce": {}}, "teacher": None}
    values["train"] = {**values["train"], "max_steps": 3}
    steps, _ = train_in_starts(values)
    assert len(steps) == 3


def test_images_on_the_device_have_the_size_of_training(tmp_path):
    data = {"train_image_size": 8, "image_size": 16, "in_memory": "device"}
    on_device = train_in_starts(recipe_of(tmp_path / "device", data=data))
    elsewhere = train_in_starts(recipe_of(tmp_path / "memory", data={**data, "in_memory": True}))
    assert on_device == elsewhere
