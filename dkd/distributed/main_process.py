"""What the main process alone does, and every rank learns of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dkd.checkpoints import CheckpointError
from dkd.config import RecipeError
from dkd.global_batch.collectives import all_gather_objects

T = TypeVar("T")


def run_on_main(main: bool, action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run `action` on the main process while the others wait. A collective.

    Returns:
        On every rank: what `action` returned (something small that can be pickled) and None; or None and the reason why
            it
        failed. Exceptions are returned as a message: raised on the main process alone, they would leave the other ranks
        hanging.

    Raises:
        RecipeError: on every rank, when `action` raised one.
    """
    result, reason, problems = None, None, None
    if main:
        try:
            result = action()
        except (OSError, CheckpointError) as error:
            reason = str(error)
        except RecipeError as error:
            problems = error.problems
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    result, reason, problems = all_gather_objects((result, reason, problems))[0]
    if problems is not None:
        raise RecipeError(problems)
    return result, reason
