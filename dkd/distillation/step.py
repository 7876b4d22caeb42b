"""One optimizer step of distillation: what is computed, whatever computes it.

`DistillationStep` holds the student, the frozen teacher, the objective, the two passes that relational losses need
under gradient accumulation, and the rule by which BatchNorm's running statistics do not depend on the number of ranks.
It knows no engine, no recipe and no file. The trainer calls it, and so can a training loop of your own:

    step = DistillationStep(student, teacher, objective, micro_steps=len(micro_batches))
    step.begin(micro_batches, number)
    for i in range(len(micro_batches)):
        (step.loss(i).total / len(micro_batches)).backward()
    optimizer.step()
    step.end()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dkd.data import Normalize
from dkd.distillation.batch_norm import BatchNormStatistics
from dkd.distillation.forward import Forward
from dkd.distillation.grad_cache import CachedGradient, cache_gradient, compared_tensors
from dkd.distillation.inputs import Inputs, MicroBatch, Mixing
from dkd.distillation.objective import FeatureTerm, Objective, Outputs, given_to_adapters
from dkd.distillation.stored_teacher import Teaching
from dkd.distillation.teacher_group import OneTeacher, TeacherGroup
from dkd.distillation.teacher_stream import InOrder, TeacherStream
from dkd.global_batch import BatchLayout
from dkd.models import ADAPTERS
from dkd.rng import derive_seed, seed_device

STEPS_THAT_JUDGE_THE_TEACHER = 20
"""Steps of a start in which the teacher's first class is compared with the labels."""
STEPS_THAT_COMPARE_PASSES = 5
"""Steps after a start in which the second forward is compared with the first."""
_FORWARD, _MIXING = 0, 1  # purposes of random numbers: each has its own


def mixing_seed(seed: int, step: int, place: int) -> int:
    """Return the seed by which a micro-batch is mixed.

    Args:
        seed: of the run.
        step: from 0.
        place: of the micro-batch in the global batch: micro-step · W + rank.
    """
    return derive_seed(seed, step, place, _MIXING)


