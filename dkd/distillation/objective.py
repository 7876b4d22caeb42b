"""The objective: a weighted sum of terms, each of which sees the global batch.

total(step) = Σ_k weight_k(step) · term_k
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from dkd.distillation.loss_weights import LossWeights
from dkd.errors import InputError
from dkd.global_batch import BatchLayout, full_precision
from dkd.losses import RelationalLoss
from dkd.losses.feature_pairs import no_autocast
from dkd.models import Adapter, adapted_key, adapted_keys, run_adapter

ENSEMBLE = "ensemble"
"""In the place of a teacher's name: the mean of the logits of all teachers."""

Weight = Callable[[int], float]
"""The weight of a term at a global step."""


@dataclass(frozen=True)
class Outputs:
    """Holds what a model yields for b images: logits (b, K), or None where no term needs them, and the tapped features
    by path."""

    logits: torch.Tensor | None
    features: Mapping[str, torch.Tensor]
    images: torch.Tensor | None = None
    """The student's input (b, 3, H, W), where a term differentiates by it."""
    mirrored_logits: torch.Tensor | None = None
    """Logits (b, K) of the mirrored images, where a term compares with them."""
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    """By path, the type in which the model yielded a feature, where it was promoted since: it loses nothing when it is
    sent in that type."""
    begun: Mapping[str, Any] = field(default_factory=dict)
    """By the name of a term, what its loss is called with in the place of this teacher's features."""
    members: Mapping[str, Outputs] = field(default_factory=dict)
    """By name, what each of several teachers yields; this object holds nothing else of them then."""

    def of(self, teacher: str) -> Outputs:
        """Return what one of several teachers yields, or for ENSEMBLE the mean of the logits of all of them; of one
        teacher alone, whose name is empty, this object."""
        if teacher == ENSEMBLE:
            logits = [full_precision(each.logits) for each in self.members.values() if each.logits is not None]
            return Outputs(torch.stack(logits).mean(0), {})
        return self.members[teacher] if teacher else self

    @property
    def all_members(self) -> list[Outputs]:
        """Return what each teacher yields, also where there is one alone."""
        return list(self.members.values()) or [self]


class LossValueError(InputError, ValueError):
    """A loss returned something else than a scalar tensor."""


def check_value(name: str, value: object) -> None:
    """Check what a loss has returned. Raises LossValueError."""
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise LossValueError(
            f"the loss {name!r} returned {what}, not a scalar tensor; layout.mean(per_sample) makes one"
        )


class Term(Protocol):
    """One loss of the objective."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> Weight: ...

    def value(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the unweighted loss: a scalar whose mean over ranks is its value on the global batch.

        Args:
            labels: classes (b,), or class weights (b, K) of mixed images.
            indices: places (b,) of the samples in the training data; None: not known.
        """
        ...


ASKED = ("labels", "indices")
"""Parameters that a loss of features or logits may have after its first two: it is then given this rank's labels (b,)
or (b, K), and the indices (b,) of its samples in the training data. `gather_rows` brings those of all ranks."""


def asked_parameters(loss: Callable[..., object]) -> tuple[str, ...]:
    """Return which parameters of ASKED a loss has after its first two."""
    try:
        parameters = list(inspect.signature(getattr(loss, "forward", loss)).parameters)
    except (TypeError, ValueError):  # a callable without a signature
        return ()
    return tuple(name for name in ASKED if name in parameters[2:])


class LossInside(nn.Module):
    """Calls a loss with parameters inside the student's forward, where engines have these parameters whole: FSDP2 and
    ZeRO-3 keep shards of them elsewhere. The loss computes as other losses do, in the precision of `full_precision` and
    outside of any autocast.

    Args:
        loss: called with two lists of features, two tensors of logits, or logits and labels.
        name: of its term.

    Raises:
        LossValueError: the loss returns no scalar tensor.
    """

    def __init__(self, loss: nn.Module, name: str) -> None:
        super().__init__()
        self.loss, self._name = loss, name

    def forward(self, first: Any, second: Any, more: Mapping[str, Any]) -> torch.Tensor:
        device = (first[0] if isinstance(first, list) else first).device
        with no_autocast(device):
            value: torch.Tensor = self.loss(_promote(first), _promote(second), **more)
        check_value(self._name, value)
        return value


def _promote(tensors: Any) -> Any:
    if isinstance(tensors, list):
        return [_promote(tensor) for tensor in tensors]
    return full_precision(tensors) if tensors.is_floating_point() else tensors


def given_to_adapters(
    objective: Objective,
    teacher: Outputs | None,
    labels: torch.Tensor,
    layout: BatchLayout,
    indices: torch.Tensor | None,
) -> dict[str, Any]:
    """Return what the adapters of an objective's terms may read beside the student's own outputs; those of other terms
    do not run. Those of relational terms run first: under two passes they run in both, and draw the same random numbers
    in both."""
    return {
        "adapters": [name for part in reversed(objective.split()) for name in part.names],
        "teacher": teacher,
        "labels": labels,
        "layout": layout,
        "indices": indices,
        "rows": len(labels),
    }


