"""How far a training is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Holds what changes while a run is trained, apart from tensors."""

    step: int = 0
    """Optimizer steps done, by all starts."""
    first_step: int = 0
    """Steps that were done when this start began."""
    seconds_before: float = 0.0
    """Seconds that earlier starts took."""
    replaced_images: int = 0
    """Images that could not be read and were replaced by others."""
    notes: list[str] = field(default_factory=list)
    """What is to be reported of how this start began."""
    started: float = field(default_factory=time.monotonic)
    """When the loop of this start began, by time.monotonic()."""

    @property
    def steps_this_start(self) -> int:
        """Return the steps done by this start."""
        return self.step - self.first_step

    def seconds(self) -> float:
        """Return the seconds of training, of all starts."""
        return self.seconds_before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores of it."""
        return {"step": self.step, "seconds": round(self.seconds(), 1), "replaced_images": self.replaced_images}
