"""Losses of the labels, smoothed and of mixed images, against timm's and torch's, on any number of ranks."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import recipe_in
from threaded_ranks import on_ranks
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as OfTimm
from timm.loss import SoftTargetCrossEntropy

import dkd
from dkd.global_batch import BatchLayout
from dkd.losses import BinaryCrossEntropy, CrossEntropy

CLASSES = 7


def some(rows=10):
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, CLASSES, generator=g, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (rows,), generator=g)


def mixed(labels, share=0.7):
    """What MixupCutmix makes of labels: probabilities that are not smoothed."""
    classes = F.one_hot(labels, CLASSES).double()
    return share * classes + (1 - share) * classes.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("summed", [False, True])
def test_labels_give_the_loss_of_timm(smoothing, threshold, summed):
    logits, labels = some()
    theirs = OfTimm(smoothing, threshold, sum_classes=summed)(logits, labels)
    ours = BinaryCrossEntropy(smoothing, threshold, summed)(logits, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.7, 0.15, 1.0])
def test_mixed_labels_are_smoothed_to_the_targets_of_timms_mixup(smoothing, share):
    """timm smooths inside of Mixup, dkd inside of the losses."""
    logits, labels = some()
    theirs = mixup_target(labels, CLASSES, share, smoothing).double()  # timm makes them in float32
    ours = BinaryCrossEntropy(smoothing).targets(mixed(labels, share), logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert ours.sum(1).tolist() == pytest.approx([1.0] * len(labels))
    for threshold in (None, 0.2):
        wanted = OfTimm(0.0, threshold)(logits, theirs)
        found = BinaryCrossEntropy(smoothing, threshold)(logits, mixed(labels, share))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    wanted = SoftTargetCrossEntropy()(logits, theirs)
    assert CrossEntropy(smoothing)(logits, mixed(labels, share)).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("counts", [(10,), (5, 5), (7, 1, 2)])
@pytest.mark.parametrize("of_mixed", [False, True])
def test_ranks_with_any_number_of_rows_have_value_and_gradient_of_the_whole_batch(counts, of_mixed):
    logits, labels = some()
    targets = mixed(labels) if of_mixed else labels
    parts = list(zip(logits.split(counts), targets.split(counts), strict=True))

    def on_rank(rank, group):
        mine = parts[rank][0].clone().requires_grad_()
        value = BinaryCrossEntropy(0.1)(mine, parts[rank][1], BatchLayout(counts, rank, group))
        value.backward()
        return value.item(), mine.grad

    found = on_ranks(len(counts), on_rank)
    whole = logits.clone().requires_grad_()
    dense = targets if of_mixed else F.one_hot(labels, CLASSES).double()
    wanted = F.binary_cross_entropy_with_logits(whole, 0.9 * dense + 0.1 / CLASSES)
    wanted.backward()
    assert sum(value for value, _ in found) / len(counts) == pytest.approx(wanted.item(), rel=1e-12)
    gradient = torch.cat([gradient for _, gradient in found]) / len(counts)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-15)


def test_wrong_settings_and_shapes_are_refused():
    logits, labels = some()
    for wrong in ({"label_smoothing": 1.0}, {"target_threshold": -0.1}):
        with pytest.raises(ValueError, match="must be from 0 to less than 1"):
            BinaryCrossEntropy(**wrong)
    with pytest.raises(ValueError, match="different numbers of rows"):
        BinaryCrossEntropy()(logits, labels[:4])
    assert BinaryCrossEntropy()(logits.bfloat16(), labels).dtype == torch.float32
    assert "target_threshold=0.2" in str(BinaryCrossEntropy(0.1, 0.2))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.2, "cutmix": 1.0}])
def test_a_run_logs_the_loss_of_its_whole_batch(tmp_path, mixing):
    """Two micro-steps against timm's loss of what the step has mixed."""
    values = recipe_in(
        tmp_path / "run",
        losses={"ce": None, "bce": {"label_smoothing": 0.1}},
        train={"micro_batch": 32, "max_steps": 1},
        student={"norm": "group"},
        data=mixing,
    )
    seen = []
    call = BinaryCrossEntropy.forward

    def forward(self, logits, labels, layout=None):
        dense = labels if labels.is_floating_point() else F.one_hot(labels, 10).float()
        seen.append(OfTimm(0.0)(logits.detach(), 0.9 * dense + 0.01).item())
        assert labels.is_floating_point() == bool(mixing)
        return call(self, logits, labels, layout)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BinaryCrossEntropy, "forward", forward)
        run = dkd.train(values).run_dir
    (line,) = [each for each in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "step" in each]
    assert line["bce"] == line["loss"] == pytest.approx(sum(seen) / 2, rel=1e-5)
    assert "ce" not in line
