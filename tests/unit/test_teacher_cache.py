"""Training with a teacher's cache: bit for bit as with the live teacher; what another key is; what is refused."""

import hashlib
import json
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from every_loss import ALL
from few_images import write_images
from safetensors.torch import load_file, save_file
from threaded_ranks import on_ranks

from dkd import (
    CKA,
    CRD,
    PKT,
    SRD,
    VID,
    AttentionTransfer,
    BatchLayout,
    CorrelationCongruence,
    EmbeddingQueue,
    FeatureDistance,
    ReviewKD,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from dkd.build.teacher_cache import planned_values
from dkd.cli import main
from dkd.config import RecipeError
from dkd.config.loading import validate
from dkd.distillation import FeatureTerm, FrozenTeacher
from dkd.distillation.stored_teacher import Share, StoredTeacher, reader_of, runs_of
from dkd.errors import Stopped, TrainingError
from dkd.global_batch import full_precision
from dkd.global_batch.grid import all_grids
from dkd.losses.contrastive import ContrastiveAdapter
from dkd.losses.feature_forms import FeatureForm
from dkd.models import ModelSpec, build_model
from dkd.models.code_version import code_version
from dkd.training.trainer import Trainer

SOME = {name: ALL[name] for name in ("ce", "at", "sp", "kd")}
TIMINGS = ("images_per_second", "data_wait", "seconds")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of weights, and another one."""
    folder = tmp_path_factory.mktemp("teacher")
    for name, seed in (("teacher", 1), ("other", 2)):
        torch.manual_seed(seed)
        save_file(build_model(ModelSpec("wrn_16_1", 10)).state_dict(), folder / f"{name}.safetensors")
    return folder / "teacher.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "few.parquet"
    write_images(path, 100)
    return path


def values_of(teacher, images, folder, /, **changes):
    values = {
        "run": {"dir": str(folder), "trackers": [], "log_every": 1},
        "data": {
            "train": str(images), "validation": str(images), "allow_same_images": True, "classes": 10,
            "transforms": [{"RandomCrop": {"size": 16, "padding": 2}}, "RandomHorizontalFlip"],
            "validation_transforms": [{"CenterCrop": {"size": 16}}], "image_size": 16,
            "normalization": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}, "workers": 0,
        },
        "student": {"name": "resnet8"},
        "teacher": {"name": "wrn_16_1", "weights": str(teacher)},
        "losses": SOME,
        "train": {"global_batch": 16, "micro_batch": 8, "epochs": 2, "precision": "fp32", "channels_last": False},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": {"name": "cosine"},
        "evaluation": {"agreement": True},
        "checkpoint": {"every_steps": 3},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return values


def train(teacher, images, folder, /, **changes):
    """Train, and return what must be equal, and what was read."""
    trainer = Trainer.from_recipe(validate(values_of(teacher, images, folder, **changes)))
    trainer.fit()
    return outcome(folder), used(trainer)


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if "checkpoint" not in line]
    for line in logged:
        line.get("evaluation", {}).pop("seconds", None)
    return hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest(), logged


def used(trainer):
    """Steps that were read and computed, for each teacher that has a cache."""
    stored = trainer.parts.step.teaching.stored
    return [(each.cache.read_steps, each.cache.computed_steps) for each in stored.values()]


def with_cache(folder, **more):
    return {"teacher__cache": {"dir": str(folder), **more}}


# --- What losses read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (AttentionTransfer(), (4, 8, 8), (6, 8, 8)),
        (AttentionTransfer(resize="map"), (4, 4, 4), (6, 8, 8)),
        (AttentionTransfer(resize="features"), (4, 4, 4), (6, 8, 8)),
        (AttentionTransfer(resize="features"), (4, 8, 8), (6, 4, 4)),
        (AttentionTransfer(map="max_p", p=4, reduction="paper"), (4, 8, 8), (6, 8, 8)),
        (AttentionTransfer(class_tokens=[0, 1]), (16, 4), (17, 6)),
        (AttentionTransfer(square=True), (4, 4, 8), (4, 4, 6)),
        (FeatureDistance(), (6, 8, 8), (6, 8, 8)),
        (FeatureDistance("cosine", FeatureForm("map", resize="pool")), (6, 4, 4), (6, 8, 8)),
        (FeatureDistance("smooth_l1", FeatureForm("map", resize="interpolate")), (6, 4, 4), (6, 8, 8)),
        (FeatureDistance("mse", FeatureForm("vector")), (6, 4, 4), (6, 8, 8)),
        (FeatureDistance("mse", FeatureForm("vector", [0, 1], "class_token")), (6,), (17, 6)),
        (SRD(), (6,), (6, 8, 8)),
        (ReviewKD(), (6, 8, 8), (6, 8, 8)),
        (EmbeddingQueue(6, 32), (6,), (6, 8, 8)),
    ],
    ids=lambda value: f"{value}"[:60],
)
def test_a_loss_is_the_same_with_what_is_stored(loss, student, teacher, dtype):
    torch.manual_seed(0)
    mine = torch.randn(5, *student).to(dtype).float().requires_grad_()
    theirs, shapes = torch.randn(5, *teacher).to(dtype), [(student, teacher)]
    (form,), samples = loss.sample_forms(shapes), loss.take_samples([theirs], shapes)
    assert tuple(samples[0].shape[1:]) == form.shape
    assert samples[0].dtype == (torch.float32 if form.promoted else dtype)
    live = loss([mine], [theirs])
    stored = loss([mine], loss.give_samples(samples, shapes))
    assert torch.equal(live, stored)
    assert torch.equal(*(torch.autograd.grad(value, mine)[0] for value in (live, stored)))


def test_losses_that_need_more_than_the_features():
    """VID compares with two tensors for each pair; CRD's adapter reads the teacher."""
    torch.manual_seed(0)
    theirs, shapes = torch.randn(5, 6, 8, 8), [((4, 4, 4), (6, 8, 8))]
    vid, mine = VID(), [torch.randn(5, 6, 4, 4), torch.rand(1, 6, 1, 1)]
    assert torch.equal(vid(mine, [theirs]), vid(mine, vid.give_samples(vid.take_samples([theirs], shapes), shapes)))
    adapter = ContrastiveAdapter(FeatureForm("vector"), [((4,), (6,))], 7)
    term = FeatureTerm("crd", lambda step: 1.0, CRD(9, 7, 3), [("a", "b")], adapter=adapter)
    assert reader_of(term) is adapter
    for dtype in (torch.float32, torch.bfloat16):
        (vector,) = adapter.take_samples([theirs.to(dtype)], shapes)
        assert vector.dtype == dtype
        student = torch.randn(5, 4, 4, 4)
        assert torch.equal(adapter([student], [theirs.to(dtype)])[1], adapter([student], [vector])[1])


FAMILY = (SimilarityPreserving, PKT, CorrelationCongruence, CKA, RKDDistance)


@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_rows_of_relations_do_not_depend_on_the_grid(world):
    """On every grid: each row is stored once, and with the rows that it reads every rank has its block again, bit for
    bit; the rows of all grids are equal up to rounding."""
    rows, micro_steps = 3, 2
    batch = rows * micro_steps * world
    torch.manual_seed(0)
    teacher = torch.randn(batch, 5, dtype=torch.float64)
    student = torch.randn(batch, 4, dtype=torch.float64)
    whole = {}
    for kind in FAMILY:
        for grid in all_grids(world):

            def work(rank, group, kind=kind, grid=grid):
                loss = kind(grid=tuple(grid))
                layout = BatchLayout((rows * micro_steps,) * world, rank, group)
                share = Share(rank, world, rows, micro_steps)
                offsets = share.offsets(layout, None)
                mine = offsets[layout.first_row : layout.first_row + rows * micro_steps]
                at = loss.settle([], layout, torch.device("cpu"))
                given, samples, stored = loss.relate_teacher([teacher[mine]], at)
                value = loss([student[mine]], given, layout=layout)
                live = kind(grid=tuple(grid))([student[mine]], [teacher[mine]], layout=layout)
                return offsets, at, given.blocks[0], offsets[samples], stored[0][:, offsets.argsort()], value, live

            found = on_ranks(world, work)
            table = torch.full((batch, batch), torch.nan, dtype=torch.float64)
            for _, _, _, places, stored, value, live in found:
                assert table[places].isnan().all()
                table[places] = stored
                assert torch.equal(value, live)
            assert not table.isnan().any()
            for offsets, at, block, *_ in found:
                read = table[offsets[at.needed]][:, offsets]
                assert torch.equal(kind(grid=tuple(grid)).give_rows([read], at).blocks[0], block)
            torch.testing.assert_close(table, whole.setdefault(kind, table), rtol=1e-11, atol=1e-12)
    assert len(whole) == len(FAMILY)


def test_angles_read_the_rows_of_all_ranks():
    teacher, student = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)

    def work(rank, group):
        layout = BatchLayout((4, 4), rank, group)
        mine = slice(4 * rank, 4 * rank + 4)
        loss = RKDAngle()
        at = loss.settle([], layout, torch.device("cpu"))
        given, samples, rows = loss.relate_teacher([teacher[mine]], at)
        assert samples.tolist() == list(range(8))[mine]
        again = loss.give_rows(rows, at)
        live = loss([student[mine]], [teacher[mine]], layout=layout)
        return [live, loss([student[mine]], given, layout=layout), loss([student[mine]], again, layout=layout)]

    for values in on_ranks(2, work):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])


