"""The training that a recipe of trainer_cases.py means, as a plain PyTorch loop on one process, in float64.

It shares models and data with the package, and nothing of its losses, its arithmetic over ranks or its trainer: those
are what it checks.
"""

import math

import plain_relations
import torch
import torch.nn.functional as F

from dkd.data import GlobalBatchSampler, TrainLoader, build_pipeline, open_source
from dkd.models import ModelSpec, build_model
from dkd.rng import derive_seed

STUDENT_TAPS, TEACHER_TAPS = ["layer1", "layer2", "layer3"], ["block1", "block2", "block3"]


def features_of(model, taps, images):
    """Logits and tapped features, by hooks of its own."""
    found = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[tap].register_forward_hook(lambda _m, _i, output, tap=tap: found.__setitem__(tap, output))
        for tap in taps
    ]
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


def relations(losses, students, teachers, logits, teacher_logits, batch):
    """Name -> (weight, value) of the losses of relations that a recipe has beside SP."""
    found = {}
    if pkt := losses.get("pkt"):
        assert pkt["preset"] == "repdistiller"
        found["pkt"] = 30000 * batch / 64, plain_relations.pkt(students, teachers)
    if cc := losses.get("cc"):
        found["cc"] = cc["weight"], plain_relations.cc(students, teachers)
    if cka := losses.get("cka"):
        found["cka"] = cka["weight"], plain_relations.cka(students, teachers)
    if rkd := losses.get("rkd"):
        assert rkd["preset"] == "repdistiller"
        found["rkd_distance"] = 25, plain_relations.rkd_distance(students, teachers)
        found["rkd_angle"] = 50, plain_relations.rkd_angle(students, teachers)
    if dist := losses.get("dist"):
        found["dist"] = dist["weight"], plain_relations.dist(logits, teacher_logits, tau=4)
    return found


def gradient_attention(form, student, teacher, images, labels):
    """½‖J_S − J_T‖₂, or ½‖J − flip J(flip x)‖₂, mean over samples."""

    def by_pixels(model, pixels):
        pixels = pixels.clone().requires_grad_()
        loss = F.cross_entropy(model(pixels), labels, reduction="sum")
        return torch.autograd.grad(loss, pixels, create_graph=True)[0]

    if form == "transfer":
        difference = by_pixels(student, images) - by_pixels(teacher, images).detach()
    else:
        difference = by_pixels(student, images) - by_pixels(student, images.flip(-1)).flip(-1)
    return 0.5 * difference.flatten(1).norm(dim=1).mean()


