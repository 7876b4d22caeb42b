"""`train.stop_when` ends a run whose evaluations no longer improve, and a run may have no validation images."""

import json
import math
import shutil

import pytest
from test_evaluation import recipe_in

import dkd
from dkd.cli import main
from dkd.config.schema import StopWhenSection
from dkd.training.early_stopping import EarlyStopping
from dkd.training.evaluation import Evaluation


def evaluation(top1=0.5, loss=1.0, top5=0.9):
    return Evaluation(1000, round(1000 * top1), round(1000 * top5), loss)


def judged(values, metric="top1", state=None, **keys):
    """Return after how many evaluations the run would end, None for never, and the reason."""
    stopping = EarlyStopping.resumed(StopWhenSection(metric=metric, **keys), state)
    for step, value in enumerate(values, stopping.step + 1):
        stopping.judge(step, evaluation(**{metric: value}))
        if stopping.reason is not None:
            return step, stopping.reason
    return None, stopping


@pytest.mark.parametrize(
    ("values", "keys", "ends"),
    [
        ([0.1, 0.2, 0.3, 0.4], {"patience": 1}, None),
        ([0.1, 0.2, 0.2, 0.3], {"patience": 1}, 3),  # equal is no improvement
        ([0.3, 0.2, 0.1, 0.4, 0.4, 0.4, 0.4], {"patience": 3}, 7),  # the count begins again after 0.4
        ([0.1, 0.15, 0.25, 0.3], {"patience": 2, "min_delta": 0.1}, None),  # 0.25 is 0.15 better than the best, 0.1
        ([0.1, 0.15, 0.2, 0.4], {"patience": 2, "min_delta": 0.1}, 3),
        ([0.1, 0.7, 0.9], {"patience": 5, "threshold": 0.7}, 2),
        ([2.0, 1.5, 1.6, 1.4, 1.4, 1.5], {"patience": 2, "metric": "loss"}, 6),
        ([2.0, 1.5, 0.4], {"patience": 2, "metric": "loss", "threshold": 0.5}, 3),
        ([math.nan, math.inf, 1.0], {"patience": 2, "metric": "loss"}, 2),  # what is not finite never improves
        ([0.2, 0.1], {"patience": 1, "metric": "top5"}, 2),
    ],
)
def test_a_run_ends_after_evaluations_that_do_not_improve(values, keys, ends):
    step, reason = judged(values, **keys)
    assert step == ends
    assert ends is None or (keys.get("metric", "top1") in reason)


def test_the_state_of_a_checkpoint_continues_the_count_wherever_it_was_taken():
    values = [0.3, 0.5, 0.2, 0.1, 0.4, 0.45, 0.3]
    whole = judged(values, patience=4)
    assert whole[0] == 6
    for cut in range(6):
        _, stopping = judged(values[:cut], patience=4)
        state = json.loads(json.dumps(stopping.state_dict()))
        assert judged(values[cut:], state=state, patience=4) == whole, cut
    for damage in ({"waited": "2"}, {"best": [1]}, {"step": None}):
        damaged = EarlyStopping.resumed(StopWhenSection(), {**stopping.state_dict(), **damage})
        assert (damaged.best, damaged.waited) == (None, 0)
    # Another metric begins anew; another patience counts on.
    _, stopping = judged(values[:5], patience=4)
    assert EarlyStopping.resumed(StopWhenSection(metric="loss"), stopping.state_dict()).best is None
    assert judged([0.1], state=stopping.state_dict(), patience=6)[0] is None


def test_an_evaluation_that_is_repeated_is_counted_once():
    _, stopping = judged([0.5, 0.4], patience=2)
    for _ in range(3):
        stopping.judge(2, evaluation(0.45))
    assert (stopping.waited, stopping.reason) == (1, None)
    stopping.judge(3, evaluation(0.4))
    assert stopping.reason == "top1 has not improved for 2 evaluations; the best was 0.5000 after step 1"


# Epochs of 3 steps. A rate of 1e-9 and no running statistics leave the student as it was, so that nothing improves.
SMALL = {
    "student": {"norm": "group"},
    "train": {"global_batch": 448, "max_steps": None, "epochs": 9, "stop_when": {"patience": 2}},
    "optimizer": {"lr": 1e-9},
}


def small(folder, **sections):
    keys = {**SMALL, **sections}
    return recipe_in(folder, **{key: {**SMALL.get(key, {}), **values} for key, values in keys.items()})


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluated(run):
    return [line["evaluation"]["steps"] for line in lines_of(run) if "evaluation" in line]


def test_a_run_that_stops_early_is_finished_and_does_not_train_on(tmp_path, capsys):
    values = small(tmp_path / "run", checkpoint={"every_epochs": None})
    result = dkd.train(values)
    run = result.run_dir
    reason = f"top1 has not improved for 2 evaluations; the best was {result.top1:.4f} after step 3"
    assert result.steps == 9  # epochs of 3 steps: the first evaluation, and two without an improvement
    assert evaluated(run) == [3, 6, 9]
    finished = json.loads((run / "FINISHED").read_text())
    assert (finished["steps"], finished["stopped_early"]) == (9, reason)
    described = json.loads((run / "student.json").read_text())
    assert (described["steps"], described["stopped_early"]) == (9, reason)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000009"]
    assert f"stopped early after step 9 of 27: {reason}" in capsys.readouterr().err
    assert main(["status", str(run)]) == 0
    assert f"finished early after step 9: {reason} (" in capsys.readouterr().out
    # The same command again: the run stays as it is, though its patience would let a better evaluation pass.
    before = (run / "student.safetensors").read_bytes()
    assert dkd.train(values).steps == 9
    assert (run / "student.safetensors").read_bytes() == before
    assert json.loads((run / "FINISHED").read_text())["stopped_early"] == reason
    assert evaluated(run) == [3, 6, 9]
    # With more patience it trains on from there.
    longer = dkd.train(values, ["train.stop_when.patience=4"], allow_recipe_change=True)
    assert longer.steps == 15
    assert evaluated(run) == [3, 6, 9, 12, 15]
    assert main(["report", str(run), "--images", "20"]) == 0


