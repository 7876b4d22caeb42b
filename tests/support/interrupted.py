"""A training in several starts, each of which ends before a step, as a process does that is killed there."""

import json
from unittest import mock

import pytest

from dkd.config.loading import validate
from dkd.training.trainer import Trainer

TIMINGS = ("images_per_second", "data_wait", "seconds")


class Killed(Exception):
    pass


def train_in_starts(values, stops=(None,)):
    """Train a recipe, with a start for each of `stops`: the step before which it ends, or None.

    Returns:
        The logged steps without times, and the bytes of the student.
    """
    train_step = Trainer.train_step
    for until in stops:

        def step(self, until=until):
            if self.state.step == until:
                self.parts.saver.wait()
                raise Killed
            return train_step(self)

        with mock.patch.object(Trainer, "train_step", step):
            trainer = Trainer.from_recipe(validate(values))
            if until is None:
                trainer.fit()
            else:
                with pytest.raises(Killed):
                    trainer.fit()
    return outcome(trainer)


def outcome(trainer):
    """Return the logged steps of a finished run without times, and the bytes of its student."""
    folder = trainer.parts.run_dir.path
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines if "step" in line]
    return steps, (folder / "student.safetensors").read_bytes()
