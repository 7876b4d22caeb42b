"""Exact evaluation: counts over data sets × batches."""

import numpy as np
import torch
from loss_cases import world

from dkd.data import EvaluationBatches
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


def evaluation_counts(folder):
    rank, size = world()
    torch.manual_seed(0)
    model = build_model(ModelSpec("resnet8", 10)).eval()
    results = {}
    for samples in (1, 7, 64, 1000):
        source = RandomImages(samples)
        for batch in (1, 3, 64):
            batches = EvaluationBatches(source, lambda image: image, batch, rank, size)
            result = evaluate(lambda images: model(images.float() / 255 - 0.5), batches, torch.device("cpu"))
            results[f"{samples} samples, batch {batch}"] = [result.samples, result.top1_correct, result.top5_correct, result.loss]
    return results


CASES = [evaluation_counts]
