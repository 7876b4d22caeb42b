"""What a step and an evaluation report: names of losses, and numbers that are not finite."""

import json
import math

import pytest
import torch
import yaml

from dkd.cli import main
from dkd.config.loading import validate
from dkd.config.messages import RecipeError
from dkd.distributed.async_mean import AsyncMean, StepValues
from dkd.engines.accelerated import forget_settings
from dkd.launch import Launch
from dkd.training.evaluation import Evaluation
from dkd.training.trainer import Trainer

RECIPE = {
    "run": {"name": "numbers", "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 8},
    "student": {"name": "resnet8"},
    "train": {"global_batch": 32, "epochs": 1, "max_steps": 2, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "constant"},
}
# Every name that the trainer's own bookkeeping of a step uses, or has used.
BOOKKEEPING = [
    "place",
    "place_squared",
    "seconds",
    "seconds_waited",
    "stop",
    "minutes_over",
    "unreadable",
    "load_failures",
    "pass_difference",
    "ranks",
]


def only_json(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def write_recipe(folder, **changes):
    values = {**RECIPE, **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "run": {**values["run"], "dir": str(folder / "run")}}))
    return str(path)


def test_terms_and_bookkeeping_do_not_share_names():
    terms = {name: torch.tensor(float(i)) for i, name in enumerate([*BOOKKEEPING, "place squared", "loss", "skipped"])}
    counts = {name: -1.0 - i for i, name in enumerate(["loss", *BOOKKEEPING, "skipped"])}
    means = AsyncMean(1500, StepValues(terms, counts))
    for numbers in (means.read(), means.local()):
        assert numbers.terms == {name: value.item() for name, value in terms.items()}
        assert numbers.counts == counts
    assert means.in_step()


def test_a_loss_of_ones_own_may_have_any_name_that_a_line_does_not_use(tmp_path):
    custom = [{"name": name, "loss": "dkd:CrossEntropy", "weight": 0.5, "of": "labels"} for name in BOOKKEEPING]
    assert main(["train", write_recipe(tmp_path, losses={"custom": custom})]) == 0
    lines = [only_json(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert {line[name] for name in BOOKKEEPING} == {line["ce"]}
        assert line["loss"] == pytest.approx(line["ce"] * (1 + 0.5 * len(BOOKKEEPING)), rel=1e-6)


def test_names_that_a_line_uses_are_refused(tmp_path):
    """Read from lines that a training writes: whatever key is added to them must be refused, too."""
    changes = {"teacher": {"name": "resnet8", "weights": "random"}}
    sp = {"gamma": 1, "reference_batch": 128, "pairs": [["layer3", "layer3"]]}
    assert main(["train", write_recipe(tmp_path, **changes, losses={"sp": sp})]) == 0
    lines = [only_json(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    used = {key for line in lines if "step" in line for key in line if "/" not in key} | {
        "evaluation",
        "checkpoint",
        "skipped",
    }
    assert {"loss", "step", "sp_row_difference"} < used
    for name in sorted(used | {"at", "kd", "gradient_at", "replaced_images"}):
        custom = [{"name": name, "loss": "dkd:CrossEntropy", "weight": 1, "of": "labels"}]
        with pytest.raises(RecipeError, match=f"name '{name}' is taken"):
            validate({**RECIPE, "losses": {"custom": custom}})


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_an_evaluation_whose_loss_is_not_finite_says_so_and_is_json(loss):
    broken = Evaluation(10, 3, None, loss)
    assert only_json(json.dumps(broken.facts()))["loss"] is None
    assert f"the loss is not finite ({loss})" in broken.problem
    assert Evaluation(10, 3, None, 2.5).problem is None
    assert Evaluation(10, 3, None, 2.5).facts()["loss"] == 2.5


def test_a_student_whose_logits_are_not_finite_does_not_end_with_exit_code_0(tmp_path, capsys):
    assert main(["train", write_recipe(tmp_path, student={"name": "small_models:NotFiniteInEvaluation"})]) == 1
    said = capsys.readouterr().err
    assert "warning: evaluation after step 2: the loss is not finite (nan)" in said
    assert "is of no use: the loss is not finite (nan)" in said
    run = tmp_path / "run"
    lines = [only_json(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation"]["loss"] for line in lines if "evaluation" in line] == [None]
    assert only_json((run / "student.json").read_text())["evaluation"]["loss"] is None
    # The same, started again, and by itself.
    assert main(["train", write_recipe(tmp_path, student={"name": "small_models:NotFiniteInEvaluation"})]) == 1
    capsys.readouterr()
    assert main(["evaluate", str(run), "--trust-code"]) == 1
    out, err = capsys.readouterr()
    assert only_json(out)["loss"] is None
    assert "dkd: the loss is not finite (nan)" in err


def begun(tmp_path, **changes):
    """Return a trainer that is about to take its first step."""
    values = {**RECIPE, **changes, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}}
    return Trainer.from_recipe(validate(values), Launch())


@pytest.fixture
def settings_of_its_own():
    """Accelerate keeps its settings for the life of a process."""
    forget_settings()
    yield
    forget_settings()


@pytest.mark.usefixtures("settings_of_its_own")
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_terms_of_a_single_micro_step_are_logged_as_they_are_and_those_of_several_averaged(tmp_path, micro_steps):
    trainer = begun(tmp_path, train={**RECIPE["train"], "micro_batch": 32 // micro_steps})
    seen, step_loss = [], trainer.parts.step.loss

    def noted(micro_step):
        found = step_loss(micro_step)
        seen.append(found.terms["ce"])
        return found

    trainer.parts.step.loss = noted
    trainer.load_images(1)
    terms = trainer.train_step().terms
    trainer.close()
    assert len(seen) == micro_steps
    if micro_steps == 1:
        assert terms["ce"] is seen[0]  # nothing was computed of it
    assert terms["ce"].item() == pytest.approx(sum(value.item() for value in seen) / micro_steps, rel=1e-6)


@pytest.mark.usefixtures("settings_of_its_own")
def test_the_launch_is_read_once_and_not_while_training_runs(tmp_path, monkeypatch):
    """DeepSpeed's file may move, and the environment change, while training runs."""
    trainer = begun(tmp_path)

    def read_again(*_):
        raise AssertionError("the environment was read again")

    for name in ("read", "read_ranks"):
        monkeypatch.setattr(Launch, name, read_again)
    for name, value in {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such/file.json",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
        "WORLD_SIZE": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert trainer.fit().samples == 449