@dataclass(frozen=True)
class MicroLoss:
    """Holds the loss of one micro-step.

    Args:
        total: what to back-propagate. Its gradient, averaged over micro-steps and ranks, is that of the objective on
            the global batch.
        terms: each loss before its weight, detached; their means over micro-steps and ranks are the values on the
            global batch.
        counts: the total `loss`, detached, and under two passes `pass_difference`, how far the second forward is from
            the first.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]


class DistillationStep:
    """Computes the losses of optimizer steps. All ranks of the default process group make one together, and call its
    methods together.

    Args:
        student: returns (logits, {path: feature}), as TappedModel with the adapters of the objective does, wrapped by
            whatever averages its gradients over ranks (DistributedDataParallel, FSDP2, DeepSpeed); without a process
            group, the model itself.
        teacher: or None, where no term reads it.
        objective: the weighted losses.
        micro_steps: A, the micro-batches of each step on this rank.
        model: the student without its wrapper, whose BatchNorm layers follow the rule; None: `student` is not wrapped.
        normalize, teacher_normalize, dtype, memory_format: as Forward.
        mixing: applied to each micro-batch, on the device.
        seed: of dropout and mixing, which depend on (seed, step, micro-batch) and not on the number of ranks.
        seed_of_mixing: (step, place) -> the seed by which a micro-batch is mixed, in the place of `mixing_seed`.
        may_skip: steps may end with `end(skipped=True)`.
        teacher_stream: when the teacher computes; None: before the student.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: OneTeacher | TeacherGroup | None,
        objective: Objective,
        *,
        micro_steps: int = 1,
        model: torch.nn.Module | None = None,
        normalize: Normalize | None = None,
        teacher_normalize: Normalize | Mapping[str, Normalize] | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        mixing: Mixing | None = None,
        seed: int = 0,
        seed_of_mixing: Callable[[int, int], int] | None = None,
        may_skip: bool = False,
        teacher_stream: TeacherStream | None = None,
    ) -> None:
        self.student, self.teacher, self.objective, self.micro_steps = student, teacher, objective, micro_steps
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Public, as the objective is: what of it runs in which pass.
        self.separable, self.relational = objective.split()
        self.has_two_passes = bool(self.relational.terms) and micro_steps > 1
        # Between two passes, tensors and gradients are kept in full precision.
        inputs = (normalize, teacher_normalize, dtype, memory_format)
        self.forward = Forward(student, teacher, objective, *inputs, keeps_types=not self.has_two_passes)
        # Public: caches of teachers are put into its `stored`.
        self.teaching = Teaching(self.forward.teacher_names, self.forward.one_teacher)
        losses = [getattr(term, "loss", None) for term in objective.terms]
        self._of_whole_steps: list[Any] = [loss for loss in losses if getattr(loss, "of_whole_steps", False)]
        self._keeping: list[Any] = [loss for loss in losses if hasattr(loss, "end_step")]
        self._has_adapters = bool(objective.adapters)
        self.needs_indices = objective.needs_indices
        self._teacher_stream = teacher_stream or InOrder()
        self._device = next((p.device for p in student.parameters()), torch.device("cpu"))
        self._statistics = BatchNormStatistics(model or student, micro_steps, self._world_size, may_skip)
        self._seed = seed
        seeds = seed_of_mixing or partial(mixing_seed, seed)
        self._inputs = Inputs(self._device, self._rank, self._world_size, mixing, seeds)
        self._step, self._begun, self._agreed, self._has_labels = 0, 0, False, True
        self._micro_batches: Sequence[MicroBatch] = ()
        self._indices: list[torch.Tensor] | None = None
        self._cached: CachedGradient | None = None
        self._unfinished = self._is_loaded = False

    def begin(
        self,
        micro_batches: Sequence[MicroBatch],
        step: int,
        indices: Sequence[torch.Tensor] | None = None,
        is_loaded: bool = False,
    ) -> None:
        """Begin a step; under two passes, run the first. A collective.

        Args:
            micro_batches: A of them, on any device.
            step: number of the step, from 0: loss weights and random numbers follow it.
            indices: places (b,) of each micro-batch's samples in the training data, where a loss asks for them.
            is_loaded: the micro-batches are what `load` has returned for them, and `seed` has been called.

        Raises:
            ValueError: these are not A micro-batches.
        """
        if len(micro_batches) != self.micro_steps:
            raise ValueError(f"{len(micro_batches)} micro-batches for steps of {self.micro_steps}")
        self._step, self._begun, self._micro_batches = step, self._begun + 1, micro_batches
        self._is_loaded = is_loaded
        self._indices = None if indices is None else [each.to(self._device) for each in indices]
        self._statistics.start_step()
        self.teaching.begin(step, micro_batches)
        if self._begun <= STEPS_THAT_JUDGE_THE_TEACHER:  # images without labels have the label -1
            self._has_labels = not bool((micro_batches[0][1] < 0).any())
        if self._of_whole_steps and self._inputs.mixing is None:
            labels = [labels.to(self._device, non_blocking=True) for _, labels, *_ in micro_batches]
            for loss in self._of_whole_steps:
                loss.begin_step(labels)
        self._cached = self._run_first_pass() if self.has_two_passes else None

    def load(self, micro_batch: MicroBatch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels of the first micro-batch of a step on this rank's device, mixed where that is asked
        for."""
        return self._inputs.load(micro_batch, step, 0)

    def seed(self, step: int, micro_step: int = 0) -> None:
        """Seed the generators that the student's forward of a micro-step draws from. `loss` does so by itself."""
        seed_device(self._device, derive_seed(self._seed, step, self._inputs.place(micro_step), _FORWARD))

    @property
    def is_settled(self) -> bool:
        """Return whether the next step computes what all later ones do: the first ones of a start also judge the
        teacher."""
        return self._begun >= STEPS_THAT_JUDGE_THE_TEACHER

    @property
    def keeps_something(self) -> bool:
        """Return whether a loss keeps something from step to step beside parameters, or needs to know of more than
        images and labels: a queue, places of samples, class weights."""
        losses = [loss for term in self.objective.terms if isinstance(loss := getattr(term, "loss", None), nn.Module)]
        has_buffers = any(True for loss in losses for _ in loss.buffers())
        return bool(self._keeping or self._of_whole_steps or self.needs_indices or has_buffers)

    @torch.no_grad()
    def measure(self, micro_batches: Iterable[MicroBatch]) -> int:
        """Measure the teacher over images, for losses that standardise its features. Call it before the first step of a
        training, and not after a resume: checkpoints keep what was measured. A collective: ranks bring equally many
        images.

        Returns:
            The images of this rank.
        """
        terms = [t for t in self.objective.terms if isinstance(t, FeatureTerm) and getattr(t.loss, "measures", False)]
        losses: list[Any] = [term.loss for term in terms]
        count = 0
        for pixels, *_ in micro_batches:
            pixels = pixels.to(self._device, non_blocking=True)
            teacher = self.forward.teacher(pixels, self.forward.images(pixels))
            assert teacher is not None
            for term, loss in zip(terms, losses, strict=True):
                features = teacher.of(term.teacher).features
                loss.measure([features[path] for _, path in term.pairs])
            count += len(pixels)
        for loss in losses:
            loss.finish_measuring()
        return count

    def loss(self, micro_step: int) -> MicroLoss:
        """Run teacher and student on one micro-batch, in order; back-propagate `total` before the next. A
        collective."""
        self._finish_micro_batch()
        cached = self._cached
        pixels, labels = self._load(micro_step)
        images = self.forward.images(pixels)
        # Training batches are even by construction.
        layout = BatchLayout.even(len(labels))
        objective = self.objective if cached is None else self.separable
        with self._teacher_stream.beside():
            if cached is None:
                teacher = self._teach(micro_step, pixels, images)
            elif images.requires_grad:
                # What the first pass has of a live teacher is no function of the images.
                teacher = self._teach(micro_step, pixels, images, cached.teachers[micro_step])
            else:
                teacher = cached.teachers[micro_step]
            if teacher is not None:
                teacher = self.teaching.begin_terms(objective, teacher, layout, micro_step)
        indices = None if self._indices is None else self._indices[micro_step]
        student = self._run_student(micro_step, images, teacher, labels, indices, self.objective)
        self._teacher_stream.join()
        self._unfinished = True
        self._agree(student, teacher, labels)
        total, terms = objective(student, teacher, labels, step=self._step, layout=layout, indices=indices)
        judged = self._judge_teacher(student, teacher, labels)
        if cached is None:
            return MicroLoss(total, terms, {"loss": total.detach(), **judged})
        compares = self._begun <= STEPS_THAT_COMPARE_PASSES
        compared = compared_tensors(self.relational, student)
        difference = cached.difference(micro_step, compared) if compares else torch.zeros_like(total)
        counts = {"loss": total.detach() + cached.total, "pass_difference": difference, **judged}
        return MicroLoss(total + cached.loss(micro_step, compared), {**terms, **cached.terms}, counts)

    def _judge_teacher(
        self, student: Outputs, teacher: Outputs | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the share of this micro-batch for which the teacher's first class is right, in the first steps of a
        start, where the teacher's logits are those of the student's classes. Costs no forward."""
        if self._begun > STEPS_THAT_JUDGE_THE_TEACHER or not self._has_labels:
            return {}
        if teacher is None or teacher.logits is None:
            return {}
        if student.logits is None or teacher.logits.shape != student.logits.shape:
            return {}
        classes = labels.argmax(1) if labels.is_floating_point() else labels
        return {"teacher_right": (teacher.logits.argmax(1) == classes).double().mean()}

    def end(self, skipped: bool = False) -> None:
        """End the step: average BatchNorm's running statistics over micro-steps and ranks. A collective.

        Args:
            skipped: the optimizer's update was left out, on every rank: the statistics are left as they were, too.
                What losses keep from step to step, such as a queue of the teacher's embeddings, is a function of the
                steps and changes nevertheless.
        """
        self._finish_micro_batch()
        for loss in self._keeping:
            loss.end_step()
        if skipped:
            self._statistics.forget_step()
        else:
            self._statistics.finish_step()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the student's logits (b, K) for images on any device, for evaluation."""
        return self.forward.logits(images.to(self._device, non_blocking=True))

    def outputs(self, images: torch.Tensor, teacher_rows: int) -> tuple[Outputs, Outputs | None]:
        """Return what student and teacher yield for images on any device, for evaluation. The teacher's logits are
        there inside `FrozenTeacher.with_logits`.

        Args:
            teacher_rows: images that the teacher takes in one forward, at most.
        """
        return self.forward.both(images.to(self._device, non_blocking=True), teacher_rows)

    def _finish_micro_batch(self) -> None:
        if self._unfinished:
            self._statistics.finish_micro_batch()
            self._unfinished = False

    @torch.no_grad()
    def _run_first_pass(self) -> CachedGradient:
        """Run passes 1 and 2 of `grad_cache.py`; the teacher runs here, once."""
        students, teachers, labels = [], [], []
        for micro_step in range(self.micro_steps):
            pixels, targets = self._load(micro_step)
            labels.append(targets)
            images = self.forward.images(pixels)
            with self._teacher_stream.beside():
                teacher = self._teach(micro_step, pixels, images)
            assert teacher is not None
            teachers.append(teacher)
            indices = None if self._indices is None else self._indices[micro_step]
            outputs = self._run_student(micro_step, images, teacher, targets, indices, self.relational)
            self._teacher_stream.join()
            relational = {key: outputs.features[key] for key in self.relational.keys(outputs.features)}
            logits = outputs.logits if self.relational.compares_logits else None
            if micro_step == 0:
                self._agree(Outputs(logits, relational), teacher, targets, again=True)
            students.append(Outputs(logits, relational, types=outputs.types))
            self._statistics.forget_micro_batch()
        every = None if self._indices is None else torch.cat(self._indices)
        with torch.enable_grad():
            return cache_gradient(
                self.relational, students, teachers, torch.cat(labels), self._step, every, self._begin_whole
            )

    def _begin_whole(self, teacher: Outputs, layout: BatchLayout) -> Outputs:
        """Give the terms of the whole step what stands in the place of the teacher's features."""
        return self.teaching.begin_terms(self.relational, teacher, layout, None) if self.teaching.stored else teacher

    def _agree(self, student: Outputs, teacher: Outputs | None, labels: torch.Tensor, again: bool = False) -> None:
        """Check, in the first step, that ranks agree on the shapes of everything that they are about to exchange."""
        if self._agreed or self._begun > 1:
            return
        self._agreed = not again
        theirs = teacher.all_members if teacher else []
        logits = [outputs.logits for outputs in (student, *theirs) if outputs.logits is not None]
        features = [
            feature
            for outputs in (student, *theirs)
            for key, feature in outputs.features.items()
            if not key.startswith(ADAPTERS)
        ]
        BatchLayout.agree([*features, *logits, labels])

    def _load(self, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a micro-batch on this rank's device, mixed where that is asked for: the same in both passes."""
        if self._is_loaded:
            images, labels = self._micro_batches[micro_step]
            return images, labels
        return self._inputs.load(self._micro_batches[micro_step], self._step, micro_step)

    def _teach(
        self, micro_step: int, pixels: torch.Tensor, images: torch.Tensor, first: Outputs | None = None
    ) -> Outputs | None:
        """Return what the teachers yield for a micro-batch, or their caches hold. Arguments as Teaching.outputs."""
        if not self.teaching.stored:
            return self.forward.teacher(pixels, images)
        return self.teaching.outputs(micro_step, pixels, images, first)

    def _run_student(
        self,
        micro_step: int,
        images: torch.Tensor,
        teacher: Outputs | None,
        labels: torch.Tensor,
        indices: torch.Tensor | None,
        objective: Objective,
    ) -> Outputs:
        if not self._is_loaded:
            self.seed(self._step, micro_step)
        given = None
        if self._has_adapters:
            self._teacher_stream.join()  # they read the teacher's features
            given = given_to_adapters(objective, teacher, labels, BatchLayout.even(len(labels)), indices)
        with self._statistics.forward():
            return self.forward.student(images, given)
