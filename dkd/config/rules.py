"""Check the rules that join several keys of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from dkd.config.derived import teacher_key, teacher_views
from dkd.config.image_sizes import sizes_by_epoch
from dkd.config.losses import ENSEMBLE, CrdSection, OneClassSection
from dkd.config.messages import Problem
from dkd.config.schema import Recipe
from dkd.text import did_you_mean

ON_DEVICE = ("cifar", "digits")
"""Transforms whose results are parts of an image: they can be cut on the device that trains."""


def broken_rules(recipe: Recipe) -> list[Problem]:
    """Return one problem for each rule between keys that `recipe` breaks."""
    models = (_check_teacher, _check_student, _check_agreement, _check_gradient_attention, _check_class_weights)
    checks = (
        *models,
        _check_label_losses,
        _check_mixing,
        _check_adapters,
        _check_batch,
        _check_data,
        _check_repeats,
        _check_sizes,
        _check_labels,
        _check_evaluation,
        _check_evaluation_without_labels,
        _check_several_teachers_without_labels,
        _check_knn,
    )
    return [problem for check in checks for problem in check(recipe)]


def _check_teacher(recipe: Recipe) -> Iterator[Problem]:
    losses, teacher = recipe.losses, recipe.teacher
    if recipe.teachers:
        yield from _check_teachers(recipe)
        return
    for key, section in losses.named():
        if section.teacher is not None:
            yield Problem(
                f"losses.{key}.teacher", f"{section.teacher!r} is one of several teachers, and there are no `teachers`"
            )
    if teacher is None:
        for name in losses.needs_teacher:
            removed = "" if "." in name else f", or remove it with losses.{name}=null"
            yield Problem(f"losses.{name}", f"needs a teacher; add `teacher`{removed}")
        return
    if not losses.needs_teacher:
        yield Problem(
            "teacher",
            "no loss uses it; add one that does, such as losses.at, losses.sp or losses.kd, or remove it with "
            "teacher=null",
        )
    classes = recipe.data.classes  # None: they are counted in the data, and then this is checked again
    if losses.needs_teacher_logits and classes is not None and teacher.classes not in (None, classes):
        needs = losses.needs_teacher_logits[0]
        yield Problem(
            "teacher.classes",
            f"{teacher.classes} is not data.classes={classes}, which losses.{needs} needs",
        )


def _check_teachers(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with several teachers and the losses that name them."""
    losses, names = recipe.losses, list(recipe.teachers)
    if recipe.teacher is not None:
        yield Problem("teacher", "there are `teachers`, too; move this one there, under a name")
    for key, section in losses.named():
        path, name = f"losses.{key}.teacher", section.teacher
        if not section.needs_teacher:
            if name is not None:
                yield Problem(path, f"{name!r}: this loss compares with no teacher; remove this key")
        elif name is None:
            yield Problem(path, f"is required with several teachers; take one of {', '.join(names)}")
        elif name == ENSEMBLE:
            if not section.needs_teacher_logits or len(names) < 2:
                yield Problem(path, f"{ENSEMBLE} is the mean of the logits of several teachers, for losses of logits")
        elif name not in names:
            yield Problem(path, f"{name!r} is none of teachers: {', '.join(names)}{did_you_mean(name, names)}")
    named = {section.teacher for _, section in losses.named() if section.needs_teacher}
    for name, view in teacher_views(recipe):
        if name not in named and ENSEMBLE not in named:
            yield Problem(f"teachers.{name}", f"no loss names it; add one with `teacher: {name}`, or remove it")
        needs, classes, own = view.losses.needs_teacher_logits, recipe.data.classes, recipe.teachers[name].classes
        if needs and classes is not None and own not in (None, classes):
            yield Problem(
                f"teachers.{name}.classes", f"{own} is not data.classes={classes}, which losses.{needs[0]} needs"
            )


def _check_labels(recipe: Recipe) -> Iterator[Problem]:
    data, losses = recipe.data, recipe.losses
    if data.labels:
        return
    for name in losses.reads_labels:
        cure = "remove it from losses.custom" if "." in name else f"remove it with losses.{name}=null"
        yield Problem(f"losses.{name}", f"reads labels, but data.labels is false; {cure}")
    if data.label_column is not None:
        yield Problem(
            "data.label_column", "belongs to images with labels, but data.labels is false; remove one of the two"
        )


def _names_same_classes(recipe: Recipe) -> bool:
    """Return whether student and teacher have the same classes, as far as the recipe shows."""
    teacher, classes = recipe.teacher, recipe.data.classes
    return teacher is not None and (classes is None or teacher.classes in (None, classes))


def _is_anything_tapped(recipe: Recipe) -> bool:
    return any(section.paths for _, section in recipe.losses.named())


