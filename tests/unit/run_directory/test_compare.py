"""`dkd compare`: what runs are compared by, from their files alone."""

import json
import shutil

import pytest
import yaml

from dkd.cli import main
from dkd.config import load_recipe
from dkd.config.changes import differing_keys


@pytest.fixture
def other(run, tmp_path):
    """A run with a teacher, another B and more epochs, which was interrupted after 2 of its steps."""
    other = shutil.copytree(run, tmp_path / "other")
    for name in ("FINISHED", "student.json", "student.safetensors"):
        (other / name).unlink()
    shutil.rmtree(other / "checkpoints" / "step_00000003")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["train"].update(global_batch=64, epochs=7)
    recipe["teacher"] = {"name": "wrn_16_1", "weights": "random"}
    recipe["losses"]["kd"] = {"alpha": 0.9, "temperature": 4}
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{**line, "images_per_second": 100.0 * line["step"]} for line in lines if line.get("step", 0) in (1, 2)]
    for steps, top1 in ((1, 0.5), (2, 0.25)):
        evaluation = {"steps": steps, "epoch": steps / 10, "top1": top1, "top5": None, "loss": float("nan")}
        kept.append({"evaluation": evaluation, "seconds": 1.0})
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return other


def compared(capsys, *words):
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_facts_and_differing_keys_of_two_runs(run, other, capsys):
    description = json.loads((run / "student.json").read_text())
    found = json.loads(compared(capsys, run, other, "--json"), parse_constant=pytest.fail)
    first, second = found["runs"]
    assert [first[key] for key in ("state", "student", "teacher", "global_batch", "world_size", "parameters")] == [
        "finished",
        "resnet8",
        None,
        32,
        1,
        description["parameters"],
    ]
    assert [first["top1"], first["loss"], first["seconds"]] == [
        description["evaluation"]["top1"],
        description["evaluation"]["loss"],
        description["seconds"],
    ]
    assert second["losses"] == {"ce": "CE 1", "kd": "KD α 0.9, T 4"}
    keys = ("state", "step", "total_steps", "teacher", "global_batch", "epochs", "epochs_done", "images_per_second")
    assert [second[key] for key in keys] == ["interrupted", 2, 3, "wrn_16_1", 64, 7, 0.2, 150.0]
    keys = ("top1", "top5", "loss", "best_top1", "best_step", "seconds", "parameters")
    assert [second[key] for key in keys] == [0.25, None, None, 0.5, 1, None, None]
    differing = found["differing_keys"]
    assert differing["train.global_batch"] == {"run": 32, "other": 64}
    assert differing["losses.kd.alpha"] == {"other": 0.9}
    assert differing["teacher.name"] == {"other": "wrn_16_1"}
    assert not {"teacher", "losses.kd", "run.dir", "run.name", "optimizer.lr"} & set(differing)


def test_the_table_has_one_column_a_run(run, other, capsys):
    lines = compared(capsys, run, other).splitlines()
    rows = {line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell.strip()][1:] for line in lines}
    assert lines[0].split() == ["run", "other"]
    assert rows["state"] == ["finished", "interrupted, step 2 of 3"]
    assert rows["losses.kd"] == ["-", "KD α 0.9, T 4"]
    assert rows["global batch"] == ["32", "64"]
    assert rows["best top-1"][1] == "50.00\N{NO-BREAK SPACE}% (step 1)"
    assert rows["train.epochs"][1] == "7"
    assert "keys of the recipes that differ" in lines
    assert "differ" not in compared(capsys, run)


def test_runs_that_cannot_be_compared_are_one_line(run, tmp_path, capsys):
    assert main(["compare", str(run), str(run)]) == 2
    assert "a run is given twice" in capsys.readouterr().err
    assert main(["compare", str(run), str(tmp_path / "none")]) == 2
    assert "is no run directory: it holds no recipe.yaml" in capsys.readouterr().err


def test_recipes_that_differ_in_nothing_have_no_differing_keys():
    recipe = load_recipe("configs/quickstart.yaml")
    moved = load_recipe("configs/quickstart.yaml", ["run.dir=elsewhere", "run.name=other"])
    assert differing_keys([recipe, moved]) == {}
    assert differing_keys([recipe]) == {}
