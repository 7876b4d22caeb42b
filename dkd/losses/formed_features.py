"""State, for losses that compare features in a form, what they read of a teacher sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dkd.global_batch import full_precision
from dkd.losses.feature_forms import FeatureForm
from dkd.losses.feature_pairs import no_autocast
from dkd.losses.sample_form import PairShapes, SampleForm, Shape


class FormedFeatures:
    """Store features in the form in which they are compared. A base of losses and adapters that have a `form`: brought
    into that form once more, the result stays what it is."""

    form: FeatureForm
    promotes_teacher: bool = True
    """Whether features are promoted to full precision before they are brought into the form."""

    def sample_forms(self, shapes: PairShapes) -> list[SampleForm]:
        """Return the vector or map of each pair."""
        return [self._sample_form(student, teacher) for student, teacher in self.compared_shapes(shapes)]

    def compared_shapes(self, shapes: PairShapes) -> PairShapes:
        """Return the shapes by which the resolution of each pair is found."""
        return shapes

    def _sample_form(self, student: Shape, teacher: Shape) -> SampleForm:
        shape, form = self.form.shapes(student, teacher)[1], self.form
        facts: dict[str, Any] = {"promoted": self.promotes_teacher}
        if len(teacher) == 2:
            tokens = form.class_tokens
            facts["class_tokens"] = tokens if tokens is None or isinstance(tokens, int) else tokens[1]
            facts["pool"] = form.pool if form.kind == "vector" else None
        if form.kind == "map":
            own = form.shapes(teacher, teacher)[1]
            facts |= {"resolution": list(shape[1:]), "resize": None if shape == own else form.resize}
        return SampleForm(form.kind, facts, shape, self.promotes_teacher, large=form.kind == "map")

    @torch.no_grad()
    def take_samples(self, teacher: Sequence[torch.Tensor], shapes: PairShapes) -> list[torch.Tensor]:
        """Return the teacher's features in their form."""
        found = []
        for feature, (student, _) in zip(teacher, self.compared_shapes(shapes), strict=True):
            with no_autocast(feature.device):
                own = full_precision(feature) if self.promotes_teacher else feature
                found.append(self.form.teacher(own, torch.empty(1, *student, device="meta")))
        return found

    def give_samples(self, samples: Sequence[torch.Tensor], shapes: PairShapes) -> Any:
        """Return them in the place of the features."""
        return list(samples)
