"""List the pairs of features that a recipe compares, with the weight of one sample.

The same β and γ give a sample different weights for maps and batches of different sizes: these lines make recipes
comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dkd.build.models import pairs, student_spec, teacher_spec
from dkd.config import Recipe
from dkd.config.derived import teacher_views
from dkd.config.losses import (
    AttentionTransferSection,
    ComparingSection,
    CustomLossSection,
    LossSection,
    PktSection,
    SimilarityPreservingSection,
    WeightSchedule,
)
from dkd.losses.attention_transfer import token_grid, tokens_of_both
from dkd.losses.relational import scaled_weight
from dkd.models import ModelSpec, output_shapes

Shapes = Mapping[str, tuple[int, ...]]
Samples = Callable[[ComparingSection], int]


def tap_table(recipe: Recipe, image_size: int, samples: Samples) -> list[tuple[str, str]]:
    """Return (name of the loss, its two taps with shapes and the weight of one sample) for each pair of each loss.

    Args:
        image_size: pixels, the side of the student's input.
        samples: returns how many samples a loss compares with each other.
    """
    return [line for _, view in teacher_views(recipe) for line in _tap_lines(view, image_size, samples)]


def _tap_lines(recipe: Recipe, image_size: int, samples: Samples) -> list[tuple[str, str]]:
    losses = recipe.losses
    if recipe.teacher is None or not pairs(recipe):
        return []
    student = _shapes(student_spec(recipe), [s for s, _ in pairs(recipe)], image_size)
    teacher = _shapes(
        teacher_spec(recipe),
        [t for _, t in pairs(recipe)],
        recipe.teacher.input_size or image_size,
    )

    def compared(s: str, t: str) -> str:
        return f"{s} {_dimensions(student[s])}  ←  {t} {_dimensions(teacher[t])}"

    lines = []
    for key, section in losses.named():
        for number, (s, t) in enumerate(section.paths):
            weight = _weigh_pair(section, number, student[s], teacher[t], samples)
            lines.append((getattr(section, "name", key), f"{compared(s, t)}   {weight}"))
    return lines


def _weigh_pair(
    section: LossSection, number: int, student: tuple[int, ...], teacher: tuple[int, ...], samples: Samples
) -> str:
    """Return what one sample of a pair weighs in the loss, in words."""
    if isinstance(section, AttentionTransferSection):
        return _attention_weight(section, section.pair_weights[number], student, teacher)
    if isinstance(section, SimilarityPreservingSection | PktSection):
        if isinstance(section, SimilarityPreservingSection):
            symbol, published = "γ", _first(section.gamma)
        else:
            symbol, published = "weight", _first(section.weight)
        weight = section.pair_weights[number]
        effective = scaled_weight(published, section.reference_batch, samples(section))
        formula = f"{symbol}·B/reference_batch = {published:g} · {samples(section)} / {section.reference_batch}"
        times = f" · {weight:g}" if weight != 1 else ""
        return f"{formula}{times} = {effective * weight:g}"
    if isinstance(section, CustomLossSection):
        return f"weight {_first(section.weight):g}"
    return section.describe()


def _attention_weight(
    at: AttentionTransferSection, weight: float, student: tuple[int, ...], teacher: tuple[int, ...]
) -> str:
    """Return the weight of ‖Q_S − Q_T‖² of one sample in the loss; with the paper's reduction, of ‖Q_S − Q_T‖."""
    tokens = tokens_of_both(at.class_tokens)
    maps = [token_grid(shape, count, True)[1:] for shape, count in zip((student, teacher), tokens, strict=True)]
    positions = min(maps[0][0], maps[1][0]) * min(maps[0][1], maps[1][1])
    beta = _first(at.beta) * weight
    if at.reduction == "paper":
        return f"β/2 = {beta / 2:.4g} a sample's distance"
    return f"β/HW = {beta:g} / {positions} = {beta / positions:.4g} a sample's squared distance"


def _first(weight: float | WeightSchedule) -> float:
    """Return a weight, or the value that a scheduled weight starts with."""
    return weight.start if isinstance(weight, WeightSchedule) else weight


def _shapes(spec: ModelSpec, taps: list[str], image_size: int) -> Shapes:
    return output_shapes(spec, list(dict.fromkeys(taps)), image_size)[1]


def _dimensions(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
