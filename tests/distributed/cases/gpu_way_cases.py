"""Collectives in the way of GPUs, on CPUs: what losses and gradients they yield beside the way of CPUs, and which
operations of torch each of the two calls."""

from functools import partial

import torch
import torch.distributed as dist
from loss_cases import RELATIONS, rows_of, world
from torch.profiler import ProfilerActivity, profile

from dkd import SimilarityPreserving
from dkd.global_batch import BatchLayout, all_grids, collectives, gather_rows


def both_ways(function):
    """Return what `function` yields in the way of CPUs, and in that of GPUs."""
    plain = function()
    with collectives.as_on_gpus():
        return plain, function()


def difference(plain, other):
    """Return whether two lists of tensors are equal bit for bit, and their largest relative difference."""
    pairs = list(zip(plain, other, strict=True))
    errors = [((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-300)).item() for a, b in pairs]
    return {"equal": all(torch.equal(a, b) for a, b in pairs), "error": max(errors)}


def features_of_all(counts):
    """Return a student's and a teacher's features of all ranks."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(sum(counts), width, generator=generator, dtype=torch.float64) for width in (9, 13)]


def features_of(counts, dtype):
    """Return this rank's rows of both, and the layout of all ranks."""
    rank, _ = world()
    whole, mine = features_of_all(counts), rows_of(counts, rank)
    return whole[0][mine].to(dtype), whole[1][mine].to(dtype), BatchLayout(tuple(counts), rank)


def value_and_gradient(loss, student, teacher, layout):
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher, layout=layout)
    value.backward()
    return [value.detach()[None], leaf.grad]


def batches():
    _, size = world()
    return {"even": [3] * size, "uneven": [1 + 2 * rank % 5 for rank in range(size)]}


def losses_in_the_way_of_gpus(folder):
    """Losses of relations on every grid, whose axes are process groups within the job; SP that sends bfloat16; scopes
    of groups; rows gathered with their gradient."""
    return {
        f"{name} {batch}": difference(*both_ways(call))
        for batch, counts in batches().items()
        for name, call in calls_of(counts)
    }


def calls_of(counts):
    """Yield names, and functions that return the values and gradients of this rank."""
    _, size = world()
    student, teacher, layout = features_of(counts, torch.float64)
    for grid in all_grids(size):
        for name, (make, _) in RELATIONS.items():
            features = student, teacher[:, :9] if name == "dist" else teacher
            yield f"{name} {grid.name}", partial(value_and_gradient, make(grid), *features, layout)
        half = SimilarityPreserving(grid=grid, comm_dtype=torch.bfloat16)
        yield f"sp in bf16 {grid.name}", partial(value_and_gradient, half, student.float(), teacher.float(), layout)
    groups = SimilarityPreserving(scope=size // 2)
    yield "sp of groups", partial(value_and_gradient, groups, student, teacher, layout)
    yield "gathered rows", partial(gathered_and_back, student, layout)


def gathered_and_back(student, layout):
    leaf = student.clone().requires_grad_()
    rows = gather_rows(leaf, layout)
    (rows * torch.arange(rows.numel(), dtype=rows.dtype).view_as(rows)).sum().backward()
    return [rows.detach(), leaf.grad]


def losses_beside_plain_formulas(folder):
    """Relative errors of value and gradient of each loss of relations on every grid, on GPUs where there are some, else
    in their way, against the plain formula in one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank, size = world()
    errors = {}
    for batch, counts in batches().items():
        wholes = features_of_all(counts)
        mine, layout = rows_of(counts, rank), BatchLayout(tuple(counts), rank)
        for name, (make, plain) in RELATIONS.items():
            student, teacher = wholes[0].clone().requires_grad_(), wholes[1][:, :9] if name == "dist" else wholes[1]
            wanted = plain(student, teacher)
            wanted.backward()
            for grid in all_grids(size):
                with collectives.as_on_gpus():
                    rows = wholes[0][mine].to(device), teacher[mine].to(device)
                    value, gradient = value_and_gradient(make(grid), *rows, layout)
                dist.all_reduce(value)
                found = gradient.cpu() / size - student.grad[mine]
                error = (found.norm() / student.grad[mine].norm()).item()
                errors[f"{name} {grid.name} {batch}"] = [abs(value.item() / size / wanted.item() - 1), error]
    return errors


def operations_of_each_way(folder):
    """The collectives of tensors that torch was asked for, by their names in a profile, and the process groups that a
    grid with one axis took."""
    student, teacher, layout = features_of(batches()["even"], torch.float64)

    def called():
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            gathered_and_back(student, layout)
            value_and_gradient(SimilarityPreserving(grid="exchange"), student, teacher, layout)
        names = {event.name for event in profiled.events()}
        return sorted(name for name in names if name.startswith("c10d::") and "object" not in name)

    return both_ways(called)


CASES = [losses_in_the_way_of_gpus, losses_beside_plain_formulas, operations_of_each_way]
