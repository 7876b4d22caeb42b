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
    teacher_fingerprint: str,
    world_size: int,
    total_steps: int,
) -> Beginning:
    """Claim the run directory, load the newest whole checkpoint in it, if there is one, and write what describes this start. A collective:
    the main process decides, all follow.

    Args:
        model: the student, prepared; its state is replaced, through `checkpointer`.
        teacher_fingerprint: empty without a teacher.
        total_steps: of the whole run.

    Raises:
        RecipeError: on every rank: the directory cannot be used, no checkpoint in it is whole, or it is not of this student or teacher.
    """
    main = run_dir.writes
    found, reason = on_main_process(main, lambda: _found(recipe, run_dir, existing, teacher_fingerprint, total_steps))
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
        beginning = Beginning(step, facts["seconds"], facts["scaler"], notes)
    _, reason = on_main_process(main, lambda: run_dir.start(recipe, world_size, beginning.step))
    if reason:
        raise RecipeError.at("run.dir", reason)
    checkpointer.evaluations = run_dir.evaluations() if main else {}
    return beginning


def _found(
    recipe: Recipe, run_dir: RunDirectory, existing: Existing, teacher_fingerprint: str, total_steps: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """On the main process: what the checkpoint to go on from says of itself, and what there is to say of others."""
    run_dir.claim(existing)
    was_run = is_run(run_dir.path)
    step, damaged = newest_whole(run_dir.checkpoints)
    notes = [f"warning: {problem}; an older checkpoint is taken" for problem in damaged]
    if step is None:
        return None, ["the run in run.dir has no checkpoint yet: it starts again from its first step"] if was_run else []
    facts = read_facts(run_dir.checkpoints, step)
    taught = facts["teacher"]["fingerprint"] if facts["teacher"] else ""
    if taught and teacher_fingerprint and taught != teacher_fingerprint:
        raise CheckpointError(
            f"the run was taught by {facts['teacher']['name']} with weights {taught[:12]}, the teacher has {teacher_fingerprint[:12]}; "
            "another teacher makes another run; choose another run.dir, or give --overwrite"
        )
    if facts["global_batch"] != recipe.train.global_batch:
        raise CheckpointError(
            f"the run is {step} steps of {facts['global_batch']} samples long; it cannot go on with "
            f"train.global_batch={recipe.train.global_batch}"
        )
    if step > total_steps:
        raise CheckpointError(f"the run has done {step} steps already, more than the {total_steps} that the recipe asks for")
    return facts, notes


def _misfits(saved: Mapping[str, SavedTensor], recipe: Recipe, model: nn.Module, average: WeightAverage | None) -> list[str]:
    """Why a checkpoint's tensors cannot be those of this student and optimizer."""
    kept, needed = optimizer_keys(saved), state_keys(recipe.optimizer)
    found = differences(saved, model, average)
    if kept != needed:
        names = [", ".join(keys) or "nothing" for keys in (kept, needed)]
        found.append(f"the optimizer's state in it is {names[0]}; {recipe.optimizer.name} of this recipe keeps {names[1]}")
    return found
