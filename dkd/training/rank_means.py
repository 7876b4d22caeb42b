"""Small numbers averaged over ranks without stopping for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


class RankMeans:
    """Packs a step's scalars into one tensor and averages it over ranks by one asynchronous all-reduce; read it a step later.

    Args:
        step: what the numbers belong to.
        values: scalars on this rank; the same names in the same order on every rank.
    """

    def __init__(self, step: int, values: Mapping[str, torch.Tensor | float]) -> None:
        self.step = step
        self._names = list(values)
        device = next((v.device for v in values.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
        # full, not tensor: a number written by a kernel, where a copy from the host would wait for the device.
        self._local = torch.stack(
            [v.double() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float64, device=device) for v in values.values()]
        )
        self._mean, self._work = self._local, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._mean = self._local / dist.get_world_size()
            self._work = dist.all_reduce(self._mean, async_op=True)

    def read(self) -> dict[str, float]:
        """The means, the same on every rank. Waits for the all-reduce."""
        if self._work is not None:
            self._work.wait()
        return dict(zip(self._names, self._mean.tolist(), strict=True))

    def local(self) -> dict[str, float]:
        """What this rank put in."""
        return dict(zip(self._names, self._local.tolist(), strict=True))
