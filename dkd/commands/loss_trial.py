"""Compare a user's own loss on one process with the same loss on several, on the same random batch: `dkd check-loss`.

A loss of dkd returns a scalar on each rank whose mean over ranks is its value on the global batch, and whose gradient,
averaged over ranks, is the gradient of that value. So the mean of the values, and the gradients divided by the number
of ranks, must be those of the whole batch on one process.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dkd.build.feature_losses import Given
from dkd.build.objective import custom_term
from dkd.config.losses import CustomLossSection
from dkd.distillation.objective import Outputs, Term, evaluate_alone
from dkd.errors import InputError
from dkd.global_batch import BatchLayout
from dkd.losses import RelationalLoss
from dkd.user_code import UserCodeError, describe_error

TOLERANCE = 1e-5
"""Relative error that rounding may make: the features are float64, and a loss may convert them to float32."""
_SEED = 0


@dataclass(frozen=True)
class LossTrial:
    """Names a loss and the random batch that it is tried on.

    Args:
        loss, options, of: as the keys of `losses.custom`.
        student, teacher: shape of one sample of each feature, without the batch; of logits: (K,).
        batch: B, samples of the whole batch.
        classes: K, for labels.
    """

    loss: str
    student: Sequence[tuple[int, ...]]
    teacher: Sequence[tuple[int, ...]]
    of: str = "features"
    batch: int = 8
    classes: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)

    def section(self) -> CustomLossSection:
        """Return the loss as a section of a recipe."""
        pairs = [[str(i), str(i)] for i in range(len(self.student))] if self.of == "features" else []
        values = {"name": "checked", "loss": self.loss, "weight": 1, "of": self.of, "pairs": pairs}
        return CustomLossSection.model_validate({**values, "options": dict(self.options)})


@dataclass(frozen=True)
class Measured:
    """Holds what a loss yields for some rows of the batch.

    Args:
        value: of the loss.
        gradient: of the value by the student's features of these rows, one row a sample: (b, d).
    """

    value: float
    gradient: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """Holds how far the loss on several processes is from the loss on one.

    Args:
        whole, parts: value on one process; mean of the values of several.
        whole_norm, parts_norm: L2 norm of the gradient on one process, and on several.
        value_error, gradient_error: relative to those on one process.
        cause: the likely cause of a difference, and what to do; None: there is no difference.
        compares: whether the loss is no mean over samples: its value on the batch is not that of the batch's parts.
    """

    whole: float
    parts: float
    whole_norm: float
    parts_norm: float
    value_error: float
    gradient_error: float
    cause: str | None
    compares: bool


def is_relational(trial: LossTrial) -> bool:
    """Return whether the loss states that it compares samples. Raises UserCodeError where it cannot be made."""
    return bool(getattr(_build_term(trial), "relational", False))


def _build_term(trial: LossTrial) -> Term:
    """Return the loss as a term, its parameters in float64 and drawn from one seed, the same on all processes."""
    student, teacher = ({str(i): shape for i, shape in enumerate(side)} for side in (trial.student, trial.teacher))
    term = custom_term(trial.section(), lambda step: 1.0, Given(student, {"": teacher}))
    loss = getattr(term, "loss", None)
    if isinstance(loss, torch.nn.Module):
        loss.double()
    return term


def measure(trial: LossTrial, rows: slice, layout: BatchLayout) -> Measured:
    """Compute the loss and its gradient on some rows of the batch, in float64. A collective of the layout's ranks.

    Raises:
        UserCodeError: the loss cannot be made or computed, or has no gradient.
    """
    term = _build_term(trial)
    students, teachers, labels = _batch(trial)
    inputs = [feature[rows].clone().requires_grad_() for feature in students]
    targets = [feature[rows] for feature in teachers]
    indices = torch.arange(trial.batch)[rows]
    torch.manual_seed(_SEED)
    try:
        outputs = _outputs(trial, inputs), _outputs(trial, targets)
        value = evaluate_alone(term, *outputs, labels[rows], layout, indices)
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
            raise ValueError(f"it returned {what}, not a scalar tensor")
        gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
    except Exception as error:  # the user's code may raise anything
        hint = ""
        if "does not require grad" in str(error):  # as all that torch.distributed.all_gather returns
            hint = "; nothing carries a gradient from its value to the student: gather rows by dkd.gather_rows"
        raise UserCodeError(f"{trial.loss!r} cannot be computed: {describe_error(error)}{hint}") from error
    return Measured(float(value.detach()), torch.cat([gradient.flatten(1) for gradient in gradients], 1))


def slope_error(trial: LossTrial) -> float | None:
    """Return how far the `slope` of a loss of relations is from the derivative of its `value`, relative to the gradient
    of both on one process; None: the loss is of another kind. Raises UserCodeError."""
    loss = getattr(_build_term(trial), "loss", None)
    if not isinstance(loss, RelationalLoss):
        return None
    students, teachers, _ = _batch(trial)
    found = []
    for create_graph in (False, True):  # the closed form, and what autograd finds for second derivatives
        inputs = [feature.clone().requires_grad_() for feature in students]
        torch.manual_seed(_SEED)
        try:
            gradients = torch.autograd.grad(loss(inputs, teachers), inputs, create_graph=create_graph)
        except Exception as error:  # the user's code may raise anything
            raise UserCodeError(f"{trial.loss!r} cannot be computed: {describe_error(error)}") from error
        found.append(torch.cat([gradient.detach().flatten(1) for gradient in gradients], 1))
    return _relative(found[0] - found[1], found[1])


def scale_error(trial: LossTrial) -> float | None:
    """Return how much a loss of products or distances changes, relative to its value, where all features of a model
    are multiplied by one number; None: the loss is of another kind. Raises UserCodeError."""
    loss = getattr(_build_term(trial), "loss", None)
    if not isinstance(loss, RelationalLoss) or loss.relation == "cosine":
        return None
    students, teachers, _ = _batch(trial)
    values = []
    try:
        for of_student, of_teacher in ((1.0, 1.0), (1.5, 1.0), (1.5, 1.5)):
            torch.manual_seed(_SEED)
            values.append(float(loss([of_student * s for s in students], [of_teacher * t for t in teachers])))
    except Exception as error:  # the user's code may raise anything
        raise UserCodeError(f"{trial.loss!r} cannot be computed: {describe_error(error)}") from error
    return max(abs(value - values[0]) for value in values) / max(abs(values[0]), 1e-12)


def measure_on_ranks(trial: LossTrial, processes: int, seconds: float) -> list[Measured]:
    """Start gloo processes that share the batch, and return what each has measured.

    Args:
        processes: their number, which divides the batch.
        seconds: that a process waits for another one in a collective.

    Raises:
        UserCodeError: the loss fails on a process; the earliest error.
    """
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # it warns of every process that it ends
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_run_rank, (trial, processes, folder, seconds), nprocs=processes, join=False)
        assert context is not None
        failed = False
        try:
            while not context.join():
                pass
        except mp.ProcessExitedException:  # the other ranks are ended; what was wrong lies in the folder
            failed = True
        found = [torch.load(path, weights_only=True) for path in sorted(Path(folder).glob("rank*.pt"))]
    errors = sorted((each["time"], each["error"]) for each in found if "error" in each)
    if errors:
        raise UserCodeError(f"on {processes} processes: {errors[0][1]}")
    if failed or len(found) < processes:
        raise UserCodeError(f"{trial.loss!r} ended one of {processes} processes")
    return [Measured(each["value"], each["gradient"]) for each in found]


def _run_rank(rank: int, trial: LossTrial, processes: int, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=seconds),
    )
    rows = trial.batch // processes
    found: dict[str, Any]
    try:
        measured = measure(trial, slice(rank * rows, (rank + 1) * rows), BatchLayout.even(rows))
        found = {"value": measured.value, "gradient": measured.gradient}
    except InputError as error:
        found = {"error": f"rank {rank}: {error}", "time": time.time()}
    unfinished = Path(folder) / f"unfinished{rank}"
    torch.save(found, unfinished)
    unfinished.rename(Path(folder) / f"rank{rank}.pt")
    if "error" in found:
        os._exit(1)  # the other ranks may wait for this one
    try:
        dist.barrier()
    except RuntimeError:  # another rank ended, or waits longer than it may; the missing result says which
        os._exit(1)
    dist.destroy_process_group()


def judge(whole: Measured, parts: Sequence[Measured], alone: Sequence[Measured]) -> Verdict:
    """Compare the loss on several processes with that on one.

    Args:
        whole: of the whole batch on one process.
        parts: of each process, in rank order.
        alone: of the rows of each process, as if they were a whole batch: what a loss yields that looks at the rows of
            its rank alone.
    """
    ranks = len(parts)
    value = sum(part.value for part in parts) / ranks
    gradient = torch.cat([part.gradient for part in parts]) / ranks
    value_error = _relative(torch.tensor(value - whole.value), torch.tensor(whole.value))
    gradient_error = _relative(gradient - whole.gradient, whole.gradient)
    same = value_error <= TOLERANCE and gradient_error <= TOLERANCE
    cause = None if same else _find_cause(whole, value, gradient, alone)
    norms = float(whole.gradient.norm()), float(gradient.norm())
    compares = not _near(sum(part.value for part in alone) / ranks, whole.value)
    return Verdict(whole.value, value, *norms, value_error, gradient_error, cause, compares)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _find_cause(whole: Measured, value: float, gradient: torch.Tensor, alone: Sequence[Measured]) -> str:
    ranks = len(alone)
    if not torch.isfinite(torch.tensor([whole.value, value])).all() or not torch.isfinite(gradient).all():
        return "value or gradient is not finite on random features"

    if _near(value, whole.value):
        if _relative(gradient - ranks * whole.gradient, ranks * whole.gradient) <= TOLERANCE:
            return (
                f"the value is right, and the gradient is {ranks} times what it should be: it is summed over ranks, "
                "where the training averages it"
            )
        return (
            "the value is right, and the gradient is not: rows of other ranks were gathered without their gradient; "
            "torch.distributed.all_gather carries none, gather_rows(x, layout) does"
        )
    for factor, what in ((ranks, f"{ranks} times"), (1 / ranks, f"1/{ranks} of")):
        if _near(value, factor * whole.value):
            return (
                f"the value is {what} what it should be: the mean over ranks must be the loss of the whole batch; "
                "layout.mean(per_sample) returns this rank's share, and a sum over rows is divided by layout.total"
            )
    if _near(value, sum(part.value for part in alone) / ranks):
        return (
            "each process computes the loss of its own rows alone, with a statistic of the local batch (a mean, a "
            "normalisation, a comparison of samples): bring the rows together by gather_rows(x, layout)"
        )
    return (
        "the loss depends on how the batch is cut: on the order or the number of the rows that a rank holds, or on "
        "random numbers; rows of all ranks are gather_rows(x, layout), this rank's begin at layout.first_row"
    )


def measure_alone(trial: LossTrial, processes: int) -> list[Measured]:
    """Return what the rows of each process yield as whole batches of their own. Raises UserCodeError."""
    rows = trial.batch // processes
    return [measure(trial, slice(r * rows, (r + 1) * rows), BatchLayout((rows,))) for r in range(processes)]


def _relative(difference: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.norm())
    return float(difference.norm()) / norm if norm > 0 else float(difference.norm())


def _batch(trial: LossTrial) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return features of student and teacher (B, ...), and labels (B,): the same in every process."""
    generator = torch.Generator().manual_seed(_SEED)
    students, teachers = (
        [torch.randn(trial.batch, *shape, dtype=torch.float64, generator=generator) for shape in shapes]
        for shapes in (trial.student, trial.teacher)
    )
    return students, teachers, torch.randint(trial.classes, (trial.batch,), generator=generator)


def _outputs(trial: LossTrial, features: Sequence[torch.Tensor]) -> Outputs:
    if trial.of == "features":
        return Outputs(None, {str(i): feature for i, feature in enumerate(features)})
    return Outputs(features[0] if features else None, {})
