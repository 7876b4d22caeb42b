"""What a training, or whatever else computes for a recipe on all ranks, opens before it builds models."""

from __future__ import annotations

from dataclasses import dataclass

from dkd.build.data import DataParts, KnnSources, sampled_content
from dkd.build.links import read_links
from dkd.build.models import student_parameters
from dkd.build.objective import build_objective, class_weights
from dkd.build.teacher_cache import open_caches
from dkd.config import Recipe, RecipeError
from dkd.config.derived import caches
from dkd.data import DataError, GlobalBatchSampler, ImageSource
from dkd.distillation import Objective, OneTeacher, TeacherGroup
from dkd.distillation.stored_teacher import StoredTeacher
from dkd.distillation.teacher_group import members_of
from dkd.distributed.heartbeat import Heartbeat
from dkd.distributed.process_group import open_process_group
from dkd.engines.accelerated import AcceleratedEngine
from dkd.engines.arithmetic import Arithmetic, device_type
from dkd.engines.opening import open_engine
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch
from dkd.preflight.agreement import check_same_data, check_same_recipe
from dkd.preflight.completion import compare_student, complete
from dkd.preflight.data import open_knn, open_sources
from dkd.preflight.hardware import settle
from dkd.preflight.launch import launch_problems
from dkd.preflight.models import check_class_order
from dkd.runs.directory import RunDirectory
from dkd.runs.launches import IfRunExists
from dkd.training.schedule import RunSchedule


@dataclass(frozen=True)
class Opened:
    """Holds what a training opens before it builds anything: images, the process group, the engine."""

    recipe: Recipe
    launch: Launch
    engine: AcceleratedEngine
    heartbeat: Heartbeat
    run_dir: RunDirectory
    training: ImageSource
    validation: ImageSource | None
    knn: KnnSources | None
    notes: list[str]
    """Lines to report: what was chosen for the hardware, and what data and models state."""


def open_training(recipe: Recipe, launch: Launch, if_run_exists: IfRunExists | None) -> Opened:
    """Open data, process group and engine. A collective; `if_run_exists` as `settle`."""
    recipe, completed = complete(recipe)
    training, validation = open_sources(recipe, launch)
    knn = open_knn(recipe, training, validation)
    completed += [*compare_student(recipe), *check_class_order(recipe, training.class_names)]
    run_dir = RunDirectory(recipe.run.dir, writes=False)
    # The first thing that the ranks of a start do together.
    on_cpu = device_type(launch.asks_for_cpu) == "cpu"
    open_process_group(launch, on_cpu, recipe.run.start_timeout, run_dir.path)
    check_same_recipe(recipe)
    # From here on, the recipe leaves nothing to the hardware.
    recipe, notes = settle(recipe, launch, if_run_exists)
    # Such as a run in fp16 that is resumed on CPUs: the same on every rank, since the recipe now is.
    if problems := launch_problems(recipe, launch):
        raise RecipeError(problems)
    engine = open_engine(recipe, launch, run_dir.path, lambda: student_parameters(recipe))
    heartbeat = Heartbeat(launch, engine.warn_after(recipe.run.start_timeout))
    return Opened(recipe, launch, engine, heartbeat, run_dir, training, validation, knn, [*notes, *completed])


def build_losses(opened: Opened, sampler: GlobalBatchSampler, schedule: RunSchedule) -> Objective:
    """Return the recipe's losses. Raises RecipeError, UserCodeError."""
    recipe, training, device = opened.recipe, opened.training, opened.engine.device
    return build_objective(
        recipe,
        sampler,
        schedule.planned_steps,
        device,
        class_weights(recipe, training),
        read_links(recipe, device.type)[0],
        Arithmetic.of(recipe).dtype,
        training.labels if recipe.data.labels else None,
    )


def read_caches(
    opened: Opened,
    objective: Objective,
    data: DataParts,
    teacher: OneTeacher | TeacherGroup | None,
    schedule: RunSchedule,
) -> dict[str, StoredTeacher]:
    """Return, by name, what gives the outputs of each teacher that has a cache. A collective. Raises RecipeError on
    every rank."""
    if not caches(opened.recipe):
        return {}
    content, problem = dict[str, str](), None
    try:
        content = sampled_content(opened.training, data.pipeline, data.sampler.seed)
    except DataError as error:
        problem = str(error)
    problems = [each for each in all_gather_objects(problem) if each is not None]
    if problems:
        raise RecipeError.at("data.train", problems[0])
    check_same_data({"data.train": {**data.facts, **content}})
    fingerprints = {name: each.fingerprint for name, each in members_of(teacher).items()}
    device = opened.engine.device
    return open_caches(opened.recipe, objective, data, fingerprints, content, device, schedule.total_steps)
