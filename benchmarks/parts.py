"""What single parts of a step cost, each beside the way it is not done: the table of parts in docs/benchmarks.md.

python -m benchmarks.parts                 2 CPU threads, about a minute
python -m benchmarks.parts --threads 4

Medians; the ways of a row in turn, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torchvision.transforms import v2

from dkd.data.transforms import CropAndFlip
from dkd.losses.attention_transfer import attention_map
from dkd.models import ModelSpec, TappedModel, build_model

ROUNDS = 15


def milliseconds(*ways: Callable[[], Any]) -> list[float]:
    """The median of each, in turn within each round, after two rounds that do not count."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS + 2):
        for seconds, way in zip(taken, ways, strict=True):
            started = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - started)
    return [1e3 * median(seconds[2:]) for seconds in taken]


def augmentation() -> str:
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    one_by_one = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    batch, single = milliseconds(
        lambda: CropAndFlip(32, 4, flip=True).of_batch(images, range(len(images))),
        lambda: torch.stack([one_by_one(image) for image in images]),
    )
    each = f"{1e3 * batch / 256:.1f} µs an image as a batch, {1e3 * single / 256:.0f} one by one"
    return f"crop and flip, 256 images of 32×32: {each}"


def attention_backward() -> str:
    features = torch.randn(64, 32, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(64, 32, 32)

    def backward(map_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        features.grad = None
        map_of(features).backward(gradient)

    own, plain = milliseconds(lambda: backward(attention_map), lambda: backward(lambda f: f.square().sum(1)))
    return f"attention map of 64 × 32 × 32 × 32, forward and backward: {own:.1f} ms, {plain:.1f} as autograd writes it"


def around_a_step() -> str:
    """A training step of a student alone on two tiny images: nearly all of it is what Python and torch do around the
    arithmetic."""
    from benchmarks.step import Row

    options = argparse.Namespace(teacher="wrn_16_2", student="wrn_16_1", batch=2, size=8)
    alone: dict[str, Any] = {"teacher": None, "losses": {}, "train.precision": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        row = Row("alone", options, Path(folder), alone)
        model = copy.deepcopy(row.trainer.parts.engine.model.model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
        images, labels = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.zeros(2, dtype=torch.long)

        def plain() -> None:
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        row.take(10)

        def five() -> None:
            for _ in range(5):
                plain()

        ours, theirs = milliseconds(lambda: row.take(5), five)
    both = f"{ours / 5:.1f} ms in the trainer, {theirs / 5:.1f} in a plain loop of four lines"
    return f"a step of wrn_16_1 on 2 images of 8×8: {both}"


def folded_teacher() -> str:
    from torch.fx.experimental.optimization import fuse

    model = build_model(ModelSpec("wrn_40_2", 10)).eval()
    folded = fuse(copy.deepcopy(model)).eval()
    images = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    model, folded = (m.to(memory_format=torch.channels_last) for m in (model, folded))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fused = milliseconds(lambda: model(images), lambda: folded(images))
    both = f"{plain:.0f} ms, {fused:.0f} with BatchNorm folded into convolutions"
    return f"forward of a wrn_40_2 teacher, 64 images, bf16: {both}"


def attention_of_squares() -> str:
    """AT on maps as a ResNet's at 224 pixels: as AttentionTransfer computes it, and as public implementations write
    it."""
    from dkd import AttentionTransfer

    def mapped(feature: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(feature.square().sum(1).flatten(1))

    def published(students: list[torch.Tensor], teachers: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(students, teachers, strict=True)
        return torch.stack([(mapped(s) - mapped(t)).square().mean() for s, t in pairs]).sum()

    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        shapes = [(64, 56), (128, 28), (256, 14)]
        students = [torch.randn(16, c, s, s).to(memory_format=layout).requires_grad_() for c, s in shapes]
        teachers = [torch.randn(16, c, s, s).to(memory_format=layout) for c, s in shapes]
        ways = [partial(loss, students, teachers) for loss in (AttentionTransfer(), published)]
        few, many = milliseconds(*(partial(lambda way, of: torch.autograd.grad(way(), of), w, students) for w in ways))
        found.append(f"{few:.1f} ms and {many:.1f} ({str(layout).removeprefix('torch.')})")
    return f"AT of three pairs, as here and as published: {', '.join(found)}"


def back_and_forth(student: TappedModel, images: torch.Tensor) -> None:
    student(images)[0].float().sum().backward()


def weight_casts() -> str:
    """Forward and backward under bfloat16 autocast, on so few pixels that the casts of the weights show."""
    found = []
    for name in ("wrn_16_1", "torchvision/resnet50"):
        model = build_model(ModelSpec(name, 10)).to(memory_format=torch.channels_last)
        images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
        ways = [TappedModel(copy.deepcopy(model), [], autocast=torch.bfloat16).train() for _ in range(2)]
        ways[1].cast_together()
        single, together = milliseconds(*(partial(back_and_forth, way, images) for way in ways))
        found.append(f"{name}: {single:.1f} ms one by one, {together:.1f} together")
    return f"casts of a student's weights, in a step on 2 images of 32×32: {'; '.join(found)}"


def optimizers() -> str:
    """The updates of all weights by one kernel, and as torch makes them by default."""
    found = []
    for name in ("wrn_16_1", "torchvision/resnet18"):
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in build_model(ModelSpec(name, 10)).parameters()]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        for optimizer in (torch.optim.SGD, torch.optim.AdamW):
            more = {"momentum": 0.9, "nesterov": True} if optimizer is torch.optim.SGD else {}
            made = [optimizer(parameters, lr=1e-3, fused=fused, **more) for fused in (True, False)]  # type: ignore[arg-type]
            fused, plain = milliseconds(*(each.step for each in made))
            found.append(f"{optimizer.__name__} on {name}: {fused:.2f} ms fused, {plain:.2f} by default")
    return "; ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    torch.set_num_threads(parser.parse_args().threads)
    losses = (attention_backward, attention_of_squares)
    for part in (augmentation, *losses, around_a_step, folded_teacher, weight_casts, optimizers):
        print(part(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
