"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dkd.build.models import pairs, student_spec, teacher_spec
from dkd.build.optimizers import SteppedRates
from dkd.config import Recipe
from dkd.data import DataError
from dkd.data.loader import Batch
from dkd.distillation import LazyTeacher
from dkd.distributed.async_mean import AsyncMean, Number, StepValues
from dkd.distributed.process_group import set_timeouts
from dkd.errors import RunError, TrainingError
from dkd.launch import Launch
from dkd.models.feature_reader import FeatureReader
from dkd.runs.launches import IfRunExists
from dkd.training.agreement import AgreementMeter
from dkd.training.components import Components, build_components
from dkd.training.evaluation import Evaluation, evaluate
from dkd.training.knn import measure_knn
from dkd.training.knn_accuracy import KnnAccuracy
from dkd.training.schedule import Decision
from dkd.training.step_graph import CudaGraphs, StepGraph, why_not

WORKERS_SHARE = 0.8
"""A worker process of the loader may read nothing for so much of the ranks' timeout: all ranks learn why one ends."""
_PHASES = ("waiting for images", "first pass of SP", "forward", "backward and update")


class Trainer:
    """Trains one recipe in this process group.

    Args:
        parts: what the recipe was built into.
    """

    def __init__(self, parts: Components) -> None:
        self.parts, self.state, self.metrics = parts, parts.state, parts.metrics
        self._batches: Iterator[Batch] = iter(())
        self._keys: Iterator[list[tuple[int, int]]] | None = None
        self._pending: AsyncMean | None = None
        self._clock = 0.0
        self._graph = self._open_graph()
        self._rates = SteppedRates(parts.engine.optimizer, None if self._graph is None else parts.engine.device)
        set_patience(parts, parts.recipe.run.start_timeout)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        launch: Launch | None = None,
        if_run_exists: IfRunExists = "resume",
        allow_recipe_change: bool = False,
    ) -> Trainer:
        """Build everything that a recipe needs, and open the process group. A collective.

        Args:
            recipe: checked by `dkd.preflight.check`.
            launch: of this process; None: as its environment describes it.
            if_run_exists: what to do with a run that is in `run.dir` already. `resume` continues from its newest intact
                checkpoint.
            allow_recipe_change: whether that run may be resumed with another recipe.

        Raises:
            LaunchError: the environment describes no launch that can train.
            RecipeError: what only opened data or the opened process group can show. On every rank.
        """
        return cls(build_components(recipe, launch or Launch.read(), if_run_exists, allow_recipe_change))

    def fit(self) -> Evaluation | None:
        """Train to the end, evaluating on the way; leave the finished student in the run directory.

        Returns:
            The evaluation of the finished student; None for a recipe without validation images.

        Raises:
            TrainingError: on every rank, such as when the loss is no longer finite.
            Stopped: on every rank: a signal or a stop file asked for it.
            LostRankError: another rank is gone.
        """
        try:
            with self.parts.heartbeat.names_lost_ranks():
                result = self._begin()
                while not self.is_over:
                    values = self.train_step()
                    decision = self.after_step(values)
                    result = self._carry_out(decision) or result
                self._batches = iter(())  # ends worker processes that load the steps after an early stop
                self.parts.saver.finish(result)
                return result
        except RunError as error:
            if isinstance(error, TrainingError):  # raised by all ranks together, so that all can finish a checkpoint
                self.parts.saver.wait()
            self.parts.run_dir.note_end(error)
            raise
        finally:
            if self.parts.launch.world_size == 1:
                # The process may train again. Other ranks might never join the checkpoint of several.
                self.parts.checkpointer.wait()
            self.close()

    @property
    def is_over(self) -> bool:
        """Return whether the last step is done, or the run has stopped early: the same on every rank."""
        return self.state.step >= self.parts.schedule.total_steps or self.parts.stopping.reason is not None

    def _begin(self) -> Evaluation | None:
        """Evaluate where the run was interrupted before an evaluation, and begin to load images."""
        parts, state = self.parts, self.state
        state.started = time.monotonic()
        result = None
        if state.step > 0 and parts.schedule.evaluates(state.step):
            result = self.evaluate()
            if result is None:
                parts.saver.stop(parts.stop)
        # Set train mode here and after each evaluation, not in every step: it is slow on models with many modules. The
        # engine's own `training` flag can differ from the model's.
        parts.step.student.train()
        if not self.is_over:
            self.load_images(parts.schedule.total_steps)
        return result

    def load_images(self, last_step: int) -> None:
        """Begin to load the images of the steps from the present one to `last_step`. Worker processes are forked now.
        At the first step of a run, what losses need to know of the teacher is measured before."""
        if self.state.step == 0:
            self._measure_teacher()
        self.parts.caches.wait()
        self._batches = self.parts.data.train_loader.steps(self.state.step, last_step)
        if self.parts.step.needs_indices:
            self._keys = self.parts.data.sampler.micro_batches(self.state.step, last_step)
        self._clock = time.monotonic()

    def _measure_teacher(self) -> None:
        """Measure the teacher over the images of the first steps, where a loss standardises its features. A
        collective."""
        parts = self.parts
        images = max((getattr(loss, "images_to_measure", 0) for _, loss in parts.recipe.losses.named()), default=0)
        if not images:
            return
        steps = min(-(-images // parts.recipe.train.global_batch), parts.data.sampler.steps_per_epoch)
        parts.step.measure(parts.data.train_loader.steps(0, steps))
        count = steps * parts.recipe.train.global_batch
        parts.log.say(f"measured the teacher's features over {count} training images, to standardise them")

    def train_step(self) -> StepValues[Number]:
        """Take one optimizer step over the global batch. Returns this rank's share of its numbers. A collective."""
        parts, step = self.parts, self.state.step
        self._reach(0, 0)
        self._rates.write(parts.learning_rate(step))
        micro_batches, values = self._load(step)
        if self._graph is not None and self._graph.is_ready:
            self._reach(0, 2)
            loss = self._graph.take(micro_batches[0], step)
            values.add(loss.terms, loss.counts, 1)
            skipped = False
        else:
            skipped = self._compute(micro_batches, step, values)
        values.counts["skipped"] = float(skipped)
        self.state.step += 1
        return values

    def _compute(self, micro_batches: list[Batch], step: int, values: StepValues[Number]) -> bool:
        """Compute and apply an update; add its numbers to `values`. Returns whether the update was left out."""
        parts = self.parts
        self._reach(0, 1)
        parts.step.begin(micro_batches, step, self._read_indices())
        skipped = False
        for i in range(len(micro_batches)):
            with parts.engine.accumulate():
                self._reach(i, 2)
                loss = parts.step.loss(i)
                self._reach(i, 3)
                parts.engine.backward(loss.total)
                skipped = parts.engine.step(parts.recipe.train.clip_grad_norm, parts.recipe.train.skip_nonfinite > 0)
            values.add(loss.terms, loss.counts, len(micro_batches))
        if parts.step.teaching.stored:
            values.counts["other_images"] = float(parts.step.teaching.has_other_images)
        parts.step.end(skipped)
        if parts.average is not None and not skipped:
            parts.average.update()
        return skipped

    def _open_graph(self) -> StepGraph | None:
        """Return what takes steps as a graph; None where the recipe does not ask for it, or it cannot be."""
        parts, train = self.parts, self.parts.recipe.train
        if train.graph is not True:
            return None
        reason = why_not(parts.recipe, parts.step, parts.engine, parts.launch.world_size)
        if reason is not None:
            parts.log.say(f"train.graph: a step is not captured, because {reason}; it runs operator by operator")
            return None
        graphs, device = None, parts.engine.device
        if device.type == "cuda":
            graphs = CudaGraphs(device)
        else:
            parts.log.say("train.graph: CPUs have no CUDA graphs; the parts of one run one after the other")
        return StepGraph(parts.step, parts.engine, parts.average, train.clip_grad_norm, parts.log.say, graphs)

    def _load(self, step: int) -> tuple[list[Batch], StepValues[Number]]:
        """Wait for the step's micro-batches. Returns them, and what loading them took."""
        asked = time.monotonic()
        micro_batches = [next(self._batches) for _ in range(self.parts.step.micro_steps)]
        waited = time.monotonic() - asked
        failures = tuple(batch.failure for batch in micro_batches if batch.failure)
        unreadable = tuple(message for batch in micro_batches for message in batch.unreadable)
        loading = self.metrics.note_loading(step, failures, unreadable)
        return micro_batches, StepValues({}, {"seconds_waited": waited, **loading})

    def _read_indices(self) -> list[torch.Tensor] | None:
        """Return the places of the step's samples in the training data, for each micro-batch; None: no loss asks."""
        if self._keys is None:
            return None
        keys = [next(self._keys) for _ in range(self.parts.step.micro_steps)]
        return [torch.tensor([index for _, index in each], dtype=torch.int64) for each in keys]

    def after_step(self, values: StepValues[Number]) -> Decision:
        """Read the numbers of the step before, which were averaged while this one computed, and decide what happens
        now.

        No rank waits for another here: the numbers of this step are read after the next one, or in `_carry_out`.

        Raises:
            TrainingError: on every rank: training cannot continue.
        """
        parts, step = self.parts, self.state.step - 1
        # From report to report, since a GPU still computes when `train_step` returns; reading waits for the step
        # before.
        now = time.monotonic()
        values.counts["seconds"], self._clock = now - self._clock, now
        values.counts["minutes_over"] = float(parts.launch.is_main and parts.schedule.minutes_over())
        values.counts["stop"] = float(parts.stop.asked_by() is not None)
        mean = AsyncMean(step, values)
        self.metrics.read(self._pending)
        parts.caches.confirm(step)
        self._pending = mean
        if step == self.state.first_step + 1:
            # Every rank has finished a step, compilation included; a rank that is late from now on is lost.
            set_patience(parts, parts.recipe.run.collective_timeout)
        return parts.schedule.decide(self.state.step, self.metrics.wishes)

    def _carry_out(self, decision: Decision) -> Evaluation | None:
        """Save, evaluate or stop, as was decided. Returns the result of an evaluation."""
        parts, result = self.parts, None
        if decision.interrupts:
            self.metrics.read(self._pending)  # nothing is saved of a step that ends the run
            self._pending = None
            parts.caches.confirm(self.state.step)
            if decision.save:
                parts.caches.flush()
            if decision.evaluate:
                # Worker processes are forked while no other thread runs that could hold a lock.
                parts.checkpointer.wait()
                parts.caches.wait()
                assert parts.data.validation is not None  # the schedule evaluates nothing without it
                loading = iter(parts.data.validation)
            if decision.save:
                self.save_checkpoint()  # before an evaluation that may fail
            if decision.stop:
                parts.saver.stop(parts.stop)
            if decision.evaluate:
                result = self.evaluate(loading)
                if result is None:
                    if not decision.save:
                        self.save_checkpoint()
                    parts.saver.stop(parts.stop)
                if parts.stopping.reason is not None and not decision.save:
                    self.save_checkpoint()  # a run ends with a checkpoint, wherever it ends
            self._clock = time.monotonic()
        parts.saver.report_checkpoints()
        return result

    def evaluate(self, loading: Iterator[Batch] | None = None) -> Evaluation | None:
        """Evaluate the student, with the average of its weights if one is kept, and log the result. A collective.

        Args:
            loading: the validation loader's iterator, where it has begun already.

        Returns:
            The same numbers on every rank; None: the run was asked to stop meanwhile.

        Raises:
            TrainingError: on every rank: images cannot be read.
        """
        parts, step = self.parts, self.state.step

        def is_asked_to_stop(batch: int) -> bool:
            parts.heartbeat.reach([step, 1, batch], f"evaluation after step {step}, batch {batch + 1}")
            return parts.stop.asked_by() is not None

        assert parts.data.validation is not None
        parts.step.student.eval()
        begun = time.monotonic()
        skip, device = parts.recipe.data.on_error == "skip", parts.engine.device
        meter = self._open_meter()
        try:
            with ExitStack() as inside:
                if parts.average is not None:
                    inside.enter_context(parts.average.applied())
                if meter is not None and parts.step.teacher is not None:
                    inside.enter_context(parts.step.teacher.with_logits())
                logits = partial(self._evaluated_logits, meter)
                labels = parts.recipe.data.labels
                result = evaluate(logits, parts.data.validation, device, skip, loading, is_asked_to_stop, labels)
                if result is not None and meter is not None:
                    result = replace(result, agreement=meter.over_ranks())
                if result is not None and parts.schedule.measures_knn(step, parts.stopping.may_end):
                    knn = self._measure_knn(is_asked_to_stop)
                    result = None if knn is None else replace(result, knn=knn)
        except DataError as error:
            raise TrainingError(f"evaluation after step {step}: {error}") from error
        finally:
            parts.step.student.train()
        if result is not None:
            if result.score is not None:
                parts.checkpointer.evaluations[step] = result.score
            seconds, names = time.monotonic() - begun, parts.data.class_names
            parts.stopping.judge(step, result)
            result.log(parts.log, step, step / parts.schedule.steps_per_epoch, seconds, names)
        return result

    def _measure_knn(self, is_asked_to_stop: Callable[[int], bool]) -> KnnAccuracy | None:
        """Measure the k-NN accuracy of the student's features, inside an evaluation. A collective. Returns None: the
        run was asked to stop meanwhile. Raises DataError on every rank."""
        parts, data, section = self.parts, self.parts.data, self.parts.recipe.evaluation.knn
        assert section is not None
        assert data.knn is not None
        assert data.validation is not None
        # Worker processes are forked while no other thread runs that could hold a lock.
        parts.checkpointer.wait()
        parts.caches.wait()
        before = len(data.validation)
        reader = FeatureReader(parts.engine.model.model, student_spec(parts.recipe), section.tap)

        def features(batch: Batch) -> torch.Tensor:
            parts.step.logits(batch.images)
            return reader.take()

        # A compiled forward would not call the reader.
        compiled = parts.recipe.train.compile.student
        with reader.reading(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return measure_knn(
                features,
                data.knn.bank,
                data.knn.queries,
                data.knn.classes,
                section,
                parts.engine.device,
                parts.recipe.data.on_error == "skip",
                lambda number: is_asked_to_stop(before + number),
            )

    def _open_meter(self) -> AgreementMeter | None:
        """Return what measures the student's agreement with the teacher; None where this evaluation does not."""
        parts = self.parts
        recipe = parts.recipe
        # Several teachers are not compared with: one number would not tell with which.
        if recipe.teacher is None or not parts.schedule.measures_agreement(self.state.step, parts.stopping.may_end):
            return None
        teacher = parts.step.teacher
        if parts.schedule.may_leave_out_agreement and isinstance(teacher, LazyTeacher) and not teacher.is_built:
            return None
        # The first classes of a head that no loss trains say nothing.
        same_classes = teacher_spec(recipe).classes == student_spec(recipe).classes and bool(recipe.losses.reads_logits)
        taps = list(dict.fromkeys(pairs(recipe)))
        if not same_classes and not taps:
            return None
        return AgreementMeter(taps, same_classes, parts.engine.device, recipe.data.labels)

    def _evaluated_logits(self, meter: AgreementMeter | None, batch: Batch) -> torch.Tensor:
        """Return the student's logits (b, K), and let the meter see both models' outputs where there is one."""
        if meter is None:
            return self.parts.step.logits(batch.images)
        # A batch of evaluation may be larger than what the teacher had room for in training.
        student, teacher = self.parts.step.outputs(batch.images, self.parts.data.sampler.micro_batch)
        assert teacher is not None
        assert student.logits is not None
        meter.add(student, teacher, batch)
        return student.logits

    def save_checkpoint(self) -> None:
        """Copy all ranks' parts of the state; it is written while training continues. A collective."""
        self.parts.heartbeat.reach([self.state.step, 0], f"checkpoint after step {self.state.step}")
        self.parts.saver.save_checkpoint()
        self.metrics.wishes = replace(self.metrics.wishes, minutes_over=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this rank: progress, and named tensors on the CPU. A collective."""
        return {**self.state.state_dict(), "tensors": self.parts.training_tensors().collect()}

    def close(self) -> None:
        """Let other trainings into the run directory, and stop this rank's threads."""
        self.parts.caches.close()
        self.parts.run_dir.close()
        self.parts.heartbeat.close()

    def _reach(self, micro_step: int, phase: int) -> None:
        """Report to the other ranks how far this one is."""
        step, micro_steps = self.state.step, self.parts.step.micro_steps
        micro = f", micro-step {micro_step + 1}" if micro_steps > 1 and phase > 1 else ""
        self.parts.heartbeat.reach([step, 2, micro_step, phase], f"step {step + 1}{micro}, {_PHASES[phase]}")


def set_patience(parts: Components, seconds: float) -> None:
    """Set how long ranks wait for each other in collectives, and for their worker processes."""
    # Of all groups: those that an engine has made for itself have a timeout of torch's.
    set_timeouts(seconds, but=parts.checkpointer.groups())
    parts.heartbeat.warn_after = parts.engine.warn_after(seconds)
    knn = parts.data.knn
    for loader in (parts.data.train_loader, parts.data.validation, *(() if knn is None else (knn.bank, knn.queries))):
        if loader is not None:
            loader.timeout = WORKERS_SHARE * seconds
