"""k-NN accuracy over frozen features: how good a student's features are, whatever its head.

The protocol is that of DINO (Caron et al., ICCV 2021) and of Wu et al. (CVPR 2018): features are normalised to length
1, the k images of the bank with the largest cosine similarity s vote for their classes with weights exp(s/T), and the
class with most votes comes first. Images of both data sets are transformed as validation images are. Of classes with
equally many votes, the smaller index comes first, and a class without a vote is no answer.

Each rank keeps the features of its share of the bank, and the neighbours are those of the whole bank, each image
counted once: given the features, the result depends neither on the number of ranks nor on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dkd.config.schema import KnnSection
from dkd.data import EvaluationLoader
from dkd.data.samples import Batch
from dkd.global_batch import collectives
from dkd.global_batch.neighbours import nearest
from dkd.training.evaluation import BATCHES_BETWEEN_AGREEMENTS, any_rank, count_missing
from dkd.training.knn_accuracy import KnnAccuracy

_VOTE_NUMBERS = 2**24  # votes that are held at a time


@dataclass(frozen=True)
class Features:
    """Holds what is read of one data set, on one rank.

    Args:
        rows: float32 (n, C), of length 1.
        labels: int64 (n,).
        places: int64 (n,), ascending with the place of the image in the data set.
        total: images of the data set.
        unreadable: images of all ranks that could not be read.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    total: int
    unreadable: int


@torch.no_grad()
def measure_knn(
    features_of: Callable[[Batch], torch.Tensor],
    bank: EvaluationLoader,
    queries: EvaluationLoader,
    classes: int,
    section: KnnSection,
    device: torch.device,
    skip_unreadable: bool = False,
    is_asked_to_stop: Callable[[int], bool] | None = None,
) -> KnnAccuracy | None:
    """Measure the k-NN accuracy of a model. A collective: all ranks run equally many forwards of one shape.

    Args:
        features_of: a batch -> pooled features (b, C) on `device`. The model is in eval mode.
        bank, queries: this rank's batches.
        classes: K.
        section: k and T.
        skip_unreadable, is_asked_to_stop: as `evaluate`; batches of both data sets, and turns of the comparison, are
            counted together.

    Returns:
        The same numbers on every rank; None when it was asked to stop.

    Raises:
        DataError: on every rank: images cannot be read.
    """
    asked = is_asked_to_stop or (lambda number: False)
    known = _read(features_of, bank, device, skip_unreadable, asked, 0)
    if known is None:
        return None
    found = _read(features_of, queries, device, skip_unreadable, asked, len(bank))
    if found is None:
        return None
    passed = len(bank) + len(queries)
    similarities, places = nearest(
        found.rows, known.rows, known.places, section.k, before_turn=lambda turn: _note(asked, passed + turn)
    )
    voters = _labels_of_all(known)[places]
    top1, top5 = _count(similarities.cpu(), voters.cpu(), found.labels.cpu(), classes, section.temperature)
    ranks = collectives.all_gather_objects((len(found.labels), len(known.labels), top1, top5))
    samples, size, top1, top5 = (sum(numbers) for numbers in zip(*ranks, strict=True))
    missing = known.unreadable + found.unreadable
    return KnnAccuracy(samples, top1, top5 if classes > 5 else None, size, min(section.k, size), missing)


def _note(asked: Callable[[int], bool], number: int) -> None:
    """Report how far this rank is. The comparison is short beside the forwards, and is not interrupted."""
    asked(number)


def _read(
    features_of: Callable[[Batch], torch.Tensor],
    batches: EvaluationLoader,
    device: torch.device,
    skip_unreadable: bool,
    asked: Callable[[int], bool],
    passed: int,
) -> Features | None:
    """Return the features of this rank's images; None when any rank was asked to stop. A collective. Raises
    DataError."""
    rows: list[torch.Tensor] = []
    labels, places = [torch.empty(0, dtype=torch.int64)], list[int]()
    unreadable: list[str] = []
    failures: list[str] = []
    for number, batch in enumerate(batches):
        stop = asked(passed + number)
        if number % BATCHES_BETWEEN_AGREEMENTS == 0 and any_rank(stop, device):
            return None
        unreadable += batch.unreadable
        failures += [batch.failure] if batch.failure else []
        rows.append(F.normalize(features_of(batch)[: batch.valid].double(), dim=1).float())
        labels.append(batch.labels[: batch.valid].clone())
        # Images that cannot be read are left out of a batch: the places of those after them move up, but their order
        # stays that of the data set.
        places += [index for _, index in batches.keys[number] if index >= 0][: batch.valid]
    samples = sum(collectives.all_gather_objects(len(places)))
    missing = count_missing(samples, batches.total, failures, unreadable, skip_unreadable)
    where = torch.tensor(places, dtype=torch.int64, device=device)
    return Features(torch.cat(rows), torch.cat(labels).to(device), where, batches.total, missing)


def _labels_of_all(bank: Features) -> torch.Tensor:
    """Return the labels of the whole bank, by place. A collective."""
    labels = torch.zeros(bank.total, dtype=torch.int64, device=bank.labels.device)
    labels[bank.places] = bank.labels
    return labels if collectives.world_size() == 1 else collectives.sum_over_ranks(labels)


def _count(
    similarities: torch.Tensor, voters: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float
) -> tuple[int, int]:
    """Return how many queries are right at first, and among the first five.

    Args:
        similarities: (q, k), the largest first.
        voters: int64 (q, k), the classes of the neighbours.
        labels: int64 (q,).
    """
    top1 = top5 = 0
    rows = max(1, _VOTE_NUMBERS // classes)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        ranked = rank_classes(similarities[part], voters[part], classes, temperature)
        right = ranked == labels[part, None]
        top1 += int(right[:, 0].sum())
        top5 += int(right.any(1).sum())
    return top1, top5


def rank_classes(similarities: torch.Tensor, voters: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    """Return the first five classes of each query by the votes of its neighbours, int64 (q, min(5, K)); −1 in place of
    classes without a vote.

    Args:
        similarities: float32 (q, k) on the CPU, the largest first.
        voters: int64 (q, k), the classes of the neighbours.
        classes: K.
        temperature: T.
    """
    # Divided by the largest weight, which changes no order: a small T would exceed what numbers can hold.
    exponents = (similarities.double() - similarities[:, :1].double()) / temperature
    # On the CPU, votes are added in the order of the neighbours, and so to the same bits each time.
    votes = torch.zeros(len(voters), classes, dtype=torch.float64).scatter_add_(1, voters, exponents.exp())
    ordered, ranked = votes.sort(dim=1, descending=True, stable=True)
    return torch.where(ordered > 0, ranked, -1)[:, :5]
