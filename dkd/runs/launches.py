"""Which launches have begun in a run directory: `--overwrite` and `--fresh` hold for the first start of a launch, not
for its restarts.

A launcher with `--max_restarts` starts its ranks again with the same command line, and a batch system that requeues a
job does, too. Such a restart resumes what the first start has begun. Where the first start never got as far as
replacing the older run, the restart replaces it.

RUN/.launches holds one JSON line for each start that was to replace or begin a run, and it outlives the run that is
replaced. A start belongs to a launch that is noted there when

- one of its launchers is: a launcher of torch restarts its ranks below one folder of its own, which no other launcher
has;
- or DKD_LAUNCH_ID, which a batch system may set, is the same;
- or it is a later start of the same Slurm job. (An equal start is not enough: in an interactive job, a person may
launch several times.)
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dkd import atomic_files
from dkd.launch import Start
from dkd.runs.metrics_file import parse_line

IfRunExists = Literal["resume", "refuse", "replace"]
"""What to do with a run that is in `run.dir` already."""
LAUNCHES_FILE = ".launches"

begun_here: set[str] = set()
"""Run directories in which this process itself has begun. What this process begins there next is no restart, which is
always another process."""


def together(starts: Sequence[Start]) -> Start:
    """Return the start of all ranks, given that of each. Each machine has a launcher of its own; after a restart, some
    may be new ones."""
    launchers = dict.fromkeys(launcher for start in starts for launcher in start.launchers)
    return Start(tuple(launchers), starts[0].launch_id, starts[0].slurm_job, starts[0].slurm_start)


def in_effect(if_run_exists: IfRunExists, run_dir: Path, start: Start) -> IfRunExists:
    """Return what is to become of a run that is in `run_dir` already: for a restart of a launch that has begun there,
    `resume`."""
    if if_run_exists == "resume" or os.path.realpath(run_dir) in begun_here:
        return if_run_exists
    return "resume" if any(start.belongs_to(noted) for noted in _noted(run_dir)) else if_run_exists


def note(run_dir: Path, start: Start) -> None:
    """Write down, on the disk, that `start` has begun in `run_dir`. Raises OSError."""
    line = {**asdict(start), "time": time.time(), "host": platform.node()}
    with atomic_files.open_to_append(run_dir / LAUNCHES_FILE) as file:
        file.write(b"\n" + json.dumps(line).encode() + b"\n")  # a killed process may have left half a line before it
        os.fsync(file.fileno())
    atomic_files.sync_folder(run_dir)


def has_begun_here(run_dir: Path) -> None:
    """Remember that this process has begun in `run_dir`."""
    begun_here.add(os.path.realpath(run_dir))


def _noted(run_dir: Path) -> list[Start]:
    content, _ = atomic_files.read_bytes(run_dir / LAUNCHES_FILE)  # none: no launch has asked for more than to resume
    return [start for line in content.splitlines() if (start := _start_of(parse_line(line))) is not None]


def _start_of(values: dict[str, Any]) -> Start | None:
    launchers, start = values.get("launchers"), values.get("slurm_start")
    launch_id, job = values.get("launch_id"), values.get("slurm_job")
    if (
        not isinstance(launchers, list)
        or not all(isinstance(name, str) for name in launchers)
        or not isinstance(start, int)
    ):
        return None  # a process was killed while it wrote the line
    if not isinstance(launch_id, str | None) or not isinstance(job, str | None):
        return None
    return Start(tuple(launchers), launch_id, job, start)
