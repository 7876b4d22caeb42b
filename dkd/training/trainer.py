"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from dkd import launch
from dkd.build import assembly, recipe_objects
from dkd.build.optimizers import build_optimizer
from dkd.build.schedules import learning_rate
from dkd.checkpoints.checkpointer import Checkpointer
from dkd.checkpoints.facts import checkpoint_facts, run_facts, write_facts
from dkd.checkpoints.schedule import CheckpointSchedule
from dkd.config import Recipe, RecipeError
from dkd.data import DataError, EvaluationLoader, TrainLoader
from dkd.data.samples import Batch
from dkd.data.sources import ImageSource
from dkd.distillation.batch_norm import BatchNormStatistics
from dkd.distillation.forward import Forward
from dkd.distillation.grad_cache import CachedGradient, relational_gradient
from dkd.distillation.objective import Outputs
from dkd.distributed import process_group
from dkd.distributed.async_mean import AsyncMean
from dkd.distributed.heartbeat import Heartbeat
from dkd.distributed.main_process import run_on_main
from dkd.distributed.stop_signals import STOP_FILE, StopRequests
from dkd.engines import engine
from dkd.engines.ema import WeightAverage
from dkd.engines.gradient_check import gradient_is_finite
from dkd.engines.sharded_weights import full_state, parameter_counts
from dkd.errors import Stopped, TrainingError
from dkd.global_batch import BatchLayout
from dkd.global_batch.collectives import all_gather_objects
from dkd.models import save_student
from dkd.preflight import checks, hardware
from dkd.rng import derive_seed, seed_device
from dkd.runs.directory import RunDirectory
from dkd.runs.launches import IfRunExists
from dkd.runs.logger import RunLogger
from dkd.runs.progress import Progress
from dkd.training.evaluation import Evaluation, evaluate
from dkd.training.metrics import StepMetrics
from dkd.training.resume import begin
from dkd.training.summary import announcement

STEPS_THAT_COMPARE_PASSES = 5
WORKERS_SHARE = 0.8
"""A worker process of the loader may read nothing for so much of the ranks' timeout."""
_PHASES = ("waiting for images", "first pass of SP", "forward", "backward and update")
Number = torch.Tensor | float
_FORWARD, _MIXING = 0, 1  # what random numbers are for: each has its own


