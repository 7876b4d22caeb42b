"""Mix the images of one micro-batch by mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.transforms import v2


class MixupCutmix:
    """Mix the images of a micro-batch with each other, and their labels in the same proportion. No image is mixed with
    an image of another micro-batch.

    Args:
        classes: K.
        mixup: α of the Beta(α, α) that mixup's proportion is drawn from; 0: no mixup.
        cutmix: the same for CutMix. With both, one of them is drawn for each micro-batch, at equal odds.
        dtype: the type of the mixed images and probabilities, and of the arithmetic.
        labels: whether images have labels; else images are mixed alone, in the same way.

    Raises:
        ValueError: neither mixup nor cutmix is above 0.
    """

    def __init__(
        self,
        classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        dtype: torch.dtype = torch.float32,
        labels: bool = True,
    ) -> None:
        ways = [
            way(alpha=alpha, num_classes=classes)
            for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha > 0
        ]
        if not ways:
            raise ValueError("neither mixup nor cutmix is above 0")
        self._classes, self._dtype, self._labels = classes, dtype, labels
        self._mix = v2.RandomChoice(ways) if len(ways) > 1 else ways[0]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images (b, 3, H, W) and the probabilities (b, K) of the classes; without labels, `labels` as
        they are.

        Args:
            images: uint8 or float (b, 3, H, W).
            labels: int64 (b,).
            seed: everything that is drawn depends on the seed alone.

        Raises:
            ValueError: there is a single image, which would be mixed with itself.
        """
        if len(images) < 2:
            raise ValueError(f"mixup and CutMix need a micro-batch of at least 2 images to mix, not {len(images)}")
        # The transforms draw from the default generator of the CPU, wherever the images are.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            # torchvision mixes images only together with labels: those of images without labels stand for no class.
            known = labels if self._labels else torch.zeros_like(labels)
            mixed, probabilities = self._mix(images.to(self._dtype), F.one_hot(known, self._classes).to(self._dtype))
        finally:
            generator.set_state(before)
        return mixed, probabilities if self._labels else labels
