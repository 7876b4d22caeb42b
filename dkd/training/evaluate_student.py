"""Exact evaluation of a student on disk, on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkd.build.data import (
    KnnSources,
    build_image_pipeline,
    data_facts,
    loader_workers,
    open_parts,
    teacher_normalize,
)
from dkd.build.models import build_teacher, pairs, teacher_spec
from dkd.config import Recipe, RecipeError, load_recipe, parse_overrides
from dkd.data import EvaluationLoader, ImageSource
from dkd.data.loader import Batch
from dkd.data.sources import runs_user_code
from dkd.distillation import FrozenTeacher, Objective
from dkd.distillation.forward import Forward
from dkd.distributed.main_process import run_on_main
from dkd.distributed.process_group import open_process_group
from dkd.engines.arithmetic import Arithmetic, device_type
from dkd.engines.opening import open_engine
from dkd.launch import Launch
from dkd.models import (
    ModelSpec,
    TapError,
    TappedModel,
    UnknownModelError,
    WeightsError,
    build_on_meta,
    check_weights,
    load_student,
    read_description,
    student_spec,
)
from dkd.models.feature_reader import FeatureReader, feature_width
from dkd.models.registry import runs_user_code as names_user_code
from dkd.preflight.agreement import check_same_teacher
from dkd.preflight.collecting import input_errors_at
from dkd.preflight.data import knn_place_problems, open_knn, open_validation
from dkd.preflight.hardware import settle
from dkd.training.agreement import AgreementMeter
from dkd.training.evaluation import Evaluation, evaluate
from dkd.training.knn import measure_knn
from dkd.training.knn_accuracy import KnnAccuracy
from dkd.training.predictions import Predictions, check_destination

ALLOWED_OVERRIDES = ("data.", "evaluation.", "train.precision", "train.channels_last")
_KNN = "evaluation.knn"
_WITH_TEACHER = ("teacher.weights", "teacher.placement")


@dataclass(frozen=True)
class StudentEvaluation:
    """Holds what was evaluated, and the result.

    Args:
        weights: the student's file.
        student: name of its architecture.
        validation: the data, as a recipe names them.
        notes: what was chosen for this hardware.
        class_names: of the data; None: they have none.
        predictions: the file of predictions that was asked for; None: none was.
        predictions_problem: why that file could not be written; None: it was.
        precision: that forwards were computed in, as `train.precision` names it.
    """

    weights: Path
    student: str
    validation: str
    result: Evaluation
    notes: tuple[str, ...] = ()
    class_names: Sequence[str] | None = None
    predictions: Path | None = None
    predictions_problem: str | None = None
    precision: str = ""

    def details(self) -> dict[str, Any]:
        """Return `facts`, and the counts of each class and the confusion matrix."""
        return {**self.facts(), **self.result.facts_of_classes(self.class_names)}

    def facts(self) -> dict[str, Any]:
        """Return what JSON can hold of it, of a size that does not depend on the classes."""
        named = {"weights": str(self.weights), "student": self.student, "validation": self.validation}
        named["precision"] = self.precision
        return {**named, **self.result.facts()}


def evaluate_student(
    target: str | Path,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
    launch: Launch | None = None,
    *,
    teacher: bool = False,
    predictions: str | Path | None = None,
    overwrite: bool = False,
) -> StudentEvaluation:
    """Evaluate the student of a run, a checkpoint or a weights file on the run's validation data. A collective.

    Args:
        target: a run directory, RUN/checkpoints/step_N, or a .safetensors file in one of them.
        overrides: keys of the run's recipe, such as data.validation=...
        trust_code: as `load_student`.
        launch: of this process; None: as its environment describes it.
        teacher: whether the student is compared with the recipe's teacher, whose weights must be there.
        predictions: a parquet file to be written with a row for each image; None: none is written.
        overwrite: whether `predictions` may exist, and be replaced.

    Raises:
        RecipeError: what is missing or does not fit.
    """
    launch = launch or Launch.read()
    weights, recipe = _find(Path(target), overrides, launch.world_size, teacher)
    description, spec, student = _load(weights, trust_code)
    _check(recipe, trust_code)
    if predictions is not None and launch.is_main:
        check_destination(Path(predictions), overwrite)
    _check_fraction(weights, recipe, description)
    validation = open_validation(recipe, spec.classes, description.get("class_names"))

    knn = _open_knn(recipe, validation, spec)
    open_process_group(launch, device_type(launch.asks_for_cpu) == "cpu", recipe.run.start_timeout)
    recipe, notes = settle(recipe, launch)
    untracked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"trackers": []})})
    device = open_engine(untracked, launch, weights.parent).device
    batches = _open_batches(recipe, validation, launch)
    models = _Models(recipe, launch, student, spec.classes, device)
    if predictions is not None:
        place, main = Path(predictions), launch.is_main
        models.predictions = Predictions(place, validation, batches, spec.classes, device, main, overwrite)
    names = description.get("class_names") or validation.class_names
    result, problem = models.evaluate(batches, names)
    if knn is not None:
        result = replace(result, knn=models.measure_knn(knn, spec))
    written = None if predictions is None else Path(predictions)
    data, how = str(recipe.data.validation), recipe.train.precision
    return StudentEvaluation(weights, spec.name, data, result, tuple(notes), names, written, problem, how)


def _check_fraction(weights: Path, recipe: Recipe, description: Mapping[str, Any]) -> None:
    """Check that a fraction of the training images is the one that was set aside: with other data, or as another
    fraction, it would hold images that the student was trained on. Raises RecipeError."""
    fraction, trained = recipe.data.validation, description.get("training_data")
    if not isinstance(fraction, float):
        return
    before = load_recipe(_recipe_of(weights)).data.validation
    if before != fraction:
        raise RecipeError.at(
            "data.validation", f"the run has set aside {before}, not {fraction:g}; other fractions hold training images"
        )
    if trained is not None and trained != data_facts(open_parts(recipe)[0]):
        raise RecipeError.at(
            "data.validation",
            f"{fraction:g} of data.train was set aside from other images than are there now, and would hold training "
            "images; name images, such as data.validation=folder:PATH",
        )


def _open_knn(recipe: Recipe, validation: ImageSource, spec: ModelSpec) -> KnnSources | None:
    """Open the images of the k-NN accuracy, where it is asked for. Raises RecipeError."""
    section = recipe.evaluation.knn
    if section is None:
        return None
    with input_errors_at("evaluation.knn.tap"):
        feature_width(spec, section.tap, build_image_pipeline(recipe).image_size)
    if problems := knn_place_problems(recipe):
        raise RecipeError(problems)
    with input_errors_at("data.train"):
        training = open_parts(recipe)[0] if section.train is None else None
    return open_knn(recipe, training, validation)


def _open_batches(recipe: Recipe, validation: ImageSource, launch: Launch) -> EvaluationLoader:
    """Return this rank's batches."""
    pipeline = build_image_pipeline(recipe)
    return EvaluationLoader(
        validation,
        pipeline.validation,
        recipe.evaluation.batch,
        launch.rank,
        launch.world_size,
        loader_workers(recipe.data, validation, launch.local_world_size),
        image_size=pipeline.image_size,
        timeout=recipe.run.start_timeout,
    )