class Trainer:
    """One training of a recipe in this process group.

    Args:
        recipe: checked by `preflight.check`.
        existing: what to do with a run that is in `run.dir` already. `resume` goes on behind its newest whole
            checkpoint.
        allow_recipe_change: whether that run may go on with another recipe.

    Raises:
        RecipeError: what only opened data or the opened process group can show. On every rank.
    """

    def __init__(self, recipe: Recipe, existing: IfRunExists = "resume", allow_recipe_change: bool = False) -> None:
        self.recipe = recipe
        world_size = launch.world_size()
        training, validation = checks.open_sources(recipe)
        self.run_dir = RunDirectory(recipe.run.dir, writes=False)
        # Read once: the file of DeepSpeed's settings may move or change while training runs.
        self.engine = launch.engine()
        engine.join(recipe)
        checks.check_same_recipe(recipe)
        # From here on, the recipe leaves nothing to the hardware.
        self.recipe, self.notes = hardware.settle(recipe, existing)
        recipe = self.recipe
        # Such as a run in fp16 that is resumed on CPUs: the same on every rank, since the recipe now is.
        if problems := engine.launch_problems(recipe, world_size):
            raise RecipeError(problems)
        self.accelerator = accelerator = engine.build_accelerator(recipe, self.run_dir.path)
        self.watch = Heartbeat(
            accelerator.process_index, world_size, engine.warn_after(accelerator, recipe.run.start_timeout)
        )
        with self.watch.names_lost_ranks():
            self._assemble(training, validation, existing, allow_recipe_change)

    def _assemble(
        self, training: ImageSource, validation: ImageSource, existing: IfRunExists, allow_recipe_change: bool
    ) -> None:
        """Everything that the loop uses. A collective."""
        recipe, train, accelerator = self.recipe, self.recipe.train, self.accelerator
        world_size, local = launch.world_size(), launch.local_world_size()
        self.device = accelerator.device
        rank, self.main = accelerator.process_index, accelerator.is_main_process

        data = assembly.data_facts(training)
        checks.check_same_data(data, assembly.data_facts(validation))
        self.order = assembly.build_order(recipe, training, rank, world_size)
        self.planned_steps = self.order.steps_per_epoch * train.epochs
        self.total_steps = min(self.planned_steps, train.max_steps or self.planned_steps)
        pipeline = recipe_objects.build_image_pipeline(recipe)
        self.normalize = pipeline.normalize
        self.mixing = assembly.build_mixing(recipe)
        teacher_normalize = recipe_objects.teacher_normalize(recipe, pipeline.normalize)
        pin = self.device.type == "cuda"
        self.workers = assembly.loader_workers(recipe.data, training, local)
        self.batches = TrainLoader(
            training, pipeline.train, self.order, self.workers, pin, recipe.data.on_error == "skip", pipeline.image_size
        )
        workers = assembly.loader_workers(recipe.data, validation, local)
        self.validation = EvaluationLoader(
            validation,
            pipeline.validation,
            recipe.evaluation.batch,
            rank,
            world_size,
            workers,
            pin,
            pipeline.image_size,
        )
        self.image_size = pipeline.image_size

        student, self.teacher = assembly.build_models(recipe, self.device)
        checks.check_same_teacher(self.teacher.fingerprint if self.teacher is not None else "")
        student = engine.place(student, recipe, self.device, to_be_sharded=self.engine in launch.SHARDING_ENGINES)
        if self.teacher is not None and train.compile.teacher:
            self.teacher.compile()
        self.student, self.optimizer = engine.prepare(accelerator, student, build_optimizer(recipe.optimizer, student))
        if train.compile.student:
            student.compile()
        # After preparing: it may put other tensors in the place of a model's buffers.
        prepared = accelerator.unwrap_model(self.student)
        self.local_parameters, self.parameters = parameter_counts(prepared)
        leaves_out = train.skip_nonfinite > 0 or accelerator.scaler is not None
        self.statistics = BatchNormStatistics(prepared, self.order.micro_steps, world_size, leaves_out)
        self.average = WeightAverage(prepared, train.ema.decay, self.student) if train.ema else None
        self.objective = assembly.build_objective(recipe, self.order, self.planned_steps)
        self.separable, self.relational = self.objective.split()
        for term in self.objective.terms:  # a loss of the user's own may have buffers
            if isinstance(loss := getattr(term, "loss", None), torch.nn.Module):
                loss.to(self.device)
        self.forward = Forward(
            self.student,
            self.teacher,
            self.normalize,
            teacher_normalize,
            engine.model_dtype(recipe),
            engine.model_memory_format(recipe),
            self.objective,
        )
        self.two_passes = bool(self.relational.terms) and self.order.micro_steps > 1
        self.learning_rate = learning_rate(
            recipe.schedule, recipe.optimizer.lr, self.order.steps_per_epoch, self.planned_steps
        )

        self.run_dir.writes = self.main
        self.checkpoint_schedule = CheckpointSchedule(recipe.checkpoint, self.order.steps_per_epoch, self.total_steps)
        state = engine.training_state(self.student, prepared, self.optimizer, self.average)
        self.checkpointer = Checkpointer(
            recipe.checkpoint, self.run_dir.checkpoints, state, rank, world_size, recipe.run.start_timeout
        )
        self._checkpoint_error: str | None = None  # of the last one, on this rank
        self.run_facts = run_facts(recipe, assembly.teacher_facts(recipe, self.teacher), data)
        beginning = begin(
            recipe,
            self.run_dir,
            existing,
            allow_recipe_change,
            self.checkpointer,
            prepared,
            self.average,
            self.run_facts,
            world_size,
            self.total_steps,
        )
        self.first_step, self.seconds_before = beginning.step, beginning.seconds
        if beginning.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(beginning.scaler)
        engine.start_trackers(accelerator, recipe, *self.run_dir.identity(), self.first_step)
        self.stop = StopRequests(self.run_dir.path, looks=self.main)
        progress = Progress(self.total_steps, self.first_step, train.global_batch, self.main)
        self.log = RunLogger(self.run_dir, accelerator, progress)
        self.reports = StepMetrics(
            recipe,
            self.order.steps_per_epoch,
            self.total_steps,
            world_size,
            self.objective,
            self.learning_rate,
            assembly.gram_rows(recipe, self.order),
            self.log,
            beginning.replaced_images,
            accelerator.scaler is not None,
        )
        for line in (
            *beginning.notes,
            *self.notes,
            *announcement(
                recipe,
                self.order,
                training,
                self.workers,
                parameter_counts(prepared),
                self.teacher,
                self.device.type,
                self.total_steps,
                self.batches.shared_bytes + self.validation.shared_bytes,
            ),
        ):
            self.log.say(line)
        # Of all groups: those that an engine has made for itself have a timeout of torch's.
        process_group.set_timeouts(recipe.run.start_timeout, but=self.checkpointer.groups())
        self._wait_for_workers(recipe.run.start_timeout)

    def run(self) -> Evaluation:
        """Train to the end, evaluating on the way; leaves the finished student in the run directory.

        Raises:
            TrainingError: on every rank, such as when the loss is no longer finite.
            Stopped: on every rank: a signal or a stop file asked for it.
            LostRankError: another rank is gone.
        """
        try:
            with self.watch.names_lost_ranks():
                return self._run()
        except TrainingError:
            self.checkpointer.wait()
            self._tell_of_checkpoints()
            raise
        finally:
            self.run_dir.close()
            self.watch.close()

    def _run(self) -> Evaluation:
        started = time.monotonic()
        result: Evaluation | None = None
        if self.first_step > 0 and self._evaluation_is_due(self.first_step):
            result = self._evaluate(self.first_step, iter(self.validation))
            if result is None:
                self._stop(self.first_step)
        # Here and behind each evaluation, not in every step: with many modules it takes its time. What an engine says
        # of its own mode need not be the model's.
        self.student.train()
        batches = self.batches.steps(self.first_step, self.total_steps)
        clock = time.monotonic()
        pending: AsyncMean | None = None
        for step in range(self.first_step, self.total_steps):
            self._reach(step, 0, 0)
            terms, counts = self._step(step, batches)
            # From report to report, since a GPU still computes when `_step` returns; reading the last step's means has
            # waited for it.
            now = time.monotonic()
            counts["seconds"], clock = now - clock, now
            counts["minutes_over"] = float(self.main and self.checkpoint_schedule.minutes_over())
            counts["stop"] = float(self.stop.asked_by() is not None)
            # Averaged over ranks while the next step computes; so every rank reads the same numbers, one step late, and
            # none waits.
            means = AsyncMean(step, terms, counts)
            self.reports.read(pending)
            if step == self.first_step + 1:
                # All have come through a first step, and compiled what they compile; from now on, one that does not
                # come is lost.
                self._shorten_timeouts()
            pending = means
            stops = self.reports.stop_is_asked and step + 1 < self.total_steps
            saves = self.checkpoint_schedule.due(step + 1, self.reports.minutes_are_over) or stops
            evaluates = self._evaluation_is_due(step + 1) and not stops
            if saves or evaluates:
                self.reports.read(pending)  # nothing is saved of a step that would have ended the run
                pending = None
                if evaluates:
                    # Worker processes are forked while no other thread runs that could hold a lock.
                    self.checkpointer.wait()
                    loading = iter(self.validation)
                if saves:
                    self._save_checkpoint(
                        step + 1, self.seconds_before + now - started
                    )  # before an evaluation that may fail
                if stops:
                    self._stop(step + 1)
                if evaluates:
                    result = self._evaluate(step + 1, loading)
                    if result is None:
                        if not saves:
                            self._save_checkpoint(step + 1, self.seconds_before + now - started)
                        self._stop(step + 1)
                clock = time.monotonic()
            self._tell_of_checkpoints()
        assert result is not None
        self._finish(result, self.seconds_before + time.monotonic() - started)
        return result

    def _evaluation_is_due(self, steps_done: int) -> bool:
        epoch, rest = divmod(steps_done, self.order.steps_per_epoch)
        return steps_done == self.total_steps or (rest == 0 and epoch % self.recipe.evaluation.every_epochs == 0)

    def _shorten_timeouts(self) -> None:
        timeout = self.recipe.run.collective_timeout
        process_group.set_timeouts(timeout, but=self.checkpointer.groups())
        self.watch.warn_after = engine.warn_after(self.accelerator, timeout)
        self._wait_for_workers(timeout)

    def _wait_for_workers(self, timeout: float) -> None:
        """Set how long a worker process may read nothing: less than the other ranks wait for this one, so that all hear
        why it ends."""
        self.batches.timeout = self.validation.timeout = WORKERS_SHARE * timeout

    def _stop(self, steps_done: int) -> NoReturn:
        """End the run on all ranks, behind the checkpoint that is being written of this step."""
        self.checkpointer.wait()
        self._tell_of_checkpoints()
        asked = [by for by in all_gather_objects(self.stop.asked_by(look=True)) if by is not None]
        by = STOP_FILE if STOP_FILE in asked else asked[0]
        error, _ = run_on_main(self.main, lambda: self._checkpoint_error)
        if error is not None:
            raise TrainingError(
                f"asked to stop by {by}, but the checkpoint after step {steps_done} could not be written: {error}"
            )
        mark = self.run_dir.mark_stopped
        _, reason = run_on_main(self.main, lambda: mark(by, steps_done, self.total_steps, steps_done - self.first_step))
        if reason is not None:
            raise TrainingError(
                f"asked to stop by {by}, after step {steps_done}; {self.run_dir.path} cannot be marked as stopped: "
                f"{reason}"
            )
        self.log.close()
        raise Stopped(steps_done, by)

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Number], dict[str, Number]]:
        """One optimizer step over the global batch. Returns this rank's share of the loss terms, and of what else is
        counted."""
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.statistics.start_step()
        sums: tuple[dict[str, Number], dict[str, Number]] = {}, {}
        asked = time.monotonic()
        micro_batches = [next(batches) for _ in range(self.order.micro_steps)]
        waited = time.monotonic() - asked
        failures = tuple(batch.failure for batch in micro_batches if batch.failure)
        unreadable = tuple(message for batch in micro_batches for message in batch.unreadable)
        loading = self.reports.note_loading(step, failures, unreadable)
        self._reach(step, 0, 1)
        skipped = False
        cached = self._relational_pass(step, micro_batches) if self.two_passes else None
        for micro_step, batch in enumerate(micro_batches):
            with self.accelerator.accumulate(self.student):
                self._reach(step, micro_step, 2)
                total, *logged = self._losses(step, micro_step, batch, cached)
                self._reach(step, micro_step, 3)
                self.accelerator.backward(total)
                self.statistics.finish_micro_batch()
                skipped = self._update()
            for summed, values in zip(sums, logged, strict=True):
                for name, value in values.items():
                    # Nothing is computed where there is one micro-step: on GPUs these would be a dozen launches a step.
                    share = value if self.order.micro_steps == 1 else value / self.order.micro_steps
                    summed[name] = summed[name] + share if name in summed else share
        if skipped:
            self.statistics.forget_step()
        else:
            self.statistics.finish_step()
            if self.average is not None:
                self.average.update()
        terms, counts = sums
        return terms, {**counts, "seconds_waited": waited, "skipped": float(skipped), **loading}

    def _update(self) -> bool:
        """After a micro-batch: the optimizer's step, when it was the last of its step. Returns whether that was left
        out, on every rank, because the gradient is not finite. A gradient scaler's is so now and then."""
        last = self.accelerator.sync_gradients
        if last and self.recipe.train.clip_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.train.clip_grad_norm)
        # DeepSpeed has stepped in `backward`, or not, by a check of its own; a gradient scaler makes its own, and
        # overflows by design.
        checked = self.engine not in launch.ZERO_ENGINES and self.accelerator.scaler is None
        if last and checked and self.recipe.train.skip_nonfinite > 0 and not gradient_is_finite(self.student):
            self.optimizer.zero_grad()
            return True
        self.optimizer.step()
        self.optimizer.zero_grad()
        return last and not checked and self.accelerator.optimizer_step_was_skipped

    def _reach(self, step: int, micro_step: int, phase: int) -> None:
        """Leave word for the other ranks how far this one is."""
        micro = f", micro-step {micro_step + 1}" if self.order.micro_steps > 1 and phase > 1 else ""
        self.watch.reach([step, 2, micro_step, phase], f"step {step + 1}{micro}, {_PHASES[phase]}")

    def _losses(
        self, step: int, micro_step: int, batch: Batch, cached: CachedGradient | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Forward of one micro-batch through teacher and student. Returns what to back-propagate, the loss terms, and
        what else to log."""
        batch = self._on_device(step, micro_step, batch)
        labels = batch.labels
        images = self.forward.images(batch)
        # What pass 1 has of the teacher is no function of the images any more.
        again = cached is None or images.requires_grad
        teacher = self.forward.teacher(batch, images) if again else cached.teachers[micro_step]  # type: ignore[union-attr]
        student = self._student_outputs(step, micro_step, images)
        objective = self.objective if cached is None else self.separable
        # Training batches are even by construction. The first step checks that ranks agree on the shapes of everything
        # they will exchange.
        layout = BatchLayout.even(len(labels))
        if step == self.first_step and micro_step == 0:
            BatchLayout.agree([*student.features.values(), *(teacher.features.values() if teacher else ()), labels])
        total, terms = objective(student, teacher, labels, step=step, layout=layout)
        if cached is None:
            return total, terms, {"loss": total.detach()}
        compared = step - self.first_step < STEPS_THAT_COMPARE_PASSES
        difference = cached.difference(micro_step, student.features) if compared else torch.zeros_like(total)
        counts = {"loss": total.detach() + cached.total, "pass_difference": difference}
        return total + cached.loss(micro_step, student.features), {**terms, **cached.terms}, counts

    @torch.no_grad()
    def _relational_pass(self, step: int, micro_batches: Sequence[Batch]) -> CachedGradient:
        """Passes 1 and 2 of `two_passes.py`; the teacher runs here, once."""
        students, teachers, labels = [], [], []
        for micro_step, loaded in enumerate(micro_batches):
            batch = self._on_device(step, micro_step, loaded)
            labels.append(batch.labels)
            images = self.forward.images(batch)
            teacher = self.forward.teacher(batch, images)
            assert teacher is not None
            teachers.append(teacher)
            features = self._student_outputs(step, micro_step, images).features
            students.append({path: features[path] for path in self.relational.student_taps})
            self.statistics.forget_micro_batch()
        if step == self.first_step:
            BatchLayout.agree([*students[0].values(), *teachers[0].features.values(), labels[0]])
        with torch.enable_grad():
            return relational_gradient(self.relational, students, teachers, torch.cat(labels), step)

    def _on_device(self, step: int, micro_step: int, batch: Batch) -> Batch:
        """A loaded micro-batch on this rank's device, its images mixed where the recipe says so: the same each time it
        is asked for."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        if self.mixing is not None:
            images, labels = self.mixing(images, labels, self._seed(step, micro_step, _MIXING))
        return Batch(images, labels, batch.valid)

    def _seed(self, step: int, micro_step: int, purpose: int) -> int:
        """Of what is random for a micro-batch. It depends on the micro-batch, not on the rank, and the second pass
        repeats the first."""
        return derive_seed(self.recipe.run.seed, step, micro_step * self.order.world_size + self.order.rank, purpose)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.forward.logits(
            self.forward.images(batch._replace(images=batch.images.to(self.device, non_blocking=True)))
        )

    def _student_outputs(self, step: int, micro_step: int, images: torch.Tensor) -> Outputs:
        seed_device(self.device, self._seed(step, micro_step, _FORWARD))
        return self.forward.student(images)

    def _evaluate(self, steps_done: int, loading: Iterator[Batch]) -> Evaluation | None:
        """On the average of the weights, if one is kept. None: the run was asked to stop meanwhile."""

        def is_asked_to_stop(batch: int) -> bool:
            self.watch.reach([steps_done, 1, batch], f"evaluation after step {steps_done}, batch {batch + 1}")
            return self.stop.asked_by() is not None

        self.student.eval()
        begun = time.monotonic()
        skip = self.recipe.data.on_error == "skip"
        try:
            with self.average.applied() if self.average else nullcontext():
                result = evaluate(self._logits, self.validation, self.device, skip, loading, is_asked_to_stop)
        except DataError as error:
            raise TrainingError(f"evaluation after step {steps_done}: {error}") from error
        finally:
            self.student.train()
        if result is None:
            return None
        if result.unreadable:
            self.log.say(f"warning: {result.unreadable} validation images cannot be read and do not count")
        if result.problem:
            self.log.say(f"warning: evaluation after step {steps_done}: {result.problem}")
        facts = {"steps": steps_done, "epoch": steps_done / self.order.steps_per_epoch, **result.facts()}
        self.checkpointer.evaluations[steps_done] = result.top1
        line = {"evaluation": facts, "seconds": round(time.monotonic() - begun, 3)}
        self.log.write(line, {"evaluation/top1": result.top1, "evaluation/loss": result.loss}, steps_done)
        self.log.say(
            f"epoch {facts['epoch']:g}: top-1 {result.top1:.4f} ({result.top1_correct}/{result.samples}), loss "
            f"{result.loss:.4f}"
        )
        return result

    def _save_checkpoint(self, steps_done: int, seconds: float) -> None:
        """All ranks copy their part of the state; it is written while training goes on."""
        begun = time.monotonic()
        self.watch.reach([steps_done, 0], f"checkpoint after step {steps_done}")
        exported = self._exported({"steps": steps_done})
        scaler = self.accelerator.scaler
        facts = checkpoint_facts(
            steps_done,
            self.recipe,
            self.order.world_size,
            self.engine,
            self.run_facts,
            seconds=round(seconds, 1),
            replaced_images=self.reports.replaced,
            scaler=None if scaler is None else scaler.state_dict(),
        )

        def write_beside(folder: Path) -> None:
            self._write_student(folder, exported)
            write_facts(folder, facts, self.recipe)

        self.log.sync()  # going on from this checkpoint, lines up to it are not written again
        self.checkpointer.save(steps_done, write_beside, begun)
        self.reports.minutes_are_over = False

    def _tell_of_checkpoints(self) -> None:
        """Log what was written meanwhile."""
        for written in self.checkpointer.finished():
            error = self._checkpoint_error = written.error
            if error is not None:
                self.log.say(
                    f"warning: the checkpoint after step {written.step} could not be written ({error}); training goes "
                    "on, older ones stay"
                )
            if written.warning is not None:
                self.log.say(f"warning: older checkpoints could not be removed ({written.warning})")
            self.log.write({"checkpoint": asdict(written)})

    def _exported(self, facts: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The student's whole weights, on the main process, and what is to be said of them. All ranks gather them."""
        with self.average.applied() if self.average else nullcontext():
            state = full_state(self.accelerator, self.student)
        description = {
            "image_size": self.image_size,
            "normalization": {"mean": list(self.normalize.mean), "std": list(self.normalize.std)},
            "weights": "average" if self.average else "last",
            **facts,
        }
        return state, description

    def _write_student(self, folder: Path, exported: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
        save_student(folder, recipe_objects.student_spec(self.recipe), *exported)

    def _finish(self, result: Evaluation, seconds: float) -> None:
        facts = {
            "steps": self.total_steps,
            "evaluation": result.facts(),
            "parameters": self.parameters,
            "seconds": round(seconds, 1),
            "global_batch": self.recipe.train.global_batch,
            "world_size": self.order.world_size,
            **({"replaced_images": self.reports.replaced} if self.reports.replaced else {}),
        }
        exported = self._exported(facts)
        self.checkpointer.wait()
        self._tell_of_checkpoints()

        def write() -> str | None:
            return self.run_dir.finish(self.total_steps, lambda folder: self._write_student(folder, exported))

        elsewhere, not_written = run_on_main(self.main, write)
        checkpoint_error, _ = run_on_main(self.main, lambda: self._checkpoint_error)
        not_removed = (
            self.checkpointer.prune() if self.main and elsewhere is None else None
        )  # now that the last evaluation is known
        if not_removed is not None:
            self.log.say(f"warning: older checkpoints could not be removed ({not_removed})")
        self.log.close()
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
        if result.problem:
            raise TrainingError(
                f"the finished student, in {self.run_dir.path}, is of no use: {result.problem}; try a lower "
                "optimizer.lr, "
                "a longer warm-up, train.clip_grad_norm, or train.precision=fp32"
            )
        if self.reports.replaced:
            self.log.say(f"{self.reports.replaced} images could not be read and were replaced by others")
        self.log.say(f"finished in {seconds:.0f} s: {self.run_dir.path}/student.safetensors, top-1 {result.top1:.4f}")
