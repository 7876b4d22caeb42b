"""The training step of mdistiller (https://github.com/megvii-research/mdistiller), from a checkout of it, for
`benchmarks.step --peer PATH`: its models, its AT, and what its trainer does in each step, without its data loader."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class PeerRow:
    """A step of mdistiller's AT with β = 1000, in float32, on images that are on the device.

    Args:
        folder: the checkout.
        teacher, student: names of its CIFAR models.
        batch: images of a step.
        device: where it trains.
    """

    title = "mdistiller: AT, float32"

    def __init__(self, folder: Path, teacher: str, student: str, batch: int, device: torch.device) -> None:
        if not (folder / "mdistiller").is_dir():
            raise SystemExit(f"--peer {folder}: there is no folder mdistiller in it; name a checkout of the repository")
        sys.path.insert(0, str(folder))
        models = importlib.import_module("mdistiller.models.cifar").cifar_model_dict
        attention = importlib.import_module("mdistiller.distillers.AT").AT
        settings = SimpleNamespace(AT=SimpleNamespace(P=2, LOSS=SimpleNamespace(CE_WEIGHT=1.0, FEAT_WEIGHT=1000.0)))
        made = [models[name][0](num_classes=10) for name in (student, teacher)]
        self.batch, self.device = batch, device
        self._distiller: Any = attention(*made, settings).to(device).train()
        self._optimizer = torch.optim.SGD(
            self._distiller.get_learnable_parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )
        self._images = torch.randn(batch, 3, 32, 32, device=device)
        self._labels = torch.randint(10, (batch,), device=device)

    def take(self, steps: int) -> list[float]:
        """Take steps, and return the seconds of each, which are equal."""
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [(time.perf_counter() - started) / steps] * steps

    def _step(self) -> None:
        """Do what its trainer's `train_iter` does with a batch: it reads loss and accuracy in each step."""
        self._optimizer.zero_grad()
        logits, losses = self._distiller(image=self._images, target=self._labels, epoch=1)
        loss = sum(each.mean() for each in losses.values())
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            right = logits.topk(5, 1).indices.eq(self._labels[:, None])
            float(right[:, :1].sum()), float(right.sum())
        loss.cpu().detach().numpy().mean()
