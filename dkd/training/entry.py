"""Training and evaluation as functions, for scripts and notebooks: `dkd.train` and `dkd.evaluate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dkd import console
from dkd.config import Recipe, load_recipe
from dkd.config.loading import build_recipe
from dkd.distributed.process_group import abandon_process_group, announces_refusals, kept_timeouts
from dkd.engines.accelerated import leave_process_group
from dkd.errors import RunError, Stopped, TrainingError
from dkd.launch import Launch
from dkd.library_internals.accelerate import fresh_settings
from dkd.preflight.check import check
from dkd.preflight.completion import complete
from dkd.preflight.refusals import input_errors_as_recipe_errors, refused_on_all_ranks
from dkd.runs.launches import IfRunExists
from dkd.training.evaluate_student import StudentEvaluation, evaluate_student
from dkd.training.evaluation import Evaluation
from dkd.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """Holds what a training has left.

    Args:
        run_dir: the directory of the run; `student.safetensors` in it is the finished student.
        steps: optimizer steps that were done; fewer than the recipe's where the run stopped early.
        evaluation: of the finished student; None: the recipe has no validation images.
    """

    run_dir: Path
    steps: int
    evaluation: Evaluation | None

    @property
    def top1(self) -> float | None:
        """Return the fraction of validation samples whose first class is right; None without validation images, and
        for images without labels."""
        return None if self.evaluation is None else self.evaluation.top1

    @property
    def student(self) -> Path:
        """Return the file of the finished student, for `dkd.load_student`."""
        return self.run_dir / "student.safetensors"


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    if_run_exists: IfRunExists = "resume",
    allow_recipe_change: bool = False,
) -> TrainResult:
    """Train a recipe, and return what was measured. All ranks of a launch call it together; a process without a
    launcher trains alone. It can be called again in the same process.

    Args:
        recipe: a YAML file, a mapping with the keys of one, or a Recipe.
        overrides: `key=value` as on the command line, such as ["train.epochs=10", "optimizer.lr=0.05"]; values are
            YAML.
        if_run_exists: what to do with a run that is in `run.dir` already: `resume` it from its newest intact
            checkpoint, `refuse` to train, or `replace` it.
        allow_recipe_change: whether that run may be resumed with another recipe.

    Returns:
        The same on every rank.

    Raises:
        InputError: what was given is wrong; nothing was started.
        RunError: the run cannot continue (TrainingError, LostRankError), or was asked to stop (Stopped).
    """
    with refused_on_all_ranks():
        launch = Launch.read()
        resolved = resolve(recipe, overrides)
    for note in launch.notes:
        console.say_on_first_rank(f"dkd: {note}")
    with process_group_of_its_own():
        with announces_refusals(launch), input_errors_as_recipe_errors():
            resolved, completed = complete(resolved)
            check(resolved, launch, if_run_exists, allow_recipe_change)
            for line in completed:
                console.say_on_first_rank(line)
            trainer = Trainer.from_recipe(resolved, launch, if_run_exists, allow_recipe_change)
        result = trainer.fit()
        return TrainResult(trainer.parts.run_dir.path, trainer.state.step, result)


def evaluate(
    target: str | Path,
    overrides: Sequence[str] = (),
    *,
    trust_code: bool = False,
    teacher: bool = False,
    predictions: str | Path | None = None,
    overwrite: bool = False,
) -> StudentEvaluation:
    """Evaluate the student of a run, a checkpoint or a weights file exactly, each sample once over all ranks. All ranks
    of a launch call it together.

    Args:
        target: a run directory, RUN/checkpoints/step_N, or a .safetensors file in one of them.
        overrides: keys of the run's recipe, such as ["data.validation=other-*.parquet"].
        trust_code: allow importing the `module:callable` that the student's description or the data name.
        teacher: compare the student with the teacher of the run's recipe, too.
        predictions: a parquet file to be written with a row for each image.
        overwrite: replace that file where it exists.

    Raises:
        InputError: what is missing or does not fit.
        RunError: on every rank: the predictions cannot be written.
    """
    with refused_on_all_ranks():
        launch = Launch.read()
    with process_group_of_its_own(), announces_refusals(launch):
        evaluated = evaluate_student(
            target, overrides, trust_code, launch, teacher=teacher, predictions=predictions, overwrite=overwrite
        )
    if evaluated.predictions_problem is not None:
        raise RunError(f"{str(predictions)!r} cannot be written: {evaluated.predictions_problem}")
    return evaluated


def resolve(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that `train` was given, with its overrides. Raises RecipeError."""
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    values = recipe.model_dump(mode="json", exclude_unset=True) if isinstance(recipe, Recipe) else recipe
    return build_recipe(copy.deepcopy(dict(values)), overrides)


@contextmanager
def process_group_of_its_own() -> Iterator[None]:
    """Leave, at the end, the process group that was opened inside. One that the caller has opened stays, with the
    timeouts that its groups had; and so do Accelerate's settings, which a trainer of the caller's may use."""
    with fresh_settings():
        if dist.is_initialized():
            with kept_timeouts():
                yield
            return
        try:
            yield
        except (TrainingError, Stopped):  # raised by all ranks together, so that they can leave together
            leave_process_group()
            raise
        except BaseException:
            abandon_process_group()
            raise
        leave_process_group()
