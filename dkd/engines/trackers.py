"""Trackers such as TensorBoard, through Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dkd.config import Recipe, RecipeError
from dkd.config.changes import flat
from dkd.global_batch.collectives import all_gather_objects
from dkd.user_code import describe_error


def missing_tracker(name: str) -> str | None:
    """Return why a tracker cannot be used: Accelerate does not know it, or it is not installed. None: it can."""
    if name not in LOGGER_TYPE_TO_CLASS:
        return f"{name!r} is not a tracker of Accelerate: {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}"
    if name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        return f"{name!r} is not installed: pip install {name}"
    return None


class Trackers:
    """The recipe's trackers. All ranks hold one; the main process's writes. A tracker runs code of its own: a disk, a
    server or a connection that fails after days ends no training."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def start(self, recipe: Recipe, identity: str, again: bool, first_step: int) -> None:
        """Start them under the run's name; a resumed run continues in them where they allow it. A collective.

        Args:
            identity: of the run, the same at each start.
            again: this is not the first start.
            first_step: steps done by earlier starts; what TensorBoard has of later ones is superseded.

        Raises:
            RecipeError: on every rank: a tracker does not start, such as one whose server cannot be reached.
        """
        if not recipe.run.trackers:
            return
        more = {
            "tensorboard": {"purge_step": first_step + 1} if again else {},
            "wandb": {"id": identity, "resume": "allow"},
        }
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(recipe.model_dump()).items()
        }
        kwargs = {name: values for name, values in more.items() if name in recipe.run.trackers}
        own = None
        try:
            self._accelerator.init_trackers(recipe.run.name, config=settings, init_kwargs=kwargs)
        except Exception as error:  # a tracker's own code, which runs on the main process alone
            own = describe_error(error)
        for reason in all_gather_objects(own):
            if reason is not None:
                raise RecipeError.at(
                    "run.trackers",
                    f"{', '.join(recipe.run.trackers)} cannot start: {reason}; leave it out, or mend it",
                )

    def log(self, values: Mapping[str, Any], step: int) -> str | None:
        """Write values of a step. Returns why the trackers cannot be written; they get nothing more then."""
        try:
            self._accelerator.log(dict(values), step=step)
        except Exception as error:
            self._accelerator.trackers = []
            return f"trackers cannot write ({describe_error(error)}); they get nothing more"
        return None

    def finish(self) -> list[str]:
        """Close them. Returns what went wrong. Not accelerator.end_training(): it would also destroy a process group
        that the caller may still use."""
        problems = []
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                problems.append(f"{tracker.name} cannot write ({describe_error(error)})")
        return problems
