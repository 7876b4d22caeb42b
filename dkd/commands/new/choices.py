"""Choose everything of a recipe that the command line leaves open.

image size    of a model of one size that size; of this package's models for small images 32 or 64, whichever is
              nearer to the images; else 64, 128 or 224
transforms    cifar up to 64 pixels, else imagenet; digits for `digits`
normalisation the student's weights', else the teacher's, else the preset's
batch         256 for 100,000 training images and more, else 64 (128 up to 64 pixels), at most a tenth of the images
optimizer     AdamW for transformers, 5e-4·B/512 (DeiT, arXiv:2012.12877); else SGD with Nesterov's momentum:
              0.1·B/256 (Goyal et al., arXiv:1706.02677), 0.05·B/64 up to 64 pixels (the public CIFAR-100 benchmarks),
              0.01·B/64 for a student with weights
epochs        240 up to 64 pixels and 20,000 images or more (the same benchmarks), 100 for others; 30 for a student with
              weights
losses        at with β 1000 (the authors' code), sp with γ 3000 at a batch of 128 (the paper); kd with α 0.9 and T 4
              where the teacher has the data's classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dkd.commands.new.images import Images
from dkd.commands.new.models import LIBRARIES, NamedModel
from dkd.commands.new.pairs import ChosenPairs, choose_pairs
from dkd.data.transforms import build_pipeline
from dkd.errors import InputError
from dkd.library_internals.torch import NORMS_WITH_STATISTICS
from dkd.models import (
    PRETRAINED,
    ModelSpec,
    TapError,
    UnknownModelError,
    build_on_meta,
    output_shapes,
    stated_classes,
)
from dkd.models.stages import find_stages
from dkd.models.weights import is_file_name
from dkd.preflight.models import compare_classes

LOSSES = ("at", "sp", "kd")
_SMALL = 64
"""Side up to which images are treated as those of CIFAR are, pixels."""
_SIDES_OF_LIBRARIES, _SIDES_OF_DKD = (64, 128, 224), (32, 64)
_OF_PHOTOGRAPHS = 224
"""Side of the images that weights of libraries were trained on, and that their models of one size take, pixels."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; None: to be chosen."""

    losses: tuple[str, ...] | None = None
    image_size: int | None = None
    epochs: int | None = None
    global_batch: int | None = None
    name: str | None = None
    teacher_size: int | None = None


@dataclass(frozen=True)
class Choices:
    """Everything of a recipe.

    Args:
        pairs: of the feature losses; None without such a loss.
        teacher_classes: outputs of the teacher's head; None without a teacher.
        mean_std: the student's normalisation, and who states it; None: the preset's.
        teacher_mean_std: the teacher's, where it is another.
        teacher_size: side of the teacher's images where it is another, pixels.
        notes: lines on what was left out, and why.
    """

    name: str
    images: Images
    student: NamedModel
    teacher: NamedModel | None
    losses: tuple[str, ...]
    pairs: ChosenPairs | None
    image_size: int
    transforms: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...], str] | None
    teacher_mean_std: tuple[tuple[float, ...], tuple[float, ...], str] | None
    teacher_size: int | None
    teacher_classes: int | None
    global_batch: int
    epochs: int
    adamw: bool
    lr: float
    notes: tuple[str, ...]
    has_batch_norm: bool
    """Of the student."""


def choose(images: Images, student: NamedModel, teacher: NamedModel | None, asked: Asked) -> Choices:
    """Choose everything of a recipe, as the top of this module states it.

    Raises:
        InputError: the losses that are asked for do not fit the models.
        UnknownModelError, WeightsError: a model or its weights cannot be had.
    """
    size = asked.image_size or _choose_size(images, student)
    transforms = "digits" if images.train == "digits" else "cifar" if size <= _SMALL else "imagenet"
    classes_of_teacher = None if teacher is None else teacher.count_classes(images.classes)
    losses, notes = _choose_losses(asked.losses, images, teacher, classes_of_teacher)
    spec = student.spec(images.classes)
    pairs, teacher_size = None, None
    if teacher is not None:
        other = teacher.spec(classes_of_teacher or images.classes)
        teacher_size = asked.teacher_size or _teacher_size(teacher, other, size)
        if asked.teacher_size is None and _is_guess(teacher):
            notes.append(
                f"the teacher is given images of {teacher_size or size} pixels; --teacher-size where it was trained at "
                "another size"
            )
        if {"at", "sp"} & set(losses):
            pairs = choose_pairs(spec, other, size, teacher_size or size)
    own = build_pipeline(transforms, None, size).normalize
    mean_std = _first_stated((own.mean, own.std), student, teacher)
    of_teacher = None if teacher is None else _first_stated(mean_std[:2] if mean_std else (own.mean, own.std), teacher)
    batch = asked.global_batch or _choose_batch(_count_training(images), size)
    adamw = is_transformer(spec, size)
    return Choices(
        name=asked.name or _name(student, teacher),
        images=images,
        student=student,
        teacher=teacher,
        losses=losses,
        pairs=pairs,
        image_size=size,
        transforms=transforms,
        mean_std=mean_std,
        teacher_mean_std=of_teacher,
        teacher_size=None if teacher_size == size else teacher_size,
        teacher_classes=classes_of_teacher,
        global_batch=batch,
        epochs=asked.epochs or _choose_epochs(images.count, size, student),
        adamw=adamw,
        lr=_choose_lr(batch, size, student, adamw),
        notes=tuple(notes),
        has_batch_norm=any(isinstance(module, NORMS_WITH_STATISTICS) for module in build_on_meta(spec).modules()),
    )


_Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def _first_stated(
    own: _Normalization, *models: NamedModel | None
) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Return the normalisation that the first of the models states that states one, and who states it; None where it is
    `own`, or none does."""
    for model in models:
        if model is not None and model.stated is not None and model.stated.normalization is not None:
            found = model.stated.normalization
            return None if found == own else (*found, model.stated.source)
    return None


def _choose_size(images: Images, student: NamedModel) -> int:
    if student.fixed_size is not None or student.image_size is not None:
        return student.fixed_size or student.image_size or 0
    if images.train == "digits":
        return 16
    sides = _SIDES_OF_LIBRARIES if student.is_of_a_library else _SIDES_OF_DKD
    nearest = min(sides, key=lambda side: abs(side - images.side))
    # torchvision's transformers take one size, which nothing states.
    takes_it = not student.is_of_a_library or _takes(student.spec(images.classes), nearest)
    return nearest if takes_it else _OF_PHOTOGRAPHS


def _takes(spec: ModelSpec, size: int) -> bool:
    try:
        output_shapes(spec, [], size)
    except (UnknownModelError, TapError):
        return False
    return True


def _teacher_size(teacher: NamedModel, spec: ModelSpec, size: int) -> int:
    """Return the side of the teacher's images, pixels."""
    if teacher.fixed_size is not None:
        return teacher.fixed_size
    if teacher.image_size is not None:
        return teacher.image_size
    # A library's weights are those of photographs: features of much smaller images are others.
    of_library = teacher.name.startswith(LIBRARIES) and not is_file_name(str(teacher.weights))
    if (of_library and teacher.weights != "random" and size < 128) or not _takes(spec, size):
        return _OF_PHOTOGRAPHS
    return size


def _is_guess(teacher: NamedModel) -> bool:
    """Return whether nothing states the size of the images that a teacher was trained on."""
    known = teacher.fixed_size or teacher.image_size
    return known is None and teacher.weights not in (PRETRAINED, "random")


def _choose_losses(
    asked: tuple[str, ...] | None, images: Images, teacher: NamedModel | None, teacher_classes: int | None
) -> tuple[tuple[str, ...], list[str]]:
    if teacher is None:
        if asked:
            raise InputError(f"--losses {','.join(asked)} needs --teacher")
        return (), []
    wrong = [loss for loss in asked or () if loss not in LOSSES]
    if wrong:
        raise InputError(f"--losses {','.join(wrong)}: must be some of {', '.join(LOSSES)}, with commas between them")
    losses, notes = asked or LOSSES, []
    why = _why_no_soft_targets(images, teacher, teacher_classes) if "kd" in losses else None
    if why is not None:
        if asked is not None:
            raise InputError(
                f"--losses kd compares logits, but {why}; leave kd out, or train a teacher on these classes"
            )
        losses = tuple(loss for loss in losses if loss != "kd")
        notes.append(f"no kd: {why}")
    return losses, notes


def _why_no_soft_targets(images: Images, teacher: NamedModel, teacher_classes: int | None) -> str | None:
    """Return why the teacher's logits are not those of the data's classes; None: they are, as far as can be known."""
    if not images.labels and teacher.known_classes() is None:
        return "the teacher's weights state no classes"
    if teacher_classes != images.classes:
        return f"the teacher's head has {teacher_classes} classes, the data have {images.classes}"
    stated = stated_classes(teacher.name, teacher.weights)
    if stated is None or images.class_names is None:
        return None
    problem = compare_classes(stated, images.class_names)[0]
    return None if problem is None else f"the teacher's weights {problem}"


def _count_training(images: Images) -> int:
    """Return the images that are left for training once a fraction is set aside."""
    aside = images.count * images.validation if isinstance(images.validation, float) else 0
    return max(1, images.count - math.ceil(aside))


def _choose_batch(count: int, size: int) -> int:
    largest = 256 if count >= 100_000 else 128 if size <= _SMALL else 64
    fitting = [batch for batch in (256, 128, 64, 32, 16, 8) if batch <= largest and batch <= count // 10]
    return fitting[0] if fitting else min(8, count)


def _choose_epochs(count: int, size: int, student: NamedModel) -> int:
    if student.weights is not None:
        return 30
    return 240 if size <= _SMALL and count >= 20_000 else 100


def _choose_lr(batch: int, size: int, student: NamedModel, adamw: bool) -> float:
    if adamw:
        lr = 5e-4 * batch / 512
    elif student.weights is not None:
        lr = 0.01 * batch / 64
    else:
        lr = 0.05 * batch / 64 if size <= _SMALL else 0.1 * batch / 256
    return float(f"{lr:.3g}")


def is_transformer(spec: ModelSpec, image_size: int) -> bool:
    """Return whether a model's features are tokens, or maps with their channels last, as those of transformers are."""
    stages = find_stages(spec, image_size)
    return any(
        stage.tokens_in_front is not None or stage.shape[0] == stage.shape[1] != stage.shape[-1] for stage in stages
    )


def _name(student: NamedModel, teacher: NamedModel | None) -> str:
    own, other = (_short(model.name) for model in (student, teacher or student))
    return own if teacher is None else f"{own}_from_{other}"


def _short(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name.rstrip("/").rpartition("/")[2]).strip(".")
