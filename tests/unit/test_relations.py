"""The losses of relations between samples: on any grid of ranks, as threads, and against public implementations.
test_ranks.py has them on real processes."""

import copy
import itertools
import math
from dataclasses import replace
from unittest import mock

import plain_relations
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from plain_reference import features_of
from reference_material import require_method_losses
from threaded_ranks import Group, on_ranks
from torch import nn

import dkd
from dkd import CKA, DIST, PKT, CorrelationCongruence, RKDAngle, RKDDistance, SimilarityPreserving
from dkd.distillation import DistillationStep, FeatureTerm, FrozenTeacher, LabelTerm, LogitTerm, Objective
from dkd.distillation import step as step_of_distillation
from dkd.errors import InputError
from dkd.global_batch import BatchLayout, GramTensor, Grid, LossSums, Work, all_grids, collectives, cost
from dkd.global_batch import relational as relations
from dkd.global_batch.choice import GridChoice
from dkd.global_batch.cost import fewest_chunks, held
from dkd.losses import (
    AttentionTransfer,
    CrossEntropy,
    SoftTargets,
    relational_angle,
    similarity_of_one_process,
    similarity_preserving,
)
from dkd.models import TappedModel

# Ours, for a grid; and the plain formula of it.
FAMILY = {
    "sp": (lambda grid: SimilarityPreserving(grid=grid, floor=0), plain_relations.sp),
    "sp with a floor": (
        lambda grid: SimilarityPreserving(grid=grid, floor=0.9),
        lambda s, t: plain_relations.sp(s, t, 0.9),
    ),
    "pkt": (lambda grid: PKT(0, grid=grid), plain_relations.pkt),
    "pkt with a floor": (lambda grid: PKT(0.9, grid=grid), lambda s, t: plain_relations.pkt(s, t, 0.9)),
    "cc": (lambda grid: CorrelationCongruence(floor=0, grid=grid), plain_relations.cc),
    "cc to the fourth power": (
        lambda grid: CorrelationCongruence(0.7, 4, floor=0.9, grid=grid),
        lambda s, t: plain_relations.cc(s, t, 0.7, 4, 0.9),
    ),
    "cka": (lambda grid: CKA(grid=grid), plain_relations.cka),
    "rkd distance": (lambda grid: RKDDistance(grid=grid), plain_relations.rkd_distance),
}
WITHOUT_GRID = {
    "rkd angle": (RKDAngle, plain_relations.rkd_angle),
    "dist": (lambda: DIST(2.0, 0.5, 3.0), lambda s, t: plain_relations.dist(s, t, 2.0, 0.5, 3.0)),
}
WORLDS = (1, 2, 3, 4, 6, 8)


