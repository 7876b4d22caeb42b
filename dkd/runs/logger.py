"""Where what a run reports of itself goes: metrics.jsonl, trackers, and the person who watches it. None of them can end
the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dkd.runs.directory import RunDirectory
from dkd.runs.progress import Progress


class Trackers(Protocol):
    """What a logger asks of trackers such as TensorBoard: `dkd.engines.trackers.Trackers`."""

    def log(self, values: Mapping[str, Any], step: int) -> str | None: ...

    def finish(self) -> list[str]: ...


class RunLogger:
    """Writes what a run reports. All ranks hold one; the main process's writes.

    Args:
        run_dir: started.
        trackers: started.
        progress: what a person sees.
    """

    def __init__(self, run_dir: RunDirectory, trackers: Trackers, progress: Progress) -> None:
        self._run_dir, self._trackers, self.progress = run_dir, trackers, progress

    def say(self, message: str) -> None:
        """Show a line to the person who watches the run."""
        self.progress.say(message)

    def write(self, line: Mapping[str, Any], tracked: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Write a line of metrics.jsonl.

        Args:
            tracked: what the trackers get of it; None: nothing.
            step: steps done.
        """
        problem = self._run_dir.log(line)
        if problem:
            self.say(f"warning: metrics.jsonl cannot be written ({problem}); its lines are kept until it can")
        if tracked is not None:
            problem = self._trackers.log(tracked, step)
            if problem:
                self.say(f"warning: {problem}")

    def write_evaluation(self, facts: Mapping[str, Any]) -> None:
        """Write the last evaluation to evaluation.json, or warn that it cannot be written."""
        problem = self._run_dir.write_evaluation(facts)
        if problem:
            self.say(f"warning: evaluation.json cannot be written ({problem})")

    def sync(self) -> None:
        """Write what was logged to the disk, or warn that it cannot be written."""
        try:
            self._run_dir.sync()
        except OSError as error:
            self.say(f"warning: metrics.jsonl cannot be written ({error})")

    def close(self) -> None:
        """Close the progress display and the trackers."""
        self.progress.close()
        for problem in self._trackers.finish():
            self.say(f"warning: {problem}")
