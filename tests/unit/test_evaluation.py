"""What an evaluation counts, for each class too, and where its numbers go: without ranks."""

import json

import numpy as np
import pytest
import torch

import dkd
from dkd.cli import main
from dkd.report.evaluation_file import read_evaluation
from dkd.training.class_counts import MOST_CLASSES_OF_A_MATRIX, ClassCounts

RECIPE = {
    "run": {"name": "small", "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 8},
    "student": {"name": "resnet8"},
    "train": {"global_batch": 64, "epochs": 1, "max_steps": 2, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.02},
    "schedule": {"name": "constant"},
}


def recipe_in(folder, **sections):
    values = {**RECIPE, **{key: {**RECIPE.get(key, {}), **keys} for key, keys in sections.items()}}
    return {**values, "run": {**values["run"], "dir": str(folder)}}


def test_counts_of_classes_are_those_of_plain_loops_and_a_class_without_images_has_no_accuracy():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(200, 8, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    counts = ClassCounts.zeros(8, torch.device("cpu"))
    for part in range(0, 200, 64):
        counts.add(logits[part : part + 64], labels[part : part + 64])
    facts = counts.over_ranks().facts(["a", "b", "c", "d", "e", "f", "g", "never seen"])
    matrix = np.zeros((8, 8), dtype=int)
    top5 = np.zeros(8, dtype=int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(8), key=lambda i: -row[i])
        matrix[label][order[0]] += 1
        top5[label] += label in order[:5]
    assert facts["confusion"] == matrix.tolist()
    for label, found in enumerate(facts["classes"]):
        samples = int(matrix[label].sum())
        assert (found["label"], found["samples"]) == (label, samples)
        assert (found["top1_correct"], found["top5_correct"]) == (matrix[label][label], top5[label])
        assert found["top1"] == (matrix[label][label] / samples if samples else None)
    absent = {"label": 7, "name": "never seen", "samples": 0, "top1_correct": 0, "top5_correct": 0}
    assert facts["classes"][7] == {**absent, "top1": None, "top5": None}
    assert counts.totals == (200, np.trace(matrix), top5.sum())
    json.dumps(facts, allow_nan=False)


def test_the_matrix_has_a_bound_and_the_counts_of_classes_have_none():
    counts = ClassCounts.zeros(MOST_CLASSES_OF_A_MATRIX + 1, torch.device("cpu"))
    counts.add(torch.eye(MOST_CLASSES_OF_A_MATRIX + 1)[:3], torch.tensor([0, 1, 1]))
    facts = counts.over_ranks().facts()
    assert facts["confusion"] is None
    assert [each["top1_correct"] for each in facts["classes"][:3]] == [1, 1, 0]
    assert ClassCounts.zeros(MOST_CLASSES_OF_A_MATRIX, torch.device("cpu")).confusion is not None
    few = ClassCounts.zeros(3, torch.device("cpu"))
    few.add(torch.eye(3), torch.tensor([0, 1, 1]))
    assert {each["top5"] for each in few.facts()["classes"]} == {None}  # of three classes, five are no question


def test_a_run_and_the_command_count_the_same_classes(tmp_path, capsys):
    run = dkd.train(recipe_in(tmp_path / "run")).run_dir
    facts = json.loads((run / "evaluation.json").read_text())
    (logged,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "evaluation" in line]
    of_classes = {key: facts.pop(key) for key in ("classes", "confusion")}
    assert logged["evaluation"] == facts
    assert np.trace(of_classes["confusion"]) == facts["top1_correct"]
    assert sum(each["top1_correct"] for each in of_classes["classes"]) == facts["top1_correct"]
    assert np.sum(of_classes["confusion"]) == facts["samples"] == 449
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert {key: found.pop(key) for key in ("classes", "confusion")} == of_classes
    assert "worst first" not in printed.err
    # For scripts: the one line of today. For people: a table on the other stream.
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found
    worst = min(each["top1"] for each in of_classes["classes"])
    assert printed.err.split("the worst first:\n")[1].startswith(f"    {worst:.4f}  ")


def test_an_evaluation_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "run" / "evaluation.json").mkdir(parents=True)
    assert dkd.train(recipe_in(tmp_path / "run")).steps == 2
    assert "warning: evaluation.json cannot be written" in capsys.readouterr().err


def test_the_file_of_an_evaluation_is_read_or_the_reason_is_returned(tmp_path):
    path = tmp_path / "evaluation.json"
    assert read_evaluation(path) == (None, None)
    counts = ClassCounts.zeros(3, torch.device("cpu"))
    counts.add(torch.eye(3)[[0, 1, 1, 0, 0]], torch.tensor([0, 1, 0, 1, 1]))
    facts = {"steps": 7, **counts.facts(["cat", "dog", "cow"])}
    path.write_text(json.dumps(facts))
    found, reason = read_evaluation(path)
    assert reason is None
    assert (found.steps, list(found.names)) == (7, ["cat", "dog", "cow"])
    assert found.accuracies == [1 / 2, 1 / 3, None]
    assert found.confused_pairs() == [(1, 0, 2), (0, 1, 1)]
    damaged = [{"classes": classes} for classes in (3, [1], [{"samples": "x"}] * 3)]
    for damage in (*damaged, {"steps": -1}, {"confusion": [[1]]}):
        path.write_text(json.dumps({**facts, **damage}))
        found, reason = read_evaluation(path)
        assert found is None
        assert "is damaged" in reason
    path.write_text("[")
    assert "is damaged" in read_evaluation(path)[1]


@pytest.mark.parametrize("classes", [10, 60])
def test_a_report_shows_the_worst_classes_first(tmp_path, classes):
    """The matrix as a picture where its names can be read, and else the pairs of classes that were confused most."""
    run = dkd.train(recipe_in(tmp_path / "run", data={"classes": classes})).run_dir
    facts = json.loads((run / "evaluation.json").read_text())
    assert main(["report", str(run), "--images", "20"]) == 0
    page = (run / "report.html").read_text()
    assert "in the evaluation after step 2, the worst classes first" in page
    worst = min((each for each in facts["classes"] if each["samples"]), key=lambda each: each["top1"])
    table = page.split("the worst classes first")[1].split("<tbody>")[1]
    assert table.startswith(f"<tr><td>{worst['label']}</td><td>{100 * worst['top1']:.2f}")
    assert (run / "report_pictures" / "confusion_matrix.png").exists() == (classes == 10)
    assert ("Pairs of classes that were confused most often" in page) == (classes == 60)
    (run / "evaluation.json").write_text("{}")
    assert main(["report", str(run), "--images", "20"]) == 0
    assert "The counts of classes cannot be read" in (run / "report.html").read_text()
