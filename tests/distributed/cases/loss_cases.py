"""The losses on rows spread over ranks, against plain formulas on all rows in one process that use nothing of this
package."""

import copy
import itertools
import os
import pickle
from unittest import mock

import plain_relations
import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_relations import sp as plain_sp

from dkd import (
    CKA,
    DIST,
    PKT,
    AttentionTransfer,
    BinaryCrossEntropy,
    CorrelationCongruence,
    CrossEntropy,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
    SoftTargets,
)
from dkd.commands.loss_trial import LossTrial, measure, measure_alone
from dkd.distillation import DistillationStep, LabelTerm, Objective
from dkd.global_batch import (
    BatchLayout,
    BatchMismatchError,
    GramTensor,
    Work,
    all_grids,
    collectives,
    corner,
    gather_rows,
)
from dkd.global_batch.cost import moves
from dkd.global_batch.placement import check_group_counts

CLASS_WEIGHTS = [0.2, 3.0, 1.0, 0.0, 7.0]


def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def plain_at(s, t):
    def q(a):
        return F.normalize(a.pow(2).mean(1).flatten(1))

    return (q(s) - q(t)).pow(2).mean()


def plain_kd(s, t):
    return 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")


def rows_of(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def gradient_errors(uneven):
    """Relative errors of value and gradient of each loss, the gradient being that of weights shared by all ranks,
    averaged as DDP does."""
    rank, size = world()
    counts = [3 + (r * 2 % 5 if uneven else 0) for r in range(size)]
    g = torch.Generator().manual_seed(5)
    total = sum(counts)
    images = torch.randn(total, 3, 6, 6, generator=g, dtype=torch.float64)
    teacher = torch.randn(total, 7, 6, 6, generator=g, dtype=torch.float64).relu()
    labels = torch.randint(0, 5, (total,), generator=g)
    start = torch.randn(5, 3, 3, 3, generator=g, dtype=torch.float64)
    mine = rows_of(counts, rank)
    teacher_logits = teacher.mean((2, 3))[:, :5]

    def features(weight, rows):
        return F.conv2d(images[rows], weight, padding=1).relu()

    # The features of the second sample vanish, those of the last are small, in both models; their gradients reach the
    # weights as they are.
    share = torch.ones(total, 1, 1, 1, dtype=torch.float64)
    share[1], share[-1] = 0, 1e-3

    def sp_of_small_rows(strategy, floor):
        def small(f, rows):
            return f * share[rows] + (f - f.detach()) * (1 - share[rows])

        return (
            lambda f, rows: SimilarityPreserving(strategy=strategy, floor=floor)(
                small(f, rows), (teacher * share)[rows]
            ),
            lambda f: plain_sp(small(f, slice(None)), teacher * share, floor),
        )

    losses = {
        "at": (lambda f, rows: AttentionTransfer()(f, teacher[rows]), lambda f: plain_at(f, teacher)),
        "sp by gather": (
            lambda f, rows: SimilarityPreserving(strategy="gather")(f, teacher[rows]),
            lambda f: plain_sp(f, teacher),
        ),
        "sp by exchange": (
            lambda f, rows: SimilarityPreserving(strategy="exchange")(f, teacher[rows]),
            lambda f: plain_sp(f, teacher),
        ),
        "sp of few features, by exchange": (
            lambda f, rows: SimilarityPreserving(strategy="exchange")(f[:, :2, 0, 0], teacher[rows]),
            lambda f: plain_sp(f[:, :2, 0, 0], teacher),
        ),
        **{
            f"sp of two pairs, by {strategy}": (
                lambda f, rows, strategy=strategy: SimilarityPreserving(strategy=strategy, weights=[1.0, 0.5])(
                    [f, f[:, :2]], [teacher[rows], teacher[rows]]
                ),
                lambda f: plain_sp(f, teacher) + 0.5 * plain_sp(f[:, :2], teacher),
            )
            for strategy in ("auto", "gather", "exchange")
        },
        **{
            f"sp of rows below {floor} of the mean, by {strategy}": sp_of_small_rows(strategy, floor)
            for strategy in ("gather", "exchange")
            for floor in (0.01, 0.99)
        },
        "kd": (
            lambda f, rows: SoftTargets(4)(f.mean((2, 3)), teacher_logits[rows]),
            lambda f: plain_kd(f.mean((2, 3)), teacher_logits),
        ),
        "ce": (
            lambda f, rows: CrossEntropy()(f.mean((2, 3)), labels[rows]),
            lambda f: F.cross_entropy(f.mean((2, 3)), labels),
        ),
        **{
            f"bce, {name}": (
                lambda f, rows, targets=targets: BinaryCrossEntropy(0.1)(f.mean((2, 3)), targets[rows]),
                lambda f, dense=dense: F.binary_cross_entropy_with_logits(
                    f.mean((2, 3)), 0.9 * dense + 0.1 / dense.shape[1]
                ),
            )
            for name, targets, dense in (
                ("plain", labels, F.one_hot(labels, teacher_logits.shape[1]).double()),
                ("mixed labels", teacher_logits.softmax(1), teacher_logits.softmax(1)),
            )
        },
        **{
            f"ce of weighted classes, {name}": (
                lambda f, rows, targets=targets, smoothing=smoothing: CrossEntropy(smoothing, CLASS_WEIGHTS)(
                    f.mean((2, 3)), targets[rows]
                ),
                lambda f, targets=targets, smoothing=smoothing: F.cross_entropy(
                    f.mean((2, 3)),
                    targets,
                    torch.tensor(CLASS_WEIGHTS, dtype=torch.float64),
                    label_smoothing=smoothing,
                ),
            )
            for name, targets, smoothing in (
                ("plain", labels, 0.0),
                ("smoothed", labels, 0.2),
                ("mixed labels", teacher_logits.softmax(1), 0.0),
                ("mixed labels, smoothed", teacher_logits.softmax(1), 0.2),
            )
        },
    }
    errors = {}
    for name, (ours, plain) in losses.items():
        weight = start.clone().requires_grad_()
        value = ours(features(weight, mine), mine)
        value.backward()
        gradient, mean = weight.grad / size, value.detach() / size
        if size > 1:
            dist.all_reduce(gradient)
            dist.all_reduce(mean)
        reference = start.clone().requires_grad_()
        wanted = plain(features(reference, slice(None)))
        wanted.backward()
        errors[name] = [
            abs(mean / wanted.detach() - 1).item(),
            ((gradient - reference.grad).norm() / reference.grad.norm()).item(),
        ]
    return errors


# The losses of relations, for a grid, and the plain formula of each.
RELATIONS = {
    "sp": (lambda grid: SimilarityPreserving(grid=grid, floor=0.5), lambda s, t: plain_sp(s, t, 0.5)),
    "pkt": (lambda grid: PKT(0.5, grid=grid), lambda s, t: plain_relations.pkt(s, t, 0.5)),
    "cc": (lambda grid: CorrelationCongruence(floor=0, grid=grid), plain_relations.cc),
    "cka": (lambda grid: CKA(grid=grid), plain_relations.cka),
    "rkd distance": (lambda grid: RKDDistance(grid=grid), plain_relations.rkd_distance),
    "rkd angle": (lambda grid: RKDAngle(), plain_relations.rkd_angle),
    "dist": (lambda grid: DIST(tau=2.0), lambda s, t: plain_relations.dist(s, t, tau=2.0)),
}


def relations_on_every_grid(folder):
    """Relative errors of value and gradient of each loss of relations, by loss and grid, on even and uneven batches;
    and of a call whose teacher's half was begun before."""
    rank, size = world()
    errors = {}
    for counts in ([3] * size, [4 + r * 2 % 5 for r in range(size)]):
        g = torch.Generator().manual_seed(5)
        students, teachers = (torch.randn(sum(counts), 9, generator=g, dtype=torch.float64) for _ in range(2))
        students[0] *= 0.1
        mine, layout = rows_of(counts, rank), BatchLayout(tuple(counts), rank)
        for name, (make, plain) in RELATIONS.items():
            whole = students.clone().requires_grad_()
            wanted = plain(whole, teachers)
            wanted.backward()
            for grid in all_grids(size):
                loss = make(grid)
                for begins in (False, True):
                    leaf, teacher = students[mine].clone().requires_grad_(), teachers[mine]
                    begun = loss.begin(teacher, layout) if begins and hasattr(loss, "begin") else None
                    value = loss(leaf, begun or teacher, layout=layout)
                    value.backward()
                    mean, wants = value.detach() / size, whole.grad[mine]
                    if size > 1:
                        dist.all_reduce(mean)
                    gradient = ((leaf.grad / size - wants).norm() / wants.norm()).item()
                    key = f"{name} {grid.name} {counts} {'begun' if begins else ''}"
                    errors[key] = [abs(mean / wanted.detach() - 1).item(), gradient]
    return errors


def losses_on_even_batches(folder):
    return gradient_errors(uneven=False)


def losses_on_uneven_batches(folder):
    return gradient_errors(uneven=True)


def gathered(own, counts):
    """The rows of all ranks, with those of this rank as they are, so that a gradient reaches them."""
    rank, size = world()
    if size == 1:
        return own
    parts = [None] * size
    dist.all_gather_object(parts, own.detach())
    assert [len(part) for part in parts] == counts
    return torch.cat([own if r == rank else part for r, part in enumerate(parts)])


def attention_transfer_of_gathered_feature_maps(folder):
    """Relative errors of value and gradient of the shares of ranks, against the plain loss on feature maps really
    gathered."""
    rank, size = world()
    errors = {}
    for name, counts in (("even", [3] * size), ("uneven", [1 + 2 * r % 5 for r in range(size)])):
        g = torch.Generator().manual_seed(rank)
        student = torch.randn(counts[rank], 4, 5, 5, generator=g, dtype=torch.float64).requires_grad_()
        teacher = torch.randn(counts[rank], 7, 5, 5, generator=g, dtype=torch.float64)
        share = AttentionTransfer()(student, teacher)
        (own,) = torch.autograd.grad(share, student)
        whole = plain_at(gathered(student, counts), gathered(teacher, counts))
        (wanted,) = torch.autograd.grad(whole, student)
        value = share.detach() / size
        if size > 1:
            dist.all_reduce(value)
        errors[name] = [abs(value / whole.detach() - 1).item(), ((own / size - wanted).norm() / wanted.norm()).item()]
    return errors


def sp_and_gradient(student, teacher, strategy, **arguments):
    leaf = student.clone().requires_grad_()
    value = SimilarityPreserving(strategy=strategy, **arguments)(leaf, teacher)
    value.backward()
    return value.detach(), leaf.grad


def features_travel_in_half_precision(folder):
    """bfloat16 features as they are against the same promoted before; float32 ones with comm_dtype against the same
    rounded before."""
    rank, size = world()
    g = torch.Generator().manual_seed(rank)
    student, teacher = torch.randn(6, 50, generator=g).relu(), torch.randn(6, 70, generator=g).relu()
    results = {}
    for strategy in ("gather", "exchange"):
        half = student.bfloat16(), teacher.bfloat16()
        with collectives.count_received() as promoted:
            wanted = sp_and_gradient(half[0].float(), half[1].float(), strategy)
        with collectives.count_received() as own:
            value, gradient = sp_and_gradient(*half, strategy)
        rounded, full_gradient = sp_and_gradient(student, teacher, strategy, comm_dtype=torch.bfloat16)
        results[strategy] = {
            "equal": bool(value == wanted[0]) and torch.equal(gradient, wanted[1].bfloat16()),
            "rounded equal": bool(rounded == wanted[0]) or size == 1,  # on one rank nothing travels
            "gradient error": ((full_gradient - wanted[1]).norm() / wanted[1].norm()).item(),
            "bytes": [own.bytes, promoted.bytes],
        }
    return results


def received_bytes_of_every_strategy(folder):
    """For several tensors at once: bytes and collectives counted at the calls, and those that the cost model says."""
    _, size = world()
    if size == 1:
        return []
    cases = []
    for widths, rows in (([(48, 80)], 4), ([(7, 5), (300, 11)], 3)):
        for dtype, comm_dtype in (
            (torch.float32, None),
            (torch.float64, None),
            (torch.bfloat16, None),
            (torch.float32, torch.bfloat16),
        ):
            tensors = [GramTensor(w, backward, (comm_dtype or dtype).itemsize, 8 if dtype == torch.float64 else 4,
                                  comm_dtype.itemsize if comm_dtype else 0)
                       for backward in (True, False) for w in (pair[not backward] for pair in widths)]  # fmt: skip
            for strategy in ("gather", "exchange"):
                students = [torch.randn(rows, s).to(dtype).requires_grad_() for s, _ in widths]
                teachers = [torch.randn(rows, t).to(dtype) for _, t in widths]
                sp = SimilarityPreserving(strategy=strategy, comm_dtype=comm_dtype)
                with collectives.count_received() as counted:
                    sp(students, teachers, layout=BatchLayout.even(rows)).backward()
                expected = moves(Work(tensors, rows, size), corner(strategy, size))
                formula = sum(move.bytes for move in expected)
                cases.append([counted.bytes, counted.collectives, formula, len(expected)])
    return cases


def half_precision_features_are_promoted(folder):
    """bf16 features under autocast: the Gram matrix is float32."""
    _, size = world()
    torch.manual_seed(1)
    s, t = (torch.randn(4, 8, 3, 3).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = SimilarityPreserving()(s, t)
    return [str(value.dtype), size]


def shapes_that_differ_end_all_ranks(folder):
    rank, _ = world()
    feature = torch.ones(2, 4 + (rank == 1), 3, 3)
    try:
        SimilarityPreserving()(feature, torch.ones(2, 4, 3, 3))
    except BatchMismatchError as error:
        return str(error)
    return "no error"


def features_with_a_gradient_on_one_rank_only_end_all_ranks(folder):
    rank, _ = world()
    feature = torch.ones(2, 4, 3, 3).requires_grad_(rank == 1)
    try:
        SimilarityPreserving()(feature, torch.ones(2, 4, 3, 3))
    except BatchMismatchError as error:
        return str(error)
    return "no error"


def a_group_without_rows_ends_all_ranks(folder):
    rank, _ = world()
    rows = 0 if rank == 1 else 2
    try:
        SimilarityPreserving(scope="local")(torch.ones(rows, 4), torch.ones(rows, 4))
    except BatchMismatchError as error:
        return str(error)
    return "no error"


def message_of(call):
    """What a mismatch says; a rank that came through it says what it got."""
    try:
        return f"no error: {call()}"
    except BatchMismatchError as error:
        return str(error)


def losses_that_differ_end_all_ranks(folder):
    """The last rank calls another loss, or the same with other settings, on features of the same shapes."""
    rank, size = world()
    if size == 1:
        return {}
    last = rank == size - 1
    maps, logits, labels = torch.ones(2, 4, 3, 3), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    calls = {
        "kinds": lambda: (AttentionTransfer if last else SimilarityPreserving)()(maps, maps),
        "weights": lambda: SimilarityPreserving(weights=[2.0 if last else 1.0])(maps, maps),
        "strategies": lambda: SimilarityPreserving(strategy="exchange" if last else "gather")(maps, maps),
        "scopes": lambda: SimilarityPreserving(scope="local" if last else "global")(maps, maps),
        "grids": lambda: SimilarityPreserving(grid=[1, size, 1] if last else [size, 1, 1])(maps, maps),
        "kernels": lambda: CorrelationCongruence(gamma=0.5 if last else 0.4)(maps, maps),
        "temperatures of DIST": lambda: DIST(tau=2.0 if last else 1.0)(logits, logits),
        "types between ranks": lambda: PKT(comm_dtype=torch.bfloat16 if last else None)(maps, maps),
        "floors": lambda: SimilarityPreserving(floor=0.0 if last else 0.01)(maps, maps),
        "reductions": lambda: AttentionTransfer(reduction="paper" if last else "mean_squared")(maps, maps),
        "temperatures": lambda: SoftTargets(2.0 if last else 4.0)(logits, logits),
        "smoothings": lambda: CrossEntropy(0.1 if last else 0.0)(logits, labels),
    }
    return {name: message_of(call) for name, call in calls.items()}


def features_that_are_missing_end_all_ranks(folder):
    """No tensor, or one without rows, on the last rank only."""
    rank, size = world()
    if size == 1:
        return {}
    last, feature = rank == size - 1, torch.ones(2, 4)
    missing, scalar = ([], torch.ones(())) if last else ([feature], feature)
    sp = SimilarityPreserving()
    return {"none": message_of(lambda: sp(missing, missing)), "scalar": message_of(lambda: sp(scalar, scalar))}


def errors_of_groups(sp, counts, group=None, ranks=None):
    """Relative errors of value and gradient against the mean of the plain losses of groups of `counts` rows.

    Args:
        sp: the loss.
        counts: rows of each rank of each group.
        group: the process group of all these ranks; None is the default one.
        ranks: which ranks of the job they are; None is all.
    """
    rank, size = world()
    ranks = ranks or list(range(size))
    place, flat = ranks.index(rank), [count for group_of in counts for count in group_of]
    g = torch.Generator().manual_seed(7)
    students, teachers = (torch.randn(sum(flat), width, generator=g, dtype=torch.float64) for width in (9, 12))
    mine = rows_of(flat, place)
    leaf = students[mine].clone().requires_grad_()
    layout = None if group is None else BatchLayout.agree([leaf, teachers[mine]], group)
    value = sp(leaf, teachers[mine], layout=layout)
    value.backward()
    whole = students.clone().requires_grad_()
    totals = [sum(group_of) for group_of in counts]
    parts = zip(whole.split(totals), teachers.split(totals), strict=True)
    wanted = torch.stack([plain_sp(s, t) for s, t in parts]).mean()
    wanted.backward()
    mean = value.detach() / len(ranks)
    dist.all_reduce(mean, group=group)
    gradient = leaf.grad / len(ranks)
    return [
        abs(mean / wanted.detach() - 1).item(),
        ((gradient - whole.grad[mine]).norm() / whole.grad[mine].norm()).item(),
    ]


def gram_matrices_of_machines(folder):
    """As on two machines: the launch says that half of the ranks are on each."""
    _, size = world()
    if size == 1:
        return SimilarityPreserving(scope="node")(torch.eye(3), torch.eye(3)).item()
    half = [3, 2][: size // 2]
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(size // 2)}):
        return errors_of_groups(SimilarityPreserving(scope="node"), [half, half])


def machines_that_differ_end_all_ranks(folder):
    """One machine runs one rank less than the other says, or no launcher has said anything to the last rank."""
    rank, size = world()
    if size == 1:
        return []
    found = []
    for own in ("1" if rank == 0 else str(size), "" if rank == size - 1 else str(size)):
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": own}):
            feature = torch.ones(2, 4)
            found.append(message_of(lambda feature=feature: SimilarityPreserving(scope="node")(feature, feature)))
    return found


def copies_of_a_loss_with_groups(folder):
    """Made after a call, when there are process groups, which can neither be copied nor pickled."""
    _, size = world()
    sp = SimilarityPreserving(scope=size // 2 or 1)
    if size == 1:
        return []
    counts = [[2, 3][: size // 2]] * 2
    first = errors_of_groups(sp, counts)
    return [first, *(errors_of_groups(twin, counts) for twin in (copy.deepcopy(sp), pickle.loads(pickle.dumps(sp))))]


def replicas_of_a_mesh(folder):
    """Ranks in rows and columns: each column is a batch of its own. With the layout that the documentation shows."""
    _, size = world()
    if size < 4:
        return []
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "model"))
    group = mesh.get_group("batch")
    ranks = dist.get_process_group_ranks(group)
    errors = []
    for strategy in ("gather", "exchange"):
        errors.append(errors_of_groups(SimilarityPreserving(strategy=strategy), [[3, 2]], group, ranks))
        errors.append(errors_of_groups(SimilarityPreserving(scope=1, strategy=strategy), [[3], [2]], group, ranks))
    return {"ranks": ranks, "errors": errors}


def ranks_that_have_made_other_groups_end_all_ranks(folder):
    """Some ranks have made a group among themselves before: the groups of a grid would have other names on them."""
    rank, size = world()
    if size < 4:
        return {}
    if rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    found = {}
    try:
        feature = torch.ones(2, 4)
        # What the first call with a grid does, before it makes the groups of the grid's axes.
        found["grid"] = message_of(lambda: check_group_counts(BatchLayout.even(2)))
        found["scope"] = message_of(lambda: SimilarityPreserving(scope=2)(feature, feature))
    finally:
        if rank >= 2:  # the other cases of this launch make groups, too
            dist.new_group([2, 3], use_local_synchronization=True)
    return found


def second_derivatives_are_refused(folder):
    """They would need collectives that autograd cannot see."""
    found = []
    for strategy in ("gather", "exchange"):
        feature = torch.randn(3, 8).requires_grad_()
        (gradient,) = torch.autograd.grad(
            SimilarityPreserving(strategy=strategy)(feature, torch.randn(3, 8)), feature, create_graph=True
        )
        try:
            gradient.square().sum().backward()
            found.append("no error")
        except RuntimeError as error:
            found.append(str(error))
    return found


def rows_that_differ_within_a_rank_end_all_ranks(folder):
    rank, _ = world()
    try:
        AttentionTransfer()(torch.ones(3 + (rank == 0), 4, 3, 3), torch.ones(3, 4, 3, 3))
    except BatchMismatchError as error:
        return str(error)
    return "no error"


def the_documented_three_lines_in_a_users_own_ddp_loop(folder):
    """docs/reference/losses.md's snippet, against one process with the global batch."""
    rank, size = world()
    torch.manual_seed(3)
    student, teacher = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 6, 3).requires_grad_(False)
    reference = torch.nn.Conv2d(3, 4, 3)
    reference.load_state_dict(student.state_dict())
    images = torch.randn(4 * size, 3, 8, 8)
    wrapped = torch.nn.parallel.DistributedDataParallel(student) if size > 1 else student
    at, sp = AttentionTransfer(), SimilarityPreserving()
    student_map, teacher_map = wrapped(images[4 * rank : 4 * rank + 4]), teacher(images[4 * rank : 4 * rank + 4])
    (1000 * at(student_map, teacher_map) + 3000 * sp(student_map, teacher_map)).backward()
    everything = reference(images)
    (1000 * plain_at(everything, teacher(images)) + 3000 * plain_sp(everything, teacher(images))).backward()
    return ((student.weight.grad - reference.weight.grad).norm() / reference.weight.grad.norm()).item()


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7))

    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 3)[:, :7] @ self.weight.T, {}


def class_weights_of_whole_steps(folder):
    """Errors of value and gradient against torch on the whole global batch, by micro-steps A and kind of labels. The
    micro-batches have labels of very different weights."""
    rank, size = world()
    weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    rows, errors = 3, {}
    for micro_steps, smoothing, mixes in itertools.product((1, 2), (0.0, 0.1), (False, True)):
        generator = torch.Generator().manual_seed(11)
        total = rows * size * micro_steps
        images = torch.randn(total, 3, 4, 4, generator=generator, dtype=torch.float64)
        labels = torch.arange(total) // rows % 5
        mixed = F.one_hot(labels, 5).double() * 0.7 + 0.06

        def mixing(images, labels, seed):
            return images, F.one_hot(labels, 5).double() * 0.7 + 0.06

        model = Linear()
        ce = LabelTerm("ce", lambda step: 1.0, CrossEntropy(smoothing, CLASS_WEIGHTS))
        options = {"dtype": torch.float64, "mixing": mixing if mixes else None}
        step = DistillationStep(model, None, Objective([ce]), micro_steps=micro_steps, **options)
        places = [(a * size + rank) * rows for a in range(micro_steps)]
        step.begin([(images[place : place + rows], labels[place : place + rows]) for place in places], 0)
        value = torch.zeros((), dtype=torch.float64)
        for micro_step in range(micro_steps):
            loss = step.loss(micro_step)
            (loss.total / micro_steps).backward()
            value += loss.terms["ce"] / micro_steps
        step.end()
        gradient = model.weight.grad
        if dist.is_initialized():
            for tensor in (value, gradient):
                dist.all_reduce(tensor)
                tensor /= size
        plain = Linear()
        whole = F.cross_entropy(plain(images)[0], mixed if mixes else labels, weights, label_smoothing=smoothing)
        whole.backward()
        name = f"{micro_steps} micro-steps, smoothing {smoothing}, {'mixed' if mixes else 'labels'}"
        errors[name] = [
            abs(value - whole).item() / whole.item(),
            ((gradient - plain.weight.grad).norm() / plain.weight.grad.norm()).item(),
        ]
    return errors


def gathered_rows(folder):
    """Value and gradient of a contrastive loss on gathered rows, against the plain formula on all rows."""
    rank, size = world()
    found = {}
    for name, counts in (("even", [3] * size), ("uneven", [2 + r % 3 for r in range(size)])):
        g = torch.Generator().manual_seed(7)
        total, own = sum(counts), rows_of(counts, rank)
        x, labels = torch.randn(total, 5, dtype=torch.float64, generator=g), torch.arange(total) % 3
        weight = torch.randn(5, 4, dtype=torch.float64, generator=g)

        def loss(rows, everyone, first):
            targets = first + torch.arange(len(rows))
            return F.cross_entropy(rows @ everyone.T, targets, reduction="none")

        plain = weight.clone().requires_grad_()
        wanted = loss((x @ plain).sin(), (x @ plain).sin(), 0).mean()
        wanted.backward()
        ours = weight.clone().requires_grad_()
        layout = BatchLayout(tuple(counts), rank)
        rows = (x[own] @ ours).sin()
        value = layout.mean(loss(rows, gather_rows(rows, layout), layout.first_row))
        value.backward()
        mean, gradient = value.detach().clone(), ours.grad
        if size > 1:
            for tensor in (mean, gradient):
                dist.all_reduce(tensor)
                tensor /= size
        flags = labels[own] == 1
        same = torch.equal(gather_rows(labels[own], layout), labels) and gather_rows(flags, layout).dtype == torch.bool
        same = same and torch.equal(gather_rows(flags, layout), labels == 1)
        errors = [float((mean - wanted).abs()), float((gradient - plain.grad).abs().max())]
        found[name] = {"errors": errors, "labels": same}
    return found


def checked_losses(folder):
    """What `dkd check-loss` measures of losses right and wrong, on this rank's half of 8 samples, or on all of them."""
    rank, size = world()
    found = {}
    for name in ("LocalMean", "GatheredWithoutGradient", "Summed", "SummedGradient", "Relational", "Unstated"):
        trial = LossTrial(f"small_models:{name}", [(4, 2, 2)], [(4, 2, 2)])
        rows = trial.batch // size
        own = measure(trial, slice(rank * rows, (rank + 1) * rows), BatchLayout.even(rows))
        found[name] = {"value": own.value, "gradient": own.gradient.tolist()}
        if size == 1:
            alone = measure_alone(trial, 2)
            found[name]["alone"] = [{"value": a.value, "gradient": a.gradient.tolist()} for a in alone]
    return found


CASES = [
    class_weights_of_whole_steps,
    gathered_rows,
    checked_losses,
    losses_on_even_batches,
    relations_on_every_grid,
    losses_on_uneven_batches,
    attention_transfer_of_gathered_feature_maps,
    features_travel_in_half_precision,
    received_bytes_of_every_strategy,
    half_precision_features_are_promoted,
    shapes_that_differ_end_all_ranks,
    features_with_a_gradient_on_one_rank_only_end_all_ranks,
    a_group_without_rows_ends_all_ranks,
    losses_that_differ_end_all_ranks,
    features_that_are_missing_end_all_ranks,
    gram_matrices_of_machines,
    machines_that_differ_end_all_ranks,
    copies_of_a_loss_with_groups,
    replicas_of_a_mesh,
    ranks_that_have_made_other_groups_end_all_ranks,
    second_derivatives_are_refused,
    rows_that_differ_within_a_rank_end_all_ranks,
    the_documented_three_lines_in_a_users_own_ddp_loop,
]