def samples(counts, widths):
    """Return features of all samples, of which the first and the last are short, so that floors matter."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(sum(counts), width, generator=generator, dtype=torch.float64) for width in widths]
    for feature in found:
        feature[0] *= 0.1
        feature[-1] *= 0.3
    return found


def rows_of(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def error_on_ranks(make, plain, counts, widths=((11, 7), (5, 7))):
    """Return the largest relative error of the value and of the gradients by the features of each pair."""
    found = samples(counts, [width for pair in widths for width in pair])
    students, teachers = found[::2], found[1::2]
    wholes = [s.clone().requires_grad_() for s in students]
    wanted = sum(plain(s, t) for s, t in zip(wholes, teachers, strict=True))
    wanted.backward()

    def on_rank(rank, group):
        mine, own = rows_of(counts, rank), BatchLayout(tuple(counts), rank, group)
        leaves = [s[mine].clone().requires_grad_() for s in students]
        single = len(leaves) == 1
        features = (leaves[0], teachers[0][mine]) if single else (leaves, [t[mine] for t in teachers])
        value = make()(*features, layout=own)
        value.backward()
        return value.detach(), [leaf.grad for leaf in leaves]

    world = len(counts)
    found = on_ranks(world, on_rank) if world > 1 else [on_rank(0, None)]
    errors = [abs(sum(value for value, _ in found) / world / wanted.detach() - 1)]
    for number, whole in enumerate(wholes):
        gradient = torch.cat([gradients[number] for _, gradients in found]) / world
        errors.append((gradient - whole.grad).norm() / whole.grad.norm())
    return max(error.item() for error in errors)


def counts_of(world, even):
    return [3] * world if even else [1 + 2 * rank % 5 for rank in range(world)]


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("world", WORLDS)
def test_value_and_gradient_are_those_of_the_plain_formula_on_every_grid(world, even):
    for name, (make, plain) in FAMILY.items():
        for grid in all_grids(world):
            # One sample more, where there would be one alone.
            counts = counts_of(world, even) if world > 1 else [5]
            error = error_on_ranks(lambda make=make, grid=grid: make(grid), plain, counts)
            assert error < 1e-12, (name, grid, error)


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", WITHOUT_GRID)
def test_angles_and_correlations_are_those_of_the_plain_formula(name, world, even):
    make, plain = WITHOUT_GRID[name]
    counts = counts_of(world, even) if world > 1 else [5]
    assert error_on_ranks(make, plain, counts, ((6, 6),)) < 1e-12


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("grid", [(8, 1, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (1, 2, 4)])
def test_features_in_chunks_are_compared_alike(grid, even):
    """Of widths that neither chunks nor slices divide; and of more chunks than features."""
    widths, counts = ((901, 667), (3, 550)), counts_of(8, even)
    tensors = [GramTensor(w, True, 8, 8) for w, _ in widths] + [GramTensor(w, False, 8, 8) for _, w in widths]
    work, chunks = Work(tensors, max(counts), 8), set()
    for share in (0.95, 0.5):
        memory = int(share * held(work, Grid(*grid)).bytes)
        if (found := fewest_chunks(work, Grid(*grid), memory)) is None:
            continue
        chunks.add(found)
        for name, (make, plain) in (("sp", FAMILY["sp"]), ("rkd distance", FAMILY["rkd distance"])):

            def limited(make=make, memory=memory):
                loss = make(grid)
                loss.grid = GridChoice(grid, memory)
                return loss

            assert error_on_ranks(limited, plain, counts, widths) < 1e-12, (name, found)
    assert max(chunks) > 1


def test_chunks_move_what_the_formula_says():
    tensors = [GramTensor(96, True), GramTensor(64, False)]
    work = Work(tensors, 2, 8)
    for grid in all_grids(8):
        if (chunks := fewest_chunks(work, grid, memory := int(0.8 * held(work, grid).bytes))) is None:
            continue
        expected = cost.moves(work, grid, chunks)
        wanted = 8 * sum(move.bytes for move in expected), 8 * len(expected)

        def make(grid, memory=memory):
            return SimilarityPreserving(grid=grid, memory=memory)

        assert counted(8, grid, make, [96], [64], torch.float32) == wanted, (grid, chunks)


def test_a_grid_that_does_not_fit_in_any_number_of_chunks_is_refused():
    def on_rank(rank, group):
        try:
            SimilarityPreserving(grid=[1, 1, 4], memory=1000)(
                torch.ones(8, 16), torch.ones(8, 16), layout=BatchLayout((8,) * 4, rank, group)
            )
        except InputError as error:
            return str(error)

    (message,) = set(on_ranks(4, on_rank))
    assert message.startswith("SimilarityPreserving on the grid 1 × 1 × 4 needs 1")
    assert "more than the 1e-06 GB that are allowed; allow more (memory), or take grid: auto" in message


def test_a_rank_without_samples_takes_part():
    for name, (make, plain) in FAMILY.items():
        for grid in all_grids(4):
            error = error_on_ranks(lambda make=make, grid=grid: make(grid), plain, [3, 0, 2, 0])
            assert error < 1e-12, (name, grid, error)


def patched(owner, name, change):
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *arguments, **more: change(original, *arguments, **more))


def local_rows_only(original, sums, at):
    """The sums of rows over this rank's block, as if it were all."""
    each = len(sums[0])
    table = [
        torch.zeros(at.layout.total, dtype=s.dtype).index_copy(0, at.part_samples, s) for pair in sums for s in pair
    ]
    return [tuple(table[i * each : (i + 1) * each]) for i in range(len(sums))]


class OfRowsAlone(relations.Sums):
    def of_both(self, numbers):
        return self.of_rows(numbers)


