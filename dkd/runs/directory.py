"""The files of a run.

RUN/
  recipe.yaml              the resolved recipe: every default written out, overrides applied
  provenance.json          one entry a start, the first and each resume: command line, versions, git revision, host,
                           world size, step
  metrics.jsonl            one line a logged step ("step", terms, learning rate, ...), one an evaluation ("evaluation")
  evaluation.json          the last evaluation, with the counts of each class
  metrics.superseded.jsonl lines of steps that were computed again after an interruption
  train.log                what rank 0 reported, with time and rank
  tensorboard/             and folders of other trackers, with their names
  checkpoints/             see dkd/checkpoints/
  student.safetensors      the finished student, and beside it
  student.json             its architecture, input and metrics
  .lock, .owner            of the training that is running, or was the last: see place.py
  .launches                which launches have begun a run here: see launches.py

and one of these, until the next start:
  FINISHED                 the last step is done
  PREEMPTED                a signal stopped the run after a checkpoint: start the same command again
  STOPPED                  a person stopped the run, with a file called STOP
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dkd import atomic_files, console
from dkd.checkpoints import CheckpointFolder
from dkd.config import Problem, Recipe, RecipeError, load_recipe, recipe_changes, recipe_to_yaml
from dkd.config.yaml_text import YamlTextError
from dkd.config.yaml_text import read as read_yaml
from dkd.distributed.nccl_settings import DUMP_PREFIX
from dkd.distributed.stop_signals import STOP_FILE
from dkd.launch import Launch, Start
from dkd.provenance import provenance
from dkd.runs import launches
from dkd.runs.launches import LAUNCHES_FILE, IfRunExists
from dkd.runs.metrics_file import agreement_with_teacher, kind_of, parse_line, read_metrics
from dkd.runs.place import LOCK_FILE, OWNER_FILE, RunPlace

FINISHED, PREEMPTED, STOPPED = MARKERS = "FINISHED", "PREEMPTED", "STOPPED"
LOG_FILE, EVALUATION_FILE = "train.log", "evaluation.json"
_CHECKPOINTS = "checkpoints"
_PROVENANCE, _RECIPE, _METRICS = "provenance.json", "recipe.yaml", "metrics.jsonl"
_DAMAGED_PROVENANCE = "provenance.damaged.json"
# The files of a run, which go when it is replaced. recipe.yaml is written after provenance.json, and removed before it:
# alone, it is a user's own.
_WRITTEN_HERE = (
    _RECIPE,
    _METRICS,
    _PROVENANCE,
    _DAMAGED_PROVENANCE,
    EVALUATION_FILE,
    "metrics.superseded.jsonl",
    "student.safetensors",
    "student.json",
    LOG_FILE,
    *MARKERS,
)
_OF_TRACKERS = ("wandb", "mlflow", "aim", "dvclive", "swanlab")
_OF_A_RUN = (*_WRITTEN_HERE, "tensorboard", STOP_FILE)
_OF_THE_FOLDER = (LOCK_FILE, OWNER_FILE, LAUNCHES_FILE, _CHECKPOINTS)


class RunDirectory:
    """The files of one run. Only the main process writes; the others hold a directory that does nothing."""

    def __init__(self, path: str | Path, writes: bool) -> None:
        self.path = Path(path)
        self.writes = writes
        self.place = RunPlace(self.path)
        self.checkpoints = CheckpointFolder(self.path / _CHECKPOINTS, self.problem)
        self._metrics: Any = None
        self._unwritten = b""
        self._log = ExitStack()
        self._note: Callable[[str], None] = lambda message: None

    def take_over(
        self, recipe: Recipe, if_run_exists: IfRunExists, start: Start, allow_recipe_change: bool
    ) -> list[str]:
        """Prepare the claimed folder for a training: remove an older run where it is to be replaced, and what a killed
        process has left.

        Checks once more what `check_run_directory` has checked: another training may have been here before this one
        claimed the folder.

        Args:
            if_run_exists: what was asked for.
            start: of all ranks.

        Returns:
            What there is to report.

        Raises:
            OSError: a file cannot be removed or written.
            RecipeError: there is a run that must not be lost, or one of another recipe.
        """
        in_effect = launches.in_effect(if_run_exists, self.path, start)
        _check_content(self.path, recipe, in_effect, allow_recipe_change)
        if in_effect == "replace":
            self.checkpoints.remove_all()
            dumps = [path.name for path in self.path.glob(f"{DUMP_PREFIX}*")]
            for target in (self.path / name for name in (*_tracker_folders(self.path), *_OF_A_RUN, *dumps)):
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
        self.checkpoints.remove_unfinished()
        atomic_files.remove_unfinished(self.path, (*_OF_A_RUN, OWNER_FILE))
        if if_run_exists != "resume":
            launches.note(self.path, start)
        if in_effect == if_run_exists:
            return []
        asked = {"replace": "--overwrite", "refuse": "--fresh"}[if_run_exists]
        return [
            f"this launch has begun in {self.path} before: it resumes what it has begun, {asked} holds for its first "
            "start"
        ]

    def start(self, recipe: Recipe, world_size: int, step: int, total_steps: int | None = None) -> list[str]:
        """Write what describes this start, after `step` steps of earlier ones; metrics continue after that step.
        Returns warnings.

        Args:
            total_steps: of the whole run, for those who watch it; None: not known.

        Raises:
            OSError: as the file system says.
        """
        if not self.writes:
            return []
        for name in MARKERS:
            (self.path / name).unlink(missing_ok=True)
        earlier, damage = read_provenance(self.path)
        if damage is not None:
            os.replace(self.path / _PROVENANCE, self.path / _DAMAGED_PROVENANCE)
        from dkd.data.jpeg import jpeg_decoder  # late: `dkd status` imports this module, and is to be quick

        starts = json.dumps([*earlier, provenance(world_size, step, total_steps, jpeg_decoder().name)], indent=2)
        atomic_files.replace_text(self.path / _PROVENANCE, starts + "\n")
        atomic_files.replace_text(self.path / _RECIPE, recipe_to_yaml(recipe))
        self._supersede_after(step)
        evaluated, _ = atomic_files.read_json(self.path / EVALUATION_FILE)
        if (
            isinstance(evaluated, dict) and not evaluated.get("steps", 0) < step
        ):  # it is made again, or belongs to no step
            (self.path / EVALUATION_FILE).unlink(missing_ok=True)
        self._metrics = atomic_files.open_to_append(self.path / _METRICS)
        self._note = self._log.enter_context(console.log_file(self.path / LOG_FILE, rank=0))
        return (
            [] if damage is None else [f"warning: {damage}; it is now {_DAMAGED_PROVENANCE}, and a new one was begun"]
        )

    def _supersede_after(self, step: int) -> None:
        path = self.path / _METRICS
        if not path.exists():
            return
        content, reason = atomic_files.read_bytes(path)
        if reason is not None:
            raise OSError(reason)
        kept: list[bytes] = []
        superseded: list[bytes] = []
        for line in content.splitlines():
            (kept if _belongs_before(line, step) else superseded).append(line + b"\n")
        if superseded:
            with atomic_files.open_to_append(self.path / "metrics.superseded.jsonl") as file:
                for line in superseded:
                    file.write(line)
                os.fsync(file.fileno())
        if superseded or not content.endswith(b"\n"):
            atomic_files.replace_text(path, b"".join(kept).decode(errors="replace"))

    def problem(self) -> str | None:
        """Return why the folder can no longer hold this run: it was deleted, moved, replaced, emptied or taken. None:
        it can."""
        problem = self.place.problem()
        if problem is None and self._metrics is not None:
            lost = [name for name in (_PROVENANCE, _RECIPE, _METRICS) if not (self.path / name).exists()]
            if lost:
                deleted = "files of the run were deleted while it was trained in"
                return f"run.dir {str(self.path)!r}: {deleted}: {', '.join(lost)}"
        return problem

    def log(self, line: Mapping[str, Any]) -> str | None:
        """Append one line to metrics.jsonl. Lines that a full disk does not take are kept for the next time; returns
        what the system said when that begins."""
        if self._metrics is None:
            return None
        was_behind = bool(self._unwritten)
        self._unwritten += json.dumps(line).encode() + b"\n"
        try:
            while self._unwritten:  # a disk that fills up takes the beginning of it
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            return None if was_behind else str(error)
        return None

    def write_evaluation(self, facts: Mapping[str, Any]) -> str | None:
        """Write evaluation.json in the place of an older one. Returns why it cannot be written; None: it was, or this
        is not the main process."""
        if self._metrics is None:
            return None
        try:
            problem = self.problem()
            if problem is None:
                atomic_files.replace_text(self.path / EVALUATION_FILE, json.dumps(facts) + "\n")
        except OSError as error:
            return str(error)
        return problem

    def sync(self) -> None:
        """Put what was logged on the disk. Raises OSError."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def finish(
        self, steps: int, write_student: Callable[[Path], None], early: Mapping[str, Any] | None = None
    ) -> str | None:
        """Write the finished student and mark the run as finished. A STOP file that came too late has no effect.

        Args:
            steps: that are done.
            write_student: writes it into a folder.
            early: why the run has stopped early (`stopped_early`), and the state of that (`stopping`); None: it has
                not.

        Returns:
            None; or why the run cannot be marked as finished, and where its student is instead: the folder is no longer
            this run's.

        Raises:
            OSError: the student cannot be written, or the run not be marked.
        """
        problem = self.problem()
        if problem is not None:
            folder = self.place.for_rescue()
            write_student(folder)
            rescued = f"the finished student is in {str(folder)!r}, later checkpoints and lines of metrics may be lost"
            return f"{problem}; {rescued}"
        write_student(self.path)
        self.sync()
        self._mark(FINISHED, {"steps": steps, **(early or {})})
        (self.path / STOP_FILE).unlink(missing_ok=True)
        return None

    def stopped_early(self, step: int) -> dict[str, Any] | None:
        """Return the state of early stopping with which this run has ended after so many steps; None: it has not."""
        facts, _ = atomic_files.read_json(self.path / FINISHED)
        if not isinstance(facts, dict) or facts.get("steps") != step:
            return None
        state = facts.get("stopping")
        return state if isinstance(state, dict) else None

    def mark_stopped(self, by: str, step: int, steps: int, steps_this_start: int) -> None:
        """Mark the run as stopped when asked; a STOP file has had its effect. Raises OSError.

        Args:
            by: a signal's name, or STOP.
            step, steps: that are done, and of the whole run.
            steps_this_start: of those that are done.
        """
        problem = self.problem()
        if problem is not None:
            raise OSError(problem)
        facts = {"by": by, "step": step, "steps": steps, "steps_this_start": steps_this_start}
        self._mark(STOPPED if by == STOP_FILE else PREEMPTED, facts)
        if by == STOP_FILE:
            (self.path / STOP_FILE).unlink(missing_ok=True)

    def _mark(self, name: str, facts: Mapping[str, Any]) -> None:
        if self.writes:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            atomic_files.replace_text(
                self.path / name, json.dumps({**facts, "time": when, "host": platform.node()}) + "\n"
            )

    def evaluations(self) -> dict[int, float]:
        """Return steps -> top-1 of what metrics.jsonl holds, or without labels the agreement with the teacher."""
        metrics, _ = read_metrics(self.path / _METRICS)
        found = {
            line["steps"]: agreement_with_teacher(line) if line.get("top1") is None else line["top1"]
            for line in metrics.evaluations
        }
        return {steps: value for steps, value in found.items() if value is not None}

    def identity(self) -> tuple[str, bool]:
        """Return a name that all starts of this run share and no other run has; and whether this is not the first of
        them."""
        starts, _ = read_provenance(self.path)
        first = starts[0] if starts else {}
        named = f"{first.get('host')} {first.get('started')} {first.get('command')}"
        return hashlib.sha256(named.encode()).hexdigest()[:16], len(starts) > 1

    def note_end(self, error: Exception) -> None:
        """Write into the run's log why the run ends. Whoever started the run reports it elsewhere."""
        self._note(str(error))

    def close(self) -> None:
        """Close the run's files, and let other trainings into its folder."""
        if self._metrics is not None:
            self._metrics.close()  # unbuffered: there is nothing left to write that could fail
            self._metrics = None
        self._log.close()
        self.place.close()


