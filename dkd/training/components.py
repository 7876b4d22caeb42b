"""From a recipe and a launch to everything that a training is made of. Read `build_components` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dkd.build.data import DataParts, build_data, data_facts, describe_input
from dkd.build.models import build_models
from dkd.build.objective import compile_losses, gram_size
from dkd.build.optimizers import build_optimizer
from dkd.build.schedules import learning_rate
from dkd.build.teacher_stream import choose_teacher_stream
from dkd.checkpoints.checkpointer import Checkpointer
from dkd.checkpoints.facts import run_facts
from dkd.config import Recipe
from dkd.config.derived import data_seed, without_caches
from dkd.config.losses import with_constant_weights
from dkd.data import ImageSource
from dkd.distillation import Objective
from dkd.distillation.step import DistillationStep, mixing_seed
from dkd.distributed.heartbeat import Heartbeat
from dkd.distributed.stop_signals import StopRequests
from dkd.engines.accelerated import AcceleratedEngine
from dkd.engines.arithmetic import Arithmetic
from dkd.engines.base import TrainingTensors
from dkd.engines.ema import WeightAverage
from dkd.engines.loss_state import WithLossState
from dkd.launch import Launch
from dkd.models.compiling import compile_model
from dkd.preflight.agreement import check_same_data, check_same_teacher
from dkd.runs.directory import RunDirectory
from dkd.runs.launches import IfRunExists
from dkd.runs.logger import RunLogger
from dkd.runs.progress import Progress
from dkd.training.early_stopping import EarlyStopping
from dkd.training.metrics import StepMetrics
from dkd.training.opening import Opened, build_losses, open_training, read_caches
from dkd.training.resume import Restored, Resuming, resume_or_start
from dkd.training.saving import RunSaver
from dkd.training.schedule import RunSchedule
from dkd.training.state import TrainState
from dkd.training.summary import summarize
from dkd.training.teacher_caches import TeacherCaches


@dataclass
class Components:
    """Holds everything that a training is made of, on one rank."""

    recipe: Recipe
    """Nothing of it is left to the hardware."""
    launch: Launch
    engine: AcceleratedEngine
    heartbeat: Heartbeat
    schedule: RunSchedule
    data: DataParts
    step: DistillationStep
    caches: TeacherCaches
    """Where the outputs of teachers are stored and read."""
    average: WeightAverage | None
    """The moving average of the student's weights, where the recipe asks for one."""
    run_dir: RunDirectory
    checkpointer: Checkpointer
    facts: Mapping[str, Any]
    """What this run cannot change without being another run."""
    notes: list[str] = field(default_factory=list)
    """Lines to report at the start."""
    state: TrainState = field(default_factory=TrainState)
    learning_rate: Callable[[int], float] = field(init=False)
    """The learning rate of each step."""
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    """Ends nothing before `resume`: a trial of a recipe is no run."""
    log: RunLogger = field(init=False)
    metrics: StepMetrics = field(init=False)
    saver: RunSaver = field(init=False)
    stop: StopRequests = field(init=False)

    def resume(self, if_run_exists: IfRunExists, allow_recipe_change: bool) -> None:
        """Claim the run directory, and load the newest intact checkpoint in it. A collective. Raises RecipeError."""
        asked = Resuming(
            self.recipe,
            self.launch,
            self.run_dir,
            if_run_exists,
            allow_recipe_change,
            self.facts,
            self.schedule.total_steps,
        )
        restored = Restored(self.engine.model, self.average, self.step.objective.state())
        point = resume_or_start(asked, self.checkpointer, restored)
        self.engine.load_scaler_state(point.scaler)
        self.stopping = EarlyStopping.resumed(self.recipe.train.stop_when, point.stopping)
        self.state = TrainState(point.step, point.step, point.seconds, point.replaced_images, point.notes)

    def training_tensors(self) -> TrainingTensors:
        """Return what a checkpoint holds of student, optimizer, moving average and losses."""
        return training_tensors(self.engine, self.average, self.step)

    def open_log(self) -> None:
        """Build what reports and saves the run, now that its directory is claimed. A collective."""
        recipe, launch, schedule, state, engine = self.recipe, self.launch, self.schedule, self.state, self.engine
        engine.trackers.start(recipe, *self.run_dir.identity(), state.step)
        self.stop = StopRequests(self.run_dir.path, looks=launch.is_main)
        progress = Progress(schedule.total_steps, state.step, recipe.train.global_batch, launch.is_main)
        self.log = RunLogger(self.run_dir, engine.trackers, progress)
        self.learning_rate = learning_rate(
            recipe.schedule, recipe.optimizer.lr, schedule.steps_per_epoch, schedule.planned_steps
        )
        self.metrics = StepMetrics(
            recipe,
            schedule,
            state,
            launch.world_size,
            self.step.objective,
            self.learning_rate,
            gram_size(recipe, self.data.sampler),
            self.log,
            engine.leaves_out_updates,
        )
        self.saver = RunSaver(
            recipe,
            launch,
            engine,
            self.average,
            self.checkpointer,
            self.run_dir,
            self.log,
            state,
            self.facts,
            describe_input(self.data.pipeline, self.data.class_names, self.data.facts),
            schedule.total_steps,
            self.stopping,
        )

    def report_start(self, training: ImageSource) -> None:
        """Report how this start began, and what is about to be trained."""
        lines = summarize(self.recipe, self.launch, self.data, training, self.schedule, self.engine, self.step.teacher)
        for line in (*self.state.notes, *lines, *self.notes):
            self.log.say(line)