class _Models:
    """Runs a student, and its teacher where it is compared with one, as training runs them. A collective where there is
    a teacher.

    Args:
        recipe: settled; its teacher is None where there is nothing to compare with.
        student: on the CPU.
        classes: of the student.
        device: of this rank.
    """

    def __init__(self, recipe: Recipe, launch: Launch, student: nn.Module, classes: int, device: torch.device) -> None:
        arithmetic = Arithmetic.of(recipe)
        taps = list(dict.fromkeys(pairs(recipe))) if recipe.teacher is not None else []
        self._recipe, self._device, self._launch, self._plain = recipe, device, launch, student
        self._teacher: FrozenTeacher | None = None
        self._meter: AgreementMeter | None = None
        self.predictions: Predictions | None = None
        try:
            tapped = TappedModel(student, [path for path, _ in taps], autocast=arithmetic.autocast).eval()
            self._teacher = build_teacher(recipe, launch, arithmetic, device)
        except (WeightsError, TapError) as error:
            raise RecipeError.at("teacher.weights" if isinstance(error, WeightsError) else "", error) from error
        if self._teacher is not None:
            check_same_teacher(self._teacher.fingerprint)
            same_classes = teacher_spec(recipe).classes == classes
            self._meter = AgreementMeter(taps, same_classes, device, recipe.data.labels)
        normalize = build_image_pipeline(recipe).normalize
        self._forward = Forward(
            arithmetic.place(tapped, device),
            self._teacher,
            Objective([]),
            normalize,
            teacher_normalize(recipe, normalize),
            arithmetic.dtype,
            arithmetic.memory_format,
        )

    def evaluate(self, batches: EvaluationLoader, names: Sequence[str] | None) -> tuple[Evaluation, str | None]:
        """Evaluate, and write the predictions. A collective.

        Returns:
            The same on every rank: the numbers, and why the predictions could not be written, or None.

        Raises:
            DataError: on every rank: images cannot be read.
        """
        with ExitStack() as inside:
            if self._teacher is not None:
                inside.enter_context(self._teacher.with_logits())
            if self.predictions is not None:
                inside.callback(self.predictions.close)
            data = self._recipe.data
            result = evaluate(self._logits, batches, self._device, data.on_error == "skip", labels=data.labels)
            assert result is not None  # nobody asks it to stop
            if self._meter is not None:
                result = replace(result, agreement=self._meter.over_ranks())
            if self.predictions is None:
                return result, None
            write = partial(self.predictions.write, names, result.samples)
            return result, run_on_main(self._launch.is_main, write)[1]

    def measure_knn(self, sources: KnnSources, spec: ModelSpec) -> KnnAccuracy:
        """Measure the k-NN accuracy. A collective. Raises DataError on every rank: images cannot be read."""
        recipe, section = self._recipe, self._recipe.evaluation.knn
        assert section is not None
        reader = FeatureReader(self._plain, spec, section.tap)

        def features(batch: Batch) -> torch.Tensor:
            self._forward.logits(batch.images.to(self._device, non_blocking=True))
            return reader.take()

        bank, queries = (_open_batches(recipe, each, self._launch) for each in (sources.bank, sources.queries))
        skip = recipe.data.on_error == "skip"
        with reader.reading():
            found = measure_knn(features, bank, queries, sources.classes, section, self._device, skip)
        assert found is not None  # nobody asks it to stop
        return found

    @torch.no_grad()
    def _logits(self, batch: Batch) -> torch.Tensor:
        images = batch.images.to(self._device, non_blocking=True)
        if self._meter is None:
            logits = self._forward.logits(images)
        else:
            student, teacher = self._forward.both(images, len(images))
            assert teacher is not None
            assert student.logits is not None
            self._meter.add(student, teacher, batch)
            logits = student.logits
        if self.predictions is not None:
            self.predictions.add(logits, batch)
        return logits