def is_run(path: Path) -> bool:
    """Return whether a run has been started in `path`. A recipe.yaml alone is a user's own; without it, there is
    nothing yet to lose."""
    started = (path / _RECIPE).exists() and (path / _PROVENANCE).exists()
    return started or (path / _METRICS).exists() or bool(CheckpointFolder(path / _CHECKPOINTS).steps())


def check_run_directory(
    recipe: Recipe, launch: Launch, if_run_exists: IfRunExists, allow_recipe_change: bool
) -> list[Problem]:
    """Check whether a run can start in `run.dir`, or resume there. Returns how its recipe differs from that of the run
    that is in it.

    Raises:
        RecipeError: `run.dir` is no folder, or cannot be written; it holds a run that must not be lost, or one of
            another recipe.
    """
    path = Path(recipe.run.dir)
    try:
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink())
    except (OSError, ValueError) as error:
        raise RecipeError.at("run.dir", f"{str(path)[:80]!r} cannot be a folder: {error}") from error
    if not parent.exists():
        raise RecipeError.at("run.dir", f"{str(parent)!r} is a link to something that is not there")
    if not parent.is_dir():
        raise RecipeError.at("run.dir", f"{str(parent)!r} is a file")
    for folder in (parent, path / _CHECKPOINTS):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise RecipeError.at(
                "run.dir", f"{str(path)!r} cannot be made or used: {str(folder)!r} cannot be written to"
            )
    in_effect = launches.in_effect(if_run_exists, path, launch.start)
    if in_effect == "refuse" and launch.start.launchers and launch.has_several_machines:
        # Ranks of a new machine cannot know whether this is a restart; `take_over` asks again, with all ranks.
        in_effect = "replace"
    return _check_content(path, recipe, in_effect, allow_recipe_change)


