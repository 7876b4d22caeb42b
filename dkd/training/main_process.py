"""What the main process alone does, and every rank hears of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dkd.checkpoints import CheckpointError
from dkd.config import RecipeError
from dkd.global_batch.collectives import all_gather_objects

T = TypeVar("T")


def on_main_process(main: bool, action: Callable[[], T]) -> tuple[T | None, str]:
    """Run `action` on the main process while the others wait. A collective.

    Returns:
        On every rank: what it returned (something small that can be pickled), and an empty text; or None, and why it failed: a file system
        that refuses, a checkpoint or recipe that is wrong. Other errors end the main process, and its launcher the others.
    """
    result, reason = None, ""
    if main:
        try:
            result = action()
        except (OSError, CheckpointError) as error:
            reason = str(error)
        except RecipeError as error:
            reason = "; ".join(problem.message for problem in error.problems)
    return all_gather_objects((result, reason))[0]
