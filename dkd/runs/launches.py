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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dkd import atomic_files
from dkd.runs.metrics_file import parse_line

IfRunExists = Literal["resume", "refuse", "replace"]
"""What to do with a run that is in `run.dir` already."""
LAUNCHES_FILE = ".launches"

# Run directories in which this process itself has begun: what it begins there next is no restart, which is always
# another process.
_begun_here: set[str] = set()


@dataclass(frozen=True)
class Start:
    """What identifies one start of a launch."""

    launchers: tuple[str, ...] = ()
    """Names of the launchers that restart ranks by themselves; none where there is no such launcher."""
    launch_id: str | None = None
    """DKD_LAUNCH_ID."""
    slurm_job: str | None = None
    """Cluster and number of the Slurm job."""
    slurm_start: int = 0
    """How often Slurm has requeued the job."""

    def belongs_to(self, noted: Start) -> bool:
        """Whether this start is a restart of the launch that `noted` is a start of."""
        return (
            not set(self.launchers).isdisjoint(noted.launchers)
            or (self.launch_id is not None and self.launch_id == noted.launch_id)
            or (
                self.slurm_job is not None
                and self.slurm_job == noted.slurm_job
                and self.slurm_start > noted.slurm_start
            )
        )


def this_start() -> Start:
    """Return what this rank's environment tells of its start."""
    job = os.environ.get("SLURM_JOB_ID")
    if os.environ.get("SLURM_ARRAY_JOB_ID"):  # the number of a task may stand for the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Start(
        launchers=_launcher(),
        launch_id=os.environ.get("DKD_LAUNCH_ID") or None,
        slurm_job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}" if job else None,
        slurm_start=int(restarts) if restarts.isdecimal() else 0,
    )


def together(starts: Sequence[Start]) -> Start:
    """Return the start of all ranks, given that of each. Each machine has a launcher of its own; after a restart, some
    may be new ones."""
    launchers = dict.fromkeys(launcher for start in starts for launcher in start.launchers)
    return Start(tuple(launchers), starts[0].launch_id, starts[0].slurm_job, starts[0].slurm_start)


def in_effect(existing: IfRunExists, run_dir: Path, start: Start) -> IfRunExists:
    """Return what is to become of a run that is in `run_dir` already: for a restart of a launch that has begun there,
    `resume`."""
    if existing == "resume" or os.path.realpath(run_dir) in _begun_here:
        return existing
    return "resume" if any(start.belongs_to(noted) for noted in _noted(run_dir)) else existing


def note(run_dir: Path, start: Start) -> None:
    """Write down, on the disk, that `start` has begun in `run_dir`. Raises OSError."""
    line = {**asdict(start), "time": time.time(), "host": platform.node()}
    with atomic_files.open_to_append(run_dir / LAUNCHES_FILE) as file:
        file.write(b"\n" + json.dumps(line).encode() + b"\n")  # a killed process may have left half a line before it
        os.fsync(file.fileno())
    atomic_files.sync_folder(run_dir)


def has_begun_here(run_dir: Path) -> None:
    """Remember that this process has begun in `run_dir`."""
    _begun_here.add(os.path.realpath(run_dir))


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


def _launcher() -> tuple[str, ...]:
    """Return the name of the torch launcher that this process is a rank of."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ()
    # LOG_DIR/RUN_ID_random/attempt_N/RANK/error.json: the launcher makes the second of these once, under a name that
    # was not there.
    folders = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return (f"{platform.node()} {folders[2] if len(folders) > 2 else _parent()}",)


def _parent() -> str:
    """Return the process that has started this one, by its number and the time at which it began: numbers are given
    again."""
    content, reason = atomic_files.read_bytes(Path(f"/proc/{os.getppid()}/stat"))
    began = content.rpartition(b")")[2].split()[19:20] if reason is None else []
    return f"process {os.getppid()} {b''.join(began).decode()}"