def without_the_other_half(original, loss, s, t, at):
    """D alone, where D + Dᵀ belongs."""
    return original(loss, s, t, OfRowsAlone(at.batch, at.rows, at.row_samples, at.column_samples))


def with_the_other_sign(original, loss, s, t, at):
    return original(loss, s, -t, at)


def floor_of_the_teacher_alone(original, loss, squares):
    # The first call for a pair is the student's. Each rank has a loss of its own.
    loss.calls = getattr(loss, "calls", 0) + 1
    with mock.patch.object(loss, "floor", 0.0 if loss.calls % 2 else loss.floor):
        return original(loss, squares)


MUTATIONS = {
    "a missing transpose": lambda: patched(SimilarityPreserving, "slope", without_the_other_half),
    "β with the wrong sign": lambda: patched(SimilarityPreserving, "slope", with_the_other_sign),
    "a row norm over the local block": lambda: patched(relations, "add_by_sample", local_rows_only),
    "k forgotten in the reduce": lambda: patched(
        relations, "add_slices", lambda original, products, at: [each[at.part] for each in products]
    ),
    "a column slice off by one": lambda: patched(
        relations, "send_home", lambda original, *arguments: [each.roll(1, 1) for each in original(*arguments)]
    ),
    "the floor applied to the teacher alone": lambda: patched(
        similarity_preserving.SimilarityPreserving, "divisors", floor_of_the_teacher_alone
    ),
    "one process: the floor left out": lambda: patched(
        similarity_of_one_process,
        "least_norms",
        lambda original, both, norms, floor, factor: original(both, norms, 0.0, factor),
    ),
    "one process: products with other samples": lambda: patched(
        similarity_of_one_process,
        "multiply",
        lambda original, rows, columns, out: original(rows, columns.roll(1, 0), out),
    ),
    "one process: a derivative through a divisor that is a constant": lambda: mock.patch.object(
        torch.Tensor, "masked_fill_", lambda tensor, mask, value: tensor
    ),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_in_the_algebra_would_be_noticed(mistake):
    """The test above, with one mistake each, on a grid of 2 × 2 × 2 ranks."""
    make, plain = FAMILY["sp with a floor"]
    world, grid = (1, (1, 1, 1)) if mistake.startswith("one process") else (8, (2, 2, 2))
    counts = [6] if world == 1 else counts_of(world, True)
    assert error_on_ranks(lambda: make(grid), plain, counts) < 1e-12
    with MUTATIONS[mistake]():
        assert error_on_ranks(lambda: make(grid), plain, counts) > 1e-6


# A step of distillation, on each grid, in one and in two passes

ROWS, CLASSES, TAPS = 3, 6, ["0", "3"]


def step_model(channels, width):
    """Return a model without biases, so that short images have short features. Each rank takes a copy."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(channels * 16, width, bias=False),
        nn.Tanh(),
        nn.Linear(width, CLASSES, bias=False),
    ).double()


def step_samples(total):
    """Return images and labels of two steps."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, total, 3, 4, 4, generator=generator, dtype=torch.float64)
    images[:, 0] *= 0.1
    images[:, -1] *= 0.3
    return images, torch.randint(CLASSES, (2, total), generator=generator)


def weight_of_relations(step):
    return 50.0 + step


def of_own_steps(models, loss, micro_steps, places, images, labels):
    """Return of each step the values of this rank, means over its micro-steps, and the gradients of its parameters."""
    student, teacher = copy.deepcopy(models)
    if isinstance(loss, DIST):
        term = LogitTerm("relations", weight_of_relations, loss, relational=True)
    else:
        term = FeatureTerm("relations", weight_of_relations, loss, [(tap, tap) for tap in TAPS], relational=True)
    step = DistillationStep(
        TappedModel(student, TAPS),
        FrozenTeacher(teacher, TAPS, needs_logits=True),
        Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy()), term]),
        micro_steps=micro_steps,
        dtype=torch.float64,
    )
    found = []
    for number in range(len(images)):
        student.zero_grad()
        step.begin([(images[number, place], labels[number, place]) for place in places], number)
        values = torch.zeros(3, dtype=torch.float64)
        for micro_step in range(micro_steps):
            own = step.loss(micro_step)
            (own.total / micro_steps).backward()
            values += torch.stack([own.terms["ce"], own.terms["relations"], own.counts["loss"]]) / micro_steps
            assert own.counts.get("pass_difference", 0) == 0
        step.end()
        found.append([values, *(p.grad.clone() for p in student.parameters())])
    return found