def _check_content(path: Path, recipe: Recipe, if_run_exists: IfRunExists, allow_recipe_change: bool) -> list[Problem]:
    """Check what is in a run directory already. Returns how the recipe of its run differs, where that is resumed.
    Raises RecipeError."""
    # What is to be replaced is removed, not followed.
    for name in _OF_THE_FOLDER if if_run_exists == "replace" else (*_OF_THE_FOLDER, *_WRITTEN_HERE):
        problem = atomic_files.link_problem(path / name)
        if problem is not None:
            raise RecipeError.at("run.dir", problem)
    if (path / _CHECKPOINTS).exists() and not (path / _CHECKPOINTS).is_dir():
        raise RecipeError.at(
            "run.dir", f"{str(path / _CHECKPOINTS)!r} is a file, where the folder of checkpoints is to be; remove it"
        )
    if not is_run(path):
        if (path / _RECIPE).exists():
            raise RecipeError.at(
                "run.dir",
                f"{str(path)!r} holds a recipe.yaml, and no run that has written it; a run would put its own in its "
                f"place: choose another run.dir, such as {str(path / 'run')!r}, or rename that file",
            )
        return []
    if if_run_exists == "replace":
        return []
    if if_run_exists == "refuse":
        raise RecipeError.at(
            "run.dir",
            f"{str(path)!r} holds a run already, and --fresh was asked for; choose another run.dir, or add --overwrite",
        )
    try:
        before = load_recipe(path / _RECIPE)
    except (RecipeError, OSError) as error:
        reason = error.problems[0] if isinstance(error, RecipeError) else error
        raise RecipeError.at(
            "run.dir",
            f"{str(path)!r} holds a run already, whose recipe.yaml cannot be read ({reason}); choose another run.dir, "
            "or give --overwrite to replace it",
        ) from error
    changes = recipe_changes(before, recipe)
    if changes and not allow_recipe_change:
        advice = (
            f"{str(path)!r} holds a run of a recipe that differs as reported; give --allow-recipe-change to resume it "
            "with the new one, --overwrite to replace the run, or choose another run.dir"
        )
        raise RecipeError([*changes, Problem("run.dir", advice)])
    return changes


