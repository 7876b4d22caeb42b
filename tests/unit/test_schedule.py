"""What happens after which step, what the numbers of a step add up to, and what is done with them: without ranks."""

import json
import math

import pytest
import torch

from dkd.checkpoints.schedule import CheckpointSchedule
from dkd.config.loading import validate
from dkd.config.schema import CheckpointSection
from dkd.distillation import LabelTerm, Objective
from dkd.distributed.async_mean import AsyncMean, StepValues
from dkd.errors import TrainingError
from dkd.losses import CrossEntropy
from dkd.runs.logger import RunLogger
from dkd.training.metrics import LARGEST_PASS_DIFFERENCE, StepMetrics
from dkd.training.schedule import Decision, RunSchedule, Wishes
from dkd.training.state import TrainState

RECIPE = {
    "run": {"name": "schedule", "log_every": 3, "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits"},
    "student": {"name": "resnet8"},
    "train": {"global_batch": 64, "epochs": 4, "precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "constant"},
    "checkpoint": {"every_epochs": 2, "every_steps": 7},
    "evaluation": {"every_epochs": 3},
}
NOTHING = Wishes()


def recipe(**sections):
    return validate({**RECIPE, **{key: {**RECIPE[key], **values} for key, values in sections.items()}})


def test_a_run_of_four_epochs_is_saved_and_evaluated_when_the_recipe_asks_for_it():
    schedule = RunSchedule(recipe(), steps_per_epoch=10)
    assert (schedule.planned_steps, schedule.total_steps) == (40, 40)
    decisions = {step: schedule.decide(step, NOTHING) for step in range(1, 41)}
    # Every 7 steps, after each second epoch, and at the end; evaluations after the third epoch and at the end.
    assert [step for step, decision in decisions.items() if decision.save] == [7, 14, 20, 21, 28, 35, 40]
    assert [step for step, decision in decisions.items() if decision.evaluate] == [30, 40]
    assert not any(decision.stop for decision in decisions.values())
    assert [step for step, decision in decisions.items() if decision.interrupts] == [7, 14, 20, 21, 28, 30, 35, 40]
    # Counted from 0; the last step of the run is always logged.
    assert [step for step in range(40) if schedule.logs(step)] == [*range(0, 40, 3)]
    assert RunSchedule(recipe(train={"max_steps": 6}), 10).logs(5)


def test_a_shortened_run_walks_the_curves_of_the_whole_one():
    schedule = RunSchedule(recipe(train={"max_steps": 12}), steps_per_epoch=10)
    assert (schedule.planned_steps, schedule.total_steps) == (40, 12)
    assert schedule.decide(12, NOTHING) == Decision(save=True, evaluate=True)


def test_a_run_that_is_asked_to_stop_stops_after_a_checkpoint_and_does_not_evaluate():
    schedule, asked = RunSchedule(recipe(), steps_per_epoch=10), Wishes(stop=True)
    assert schedule.decide(5, asked) == Decision(save=True, stop=True)
    assert schedule.decide(30, asked) == Decision(save=True, stop=True)  # where an evaluation was due
    # After its last step a run is finished, asked to stop or not.
    assert schedule.decide(40, asked) == Decision(save=True, evaluate=True)


def test_minutes_that_are_over_ask_for_a_checkpoint_alone():
    schedule = RunSchedule(recipe(), steps_per_epoch=10)
    assert schedule.decide(5, Wishes(minutes_over=True)) == Decision(save=True)
    assert not schedule.minutes_over()  # the recipe names no minutes


def test_all_ranks_decide_alike_whatever_their_clocks_show(monkeypatch):
    """The wishes alone decide; a rank's own clock makes a wish and no decision."""
    from dkd.checkpoints import schedule as schedules

    now = [0.0]
    monkeypatch.setattr(schedules.time, "monotonic", lambda: now[0])
    section = CheckpointSection(every_epochs=None, every_minutes=1)
    slow, fast = (CheckpointSchedule(section, 10, 100) for _ in range(2))
    now[0] = 61.0
    assert fast.minutes_over()
    assert (slow.due(5, False), fast.due(5, False)) == (False, False)
    assert (slow.due(6, True), fast.due(6, True)) == (True, True)
    assert not fast.minutes_over()


def test_numbers_of_micro_steps_add_up_to_means():
    values = StepValues({}, {"seconds_waited": 2.0})
    for share in (1.0, 2.0, 6.0):
        values.add({"ce": torch.tensor(share)}, {"loss": 10 * share}, micro_steps=3)
    assert values.terms["ce"].item() == pytest.approx(3.0)
    assert values.counts["loss"] == pytest.approx(30.0)
    assert values.counts["seconds_waited"] == 2.0


def test_a_name_may_be_a_term_and_a_count():
    values = StepValues({}, {"seconds": 5.0})
    values.add({"seconds": 1.0}, {}, micro_steps=2)
    values.add({"seconds": 2.0}, {}, micro_steps=2)
    assert (values.terms, values.counts) == ({"seconds": 1.5}, {"seconds": 5.0})


def test_nothing_is_computed_for_a_single_micro_step():
    loss, values = torch.tensor(1.0), StepValues({}, {})
    values.add({"ce": loss}, {"loss": loss}, micro_steps=1)
    assert values.terms["ce"] is values.counts["loss"] is loss


class Lines:
    """A run directory that keeps what is logged."""

    def __init__(self, path):
        self.path, self.lines = path, []

    def log(self, line):
        self.lines.append(json.loads(json.dumps(line)))

    def sync(self):
        pass


class NoTrackers:
    def log(self, values, step):
        return None


class NoProgress:
    def step(self, step, values):
        pass

    def say(self, message):
        print(message)


@pytest.fixture
def read(tmp_path):
    """Return a function that makes metrics of a recipe, and one that lets them read a step's numbers."""

    def begin(settled, overflows_by_design=False):
        run_dir, state = Lines(tmp_path), TrainState()
        objective = Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy())])
        log = RunLogger(run_dir, NoTrackers(), NoProgress())
        schedule = RunSchedule(settled, steps_per_epoch=10)
        metrics = StepMetrics(settled, schedule, state, 1, objective, lambda step: 0.1, 0, log, overflows_by_design)

        def step(number, ce=1.0, failures=(), unreadable=(), **counts):
            loading = metrics.note_loading(number, failures, unreadable)
            usual = {
                "loss": ce,
                "seconds": 2.0,
                "seconds_waited": 0.5,
                "skipped": 0.0,
                "stop": 0.0,
                "minutes_over": 0.0,
            }
            metrics.read(AsyncMean(number, StepValues({"ce": ce}, {**usual, **loading, **counts})))
            return metrics.wishes

        return step, run_dir.lines, state

    return begin


