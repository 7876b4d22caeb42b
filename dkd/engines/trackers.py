"""Trackers such as TensorBoard, through Accelerate.

What a tracker writes on this machine lies in the run directory, in a folder that has the tracker's name:

    tensorboard, aim    are given their folder by Accelerate
    wandb               makes `wandb` in the folder that it is given
    dvclive, swanlab    take the folder as an argument
    mlflow              a database in the folder, unless the user has named a server or another place

comet_ml and clearml send to a server, and trackio keeps a database of all its projects in the user's home: they write
nothing into the current folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
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


def log_with(names: Sequence[str], run_name: str, run_dir: Path) -> list[Any]:
    """Return what an Accelerator is to log with: names, and aim as an object, since Accelerate has one logging folder
    for all trackers, which is TensorBoard's."""
    return [LOGGER_TYPE_TO_CLASS[name](run_name, str(run_dir / name)) if name == "aim" else name for name in names]


def tracker_arguments(
    names: Sequence[str], run_dir: Path, identity: str, again: bool, first_step: int
) -> dict[str, dict[str, Any]]:
    """Return the arguments that trackers are started with: that their files lie in the run directory, and that a
    resumed run continues in them where they allow it.

    Args:
        names: of the trackers, which are installed.
        run_dir: an absolute path.
        identity, again, first_step: as `Trackers.start`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        own = run_dir / name
        if name == "tensorboard" and again:
            found[name] = {"purge_step": first_step + 1}
        elif name == "wandb":
            found[name] = {"id": identity, "resume": "allow", "dir": str(run_dir)}
        elif name == "dvclive":
            found[name] = {"dir": str(own), "dvcyaml": str(own / "dvc.yaml"), "resume": again}
        elif name == "swanlab":
            # Earlier releases call it logdir.
            accepted = inspect.signature(import_module(name).init).parameters
            found[name] = {"log_dir" if "log_dir" in accepted else "logdir": str(own)}
        elif name == "mlflow" and not import_module(name).is_tracking_uri_set():
            found[name] = {"logging_dir": (own / "artifacts").as_uri()}
    return found


def _name_database(run_dir: Path) -> None:
    """Let mlflow keep its records in the run directory. Its store of plain files is refused by newer releases."""
    (run_dir / "mlflow").mkdir(exist_ok=True)
    import_module("mlflow").set_tracking_uri(f"sqlite:///{run_dir / 'mlflow' / 'mlflow.db'}")


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
        settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(recipe.model_dump()).items()
        }
        own = None
        try:
            run_dir = Path(recipe.run.dir).absolute()
            kwargs = tracker_arguments(recipe.run.trackers, run_dir, identity, again, first_step)
            if "mlflow" in kwargs and self._accelerator.is_main_process:
                _name_database(run_dir)
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