def read_provenance(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the starts of a run, none where there is no file, and why the file cannot be read."""
    if not (path / _PROVENANCE).exists():
        return [], None
    starts, reason = atomic_files.read_json(path / _PROVENANCE)
    if reason is None and not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
        reason = f"{str(path / _PROVENANCE)!r} is damaged: it is no list of starts"
    return ([], reason) if reason is not None else (starts, None)


def _tracker_folders(path: Path) -> list[str]:
    """Return the folders of trackers that the recipe of the run in `path` names. A folder of such a name may be a
    user's own, where the run has not used that tracker."""
    content, _ = atomic_files.read_bytes(path / _RECIPE)
    try:
        named = read_yaml(content.decode(errors="replace"))["run"]["trackers"]
    except (YamlTextError, LookupError, TypeError):
        return []
    return [name for name in _OF_TRACKERS if isinstance(named, list) and name in named]


def _belongs_before(text: bytes, step: int) -> bool:
    """Return whether a line of metrics stays when training resumes after `step` steps. An evaluation after that step is
    made again."""
    line = parse_line(text)
    match kind_of(line):
        case "evaluation":
            return bool(line["evaluation"]["steps"] < step)
        case "checkpoint":
            return bool(line["checkpoint"]["step"] <= step)
        case "step" | "other":
            return bool(0 < line["step"] <= step)
    return False  # no line of ours
