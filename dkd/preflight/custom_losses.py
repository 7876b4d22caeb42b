"""Whether losses of the user's own can be made and trained, by a trial on random samples where they have parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dkd.build.feature_losses import Given, find_ignored, find_unused
from dkd.build.objective import custom_term
from dkd.config import Recipe
from dkd.config.losses import CustomLossSection
from dkd.distillation.objective import (
    Objective,
    Outputs,
    Term,
    asked_parameters,
    check_value,
    evaluate_alone,
    given_to_adapters,
)
from dkd.global_batch import BatchLayout
from dkd.models import Adapter, run_adapter
from dkd.user_code import UserCodeError, describe_error

Shapes = Mapping[str, tuple[int, ...]]


def check_custom_loss(
    recipe: Recipe, custom: CustomLossSection, student: Shapes | None, teacher: Shapes | None, rows: int
) -> None:
    """Check that a loss can be made; and where it has parameters, that it computes a few random samples, and that
    gradients reach its parameters and the student's features.

    Args:
        recipe: completed.
        custom: the section of the loss.
        student, teacher: shapes of the tapped features; None: they could not be had.
        rows: samples of the trial.

    Raises:
        UserCodeError: one of these is not so.
    """
    student, teacher = student or {}, teacher or {}
    term = custom_term(custom, lambda step: 1.0, Given(student, {custom.teacher or "": teacher}, seed=recipe.run.seed))
    asked = asked_parameters(term.loss)  # type: ignore[attr-defined]
    if custom.of != "labels" and not recipe.data.labels and "labels" in asked:
        raise UserCodeError(
            f"{custom.loss!r} has a parameter labels, but data.labels is false; remove the parameter, or the loss"
        )
    adapter = getattr(term, "trained", None)
    if adapter is not None and all(s in student and t in teacher for s, t in custom.paths):
        _Trial(custom, term, adapter, student, teacher, rows, recipe.data.classes or 2).run()


@dataclass(frozen=True)
class _Trial:
    """Computes a loss on random samples. Arguments as `check_custom_loss`; `classes` is K."""

    custom: CustomLossSection
    term: Term
    adapter: Adapter
    student: Shapes
    teacher: Shapes
    rows: int
    classes: int

    def run(self) -> None:
        """Raise UserCodeError where something is wrong."""
        custom, rows = self.custom, self.rows
        outputs = [self._outputs(shapes) for shapes in (self.student, self.teacher)]
        theirs = Outputs(None, {}, members={custom.teacher: outputs[1]}) if custom.teacher else outputs[1]
        for feature in outputs[0].features.values():
            feature.requires_grad_()
        rest = torch.zeros(rows, dtype=torch.int64), BatchLayout((rows,)), torch.arange(rows)
        pairs = [f"student {s} {self.student[s]}, teacher {t} {self.teacher[t]}" for s, t in custom.paths]
        try:
            value = evaluate_alone(self.term, outputs[0], theirs, *rest)
            check_value(custom.name, value)
            unused = find_unused(self.adapter.module, [value])
            ignored = find_ignored(value, [outputs[0].features[s] for s, _ in custom.paths])
            given = given_to_adapters(Objective([self.term]), theirs, *rest)
            yielded = run_adapter(custom.name, self.adapter, outputs[0].logits, outputs[0].features, given)
        except Exception as error:  # the user's code may raise anything
            reason, shown = describe_error(error), f" ({'; '.join(pairs)})" if pairs else ""
            raise UserCodeError(f"{custom.loss!r} fails on {rows} random samples: {reason}{shown}") from error
        self._check_rows(list(yielded.values()))
        if unused:
            names = [name.removeprefix("loss.") for name in unused]
            named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserCodeError(
                f"{custom.loss!r}: no gradient reaches its parameters {named}; use them in forward, or remove them"
            )
        if ignored:
            raise UserCodeError(
                f"{custom.loss!r}: no gradient reaches the student's feature of pair {pairs[ignored[0]]}"
            )

    def _outputs(self, shapes: Shapes) -> Outputs:
        features = {path: torch.randn(self.rows, *shape) for path, shape in shapes.items()}
        return Outputs(torch.randn(self.rows, self.classes), features)

    def _check_rows(self, yielded: list[torch.Tensor]) -> None:
        """Check what the adapter of a relational loss yields: under accumulation, the rows of all micro-steps are
        joined for the loss, and its gradient is cut again."""
        if not getattr(self.term, "relational", False):
            return
        for tensor in yielded:
            if tensor.shape[:1] != (self.rows,):
                raise UserCodeError(
                    f"{self.custom.loss!r}: the adapter of a relational loss yields tensors of one row for each "
                    f"sample, and one of shape {tuple(tensor.shape)} for {self.rows} samples; multiply it into the "
                    "others there"
                )