def _check_agreement(recipe: Recipe) -> Iterator[Problem]:
    teacher, classes = recipe.teacher, recipe.data.classes
    if recipe.evaluation.agreement is not True:
        return
    if recipe.teachers:
        yield Problem("evaluation.agreement", "is measured with one `teacher`, and there are several; remove this key")
        return
    if teacher is None:
        yield Problem("evaluation.agreement", "there is no teacher to compare with; add `teacher`, or remove this key")
    elif not _names_same_classes(recipe) and not _is_anything_tapped(recipe):
        yield Problem(
            "evaluation.agreement",
            f"the teacher has {teacher.classes} classes, not data.classes={classes}, and no loss taps features: there "
            "is nothing to compare; remove this key",
        )


def _check_student(recipe: Recipe) -> Iterator[Problem]:
    student = recipe.student
    if student.freeze_batch_norm and not student.freeze:
        yield Problem("student.freeze_batch_norm", "belongs to student.freeze, which names no module")
    if student.head != "auto" and student.weights is None:
        yield Problem("student.head", f"{student.head} belongs to student.weights, which are null")


def _check_class_weights(recipe: Recipe) -> Iterator[Problem]:
    ce, classes = recipe.losses.ce, recipe.data.classes
    weights = None if ce is None else ce.class_weights
    if isinstance(weights, list) and classes is not None and len(weights) != classes:
        yield Problem("losses.ce.class_weights", f"{len(weights)} weights for data.classes={classes}")


def _check_label_losses(recipe: Recipe) -> Iterator[Problem]:
    if recipe.losses.ce is not None and recipe.losses.bce is not None:
        yield Problem("losses.bce", "is in the place of losses.ce, which is used, too; remove that with losses.ce=null")


def _check_mixing(recipe: Recipe) -> Iterator[Problem]:
    mixing = [key for key in ("mixup", "cutmix") if getattr(recipe.data, key) > 0]
    for key, section in recipe.losses.named():
        if mixing and isinstance(section, OneClassSection | CrdSection):
            yield Problem(
                f"losses.{key}",
                f"needs one image for each sample, and data.{mixing[0]} mixes images of two; set data.{mixing[0]}=0",
            )


def _check_adapters(recipe: Recipe) -> Iterator[Problem]:
    losses, batch = recipe.losses, recipe.train.global_batch
    if losses.queue is not None and losses.queue.size < batch:
        yield Problem(
            "losses.queue.size", f"{losses.queue.size} is less than train.global_batch={batch}, which a step adds"
        )
    own = recipe.optimizer.adapters
    trains = any(getattr(section, "trains", False) for _, section in losses.named()) or bool(losses.custom)
    if (own.lr is not None or own.weight_decay is not None) and not trains:
        yield Problem("optimizer.adapters", "no loss trains anything beside the student; remove this section")


def _check_gradient_attention(recipe: Recipe) -> Iterator[Problem]:
    section, train = recipe.losses.gradient_at, recipe.train
    if section is None:
        return
    transfers = section.form == "transfer"
    for key, on in (("student", train.compile.student), ("teacher", train.compile.teacher and transfers)):
        if on:
            yield Problem(
                f"train.compile.{key}",
                "losses.gradient_at differentiates twice, which a compiled model cannot; set it to false",
            )
    if train.sync_batch_norm:
        yield Problem("train.sync_batch_norm", "losses.gradient_at differentiates twice, which SyncBatchNorm cannot")
    if train.precision == "fp16":
        yield Problem(
            "train.precision",
            "losses.gradient_at: gradients of images vanish in fp16, without its loss scaling; use bf16 or fp32",
        )
    if not transfers:
        return
    for name, view in teacher_views(recipe):
        if view.losses.gradient_at is not None and view.teacher is not None and view.teacher.placement != "replicated":
            yield Problem(
                f"{teacher_key(name)}.placement", "losses.gradient_at needs a whole teacher on every rank: replicated"
            )


def _check_evaluation(recipe: Recipe) -> Iterator[Problem]:
    stop_when, classes = recipe.train.stop_when, recipe.data.classes
    if stop_when is not None and stop_when.metric == "top5" and classes is not None and classes <= 5:
        yield Problem("train.stop_when.metric", f"top5 is not measured for {classes} classes; take top1 or loss")
    if recipe.data.validation is not None:
        return
    for key, asked in (
        ("train.stop_when", stop_when is not None),
        ("checkpoint.keep_best", recipe.checkpoint.keep_best > 0),
        ("evaluation.agreement", recipe.evaluation.agreement is True),
        ("evaluation.knn", recipe.evaluation.knn is not None),
    ):
        if asked:
            yield Problem(key, "needs evaluations, but data.validation is null; name validation images, or remove it")


