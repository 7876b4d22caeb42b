"""What a person sees while a run is trained: a bar on a terminal, a line now and then elsewhere. On the main process
only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from dkd import console


class Progress:
    """Shows loss terms, images a second and time left.

    Args:
        total_steps: of the whole run.
        first_step: where it starts.
        images_per_step: the global batch.
        shown: False on all ranks but the main one.
        line_every: seconds between lines where the output is no terminal.
    """

    def __init__(
        self, total_steps: int, first_step: int, images_per_step: int, shown: bool, line_every: float = 10.0
    ) -> None:
        self._total, self._first, self._images, self._shown, self._line_every = (
            total_steps,
            first_step,
            images_per_step,
            shown,
            line_every,
        )
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if shown and sys.stderr is not None and sys.stderr.isatty() and console.LOGGER.level <= logging.INFO:
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of global step `step`, counted from 0, under their names."""
        if not self._shown:
            return
        elapsed = time.monotonic() - self._start
        done = step + 1 - self._first
        rate = done * self._images / elapsed if elapsed > 0 else 0.0
        terms = {name: f"{value:.4g}" for name, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix({**terms, "img/s": f"{rate:.0f}"}, refresh=False)
            self._bar.update(done - (self._bar.n - self._first))
        elif time.monotonic() - self._last_line >= self._line_every or step + 1 == self._total:
            self._last_line = time.monotonic()
            left = elapsed / done * (self._total - step - 1)
            shown = " ".join(f"{name} {value}" for name, value in terms.items())
            self.say(f"step {step + 1}/{self._total}  {shown}  {rate:.0f} images/s  {clock(left)} left")

    def say(self, message: str) -> None:
        """Print a line that stays."""
        if self._shown:
            if self._bar is None:
                console.say(message)
            else:  # above the bar
                self._bar.clear()
                console.say(message)
                self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Return a duration as MM:SS, or H:MM:SS from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
