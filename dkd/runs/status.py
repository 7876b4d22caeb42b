"""What the files of a run directory report of its run, for people and for batch scripts."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from dkd import atomic_files
from dkd.checkpoints import CheckpointFolder
from dkd.config import RecipeError
from dkd.config.yaml_text import YamlTextError
from dkd.config.yaml_text import read as read_yaml
from dkd.runs.directory import FINISHED, LOG_FILE, PREEMPTED, STOPPED, is_run, read_provenance
from dkd.runs.metrics_file import Metrics, describe_accuracy, read_metrics
from dkd.runs.place import is_locked, read_owner
from dkd.runs.progress import clock

NONE, RUNNING, INTERRUPTED, UNKNOWN = "none", "running", "interrupted", "unknown"
FINISHED_STATE = "finished"
_ENDED = {FINISHED: FINISHED_STATE, PREEMPTED: "preempted", STOPPED: "stopped"}
_RESUMES = "the same command resumes it"
_RECENT = 20  # logged steps that the rate is taken from


@dataclass(frozen=True)
class RunStatus:
    """Holds what is known of one run, from its files alone; None where something is not known."""

    run: str
    """The run directory."""
    state: str
    """`none`: no run has been started there. `running`, `interrupted`, `finished`, `preempted`, `stopped`. `unknown`:
    running or interrupted on another machine, whose lock may not be visible here."""
    ended: dict[str, Any] = field(default_factory=dict)
    """What FINISHED, PREEMPTED or STOPPED holds."""
    owner: dict[str, Any] = field(default_factory=dict)
    """`host`, `process` and `started` of the training that claimed the folder last."""
    last_write: str | None = None
    """When a file of the run was last written, in UTC."""
    seconds_since_write: float | None = None
    """Seconds since then, by this machine's clock."""
    step: int | None = None
    """Optimizer steps that are known to be done."""
    total_steps: int | None = None
    """Optimizer steps of the whole run."""
    images_per_second: float | None = None
    """Images a second of all ranks, the median over the last logged steps."""
    seconds_left: float | None = None
    """Seconds of the steps that are left at that rate, without evaluations; of a running run."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps after which there is a checkpoint."""
    logged: dict[str, Any] = field(default_factory=dict)
    """`step`, `epoch`, the loss and its terms, of the last logged step."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The last evaluation."""
    damaged_lines: int = 0
    """Lines of metrics.jsonl that cannot be read."""

    def facts(self) -> dict[str, Any]:
        """Return the same facts as values that JSON can hold; a number that is not finite becomes None."""
        return {key: _finite(value) for key, value in asdict(self).items()}