def mixed(images, labels, mixup, cutmix, seed):
    """Mixup or CutMix of neighbours, one of the two, with what torchvision's transforms draw from a generator of this
    seed."""
    probabilities = F.one_hot(labels, 10).double()
    torch.manual_seed(seed)
    cut = int(torch.multinomial(torch.tensor([0.5, 0.5]), 1))
    share = float(torch.distributions.Beta(*[torch.tensor(float(cutmix if cut else mixup))] * 2).sample())
    if not cut:
        images = share * images + (1 - share) * images.roll(1, 0)
    else:
        height, width = images.shape[2:]
        x, y = int(torch.randint(width, (1,))), int(torch.randint(height, (1,)))
        half = 0.5 * math.sqrt(1 - share)
        left, right = max(x - int(half * width), 0), min(x + int(half * width), width)
        top, bottom = max(y - int(half * height), 0), min(y + int(half * height), height)
        images = images.clone()
        images[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, share * probabilities + (1 - share) * probabilities.roll(1, 0)


def normalised(images, mean, std):
    """Pixels from 0 to 255, in float64 all the way."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
    return (images / 255 - mean) / std


def train(recipe, steps, micro_batch):
    """Returns the logged terms of each step, and the final state of the student.

    The graphs of all micro-batches, the unit of BatchNorm, are kept, and one backward goes through them. Running
    statistics move once a step.
    """
    losses, optimizer, seed = recipe["losses"], recipe["optimizer"], recipe["run"]["seed"]
    batch = recipe["train"]["global_batch"]
    pipeline = build_pipeline("digits", image_size=16)
    source = open_source("digits", training=True)
    order = GlobalBatchSampler(len(source), seed, batch, batch)
    torch.manual_seed(seed)
    student = build_model(ModelSpec(recipe["student"]["name"], 10, recipe["student"]["norm"])).double()
    torch.manual_seed(seed)
    teacher = build_model(ModelSpec("wrn_16_1", 10)).double().eval().requires_grad_(False)
    parameters = list(student.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    epoch_steps = len(source) // batch
    lines = []
    for step, loaded in enumerate(TrainLoader(source, pipeline.train, order).steps(0, steps)):
        warmup = round(0.2 * epoch_steps)
        progress = (step - warmup) / (epoch_steps - 1 - warmup)
        rate = optimizer["lr"] * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        alpha = 0.9 + (0.1 - 0.9) * step / (epoch_steps - 1)
        old = [(n.running_mean, n.running_var) for n in norms]
        new = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in old]
        terms = {"ce": [], "at": [], "kd": [], "sp": [], "gradient_at": []}
        students, teachers, both_logits = [], [], []
        parts = batch // micro_batch
        for part in range(parts):
            rows = slice(part * micro_batch, (part + 1) * micro_batch)
            for norm, (mean, var) in zip(norms, old, strict=True):
                norm.running_mean, norm.running_var = mean.clone(), var.clone()
            images, labels = loaded.images[rows].double(), loaded.labels[rows]
            if recipe["data"].get("mixup"):
                images, labels = mixed(
                    images, labels, recipe["data"]["mixup"], recipe["data"]["cutmix"], derive_seed(seed, step, part, 1)
                )
            images = normalised(images, pipeline.normalize.mean, pipeline.normalize.std)
            torch.manual_seed(derive_seed(seed, step, part, 0))
            logits, student_features = features_of(student, STUDENT_TAPS, images)
            teacher_logits, teacher_features = features_of(teacher, TEACHER_TAPS, images)
            for (mean, var), norm in zip(new, norms, strict=True):
                mean += norm.running_mean / parts
                var += norm.running_var / parts
            maps = [
                (attention(s) - attention(t)).pow(2).mean()
                for s, t in zip(student_features, teacher_features, strict=True)
            ]
            terms["ce"].append(F.cross_entropy(logits, labels))
            terms["at"].append(sum(maps))
            terms["kd"].append(
                16 * F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(teacher_logits / 4, 1), reduction="batchmean")
            )
            if (own := losses.get("gradient_at")) is not None:
                terms["gradient_at"].append(gradient_attention(own["form"], student, teacher, images, labels))
            students.append(student_features[-1])
            teachers.append(teacher_features[-1])
            both_logits.append((logits, teacher_logits))
        if losses["sp"] and losses["sp"].get("batch") == "micro":
            terms["sp"] = [similarity(s, t) for s, t in zip(students, teachers, strict=True)]
            gamma = 3000 * micro_batch / 128
        elif losses["sp"]:
            terms["sp"] = [similarity(torch.cat(students), torch.cat(teachers))]
            gamma = 3000 * batch / 128
        else:
            terms["sp"], gamma = [torch.zeros(())], 0.0
        terms = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        if not losses["at"]:
            terms["at"] = terms["kd"] = torch.zeros(())
        compared = relations(
            losses, torch.cat(students), torch.cat(teachers), *map(torch.cat, zip(*both_logits, strict=True)), batch
        )
        beta = losses["at"]["beta"] if losses["at"] else 0.0
        total = terms["ce"] + beta * terms["at"] + alpha * terms["kd"] + gamma * terms["sp"]
        total = total + sum(weight * value for weight, value in compared.values())
        terms.update({name: value for name, (_, value) in compared.items()})
        if "gradient_at" in terms:
            total = total + losses["gradient_at"]["beta"] * terms["gradient_at"]
        gradients = torch.autograd.grad(total, parameters)
        for norm, (mean, var) in zip(norms, new, strict=True):
            norm.running_mean, norm.running_var = mean, var
            norm.num_batches_tracked.fill_(step + 1)
        with torch.no_grad():
            for p, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                gradient = gradient + optimizer["weight_decay"] * p
                momentum.mul_(optimizer["momentum"]).add_(gradient)
                p -= rate * (gradient + optimizer["momentum"] * momentum)
        logged = {name: value.item() for name, value in terms.items() if losses.get(name, True)}
        lines.append({"loss": total.item(), "lr": rate, **logged})
    return lines, student.state_dict()