def of_plain_steps(models, plain, compares_logits, images, labels):
    """Return the same by plain formulas on all samples at once."""
    student, teacher = copy.deepcopy(models)
    found = []
    for number in range(len(images)):
        student.zero_grad()
        logits, features = features_of(student, TAPS, images[number])
        with torch.no_grad():
            wanted_logits, wanted = features_of(teacher, TAPS, images[number])
        pairs = [(logits, wanted_logits)] if compares_logits else zip(features, wanted, strict=True)
        ce, relations_ = F.cross_entropy(logits, labels[number]), sum(plain(s, t) for s, t in pairs)
        total = ce + weight_of_relations(number) * relations_
        total.backward()
        values = torch.stack([ce, relations_, total]).detach()
        found.append([values, *(p.grad.clone() for p in student.parameters())])
    return found


def error_of_steps(make, plain, world, micro_steps):
    """Return the largest relative error of values and gradients of two steps. The second one sends the teacher's
    features before the student's forward, where a step has one pass."""
    torch.manual_seed(5)
    models = step_model(4, 5), step_model(5, 7)
    images, labels = step_samples(world * micro_steps * ROWS)

    def on_rank(rank, group):
        first = [(micro_step * world + rank) * ROWS for micro_step in range(micro_steps)]
        places = [slice(place, place + ROWS) for place in first]
        return of_own_steps(models, make(), micro_steps, places, images, labels)

    by_rank, errors = on_ranks(world, on_rank), []
    for number, wanted in enumerate(of_plain_steps(models, plain, isinstance(make(), DIST), images, labels)):
        means = [sum(parts) / world for parts in zip(*(found[number] for found in by_rank), strict=True)]
        errors += ((means[0] - wanted[0]) / wanted[0]).abs().tolist()
        errors += [((g - w).norm() / w.norm()).item() for g, w in zip(means[1:], wanted[1:], strict=True)]
    return max(errors)


