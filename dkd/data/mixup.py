"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) of one micro-batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.transforms import v2


class MixupCutmix:
    """Mixes the images of a micro-batch with each other, and their labels alike: partners never come from another
    micro-batch.

    Args:
        classes: K.
        mixup: α of the Beta(α, α) that mixup's proportion is drawn from; 0: no mixup.
        cutmix: the same for CutMix's. With both, each micro-batch takes one of them, at equal odds.
        dtype: of the mixed images and probabilities, and of the arithmetic.

    Raises:
        ValueError: neither is above 0.
    """

    def __init__(
        self, classes: int, mixup: float = 0.0, cutmix: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        ways = [
            way(alpha=alpha, num_classes=classes)
            for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha > 0
        ]
        if not ways:
            raise ValueError("neither mixup nor cutmix is above 0")
        self._classes, self._dtype = classes, dtype
        self._mix = v2.RandomChoice(ways) if len(ways) > 1 else ways[0]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 or float images (b, 3, H, W) and int64 labels (b,) -> images and the probabilities (b, K) of the
        classes.

        Args:
            seed: all that is drawn depends on it alone.

        Raises:
            ValueError: a single image, which would be mixed with itself.
        """
        if len(images) < 2:
            raise ValueError(f"mixup and CutMix need a micro-batch of at least 2 images to mix, not {len(images)}")
        # The transforms draw from the default generator of the CPU, wherever the images are.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            mixed, probabilities = self._mix(images.to(self._dtype), F.one_hot(labels, self._classes).to(self._dtype))
        finally:
            generator.set_state(before)
        return mixed, probabilities
