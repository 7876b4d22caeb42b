"""What happens after which step of a run: decided from numbers that are equal on all ranks, so that all decide
alike."""

from __future__ import annotations

from dataclasses import dataclass

from dkd.checkpoints.schedule import CheckpointSchedule
from dkd.config import Recipe
from dkd.config.derived import run_length


@dataclass(frozen=True)
class Wishes:
    """What some rank wishes for, as all ranks know it from the means of a step."""

    minutes_over: bool = False
    """The main process's clock asks for a checkpoint."""
    stop: bool = False
    """A rank was asked to stop."""


@dataclass(frozen=True)
class Decision:
    """What happens after a step, the same on every rank."""

    save: bool = False
    """A checkpoint is written."""
    evaluate: bool = False
    """The student is evaluated."""
    stop: bool = False
    """The run stops after the checkpoint."""

    @property
    def interrupts(self) -> bool:
        """Return whether the next step has to wait for anything."""
        return self.save or self.evaluate or self.stop


class RunSchedule:
    """Knows how long a run is, and after which of its steps it is logged, saved and evaluated.

    Args:
        recipe: of the run.
        steps_per_epoch: optimizer steps of one epoch.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        # Learning rate and loss weights are drawn over the steps of all epochs.
        self.planned_steps, self.total_steps = run_length(recipe, steps_per_epoch)
        self._evaluates_every, self._log_every = recipe.evaluation.every_epochs, recipe.run.log_every
        self._has_validation = recipe.data.validation is not None
        self._knn = recipe.evaluation.knn
        self._agreement = recipe.evaluation.agreement
        stop_when = recipe.train.stop_when
        # Where nothing else can be measured, or something is decided by it.
        needed = not recipe.data.labels or (stop_when is not None and stop_when.metric == "agreement")
        if needed and self._agreement == "auto":
            self._agreement = True
        self._checkpoints = CheckpointSchedule(recipe.checkpoint, steps_per_epoch, self.total_steps)

    def decide(self, steps_done: int, wishes: Wishes) -> Decision:
        """Return what happens after a step, given what ranks wished for one step before."""
        stop = wishes.stop and steps_done < self.total_steps
        save = self._checkpoints.due(steps_done, wishes.minutes_over) or stop
        return Decision(save, self.evaluates(steps_done) and not stop, stop)

    def evaluates(self, steps_done: int) -> bool:
        """Return whether an evaluation is due after so many steps; never without validation images."""
        if not self._has_validation:
            return False
        epoch, rest = divmod(steps_done, self.steps_per_epoch)
        return steps_done == self.total_steps or (rest == 0 and epoch % self._evaluates_every == 0)

    def measures_agreement(self, steps_done: int, may_end: bool = False) -> bool:
        """Return whether the evaluation after so many steps compares the student with its teacher: each one, none, or
        by default the run's last, or each one where nothing else can be measured.

        Args:
            may_end: whether the run may end early by this evaluation.
        """
        return (steps_done == self.total_steps or may_end) if self._agreement == "auto" else self._agreement

    @property
    def may_leave_out_agreement(self) -> bool:
        """Return whether the agreement is measured only where it costs little: neither asked for nor needed."""
        return self._agreement == "auto"

    def measures_knn(self, steps_done: int, may_end: bool = False) -> bool:
        """Return whether the evaluation after so many steps measures the k-NN accuracy. Arguments as
        `measures_agreement`."""
        if self._knn is None:
            return False
        epoch, rest = divmod(steps_done, self.steps_per_epoch)
        due = rest == 0 and epoch % (self._knn.every_epochs or self._evaluates_every) == 0
        return due or may_end or steps_done == self.total_steps

    def logs(self, step: int) -> bool:
        """Return whether the metrics of a step, counted from 0, are logged."""
        return step % self._log_every == 0 or step + 1 == self.total_steps

    def minutes_over(self) -> bool:
        """Return whether this process's clock asks for a checkpoint."""
        return self._checkpoints.minutes_over()