def read_status(run_dir: Path) -> RunStatus:
    """Return what is known of the run in `run_dir`. No lock is taken, and no file written.

    Raises:
        RecipeError: a file of the run cannot be read.
    """
    try:
        locked, owner = is_locked(run_dir), read_owner(run_dir)
        if not is_run(run_dir):
            return RunStatus(str(run_dir), RUNNING if locked else NONE, owner=_shown(owner) if locked else {})
        ended_as, ended = _end_of(run_dir)
        steps = CheckpointFolder(run_dir / "checkpoints").steps()
    except OSError as error:
        raise RecipeError.at("", f"{str(run_dir)!r} cannot be read: {error}") from error
    metrics, reason = read_metrics(run_dir / "metrics.jsonl")
    if reason is not None:
        raise RecipeError.at("", reason)
    if locked and str(owner.get("started")) > str(ended.get("time", "")):  # a start that has not removed the marker yet
        ended_as, ended = None, {}
    state = ended_as or _state(locked, owner)
    written = _last_write(run_dir)
    step, total = _progress(run_dir, metrics, steps, ended)
    rate = _rate(metrics)
    batch = _global_batch(run_dir)
    known = state == RUNNING and None not in (step, total, rate, batch)
    return RunStatus(
        str(run_dir),
        state,
        ended,
        _shown(owner),
        None if written is None else datetime.fromtimestamp(written, timezone.utc).isoformat(timespec="seconds"),
        None if written is None else round(max(0.0, time.time() - written), 1),
        step,
        total,
        rate,
        round((total - step) * batch / rate, 1) if known else None,  # type: ignore[operator]
        steps,
        _logged(metrics),
        metrics.evaluations[-1] if metrics.evaluations else {},
        metrics.damaged,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def runs_in(folder: Path) -> list[Path]:
    """Return the run directories that lie in a folder of runs, by name; none where there is none, or the folder is a
    run itself. Raises RecipeError."""
    try:
        if is_run(folder):
            return []
        return sorted(path for path in folder.iterdir() if path.is_dir() and (is_run(path) or is_locked(path)))
    except OSError as error:
        raise RecipeError.at("", f"{str(folder)!r} cannot be read: {error}") from error


def describe(status: RunStatus) -> list[str]:
    """Return lines on what has become of a run, its progress, its newest checkpoint and its last numbers."""
    lines = [f"{status.run}: {_describe_state(status)}"]
    if status.state == NONE:
        return lines
    progress = _describe_progress(status)
    if progress:
        lines.append(f"progress     {progress}")
    lines.append(f"checkpoints  {', '.join(f'step {step}' for step in status.checkpoints) or 'none yet'}")
    if status.logged:
        terms = " ".join(f"{k} {v:.4g}" for k, v in status.logged.items() if k not in ("step", "epoch"))
        lines.append(f"last logged  step {status.logged['step']}, epoch {status.logged['epoch']}: {terms}")
    if status.evaluation:
        found = describe_accuracy(status.evaluation) or "images without labels"
        lines.append(f"evaluation   after step {status.evaluation['steps']}: {found}")
    if status.damaged_lines:
        lines.append(f"damaged      {status.damaged_lines} lines of metrics.jsonl, which do not count")
    return lines


def describe_together(statuses: Sequence[RunStatus]) -> list[str]:
    """Return one line for each run: its folder, state, progress and last top-1, in columns."""
    rows = [
        (
            Path(status.run).name,
            status.state,
            _describe_progress(status) or "no step yet",
            describe_accuracy(status.evaluation),
        )
        for status in statuses
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]


def _state(locked: bool | None, owner: dict[str, Any]) -> str:
    """Return the state of a run that has not ended."""
    if locked:
        return RUNNING
    if owner.get("host") != platform.node():
        return UNKNOWN  # its lock may not be visible on this machine
    if locked is not None:
        return INTERRUPTED
    process = owner.get("process")
    # The file system has no locks. The process of that number may be another one by now.
    alive = isinstance(process, int) and process != os.getpid() and Path(f"/proc/{process}").exists()
    return UNKNOWN if alive else INTERRUPTED


def _end_of(run_dir: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the state that a marker reports, None without one, and what the marker holds."""
    for marker, state in _ENDED.items():
        if (run_dir / marker).exists():
            facts, _ = atomic_files.read_json(run_dir / marker)  # that the file exists is what counts
            return state, facts if isinstance(facts, dict) else {}
    return None, {}


def _shown(owner: dict[str, Any]) -> dict[str, Any]:
    return {key: owner[key] for key in ("host", "process", "started") if key in owner}


def _last_write(run_dir: Path) -> float | None:
    """Return when a file of the run was last written, in seconds since 1970."""
    times = []
    for name in ("metrics.jsonl", LOG_FILE, "provenance.json", "checkpoints", "student.safetensors"):
        with suppress(OSError):
            times.append((run_dir / name).stat().st_mtime)
    return max(times, default=None)


def _progress(
    run_dir: Path, metrics: Metrics, checkpoints: Sequence[int], ended: dict[str, Any]
) -> tuple[int | None, int | None]:
    """Return the steps that are known to be done, and those of the whole run."""
    done = [*checkpoints[-1:], *(line["step"] for line in metrics.steps[-1:])]
    done += [line["steps"] for line in metrics.evaluations[-1:]]
    done += [step for step in [ended.get("step", ended.get("steps"))] if isinstance(step, int)]
    starts, _ = read_provenance(run_dir)
    total = starts[-1].get("total_steps") if starts else None
    return max(done, default=0), total if isinstance(total, int) and total > 0 else None


def _rate(metrics: Metrics) -> float | None:
    speeds = [line["images_per_second"] for line in metrics.steps[-_RECENT:] if line.get("images_per_second")]
    return float(median(speeds)) if speeds else None


def _global_batch(run_dir: Path) -> int | None:
    """Return B as recipe.yaml has it. The recipe is not checked: it may be of another version of dkd."""
    content, _ = atomic_files.read_bytes(run_dir / "recipe.yaml")
    try:
        batch = read_yaml(content.decode(errors="replace"))["train"]["global_batch"]
    except (YamlTextError, LookupError, TypeError):
        return None
    return batch if isinstance(batch, int) else None


def _logged(metrics: Metrics) -> dict[str, Any]:
    if not metrics.steps:
        return {}
    line = metrics.steps[-1]
    terms = [key.removeprefix("weight/") for key in line if key.startswith("weight/")]
    return {"step": line["step"], "epoch": line.get("epoch")} | {k: line[k] for k in ("loss", *terms) if k in line}


def _describe_state(status: RunStatus) -> str:
    """Return the state as a clause, with who and when."""
    facts, owner = status.ended, status.owner
    if status.state == NONE:
        return "no run has been started here"
    host, since = owner.get("host"), owner.get("started")
    if status.state == RUNNING:
        return f"running (process {owner.get('process')} on {host}, since {since})"
    written = _describe_write(status)
    if status.state == INTERRUPTED:
        return f"interrupted{written}; {_RESUMES}"
    if status.state == UNKNOWN:
        return (
            f"running on {host}, or interrupted: no lock of it is visible on this machine{written}; if it was "
            f"interrupted, {_RESUMES}"
        )
    by = f" by {facts['by']} after step {facts.get('step')} of {facts.get('steps')}" if "by" in facts else ""
    when = f" ({facts.get('time', 'when is not known')}, {facts.get('host')})"
    described = {"preempted": "preempted", "stopped": "stopped by hand"}.get(status.state)
    if "stopped_early" in facts:
        by = f" early after step {facts.get('steps')}: {facts['stopped_early']}"
    return f"finished{by}{when}" if described is None else f"{described}{by}; {_RESUMES}{when}"


def _describe_write(status: RunStatus) -> str:
    if status.last_write is None or status.seconds_since_write is None:
        return ""
    return f", last written {clock(status.seconds_since_write)} ago ({status.last_write})"


def _describe_progress(status: RunStatus) -> str:
    """Return step, percent, rate and time left as far as they are known; empty where nothing is."""
    if status.step is None:
        return ""
    parts = [f"step {status.step}"]
    if status.total_steps:
        parts = [f"step {status.step} of {status.total_steps} ({100 * status.step / status.total_steps:.0f} %)"]
    if status.state == RUNNING and status.images_per_second is not None:
        parts.append(f"{status.images_per_second:,.0f} images/s")
        if status.seconds_left is not None:
            parts.append(f"{clock(status.seconds_left)} left, without evaluations")
    return ", ".join(parts)
