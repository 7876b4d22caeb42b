"""From a recipe to its losses of features, with the adapters that they train beside the student."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dkd.build.data import build_image_pipeline
from dkd.build.models import pairs, student_spec, teacher_spec
from dkd.config import Recipe
from dkd.config.derived import teacher_views
from dkd.config.losses import (
    AdaptedSection,
    CrdSection,
    FeatureSection,
    FitNetSection,
    FormSection,
    QueueSection,
    ReviewSection,
    SrdSection,
    VidSection,
    VkdSection,
)
from dkd.losses import CRD, SRD, VID, EmbeddingQueue, FeatureDistance, ReviewKD
from dkd.losses.adapters import PairAdapter, build_adapter
from dkd.losses.contrastive import ContrastiveAdapter
from dkd.losses.feature_forms import FeatureForm, Shape
from dkd.losses.knowledge_review import ReviewAdapter
from dkd.losses.teacher_norm import TeacherNorm
from dkd.losses.variational import VariationalAdapter
from dkd.models import output_shapes
from dkd.rng import derive_seed
from dkd.user_code import UserCodeError, describe_error, load_callable

Shapes = Mapping[str, Shape]
"""The shape of one sample's feature by path."""


@dataclass(frozen=True)
class Given:
    """Holds what losses of features need to know beside their section.

    Args:
        student: shapes of all tapped features.
        teachers: those of each teacher by name; of one alone, the name is empty.
        samples: N, the training samples.
        seed: of the run.
        labels: of the training samples, where they have some.
    """

    student: Shapes
    teachers: Mapping[str, Shapes]
    samples: int = 0
    seed: int = 0
    labels: np.ndarray | None = field(default=None, compare=False)

    def pair_shapes(self, section: FormSection) -> list[tuple[Shape, Shape]]:
        """Return the shapes of each pair of a loss."""
        teacher = self.teachers[section.teacher or ""]
        return [(self.student[s], teacher[t]) for s, t in section.paths]

    @contextmanager
    def seeded(self, name: str) -> Iterator[None]:
        """Draw from a seed of the run and the loss inside, the same on all ranks; the draws of everything else stay
        what they are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, zlib.crc32(name.encode())))
            yield


def tapped_shapes(recipe: Recipe) -> tuple[Shapes, dict[str, Shapes]]:
    """Return the shapes of the features that losses read of the student, and of each teacher by name, on meta tensors.
    Raises UnknownModelError, TapError."""
    size = build_image_pipeline(recipe).train_size
    taps = list(dict.fromkeys(s for s, _ in pairs(recipe)))
    teachers: dict[str, Shapes] = {}
    for name, view in teacher_views(recipe):
        assert view.teacher is not None
        theirs = list(dict.fromkeys(t for _, t in pairs(view)))
        side = view.teacher.input_size or size
        teachers[name] = output_shapes(teacher_spec(view), theirs, side)[1] if theirs else {}
    return output_shapes(student_spec(recipe), taps, size)[1] if taps else {}, teachers


def form_of(section: FormSection) -> FeatureForm:
    """Return what the features of a loss are brought into."""
    resize: Any = "pool" if isinstance(section, VidSection) else getattr(section, "resize", "error")
    return FeatureForm(section.form, section.class_tokens, getattr(section, "pool", "mean"), resize)


def make_adapter(name: str, section: FormSection, given: Given) -> nn.Module | None:
    """Return the module that a loss trains beside the student, on the CPU, drawn from the run's seed; None: the loss
    trains none.

    Raises:
        ValueError: there is no such adapter for the shapes of a pair.
        UserCodeError: the user's own cannot be made.
    """
    form, shapes = form_of(section), given.pair_shapes(section)
    with given.seeded(name):
        match section:
            case VidSection():
                return VariationalAdapter(form, [form.shapes(s, t) for s, t in shapes])
            case ReviewSection():
                # Stages are brought to the teacher's resolution when they are fused.
                own = [(form.shapes(s, s)[0], form.shapes(t, t)[1]) for s, t in shapes]
                return ReviewAdapter(form, own, section.width)
            case CrdSection():
                return ContrastiveAdapter(form, [form.shapes(s, t) for s, t in shapes], section.width)
        kind: Any = getattr(section, "adapter", None)
        if kind is None:
            return None
        assert isinstance(section, AdaptedSection)
        return build_adapter(_own_adapter(kind, section.adapter_options) if ":" in kind else kind, form, shapes)


def _own_adapter(name: str, options: Mapping[str, Any]) -> Callable[[Shape, Shape], nn.Module]:
    make = load_callable(name)

    def build(student: Shape, teacher: Shape) -> nn.Module:
        called = f"{name!r}, called with {student}, {teacher} and {dict(options)}"
        try:
            module = make(student, teacher, **options)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UserCodeError(f"{called}: {describe_error(error)}") from error
        if not isinstance(module, nn.Module):
            raise UserCodeError(f"{called} returned {type(module).__name__}, not a torch.nn.Module")
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            raise UserCodeError(
                f"{called} returned a module whose parameters get their shapes in the first forward, and an optimizer "
                "needs them before; take the numbers of channels from the shapes"
            )
        return module

    return build


def make_loss(name: str, section: FormSection, given: Given) -> nn.Module:
    """Return the loss of a section. Raises ValueError."""
    form, widths = form_of(section), []
    if not isinstance(section, ReviewSection):
        widths = [form.shapes(s, t)[1][0] for s, t in given.pair_shapes(section)]
    match section:
        case FitNetSection():
            norm = TeacherNorm(section.teacher_norm, widths)
            return FeatureDistance("mse", form, norm, section.pair_weights)
        case FeatureSection():
            norm = TeacherNorm(section.teacher_norm, widths)
            return FeatureDistance(section.distance, form, norm, section.pair_weights)
        case VkdSection():
            norm = TeacherNorm(section.teacher_norm, widths)
            return FeatureDistance("smooth_l1", form, norm, section.pair_weights)
        case SrdSection():
            return SRD(section.alpha, form, section.pair_weights)
        case VidSection():
            return VID(form, section.pair_weights)
        case ReviewSection():
            return ReviewKD(form, section.pair_weights)
        case CrdSection():
            return CRD(
                given.samples,
                section.width,
                section.negatives,
                section.temperature,
                section.momentum,
                derive_seed(given.seed, zlib.crc32(name.encode())),
                given.labels,
            )
        case QueueSection():
            return EmbeddingQueue(
                widths[0],
                section.size,
                section.temperature,
                section.teacher_temperature,
                derive_seed(given.seed, zlib.crc32(name.encode())),
                form,
            )
    raise TypeError(type(section).__name__)


def find_unused(adapter: nn.Module, outputs: Sequence[torch.Tensor]) -> list[str]:
    """Return the names of an adapter's parameters that no gradient of its outputs reaches."""
    used = [output.float().sum() for output in outputs if output.requires_grad]
    parameters = dict(adapter.named_parameters())
    if not used:
        return list(parameters)
    found = torch.autograd.grad(
        torch.stack(used).sum(), list(parameters.values()), allow_unused=True, retain_graph=True
    )
    return [name for name, gradient in zip(parameters, found, strict=True) if gradient is None]


