"""A training with losses that train something beside the student, as a plain PyTorch loop on one process, in float64.

It shares models, data, and the first weights of adapters with the package, and nothing of its losses, its arithmetic
over ranks, its banks or its trainer: those are what it checks.
"""

import math
import zlib

import torch
import torch.nn.functional as F
from plain_reference import features_of, normalised

from dkd.build.feature_losses import Given, make_adapter
from dkd.config.loading import validate
from dkd.data import GlobalBatchSampler, TrainLoader, build_pipeline, open_source
from dkd.models import ModelSpec, build_model, output_shapes
from dkd.rng import derive_seed

PAIRS, DEEPEST = [["layer2", "block2"]], [["layer3", "block3"]]
LOSSES = {
    "at": None, "sp": None, "kd": None,
    "fitnet": {"weight": 10, "adapter": "conv1x1_bn", "pairs": PAIRS},
    "srd": {"weight": 0.05, "pairs": DEEPEST},
    "crd": {"weight": 0.8, "width": 16, "negatives": 50, "pairs": DEEPEST},
    "queue": {"weight": 0.5, "adapter": "linear", "size": 80, "pairs": DEEPEST},
}  # fmt: skip
EPSILON = 1e-5


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def batch_normalised(values, weight=None, bias=None):
    """By the mean and the biased variance of each channel over rows and places."""
    dims = [0, *range(2, values.dim())]
    mean, variance = values.mean(dims, keepdim=True), values.var(dims, unbiased=False, keepdim=True)
    values = (values - mean) / (variance + EPSILON).sqrt()
    if weight is None:
        return values
    shape = [1, -1] + [1] * (values.dim() - 2)
    return values * weight.view(shape) + bias.view(shape)


def fitnet(weights, student, teacher):
    """1×1 convolution and BatchNorm, by micro-batch; mean of squares."""
    projected = torch.einsum("oc,bchw->bohw", weights["projections.0.0.weight"][:, :, 0, 0], student)
    projected = batch_normalised(projected, weights["projections.0.1.weight"], weights["projections.0.1.bias"])
    return (projected - teacher).pow(2).mean()


def projected_for_srd(weights, student):
    return batch_normalised(student.mean((2, 3)) @ weights["projections.0.0.weight"].T)


def srd(projected, teachers):
    """Over the whole global batch: twice the logarithm of the sum of fourth powers."""
    return 2 * (projected - batch_normalised(teachers.mean((2, 3)))).abs().pow(4).sum().log()


class Banks:
    """CRD's, whole."""

    def __init__(self, section, samples, seed, labels):
        self.section, self.samples, self.labels = section, samples, labels
        self.seed = derive_seed(seed, zlib.crc32(b"crd"))
        self.banks = []
        for number in (0, 1):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, number, 0, 0))
            rows = torch.rand(2**14, section["width"], generator=generator)[:samples] * 2 - 1
            self.banks.append(F.normalize(rows).double())
        self.constants = None
        by_class = sorted(range(samples), key=lambda sample: (labels[sample], sample))
        self.others = {own: [sample for sample in by_class if labels[sample] != own] for own in set(labels)}

    def loss(self, step, indices, s, t):
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, 1))
        numbers = torch.randint(2**62, (len(indices), self.section["negatives"]), generator=generator)
        by_place = sorted(range(len(indices)), key=lambda row: int(indices[row]))
        drawn = [[]] * len(indices)
        for turn, row in enumerate(by_place):
            others = self.others[self.labels[indices[row]]]
            drawn[row] = [int(indices[row])] + [others[number % len(others)] for number in numbers[turn].tolist()]
        drawn = torch.tensor(drawn)
        scores = [
            torch.einsum("bd,bkd->bk", rows, bank[drawn]).div(0.07).exp()
            for rows, bank in ((s, self.banks[1]), (t, self.banks[0]))
        ]
        if self.constants is None:
            # Kept in float64, as everything is here.
            self.constants = [score.detach().mean() * self.samples for score in scores]
        noise = self.section["negatives"] / self.samples
        total = 0.0
        for score, constant in zip(scores, self.constants, strict=True):
            density = score / constant
            total = total - (density[:, 0] / (density[:, 0] + noise)).log().sum()
            total = total - (noise / (density[:, 1:] + noise)).log().sum()
        self.banks = [bank.clone() for bank in self.banks]
        for bank, rows in zip(self.banks, (s, t), strict=True):
            bank[indices] = unit(0.5 * bank[indices] + 0.5 * rows.detach())
        return total / len(indices)


