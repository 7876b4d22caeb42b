"""One optimizer step as a CUDA graph: captured once, then replayed by one call.

A step of a small model is hundreds of launches, and Python takes longer to ask for them than a GPU to run them. What a
graph reads lies at fixed places: the images and labels of the step are copied there, and learning rate and loss weights
are tensors on the device (`SteppedRates`, `LossWeights`). Random numbers follow the seed that is set before a replay.
Whatever else Python decides in a step is decided once, for all: the first steps after the capture are taken both ways.

Without a GPU nothing is captured, and the same parts run one after the other: what tests compare with the usual step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dkd.config import Recipe
from dkd.data.loader import Batch
from dkd.distillation import InputGradientTerm
from dkd.distillation.step import DistillationStep, MicroLoss
from dkd.engines.accelerated import AcceleratedEngine
from dkd.engines.ema import WeightAverage
from dkd.errors import TrainingError
from dkd.text import first_line

WARM_UP = 3
"""Steps that run on the stream of the capture before it, so that libraries have chosen their kernels there."""
CHECKED = 3
"""Steps after the capture that are taken both ways. They have other images, seeds and rates than the captured one: what
Python decided for that one, and would decide otherwise now, shows there."""
LARGEST_DIFFERENCE = 0.1
"""The largest difference of a step that is taken both ways, as a share of the update. A graph that misses an input
differs by about 1; kernels whose sums have no fixed order, in bfloat16, by 1e-3."""
LARGEST_LOSS_DIFFERENCE = 0.01
"""The same of the loss, as a share of it."""


def why_not(recipe: Recipe, step: DistillationStep, engine: AcceleratedEngine, world_size: int) -> str | None:
    """Return why the steps of a training are not captured, to follow "because"; None: they can be."""
    reasons = {
        "several processes exchange gradients in it": world_size > 1,
        "it accumulates gradients": step.micro_steps > 1,
        "train.skip_nonfinite waits for the gradient": recipe.train.skip_nonfinite > 0,
        "LAMB reads its number of steps on the host": recipe.optimizer.name == "lamb",
        "fp16 leaves out updates": engine.leaves_out_updates,
        "teacher.cache brings other numbers in each step": bool(step.teaching.stored),
        "a loss differentiates by the images": any(isinstance(t, InputGradientTerm) for t in step.objective.terms),
        "a loss keeps something from step to step": step.keeps_something,
        "the engine keeps shards": engine.rules.shards_training,
        f"{engine.device.type} devices have no such graphs": engine.device.type not in ("cpu", "cuda"),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class Graphs(Protocol):
    """Captures what a device is asked for."""

    def warm_up(self, compute: Callable[[], MicroLoss]) -> MicroLoss:
        """Compute as a capture would, without one."""
        ...

    def capture(self, compute: Callable[[], MicroLoss]) -> tuple[MicroLoss, Callable[[], None]]:
        """Return what `compute` returns, in memory that each call of the second result fills again; nothing is
        computed before. Raises RuntimeError where something cannot be captured."""
        ...


class CudaGraphs:
    """Captures on a stream of its own.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def warm_up(self, compute: Callable[[], MicroLoss]) -> MicroLoss:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = compute()
        current.wait_stream(self._stream)
        return loss

    def capture(self, compute: Callable[[], MicroLoss]) -> tuple[MicroLoss, Callable[[], None]]:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Threads that load images continue meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            loss = compute()
        torch.cuda.empty_cache()  # what steps have used until now; the graph has memory of its own
        return loss, graph.replay


