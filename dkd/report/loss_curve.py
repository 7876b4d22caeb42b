"""Draw the loss of a learning-rate range test over the learning rate."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dkd.training.lr_range import LossCurve


def draw_loss_curve(curve: LossCurve, title: str) -> bytes:
    """Return a PNG: the loss of each step, the smoothed loss, and the suggested rate, where there is one."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(curve.rates, curve.losses, color="#0072B2", alpha=0.35, linewidth=0.8, label="each step")
    axis.plot(curve.rates, curve.smoothed, color="#0072B2", linewidth=1.8, label="smoothed")
    suggestion = curve.suggestion
    if suggestion is not None:
        axis.axvline(suggestion, color="#D55E00", linestyle="--", label=f"a tenth of the lowest: {suggestion:g}")
    axis.set_xscale("log")
    # The last steps of a test that diverged would flatten all others.
    least, first = min(curve.losses), curve.smoothed[0]
    axis.set_ylim(least - 0.05 * abs(first), max(first, least) + 0.5 * (first - least) + 0.2 * abs(first))
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss, weighted sum")
    axis.set_title(title, parse_math=False)
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