class Queue:
    def __init__(self, section, width, seed):
        generator = torch.Generator().manual_seed(derive_seed(seed, zlib.crc32(b"queue")))
        self.rows = F.normalize(torch.randn(section["size"], width, generator=generator)).double()

    def loss(self, student, teacher):
        """Of a micro-batch, or of all: it is a mean over samples."""
        p, q = ((unit(rows) @ self.rows.T / 0.07).log_softmax(1) for rows in (teacher, student))
        return (p.exp() * (p - q)).sum(1).mean()

    def add(self, teacher, place):
        self.rows = self.rows.clone()
        for row in unit(teacher):
            self.rows[place % len(self.rows)] = row
            place += 1
        return place


def train(recipe, steps, micro_batch):
    """Returns the logged terms of each step, and the final state of the student."""
    losses, optimizer, seed = recipe["losses"], recipe["optimizer"], recipe["run"]["seed"]
    batch = recipe["train"]["global_batch"]
    pipeline, source = build_pipeline("digits", image_size=16), open_source("digits", training=True)
    order = GlobalBatchSampler(len(source), seed, batch, batch)
    torch.manual_seed(seed)
    student = build_model(ModelSpec(recipe["student"]["name"], 10, recipe["student"]["norm"])).double()
    torch.manual_seed(seed)
    teacher = build_model(ModelSpec("wrn_16_1", 10)).double().eval().requires_grad_(False)
    shapes = [
        output_shapes(ModelSpec(name, 10, norm), taps, 16)[1]
        for name, norm, taps in (("resnet8", "group", ["layer2", "layer3"]), ("wrn_16_1", None, ["block2", "block3"]))
    ]
    sections = dict(validate(recipe).losses.named())
    given = Given(shapes[0], {"": shapes[1]}, seed=seed)
    adapters = {
        name: {
            key: value.detach().double().requires_grad_()
            for key, value in make_adapter(name, sections[name], given).named_parameters()
        }
        for name in ("fitnet", "srd", "crd", "queue")
    }
    banks = Banks(losses["crd"], len(source), seed, source.labels.tolist())
    queue, place = Queue(losses["queue"], shapes[1]["block3"][0], seed), 0
    parameters = [*student.parameters(), *(p for weights in adapters.values() for p in weights.values())]
    momenta = [torch.zeros_like(p) for p in parameters]
    epoch_steps, lines = len(source) // batch, []
    keys = order.micro_batches(0, steps)
    for step, loaded in enumerate(TrainLoader(source, pipeline.train, order).steps(0, steps)):
        warmup = round(0.2 * epoch_steps)
        progress = (step - warmup) / (epoch_steps - 1 - warmup)
        rate = optimizer["lr"] * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        indices = torch.tensor([index for _, index in next(keys)])
        images = normalised(loaded.images.double(), pipeline.normalize.mean, pipeline.normalize.std)
        logits, (s2, s3) = features_of(student, ["layer2", "layer3"], images)
        _, (t2, t3) = features_of(teacher, ["block2", "block3"], images)
        parts = [slice(first, first + micro_batch) for first in range(0, batch, micro_batch)]
        crd = adapters["crd"]
        vectors = [
            unit(feature.mean((2, 3)) @ crd[f"{side}.weight"].T + crd[f"{side}.bias"])
            for side, feature in (("student", s3), ("teacher", t3))
        ]
        own = adapters["queue"]
        embedded = s3.mean((2, 3)) @ own["projections.0.weight"].T + own["projections.0.bias"]
        terms = {
            "ce": F.cross_entropy(logits, loaded.labels),
            "fitnet": torch.stack([fitnet(adapters["fitnet"], s2[part], t2[part]) for part in parts]).mean(),
            "srd": srd(torch.cat([projected_for_srd(adapters["srd"], s3[part]) for part in parts]), t3),
            "crd": banks.loss(step, indices, *vectors),
            "queue": queue.loss(embedded, t3.mean((2, 3))),
        }
        place = queue.add(t3.mean((2, 3)), place)
        total = sum(value * losses.get(name, {"weight": 1}).get("weight", 1) for name, value in terms.items())
        gradients = torch.autograd.grad(total, parameters)
        with torch.no_grad():
            for p, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                gradient = gradient + optimizer["weight_decay"] * p
                momentum.mul_(optimizer["momentum"]).add_(gradient)
                p -= rate * (gradient + optimizer["momentum"] * momentum)
        lines.append({"loss": total.item(), "lr": rate, **{name: value.item() for name, value in terms.items()}})
    return lines, student.state_dict()
