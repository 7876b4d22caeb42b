"""How a training begins in its run directory: at its first step, or behind the newest whole checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dkd.checkpoints import CheckpointError, SavedTensor
from dkd.config import Recipe, RecipeError
from dkd.training.checkpointing import Checkpointer, newest_whole, read_facts
from dkd.training.ema import WeightAverage
from dkd.training.main_process import on_main_process
from dkd.training.optimizers import state_keys
from dkd.training.run_directory import Existing, RunDirectory, is_run
from dkd.training.training_state import differences, optimizer_keys


@dataclass(frozen=True)
class Beginning:
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
    existing: Existing,
    checkpointer: Checkpointer,
    model: nn.Module,
    average: WeightAverage | None,
    run: Mapping[str, Any],
    world_size: int,
    total_steps: int,
) -> Beginning:
    """Claim the run directory, load the newest whole checkpoint in it, if there is one, and write what describes this start. A collective:
    the main process decides, all follow.

    Args:
        model: the student, prepared; its state is replaced, through `checkpointer`.
        run: `run_facts` of this launch.
        total_steps: of the whole run.

    Raises:
        RecipeError: on every rank: the directory cannot be used, no checkpoint in it is whole, or it is not of this student or teacher.
    """
    main = run_dir.writes
    found, reason = on_main_process(main, lambda: _found(run, run_dir, existing, total_steps))
    if found is None:
        raise RecipeError.at("run.dir", reason)
    facts, notes = found
    beginning = Beginning(notes=notes)
    if facts is not None:
        step = facts["step"]
        try:
            checkpointer.restore(step, facts["world_size"], lambda saved: _misfits(saved, recipe, model, average))
        except CheckpointError as error:
            raise RecipeError.at("run.dir", f"the checkpoint after step {step} cannot be loaded: {error}") from error
        written = f"written by {facts['world_size']} process{'es' if facts['world_size'] > 1 else ''} of {facts['engine']}"
        notes.append(f"resumed from {run_dir.checkpoints.path_of(step)}, {step} of {total_steps} steps done, {written}")
        beginning = Beginning(step, facts["seconds"], facts["replaced_images"], facts["scaler"], notes)

    def start() -> None:
        for step in run_dir.checkpoints.steps():
            if step > beginning.step:
                run_dir.checkpoints.set_aside(step)
        run_dir.start(recipe, world_size, beginning.step)
        checkpointer.evaluations = run_dir.evaluations()

    _, reason = on_main_process(main, start)
    if reason is not None:
        raise RecipeError.at("run.dir", reason)
    return beginning


def _found(run: Mapping[str, Any], run_dir: RunDirectory, existing: Existing, total_steps: int) -> tuple[dict[str, Any] | None, list[str]]:
    """On the main process: what the checkpoint to go on from says of itself, and what there is to say of others."""
    run_dir.claim(existing)
    was_run = is_run(run_dir.path)
    step, damaged = newest_whole(run_dir.checkpoints)
    notes = [f"warning: {problem}; an older checkpoint is taken" for problem in damaged]
    if step is None:
        return None, ["the run in run.dir has no checkpoint yet: it starts again from its first step"] if was_run else []
    facts = read_facts(run_dir.checkpoints, step)
    _check_same_run(facts, run)
    if step > total_steps:
        raise CheckpointError(f"the run has done {step} steps already, more than the {total_steps} that the recipe asks for")
    return facts, notes


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    another = "choose another run.dir, or give --overwrite"
    if before["teacher"] and now["teacher"] and before["teacher"]["fingerprint"] != now["teacher"]["fingerprint"]:
        raise CheckpointError(
            f"the run was taught by {before['teacher']['name']} with weights {before['teacher']['fingerprint'][:12]}, the teacher now has "
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
            f"{before['data']['sha256'][:12]} before, {now['data']['images']} with {now['data']['sha256'][:12]} now; {another}"
        )


def _misfits(saved: Mapping[str, SavedTensor], recipe: Recipe, model: nn.Module, average: WeightAverage | None) -> list[str]:
    """Why a checkpoint's tensors cannot be those of this student and optimizer."""
    kept, needed = optimizer_keys(saved), state_keys(recipe.optimizer)
    found = differences(saved, model, average)
    if kept and kept != needed:  # nothing is kept before a first update, which a gradient scaler may put off
        names = [", ".join(keys) or "nothing" for keys in (kept, needed)]
        found.append(f"the optimizer's state in it is {names[0]}; {recipe.optimizer.name} of this recipe keeps {names[1]}")
    return found
