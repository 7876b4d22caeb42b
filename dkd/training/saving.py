"""What a training leaves on the disk: checkpoints while it runs, the student when it is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dkd.build.models import student_spec
from dkd.checkpoints.checkpointer import Checkpointer
from dkd.checkpoints.facts import checkpoint_facts, write_facts
from dkd.config import Recipe
from dkd.distributed.main_process import run_on_main
from dkd.distributed.stop_signals import STOP_FILE, StopRequests
from dkd.engines.base import Engine
from dkd.engines.ema import WeightAverage
from dkd.engines.sharded_weights import parameter_counts
from dkd.errors import Stopped, TrainingError
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch
from dkd.models import save_student
from dkd.runs.directory import RunDirectory
from dkd.runs.logger import RunLogger
from dkd.training.early_stopping import EarlyStopping
from dkd.training.evaluation import Evaluation
from dkd.training.state import TrainState

Exported = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""A student's whole weights, on the main process, and what describes them."""


@dataclass
class RunSaver:
    """Writes checkpoints, the finished student, and the marks of how a run ended. All ranks hold one, and call it
    together.

    Args:
        facts: `run_facts` of the run.
        input: what describes the student's input in student.json.
        average: the moving average of the weights; the student is written with it where there is one.
    """

    recipe: Recipe
    launch: Launch
    engine: Engine
    average: WeightAverage | None
    checkpointer: Checkpointer
    run_dir: RunDirectory
    log: RunLogger
    state: TrainState
    facts: Mapping[str, Any]
    input: Mapping[str, Any]
    total_steps: int
    stopping: EarlyStopping
    _checkpoint_error: str | None = None

    def save_checkpoint(self) -> None:
        """Copy all ranks' parts of the state; it is written while training continues."""
        begun = time.monotonic()
        exported = self._export({"steps": self.state.step})
        progress = self.state.state_dict()
        facts = checkpoint_facts(
            progress.pop("step"),
            self.recipe,
            self.launch.world_size,
            self.engine.rules.name,
            self.facts,
            scaler=self.engine.scaler_state(),
            stopping=self.stopping.state_dict(),
            **progress,
        )

        def write_beside(folder: Path) -> None:
            self._write_student(folder, exported)
            write_facts(folder, facts, self.recipe)

        self.log.sync()  # a run that resumes from this checkpoint does not write the lines up to it again
        self.checkpointer.save(self.state.step, write_beside, begun)

    def report_checkpoints(self) -> None:
        """Log what was written meanwhile."""
        for result in self.checkpointer.finished():
            error = self._checkpoint_error = result.error
            if error is not None:
                self.log.say(
                    f"warning: the checkpoint after step {result.step} could not be written ({error}); training "
                    "continues, older ones stay"
                )
            if result.warning is not None:
                self.log.say(f"warning: older checkpoints could not be removed ({result.warning})")
            self.log.write({"checkpoint": asdict(result)})

    def wait(self) -> None:
        """Wait until nothing is being written, and log what was."""
        self.checkpointer.wait()
        self.report_checkpoints()

    def stop(self, requests: StopRequests) -> NoReturn:
        """End the run on all ranks, after the checkpoint that is being written. A collective.

        Raises:
            Stopped: the run can be resumed.
            TrainingError: its checkpoint could not be written, or its folder not be marked.
        """
        self.wait()
        steps_done = self.state.step
        asked = [by for by in all_gather_objects(requests.asked_by(look=True)) if by is not None]
        by = STOP_FILE if STOP_FILE in asked else asked[0]
        error, _ = run_on_main(self.launch.is_main, lambda: self._checkpoint_error)
        if error is not None:
            raise TrainingError(
                f"asked to stop by {by}, but the checkpoint after step {steps_done} could not be written: {error}"
            )
        mark, steps = self.run_dir.mark_stopped, self.state.steps_this_start
        _, reason = run_on_main(self.launch.is_main, lambda: mark(by, steps_done, self.total_steps, steps))
        if reason is not None:
            raise TrainingError(
                f"asked to stop by {by}, after step {steps_done}; {self.run_dir.path} cannot be marked as stopped: "
                f"{reason}"
            )
        self.log.close()
        raise Stopped(steps_done, by)

    def finish(self, result: Evaluation | None) -> None:
        """Write the finished student, and mark the run as finished. A collective.

        Args:
            result: of the student; None: there are no validation images.

        Raises:
            TrainingError: on every rank: the student could not be written where it belongs, the last checkpoint could
                not be written, or the student's numbers are not finite.
        """
        seconds = self.state.seconds()
        replaced, steps = self.state.replaced_images, self.state.step
        early = self.stopping.reason if steps < self.total_steps else None
        exported = self._export(
            {
                "steps": steps,
                **({} if result is None else {"evaluation": result.facts()}),
                **({} if early is None else {"stopped_early": early}),
                "parameters": parameter_counts(self.engine.model.model)[1],
                "seconds": round(seconds, 1),
                "global_batch": self.recipe.train.global_batch,
                "world_size": self.launch.world_size,
                **({"replaced_images": replaced} if replaced else {}),
            }
        )
        self.wait()

        def write() -> str | None:
            ended = None if early is None else {"stopped_early": early, "stopping": self.stopping.state_dict()}
            return self.run_dir.finish(steps, lambda folder: self._write_student(folder, exported), ended)

        main = self.launch.is_main
        elsewhere, not_written = run_on_main(main, write)
        checkpoint_error, _ = run_on_main(main, lambda: self._checkpoint_error)
        # Pruned again, now that the last evaluation is known.
        not_removed = self.checkpointer.prune() if main and elsewhere is None else None
        if not_removed is not None:
            self.log.say(f"warning: older checkpoints could not be removed ({not_removed})")
        self.log.close()
        self._raise_for(elsewhere, not_written, checkpoint_error, result)
        if replaced:
            self.log.say(f"{replaced} images could not be read and were replaced by others")
        if early is not None:
            self.log.say(f"stopped early after step {steps} of {self.total_steps}: {early}")
        named = [] if result is None else [("top-1", result.top1), ("agreement", result.value("agreement"))]
        found = next(((name, value) for name, value in named if value is not None), None)
        untrained = "" if self.recipe.losses.reads_logits else " by a head that no loss trains"
        measured = "" if found is None else f", {found[0]} {found[1]:.4f}{untrained}"
        self.log.say(f"finished in {seconds:.0f} s: {self.run_dir.path}/student.safetensors{measured}")

    def _raise_for(
        self, elsewhere: str | None, not_written: str | None, checkpoint_error: str | None, result: Evaluation | None
    ) -> None:
        if elsewhere is not None:
            raise TrainingError(elsewhere)
        if not_written is not None:
            raise TrainingError(
                f"the finished student cannot be written: {not_written}; start the same command again when it can be"
            )
        if checkpoint_error is not None:
            raise TrainingError(
                f"the last checkpoint could not be written: {checkpoint_error}; the student is in {self.run_dir.path}"
            )
        if result is not None and result.problem:
            raise TrainingError(
                f"the finished student, in {self.run_dir.path}, is of no use: {result.problem}; try a lower "
                "optimizer.lr, a longer warm-up, train.clip_grad_norm, or train.precision=fp32"
            )

    def _export(self, facts: Mapping[str, Any]) -> Exported:
        """Return the student's whole weights, on the main process, and what describes them. All ranks gather them."""
        with self.average.applied() if self.average else nullcontext():
            state = self.engine.full_weights()
        description = {
            **self.input,
            "weights": "average" if self.average else "last",
            **facts,
        }
        return state, description

    def _write_student(self, folder: Path, exported: Exported) -> None:
        save_student(folder, student_spec(self.recipe), *exported)
