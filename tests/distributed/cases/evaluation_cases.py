"""Exact evaluation: counts over data sets × batches."""

import numpy as np
import torch
import torch.distributed as dist

from dkd.data import EvaluationLoader
from dkd.models import ModelSpec, build_model
from dkd.training.evaluation import evaluate


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


CASES = [evaluation_counts, class_counts_of_an_evaluation]