def test_speeds_are_those_of_all_steps_since_the_last_logged_one(read):
    step, lines, _ = read(recipe())
    for number in range(7):
        step(number, ce=float(number))
    assert [line["step"] for line in lines] == [1, 4, 7]
    assert [line["loss"] for line in lines] == [line["ce"] for line in lines] == [0.0, 3.0, 6.0]
    assert {line["images_per_second"] for line in lines} == {32.0}
    assert {line["data_wait"] for line in lines} == {0.25}
    assert {(line["lr"], line["weight/ce"], line["epoch"]) for line in lines} == {(0.1, 1.0, 0)}


def test_wishes_are_those_of_the_step_that_was_read(read):
    step, _, _ = read(recipe())
    assert step(0) == Wishes()
    assert step(1, stop=0.25, minutes_over=0.25) == Wishes(minutes_over=True, stop=True)  # of one of four ranks
    assert step(2) == Wishes()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"ce": math.nan}, r"the loss is not finite at step 1 \(on rank 0; ce nan\); try a lower optimizer.lr"),
        ({"ce": math.inf}, "the loss is not finite at step 1"),
        ({"skipped": 1.0}, r"the gradient is not finite at step 1 \(ce 1\).*train.skip_nonfinite=N leaves out"),
        (
            {"pass_difference": 2 * LARGEST_PASS_DIFFERENCE},
            "at step 1 the student's two forwards, which must be the same, differ by 2.0e-02",
        ),
        ({"failures": ("no memory",)}, "step 1: rank 0: no memory"),
        (
            {"unreadable": ("image 3 (a.png)", "image 4 (b.png)")},
            r"step 1: rank 0: image 3 \(a.png\) \(and 1 more in that step\); data.on_error=skip replaces such images",
        ),
    ],
)
def test_training_that_cannot_continue_ends_with_the_reason(read, numbers, said):
    step, lines, _ = read(recipe())
    with pytest.raises(TrainingError, match=said):
        step(0, **numbers)
    assert lines == []


def test_images_that_cannot_be_read_are_replaced_and_counted_where_the_recipe_allows_it(read, capsys):
    step, lines, state = read(recipe(data={"on_error": "skip"}))
    step(0, unreadable=("image 3 (a.png)",))
    step(1, unreadable=("image 4 (b.png)", "image 5 (c.png)"))
    step(2)
    step(3)
    assert [line.get("replaced_images") for line in lines] == [1, 2]
    assert state.replaced_images == 3
    assert "warning: step 2: rank 0: image 5 (c.png); another image was taken" in capsys.readouterr().out


def test_updates_are_left_out_as_often_in_a_row_as_the_recipe_allows(read, capsys):
    step, lines, _ = read(recipe(train={"skip_nonfinite": 2}))
    step(0, ce=math.nan, skipped=1.0)
    step(1, skipped=1.0)
    step(2)  # the count begins again
    step(3, ce=math.inf, skipped=1.0)
    step(4, skipped=1.0)
    assert [line["skipped"] for line in lines if "skipped" in line] == ["loss", "gradient", "loss", "gradient"]
    assert "its update is left out, 2 of at most 2 in a row" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step 6 .*, 3 steps in a row"):
        step(5, skipped=1.0)


def test_an_update_of_a_loss_that_is_not_finite_must_have_been_left_out(read):
    step, _, _ = read(recipe(train={"skip_nonfinite": 2}))
    with pytest.raises(TrainingError, match="and its update was not left out"):
        step(0, ce=math.nan)


def test_updates_that_a_gradient_scaler_leaves_out_are_no_error(read):
    step, lines, _ = read(recipe(), overflows_by_design=True)
    step(0, skipped=1.0)
    assert [line["step"] for line in lines] == [1]
