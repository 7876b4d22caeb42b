"""The losses of relations as plain formulas on all samples of a batch, in one process, with nothing of dkd's
arithmetic."""

import math

import torch
import torch.nn.functional as F


def sp(s, t, floor=0.0):
    def rows(q):
        gram = q.flatten(1) @ q.flatten(1).T
        norms = gram.norm(dim=1, keepdim=True)
        return gram / norms.clamp_min(max(floor * norms.mean().item(), 1e-12))

    return (rows(s) - rows(t)).pow(2).sum() / len(s) ** 2


def units(q, floor):
    q = q.flatten(1)
    norms = q.norm(dim=1, keepdim=True)
    return q / norms.clamp_min(max(floor * norms.mean().item(), 1e-12))


def pkt(s, t, floor=0.0):
    def probabilities(q):
        similar = (units(q, floor) @ units(q, floor).T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    p_s, p_t = probabilities(s), probabilities(t)
    return (p_t * (p_t / p_s).log()).mean()


def cc(s, t, gamma=0.4, max_p=2, floor=0.0):
    def kernel(q):
        cosines = units(q, floor) @ units(q, floor).T
        terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(max_p + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    return (kernel(t) - kernel(s)).pow(2).mean()


def cka(s, t):
    def centred(q):
        q = q.flatten(1)
        h = torch.eye(len(q), dtype=q.dtype) - 1 / len(q)
        return h @ q @ q.T @ h

    x, y = centred(s), centred(t)
    return 1 - (x * y).sum() / (x.norm() * y.norm())


def differences(q):
    q = q.flatten(1)
    return q[None] - q[:, None]  # at [i, j]: q_j − q_i


def rkd_distance(s, t):
    def distances(q):
        other = ~torch.eye(len(q), dtype=torch.bool)
        squares = differences(q).pow(2).sum(2)
        found = torch.where(other, torch.where(other, squares, 1.0).sqrt(), 0.0)
        return found / found[other].mean()

    return F.smooth_l1_loss(distances(s), distances(t))


def rkd_angle(s, t):
    def angles(q):
        directions = F.normalize(differences(q), dim=2)
        return directions @ directions.transpose(1, 2)

    return F.smooth_l1_loss(angles(s), angles(t))


def dist(s, t, beta=1.0, gamma=1.0, tau=1.0):
    def correlation(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    p_s, p_t = (s / tau).softmax(1), (t / tau).softmax(1)
    between_classes, between_samples = 1 - correlation(p_s, p_t).mean(), 1 - correlation(p_s.T, p_t.T).mean()
    return tau**2 * (beta * between_classes + gamma * between_samples)
