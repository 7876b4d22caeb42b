"""A frozen, replicated teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models import TappedModel
from dkd.models.compiling import Compiled, compile_model


class FrozenTeacher(nn.Module):
    """Always in eval mode, no gradient for its weights, nothing of it changes.

    Args:
        model: the filled model.
        taps: dotted paths of the features wanted.
        needs_logits: whether any loss uses its logits; if not, its forward stops after the last tap.
        input_size: side the images are resized to first, pixels; None: as they come.
        autocast: as TappedModel.
        fingerprint: of its weights, before they are cut into shards or rounded.
        name: of its architecture.

    Raises:
        TapError: as TappedModel.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        needs_logits: bool,
        input_size: int | None = None,
        autocast: torch.dtype | None = None,
        fingerprint: str = "",
        name: str = "",
    ) -> None:
        super().__init__()
        self.tapped = TappedModel(model, taps, needs_logits, autocast)
        self.input_size, self.fingerprint, self.name = input_size, fingerprint, name
        self._taps = sorted(self.tapped.taps)
        self.requires_grad_(False)
        self.eval()

    def facts(self) -> dict[str, Any]:
        """Return what identifies the teacher: its name, the fingerprint of its weights, and its taps."""
        return {"name": self.name, "fingerprint": self.fingerprint, "taps": self._taps}

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whoever asks: BatchNorm and dropout of a teacher never train."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Normalised images (b, 3, H, W) -> logits (b, K) or None, {tap: feature}. Without gradient, but for images
        that require one."""
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            if self.input_size is not None and images.shape[-1] != self.input_size:
                images = F.interpolate(images, (self.input_size, self.input_size), mode="bilinear", antialias=True)
            return self.tapped(images)

    @contextmanager
    def with_logits(self) -> Iterator[None]:
        """Inside, its forward runs to its end and yields logits, whether any loss uses them or not. All ranks enter it
        together: the weights after the last tap may be cut into shards."""
        needed, self.tapped.needs_logits = self.tapped.needs_logits, True
        try:
            yield
        finally:
            self.tapped.needs_logits = needed

    def compile(self, how: Compiled = True) -> None:
        """Compile the model's forward in place, as `compile_model`."""
        compile_model(self.tapped, how)