def test_what_is_evaluated_again_does_not_undo_the_end_of_a_run(tmp_path):
    """As it may where a GPU's sums differ in their last bits: what ended the run is not weighed again."""
    values = small(tmp_path / "run")
    run = dkd.train(values).run_dir
    with pytest.MonkeyPatch.context() as patched:
        judge = EarlyStopping.judge
        patched.setattr(EarlyStopping, "judge", lambda self, step, found: judge(self, step, evaluation(1.0)))
        assert dkd.train(values).steps == 9
    assert evaluated(run) == [3, 6, 9]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [4, 7, 9])
def test_an_interrupted_run_stops_where_it_would_have_stopped_bit_for_bit(tmp_path, at):
    """Interrupted before a step, or before the evaluation (9) that ends the run."""
    # Training changes the student, and no improvement is as large as 1.
    sections = {"train": {"stop_when": {"patience": 2, "min_delta": 1}}, "optimizer": {"lr": 0.05}}
    whole = dkd.train(small(tmp_path / "whole", **sections)).run_dir
    again = small(tmp_path / "again", **sections)
    step, measure = dkd.Trainer.train_step, dkd.Trainer.evaluate

    def fail_before_step(self):
        if self.state.step + 1 == at:
            raise Interrupted
        return step(self)

    def fail_before_evaluation(self, *arguments):
        if self.state.step == at:
            self.parts.checkpointer.wait()
            raise Interrupted
        return measure(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dkd.Trainer, "train_step", fail_before_step)
        patched.setattr(dkd.Trainer, "evaluate", fail_before_evaluation)
        with pytest.raises(Interrupted):
            dkd.train(again)
    run = dkd.train(again).run_dir
    ends = [json.loads((folder / "FINISHED").read_text()) for folder in (whole, run)]
    assert ends[0]["stopping"] == ends[1]["stopping"]
    assert ends[0]["steps"] == ends[1]["steps"] == 9
    evaluations = [[line["evaluation"] for line in lines_of(folder) if "evaluation" in line] for folder in (whole, run)]
    assert evaluations[0] == evaluations[1]
    assert (whole / "student.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


def test_the_last_evaluation_of_a_run_that_stops_early_measures_the_agreement(tmp_path):
    taught = {"teacher": {"name": "wrn_16_1", "weights": "random"}, "losses": {"kd": {"alpha": 1}}}
    run = dkd.train(small(tmp_path / "run", **taught)).run_dir
    measured = [line["evaluation"]["steps"] for line in lines_of(run) if "agreement" in line.get("evaluation", {})]
    assert measured == [9]


def test_a_run_without_validation_images_is_not_evaluated(tmp_path, capsys):
    values = recipe_in(tmp_path / "run", data={"validation": None})
    result = dkd.train(values)
    run = result.run_dir
    assert (result.evaluation, result.top1, result.steps) == (None, None, 2)
    said = capsys.readouterr().err.splitlines()
    assert said.count("data.validation is null: the student is not evaluated") == 1
    assert said[-1].startswith("finished in ")
    assert said[-1].endswith("student.safetensors")
    assert evaluated(run) == []
    assert not (run / "evaluation.json").exists()
    assert "evaluation" not in json.loads((run / "student.json").read_text())
    assert dkd.train(values).steps == 2  # resumes as finished
    assert main(["status", str(run)]) == 0
    assert ": finished (" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert "no validation images" in (run / "report.html").read_text()
    assert main(["evaluate", str(run)]) == 2
    assert "data.validation: is null: name the images to evaluate" in capsys.readouterr().err
    assert main(["evaluate", str(run), "data.validation=digits"]) == 0
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", f"run.dir={tmp_path / 'other'}"]) == 0


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"stop_when": {}}}, "train.stop_when"),
        ({"checkpoint": {"keep_best": 1}}, "checkpoint.keep_best"),
    ],
)
def test_what_needs_evaluations_is_refused_without_validation_images(tmp_path, sections, key):
    values = recipe_in(tmp_path / "run", data={"validation": None}, **sections)
    with pytest.raises(dkd.InputError, match=f"{key}: needs evaluations, but data.validation is null"):
        dkd.train(values)


@pytest.mark.parametrize(
    ("stop_when", "message"),
    [
        ({"patience": 0}, r"train\.stop_when\.patience: "),
        ({"metric": "accuracy"}, r"train\.stop_when\.metric: "),
        ({"min_delta": -1}, r"train\.stop_when\.min_delta: "),
        ({"patiance": 2}, "patience"),
    ],
)
def test_wrong_keys_of_early_stopping_are_refused(tmp_path, stop_when, message):
    with pytest.raises(dkd.InputError, match=message):
        dkd.train(recipe_in(tmp_path / "run", train={"stop_when": stop_when}))


def test_top5_of_few_classes_cannot_end_a_run(tmp_path):
    values = recipe_in(tmp_path / "run", train={"stop_when": {"metric": "top5"}}, data={"classes": 5})
    with pytest.raises(dkd.InputError, match="top5 is not measured for 5 classes"):
        dkd.train(values)


def test_a_threshold_is_compared_with_each_evaluation_and_not_with_the_best():
    _, reason = judged([0.895, 0.902], threshold=0.9, min_delta=0.01, patience=9)
    assert reason == "top1 has reached 0.9: 0.9020 after step 2"
