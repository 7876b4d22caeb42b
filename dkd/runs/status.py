"""What the files of a run directory report of its run, for people and for batch scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dkd import atomic_files
from dkd.checkpoints import CheckpointFolder
from dkd.config import RecipeError
from dkd.runs.directory import FINISHED, PREEMPTED, STOPPED, is_run
from dkd.runs.metrics_file import read_metrics


def describe(run_dir: Path) -> list[str]:
    """Return what has become of the run in `run_dir`, its newest checkpoint and its last numbers. From files alone.

    Raises:
        RecipeError: a file of the run cannot be read.
    """
    try:
        if not is_run(run_dir):
            return [f"{run_dir}: no run has been started here"]
        lines = [f"{run_dir}: {_state(run_dir)}"]
        steps = CheckpointFolder(run_dir / "checkpoints").steps()
    except OSError as error:
        raise RecipeError.at("", f"{str(run_dir)!r} cannot be read: {error}") from error
    lines.append(f"checkpoints  {', '.join(f'step {step}' for step in steps) or 'none yet'}")
    metrics, reason = read_metrics(run_dir / "metrics.jsonl")
    if reason is not None:
        raise RecipeError.at("", reason)
    if metrics.steps:
        logged = metrics.steps[-1]
        terms = " ".join(f"{key} {logged[key]:.4g}" for key in ("loss", *_terms(logged)) if key in logged)
        lines.append(f"last logged  step {logged['step']}, epoch {logged.get('epoch')}: {terms}")
    if metrics.evaluations:
        evaluation = metrics.evaluations[-1]
        lines.append(f"evaluation   after step {evaluation['steps']}: top-1 {evaluation['top1']:.4f}")
    if metrics.damaged:
        lines.append(f"damaged      {metrics.damaged} lines of metrics.jsonl, which do not count")
    return lines


def _terms(logged: dict[str, Any]) -> list[str]:
    return [key.removeprefix("weight/") for key in logged if key.startswith("weight/")]


def _state(run_dir: Path) -> str:
    for name, state in (
        (FINISHED, "finished"),
        (PREEMPTED, "preempted; the same command resumes it"),
        (STOPPED, "stopped by hand; the same command resumes it"),
    ):
        if (run_dir / name).exists():
            facts, _ = atomic_files.read_json(run_dir / name)  # that the file exists is what counts
            facts = facts if isinstance(facts, dict) else {}
            by = f" by {facts['by']} after step {facts.get('step')} of {facts.get('steps')}" if "by" in facts else ""
            if "stopped_early" in facts:
                by = f" early after step {facts.get('steps')}: {facts['stopped_early']}"
            state, _, advice = state.partition(";")
            described = f"{state}{by}{advice and ';'}{advice}"
            return f"{described} ({facts.get('time', 'when is not known')}, {facts.get('host')})"
    return "running, or interrupted; the same command resumes it"
