"""The training that a recipe of tests/ranks/trainer_cases.py means, as a plain PyTorch loop on one process, in float64.

It shares models and data with the package, and nothing of its losses, its arithmetic over ranks or its trainer: those are what it checks.
"""

import math

import torch
import torch.nn.functional as F

from dkd.data import SampleOrder, TrainingBatches, build_pipeline, open_source
from dkd.models import ModelSpec, build_model

STUDENT_TAPS, TEACHER_TAPS = ["layer1", "layer2", "layer3"], ["block1", "block2", "block3"]


def features_of(model, taps, images):
    """Logits and tapped features, by hooks of its own."""
    found = {}
    modules = dict(model.named_modules())
    hooks = [modules[tap].register_forward_hook(lambda _m, _i, output, tap=tap: found.__setitem__(tap, output)) for tap in taps]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, [found[tap] for tap in taps]


def attention(features):
    return F.normalize(features.pow(2).mean(1).flatten(1))


def gram(features):
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)


def similarity(student, teacher):
    return (gram(student) - gram(teacher)).pow(2).sum() / len(student) ** 2


def train(recipe, steps, micro_batch):
    """Returns the logged terms of each step, and the final state of the student.

    The graphs of all micro-batches, the unit of BatchNorm, are kept, and one backward goes through them. Running statistics move once a
    step.
    """
    losses, optimizer, seed = recipe["losses"], recipe["optimizer"], recipe["run"]["seed"]
    batch = recipe["train"]["global_batch"]
    pipeline = build_pipeline("digits", image_size=16)
    source = open_source("digits", training=True)
    order = SampleOrder(len(source), seed, batch, batch)
    torch.manual_seed(seed)
    student = build_model(ModelSpec("resnet8", 10, recipe["student"]["norm"])).double()
    torch.manual_seed(seed)
    teacher = build_model(ModelSpec("wrn_16_1", 10)).double().eval().requires_grad_(False)
    parameters = list(student.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    epoch_steps = len(source) // batch
    lines = []
    for step, loaded in enumerate(TrainingBatches(source, pipeline.train, order).steps(0, steps)):
        images = pipeline.normalize(loaded.images).double()
        warmup = round(0.2 * epoch_steps)
        progress = (step - warmup) / (epoch_steps - 1 - warmup)
        rate = optimizer["lr"] * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        alpha = 0.9 + (0.1 - 0.9) * step / (epoch_steps - 1)
        old = [(n.running_mean, n.running_var) for n in norms]
        new = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in old]
        terms = {"ce": [], "at": [], "kd": [], "sp": []}
        students, teachers = [], []
        parts = batch // micro_batch
        for part in range(parts):
            rows = slice(part * micro_batch, (part + 1) * micro_batch)
            for norm, (mean, var) in zip(norms, old, strict=True):
                norm.running_mean, norm.running_var = mean.clone(), var.clone()
            logits, student_features = features_of(student, STUDENT_TAPS, images[rows])
            teacher_logits, teacher_features = features_of(teacher, TEACHER_TAPS, images[rows])
            for (mean, var), norm in zip(new, norms, strict=True):
                mean += norm.running_mean / parts
                var += norm.running_var / parts
            maps = [(attention(s) - attention(t)).pow(2).mean() for s, t in zip(student_features, teacher_features, strict=True)]
            terms["ce"].append(F.cross_entropy(logits, loaded.labels[rows]))
            terms["at"].append(sum(maps))
            terms["kd"].append(16 * F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher_logits / 4, 1), reduction="batchmean"))
            students.append(student_features[-1])
            teachers.append(teacher_features[-1])
        if losses["sp"] and losses["sp"].get("batch") == "micro":
            terms["sp"] = [similarity(s, t) for s, t in zip(students, teachers, strict=True)]
            gamma = 3000 * micro_batch / 128
        elif losses["sp"]:
            terms["sp"] = [similarity(torch.cat(students), torch.cat(teachers))]
            gamma = 3000 * batch / 128
        else:
            terms["sp"], gamma = [torch.zeros(())], 0.0
        terms = {name: torch.stack(values).mean() for name, values in terms.items()}
        total = terms["ce"] + losses["at"]["beta"] * terms["at"] + alpha * terms["kd"] + gamma * terms["sp"]
        gradients = torch.autograd.grad(total, parameters)
        for norm, (mean, var) in zip(norms, new, strict=True):
            norm.running_mean, norm.running_var = mean, var
            norm.num_batches_tracked.fill_(step + 1)
        with torch.no_grad():
            for p, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                gradient = gradient + optimizer["weight_decay"] * p
                momentum.mul_(optimizer["momentum"]).add_(gradient)
                p -= rate * (gradient + optimizer["momentum"] * momentum)
        logged = {name: value.item() for name, value in terms.items() if name != "sp" or losses["sp"]}
        lines.append({"loss": total.item(), "lr": rate, **logged})
    return lines, student.state_dict()
