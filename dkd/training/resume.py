"""How a training begins in its run directory: at its first step, or after the newest intact checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dkd.atomic_files import LOOK_AGAIN_SECONDS, look_again
from dkd.build.optimizers import state_keys
from dkd.checkpoints import CheckpointError, SavedTensor
from dkd.checkpoints.checkpointer import Checkpointer, newest_intact, raise_together
from dkd.checkpoints.facts import read_facts
from dkd.config import Recipe, RecipeError
from dkd.distributed.main_process import run_on_main
from dkd.engines.ema import WeightAverage
from dkd.engines.loss_state import loss_differences
from dkd.engines.state import differences, optimizer_keys
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch, Start
from dkd.runs import launches
from dkd.runs.directory import RunDirectory, is_run
from dkd.runs.launches import IfRunExists


@dataclass(frozen=True)
class ResumePoint:
    """Where a training begins, and what is to be reported of it."""

    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """Seconds that these steps took."""
    replaced_images: int = 0
    """Images that could not be read."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler."""
    stopping: dict[str, Any] | None = None
    """State of early stopping."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Resuming:
    """What is asked of a start in a run directory.

    Args:
        run_dir: not claimed yet.
        if_run_exists: what is to become of a run that is there; a restart of a launch that has begun there resumes,
            whatever this is.
        allow_recipe_change: whether that run may be resumed with another recipe.
        facts: `run_facts` of this launch.
        total_steps: of the whole run.
    """

    recipe: Recipe
    launch: Launch
    run_dir: RunDirectory
    if_run_exists: IfRunExists
    allow_recipe_change: bool
    facts: Mapping[str, Any]
    total_steps: int


@dataclass(frozen=True)
class Restored:
    """Holds what a checkpoint's tensors have to be those of.

    Args:
        model: the student, prepared; its state is replaced, through the checkpointer.
        average: the moving average of its weights, or None.
        losses: what losses keep, as `Objective.state`.
    """

    model: nn.Module
    average: WeightAverage | None
    losses: Mapping[str, torch.Tensor]


def resume_or_start(asked: Resuming, checkpointer: Checkpointer, restored: Restored) -> ResumePoint:
    """Claim the run directory, load the newest intact checkpoint in it, if there is one, and write what describes this
    start.
    A collective: the main process decides, all follow.

    Args:
        restored: what the checkpoint's tensors replace.

    Raises:
        RecipeError: on every rank: the directory cannot be used, a rank does not see it, no checkpoint in it is intact,
            or it is not of this recipe, student or teacher.
    """
    run_dir, main = asked.run_dir, asked.launch.is_main
    with ExitStack() as on_failure:
        on_failure.callback(run_dir.close)
        start = launches.together(all_gather_objects(asked.launch.start))
        claimed, reason = run_on_main(main, lambda: (run_dir.place.claim(), run_dir.place.token))
        if claimed is None:
            raise RecipeError.at("run.dir", reason)
        warnings, token = claimed
        # Before anything is removed there.
        _check_all_see(run_dir, token)
        found, reason = run_on_main(main, lambda: _find(asked, start))
        if found is None:
            raise RecipeError.at("run.dir", reason)
        if asked.if_run_exists != "resume":
            launches.has_begun_here(run_dir.path)
        facts, notes = found
        point = ResumePoint(notes=[*(f"warning: {warning}" for warning in warnings), *notes])
        if facts is not None:
            point = _load(asked, facts, point.notes, checkpointer, restored)

        def write() -> list[str]:
            for step in run_dir.checkpoints.steps():
                if step > point.step:
                    run_dir.checkpoints.set_aside(step)
            warnings = run_dir.start(asked.recipe, asked.launch.world_size, point.step, asked.total_steps)
            checkpointer.evaluations = run_dir.evaluations()
            return warnings

        warned, reason = run_on_main(main, write)
        if warned is None:
            raise RecipeError.at("run.dir", reason)
        point.notes.extend(warned)
        on_failure.pop_all()
        return point


def _load(
    asked: Resuming,
    facts: Mapping[str, Any],
    notes: list[str],
    checkpointer: Checkpointer,
    restored: Restored,
) -> ResumePoint:
    """Load a checkpoint, on all ranks. Raises RecipeError on every rank."""
    step, ranks = facts["step"], facts["world_size"]
    try:
        checkpointer.restore(step, ranks, lambda saved: _list_misfits(saved, asked.recipe, restored))
    except CheckpointError as error:
        raise RecipeError.at("run.dir", f"the checkpoint after step {step} cannot be loaded: {error}") from error
    written = f"written by {ranks} process{'es' if ranks > 1 else ''} of {facts['engine']}"
    path = asked.run_dir.checkpoints.path_of(step)
    notes.append(f"resumed from {path}, {step} of {asked.total_steps} steps done, {written}")
    return ResumePoint(step, facts["seconds"], facts["replaced_images"], facts["scaler"], facts.get("stopping"), notes)


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
            f"(after {seconds:g} s); run.dir must be on a file system that all ranks share",
        ) from error


def _find(asked: Resuming, start: Start) -> tuple[dict[str, Any] | None, list[str]]:
    """Return, on the main process, what the checkpoint to resume from states of itself, and what is to be reported of
    others."""
    run_dir, total_steps = asked.run_dir, asked.total_steps
    notes = run_dir.take_over(asked.recipe, asked.if_run_exists, start, asked.allow_recipe_change)
    was_run = is_run(run_dir.path)
    step, damaged = newest_intact(run_dir.checkpoints)
    notes += [f"warning: {problem}; an older checkpoint is taken" for problem in damaged]
    if step is None:
        if was_run:
            notes.append("the run in run.dir has no checkpoint yet: it starts again from its first step")
        return None, notes
    facts = read_facts(run_dir.checkpoints, step)
    _check_same_run(facts, asked.facts)
    if step > total_steps:
        raise CheckpointError(
            f"the run has done {step} steps already, more than the {total_steps} that the recipe asks for"
        )
    # A run that has stopped early stays so: the evaluation that ended it is not weighed again.
    ended = run_dir.stopped_early(step)
    return (facts if ended is None else {**facts, "stopping": ended}), notes


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    another = "choose another run.dir, or give --overwrite"
    if before["teacher"] and now["teacher"] and before["teacher"]["fingerprint"] != now["teacher"]["fingerprint"]:
        raise CheckpointError(
            f"the run was taught by {before['teacher']['name']} with weights {before['teacher']['fingerprint'][:12]}, "
            f"the teacher now has {now['teacher']['fingerprint'][:12]}; another teacher makes another run; {another}"
        )
    if before["global_batch"] != now["global_batch"]:
        raise CheckpointError(
            f"the run is {before['step']} steps of {before['global_batch']} samples long; it cannot be resumed with "
            f"train.global_batch={now['global_batch']}; {another}"
        )
    if before["data"] != now["data"]:
        raise CheckpointError(
            f"the training data are not what they were: {before['data']['images']} images with labels and places "
            f"{before['data']['sha256'][:12]} before, {now['data']['images']} with {now['data']['sha256'][:12]} now; "
            f"{another}"
        )


def _list_misfits(saved: Mapping[str, SavedTensor], recipe: Recipe, restored: Restored) -> list[str]:
    """Return why a checkpoint's tensors cannot be those of this student and optimizer."""
    kept, needed = optimizer_keys(saved), state_keys(recipe.optimizer)
    found = [*differences(saved, restored.model, restored.average), *loss_differences(saved, restored.losses)]
    if kept and kept != needed:  # nothing is kept before a first update, which a gradient scaler may put off
        names = [", ".join(keys) or "nothing" for keys in (kept, needed)]
        found.append(
            f"the optimizer's state in it is {names[0]}; {recipe.optimizer.name} of this recipe keeps {names[1]}"
        )
    return found