def _load(weights: Path, trust_code: bool) -> tuple[dict[str, Any], ModelSpec, nn.Module]:
    """Return the description of a student, its architecture, and the student on the CPU. Raises RecipeError."""
    try:
        description = read_description(weights)
        return description, student_spec(description), load_student(weights, trust_code)
    except (WeightsError, UnknownModelError) as error:
        raise RecipeError.at("", error) from error


def _check(recipe: Recipe, trust_code: bool) -> None:
    """Check that code that the recipe names may run, and that the teacher can be had. Raises RecipeError."""
    data, teacher = recipe.data, recipe.teacher
    allow = "is code to be imported and run; allow it with --trust-code"
    places = {"data.validation": data.train if isinstance(data.validation, float) else str(data.validation)}
    if (knn := recipe.evaluation.knn) is not None:
        places |= {f"{_KNN}.train": knn.train or data.train, f"{_KNN}.validation": knn.validation or ""}
    for key, place in places.items():
        if runs_user_code(place) and not trust_code:
            raise RecipeError.at(key, f"{place!r} {allow}")
    if teacher is None:
        return
    if names_user_code(teacher.name) and not trust_code:
        raise RecipeError.at("teacher.name", f"{teacher.name!r} {allow}")
    if teacher.weights != "random":
        try:
            spec = teacher_spec(recipe)
            check_weights(build_on_meta(spec), spec.name, teacher.weights)
        except (WeightsError, UnknownModelError) as error:
            raise RecipeError.at("teacher.weights", error) from error


