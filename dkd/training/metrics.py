"""What is done with a step's numbers once they are averaged, on all ranks alike: log, warn, or end the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dkd.config import Recipe
from dkd.config.derived import classes
from dkd.distillation import Objective
from dkd.distillation.step import STEPS_THAT_JUDGE_THE_TEACHER
from dkd.distributed.async_mean import AsyncMean, StepValues
from dkd.errors import TrainingError
from dkd.global_batch.collectives import all_gather_objects
from dkd.runs.logger import RunLogger
from dkd.training.schedule import RunSchedule, Wishes
from dkd.training.state import TrainState

LARGEST_PASS_DIFFERENCE = 1e-2  # bf16 rounds to 4e-3; two different dropout masks differ by more than 0.3


class StepMetrics:
    """Reads the means of each step, in order. Everything it decides, it decides from numbers that are equal on every
    rank.

    Args:
        recipe, schedule, state: of the run.
        world_size: W.
        objective: names and weights of what is logged.
        learning_rate: of a step.
        gram_size: rows of one Gram matrix of SP.
        log: where metrics go.
        overflows_by_design: updates are now and then left out by a gradient scaler.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: RunSchedule,
        state: TrainState,
        world_size: int,
        objective: Objective,
        learning_rate: Callable[[int], float],
        gram_size: int,
        log: RunLogger,
        overflows_by_design: bool = False,
    ) -> None:
        self._recipe, self._schedule, self._state, self._world_size = recipe, schedule, state, world_size
        self._objective, self._learning_rate, self._gram_size = objective, learning_rate, gram_size
        self._log, self._overflows_by_design = log, overflows_by_design
        # step -> failures and unreadable images of this rank
        self._loading_problems: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._replaced_unlogged = 0
        self._steps_unlogged, self._seconds_unlogged, self._waited_unlogged = 0, 0.0, 0.0
        self._skipped_in_a_row = 0
        self._teacher_right: list[float] = []
        self.wishes = Wishes()
        """What ranks wished for in the step that was read last."""

    def note_loading(self, step: int, failures: tuple[str, ...], unreadable: tuple[str, ...]) -> dict[str, float]:
        """Note what went wrong on this rank in loading the images of a step. Returns the counts that inform the
        others."""
        if failures or unreadable:
            self._loading_problems[step] = failures, unreadable
        return {"load_failures": float(len(failures)), "unreadable": float(len(unreadable))}

    def read(self, mean: AsyncMean | None) -> None:
        """Log a finished step; end on all ranks together when training cannot continue.

        Raises:
            TrainingError: on every rank.
        """
        if mean is None:
            return
        values = mean.read()
        counts = values.counts
        if not mean.in_step():
            steps = ", ".join(f"rank {rank} at {step + 1}" for rank, step in enumerate(all_gather_objects(mean.step)))
            raise TrainingError(f"ranks are at different steps ({steps}): one of them skipped a step")
        self.check_loading(mean.step, counts)
        if counts.get("other_images", 0.0) > 0:
            raise TrainingError(
                f"step {mean.step + 1}: the images are not those that teacher.cache was filled with, though labels and "
                "some images are the same: the data have changed; name another folder, or remove this key (`dkd cache "
                "list`, `dkd cache prune --key`)"
            )
        self.wishes = Wishes(counts["minutes_over"] > 0, counts["stop"] > 0)
        if (counts["skipped"] > 0 and not self._overflows_by_design) or not math.isfinite(counts["loss"]):
            self._read_non_finite(mean, values)
            return
        self._skipped_in_a_row = 0
        if counts.get("pass_difference", 0.0) > LARGEST_PASS_DIFFERENCE:
            raise TrainingError(
                f"at step {mean.step + 1} the student's two forwards, which must be the same, differ by "
                f"{counts['pass_difference']:.1e}: something in it is random beyond torch's seed, or compiled "
                "differently; take losses.sp.batch=micro, or a micro-batch that needs no accumulation"
            )
        self._judge_teacher(mean.step, counts)
        self._log_step(mean.step, values)

    def _judge_teacher(self, step: int, counts: Mapping[str, float]) -> None:
        """Report, after the first steps of a start, how often the teacher's first class is right: wrong weights,
        another order of classes, another normalisation or size show there."""
        if "teacher_right" not in counts:
            return
        self._teacher_right.append(counts["teacher_right"])
        steps = len(self._teacher_right)
        if steps < STEPS_THAT_JUDGE_THE_TEACHER and step + 1 < self._schedule.total_steps:
            return
        found, chance = sum(self._teacher_right) / steps, 1 / classes(self._recipe)
        images = steps * self._recipe.train.global_batch
        line = f"the teacher's first class is right for {found:.1%} of {images:,} training images"
        # Three standard deviations of what guessing gives.
        if found <= chance + 3 * math.sqrt(chance * (1 - chance) / images):
            line = (
                f"warning: {line}, no more than guessing gives ({chance:.1%}): look at teacher.weights, the order of "
                "its classes, teacher.normalization and teacher.input_size"
            )
        if self._recipe.teacher is not None and self._recipe.teacher.weights != "random":
            self._log.say(line)

    def _log_step(self, step: int, values: StepValues[float]) -> None:
        terms, counts = values.terms, values.counts
        self._steps_unlogged += 1
        self._seconds_unlogged += counts["seconds"]
        self._waited_unlogged += counts["seconds_waited"]
        shown = {"loss": counts["loss"], **{name: terms[name] for name in self._objective.names}}
        self._log.progress.step(step, shown)
        if not self._schedule.logs(step):
            return
        line = {
            **shown,
            "lr": self._learning_rate(step),
            **{f"weight/{term.name}": term.weight(step) for term in self._objective.terms},
            # Of all steps since the last logged one.
            "images_per_second": self._recipe.train.global_batch * self._steps_unlogged / self._seconds_unlogged,
            "data_wait": self._waited_unlogged / self._seconds_unlogged,
        }
        self._steps_unlogged, self._seconds_unlogged, self._waited_unlogged = 0, 0.0, 0.0
        if self._replaced_unlogged:
            line["replaced_images"], self._replaced_unlogged = self._replaced_unlogged, 0
        if "sp" in terms:
            # L_SP falls as 1/B; this does not, so it can be compared between batch sizes.
            line["sp_row_difference"] = terms["sp"] * self._gram_size
        self._log.write({"step": step + 1, "epoch": step // self._schedule.steps_per_epoch, **line}, line, step + 1)

    def check_loading(self, step: int, counts: Mapping[str, float]) -> None:
        """End the run on all ranks where images of a step could not be loaded, or report which images were replaced. A
        collective where there is anything to report.

        Args:
            counts: means over ranks, with `load_failures` and `unreadable`.

        Raises:
            TrainingError: on every rank.
        """
        failures, unreadable = (round(counts[key] * self._world_size) for key in ("load_failures", "unreadable"))
        if failures + unreadable == 0:
            return
        ranks = all_gather_objects(self._loading_problems.pop(step, ((), ())))
        failed, messages = (
            [f"rank {rank}: {message}" for rank, problems in enumerate(ranks) for message in problems[kind]]
            for kind in (0, 1)
        )
        if failed:
            raise TrainingError(f"step {step + 1}: {failed[0]}")
        if self._recipe.data.on_error == "raise":
            more = f" (and {unreadable - 1} more in that step)" if unreadable > 1 else ""
            raise TrainingError(
                f"step {step + 1}: {messages[0]}{more}; data.on_error=skip replaces such images and continues"
            )
        for message in messages:
            self._log.say(f"warning: step {step + 1}: {message}; another image was taken")
        self._state.replaced_images += unreadable
        self._replaced_unlogged += unreadable

    def _read_non_finite(self, mean: AsyncMean, values: StepValues[float]) -> None:
        """Report a step whose loss or gradient is not finite: its update was left out, or the run ends."""
        names = self._objective.names
        local = mean.local()
        own = [local.counts["loss"], *(local.terms[name] for name in names)]
        ranks = all_gather_objects([place for place, value in enumerate(own) if not math.isfinite(value)])
        # A loss over the global batch is broken on every rank; the term that is broken on the fewest shows where it
        # began.
        by_term = [[rank for rank, places in enumerate(ranks) if place in places] for place in range(len(own))]
        broken = min(filter(None, by_term), key=len, default=[])
        terms = ", ".join(f"{name} {values.terms[name]:.4g}" for name in names)
        what = "loss" if broken else "gradient"
        where = f"on rank {', '.join(map(str, broken))}; {terms}" if broken else terms
        found = f"the {what} is not finite at step {mean.step + 1} ({where})"
        allowed = self._recipe.train.skip_nonfinite
        self._skipped_in_a_row += 1
        if allowed and values.counts["skipped"] == 0:
            raise TrainingError(f"{found}, and its update was not left out")
        if self._skipped_in_a_row > allowed:
            again = f", {self._skipped_in_a_row} steps in a row" if allowed else ""
            more = "" if allowed else "; train.skip_nonfinite=N leaves out up to N such updates in a row"
            raise TrainingError(
                f"{found}{again}; try a lower optimizer.lr, a longer warm-up, train.clip_grad_norm, or "
                f"train.precision=fp32{more}"
            )
        self._log.say(
            f"warning: {found}; its update is left out, {self._skipped_in_a_row} of at most {allowed} in a row"
        )
        line = {"step": mean.step + 1, "epoch": mean.step // self._schedule.steps_per_epoch}
        self._log.write({**line, "skipped": what, "ranks": broken}, None, mean.step + 1)