def test_places_of_samples():
    share = Share(1, 2, 2, 3)
    layout = BatchLayout((6, 6), 1)
    # Rank 0 has the first two of each four samples.
    assert share.offsets(layout, None).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert share.offsets(BatchLayout((2, 2), 1), 1).tolist() == [4, 5, 6, 7]
    assert share.offsets(BatchLayout((2,)), 2).tolist() == [10, 11]  # this rank alone
    assert runs_of(share.offsets(layout, None)) == [(0, 2), (4, 2), (8, 2), (2, 2), (6, 2), (10, 2)]


# --- Training


@pytest.mark.parametrize(("micro_batch", "is_mixed"), [(16, False), (8, False), (8, True)])
def test_training_is_the_same_bit_for_bit(tmp_path, teacher, images, micro_batch, is_mixed):
    """With all losses, or mixup, CutMix and all that allow it: the live teacher, a cache being filled, and one that is
    read."""
    mixed = {"train__micro_batch": micro_batch, "losses": ALL}
    if is_mixed:
        mixed["data"] = {**values_of(teacher, images, tmp_path)["data"], "mixup": 0.3, "cutmix": 1.0}
        mixed["losses"] = {name: section for name, section in ALL.items() if name not in ("dkd", "crd")}
    if micro_batch == 8:
        mixed |= {"train__ema": {"decay": 0.9}, "train__clip_grad_norm": 1.0}
    cache = with_cache(tmp_path / "cache", features=True)
    live, _ = train(teacher, images, tmp_path / "live", **mixed)
    fill, filled = train(teacher, images, tmp_path / "fill", **mixed, **cache)
    read, was_read = train(teacher, images, tmp_path / "read", **mixed, **cache)
    assert filled == [(0, 12)]
    assert was_read == [(12, 0)]
    assert fill == live
    assert read == live
    terms = [line for line in live[1] if "step" in line and "ce" in line]
    assert {*mixed["losses"], "rkd_distance", "rkd_angle"} - {"rkd"} <= set(terms[0])


