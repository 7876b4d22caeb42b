"""Define the errors of dkd: one base, and two families below the base.

DkdError
    InputError    what a person gave is missing, cannot be read or does not fit: a recipe, file, name, argument or
                  environment variable. The command line prints the error as one line and stops with exit code 2.
    RunError      a run that has started cannot continue, or was asked to stop.

Every other exception is a bug of dkd, and shows its traceback.
"""

from __future__ import annotations


class DkdError(Exception):
    """Be the base of all errors that dkd raises on purpose."""


class InputError(DkdError, ValueError):
    """Something that was given to dkd is missing, cannot be read, or does not fit. The message states what was given,
    and what was expected."""


class RunError(DkdError, RuntimeError):
    """A run cannot continue."""


class TrainingError(RunError):
    """Training cannot continue. Raised on every rank, at the same step."""


class LostRankError(RunError):
    """A collective failed, because another rank is gone or never joined. The message names that rank."""


class OutOfMemoryError(RunError):
    """The memory of this rank's GPU is full. Raised on this rank alone; the other ranks raise LostRankError."""


class Stopped(RunError):
    """The run was asked to stop, and stopped after a checkpoint. Raised on every rank, at the same step.

    Args:
        step: steps done.
        by: what asked: a signal's name, or the name of the stop file.
    """

    def __init__(self, step: int, by: str) -> None:
        self.step, self.by = step, by
        super().__init__(f"stopped after step {step} by {by}; the same command resumes it")
