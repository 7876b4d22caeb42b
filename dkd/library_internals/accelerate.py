"""Use Accelerate's private names. All were read in Accelerate 1.15."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

PREPARE_BACKEND = "_prepare_backend"
"""The method of PartialState that chooses the backend and the kind of distribution. Accelerate offers FSDP and
DeepSpeed only where this method reports an accelerator, and has no public way to ask for them on CPUs."""


def reset_accelerate() -> None:
    """Forget Accelerate's settings of this process, so that another Accelerator can be made. The settings live in
    classes, and no public function clears all of them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def fresh_settings() -> Iterator[None]:
    """Set Accelerate's settings of this process aside, so that another Accelerator can be made inside, and restore them
    afterwards. The settings live in classes, which all of their instances share."""
    classes = (PartialState, AcceleratorState, GradientState)
    kept = [dict(each._shared_state) for each in classes]
    reset_accelerate()
    try:
        yield
    finally:
        reset_accelerate()
        for each, settings in zip(classes, kept, strict=True):
            each._shared_state.update(settings)


def set_units_of_sharding(model: nn.Module, classes: Sequence[str]) -> None:
    """Name the classes of modules that FSDP2 shards as a unit each. Accelerate reads them from this attribute of a
    model, a convention of transformers; its public setting is for the launch's file, which does not know the model."""
    model._no_split_modules = list(classes)  # type: ignore[assignment]
