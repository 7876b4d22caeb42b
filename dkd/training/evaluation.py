"""Exact evaluation: every sample counted once, whatever the batch and the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dkd.data import DataError, EvaluationLoader
from dkd.data.samples import Batch
from dkd.global_batch.collectives import all_gather_objects
from dkd.runs.logger import RunLogger
from dkd.training.agreement import Agreement
from dkd.training.class_counts import ClassCounts
from dkd.training.knn_accuracy import KnnAccuracy

BATCHES_BETWEEN_AGREEMENTS = 8


@dataclass(frozen=True)
class Evaluation:
    """Counts over a data set. Of images without labels, right answers and loss are not known."""

    samples: int
    top1_correct: int | None
    """None without labels."""
    top5_correct: int | None
    """None without labels, and where there are fewer than six classes."""
    loss: float | None
    """Mean cross-entropy, in nats; None without labels."""
    unreadable: int = 0
    """Images that could not be read, and are not among the samples."""
    classes: ClassCounts | None = field(default=None, compare=False, repr=False)
    """The same counts for each class."""
    agreement: Agreement | None = field(default=None, compare=False)
    """How alike student and teacher are, where it was measured."""
    knn: KnnAccuracy | None = field(default=None, compare=False)
    """How often the neighbours of a sample's features name its class, where it was measured."""

    @property
    def top1(self) -> float | None:
        """Fraction of samples whose first class is right; None without labels."""
        return None if self.top1_correct is None else self.top1_correct / self.samples

    @property
    def top5(self) -> float | None:
        """Fraction of samples whose first five classes hold the right one."""
        return None if self.top5_correct is None else self.top5_correct / self.samples

    @property
    def score(self) -> float | None:
        """Return the number by which the best checkpoints are kept: top-1, or without labels the agreement with the
        teacher; None where neither was measured."""
        return self.value("agreement" if self.top1_correct is None else "top1")

    def value(self, metric: str) -> float | None:
        """Return a number by the name that `train.stop_when.metric` gives it; None where it was not measured."""
        if metric == "agreement":
            return None if self.agreement is None else self.agreement.top1
        found: float | None = getattr(self, metric)
        return found

    @property
    def problem(self) -> str | None:
        """Return why the numbers mean nothing; None where they are sound."""
        agreement = self.agreement
        if self.loss is None and agreement is not None and agreement.top1 is not None and agreement.kl is None:
            return (
                "KL(teacher ‖ student) is not finite: for some images the logits of one of the two are not, and their "
                "agreement means nothing"
            )
        if self.loss is None or math.isfinite(self.loss):
            return None
        return (
            f"the loss is not finite ({self.loss}): for some images the student's logits are not, and its top-1 means "
            "nothing"
        )

    def facts(self) -> dict[str, Any]:
        """Return what JSON can hold, which has no numbers that are not finite: such a loss is null there."""
        return {
            "samples": self.samples,
            "top1_correct": self.top1_correct,
            "top5_correct": self.top5_correct,
            "loss": None if self.loss is None or not math.isfinite(self.loss) else self.loss,
            "unreadable": self.unreadable,
            "top1": self.top1,
            "top5": self.top5,
            **({} if self.agreement is None else {"agreement": self.agreement.facts()}),
            **({} if self.knn is None else self.knn.facts()),
        }

    def facts_of_classes(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return `classes` and `confusion`, as `ClassCounts.facts`; nothing where classes were not counted."""
        return {} if self.classes is None else self.classes.facts(names)

    def log(
        self, log: RunLogger, step: int, epoch: float, seconds: float, class_names: Sequence[str] | None = None
    ) -> None:
        """Write the result to a run's log, and with the counts of classes to its evaluation.json.

        Args:
            step: steps done.
            epoch: epochs done.
            seconds: seconds that the evaluation took.
            class_names: of the data; None: it names none.
        """
        if self.unreadable:
            log.say(f"warning: {self.unreadable} validation images cannot be read and do not count")
        if self.problem:
            log.say(f"warning: evaluation after step {step}: {self.problem}")
        facts = {"steps": step, "epoch": epoch, **self.facts()}
        log.write({"evaluation": facts, "seconds": round(seconds, 3)}, self._tracked(), step)
        log.write_evaluation({**facts, **self.facts_of_classes(class_names)})
        log.say(f"epoch {epoch:g}: {self._describe()}")
        if self.agreement is not None:
            log.say(f"agreement with the teacher: {self.agreement.describe()}")
        if self.knn is not None:
            log.say(self.knn.describe())

    def _describe(self) -> str:
        if self.top1 is None or self.loss is None:
            return f"{self.samples} images without labels"
        counts = f"{self.top1_correct}/{self.samples}"
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.4f}"
        return f"top-1 {self.top1:.4f} ({counts}){top5}, loss {self.loss:.4f}"

    def _tracked(self) -> dict[str, float]:
        """Return what trackers get, by name."""
        numbers = {f"evaluation/{name}": getattr(self, name) for name in ("top1", "top5", "loss")}
        agreement = {} if self.agreement is None else self.agreement.tracked()
        knn = {} if self.knn is None else {f"evaluation/{name}": value for name, value in self.knn.facts().items()}
        return {name: value for name, value in {**numbers, **agreement, **knn}.items() if value is not None}


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Batch], torch.Tensor],
    batches: EvaluationLoader,
    device: torch.device,
    skip_unreadable: bool = False,
    loading: Iterator[Batch] | None = None,
    is_asked_to_stop: Callable[[int], bool] | None = None,
    labels: bool = True,
) -> Evaluation | None:
    """Evaluate a student exactly. A collective: all ranks run equally many forwards of one shape; padding counts for
    nothing.

    Args:
        logits_of: a batch -> logits (b, K) on `device`. The model is in eval mode.
        batches: this rank's.
        skip_unreadable: images that cannot be read do not count; else they are an error.
        loading: `iter(batches)`, where it has begun already.
        is_asked_to_stop: called before each batch, with its number; when it returns True on any rank, all stop soon.
        labels: whether the samples have labels; else they are counted, and what `logits_of` measures is all there is.

    Returns:
        The same numbers on every rank; None when it was asked to stop.

    Raises:
        DataError: on every rank, after the last batch.
    """
    counts: ClassCounts | None = None
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # samples, loss
    unreadable: list[str] = []
    failures: list[str] = []
    for number, batch in enumerate(loading or batches):
        asked = is_asked_to_stop is not None and is_asked_to_stop(number)
        if is_asked_to_stop is not None and number % BATCHES_BETWEEN_AGREEMENTS == 0 and any_rank(asked, device):
            return None
        unreadable += batch.unreadable
        failures += [batch.failure] if batch.failure else []
        logits = logits_of(batch)[: batch.valid].double()
        sums[0] += batch.valid
        if labels:
            classes = batch.labels[: batch.valid].to(device, non_blocking=True)
            counts = counts or ClassCounts.zeros(logits.shape[1], device)
            counts.add(logits, classes)
            sums[1] += F.cross_entropy(logits, classes, reduction="none").sum()
    # A rank has at least one batch, if of padding alone.
    counts = None if counts is None else counts.over_ranks()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    samples, loss = sums.tolist()
    missing = count_missing(int(samples), batches.total, failures, unreadable, skip_unreadable)
    return _conclude(int(samples), counts, loss, missing)


def _conclude(samples: int, counts: ClassCounts | None, loss: float, missing: int) -> Evaluation:
    """Return the result, from what all ranks have counted; no counts: the samples have no labels."""
    if counts is None:
        return Evaluation(samples, None, None, None, missing)
    _, top1, top5 = counts.totals
    return Evaluation(samples, top1, top5 if len(counts.counts) > 5 else None, loss / samples, missing, counts)


def count_missing(samples: int, total: int, failures: list[str], unreadable: list[str], skip_unreadable: bool) -> int:
    """Return the number of images that could not be read, on all ranks. A collective where images are missing.

    Args:
        samples: that were read, over all ranks.
        total: images of the data set.
        failures, unreadable: this rank's messages: of batches that could not be made, and of images.
        skip_unreadable: images that cannot be read do not count; else they are an error.

    Raises:
        DataError: on every rank.
    """
    missing = 0
    if samples != total:
        missing = _count_missing(failures, unreadable, skip_unreadable and samples > 0)
    if samples + missing != total:
        raise RuntimeError(f"evaluation counted {samples} samples of a data set of {total}")
    return missing


def _count_missing(failures: list[str], unreadable: list[str], allowed: bool) -> int:
    """Return the number of images that could not be read, on all ranks. A collective.

    Args:
        failures, unreadable: this rank's messages.
        allowed: unreadable images are left out; else they are an error.

    Raises:
        DataError: on every rank: batches could not be made, or images not be read.
    """
    ranks = all_gather_objects((failures, unreadable))
    failed = [message for messages, _ in ranks for message in messages]
    missing = [message for _, messages in ranks for message in messages]
    if failed or (missing and not allowed):
        messages = failed or missing
        raise DataError(messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""))
    return len(missing)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank. A collective, waited for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    flags = torch.full((), int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