def evaluate_alone(
    term: Term,
    student: Outputs,
    teacher: Outputs,
    labels: torch.Tensor,
    layout: BatchLayout,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the value of a term on outputs that no TappedModel has yielded; its adapter, where it has one, runs
    here."""
    adapter = getattr(term, "trained", None)
    if adapter is not None:
        given = given_to_adapters(Objective([term]), teacher, labels, layout, indices)
        found = run_adapter(term.name, adapter, student.logits, student.features, given)
        student = replace(student, features={**student.features, **found})
    return term.value(student, teacher, labels, layout, indices)


@dataclass(frozen=True)
class _Asked:
    """Passes a loss the labels and indices that it asks for, and its layout.

    A loss with parameters, a module, is called inside the student's forward, as LossInside: `trained` is what the
    student is to be given for that.
    """

    name: str
    weight: Weight
    loss: Callable[..., torch.Tensor]
    teacher: str = field(default="", kw_only=True)
    """Name of the teacher, of several, or ENSEMBLE."""

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """Return the parameters of ASKED that the loss has."""
        return asked_parameters(self.loss)

    @cached_property
    def is_inside(self) -> bool:
        """Return whether the loss has parameters, and so is called inside the student's forward."""
        return isinstance(self.loss, nn.Module) and any(True for _ in self.loss.parameters())

    @cached_property
    def trained(self) -> Adapter | None:
        """Return the module that is to be trained with the student, and what it is called with; None: there is none."""
        if not self.is_inside:
            return None
        assert isinstance(self.loss, nn.Module)
        assert self.asked is not None  # found now, and not inside a forward, which may be compiled
        return Adapter(LossInside(self.loss, self.name), self._read_inside)

    def _read_inside(
        self, logits: torch.Tensor | None, features: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> Sequence[Any]:
        """Return the arguments of a loss with parameters."""
        more = self._more(given["labels"], given["layout"], given["indices"])
        return (*self._arguments(logits, features, given), more)

    def _arguments(
        self, logits: torch.Tensor | None, features: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """Return the first two arguments of the loss, of the student's outputs and what adapters are given."""
        raise NotImplementedError

    def _more(self, labels: torch.Tensor, layout: BatchLayout, indices: torch.Tensor | None) -> dict[str, object]:
        if "indices" in self.asked and indices is None:
            raise ValueError(f"the loss {self.name!r} asks for indices: give them to DistillationStep.begin")
        given = {"labels": labels, "indices": indices}
        return {"layout": layout, **{name: given[name] for name in self.asked}}

    def _value_inside(self, student: Outputs) -> torch.Tensor:
        """Return the value that the student's forward has yielded. Raises ValueError: it has yielded none."""
        try:
            return student.features[adapted_key(self.name)]
        except KeyError as error:
            raise ValueError(
                f"the loss {self.name!r} has parameters: give TappedModel the adapters of the objective"
            ) from error


@dataclass(frozen=True)
class LabelTerm(_Asked):
    """A loss of the student's logits and the labels."""

    def _arguments(
        self, logits: torch.Tensor | None, features: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        return logits, given["labels"]

    def value(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.is_inside:
            return self._value_inside(student)
        return self.loss(student.logits, labels, **self._more(labels, layout, indices))


@dataclass(frozen=True)
class LogitTerm(_Asked):
    """A loss of the student's and the teacher's logits."""

    relational: bool = False
    """Whether the loss compares samples with each other, as of a FeatureTerm."""

    def _arguments(
        self, logits: torch.Tensor | None, features: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        return logits, given["teacher"].of(self.teacher).logits

    def value(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert teacher is not None
        if self.is_inside:
            return self._value_inside(student)
        return self.loss(student.logits, teacher.of(self.teacher).logits, **self._more(labels, layout, indices))


@dataclass(frozen=True)
class FeatureTerm(_Asked):
    """A loss of tapped features; `pairs` names them as (student path, teacher path). Every pair of the list enters one
    call."""

    pairs: Sequence[tuple[str, str]]
    relational: bool = False
    """Compares samples with each other, so that it is no mean over samples: its value on a batch is not that of its
    parts."""
    adapter: nn.Module | None = None
    """Trained with the student: called with the features of student and teacher, two lists, in the student's forward;
    the loss then gets what the adapter returns in the place of the student's features. None: the loss gets these."""

    @cached_property
    def is_inside(self) -> bool:
        return self.adapter is None and super().is_inside

    @cached_property
    def trained(self) -> Adapter | None:
        return super().trained if self.adapter is None else Adapter(self.adapter, self._arguments)

    def _arguments(
        self, logits: torch.Tensor | None, features: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        return [features[s] for s, _ in self.pairs], self.of_teacher(given["teacher"])

    def of_teacher(self, teacher: Outputs) -> Any:
        """Return the teacher's features, or what stands in their place."""
        if self.name in teacher.begun:
            return teacher.begun[self.name]
        wanted = teacher.of(self.teacher).features
        return [wanted[t] for _, t in self.pairs]

    def keys(self, features: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the keys of what the loss reads of the student's features."""
        return [s for s, _ in self.pairs] if self.adapter is None else adapted_keys(features, self.name)

    def value(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert teacher is not None
        if self.is_inside:
            return self._value_inside(student)
        more, keys = self._more(labels, layout, indices), self.keys(student.features)
        if not keys:
            raise ValueError(f"the loss {self.name!r} has an adapter: give TappedModel the adapters of the objective")
        if self._takes_types and all(key in student.types for key in keys):
            more["sent_as"] = [student.types[key] for key in keys]
        return self.loss([student.features[key] for key in keys], self.of_teacher(teacher), **more)

    def begin(self, teacher: Outputs, layout: BatchLayout) -> Any:
        """Begin what of the loss needs no student; None where there is nothing to begin. A collective."""
        if not isinstance(self.loss, RelationalLoss):
            return None
        features = teacher.of(self.teacher).features
        return self.loss.begin([features[t] for _, t in self.pairs], layout)

    @cached_property
    def _takes_types(self) -> bool:
        return isinstance(self.loss, RelationalLoss)


@dataclass(frozen=True)
class InputGradientTerm:
    """A loss of gradients with respect to the images: of the student and the teacher, or of the student on the images
    and their mirror images."""

    name: str
    weight: Weight
    loss: Callable[..., torch.Tensor]
    mirrored: bool = False
    teacher: str = ""
    """Name of the teacher, of several."""

    def value(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.mirrored:
            return self.loss(student.logits, student.mirrored_logits, student.images, labels, layout=layout)
        assert teacher is not None
        return self.loss(student.logits, teacher.of(self.teacher).logits, student.images, labels, layout=layout)


class Objective:
    """Weighs terms.

    Args:
        terms: where none reaches the student's logits, parameters after the last tap must not require gradients: a
            wrapped student whose head gets no gradient at all is an error in DDP.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = list(terms)
        # Public: who replays a captured step writes the weights of the step first.
        self.weights = LossWeights([term.weight for term in self.terms])

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    def split(self) -> tuple[Objective, Objective]:
        """Return the terms that are means over samples, and the relational ones: their sums make the whole."""
        relational = [term for term in self.terms if getattr(term, "relational", False)]
        return Objective([term for term in self.terms if term not in relational]), Objective(relational)

    @property
    def student_taps(self) -> list[str]:
        """Paths of the student's features that the terms read."""
        return list(dict.fromkeys(student for term in self.terms for student, _ in getattr(term, "pairs", [])))

    def keys(self, features: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the keys of what the terms read of the student's features: taps, and outputs of adapters."""
        terms = [term for term in self.terms if isinstance(term, FeatureTerm)]
        return list(dict.fromkeys(key for term in terms for key in term.keys(features)))

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Return, by the names of their terms, what losses train beside the student: give it to TappedModel."""
        trained = {term.name: getattr(term, "trained", None) for term in self.terms}
        return {name: each for name, each in trained.items() if each is not None}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what losses keep from step to step beside parameters, as NAME/BUFFER: a queue, a memory bank, measured
        statistics. They are equal on all ranks, or DTensors. A loss with a method `state_tensors` names them; of other
        modules they are the persistent buffers. Those of adapters are the student's."""
        found: dict[str, torch.Tensor] = {}
        for term in self.terms:
            loss = getattr(term, "loss", None)
            own = getattr(loss, "state_tensors", None)
            if own is not None:
                kept = own()
            elif isinstance(loss, nn.Module) and not getattr(term, "is_inside", False):
                kept = {k: v for k, v in loss.state_dict(keep_vars=True).items() if not k.startswith("adapter.")}
            else:
                continue
            found |= {f"{term.name}/{name}": tensor for name, tensor in kept.items()}
        return found

    @property
    def compares_logits(self) -> bool:
        """Return whether a term reads the student's logits."""
        return any(isinstance(term, LogitTerm | LabelTerm) for term in self.terms)

    def begin(self, teacher: Outputs, layout: BatchLayout) -> Outputs:
        """Begin what of the terms needs no student, so that it continues while the student computes. What was begun
        before stays. A collective.

        Returns:
            The teacher's outputs with what was begun, for the call.
        """
        terms = [term for term in self.terms if isinstance(term, FeatureTerm) and term.name not in teacher.begun]
        begun = {term.name: term.begin(teacher, layout) for term in terms}
        return replace(teacher, begun={**teacher.begun, **{k: each for k, each in begun.items() if each is not None}})

    @property
    def needs_indices(self) -> bool:
        """Return whether a term asks for the indices of samples."""
        return any("indices" in getattr(term, "asked", ()) for term in self.terms)

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: torch.Tensor,
        *,
        step: int,
        layout: BatchLayout,
        indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total to back-propagate, and the detached value of each term before its weight.

        Each is a share of this rank times W: its mean over ranks is the value on the global batch.
        """
        values = {term.name: term.value(student, teacher, labels, layout, indices) for term in self.terms}
        for name, value in values.items():
            check_value(name, value)
        if not values:  # under two passes, all losses of a recipe may be those of the whole batch
            return torch.zeros((), device=labels.device), {}
        every = torch.stack(list(values.values()))
        total = (every * self.weights.at(step, every)).sum()
        return total, {name: value.detach() for name, value in values.items()}
