"""Mixup, CutMix and normalisation in the precision of the training, and what cannot be mixed."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from dkd.build.data import build_mixing
from dkd.config.loading import validate
from dkd.data import MixupCutmix, Normalize
from dkd.distillation import LabelTerm, Objective
from dkd.distillation.forward import Forward
from dkd.engines.arithmetic import Arithmetic
from dkd.losses import CrossEntropy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def some(rows=6):
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (rows, 3, 12, 12), dtype=torch.uint8, generator=g), torch.randint(
        0, 10, (rows,), generator=g
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_single_precision_mixes_as_torchvision_does_bit_for_bit(mixup, cutmix):
    images, labels = some()
    ways = [way(alpha=alpha, num_classes=10) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    torch.manual_seed(9)
    wanted = (v2.RandomChoice(ways) if len(ways) > 1 else ways[0])(images.float(), labels)
    found = MixupCutmix(10, mixup, cutmix)(images, labels, seed=9)
    assert all(
        torch.equal(ours, theirs) and ours.dtype == torch.float32 for ours, theirs in zip(found, wanted, strict=True)
    )


def test_double_precision_mixes_in_double_precision():
    images, labels = some()
    mixed, probabilities = MixupCutmix(10, mixup=0.4, dtype=torch.float64)(images, labels, seed=9)
    torch.manual_seed(9)
    share = float(torch.distributions.Beta(torch.tensor([0.4]), torch.tensor([0.4])).sample())
    plain, classes = images.double(), F.one_hot(labels, 10).double()
    torch.testing.assert_close(mixed, share * plain + (1 - share) * plain.roll(1, 0), rtol=1e-15, atol=1e-13)
    torch.testing.assert_close(
        probabilities, share * classes + (1 - share) * classes.roll(1, 0), rtol=1e-15, atol=1e-16
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_one_image_has_none_to_be_mixed_with(mixup, cutmix):
    for rows in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images to mix, not {rows}"):
            MixupCutmix(10, mixup, cutmix)(*some(rows), seed=1)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)]
)
def test_models_see_images_that_were_mixed_and_normalised_in_the_precision_of_the_training(precision, dtype):
    recipe = validate(
        {
            "run": {"name": "a"},
            "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "mixup": 0.4},
            "student": {"name": "resnet8"},
            "train": {"global_batch": 8, "epochs": 1, "precision": precision},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "constant"},
        }
    )
    arithmetic, (images, labels) = Arithmetic.of(recipe), some()
    assert arithmetic.dtype == dtype
    mixing = build_mixing(recipe, arithmetic.dtype)
    mixed, probabilities = mixing(images, labels, seed=4)
    assert (mixed.dtype, probabilities.dtype) == (dtype, dtype)
    objective = Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy())])
    seen_by_teacher = lambda images: (None, {"images": images})  # noqa: E731
    normalize, other = Normalize(MEAN, STD), Normalize((0.5,) * 3, (0.25,) * 3)
    student = torch.nn.Module()
    forward = Forward(student, seen_by_teacher, objective, normalize, other, arithmetic.dtype, torch.channels_last)
    seen = forward.images(mixed)
    taught = forward.teacher(mixed, seen).features["images"]
    for found, (mean, std) in ((seen, (MEAN, STD)), (taught, ((0.5,) * 3, (0.25,) * 3))):
        assert found.dtype == dtype
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
        plain = (mixed.double() / 255 - mean) / std
        torch.testing.assert_close(found.double(), plain, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-6)
