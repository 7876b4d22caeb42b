"""From a recipe to the sizes and types of the features that a loss of relations compares, before anything computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dkd.build.models import student_spec, teacher_spec
from dkd.config import Recipe
from dkd.engines.arithmetic import Arithmetic
from dkd.global_batch import GramTensor
from dkd.models import ModelSpec, output_shapes, tap_dtypes


def compared_tensors(
    view: Recipe,
    pairs: Sequence[tuple[str, str]],
    sent_in_half: bool,
    is_centred: bool,
    image_size: int,
    device_type: str,
) -> list[GramTensor]:
    """Return the sizes and types of the student's features, then of the teacher's.

    Args:
        view: of the teacher that the loss compares with.
        pairs: (student path, teacher path).
        sent_in_half: whether features are rounded to bfloat16 on their way between ranks.
        is_centred: whether the mean is subtracted before.
        image_size: side of the student's images, pixels.
        device_type: the kind of device whose autocast is meant.
    """
    assert view.teacher is not None
    teacher_size = view.teacher.input_size or image_size
    # Types that only the hardware will decide are taken to be the larger ones.
    settled = view.train.precision != "auto"
    autocast = Arithmetic.of(view).autocast if settled else None
    full = Arithmetic.of(view).dtype if settled else torch.float32
    rounded = torch.bfloat16 if sent_in_half else None

    def tensors(model: ModelSpec, paths: list[str], size: int, backward: bool) -> list[GramTensor]:
        shapes = output_shapes(model, paths, size)[1]
        types = dict.fromkeys(paths, full)
        if autocast:
            types = tap_dtypes(model, paths, size, autocast, device_type)
        return [
            # The student's gradient comes in full precision, since its features are promoted before the losses.
            GramTensor(
                torch.Size(shapes[path]).numel(),
                backward,
                (rounded or types[path]).itemsize,
                full.itemsize,
                (rounded or full).itemsize if backward else 0,
            )
            for path in paths
        ]

    students, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    found = tensors(student_spec(view), students, image_size, True)
    found += tensors(teacher_spec(view), teachers, teacher_size, False)
    if is_centred and not sent_in_half:
        # Less their mean, features are float32 and travel so.
        found = [replace(tensor, feature_bytes=tensor.gram_bytes) for tensor in found]
    return found
