"""From a recipe to its models: architectures, taps, the student and the frozen teacher with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dkd.build.data import build_image_pipeline
from dkd.config import Recipe, RecipeError
from dkd.config.derived import classes, teacher_key, teacher_views
from dkd.config.schema import StudentSection, TeacherSection
from dkd.distillation import (
    FrozenTeacher,
    LazyTeacher,
    OneTeacher,
    TeacherGroup,
    fill,
    halve_weights,
    shard,
    shard_mesh,
)
from dkd.engines.arithmetic import Arithmetic
from dkd.engines.sharded_weights import parameter_counts
from dkd.launch import Launch
from dkd.models import (
    AS_BUILT,
    Adapter,
    Fingerprint,
    Head,
    ModelSpec,
    TappedModel,
    WeightsError,
    batch_norms,
    build_model,
    build_on_meta,
    freeze,
    head_keys,
    head_size,
    load_weights,
    stream_weights,
    unreached_parameters,
    weights_fingerprint,
)


def student_spec(recipe: Recipe) -> ModelSpec:
    """Return the student's architecture."""
    return _spec(recipe.student, classes(recipe))


def teacher_spec(recipe: Recipe) -> ModelSpec:
    """Return the teacher's architecture; the recipe has one."""
    assert recipe.teacher is not None
    return _spec(recipe.teacher, recipe.teacher.classes or classes(recipe))


def _spec(section: StudentSection | TeacherSection, outputs: int) -> ModelSpec:
    return ModelSpec(section.name, outputs, section.norm, section.options)


def student_head(recipe: Recipe) -> Head:
    """Return what becomes of the student's head where its weights were trained on other classes. Raises
    UnknownModelError."""
    if recipe.student.head == "keep" or not has_weights(recipe.student):
        return Head((), "keep")
    return Head(head_keys(student_spec(recipe)), recipe.student.head)


def has_weights(section: StudentSection | TeacherSection) -> bool:
    """Return whether a model is filled with weights, instead of staying as its constructor made it."""
    return section.weights not in (None, "random", AS_BUILT)


def pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (student path, teacher path) of all feature losses."""
    return [pair for _, section in recipe.losses.named() for pair in section.paths]


def student_parameters(recipe: Recipe) -> int:
    """Count the student's parameters, on the meta device."""
    return sum(parameter.numel() for parameter in build_on_meta(student_spec(recipe)).parameters())


def build_models(
    recipe: Recipe,
    launch: Launch,
    arithmetic: Arithmetic,
    device: torch.device,
    adapters: Mapping[str, Adapter] | None = None,
) -> tuple[TappedModel, OneTeacher | TeacherGroup | None, list[str]]:
    """Return the student on the CPU, each teacher on its device, with their weights, which may have to be downloaded,
    and lines that report what of the student does not come from its weights, or is not trained. `adapters` are what
    losses train with the student.

    Raises:
        RecipeError: the weights of one cannot be had or do not fit.
    """
    try:
        student, notes = build_student(recipe, adapters)
    except WeightsError as error:
        raise RecipeError.at("student.weights", error) from error
    return student, build_teachers(recipe, launch, arithmetic, device), notes


def build_student(recipe: Recipe, adapters: Mapping[str, Adapter] | None = None) -> tuple[TappedModel, list[str]]:
    """Return the student, on the CPU, its initial weights drawn from the run's seed: the same on every rank; and lines
    that report what does not come from its weights, or is not trained. `adapters` are what losses train with it.

    Raises:
        WeightsError: the weights cannot be had or do not fit.
        FreezingError: student.freeze names what does not exist, or leaves nothing to train.
    """
    section, notes = recipe.student, list[str]()
    torch.manual_seed(recipe.run.seed)
    model = build_model(student_spec(recipe))
    if has_weights(section):
        assert section.weights is not None
        new = load_weights(model, section.name, section.weights, student_head(recipe), section.options)
        notes += _note_new_head(recipe, new)
    if recipe.train.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        adapters = {
            name: adapter._replace(module=nn.SyncBatchNorm.convert_sync_batchnorm(adapter.module))
            for name, adapter in (adapters or {}).items()
        }
    frozen = freeze(model, section.freeze)
    untrained = names_untrained(recipe)
    freeze(model, untrained)
    notes += _note_frozen(recipe, model, untrained)
    still = batch_norms(frozen) if section.freeze_batch_norm else []
    # float16's autocast comes with Accelerate's loss scaling.
    autocast = torch.bfloat16 if recipe.train.precision == "bf16" else None
    taps = [student for student, _ in pairs(recipe)]
    return TappedModel(model, taps, autocast=autocast, eval_modules=still, adapters=adapters), notes


