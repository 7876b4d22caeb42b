"""Everything that can be checked before a process group opens or a step is taken."""

from __future__ import annotations

from dkd.build.optimizers import optimizer_problems
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import micro_batch
from dkd.launch import Launch
from dkd.preflight.collecting import collect
from dkd.preflight.data import image_pipeline, place_problems
from dkd.preflight.launch import launch_problems
from dkd.preflight.models import problems_at_sizes
from dkd.preflight.relations import memory_problems
from dkd.preflight.teacher_cache import cache_problems
from dkd.runs.directory import check_run_directory
from dkd.runs.launches import IfRunExists


def check(
    recipe: Recipe, launch: Launch, if_run_exists: IfRunExists | None = "resume", allow_recipe_change: bool = False
) -> list[Problem]:
    """Check that files are there, models can be built, taps and pairs fit, and launch and recipe agree. On meta
    tensors: seconds, no memory.

    Args:
        recipe: completed by `dkd.preflight.completion`.
        if_run_exists: what is to become of a run that is in `run.dir` already. None: `run.dir` is not used.
        allow_recipe_change: whether that run may be resumed with another recipe.

    Returns:
        How the recipe differs from that of the run that is to be resumed.

    Raises:
        RecipeError: with every problem found.
    """
    problems = launch_problems(recipe, launch)
    changes: list[Problem] = []
    if if_run_exists is not None:
        with collect(problems):
            changes = check_run_directory(recipe, launch, if_run_exists, allow_recipe_change)
    problems += place_problems(recipe)
    problems += _tracker_problems(recipe)
    problems += optimizer_problems(recipe.optimizer)
    pipeline = image_pipeline(recipe, problems)
    if pipeline is not None:
        problems += problems_at_sizes(recipe, pipeline.sizes, micro_batch(recipe, launch.world_size))
        if not problems:
            problems += cache_problems(recipe)
            problems += memory_problems(recipe, launch.world_size, launch.local_world_size, pipeline.train_size)
    if problems:
        raise RecipeError(problems)
    return changes


def _tracker_problems(recipe: Recipe) -> list[Problem]:
    from dkd.engines.trackers import missing_tracker  # imports Accelerate, which takes a second

    return [Problem("run.trackers", reason) for tracker in recipe.run.trackers if (reason := missing_tracker(tracker))]
