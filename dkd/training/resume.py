"""How a training begins in its run directory: at its first step, or behind the newest whole checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dkd.atomic_files import LOOK_AGAIN_SECONDS, look_again
from dkd.build.optimizers import state_keys
from dkd.checkpoints import CheckpointError, SavedTensor
from dkd.checkpoints.checkpointer import Checkpointer, newest_intact, raise_together
from dkd.checkpoints.facts import read_facts
from dkd.config import Recipe, RecipeError
from dkd.distributed.main_process import run_on_main
from dkd.engines.ema import WeightAverage
from dkd.engines.state import differences, optimizer_keys
from dkd.global_batch.collectives import all_gather_objects
from dkd.runs import launches
from dkd.runs.directory import RunDirectory, is_run
from dkd.runs.launches import IfRunExists, Start


@dataclass(frozen=True)
class ResumePoint:
    """Where a training begins, and what there is to say of it."""

    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """That they took."""
    replaced_images: int = 0
    """That could not be read."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler."""
    notes: list[str] = field(default_factory=list)


def begin(
    recipe: Recipe,
    run_dir: RunDirectory,
    existing: IfRunExists,
    allow_recipe_change: bool,
    checkpointer: Checkpointer,
    model: nn.Module,
    average: WeightAverage | None,
    run: Mapping[str, Any],
    world_size: int,
    total_steps: int,
) -> ResumePoint:
    """Claim the run directory, load the newest whole checkpoint in it, if there is one, and write what describes this
    start. A collective: the main process decides, all follow.

    Args:
        existing: what is to become of a run that is there; a restart of a launch that has begun there resumes, whatever
            this is.
        model: the student, prepared; its state is replaced, through `checkpointer`.
        run: `run_facts` of this launch.
        total_steps: of the whole run.

    Raises:
        RecipeError: on every rank: the directory cannot be used, a rank does not see it, no checkpoint in it is whole,
            or it is not of this recipe, student or teacher.
    """
    with ExitStack() as on_failure:
        on_failure.callback(run_dir.close)
        main = run_dir.writes
        start = launches.together(all_gather_objects(launches.this_start()))
        claimed, reason = run_on_main(main, lambda: (run_dir.place.claim(), run_dir.place.token))
        if claimed is None:
            raise RecipeError.at("run.dir", reason)
        warnings, token = claimed
        # Before anything is removed there.
        _check_all_see(run_dir, token)
        found, reason = run_on_main(
            main, lambda: _found(recipe, run, run_dir, existing, start, allow_recipe_change, total_steps)
        )
        if found is None:
            raise RecipeError.at("run.dir", reason)
        if existing != "resume":
            launches.has_begun_here(run_dir.path)
        facts, notes = found
        notes = [*(f"warning: {warning}" for warning in warnings), *notes]
        beginning = ResumePoint(notes=notes)
        if facts is not None:
            step = facts["step"]
            try:
                checkpointer.restore(step, facts["world_size"], lambda saved: _misfits(saved, recipe, model, average))
            except CheckpointError as error:
                raise RecipeError.at(
                    "run.dir", f"the checkpoint after step {step} cannot be loaded: {error}"
                ) from error
            written = f"written by {facts['world_size']} process{'es' if facts['world_size'] > 1 else ''} of {facts['engine']}"
            notes.append(
                f"resumed from {run_dir.checkpoints.path_of(step)}, {step} of {total_steps} steps done, {written}"
            )
            beginning = ResumePoint(step, facts["seconds"], facts["replaced_images"], facts["scaler"], notes)

        def write() -> list[str]:
            for step in run_dir.checkpoints.steps():
                if step > beginning.step:
                    run_dir.checkpoints.set_aside(step)
            warnings = run_dir.start(recipe, world_size, beginning.step)
            checkpointer.evaluations = run_dir.evaluations()
            return warnings

        warned, reason = run_on_main(main, write)
        if warned is None:
            raise RecipeError.at("run.dir", reason)
        notes += warned
        on_failure.pop_all()
        return beginning


def _check_all_see(run_dir: RunDirectory, token: str | None) -> None:
    """Check that run.dir is the same folder on every rank. A collective. Raises RecipeError on every rank."""
    place, seconds = run_dir.place, LOOK_AGAIN_SECONDS
    unseen = None if run_dir.writes or token is None else look_again(lambda: place.unseen(token), seconds)
    ranks = all_gather_objects((unseen, platform.node()))
    try:
        raise_together(ranks)
    except CheckpointError as error:
        raise RecipeError.at(
            "run.dir",
            f"{str(run_dir.path)!r} is not on every rank the folder that rank 0 on {ranks[0][1]} has made: {error} "
            f"(after {seconds:g} s); "
            "run.dir must be on a file system that all ranks share",
        ) from error


def _found(
    recipe: Recipe,
    run: Mapping[str, Any],
    run_dir: RunDirectory,
    existing: IfRunExists,
    start: Start,
    allow_recipe_change: bool,
    total_steps: int,
) -> tuple[dict[str, Any] | None, list[str]]:
    """On the main process: what the checkpoint to go on from says of itself, and what there is to say of others."""
    notes = run_dir.take_over(recipe, existing, start, allow_recipe_change)
    was_run = is_run(run_dir.path)
    step, damaged = newest_intact(run_dir.checkpoints)
    notes += [f"warning: {problem}; an older checkpoint is taken" for problem in damaged]
    if step is None:
        return None, [
            *notes,
            *(["the run in run.dir has no checkpoint yet: it starts again from its first step"] if was_run else []),
        ]
    facts = read_facts(run_dir.checkpoints, step)
    _check_same_run(facts, run)
    if step > total_steps:
        raise CheckpointError(
            f"the run has done {step} steps already, more than the {total_steps} that the recipe asks for"
        )
    return facts, notes


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    another = "choose another run.dir, or give --overwrite"
    if before["teacher"] and now["teacher"] and before["teacher"]["fingerprint"] != now["teacher"]["fingerprint"]:
        raise CheckpointError(
            f"the run was taught by {before['teacher']['name']} with weights {before['teacher']['fingerprint'][:12]}, "
            "the teacher now has "
            f"{now['teacher']['fingerprint'][:12]}; another teacher makes another run; {another}"
        )
    if before["global_batch"] != now["global_batch"]:
        raise CheckpointError(
            f"the run is {before['step']} steps of {before['global_batch']} samples long; it cannot go on with "
            f"train.global_batch={now['global_batch']}; {another}"
        )
    if before["data"] != now["data"]:
        raise CheckpointError(
            f"the training data are not what they were: {before['data']['images']} images with labels and places "
            f"{before['data']['sha256'][:12]} before, {now['data']['images']} with {now['data']['sha256'][:12]} now; "
            f"{another}"
        )


def _misfits(
    saved: Mapping[str, SavedTensor], recipe: Recipe, model: nn.Module, average: WeightAverage | None
) -> list[str]:
    """Why a checkpoint's tensors cannot be those of this student and optimizer."""
    kept, needed = optimizer_keys(saved), state_keys(recipe.optimizer)
    found = differences(saved, model, average)
    if kept and kept != needed:  # nothing is kept before a first update, which a gradient scaler may put off
        names = [", ".join(keys) or "nothing" for keys in (kept, needed)]
        found.append(
            f"the optimizer's state in it is {names[0]}; {recipe.optimizer.name} of this recipe keeps {names[1]}"
        )
    return found