def _check_several_teachers_without_labels(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if recipe.teachers and not data.labels and data.validation is not None and recipe.evaluation.knn is None:
        yield Problem(
            "data.validation",
            "has no labels, and the agreement with several teachers is not measured: set it to null, or measure "
            "neighbours with evaluation.knn",
        )


def _check_evaluation_without_labels(recipe: Recipe) -> Iterator[Problem]:
    """Check what evaluations of images without labels can measure, and what is decided by the agreement with the
    teacher."""
    data, teacher, agreement = recipe.data, recipe.teacher, recipe.evaluation.agreement
    stop_when = recipe.train.stop_when
    by_agreement = []
    if stop_when is not None and stop_when.metric == "agreement":
        by_agreement.append("train.stop_when.metric")
    elif stop_when is not None and not data.labels:
        yield Problem(
            "train.stop_when.metric",
            f"{stop_when.metric} needs labels, but data.labels is false; take agreement",
        )
    if not data.labels and recipe.checkpoint.keep_best > 0:
        by_agreement.append("checkpoint.keep_best")
    for key in by_agreement:
        if teacher is None:
            yield Problem(key, "agreement is that with a teacher; add `teacher`, or choose by another number")
        elif agreement is False:
            yield Problem(key, "needs the agreement with the teacher; remove evaluation.agreement=false")
        elif not _names_same_classes(recipe):
            yield Problem(
                key,
                f"needs a teacher of the student's classes, but it has {teacher.classes}, and data.classes is "
                f"{data.classes}",
            )
        elif not recipe.losses.reads_logits:
            yield Problem(
                key,
                "agreement is that of first classes, and no loss reads the student's logits, so that its head is not "
                "trained; remove this key, or add losses.kd",
            )
    if data.labels or data.validation is None or teacher is None or by_agreement:
        return
    if agreement is False and recipe.evaluation.knn is None:
        yield Problem(
            "evaluation.agreement",
            "false leaves nothing to measure on images without labels (data.labels is false); remove it, or evaluate "
            "nothing with data.validation=null",
        )
    elif not _names_same_classes(recipe) and not _is_anything_tapped(recipe) and recipe.evaluation.knn is None:
        yield Problem(
            "data.validation",
            f"has no labels, the teacher has {teacher.classes} classes, not data.classes={data.classes}, and no loss "
            "taps features: there is nothing to measure; set it to null",
        )


def _check_knn(recipe: Recipe) -> Iterator[Problem]:
    knn, every = recipe.evaluation.knn, recipe.evaluation.every_epochs
    if knn is None:
        return
    for key in ("train", "validation"):
        if not recipe.data.labels and getattr(knn, key) is None:
            yield Problem(f"evaluation.knn.{key}", "is needed, since data.labels is false; name images with labels")
    if knn.label_column is not None and knn.train is None and knn.validation is None:
        yield Problem(
            "evaluation.knn.label_column",
            "belongs to evaluation.knn.train or evaluation.knn.validation, which name no images; use data.label_column",
        )
    if knn.every_epochs is not None and knn.every_epochs % every:
        yield Problem(
            "evaluation.knn.every_epochs",
            f"{knn.every_epochs} is no multiple of evaluation.every_epochs={every}, after which evaluations are",
        )


def _check_batch(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if train.micro_batch is not None and train.global_batch % train.micro_batch:
        yield Problem(
            "train.micro_batch", f"{train.micro_batch} does not divide train.global_batch={train.global_batch}"
        )


def _check_sizes(recipe: Recipe) -> Iterator[Problem]:
    data, key = recipe.data, "data.train_image_size"
    if len(set(sizes_by_epoch(data.train_image_size).values())) < 2:
        return
    if data.in_memory == "device":
        yield Problem("data.in_memory", f"device keeps images of one size, and {key} changes it; take true")
    if data.augmentation_period is not None:
        yield Problem(key, "changes with the epoch, and data.augmentation_period repeats epochs; remove one of the two")
    for name, view in teacher_views(recipe):
        if view.teacher is not None and view.teacher.cache is not None:
            yield Problem(
                f"{teacher_key(name)}.cache", f"is of images of one size, and {key} changes it; remove one of the two"
            )


def _check_repeats(recipe: Recipe) -> Iterator[Problem]:
    repeats, batch = recipe.data.repeated_augmentation, recipe.train.global_batch
    if batch % repeats:
        yield Problem("data.repeated_augmentation", f"{repeats} does not divide train.global_batch={batch}")
    if repeats > 1 and recipe.losses.crd is not None:
        yield Problem(
            "losses.crd",
            "its banks have one vector of each image, and a step has data.repeated_augmentation="
            f"{repeats} of them; set data.repeated_augmentation=1",
        )


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.streaming and data.in_memory in (True, "device"):
        yield Problem("data.in_memory", "does not go with data.streaming; remove one of the two")
    if data.in_memory == "device" and data.transforms not in ON_DEVICE:
        yield Problem("data.in_memory", f"device goes with data.transforms={' or '.join(ON_DEVICE)} alone; take true")
    if data.streaming and isinstance(data.validation, float):
        yield Problem(
            "data.validation",
            f"{data.validation:g} of the training images cannot be set aside with data.streaming, which reads whole "
            "row groups; name validation data",
        )
    if isinstance(data.transforms, list):
        for key in ("validation_transforms", "image_size", "normalization"):
            if getattr(data, key) is None:
                yield Problem(f"data.{key}", "is required when data.transforms is a list")
        if isinstance(data.validation_transforms, str):
            yield Problem("data.validation_transforms", "must be a list too when data.transforms is one")
    elif data.validation_transforms is not None:
        yield Problem(
            "data.validation_transforms",
            f"belongs to a list of data.transforms, not to the preset {data.transforms!r}",
        )