@pytest.mark.parametrize("micro_steps", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_a_step_is_that_of_the_plain_formula_on_every_grid(world, micro_steps):
    """Values and gradients of CE + λ · relations of two taps, of W ranks that accumulate A micro-steps."""
    for name, (make, plain) in FAMILY.items():
        for grid in all_grids(world):
            error = error_of_steps(lambda make=make, grid=grid: make(grid), plain, world, micro_steps)
            assert error < 1e-12, (name, grid, error)
    for name, (make, plain) in WITHOUT_GRID.items():
        error = error_of_steps(make, plain, world, micro_steps)
        assert error < 1e-12, (name, error)


def teachers_in_another_order(original, objective, students, teachers, *more):
    return original(objective, students, teachers[::-1], *more)


def gradients_in_another_order(original, *arguments):
    found = original(*arguments)
    return replace(found, gradients=found.gradients[::-1])


@pytest.mark.parametrize("change", [teachers_in_another_order, gradients_in_another_order])
def test_micro_steps_in_another_order_would_be_noticed(change):
    for name, (make, plain) in FAMILY.items():
        with patched(step_of_distillation, "cache_gradient", change):
            assert error_of_steps(lambda make=make: make((2, 1, 1)), plain, 2, 3) > 1e-6, name


SUMS = {
    "sp": (SimilarityPreserving, LossSums(3, 0, False)),
    "rkd distance": (RKDDistance, LossSums(2, 1, True, True)),
    "cka": (CKA, LossSums(2, 3, False, True)),
    "cc": (CorrelationCongruence, LossSums(0, 0, False)),
    "pkt": (PKT, LossSums(2, 0, False)),
}


def counted(world, grid, make, students, teachers, dtype):
    """Return the bytes and the collectives of all ranks in a step."""

    def on_rank(rank, group):
        own = [torch.ones(2, width).to(dtype).requires_grad_() for width in students]
        theirs = [torch.ones(2, width).to(dtype) for width in teachers]
        make(grid=grid)(own, theirs, layout=BatchLayout((2,) * world, rank, group)).backward()

    with collectives.count_received() as received:
        on_ranks(world, on_rank)
    return received.bytes, received.collectives


@pytest.mark.parametrize("world", [2, 4, 8, 12, 16])
def test_bytes_are_those_of_the_formula_on_every_grid(world):
    students, teachers = (5, 48), (7, 32)
    for (name, (make, sums)), dtype in itertools.product(SUMS.items(), (torch.float32, torch.bfloat16)):
        if dtype == torch.bfloat16 and name != "sp":
            continue
        tensors = [GramTensor(w, True, dtype.itemsize) for w in students]
        tensors += [GramTensor(w, False, dtype.itemsize) for w in teachers]
        assert make().sums() == sums
        for grid in all_grids(world):
            expected = cost.moves(Work(tensors, 2, world, sums), grid)
            wanted = world * sum(move.bytes for move in expected), world * len(expected)
            assert counted(world, grid, make, students, teachers, dtype) == wanted, (name, grid)


def test_bytes_are_those_of_the_formula_on_64_ranks():
    tensors = [GramTensor(64, True), GramTensor(128, False)]
    for grid in all_grids(64):
        expected = cost.moves(Work(tensors, 2, 64), grid)
        wanted = 64 * sum(move.bytes for move in expected), 64 * len(expected)
        assert counted(64, grid, SimilarityPreserving, [64], [128], torch.float32) == wanted, grid


# What each sample has alone, and the plain formula of it, of (6, 5) features.
OF_SAMPLES = {
    "at": (AttentionTransfer, lambda s, t: (attention(s) - attention(t)).square().mean()),
    "kd": (
        lambda: SoftTargets(4),
        lambda s, t: 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean"),
    ),
    "ce": (CrossEntropy, F.cross_entropy),
}


def attention(features):
    return F.normalize(features.square().mean(1).flatten(1))


def features_for(name, total):
    """Return what a loss of samples is given of all samples, the student's first."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = (torch.randn(total, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    if name == "at":
        return student, teacher
    logits = student.flatten(1)[:, :10], teacher.flatten(1)[:, :10]
    return logits if name == "kd" else (logits[0], torch.randint(10, (total,), generator=generator))


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("name", OF_SAMPLES)
def test_losses_of_samples_on_64_ranks_are_those_of_one_process(name, even):
    counts = counts_of(64, even)
    make, plain = OF_SAMPLES[name]
    student, other = features_for(name, sum(counts))
    whole = student.clone().requires_grad_()
    wanted = plain(whole, other)
    wanted.backward()

    def on_rank(rank, group):
        mine = rows_of(counts, rank)
        leaf = student[mine].clone().requires_grad_()
        value = make()(leaf, other[mine], layout=BatchLayout(tuple(counts), rank, group))
        value.backward()
        return value.detach(), leaf.grad

    found = on_ranks(64, on_rank)
    assert abs(sum(value for value, _ in found) / 64 / wanted.detach() - 1) < 1e-12
    gradient = torch.cat([each for _, each in found]) / 64
    assert (gradient - whole.grad).norm() < 1e-12 * whole.grad.norm()


@pytest.mark.parametrize("grid", [(64, 1, 1), (1, 1, 64), (8, 8, 1), (4, 4, 4), (2, 16, 2)], ids=str)
def test_relations_on_64_ranks_are_those_of_one_process(grid):
    for name, (make, plain) in FAMILY.items():
        for even in (True, False):
            error = error_on_ranks(lambda make=make: make(grid), plain, counts_of(64, even))
            assert error < 1e-12, (name, even, error)


@pytest.mark.parametrize("name", WITHOUT_GRID)
def test_angles_and_correlations_on_64_ranks_are_those_of_one_process(name):
    make, plain = WITHOUT_GRID[name]
    for even in (True, False):
        assert error_on_ranks(make, plain, [1 + even] * 60 + [3, 1, 2, 2], ((6, 6),)) < 1e-12


# Public implementations

IMPLEMENTATIONS = {
    "rkd_distance": RKDDistance(),
    "rkd_angle": RKDAngle(),
    "cc_gaussian": CorrelationCongruence(gamma=0.4, max_p=2),
    "pkt": PKT(),
    "dist_b1_g1_t1": DIST(beta=1.0, gamma=1.0, tau=1.0),
    "dist_b1_g1_t4": DIST(tau=4.0),
    "dist_b2_g0.5_t2": DIST(beta=2.0, gamma=0.5, tau=2.0),
}
# RepDistiller's PKT adds 1e-7 to the probabilities in its logarithm, which are about 1/B: up to 1.2e-5 of the gradient
# at B = 48. DIST's authors add 1e-8 to the product of norms. With the same numbers added, the plain formulas are theirs
# (below).
LEFT_OUT = {"pkt": 1.2e-5, "dist": 1e-5}


def relative(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def reference_cases(prefixes):
    reference = require_method_losses()
    for key in sorted(reference):
        case, name, what = [*key.split("/"), ""][:3]
        if what == "loss" and name.startswith(prefixes):
            student = reference[f"{case}/student"].double().requires_grad_()
            yield f"{case}/{name}", name, student, reference[f"{case}/teacher"].double(), reference


def test_values_and_gradients_of_public_implementations():
    seen = 0
    for key, name, student, teacher, reference in reference_cases(tuple(IMPLEMENTATIONS)):
        value = IMPLEMENTATIONS[name](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        tolerance = LEFT_OUT.get(name.partition("_")[0], 1e-9)
        assert relative(value.detach()[None], reference[f"{key}/loss"]) < tolerance, key
        assert relative(gradient, reference[f"{key}/grad"]) < tolerance, key
        seen += 1
    assert seen == 4 * 10 + 3 * 3


def with_epsilon(name, s, t):
    """The formulas with what public implementations add."""
    if name == "pkt":

        def probabilities(q):
            q = q.flatten(1)
            q = q / (q.norm(dim=1, keepdim=True) + 1e-7)
            similar = (q @ q.T + 1) / 2
            return similar / similar.sum(1, keepdim=True)

        p_s, p_t = probabilities(s), probabilities(t)
        return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()
    beta, gamma, tau = (float(part[1:]) for part in name.split("_")[1:])

    def correlation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    p_s, p_t = (s / tau).softmax(1), (t / tau).softmax(1)
    return tau**2 * (beta * (1 - correlation(p_s, p_t).mean()) + gamma * (1 - correlation(p_s.T, p_t.T).mean()))


def test_what_differs_from_public_implementations_is_what_they_add():
    for key, name, student, teacher, reference in reference_cases(("pkt", "dist")):
        value = with_epsilon(name, student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert relative(value.detach()[None], reference[f"{key}/loss"]) < 1e-9, key
        assert relative(gradient, reference[f"{key}/grad"]) < 1e-9, key


# One process: slopes, types, limits


@pytest.mark.parametrize("name", FAMILY)
def test_the_slope_is_what_autograd_finds(name):
    """`compare_alone` asks for no slope."""
    make, _ = FAMILY[name]
    student, teacher = samples([6], [9, 12])
    own, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = make("auto")
    value = loss(own, teacher)
    value.backward()
    wanted = relations.compare_alone(loss, [plain], [teacher], [1.0], loss.floor)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(own.grad, plain.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make", [*(make for make, _ in FAMILY.values()), lambda grid: RKDAngle()])
def test_half_precision_features_are_promoted_and_their_gradient_is_rounded_once(make):
    student, teacher = (feature.bfloat16() for feature in samples([6], [9, 12]))
    half, full = student.clone().requires_grad_(), student.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = make("auto")(half, teacher)
    value.backward()
    wanted = make("auto")(full, teacher.float())
    wanted.backward()
    assert value.dtype == torch.float32
    assert value.item() == wanted.item()
    assert torch.equal(half.grad, full.grad.bfloat16())


@pytest.mark.parametrize("loss", [CKA(), RKDDistance(), RKDAngle(), PKT(), CorrelationCongruence()], ids=repr)
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_values_and_gradients_do_not_depend_on_the_scale_of_features(loss, scale):
    student, teacher = (feature.float() for feature in samples([6], [9, 12]))
    plain, scaled = student.clone().requires_grad_(), (student * scale).requires_grad_()
    value, other = loss(plain, teacher), loss(scaled, teacher * scale)
    value.backward()
    other.backward()
    assert other.item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(scaled.grad.double() * scale, plain.grad.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [CKA(), RKDDistance(), RKDAngle(), PKT(), CorrelationCongruence()], ids=repr)
def test_equal_zero_and_single_samples_have_a_gradient_that_is_a_number(loss):
    teacher = samples([4], [6])[0]
    for student in (torch.zeros(4, 6), torch.ones(4, 6), torch.eye(4, 6)[[0, 0, 1, 1]]):
        leaf = student.double().requires_grad_()
        loss(leaf, teacher).backward()
        assert leaf.grad.isfinite().all(), student
    leaf = torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    loss(leaf, teacher[:1]).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("loss", [CKA(), RKDDistance(), RKDAngle()], ids=repr)
@pytest.mark.parametrize("offset", [10, 300, 1000])
def test_a_common_offset_of_features_costs_no_digits(loss, offset):
    """These losses do not change under it; float32 products would lose most of theirs."""
    student, teacher = samples([16], [40, 50])
    exact = (student.float() + offset).double().requires_grad_()
    rounded = (student.float() + offset).requires_grad_()
    loss(exact, teacher + offset).backward()
    loss(rounded, (teacher + offset).float()).backward()
    assert relative(rounded.grad, exact.grad) < 3e-4


def test_equal_samples_have_no_direction_between_them():
    student, teacher = (feature.repeat(2, 1) for feature in samples([6], [9, 12]))
    wanted = plain_relations.rkd_angle(student, teacher).item()
    assert RKDAngle()(student, teacher).item() == pytest.approx(wanted, rel=1e-9)
    assert RKDAngle()(student.float(), teacher.float()).item() == pytest.approx(wanted, rel=1e-4)


def test_a_kernel_of_equal_samples_is_aligned_with_nothing():
    student, teacher = samples([5], [6, 7])
    for s, t in ((student, torch.ones_like(teacher)), (torch.ones_like(student), teacher), (student[:1], teacher[:1])):
        leaf = s.clone().requires_grad_()
        value = CKA()(leaf, t)
        value.backward()
        assert value.item() == pytest.approx(1, abs=1e-6)
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_rare_classes_count_in_the_correlation_between_samples():
    """Against the same in float64; a float32 softmax knows no probability below 1e-8 of the others to many digits."""
    student, teacher = (5 * feature for feature in samples([32], [100, 100]))
    exact, rounded = student.float().double().requires_grad_(), student.float().requires_grad_()
    DIST()(exact, teacher.float().double()).backward()
    DIST()(rounded, teacher.float()).backward()
    assert relative(rounded.grad, exact.grad) < 1e-5
    same = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    DIST()(same, teacher[:4, :5]).backward()
    assert same.grad.abs().max() < 1e-6


# A floor is a constant to the gradient: finite differences of a gradient would see it move.
@pytest.mark.parametrize("make", [FAMILY[name][0] for name in ("sp", "pkt", "cc", "cka", "rkd distance")])
def test_one_process_has_second_derivatives_transforms_and_checkpoints(make):
    student, teacher = samples([5], [6, 7])
    loss = make("auto")

    def value(q):
        return loss(q, teacher)

    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(value)(student), gradient.detach(), rtol=1e-9, atol=1e-12)
    direction = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    step = 1e-6 * direction
    difference = (torch.func.grad(value)(student + step) - torch.func.grad(value)(student - step)) / 2e-6
    torch.testing.assert_close(second, difference, rtol=1e-5, atol=1e-7)
    checkpointed = student.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(value, checkpointed, use_reentrant=False).backward()
    torch.testing.assert_close(checkpointed.grad, gradient.detach(), rtol=1e-12, atol=0)


def test_the_teachers_half_is_used_once():
    def on_rank(rank, group):
        loss, layout = SimilarityPreserving(), BatchLayout((3, 3), rank, group)
        loss(torch.eye(3), torch.eye(3), layout=layout)
        half = loss.begin(torch.eye(3), layout)
        loss(torch.eye(3), half, layout=layout)
        try:
            loss(torch.eye(3), half, layout=layout)
        except RuntimeError as error:
            return str(error)

    (message,) = set(on_ranks(2, on_rank))
    assert message.startswith("what was begun with a teacher's features is used once")


def test_all_parts_of_a_scope_take_one_grid():
    """Of parts with few and with many rows, else ranks would make different numbers of process groups."""
    grids = set()

    def on_rank(rank, group):
        rows = [4] * 4 + [256] * 4
        whole = BatchLayout(tuple(rows), rank, group)
        part = Group(group.boards, range(rank // 4 * 4, rank // 4 * 4 + 4), rank % 4)
        own = BatchLayout(tuple(rows[rank // 4 * 4 :][:4]), rank % 4, part)
        tensors = [GramTensor(512, True), GramTensor(512, False)]
        at = GridChoice("auto").place(own, tensors, LossSums(3), torch.device("cpu"), "sp", whole)
        grids.add((at.grid, at.chunks))

    on_ranks(8, on_rank)
    assert len(grids) == 1


def test_a_sample_without_features_has_a_bounded_gradient():
    student, teacher = samples([6], [10, 12])
    student[1] = 0
    for make in (PKT, CorrelationCongruence):
        found = {}
        for floor in (0.0, 0.01):
            leaf = student.clone().requires_grad_()
            make(floor=floor)(leaf, teacher).backward()
            found[floor] = (leaf.grad[1].norm() / leaf.grad[2:].norm(dim=1).mean()).item()
        assert found[0.0] > 1e8
        assert found[0.01] < 10 / 0.01


def test_angles_of_a_large_batch_are_refused_with_the_number_and_a_way_out():
    limit = relational_angle.MOST_SAMPLES
    features = torch.zeros(limit + 1, 2)
    with pytest.raises(InputError, match=rf"B = {limit + 1:,} samples are above {limit:,}: take a smaller scope"):
        RKDAngle()(features, features)


def test_angles_at_a_few_samples_at_a_time_are_the_same():
    student, teacher = samples([7], [9, 12])
    found = []
    for at_once in (1, 7 * 7 * 2, 10**6):
        leaf = student.clone().requires_grad_()
        with mock.patch.object(relational_angle, "ANGLES_AT_ONCE", at_once):
            value = RKDAngle()(leaf, teacher)
            value.backward()
        found.append((value.detach(), leaf.grad))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PKT(floor=1), "floor=1: must be at least 0 and below 1"),
        (lambda: CorrelationCongruence(gamma=0), "gamma=0, max_p=2: gamma must be above 0"),
        (lambda: DIST(tau=0), "tau=0: must be above 0"),
        (lambda: CKA(grid="ring"), "grid='ring': must be one of auto, gather, exchange, or three numbers"),
        (lambda: CKA(grid=[2, 0, 1]), "must be three whole numbers above 0, r, c and k"),
        (lambda: CKA(memory=0), "memory=0: must be a number of bytes above 0"),
        (lambda: CKA()(torch.ones(3), torch.ones(3)), r"features must have the shape \(b, ...\)"),
        (lambda: CKA(grid=[2, 2]), "must be three whole numbers above 0, r, c and k"),
        (lambda: CKA(comm_dtype=torch.float16), "must be torch.bfloat16 or None"),
        (lambda: DIST()(torch.zeros(2, 3), torch.zeros(2, 4)), "differ in shape"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_grid_of_another_number_of_ranks_is_refused():
    def on_rank(rank, group):
        try:
            CKA(grid=[2, 1, 1])(torch.eye(2), torch.eye(2), layout=BatchLayout((2,) * 4, rank, group))
        except ValueError as error:
            return str(error)

    assert set(on_ranks(4, on_rank)) == {"grid=[2, 1, 1] is for 2 ranks, and 4 ranks share a batch here"}


def test_every_loss_of_the_family_is_a_name_of_the_library():
    for name in ("SimilarityPreserving", "PKT", "CorrelationCongruence", "CKA", "RKDDistance", "RKDAngle", "DIST"):
        loss = getattr(dkd, name)()
        assert loss.relational
        assert math.isfinite(loss(torch.randn(5, 4), torch.randn(5, 4)).item())
