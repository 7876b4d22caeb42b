"""The picture of a dry run: the very images that the first step trains on, and nobody's file replaced."""

import numpy as np
import pytest
import torch
from PIL import Image

from dkd import CrossEntropy, DistillationStep, LabelTerm, Launch, Objective
from dkd.build.data import build_data
from dkd.cli import main
from dkd.commands.batch_picture import describe_label, load_first_batch
from dkd.config import load_recipe
from dkd.preflight.data import open_sources

ALONE = ["teacher=null", "losses={}", "run.trackers=[]", "train.precision=fp32", "train.global_batch=64"]
DIGITS = [*ALONE, "train.micro_batch=16", "data.image_size=16"]


class Recording(torch.nn.Module):
    """A student that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))

    def forward(self, images):
        self.seen = images
        return self.weight.expand(len(images), 10), {}


class Labels(CrossEntropy):
    def forward(self, logits, labels, layout=None):
        self.seen = labels
        return super().forward(logits, labels, layout)


@pytest.mark.parametrize("more", [[], ["data.mixup=0.4", "data.cutmix=1.0"]])
@pytest.mark.parametrize("workers", [0, 1])
def test_these_are_the_images_that_the_first_step_trains_on(more, workers):
    recipe = load_recipe("configs/quickstart.yaml", [*DIGITS, *more])
    sources = open_sources(recipe, Launch())
    batch = load_first_batch(recipe, Launch(), *sources)
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    parts = build_data(changed, *sources, Launch(), torch.float32, torch.device("cpu"))
    student, loss = Recording(), Labels()
    objective = Objective([LabelTerm("ce", lambda step: 1.0, loss)])
    micro_steps = parts.sampler.micro_steps
    assert micro_steps == 4
    step = DistillationStep(
        student, None, objective, micro_steps=micro_steps, mixing=parts.mixing, seed=recipe.run.seed
    )
    loader = parts.train_loader.steps(0, parts.sampler.steps_per_epoch)
    step.begin([next(loader) for _ in range(micro_steps)], 0)
    step.loss(0)
    assert torch.equal(batch.images.float(), student.seen)
    assert torch.equal(batch.labels, loss.seen)
    assert batch.images.is_floating_point() == bool(more)


def draw(path, *more):
    words = [f"run.dir={path.parent / 'run'}", *DIGITS, *more]
    return main(["train", "configs/quickstart.yaml", *words, "--dry-run", "--picture", str(path)])


def test_a_dry_run_draws_the_batch_with_its_classes(tmp_path, capsys):
    path = tmp_path / "batch.png"
    assert draw(path) == 0
    assert f"picture     {path}: 16 of the 16 images of step 1's first micro-batch\n" in capsys.readouterr().out
    recipe = load_recipe("configs/quickstart.yaml", DIGITS)
    batch = load_first_batch(recipe, Launch(), *open_sources(recipe, Launch()))
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    first = batch.images[0].permute(1, 2, 0).numpy().repeat(7, 0).repeat(7, 1)  # 16 pixels enlarged to 112
    assert np.array_equal(sheet[6 : 6 + 112, 6 : 6 + 112], first)
    assert (sheet[6 + 112 : 6 + 112 + 14, 6 : 6 + 112] < 128).any()  # the caption
    assert not (tmp_path / "run").exists()


def test_only_pictures_of_dry_runs_are_replaced(tmp_path, capsys):
    path = tmp_path / "batch.png"
    assert draw(path) == 0
    before = path.read_bytes()
    assert draw(path, "run.seed=1") == 0
    assert path.read_bytes() != before
    path.write_bytes(b"a picture of the user's")
    assert draw(path) == 2
    assert "exists, and dkd train --dry-run did not write it: choose another name" in capsys.readouterr().err
    assert path.read_bytes() == b"a picture of the user's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "--picture", "x.jpg"], "--picture 'x.jpg' must end in .png"),
        (["--dry-run", "--picture", "no/such/x.png"], "'no/such' is no folder; make it first"),
        (["--picture", "x.png"], "--picture draws what a dry run has loaded: add --dry-run"),
    ],
)
def test_a_wrong_place_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    assert main(["train", "configs/quickstart.yaml", *DIGITS, f"run.dir={tmp_path / 'run'}", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dkd: ")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_view_of_a_teacher_with_another_input_size_is_drawn_too(tmp_path, capsys):
    path = tmp_path / "batch.png"
    assert draw(path, "teacher={name: resnet8, weights: random, input_size: 32}", "losses={kd: {alpha: 1}}") == 0
    assert "and below each the teacher's view of 32×32" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.height == 6 + 2 * (112 + 128 + 14 + 6)


def test_labels_have_names():
    assert describe_label(torch.tensor(1), ["cat", "dog"]) == ["dog"]
    assert describe_label(torch.tensor(4), None) == ["class 4"]
    assert describe_label(torch.tensor([0.25, 0.0, 0.75]), ["cat", "dog", "owl"]) == ["0.75 owl", "0.25 cat"]
    assert describe_label(torch.tensor([0.0, 1.0]), ["cat", "dog"]) == ["dog"]
