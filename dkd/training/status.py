"""What a run directory says of its run, to people and to batch scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dkd.checkpoints import CheckpointFolder
from dkd.training.run_directory import FINISHED, PREEMPTED, STOPPED, is_run, read_line


def describe(run_dir: Path) -> list[str]:
    """What has become of the run in `run_dir`, its newest checkpoint and its last numbers. From files alone."""
    if not is_run(run_dir):
        return [f"{run_dir}: no run has been started here"]
    lines = [f"{run_dir}: {_state(run_dir)}"]
    steps = CheckpointFolder(run_dir / "checkpoints").steps()
    lines.append(f"checkpoints  {', '.join(f'step {step}' for step in steps) or 'none yet'}")
    logged, evaluation = _last_lines(run_dir / "metrics.jsonl")
    if logged:
        terms = " ".join(f"{key} {logged[key]:.4g}" for key in ("loss", *_terms(logged)) if isinstance(logged.get(key), float))
        lines.append(f"last logged  step {logged['step']}, epoch {logged.get('epoch')}: {terms}")
    if evaluation:
        lines.append(f"evaluation   after step {evaluation['steps']}: top-1 {evaluation['top1']:.4f}")
    return lines


def _terms(logged: dict[str, Any]) -> list[str]:
    return [key.removeprefix("weight/") for key in logged if key.startswith("weight/")]


def _state(run_dir: Path) -> str:
    for name, said in (
        (FINISHED, "finished"),
        (PREEMPTED, "preempted; the same command goes on"),
        (STOPPED, "stopped by hand; the same command goes on"),
    ):
        if (run_dir / name).exists():
            facts = read_line((run_dir / name).read_text(errors="replace"))
            by = f" by {facts['by']} after step {facts.get('step')} of {facts.get('steps')}" if "by" in facts else ""
            return f"{said.replace(';', by + ';') if by else said} ({facts.get('time', 'when is not known')}, {facts.get('host')})"
    return "running, or it was interrupted; the same command goes on"


def _last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    logged: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        values = read_line(line)
        if isinstance(values.get("step"), int) and "loss" in values:
            logged = values
        found = values.get("evaluation")
        if isinstance(found, dict) and {"steps", "top1"} <= set(found):
            evaluation = found
    return logged, evaluation
