"""The losses on rows spread over ranks, against plain formulas on all rows in one process that use nothing of this package."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dkd import AttentionTransfer, CrossEntropy, SimilarityPreserving, SoftTargets
from dkd.global_batch import BatchMismatchError


def world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def plain_at(s, t):
    def q(a):
        return F.normalize(a.pow(2).mean(1).flatten(1))

    return (q(s) - q(t)).pow(2).mean()


def plain_sp(s, t):
    def g(a):
        a = a.flatten(1)
        return F.normalize(a @ a.T)

    return (g(s) - g(t)).pow(2).sum() / len(s) ** 2


def plain_kd(s, t):
    return 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")


def rows_of(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def gradient_errors(uneven):
    """Relative errors of value and gradient of each loss, the gradient being that of weights shared by all ranks, averaged as DDP does."""
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

    losses = {
        "at": (lambda f, rows: AttentionTransfer()(f, teacher[rows]), lambda f: plain_at(f, teacher)),
        "sp by gather": (lambda f, rows: SimilarityPreserving(strategy="gather")(f, teacher[rows]), lambda f: plain_sp(f, teacher)),
        "sp by exchange": (lambda f, rows: SimilarityPreserving(strategy="exchange")(f, teacher[rows]), lambda f: plain_sp(f, teacher)),
        "sp of few features, by exchange": (
            lambda f, rows: SimilarityPreserving(strategy="exchange")(f[:, :2, 0, 0], teacher[rows]),
            lambda f: plain_sp(f[:, :2, 0, 0], teacher),
        ),
        "sp_two_pairs": (
            lambda f, rows: SimilarityPreserving(weights=[1.0, 0.5])([f, f[:, :2]], [teacher[rows], teacher[rows]]),
            lambda f: plain_sp(f, teacher) + 0.5 * plain_sp(f[:, :2], teacher),
        ),
        "kd": (lambda f, rows: SoftTargets(4)(f.mean((2, 3)), teacher_logits[rows]), lambda f: plain_kd(f.mean((2, 3)), teacher_logits)),
        "ce": (lambda f, rows: CrossEntropy()(f.mean((2, 3)), labels[rows]), lambda f: F.cross_entropy(f.mean((2, 3)), labels)),
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
        errors[name] = [abs(mean / wanted.detach() - 1).item(), ((gradient - reference.grad).norm() / reference.grad.norm()).item()]
    return errors


def losses_on_even_batches(folder):
    return gradient_errors(uneven=False)


def losses_on_uneven_batches(folder):
    return gradient_errors(uneven=True)


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


def rows_that_differ_within_a_rank_end_all_ranks(folder):
    rank, _ = world()
    try:
        AttentionTransfer()(torch.ones(3 + (rank == 0), 4, 3, 3), torch.ones(3, 4, 3, 3))
    except BatchMismatchError as error:
        return str(error)
    return "no error"


def the_documented_three_lines_in_a_users_own_ddp_loop(folder):
    """docs/losses.md's snippet, against one process with the global batch."""
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


CASES = [
    losses_on_even_batches,
    losses_on_uneven_batches,
    half_precision_features_are_promoted,
    shapes_that_differ_end_all_ranks,
    rows_that_differ_within_a_rank_end_all_ranks,
    the_documented_three_lines_in_a_users_own_ddp_loop,
]