def find_ignored(value: torch.Tensor, features: Sequence[torch.Tensor]) -> list[int]:
    """Return the places of the features that no gradient of a value reaches."""
    found = torch.autograd.grad(value.sum(), list(features), allow_unused=True, retain_graph=True) if features else ()
    return [place for place, gradient in enumerate(found) if gradient is None]


def adapter_problem(name: str, section: FormSection, given: Given, rows: int = 2) -> str | None:
    """Return why a loss cannot have its adapter, by a trial on as many random samples; None: it can."""
    try:
        adapter = make_adapter(name, section, given)
        students, teachers = (
            [torch.randn(rows, *pair[side]) for pair in given.pair_shapes(section)] for side in (0, 1)
        )
        if isinstance(adapter, PairAdapter) or adapter is None:
            form = form_of(section)
            outputs = list(students if adapter is None else adapter(students, teachers))
            for own, s, t in zip(outputs, students, teachers, strict=True):
                wanted = form.teacher(t, s)
                compared = form.student(own, t) if adapter is None else own
                if compared.shape != wanted.shape:
                    both = f"{tuple(compared.shape[1:])} and {tuple(wanted.shape[1:])}"
                    what = "name an adapter" if adapter is None else "the adapter has to yield the teacher's shape"
                    return f"features of shape {both} cannot be compared; {what}"
        if adapter is None:
            return None
        unused = find_unused(adapter, adapter(students, teachers))
    except (ValueError, UserCodeError) as error:
        return str(error)
    except Exception as error:  # the user's own adapter may raise anything
        return f"the adapter fails on {rows} sample{'s' if rows > 1 else ''}: {describe_error(error)}"
    return f"no gradient reaches {', '.join(unused[:3])} of the adapter" if unused else None
