"""`losses.ce.class_weights`: where the weights come from, and what is refused. The sums over ranks are compared with
torch in test_ranks.py."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from test_evaluation import recipe_in

import dkd
from dkd.build.objective import class_weights
from dkd.cli import main
from dkd.config.loading import validate
from dkd.losses import CrossEntropy


class Labels:
    """What class weights ask of training images."""

    class_names = None

    def __init__(self, *labels):
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.labels)


def recipe_of(tmp_path, weights, **data):
    ce = {"class_weights": weights}
    return validate(recipe_in(tmp_path / "run", losses={"ce": ce}, data={"classes": 4, **data}))


def test_balanced_weights_are_those_of_scikit_learn(tmp_path):
    labels = [0, 0, 0, 0, 0, 1, 2, 2, 3, 0]
    found = class_weights(recipe_of(tmp_path, "balanced"), Labels(*labels))
    wanted = compute_class_weight("balanced", classes=np.arange(4), y=np.array(labels))
    assert found == pytest.approx(wanted.tolist())
    assert np.mean([found[label] for label in labels]) == pytest.approx(1)
    assert class_weights(recipe_of(tmp_path, [1, 2, "3e-1", 0]), Labels(*labels)) == [1, 2, 0.3, 0]
    assert class_weights(recipe_of(tmp_path, None), Labels(*labels)) is None


def test_balanced_is_refused_for_a_class_without_images_before_anything_starts(tmp_path, capsys):
    values = recipe_in(tmp_path / "run", losses={"ce": {"class_weights": "balanced"}}, data={"classes": 12})
    with pytest.raises(dkd.InputError, match="there is none of 2 of 12 classes"):
        dkd.train(values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "weights", ["equal", [], [0, 0, 0, 0], [1, -1, 1, 1], [1, True, 1, 1], [1, float("nan"), 1, 1], 3]
)
def test_wrong_weights_are_refused(tmp_path, weights):
    with pytest.raises(dkd.InputError, match=r"losses\.ce\.class_weights: must be balanced, or a list"):
        recipe_of(tmp_path, weights)


def test_a_list_has_a_weight_for_each_class(tmp_path):
    with pytest.raises(dkd.InputError, match=r"losses\.ce\.class_weights: 3 weights for data\.classes=4"):
        dkd.train(recipe_in(tmp_path / "run", losses={"ce": {"class_weights": [1, 2, 3]}}, data={"classes": 4}))


def test_a_loss_of_ones_own_loop_takes_weights_that_fit_its_logits():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 3])
    weight = [1.0, 2.0, 0.5, 0.0]
    wanted = F.cross_entropy(logits, labels, torch.tensor(weight))
    assert CrossEntropy(weight=weight)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)
    # torch divides 0 by 0 there.
    assert CrossEntropy(weight=weight)(logits[3:], labels[3:]).item() == 0
    assert CrossEntropy(weight=weight)(logits.bfloat16(), labels).dtype == torch.float32
    with pytest.raises(ValueError, match="weight has 4 classes, the logits have 3"):
        CrossEntropy(weight=weight)(logits[:, :3], labels)
    for wrong in ([-1.0, 1.0], [0.0, 0.0], [float("inf"), 1.0], [[1.0, 1.0]]):
        with pytest.raises(ValueError, match="weight must be one finite number from 0 for each class"):
            CrossEntropy(weight=wrong)
    assert str(CrossEntropy(weight=weight)) != str(CrossEntropy())


def test_a_run_trains_with_weights_and_evaluates_without(tmp_path):
    """Its first step against torch on the whole batch of two micro-steps; the loss of an evaluation has no weights."""
    weights = {"class_weights": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "label_smoothing": 0.1}
    values = recipe_in(
        tmp_path / "run", losses={"ce": weights}, train={"micro_batch": 32, "max_steps": 1}, student={"norm": "group"}
    )
    seen = []
    step = dkd.DistillationStep.begin
    with pytest.MonkeyPatch.context() as patched:

        def begin(self, micro_batches, number, *more):
            images, labels = (torch.cat([batch[i] for batch in micro_batches]) for i in (0, 1))
            with torch.no_grad():
                logits = self.logits(images)
            seen.append(F.cross_entropy(logits, labels, torch.arange(1.0, 11), label_smoothing=0.1).item())
            step(self, micro_batches, number, *more)

        patched.setattr(dkd.DistillationStep, "begin", begin)
        run = dkd.train(values).run_dir
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["ce"] for line in lines if "step" in line] == pytest.approx(seen, rel=1e-5)
    unweighted = dkd.train(
        values, ["losses.ce.class_weights=null", f"run.dir={tmp_path / 'other'}", "optimizer.lr=1e-12"]
    )
    weighted = dkd.train(values, [f"run.dir={tmp_path / 'third'}", "optimizer.lr=1e-12"])
    assert weighted.evaluation.loss == pytest.approx(unweighted.evaluation.loss, rel=1e-6)
    assert main(["train", str(run / "recipe.yaml"), "--dry-run", f"run.dir={tmp_path / 'dry'}"]) == 0


def test_labels_of_weight_zero_teach_nothing_with_label_smoothing_either():
    loss = dkd.CrossEntropy(0.1, [0.0, 1.0, 2.0])
    logits = torch.randn(4, 3, requires_grad=True)
    value = loss(logits, torch.zeros(4, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()