class StepGraph:
    """Takes the steps of one process alone.

    Args:
        step: computes the losses.
        engine: of the student.
        average: of the student's weights, or None.
        max_norm: as Engine.step.
        say: reports a line.
        graphs: captures; None: nothing is captured.
    """

    def __init__(
        self,
        step: DistillationStep,
        engine: AcceleratedEngine,
        average: WeightAverage | None,
        max_norm: float | None,
        say: Callable[[str], None],
        graphs: Graphs | None = None,
    ) -> None:
        self._step, self._engine, self._average, self._max_norm, self._say = step, engine, average, max_norm, say
        self._graphs = graphs
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._taken = 0
        self._replay: Callable[[], None] | None = None
        self._loss: MicroLoss | None = None

    @property
    def is_ready(self) -> bool:
        """Return whether the next step can be taken: the first steps of a start report more than later ones."""
        return self._step.is_settled

    def take(self, batch: Batch, number: int) -> MicroLoss:
        """Take one step. The result is overwritten by the next one.

        Args:
            batch: of this step, on any device.
            number: of the step, from 0.
        """
        self._fill(self._step.load(batch, number))
        self._step.seed(number)
        self._step.objective.weights.hold(number)
        if self._graphs is None:
            return self._compute(number)
        self._taken += 1
        if self._taken <= WARM_UP:
            return self._graphs.warm_up(lambda: self._compute(number))
        if self._taken == WARM_UP + 1:
            self._capture(self._graphs, number)
            return self._compute(number)
        if self._taken <= WARM_UP + 1 + CHECKED:
            return self._take_both_ways(number)
        assert self._replay is not None
        assert self._loss is not None
        self._replay()
        return self._loss

    def _fill(self, found: Sequence[torch.Tensor]) -> None:
        """Copy images and labels to where the graph reads them. Those of another shape need another graph."""
        if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in self._inputs]:
            self._inputs = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in found)
            self._replay, self._taken = None, 0
        for own, each in zip(self._inputs, found, strict=True):
            own.copy_(each, non_blocking=True)

    def _compute(self, number: int) -> MicroLoss:
        """Compute and apply the update of the images in place."""
        self._step.begin([self._inputs], number, is_loaded=True)
        with self._engine.accumulate():
            loss = self._step.loss(0)
            self._engine.backward(loss.total)
            self._engine.step(self._max_norm, False)
        self._step.end()
        if self._average is not None:
            self._average.update()
        return loss

    def _capture(self, graphs: Graphs, number: int) -> None:
        """Capture a graph, which computes nothing yet. Raises TrainingError: after a capture that fails, torch's memory
        of the GPU is in no state to continue, and the run is hardly begun."""
        try:
            self._loss, self._replay = graphs.capture(lambda: self._compute(number))
        except RuntimeError as error:  # whatever the cause
            raise TrainingError(
                f"the step cannot be captured as a CUDA graph ({first_line(error)}); set train.graph=false, and start "
                "again: the run resumes"
            ) from error
        self._step.seed(number)

    def _take_both_ways(self, number: int) -> MicroLoss:
        """Take a step by the graph, undo it, and take it as usual: the state that stays is that of the usual way, which
        a graph that computes something else is given up for."""
        assert self._replay is not None
        assert self._loss is not None
        before = [tensor.clone() for tensor in self._state()]
        self._replay()
        loss, found = self._loss.total.detach().clone(), self._judged()
        for tensor, kept in zip(self._state(), before, strict=True):
            tensor.copy_(kept)
        old = self._judged()
        self._step.seed(number)
        usual = self._compute(number)
        update = largest_difference(self._judged(), found, old)
        share = float((loss - usual.total.detach()).abs() / usual.total.detach().abs().clamp_min(1e-12))
        # Written so that numbers that are not finite give the graph up, too.
        if not (update <= LARGEST_DIFFERENCE and share <= LARGEST_LOSS_DIFFERENCE):
            self._graphs = None
            what = f"by {update:.2g} of an update, and {share:.2g} of the loss"
            self._say(
                f"warning: train.graph: a replayed step differs from the usual one ({what}): something in it is "
                "decided again in each step, beyond torch's seed; steps run operator by operator"
            )
        return usual

    def _judged(self) -> list[torch.Tensor]:
        """Return what the two ways are compared by, each as one vector: the weights, what floats beside them, and the
        averages. One tensor's update alone may be all rounding, as that of a bias before BatchNorm."""
        model = self._engine.model
        floats = [b for b in model.buffers() if b.is_floating_point()]
        averages = [] if self._average is None else [average for _, _, average in self._average.named()]
        parts = ([p.detach() for p in model.parameters()], floats, averages)
        return [torch.cat([tensor.flatten().double() for tensor in part]) for part in parts if part]

    def _state(self) -> list[torch.Tensor]:
        """Return everything that a step changes."""
        optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        averages = [] if self._average is None else [average for _, _, average in self._average.named()]
        return [t.detach() for t in (*self._engine.model.parameters(), *self._engine.model.buffers(), *kept, *averages)]


def largest_difference(
    usual: Sequence[torch.Tensor], found: Sequence[torch.Tensor], before: Sequence[torch.Tensor]
) -> float:
    """Return the largest ‖found − usual‖ / ‖usual − before‖ of several vectors, and NaN where a number is one."""
    shares = []
    for new, other, old in zip(usual, found, before, strict=True):
        change = (new.detach().double() - old.double()).norm()
        shares.append((other.double() - new.detach().double()).norm() / change.clamp_min(1e-12))
    return float(torch.stack(shares).max())