def expected_notes(recipe: Recipe) -> list[str]:
    """Return the lines that `build_student` will report, as far as they are known without loading weights.

    Raises:
        WeightsError: the file of weights cannot be read.
    """
    section, spec = recipe.student, student_spec(recipe)
    model, notes = build_on_meta(spec), list[str]()
    if has_weights(section) and (head := student_head(recipe)).keys:
        assert section.weights is not None
        found = head_size(model, section.name, section.weights, head.keys)
        if head.mode == "new" or (head.mode == "auto" and found not in (None, spec.classes)):
            notes += _note_new_head(recipe, list(head.keys))
    freeze(model, section.freeze)
    untrained = names_untrained(recipe)
    freeze(model, untrained)
    return [*notes, *_note_frozen(recipe, model, untrained)]


def names_untrained(recipe: Recipe) -> list[str]:
    """Return the names of the student's parameters that no loss reaches, where no loss reads its logits: those after
    the last tap. They are not trained; an engine would wait for their gradients."""
    if recipe.losses.reads_logits:
        return []
    size = build_image_pipeline(recipe).train_size
    taps = [student for student, _ in pairs(recipe)]
    return unreached_parameters(student_spec(recipe), 2, size, recipe.student.freeze, taps, reads_logits=False)


def _note_new_head(recipe: Recipe, keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    others = f"everything else from {recipe.student.weights}"
    return [f"student: a new head of {classes(recipe)} classes ({', '.join(keys)}); {others}"]


def _note_frozen(recipe: Recipe, model: nn.Module, untrained: Sequence[str]) -> list[str]:
    notes = []
    if untrained:
        named = ", ".join(untrained[:3]) + (", ..." if len(untrained) > 3 else "")
        notes.append(f"student: {named} stay as they are: no loss reads the logits, or a feature after them")
    if recipe.student.freeze:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = ", ".join(recipe.student.freeze)
        notes.append(f"student: {trained:,} parameters are trained, those of {frozen} are frozen")
    return notes


def build_teachers(
    recipe: Recipe, launch: Launch, arithmetic: Arithmetic, device: torch.device
) -> OneTeacher | TeacherGroup | None:
    """Return the teacher, several as a group, or None for a recipe without one. As `build_teacher`."""
    found: dict[str, OneTeacher] = {}
    for name, view in teacher_views(recipe):
        try:
            teacher = _build_or_promise(view, launch, arithmetic, device)
        except WeightsError as error:
            raise RecipeError.at(f"{teacher_key(name)}.weights", error) from error
        assert teacher is not None
        found[name] = teacher
    return found.get("", TeacherGroup(found) if found else None)


def _build_or_promise(view: Recipe, launch: Launch, arithmetic: Arithmetic, device: torch.device) -> OneTeacher | None:
    """Return the teacher of a view; where its outputs may be read from a cache, one that is built when it is needed. As
    `build_teacher`."""
    section = view.teacher
    if section is None or section.cache is None:
        return build_teacher(view, launch, arithmetic, device)

    def build() -> FrozenTeacher:
        teacher = build_teacher(view, launch, arithmetic, device)
        assert teacher is not None
        return teacher

    taps = sorted({teacher for _, teacher in pairs(view)})
    return LazyTeacher(build, {"name": section.name, "fingerprint": teacher_fingerprint(view), "taps": taps})


def teacher_fingerprint(view: Recipe) -> str:
    """Return the fingerprint of a teacher's weights, which are read, and not kept. Raises WeightsError."""
    section = view.teacher
    assert section is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(view.run.seed)
        on_meta = build_on_meta(teacher_spec(view))
        if has_weights(section) and _is_filled_by_state(on_meta):
            fingerprint = Fingerprint()
            weights = stream_weights(on_meta, section.name, section.weights, options=section.options)
            for name, tensor in weights:
                fingerprint.add(name, tensor)
            return fingerprint.hexdigest()
        model = build_model(teacher_spec(view))
        load_teacher_weights(model, section)
        return weights_fingerprint(model)


def build_teacher(recipe: Recipe, launch: Launch, arithmetic: Arithmetic, device: torch.device) -> FrozenTeacher | None:
    """Return the teacher on its device, replicated or in shards as `teacher.placement` states, or None for a recipe
    without one. A collective when it is cut into shards. On one rank there is nothing to share, and every placement is
    the replicated teacher.

    Raises:
        RecipeError: a rank keeps more of the teacher than its placement states.
        WeightsError: the weights cannot be had or do not fit.
    """
    section = recipe.teacher
    if section is None:
        return None
    placement = section.placement if launch.world_size > 1 else "replicated"
    torch.manual_seed(recipe.run.seed)
    if placement == "fsdp2" and has_weights(section):
        on_meta = build_on_meta(teacher_spec(recipe))
        if _is_filled_by_state(on_meta):
            return _check_share(_stream(recipe, on_meta, launch, arithmetic, device), section, placement, launch)
    model = build_model(teacher_spec(recipe))
    load_teacher_weights(model, section)
    fingerprint = weights_fingerprint(model)
    model = arithmetic.place(model, device, to_be_sharded=placement != "replicated")
    teacher = _freeze(recipe, model, arithmetic, placement, fingerprint)
    if placement == "fsdp2":
        shard(teacher, shard_mesh(section.mesh, device.type, launch.local_world_size))
    elif placement == "zero3":
        from dkd.engines.deepspeed import shard_teacher

        shard_teacher(teacher)
    return _check_share(teacher, section, placement, launch)


def load_teacher_weights(model: nn.Module, section: TeacherSection) -> None:
    """Fill a teacher with its weights, where its section names some. Raises WeightsError."""
    if has_weights(section):
        load_weights(model, section.name, section.weights, options=section.options)


def _stream(
    recipe: Recipe, on_meta: nn.Module, launch: Launch, arithmetic: Arithmetic, device: torch.device
) -> FrozenTeacher:
    """Return a teacher that no rank ever holds whole: each weight is read, and each rank keeps its rows of it."""
    section = recipe.teacher
    assert section is not None
    weights = stream_weights(on_meta, section.name, section.weights, options=section.options)
    teacher = _freeze(recipe, on_meta.to(arithmetic.dtype), arithmetic, "fsdp2")
    shard(teacher, shard_mesh(section.mesh, device.type, launch.local_world_size))
    teacher.to_empty(device=device)
    fingerprint = Fingerprint()
    fill(teacher.tapped.model, fingerprint.adding(weights))
    teacher.fingerprint = fingerprint.hexdigest()
    return teacher


def _freeze(
    recipe: Recipe, model: nn.Module, arithmetic: Arithmetic, placement: str, fingerprint: str = ""
) -> FrozenTeacher:
    section = recipe.teacher
    assert section is not None
    if section.weights_dtype == "bf16":
        halve_weights(model)
    # ZeRO-3 learns the order of a forward's modules, and needs all of the forward.
    needs_logits = bool(recipe.losses.needs_teacher_logits) or placement == "zero3"
    taps = [teacher for _, teacher in pairs(recipe)]
    autocast = arithmetic.autocast
    return FrozenTeacher(model, taps, needs_logits, section.input_size, autocast, fingerprint, section.name)


def _check_share(teacher: FrozenTeacher, section: TeacherSection, placement: str, launch: Launch) -> FrozenTeacher:
    """Return the teacher, when a rank keeps as much of it as its placement states. Raises RecipeError."""
    local, total = parameter_counts(teacher)
    sharing = launch.local_world_size if section.mesh == "node" else launch.world_size
    shards = 1 if placement == "replicated" else sharing
    if shards > 1 and local > 0.9 * total:
        raise RecipeError.at(
            "teacher.placement",
            f"{placement} over {shards} ranks, but each keeps {local:,} of {total:,} parameters",
        )
    return teacher


def _is_filled_by_state(model: nn.Module) -> bool:
    """Return whether a file of weights fills everything that the model holds: not so with buffers that it computes."""
    state = model.state_dict()
    return all(tensor.is_meta for tensor in state.values()) and all(name in state for name, _ in model.named_buffers())
