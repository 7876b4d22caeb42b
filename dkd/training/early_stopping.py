"""When a training ends before its last step, because its evaluations no longer improve.

The decision is a function of the evaluations, which are equal on all ranks, and its state is part of a checkpoint: a
run that was interrupted stops where it would have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dkd.config.schema import StopWhenSection
from dkd.global_batch.collectives import all_gather_objects
from dkd.training.evaluation import Evaluation


@dataclass
class EarlyStopping:
    """Decides after each evaluation whether the run ends. All ranks hold one.

    Args:
        section: of the recipe; None: the run does not end early.
        best: the best value of the metric so far; None: there is none.
        best_step: steps before the evaluation that had it.
        waited: evaluations since then.
        step: steps before the last evaluation that was counted.
    """

    section: StopWhenSection | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    step: int = 0
    reason: str | None = None
    """Why the run ends now; None: it does not."""

    @classmethod
    def resumed(cls, section: StopWhenSection | None, state: Mapping[str, Any] | None) -> EarlyStopping:
        """Return what `state_dict` stored; a new one where that is of another metric, of none, or damaged."""
        if section is None or state is None or state.get("metric") != section.metric:
            return cls(section)
        best, counts = state.get("best"), [state.get(key) for key in ("best_step", "waited", "step")]
        if not isinstance(best, float | None) or not all(isinstance(count, int) for count in counts):
            return cls(section)
        best_step, waited, step = (int(count) for count in counts if count is not None)
        return cls(section, best, best_step, waited, step)

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a checkpoint stores of it."""
        if self.section is None:
            return None
        state = {"best": self.best, "best_step": self.best_step, "waited": self.waited, "step": self.step}
        return {"metric": self.section.metric, **state}

    def judge(self, step: int, evaluation: Evaluation) -> None:
        """Set `reason` after an evaluation. One that was counted before, and is repeated by a run that resumes, is not
        counted again. A collective where the recipe asks for it: the value on rank 0 decides.

        Args:
            step: steps before the evaluation.
        """
        if self.section is None:
            return
        value = all_gather_objects(evaluation.value(self.section.metric))[0]
        if step > self.step:
            self._count(step, value)
        self.reason = self._find_reason(value)

    @property
    def may_end(self) -> bool:
        """Return whether the next evaluation may end the run."""
        section = self.section
        return section is not None and (section.threshold is not None or self.waited + 1 >= section.patience)

    def _count(self, step: int, value: float | None) -> None:
        assert self.section is not None
        self.step = step
        if value is None or not math.isfinite(value):
            self.waited += 1
            return
        better = self.best is None or (
            value < self.best - self.section.min_delta
            if self.section.falls
            else value > self.best + self.section.min_delta
        )
        if better:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    def _find_reason(self, value: float | None) -> str | None:
        """Return why the run ends after an evaluation, whose value of the metric is given. The threshold is compared
        with it, and not with the best value, which changes by more than min_delta only."""
        section, best = self.section, self.best
        assert section is not None
        found = "no finite value" if best is None else f"{best:.4f} after step {self.best_step}"
        if section.threshold is not None and value is not None and math.isfinite(value):
            reached = value <= section.threshold if section.falls else value >= section.threshold
            if reached:
                return f"{section.metric} has reached {section.threshold:g}: {value:.4f} after step {self.step}"
        if self.waited >= section.patience:
            several = f"{self.waited} evaluations" if self.waited > 1 else "1 evaluation"
            least = f" by more than {section.min_delta:g}" if section.min_delta else ""
            return f"{section.metric} has not improved{least} for {several}; the best was {found}"
        return None
