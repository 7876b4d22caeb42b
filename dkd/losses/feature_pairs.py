"""Check what the losses accept: features as one pair of tensors or as equal-length lists of student and teacher
tensors, and logits (b, K)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad

from dkd.library_internals.torch import is_transformed

Features = torch.Tensor | Sequence[torch.Tensor]


def as_list(features: Features) -> list[torch.Tensor]:
    """Return one tensor, or a sequence of tensors, as a list. Raises TypeError for anything else, such as the output of
    a model of transformers."""
    if isinstance(features, torch.Tensor):
        return [features]
    if not isinstance(features, list | tuple) or not all(isinstance(f, torch.Tensor) for f in features):
        raise TypeError(
            f"a loss takes a tensor or a list of tensors, not {type(features).__name__}; of an output of transformers "
            "take .logits, or a feature's tensor"
        )
    return list(features)


def as_pairs(
    student: Features, teacher: Features, weights: Sequence[float] | None
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Return (student feature, teacher feature, weight) for each pair; weights default to 1.

    Raises:
        ValueError: the lists or the weights differ in length, or are empty, or features are no real numbers.
    """
    students, teachers = as_list(student), as_list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"{len(students)} student features and {len(teachers)} teacher features do not make pairs")
    pair_weights = [1.0] * len(students) if weights is None else list(weights)
    if len(pair_weights) != len(students):
        raise ValueError(f"{len(pair_weights)} weights for {len(students)} pairs")
    for s, t in zip(students, teachers, strict=True):
        if s.shape[0] != t.shape[0]:
            raise ValueError(f"student and teacher hold different rows: {tuple(s.shape)} and {tuple(t.shape)}")
        for f in (s, t):
            _check_real(f, "features")
    return list(zip(students, teachers, pair_weights, strict=True))


def check_logits(logits: torch.Tensor, whose: str = "") -> None:
    """Check that these are real numbers (b, K).

    Args:
        logits: of any shape.
        whose: the model's name in the message, such as "student ".

    Raises:
        TypeError: they are no tensor.
        ValueError: anything else, such as a map of classes (b, K, H, W), for which the losses are not defined.
    """
    as_list(logits)
    if logits.dim() != 2:
        raise ValueError(
            f"{whose}logits must have the shape (b, K), one row of K classes a sample, not {tuple(logits.shape)}"
        )
    _check_real(logits, f"{whose}logits")


def check_logit_pair(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Check that both are real numbers (b, K), of one shape.

    Raises:
        TypeError: they are no tensors.
        ValueError: anything else.
    """
    check_logits(student, "student ")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ in shape"
        )
    check_logits(teacher, "teacher ")


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that these are classes (b,) or probabilities (b, K) for logits (b, K).

    Raises:
        ValueError: anything else.
    """
    wanted = tuple(logits.shape) if labels.is_floating_point() else tuple(logits.shape[:1])
    if labels.is_complex() or tuple(labels.shape) != wanted:
        raise ValueError(
            f"labels must be whole numbers of shape {tuple(logits.shape[:1])} or probabilities of shape "
            f"{tuple(logits.shape)}, not {str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        )


def check_classes(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that these are classes (b,) for logits (b, K), one a sample.

    Raises:
        ValueError: anything else, such as the class weights (b, K) of mixed images.
    """
    check_labels(labels, logits)
    if labels.is_floating_point():
        raise ValueError("this loss needs the class (b,) of each sample, and got class weights (b, K) of mixed images")


def _check_real(tensor: torch.Tensor, what: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{what} must be real floating-point numbers, not {str(tensor.dtype).removeprefix('torch.')}")


def needs_plain_autograd(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a compiler, forward-mode differentiation or a transform of torch.func follows every operation, so
    that a derivative in closed form would be missed."""
    if torch.compiler.is_compiling():
        return True
    return any(is_transformed(each) or forward_ad.unpack_dual(each).tangent is not None for each in tensors)


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off inside: the losses compute in the precision of `full_precision`, under any autocast of the
    model."""
    with torch.autocast(device.type, enabled=False):
        yield
