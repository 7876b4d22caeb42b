"""The learning-rate range test: train for some steps while the learning rate grows, and see where the loss falls.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3. The rate grows
exponentially, as in the implementations of fastai and Lightning. The suggestion is fastai's `minimum`: a tenth of the
rate at which the smoothed loss is lowest. Where the loss falls most steeply, Lightning's proposal, is reported beside
it: with feature losses of large weights that place lies far too low, since these fall at any rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dkd.distributed.async_mean import AsyncMean
from dkd.runs.progress import Progress
from dkd.training.components import Components
from dkd.training.trainer import Trainer

DIVERGED = 4.0
"""The test ends once the running mean of the loss is more than so many times its lowest value, as in fastai."""
_KEPT = 0.9  # share of the running mean that a step keeps, for the end of the test
_FIRST_STEPS = 10  # in which the running mean is not yet compared
_SMALLEST_FALL = 0.01  # of the loss: less is taken for noise


@dataclass(frozen=True)
class LearningRates:
    """Holds the rates of a test: from the lowest to the highest, in equal steps of their logarithm.

    Args:
        lowest, highest: learning rates, both above 0.
        steps: optimizer steps, at least 2.
    """

    lowest: float = 1e-6
    highest: float = 10.0
    steps: int = 100

    def at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        return self.lowest * (self.highest / self.lowest) ** (step / (self.steps - 1))


@dataclass(frozen=True)
class LossCurve:
    """Holds what a test has measured: the same on every rank.

    Args:
        rates: the learning rate of each step.
        losses: the weighted sum of all losses on the global batch, before the step's update.
        diverged: whether the test ended before its last step.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    diverged: bool = False

    @property
    def smoothed(self) -> list[float]:
        """Return the losses, each averaged with its neighbours on both sides by the weights of a normal distribution. A
        running mean would shift the curve to higher rates."""
        width, reach = self._width, self._reach
        found = []
        for centre in range(len(self.losses)):
            near = range(max(0, centre - reach), min(len(self.losses), centre + reach + 1))
            weights = [math.exp(-0.5 * ((i - centre) / width) ** 2) for i in near]
            found.append(sum(w * self.losses[i] for w, i in zip(weights, near, strict=True)) / sum(weights))
        return found

    @property
    def _width(self) -> float:
        """Return the standard deviation of the weights, in steps."""
        return max(1.0, len(self.losses) / 30)

    @property
    def _reach(self) -> int:
        """Return the steps on each side that count; nearer to the ends of the curve, its slope is not exact."""
        return math.ceil(3 * self._width)

    @property
    def suggestion(self) -> float | None:
        """Return a tenth of the rate at which the smoothed loss is lowest, rounded to two digits; None where the loss
        does not fall."""
        return None if self.lowest is None else float(f"{self.lowest / 10:.1e}")

    @property
    def lowest(self) -> float | None:
        """Return the rate at which the smoothed loss is lowest; None where the loss does not fall."""
        place = self._find_lowest()
        return None if place is None else self.rates[place]

    @property
    def steepest(self) -> float | None:
        """Return the rate at which the smoothed loss falls most steeply over the logarithm of the rate, rounded to two
        digits; None where the loss does not fall."""
        place = self._find_steepest()
        return None if place is None else float(f"{self.rates[place]:.1e}")

    @property
    def begins_too_high(self) -> bool:
        """Return whether the loss is lowest at the very beginning: a lower rate may be better."""
        place = self._find_lowest()
        return place is not None and (place <= self._reach or self.rates[place] / 10 < self.rates[0])

    def _find_lowest(self) -> int | None:
        smoothed = self.smoothed
        lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
        fell = lowest >= 2 and smoothed[0] - smoothed[lowest] >= _SMALLEST_FALL * abs(smoothed[0])
        return lowest if fell else None

    def _find_steepest(self) -> int | None:
        lowest, smoothed = self._find_lowest(), self.smoothed
        # The rates are equally far apart in their logarithm: differences of neighbours are slopes.
        return None if lowest is None else min(range(1, lowest), key=lambda i: smoothed[i + 1] - smoothed[i - 1])


def measure(parts: Components, rates: LearningRates) -> LossCurve:
    """Train while the learning rate grows, and return the loss of each step. The student is of no use afterwards. A
    collective.

    Args:
        parts: of `build_trial`.
        rates: of each step, in place of the recipe's schedule.

    Raises:
        TrainingError: on every rank: images cannot be loaded.
        LostRankError: another rank is gone.
    """
    parts.learning_rate = rates.at
    trainer = Trainer(parts)
    progress = Progress(rates.steps, 0, parts.recipe.train.global_batch, parts.launch.is_main)
    losses: list[float] = []
    mean, lowest, diverged = 0.0, math.inf, False
    try:
        with parts.heartbeat.names_lost_ranks():
            parts.step.student.train()
            trainer.load_images(rates.steps)
            for step in range(rates.steps):
                # Every rank reads the same numbers, and so ends at the same step.
                counts = AsyncMean(step, trainer.train_step()).read().counts
                trainer.metrics.check_loading(step, counts)
                loss = counts["loss"]
                mean = _KEPT * mean + (1 - _KEPT) * loss
                now = mean / (1 - _KEPT ** (step + 1))
                if not math.isfinite(loss) or (step >= _FIRST_STEPS and now > DIVERGED * lowest > 0):
                    diverged = True
                    break
                lowest = min(lowest, now)
                losses.append(loss)
                progress.step(step, {"lr": rates.at(step), "loss": loss})
    finally:
        progress.close()
        trainer.close()
    return LossCurve([rates.at(step) for step in range(len(losses))], losses, diverged)
