"""Decide after which steps a checkpoint is due."""

from __future__ import annotations

import time

from dkd.config.schema import CheckpointSection


class CheckpointSchedule:
    """Decide after which steps a checkpoint is due. The decision is the same on every rank.

    Args:
        section: the recipe's section.
        steps_per_epoch, total_steps: steps of an epoch and of the whole run. A checkpoint is always due after the last
            step.
    """

    def __init__(self, section: CheckpointSection, steps_per_epoch: int, total_steps: int) -> None:
        self._section, self._steps_per_epoch, self._total_steps = section, steps_per_epoch, total_steps
        self._last = time.monotonic()

    def due(self, step: int, minutes_are_over: bool) -> bool:
        """Return whether a checkpoint is due after `step` steps.

        Args:
            minutes_are_over: the value of `minutes_over` on the main process, which all ranks must be given.
        """
        section = self._section
        epoch, rest = divmod(step, self._steps_per_epoch)
        due = (
            step == self._total_steps
            or minutes_are_over
            or (section.every_epochs is not None and rest == 0 and epoch % section.every_epochs == 0)
            or (section.every_steps is not None and step % section.every_steps == 0)
        )
        if due:
            self._last = time.monotonic()
        return due

    def minutes_over(self) -> bool:
        """Return whether a checkpoint is due by this process's clock."""
        every = self._section.every_minutes
        return every is not None and time.monotonic() - self._last >= 60 * every
