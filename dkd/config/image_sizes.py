"""The key for the size of training images: one size, or another one from some epochs on."""

from __future__ import annotations

from typing import Annotated, Any

from dkd.config.key_types import MOST, allow


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def _is_size(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None or _is_count(value, 1)
    # JSON has no numbers as keys.
    epochs = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in value]
    return 0 in epochs and all(_is_count(e, 0) for e in epochs) and all(_is_count(size, 1) for size in value.values())


TrainImageSize = Annotated[
    int | dict[int, int] | None,
    allow(_is_size, "a number of pixels, or the pixels from epoch 0 and from later ones on, such as {0: 160, 10: 224}"),
]


def sizes_by_epoch(value: int | dict[int, int] | None) -> dict[int, int]:
    """Return, in order, the epochs in which a size begins, and the side of the images from then on, in pixels; empty:
    the recipe names none."""
    if value is None:
        return {}
    return {0: value} if isinstance(value, int) else dict(sorted(value.items()))
