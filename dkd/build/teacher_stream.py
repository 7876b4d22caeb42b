"""Choose where the teacher computes."""

from __future__ import annotations

import torch

from dkd.config import Recipe
from dkd.config.derived import caches, teacher_views
from dkd.distillation import InputGradientTerm, Objective
from dkd.distillation.teacher_stream import InOrder, OwnStream, TeacherStream


def choose_teacher_stream(
    recipe: Recipe, objective: Objective, device: torch.device
) -> tuple[TeacherStream, str | None]:
    """Return where the teacher computes, and where the recipe asks for a stream of its own that it cannot have, a line
    with the reason."""
    if not recipe.train.teacher_stream:
        return InOrder(), None
    reason = why_in_order(recipe, objective, device)
    if reason is not None:
        return InOrder(), f"train.teacher_stream: the teacher computes before the student, because {reason}"
    return OwnStream(device), None


def why_in_order(recipe: Recipe, objective: Objective, device: torch.device) -> str | None:
    """Return why the teacher cannot compute beside the student, to follow "because"; None: it can."""
    sections = [view.teacher for _, view in teacher_views(recipe) if view.teacher is not None]
    reasons = {
        "there is none": not sections,
        f"{device.type} devices have no streams": device.type != "cuda",
        "a sharded teacher's weights travel on streams of their own": any(
            section.placement != "replicated" for section in sections
        ),
        "a loss differentiates by the images": any(isinstance(t, InputGradientTerm) for t in objective.terms),
        "modules that losses train read its features in the student's forward": bool(objective.adapters),
        "teacher.cache brings what it has computed before": bool(caches(recipe)),
        "train.graph is asked for, which makes one launch of both": recipe.train.graph is True,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