def _recipe_of(weights: Path) -> Path:
    """Return the recipe.yaml of the run that a student's file belongs to. Raises RecipeError."""
    folders = [weights.parent, *weights.resolve().parents[1:3]]
    path = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    if path is None:
        raise RecipeError.at("", f"{str(weights.parent)!r} belongs to no run: there is no recipe.yaml in it or above")
    return path


_ALONE = ("teachers={}", "losses={}", "optimizer.adapters={}")
"""Overrides that leave the student alone."""


def _find(target: Path, overrides: Sequence[str], world_size: int, teacher: bool) -> tuple[Path, Recipe]:
    """Return the student's file and the recipe of its run, with its teacher where that is asked for. Raises
    RecipeError."""
    if not target.exists():
        raise RecipeError.at("", f"no such run, checkpoint or weights file: {str(target)!r}")
    allowed = (*ALLOWED_OVERRIDES, *_WITH_TEACHER) if teacher else ALLOWED_OVERRIDES
    keys = [".".join(parts) for parts, _ in parse_overrides(overrides)]
    for key in keys:
        if not key.startswith(allowed):
            raise RecipeError.at(key, f"cannot be changed in an evaluation; what can: {', '.join(allowed)}")
    weights = target / "student.safetensors" if target.is_dir() else target
    path = _recipe_of(weights)
    # What is evaluated is the student, in batches of its own: these fit any launch.
    fitting = [f"train.global_batch={world_size}", "train.micro_batch=null", "evaluation.agreement=auto"]
    # An evaluation uses running statistics, and decides nothing.
    fitting += ["train.sync_batch_norm=false", "train.stop_when=null", "checkpoint.keep_best=0"]
    asks_for_knn = any(key.startswith(_KNN) for key in keys)
    if not asks_for_knn:  # it costs a forward of two data sets
        fitting.append(f"{_KNN}=null")
    if not teacher:
        return weights, _load_without_teacher(path, overrides, fitting, asks_for_knn)
    section = load_recipe(path, [*overrides, *fitting]).teacher
    if load_recipe(path).teachers:
        raise RecipeError.at("teachers", "--teacher compares with one teacher, and the run has several; leave it out")
    if section is None:
        raise RecipeError.at("teacher", "the run has no teacher to compare with; leave --teacher out")
    # Cut into shards, a teacher needs the student's engine under ZeRO-3 alone.
    placement = "fsdp2" if section.placement == "zero3" else section.placement
    own = [f"teacher.placement={placement}", "teacher.weights_dtype=auto"]
    # As in training, the teacher forwards at most a micro-batch.
    trained = load_recipe(path).train.micro_batch
    if trained is not None and not any(override.startswith("evaluation.batch=") for override in overrides):
        own.append(f"evaluation.batch={min(trained, load_recipe(path).evaluation.batch)}")
    return weights, load_recipe(path, [*overrides, *fitting, *own])


def _load_without_teacher(path: Path, overrides: Sequence[str], fitting: Sequence[str], asks_for_knn: bool) -> Recipe:
    """Return the recipe of a run, without its teacher. Raises RecipeError where its images have no labels, and nothing
    else is asked for."""
    asked = [value for keys, value in parse_overrides(overrides) if ".".join(keys) == "data.labels"]
    if [load_recipe(path).data.labels, *asked][-1] is not False:
        return load_recipe(path, [*overrides, *fitting, "teacher=null", *_ALONE])
    if not asks_for_knn:
        raise RecipeError.at(
            "data.labels",
            "the run's images have no labels: compare the student with its teacher by --teacher, or name images with "
            "labels, data.labels=true data.validation=folder:PATH",
        )
    # A recipe without labels has to have a teacher, which is not built here.
    return load_recipe(path, [*overrides, *fitting]).model_copy(update={"teacher": None, "teachers": {}})
