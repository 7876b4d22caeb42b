"""How a training ends before its last step. Each of these is raised where all ranks are together, or tells what made one rank leave."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on. Raised on every rank, at the same step."""


class LostRankError(RuntimeError):
    """A collective failed: another rank is gone, or did not come. Says which."""


class Stopped(Exception):
    """The run was asked to stop, and did, behind a checkpoint. Raised on every rank, at the same step.

    Args:
        step: steps done.
        by: what asked.
    """

    def __init__(self, step: int, by: str) -> None:
        self.step, self.by = step, by
        super().__init__(f"stopped after step {step} by {by}; the same command goes on")