def training_tensors(
    engine: AcceleratedEngine, average: WeightAverage | None, step: DistillationStep
) -> TrainingTensors:
    """Return what a checkpoint holds of student, optimizer, moving average and losses."""
    return WithLossState(engine.training_tensors(average), step.objective.state)


def build_components(
    recipe: Recipe, launch: Launch, if_run_exists: IfRunExists, allow_recipe_change: bool
) -> Components:
    """Open data, process group and engine; build models and losses; resume the run, or start it. A collective.
    Arguments and errors as `Trainer.from_recipe`."""
    opened = open_training(recipe, launch, if_run_exists)
    with opened.heartbeat.names_lost_ranks():
        parts = _build(opened)
        with ExitStack() as on_failure:
            on_failure.callback(parts.run_dir.close)
            on_failure.callback(parts.heartbeat.close)
            on_failure.callback(parts.caches.close)
            parts.resume(if_run_exists, allow_recipe_change)
            if parts.state.step < parts.schedule.total_steps:
                parts.state.notes += parts.caches.prepare(parts.state.step)
            parts.open_log()
            parts.report_start(opened.training)
            on_failure.pop_all()
        return parts


def build_trial(recipe: Recipe, launch: Launch, with_caches: bool = False) -> Components:
    """Build what trains a recipe outside of any run: nothing is read from `run.dir` or written there, and no tracker
    starts; a loss weight that follows a schedule keeps its highest value. A collective. Arguments and errors as
    `Trainer.from_recipe`; `notes` holds what was chosen for the hardware.

    Args:
        with_caches: whether teachers have their caches; else they compute.
    """
    if not with_caches:
        recipe = without_caches(recipe)
    untracked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"trackers": []})})
    # A weight that changes with the steps would look like a loss that falls.
    opened = open_training(untracked.model_copy(update={"losses": with_constant_weights(recipe.losses)}), launch, None)
    with opened.heartbeat.names_lost_ranks():
        parts = _build(opened)
        with ExitStack() as on_failure:
            on_failure.callback(parts.heartbeat.close)
            parts.open_log()
            on_failure.pop_all()
        return parts


