"""Where what a run reports of itself goes: metrics.jsonl, trackers, and the person who watches it. None of them can end
the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from dkd.runs.directory import RunDirectory
from dkd.runs.progress import Progress
from dkd.user_code import describe_error


class RunLogger:
    """All ranks hold one; the main process's is written.

    Args:
        run_dir: started.
        accelerator: with its trackers started.
        progress: what a person sees.
    """

    def __init__(self, run_dir: RunDirectory, accelerator: Accelerator, progress: Progress) -> None:
        self._run_dir, self._accelerator, self.progress = run_dir, accelerator, progress

    def say(self, message: str) -> None:
        """A line for whoever watches."""
        self.progress.say(message)

    def write(self, line: Mapping[str, Any], tracked: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """A line of metrics.jsonl, and what of it the trackers get, after `step` steps."""
        problem = self._run_dir.log(line)
        if problem:
            self.say(f"warning: metrics.jsonl cannot be written ({problem}); its lines are kept until it can")
        if tracked is None:
            return
        try:
            self._accelerator.log(dict(tracked), step=step)
        except (
            Exception
        ) as error:  # a tracker's own code: a disk, a server or a connection that fails after days ends no training
            self.say(f"warning: trackers cannot write ({describe_error(error)}); they get nothing more")
            self._accelerator.trackers = []

    def sync(self) -> None:
        """What was written is on the disk, or a warning says that it is not."""
        try:
            self._run_dir.sync()
        except OSError as error:
            self.say(f"warning: metrics.jsonl cannot be written ({error})")

    def close(self) -> None:
        """The trackers' last word. Not accelerator.end_training(): it would also destroy a process group that the
        caller may still use."""
        self.progress.close()
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as above
                self.say(f"warning: {tracker.name} cannot write ({describe_error(error)})")
