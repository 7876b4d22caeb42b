"""Exact evaluation: counts over data sets × batches."""

import math

import numpy as np
import torch
import torch.distributed as dist

from dkd.config.schema import KnnSection
from dkd.data import EvaluationLoader
from dkd.data.samples import Batch
from dkd.models import ModelSpec, build_model
from dkd.training.evaluation import evaluate
from dkd.training.knn import measure_knn


class RandomImages:
    def __init__(self, samples):
        generator = torch.Generator().manual_seed(samples)
        self.pixels = torch.randint(0, 256, (samples, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self.labels = np.asarray(torch.randint(0, 10, (samples,), generator=generator))

    def __len__(self):
        return len(self.labels)

    def image(self, index):
        return self.pixels[index]

    def images(self):
        return iter(self.pixels)


def model():
    torch.manual_seed(0)
    return build_model(ModelSpec("resnet8", 10)).eval()


@torch.no_grad()
def plain_counts(samples):
    """Samples, top-1, top-5 and mean loss, by sorting the logits of all images."""
    source = RandomImages(samples)
    logits, labels = model()(source.pixels.float() / 255 - 0.5), torch.from_numpy(source.labels)
    order = logits.argsort(1, descending=True).tolist()
    top1 = sum(label == row[0] for label, row in zip(labels.tolist(), order, strict=True))
    top5 = sum(label in row[:5] for label, row in zip(labels.tolist(), order, strict=True))
    return [samples, top1, top5, torch.nn.functional.cross_entropy(logits.double(), labels).item()]


def evaluation_counts(folder):
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    network = model()
    results = {}
    for samples in (1, 7, 64, 1000):
        source = RandomImages(samples)
        for batch in (1, 3, 64):
            batches = EvaluationLoader(source, lambda image: image, batch, rank, size)
            result = evaluate(lambda batch: network(batch.images.float() / 255 - 0.5), batches, torch.device("cpu"))
            results[f"{samples} samples, batch {batch}"] = [
                result.samples,
                result.top1_correct,
                result.top5_correct,
                result.loss,
            ]
    return results


def class_counts_of_an_evaluation(folder):
    """Of 64 images, in batches of 3 that do not fill the ranks evenly."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    network = model()
    batches = EvaluationLoader(RandomImages(64), lambda image: image, 3, rank, size)
    result = evaluate(lambda batch: network(batch.images.float() / 255 - 0.5), batches, torch.device("cpu"))
    return result.facts_of_classes()


@torch.no_grad()
def plain_confusion(samples):
    source = RandomImages(samples)
    predicted = model()(source.pixels.float() / 255 - 0.5).argmax(1).tolist()
    matrix = np.zeros((10, 10), dtype=int)
    for label, prediction in zip(source.labels.tolist(), predicted, strict=True):
        matrix[label][prediction] += 1
    return matrix.tolist()


def knn_counts(folder):
    """Of few queries among few images, in batches that do not fill the ranks evenly; the features are whole numbers, of
    which many are alike, so that all that ranks could do differently is to break ties."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results = {}
    for images, asked in ((150, 41), (5, 3)):  # 4 ranks have 2, 2, 1 and 0 of 5 images
        for batch in (1, 7, 64):
            loaders = [
                EvaluationLoader(RandomImages(samples), lambda image: image, batch, rank, size)
                for samples in (images, asked)
            ]
            for k in (1, 20, 200):
                section = KnnSection(k=k, temperature=0.07 if k < 200 else 1.0)
                found = measure_knn(coarse_features, *loaders, 10, section, torch.device("cpu"))
                results[f"batch {batch}, {images} {asked} {k}"] = [
                    found.samples, found.bank, found.k, found.top1_correct, found.top5_correct,
                ]  # fmt: skip
    return results


def coarse_features(batch):
    return (batch.images[:, :, 3, :2].flatten(1).float() / 100).round() - 1


def plain_knn(images, asked, k):
    """Samples, bank, k, top-1 and top-5, by sorting all similarities of each query."""
    bank, queries, temperature = RandomImages(images), RandomImages(asked), 0.07 if k < 200 else 1.0
    rows, columns = (
        torch.nn.functional.normalize(
            coarse_features(Batch(source.pixels, torch.empty(0), len(source))).double(), dim=1
        ).float()
        for source in (bank, queries)
    )
    top1 = top5 = 0
    for similarities, label in zip((columns.double() @ rows.double().T).float().tolist(), queries.labels, strict=True):
        nearest = sorted(range(images), key=lambda i, s=similarities: (-s[i], i))[:k]
        votes = [0.0] * 10
        for place in nearest:
            votes[bank.labels[place]] += math.exp((similarities[place] - similarities[nearest[0]]) / temperature)
        ranked = [c for c in sorted(range(10), key=lambda c, votes=votes: (-votes[c], c)) if votes[c] > 0]
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
    return [asked, images, min(k, images), int(top1), int(top5)]


CASES = [evaluation_counts, class_counts_of_an_evaluation, knn_counts]