OTHERS = {
    "bf16": {"train__precision": "bf16", "losses": ALL},
    "fp64": {"train__precision": "fp64", "losses": ALL},
    "relations of micro-steps": {
        "losses": {"sp": {**ALL["sp"], "batch": "micro"}, "rkd": {**ALL["rkd"], "batch": "micro"}, "dist": ALL["dist"]}
    },
    "the loss of mirrored images": {"losses": {**SOME, "gradient_at": {"beta": 1, "form": "symmetric"}}},
    "a normalised teacher": {"losses": {"fitnet": {**ALL["fitnet"], "teacher_norm": "standardize"}}},
    "channels_last": {"train__channels_last": True, "losses": ALL},
    "channels_last, and losses whose last bits depend on it": {
        "train__channels_last": True,
        "losses": {
            "feature": {"weight": 1, "distance": "cosine", "pairs": [["layer2", "block2"]]},
            "custom": [{"name": "p", "loss": "small_models:Pooled", "weight": 1, "pairs": [["layer3", "block3"]]}],
        },
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_training_is_the_same_bit_for_bit_with(tmp_path, teacher, images, name):
    changes, cache = OTHERS[name], with_cache(tmp_path / "cache", features=True)
    live, _ = train(teacher, images, tmp_path / "live", **changes)
    assert train(teacher, images, tmp_path / "fill", **changes, **cache) == (live, [(0, 12)])
    assert train(teacher, images, tmp_path / "read", **changes, **cache) == (live, [(12, 0)])


@pytest.mark.parametrize("streaming", [False, True])
def test_training_is_the_same_with_worker_processes(tmp_path, teacher, images, streaming):
    data = {**values_of(teacher, images, tmp_path)["data"], "workers": 2, "in_memory": False}
    data |= {"streaming": streaming, "stream_lanes": 16, "shuffle_window": 8}
    live, _ = train(teacher, images, tmp_path / "live", data=data)
    cache = with_cache(tmp_path / "cache")
    assert train(teacher, images, tmp_path / "fill", data=data, **cache) == (live, [(0, 12)])
    assert train(teacher, images, tmp_path / "read", data=data, **cache) == (live, [(12, 0)])
    if streaming:  # whose order depends on the batch
        changed = {"data": data, "train": {**values_of(teacher, images, tmp_path)["train"], "global_batch": 32}}
        assert train(teacher, images, tmp_path / "larger", **changed, **cache)[1] == [(0, 6)]
        assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_run_that_is_interrupted_anywhere_is_the_same(tmp_path, teacher, images, monkeypatch):
    live, _ = train(teacher, images, tmp_path / "live")
    cache = with_cache(tmp_path / "cache")
    stops = [2, 3, 7, 10, None]
    trained = Trainer.train_step
    for until in stops:

        def step(self, until=until):
            if self.state.step == until:
                raise TrainingError("interrupted")
            return trained(self)

        monkeypatch.setattr(Trainer, "train_step", step)
        trainer = Trainer.from_recipe(validate(values_of(teacher, images, tmp_path / "fill", **cache)))
        if until is None:
            trainer.fit()
            # Begun after step 9; what was computed after it is there, too, but for what was not yet known to be right.
            assert used(trainer)[0][0] == 0
        else:
            with pytest.raises(TrainingError, match="interrupted"):
                trainer.fit()
    assert outcome(tmp_path / "fill") == live
    monkeypatch.undo()
    read, was_read = train(teacher, images, tmp_path / "read", **cache)
    assert read == live
    assert was_read[0][0] + was_read[0][1] == 12


def test_a_teacher_is_built_when_an_output_is_missing(tmp_path, teacher, images):
    cache = {**with_cache(tmp_path / "cache"), "evaluation__agreement": "auto"}
    live, _ = train(teacher, images, tmp_path / "live", evaluation__agreement=False)
    train(teacher, images, tmp_path / "fill", **cache)
    values = values_of(teacher, images, tmp_path / "read", **cache)
    reading = Trainer.from_recipe(validate(values))
    reading.fit()
    assert not reading.parts.step.teacher.is_built
    assert outcome(tmp_path / "read") == live  # nor was the agreement measured
    for part in (tmp_path / "cache").rglob("epoch_00001/part_*"):
        part.unlink()
    again = Trainer.from_recipe(validate({**values, "run": {**values["run"], "dir": str(tmp_path / "again")}}))
    assert not again.parts.step.teacher.is_built
    again.fit()
    assert again.parts.step.teacher.is_built
    assert used(again) == [(6, 6)]
    assert outcome(tmp_path / "again")[0] == live[0]


def test_weights_that_change_while_a_run_waits_for_its_teacher(tmp_path, teacher, images):
    own = tmp_path / "own.safetensors"
    save_file(load_file(teacher), own)
    cache = with_cache(tmp_path / "cache")
    train(own, images, tmp_path / "fill", **cache, evaluation__agreement=False)
    trainer = Trainer.from_recipe(validate(values_of(own, images, tmp_path / "read", **cache)))
    save_file(load_file(teacher.with_name("other.safetensors")), own)
    with pytest.raises(TrainingError, match=r"its weights are .* now, and were .* at the start"):
        trainer.fit()  # which measures the agreement at its end


def test_other_losses_and_micro_batches_read_the_same_cache(tmp_path, teacher, images):
    cache = with_cache(tmp_path / "cache")
    train(teacher, images, tmp_path / "fill", **cache)
    logits = {"losses": {"kd": {"alpha": 0.9}}}
    assert train(teacher, images, tmp_path / "kd", **logits, **cache)[1] == [(12, 0)]
    # Of another global batch, logits and maps are read, and relations are not.
    logits["train"] = {**values_of(teacher, images, tmp_path)["train"], "global_batch": 32, "micro_batch": 4}
    assert train(teacher, images, tmp_path / "larger", **logits, **cache)[1] == [(6, 0)]
    logits["losses"] = SOME
    assert train(teacher, images, tmp_path / "relations", **logits, **cache)[1] == [(0, 6)]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_epochs_that_repeat(tmp_path, teacher, images):
    once = {"data": {**values_of(teacher, images, tmp_path)["data"], "augmentation_period": 1, "mixup": 0.3}}
    once["train"] = {**values_of(teacher, images, tmp_path)["train"], "epochs": 3}
    live, _ = train(teacher, images, tmp_path / "live", **once)
    fill, filled = train(teacher, images, tmp_path / "fill", **once, **with_cache(tmp_path / "cache"))
    assert fill == live
    assert filled == [(12, 6)]
    # The images of the epochs are the same, and those of another period are others.
    trainer = Trainer.from_recipe(validate(values_of(teacher, images, tmp_path / "look", **once)))
    first, second = (list(trainer.parts.data.train_loader.steps(n, n + 6)) for n in (0, 6))
    trainer.close()
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_one_order_of_images_for_several_seeds(tmp_path, teacher, images):
    cache = with_cache(tmp_path / "cache")
    data = {"data": {**values_of(teacher, images, tmp_path)["data"], "seed": 5}}
    first, _ = train(teacher, images, tmp_path / "a", **data, **cache)
    values = values_of(teacher, images, tmp_path / "b", **data, **cache)
    values["run"]["seed"] = 1
    trainer = Trainer.from_recipe(validate(values))
    trainer.fit()
    assert used(trainer) == [(12, 0)]
    assert outcome(tmp_path / "b")[0] != first[0]


def test_several_teachers(tmp_path, teacher, images):
    """One has a cache, one has another, one has none; the mean of all logits is read from where each is."""
    other = str(teacher.with_name("other.safetensors"))
    teachers = {
        "a": {"name": "wrn_16_1", "weights": str(teacher), "cache": {"dir": str(tmp_path / "cache")}},
        "b": {"name": "wrn_16_1", "weights": other, "input_size": 20, "cache": {"dir": str(tmp_path / "cache")}},
        "c": {"name": "resnet8", "weights": "random"},
    }
    losses = {
        "kd": {"alpha": 1, "teacher": "ensemble"},
        "at": {**ALL["at"], "resize": "map", "teacher": "b"},
        "sp": {**ALL["sp"], "teacher": "a"},
        "pkt": {"preset": "repdistiller", "pairs": [["layer3", "layer3"]], "teacher": "c"},
    }
    both = {"losses": losses, "teacher": None, "evaluation": {}}
    without = {name: {k: v for k, v in each.items() if k != "cache"} for name, each in teachers.items()}
    live, _ = train(teacher, images, tmp_path / "live", **both, teachers=without)
    assert train(teacher, images, tmp_path / "fill", **both, teachers=teachers) == (live, [(0, 12)] * 2)
    assert train(teacher, images, tmp_path / "read", **both, teachers=teachers) == (live, [(12, 0)] * 2)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("store", ["bf16", "topk:3"])
def test_an_approximation_trains_the_same_whether_it_is_filled_or_read(tmp_path, teacher, images, store):
    live, _ = train(teacher, images, tmp_path / "live")
    cache = with_cache(tmp_path / "cache", store=store)
    fill, _ = train(teacher, images, tmp_path / "fill", **cache)
    assert fill[0] != live[0]
    assert train(teacher, images, tmp_path / "read", **cache) == (fill, [(12, 0)])
    # What is exact is another value, and shares the folder.
    assert train(teacher, images, tmp_path / "exact", **with_cache(tmp_path / "cache"))[0] == live


def test_features_that_a_loss_of_the_users_own_asks_for(tmp_path, teacher, images):
    own = {"name": "own", "loss": "small_models:Stored", "weight": 1, "pairs": [["layer3", "block3"]]}
    losses = {"losses": {"custom": [own]}}
    live, _ = train(teacher, images, tmp_path / "live", **losses)
    for name in ("fill", "read"):
        found, was_read = train(teacher, images, tmp_path / name, **losses, **with_cache(tmp_path / "cache"))
        assert found == live
        assert was_read == [(0, 12) if name == "fill" else (12, 0)]


# --- Keys


def other_pixels(images, tmp_path):
    """Other images under the same labels."""
    path, others = tmp_path / "other.parquet", tmp_path / "others.parquet"
    write_images(others, 100, seed=1)
    table = parquet.read_table(images)
    table = table.set_column(0, "image", parquet.read_table(others)["image"])
    parquet.write_table(table, path, row_group_size=16)
    return path


CHANGES = {
    "another teacher's weights": ("teacher.fingerprint", {"teacher": "other"}),
    "other transforms": ("input.transforms", {"transforms": [{"RandomCrop": {"size": 16, "padding": 1}}]}),
    "another image size": (
        "input.image_size",
        {
            "transforms": [{"RandomCrop": {"size": 12}}],
            "validation_transforms": [{"CenterCrop": {"size": 12}}],
            "image_size": 12,
        },
    ),
    "another normalisation": ("input.std", {"normalization": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}),
    "another seed": ("order.seed", {"seed": 7}),
    "another period": ("order.period", {"augmentation_period": 2}),
    "mixing": ("mixing.mixup", {"mixup": 0.1}),
    "other pixels": ("data.pixels", {"images": "other"}),
    "another precision": ("arithmetic.precision", {"precision": "bf16"}),
    "another input size of the teacher": ("teacher.input_size", {"input_size": 20}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_key_is_named_and_refused(tmp_path, teacher, images, name, capfd):
    """What was stored for another key is not read; with `fill: false` the run is refused, and without it computes."""
    train(teacher, images, tmp_path / "fill", **with_cache(tmp_path / "cache"), train__max_steps=2)
    key, change = CHANGES[name]
    data = {**values_of(teacher, images, tmp_path)["data"]}
    weights = teacher.with_name("other.safetensors") if change.get("teacher") else teacher
    source = other_pixels(images, tmp_path) if change.get("images") else images
    data |= {k: v for k, v in change.items() if k not in ("teacher", "images", "precision", "input_size")}
    data |= {"train": str(source), "validation": str(source)}
    more = {"data": data, "train__precision": change.get("precision", "fp32")}
    if "input_size" in change:  # which maps of one resolution do not survive
        more["losses"] = {"kd": {"alpha": 0.9}}

    def cached(**options):
        section = {"name": "wrn_16_1", "weights": str(weights), "cache": {"dir": str(tmp_path / "cache"), **options}}
        return {"teacher": section | {k: v for k, v in change.items() if k == "input_size"}}

    with pytest.raises(RecipeError) as refused:
        train(weights, source, tmp_path / "refused", **more, **cached(fill=False))
    (problem,) = refused.value.problems
    assert problem.path == "teacher.cache"
    assert "is not stored in" in problem.message
    assert f"{key} (" in problem.message
    more["train"] = {**values_of(teacher, images, tmp_path)["train"], "max_steps": 2}
    more["train"]["precision"] = more.pop("train__precision")
    assert train(weights, source, tmp_path / "other", **more, **cached())[1] == [(0, 2)]
    assert "has no outputs for this recipe yet; " in capfd.readouterr().err


def test_a_run_that_may_not_compute_is_refused_where_a_later_epoch_is_missing(tmp_path, teacher, images):
    train(teacher, images, tmp_path / "fill", **with_cache(tmp_path / "cache"), evaluation__agreement=False)
    alone = {**with_cache(tmp_path / "cache", fill=False), "evaluation__agreement": False}
    assert train(teacher, images, tmp_path / "read", **alone)[1] == [(12, 0)]
    for part in (tmp_path / "cache").rglob("epoch_00001/part_*"):
        part.unlink()
    with pytest.raises(RecipeError, match="step 7 is not stored in"):
        train(teacher, images, tmp_path / "refused", **alone)


def test_a_change_of_a_few_images_is_found(tmp_path, teacher, images, capsys):
    """Images that are not among those by which data are recognised: the run ends, and nothing of that step is saved."""
    own = tmp_path / "own.parquet"
    write_images(own, 100)
    cache = with_cache(tmp_path / "cache")
    values = values_of(teacher, own, tmp_path / "fill", **cache)
    values["data"] |= {"validation": None}
    Trainer.from_recipe(validate({**values, "evaluation": {}})).fit()
    write_images(tmp_path / "others.parquet", 100, seed=1)
    table, others = parquet.read_table(own), parquet.read_table(tmp_path / "others.parquet")
    cells, sampled = table["image"].to_pylist(), {i * 100 // 64 for i in range(64)}
    for index in set(range(40, 60)) - sampled:
        cells[index] = others["image"][index].as_py()
    parquet.write_table(table.set_column(0, "image", [cells]), own, row_group_size=16)
    values["run"] = {**values["run"], "dir": str(tmp_path / "read")}
    with pytest.raises(TrainingError, match=r"the images are not those that teacher.cache was filled with"):
        Trainer.from_recipe(validate({**values, "evaluation": {}})).fit()
    assert not (tmp_path / "read" / "student.safetensors").exists()
    recipe = write_recipe(tmp_path / "recipe.json", {**values, "evaluation": {}})
    assert main(["cache", "verify", str(tmp_path / "cache"), "--recipe", recipe]) == 1
    assert "are not those that the teacher saw: the data have changed" in capsys.readouterr().out


def test_another_code_of_a_model_is_another_key(tmp_path, images, monkeypatch):
    module = tmp_path / "own_teacher.py"
    text = "import dkd.models as m\n"
    text += "def make(num_classes):\n    return m.build_model(m.ModelSpec('wrn_16_1', num_classes))\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for number, code in enumerate((text, text, text + "# another\n")):
        module.write_text(code)
        sys.modules.pop("own_teacher", None)
        teacher = {"name": "own_teacher:make", "weights": "random", "cache": {"dir": str(tmp_path / "cache")}}
        found.append(train("random", images, tmp_path / str(number), teacher=teacher, train__max_steps=2)[1])
    assert found == [[(0, 2)], [(2, 0)], [(0, 2)]]
    assert code_version("torchvision/resnet18", 10, {}).startswith("torchvision ")
    assert code_version("wrn_16_1", 10, {}).startswith("dkd ")


def test_relations_of_as_many_other_samples_are_another_value(tmp_path, teacher, images):
    """Of two ranks: a rank's own samples of the step, and all samples of a micro-step, are as many."""
    found = set()
    for section in ({"scope": "local"}, {"batch": "micro"}, {"scope": 1, "batch": "micro"}, {}):
        losses = {"losses": {"sp": {**ALL["sp"], **section}}}
        recipe = validate(values_of(teacher, images, tmp_path, **losses, **with_cache("x"), train__micro_batch=4))
        (values,) = planned_values(recipe, Share(0, 2, 4, 2), 2).values()
        found.add(tuple(value.id for value in values))
    assert len(found) == 4


def test_a_live_teacher_beside_a_stored_one(tmp_path, teacher, images):
    """Two passes, and a loss by the gradient of the images with the live one."""
    teachers = {
        "a": {"name": "wrn_16_1", "weights": str(teacher), "cache": {"dir": str(tmp_path / "cache")}},
        "b": {"name": "resnet8", "weights": "random"},
    }
    losses = {"sp": {**ALL["sp"], "teacher": "a"}, "gradient_at": {"beta": 1, "teacher": "b"}}
    more = {"losses": losses, "teacher": None, "evaluation": {}, "teachers": teachers}
    live = {**more, "teachers": {**teachers, "a": {"name": "wrn_16_1", "weights": str(teacher)}}}
    truth, _ = train(teacher, images, tmp_path / "live", **live)
    assert train(teacher, images, tmp_path / "fill", **more) == (truth, [(0, 12)])
    assert train(teacher, images, tmp_path / "read", **more) == (truth, [(12, 0)])


def test_images_by_which_data_are_recognised(tmp_path, images):
    from dkd.build.data import build_image_pipeline, open_part, sampled_content

    recipe = validate(values_of("random", images, tmp_path))
    pipeline = build_image_pipeline(recipe)
    found = sampled_content(open_part(recipe.data, "train"), pipeline, 0)
    assert found == sampled_content(open_part(recipe.data, "train"), pipeline, 0)
    other = recipe.data.model_copy(update={"train": str(other_pixels(images, tmp_path))})
    assert (open_part(other, "train").labels == open_part(recipe.data, "train").labels).all()
    assert not {*found.values()} & {*sampled_content(open_part(other, "train"), pipeline, 0).values()}
    again = sampled_content(open_part(recipe.data, "train"), pipeline, 1)
    assert again["pixels"] == found["pixels"]
    assert again["augmented"] != found["augmented"]
    streamed = open_part(recipe.data.model_copy(update={"streaming": True}), "train")
    assert sampled_content(streamed, pipeline, 0) == sampled_content(streamed, pipeline, 0)


# --- Commands


def write_recipe(path, values):
    path.write_text(json.dumps(values))
    return str(path)


def test_dkd_teach_fills_what_training_reads(tmp_path, teacher, images, capsys):
    values = values_of(teacher, images, tmp_path / "run", losses={**ALL, "crd": None, "dkd": None})
    values["teacher"]["cache"] = {"dir": str(tmp_path / "cache"), "features": True}
    recipe = write_recipe(tmp_path / "recipe.json", values)
    assert main(["teach", recipe, "--epochs", "1"]) == 0
    assert "6 steps computed in" in capsys.readouterr().err
    assert main(["teach", recipe]) == 0
    assert "6 steps computed in" in (shown := capsys.readouterr().err)
    assert "6 were stored already" in shown
    next((tmp_path / "cache").rglob("epoch_00000/part_*")).unlink()
    assert main(["teach", recipe]) == 0
    assert "6 were stored already" in capsys.readouterr().err
    trainer = Trainer.from_recipe(validate(values))
    trainer.fit()
    assert used(trainer) == [(12, 0)]
    del values["teacher"]["cache"]
    live, _ = train(teacher, images, tmp_path / "live", **{k: values[k] for k in ("losses", "teacher")})
    assert outcome(tmp_path / "run") == live


def test_dkd_teach_stops_when_asked_and_resumes(tmp_path, teacher, images, capsys, monkeypatch):
    values = values_of(teacher, images, tmp_path / "run", **with_cache(tmp_path / "cache"))
    recipe = write_recipe(tmp_path / "recipe.json", values)
    asked = iter([None, None, 15] + [None] * 100)
    monkeypatch.setattr("dkd.training.teach.signalled", lambda: next(asked))
    assert main(["teach", recipe]) == 0
    assert "stopped after step 3 by a signal; the same command resumes it" in capsys.readouterr().err
    assert main(["teach", recipe]) == 0
    assert "3 were stored already" in capsys.readouterr().err


def test_dkd_teach_ends_where_it_cannot_write(tmp_path, teacher, images, capsys, monkeypatch):
    values = values_of(teacher, images, tmp_path / "run", **with_cache(tmp_path / "cache"))

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dkd.teacher_cache.writer.write_part", refuse)
    assert main(["teach", write_recipe(tmp_path / "recipe.json", values)]) == 1
    assert "the teacher's cache cannot be written: " in capsys.readouterr().err
    live, _ = train(teacher, images, tmp_path / "live")
    assert train(teacher, images, tmp_path / "run", **with_cache(tmp_path / "cache")) == (live, [(0, 12)])


def test_dkd_cache(tmp_path, teacher, images, capsys):
    cache = str(tmp_path / "cache")
    assert main(["cache", "list", cache]) == 2
    values = values_of(teacher, images, tmp_path / "run", **with_cache(cache, store="topk:3"))
    recipe = write_recipe(tmp_path / "recipe.json", values)
    assert main(["teach", recipe]) == 0
    capsys.readouterr()
    assert main(["cache", "list", cache]) == 0
    shown = capsys.readouterr().out
    for line in (
        "  teacher  wrn_16_1, weights ",
        "  images   100, labels and places ",
        "  order    seed 0, no epoch repeats\n",
        "  logits: 28 bytes an image, topk:3; 2 epochs of 96 images\n",
        "  attention_map.block3: 64 bytes an image; 2 epochs of 96 images\n",
        "  relations.block3: 64 bytes an image; 2 epochs of 96 images\n",
    ):
        assert line in shown
    assert main(["cache", "verify", cache, "--recipe", recipe, "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert "  intact\n" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ") and line.split()}
    for exact in ("ce", "at", "sp"):
        assert lines[exact].endswith("none, bit for bit")
    assert not lines["kd"].endswith("none, bit for bit")
    part = next((tmp_path / "cache").rglob("part_*"))
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    assert main(["cache", "verify", cache]) == 1
    assert f"damaged  {part}: positions" in capsys.readouterr().out
    assert main(["cache", "prune", cache, "--dry-run"]) == 0
    assert part.exists()
    assert main(["cache", "prune", cache]) == 0
    assert not part.exists()
    assert main(["cache", "verify", cache]) == 0
    key = part.parents[1].name
    assert main(["cache", "prune", cache, "--unused-for", "1"]) == 0
    assert part.parents[1].exists()
    assert main(["cache", "prune", cache, "--key", "zz"]) == 2
    assert main(["cache", "prune", cache, "--key", key[:5]]) == 0
    assert list((tmp_path / "cache").iterdir()) == []
    capsys.readouterr()
    assert main(["cache", "list", cache]) == 0
    assert "nothing is stored" in capsys.readouterr().out


def test_a_cache_of_another_teacher_under_this_key_is_found_by_verify(tmp_path, teacher, images, capsys, monkeypatch):
    values = values_of(teacher, images, tmp_path / "run", **with_cache(tmp_path / "cache"))
    recipe = write_recipe(tmp_path / "recipe.json", values)
    real = FrozenTeacher.forward

    def wrong(self, pixels):
        logits, features = real(self, pixels)
        return logits + 1e-3, features

    monkeypatch.setattr(FrozenTeacher, "forward", wrong)
    assert main(["teach", recipe]) == 0
    monkeypatch.undo()
    assert main(["cache", "verify", str(tmp_path / "cache"), "--recipe", recipe]) == 1
    assert "kd: the cache was filled on another kind of device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["cache", "list", "x", "--recipe", "r"], "--recipe belongs to: dkd cache verify"),
        (["cache", "verify", ".", "--key", "k"], "--key belongs to: dkd cache prune"),
        (["cache", "verify", ".", "--steps", "2"], "--steps belongs to: dkd cache verify DIR --recipe"),
        (["cache", "list", "no/such"], "is no folder"),
        (["teach", "configs/quickstart.yaml", "teacher.weights=random"], "teacher.cache: is missing: name a folder"),
        (
            ["teach", "configs/quickstart.yaml", "teacher.weights=random", "teacher.cache={dir: x, fill: false}"],
            "teacher.cache.fill: is false",
        ),
    ],
)
def test_wrong_arguments(arguments, line, capsys):
    assert main(arguments) == 2
    assert line in capsys.readouterr().err


REFUSED = {
    "gradient_at": ("losses.gradient_at", "does not store", {"losses": {"gradient_at": {"beta": 1}}}, {}),
    "maps": ("losses.fitnet", "features=true", {"losses": {"fitnet": ALL["fitnet"]}}, {}),
    "a user's loss": (
        "losses.custom.0.loss",
        "store = True",
        {"losses": {"custom": [{"name": "o", "loss": "small_models:Summed", "weight": 1, "pairs": [["fc", "fc"]]}]}},
        {},
    ),
    "too many logits": ("teacher.cache.store", "there are 10 logits", {}, {"store": "topk:10"}),
    "no folder": ("teacher.cache", "is not there, and fill is false", {}, {"fill": False}),
    "skipped images": ("data.on_error", "skip puts other images", {"data__on_error": "skip"}, {}),
    "a file": ("teacher.cache", "is no folder", {}, {"dir": "pyproject.toml"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path, teacher, images):
    from dkd.launch import Launch
    from dkd.preflight.check import check

    path, words, change, section = REFUSED[name]
    values = values_of(teacher, images, tmp_path / "run", **change)
    values["teacher"]["cache"] = {"dir": str(tmp_path / "cache"), **section}
    with pytest.raises(RecipeError) as refused:
        check(validate(values), Launch.read())
    assert [problem.path for problem in refused.value.problems] == [path]
    assert words in refused.value.problems[0].message
    assert not (tmp_path / "cache").exists()


def test_where_outputs_are_stored_is_no_change_of_a_recipe(tmp_path, teacher, images):
    from dkd.config.changes import recipe_changes

    plain = validate(values_of(teacher, images, tmp_path))
    cached, elsewhere, rounded = (
        validate(values_of(teacher, images, tmp_path, **with_cache(folder, **more)))
        for folder, more in (("a", {}), ("b", {"fill": False, "features": True}), ("a", {"store": "bf16"}))
    )
    assert recipe_changes(plain, cached) == recipe_changes(cached, elsewhere) == recipe_changes(cached, plain) == []
    assert [change.path for change in recipe_changes(plain, rounded)] == ["teacher.cache"]
    assert [change.path for change in recipe_changes(cached, rounded)] == ["teacher.cache.store"]


def test_a_plan_states_the_size(tmp_path, teacher, images, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = values_of(teacher, images, tmp_path / "run", losses=ALL, **with_cache("taught", features=True))
    recipe = write_recipe(tmp_path / "recipe.json", values)
    assert main(["plan", recipe, "--gpus-per-node", "2", "--images", "1000", "--tflops", "10"]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("cache "))
    values = validate(values)
    trainer = Trainer.from_recipe(values)
    try:
        stored: StoredTeacher = trainer.parts.step.teaching.stored[""]
        each = stored.reads.bytes_per_sample()
    finally:
        trainer.close()
    assert line.split()[1:3] == [f"{each / 1000:.3g}", "kB"]
    assert f"{each / 1e3 * 1000 / 1e3:.3g} MB an epoch" in shown
    assert "of the operations of one with the live teacher: " in shown
    assert main(["plan", recipe, "--gpus-per-node", "2", "teacher.cache.features=false"]) == 2
    assert "compares maps of features, which are large" in capsys.readouterr().err
    assert main(["train", recipe, "--dry-run", f"run.dir={tmp_path / 'new'}"]) == 0
    assert f"cache       taught, {each / 1000:.3g} kB an image, " in capsys.readouterr().out


def test_stops_on_the_way(tmp_path, teacher, images):
    """A run that is asked to stop leaves what it has computed."""
    trainer = Trainer.from_recipe(validate(values_of(teacher, images, tmp_path / "run", **with_cache(tmp_path / "c"))))
    trainer.parts.stop.asked_by = lambda look=False: "SIGTERM" if trainer.state.step > 3 else None
    with pytest.raises(Stopped):
        trainer.fit()
    done = trainer.state.step
    resumed = Trainer.from_recipe(validate(values_of(teacher, images, tmp_path / "run", **with_cache(tmp_path / "c"))))
    resumed.fit()
    assert used(resumed) == [(0, 12 - done)]
    assert train(teacher, images, tmp_path / "read", **with_cache(tmp_path / "c"))[1] == [(12, 0)]


def test_full_precision_is_where_the_forms_say(tmp_path):
    """A bf16 feature is promoted before it is pooled, where the loss does so."""
    feature = torch.randn(2, 3, 5, 5).bfloat16()
    loss = FeatureDistance("mse", FeatureForm("vector"))
    (found,) = loss.take_samples([feature], [((3,), (3, 5, 5))])
    assert torch.equal(found, full_precision(feature).mean((2, 3)))
    assert np.isfinite(found.numpy()).all()