def _build(opened: Opened) -> Components:
    """Build everything that is there before the run directory is claimed. A collective."""
    recipe, launch, engine, run_dir = opened.recipe, opened.launch, opened.engine, opened.run_dir
    training, validation = opened.training, opened.validation
    arithmetic = Arithmetic.of(recipe)
    data = build_data(recipe, training, validation, launch, arithmetic.dtype, engine.device, opened.knn)
    # Names are compared between ranks, and are no part of what makes a run the same one.
    named = {**data.facts, "class_names": data.class_names}
    facts = {"data.train": named, "data.validation": {} if validation is None else data_facts(validation)}
    if (knn := opened.knn) is not None:
        facts |= {"evaluation.knn.train": data_facts(knn.bank), "evaluation.knn.validation": data_facts(knn.queries)}
    check_same_data(facts)
    schedule = RunSchedule(recipe, data.sampler.steps_per_epoch)
    objective = build_losses(opened, data.sampler, schedule)
    step, average, notes = build_step(recipe, engine, arithmetic, data, launch, objective)
    step.teaching.stored = read_caches(opened, objective, data, step.teacher, schedule)
    caches = TeacherCaches(recipe, step.teacher, schedule, step.teaching.stored)
    run_dir.writes = launch.is_main
    checkpointer = Checkpointer(
        recipe.checkpoint,
        run_dir.checkpoints,
        training_tensors(engine, average, step),
        launch.rank,
        launch.world_size,
        recipe.run.start_timeout,
    )
    return Components(
        recipe=recipe,
        launch=launch,
        engine=engine,
        heartbeat=opened.heartbeat,
        schedule=schedule,
        data=data,
        step=step,
        caches=caches,
        average=average,
        run_dir=run_dir,
        checkpointer=checkpointer,
        facts=run_facts(recipe, None if step.teacher is None else step.teacher.facts(), data.facts),
        notes=[*opened.notes, *notes],
    )


def _in_graph(recipe: Recipe, engine: AcceleratedEngine) -> bool:
    """Return whether the optimizer's updates may be captured. torch refuses AdamW's otherwise."""
    return recipe.train.graph is True and engine.fuses_updates and engine.device.type == "cuda"


def build_step(
    recipe: Recipe,
    engine: AcceleratedEngine,
    arithmetic: Arithmetic,
    data: DataParts,
    launch: Launch,
    objective: Objective,
) -> tuple[DistillationStep, WeightAverage | None, list[str]]:
    """Build student and teacher, and give the student, with what losses train beside it, to the engine. A collective.

    Returns:
        What a step computes, the moving average of the student's weights, and lines to report.
    """
    train = recipe.train
    student, teacher, notes = build_models(recipe, launch, arithmetic, engine.device, objective.adapters)
    check_same_teacher(teacher.fingerprint if teacher is not None else "")
    student = arithmetic.place(student, engine.device, to_be_sharded=engine.rules.shards_training)
    if teacher is not None:
        teacher.compile(train.compile.teacher)
    if train.compile.losses:
        compile_losses(objective, launch.world_size)
    engine.wrap(student, build_optimizer(recipe.optimizer, student, engine.fuses_updates, _in_graph(recipe, engine)))
    compile_model(student, train.compile.student)
    # Only a GPU gains from fewer operations: a CPU finds a weight in its cache that it has cast just now.
    is_alone = launch.world_size == 1 and not engine.rules.shards_training
    engine.model.cast_together(is_alone and engine.device.type == "cuda" and not train.compile.student)
    average = WeightAverage(engine.model, train.ema.decay, engine.student) if train.ema else None
    teacher_stream, reason = choose_teacher_stream(recipe, objective, engine.device)
    step = DistillationStep(
        engine.student,
        teacher,
        objective,
        micro_steps=data.sampler.micro_steps,
        model=engine.model,
        normalize=data.pipeline.normalize,
        teacher_normalize=data.teacher_normalize,
        dtype=arithmetic.dtype,
        memory_format=arithmetic.memory_format,
        mixing=data.mixing,
        seed=recipe.run.seed,
        seed_of_mixing=lambda step, place: mixing_seed(data_seed(recipe), data.sampler.drawn_step(step), place),
        may_skip=train.skip_nonfinite > 0 or engine.leaves_out_updates,
        teacher_stream=teacher_stream,
    )
    return step, average, [*notes, *([] if reason is None else [reason])]
