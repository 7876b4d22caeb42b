"""dkd.train and dkd.evaluate: training as a function of a script or a notebook."""

import logging
import subprocess
import sys
import threading

import pytest
import yaml
from launched import child_environment, limit

import dkd
from dkd import console

RECIPE = {
    "run": {"name": "small", "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 8},
    "student": {"name": "resnet8"},
    "train": {"global_batch": 64, "epochs": 1, "max_steps": 2, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.02},
    "schedule": {"name": "constant"},
}


def test_a_training_returns_what_it_measured_and_can_be_repeated(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    first = dkd.train(path, [f"run.dir={tmp_path / 'a'}"])
    assert first.run_dir == tmp_path / "a"
    assert first.steps == 2
    assert first.top1 == first.evaluation.top1 == first.evaluation.top1_correct / first.evaluation.samples
    # The same again, from a mapping, which is not changed; in another precision, which Accelerate must not remember.
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "b")}}
    second = dkd.train(values, ["train.precision=bf16", "train.max_steps=1"])
    assert second.steps == 1
    assert values["train"] == RECIPE["train"]
    assert yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())["train"]["precision"] == "bf16"
    # A Recipe, and the run that is there: it is resumed, longer.
    recipe = dkd.load_recipe(path, [f"run.dir={tmp_path / 'a'}", "train.max_steps=4"])
    third = dkd.train(recipe, allow_recipe_change=True)
    assert third.steps == 4
    assert "resumed from" in capsys.readouterr().err
    evaluated = dkd.evaluate(third.run_dir)
    assert evaluated.result == third.evaluation
    assert dkd.load_student(third.student)(dkd_images()).shape == (2, 10)


def dkd_images():
    import torch

    return torch.zeros(2, 3, 8, 8)


def test_wrong_input_is_an_input_error_and_starts_nothing(tmp_path):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    with pytest.raises(dkd.InputError, match=r"train\.epochs: must be"):
        dkd.train(values, ["train.epochs=-1"])
    with pytest.raises(dkd.InputError, match=r"does not divide train\.global_batch=64"):
        dkd.train(values, ["train.micro_batch=7"])
    with pytest.raises(dkd.RecipeError, match="no such run"):
        dkd.evaluate(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert dkd.train(values, ["train.max_steps=1"]).steps == 1  # nothing of the errors is left


def test_a_training_that_fails_can_be_followed_by_another(tmp_path):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "broken")}}
    with pytest.raises(dkd.TrainingError, match="is not finite"):
        dkd.train(values, ["optimizer.lr=1e30", "train.max_steps=8"])
    assert dkd.train(values, [f"run.dir={tmp_path / 'good'}"]).steps == 2


def test_a_host_program_can_silence_and_redirect_the_lines(tmp_path, capsys):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    console.LOGGER.setLevel(logging.ERROR)
    try:
        dkd.train(values, ["train.max_steps=1"])
    finally:
        console.LOGGER.setLevel(logging.INFO)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "run" / "train.log").read_text() == ""


def test_lines_of_a_run_are_in_its_log_with_time_and_rank(tmp_path, capsys):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    dkd.train(values)
    said = capsys.readouterr().err.splitlines()
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert [line.split(" rank 0 INFO ", 1)[1] for line in lines] == said
    assert said[-1].startswith("finished in ")
    assert all(line[:4].isdecimal() and line[19] == "," for line in lines)
    # The run is over: what is reported now is not its own.
    console.say("later")
    assert len((tmp_path / "run" / "train.log").read_text().splitlines()) == len(lines)


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    (tmp_path / "run" / "train.log").mkdir(parents=True)
    assert dkd.train(values, ["train.max_steps=1"]).steps == 1


def test_public_names_are_listed_and_load_nothing_before_they_are_used():
    code = """
import sys, dkd
assert set(dkd.__all__) <= set(dir(dkd)), dir(dkd)
assert not {"torch", "pydantic"} & set(sys.modules)
for name in dkd.__all__:
    assert getattr(dkd, name).__doc__, name
"""
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=limit(60))


class Failing(dkd.Trainer):
    def train_step(self):
        if self.state.step == 2:
            raise RuntimeError("a bug")
        return super().train_step()


def test_after_an_error_nothing_is_written_and_the_folder_is_free(tmp_path, monkeypatch):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}, "checkpoint": {"every_steps": 1}}
    from dkd.training import entry

    monkeypatch.setattr(entry, "Trainer", Failing)
    with pytest.raises(RuntimeError, match="a bug"):
        dkd.train(values, ["train.max_steps=4"])
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    monkeypatch.setattr(entry, "Trainer", dkd.Trainer)
    assert dkd.train(values, ["train.max_steps=4"]).steps == 4


def test_a_start_that_fails_late_leaves_nothing_behind_it(tmp_path, monkeypatch):
    from dkd.engines.trackers import Trackers

    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    handlers = list(console.LOGGER.handlers)

    def fail(*arguments):
        raise dkd.RecipeError.at("run.trackers", "cannot start")

    with monkeypatch.context() as broken:
        broken.setattr(Trackers, "start", fail)
        with pytest.raises(dkd.RecipeError, match="cannot start"):
            dkd.train(values)
    assert console.LOGGER.handlers == handlers
    assert dkd.train(values).steps == 2


def test_the_log_of_a_run_states_why_it_ended(tmp_path):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    with pytest.raises(dkd.TrainingError) as error:
        dkd.train(values, ["optimizer.lr=1e30", "train.max_steps=8"])
    last = (tmp_path / "run" / "train.log").read_text().splitlines()[-1]
    assert last.endswith(f"rank 0 ERROR {error.value}")


def test_a_trainer_of_the_callers_survives_an_evaluation(tmp_path):
    values = {**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "done")}}
    done = dkd.train(values, ["train.precision=bf16"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    trainer = dkd.Trainer.from_recipe(dkd.load_recipe(path, [f"run.dir={tmp_path / 'alive'}"]))
    try:
        trainer.load_images(2)
        trainer.train_step()
        dkd.evaluate(done.run_dir)
        trainer.train_step()
    finally:
        trainer.close()
    assert trainer.state.step == 2


def test_a_process_group_of_the_callers_stays_with_its_timeout(tmp_path):
    code = f"""
import datetime, torch.distributed as dist, dkd
from dkd.library_internals.torch import group_timeout
import torch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=1234))
recipe = {RECIPE!r}
recipe["run"]["dir"] = {str(tmp_path / "run")!r}
assert dkd.train(recipe).steps == 2
assert dist.is_initialized()
print(group_timeout(dist.group.WORLD, torch.device("cpu")).total_seconds())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=limit(60)
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "1234.0"
