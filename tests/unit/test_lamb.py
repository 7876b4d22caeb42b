"""LAMB: the plain formula, what a checkpoint keeps of it, and where it is refused. Under DDP and FSDP2 on several
processes: test_resume.py."""

import importlib.util

import engines
import pytest
import torch
import yaml
from interrupted import train_in_starts
from test_evaluation import recipe_in
from timm.optim import Lamb
from torch import nn

from dkd.build.optimizers import build_optimizer, state_keys
from dkd.cli import main
from dkd.config.optimizers import LambSection

LAMB = {"name": "lamb", "lr": 0.02, "weight_decay": 0.02, "decay_norm_and_bias": False}


def section(**more):
    return LambSection.model_validate({**LAMB, **more})


def some_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()


def gradients(model, steps=4):
    """The same gradients for each of several optimizers."""
    generator = torch.Generator().manual_seed(2)
    return [
        [5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()] for _ in range(steps)
    ]


def train(model, optimizer, steps, rates=None):
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if rates is None else rates[number]
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def plain_lamb(weights, steps, rates, decay, trust_clip=False, betas=(0.9, 0.999), eps=1e-6):
    """You et al., algorithm 2, with φ the identity; a tensor of one dimension has neither decay nor scale."""
    weights = [w.clone() for w in weights]
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for t, step in enumerate(steps, 1):
        for i, g in enumerate(step):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            r = (m[i] / (1 - betas[0] ** t)) / ((v[i] / (1 - betas[1] ** t)).sqrt() + eps)
            ratio = 1.0
            if weights[i].dim() > 1:
                r = r + decay * weights[i]
                ratio = float(weights[i].norm() / r.norm())
                ratio = min(ratio, 1.0) if trust_clip else ratio
            weights[i] = weights[i] - rates[t - 1] * ratio * r
    return weights


@pytest.mark.parametrize("trust_clip", [False, True])
def test_updates_are_those_of_the_paper(trust_clip):
    model, rates = some_model(), [0.02, 0.5, 0.01, 0.3]
    before, steps = [p.detach().clone() for p in model.parameters()], gradients(some_model())
    found = train(model, build_optimizer(section(trust_clip=trust_clip), model), steps, rates)
    for ours, theirs in zip(found, plain_lamb(before, steps, rates, 0.02, trust_clip), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_clipping_by_the_recipe_is_timms_own_clipping():
    """Up to the 1e-6 that torch adds to the norm."""
    ours, theirs = some_model(), some_model()
    steps = gradients(ours)
    clipped = []
    for step in steps:
        norm = torch.cat([g.flatten() for g in step]).norm()
        assert norm > 1
        clipped.append([g / (norm + 1e-6) for g in step])
    of_timm = Lamb(
        [
            {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in theirs.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=0.02,
        max_grad_norm=1.0,
    )
    found, wanted = train(ours, build_optimizer(section(), ours), clipped), train(theirs, of_timm, steps)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_number_of_steps_is_kept_with_each_parameter_and_taken_from_there():
    whole, first, second = some_model(), some_model(), some_model()
    steps = gradients(whole, 6)
    wanted = train(whole, build_optimizer(section(), whole), steps)
    optimizer = build_optimizer(section(), first)
    train(first, optimizer, steps[:3])
    assert {tuple(sorted(state)) for state in optimizer.state.values()} == {tuple(state_keys(section()))}
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(section(), second)
    for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
        resumed.state[mine] = {key: value.clone() for key, value in optimizer.state[theirs].items()}
    for ours, theirs in zip(train(second, resumed, steps[3:]), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path):
    values = recipe_in(
        tmp_path / "whole",
        train={"max_steps": 7, "clip_grad_norm": 1.0, "ema": {"decay": 0.9}},
        checkpoint={"every_steps": 2},
        optimizer=LAMB,
    )
    whole = train_in_starts(values)
    values["run"] = {**values["run"], "dir": str(tmp_path / "interrupted")}
    assert train_in_starts(values, [3, 6, None]) == whole


def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_in(tmp_path / "run", optimizer=LAMB)))
    return str(path)


def test_without_timm_one_line_tells_how_to_install_it(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "timm" else find(name, *more))
    assert main(["train", recipe_file(tmp_path), "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dkd: optimizer.name: lamb needs timm: ")
    assert "pip install" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_it_is_refused_under_deepspeed(tmp_path, capsys, monkeypatch, engine):
    for name, value in {**engines.environment(engine), "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", recipe_file(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dkd: optimizer.name: lamb needs the norm of each weight tensor, and under {engine}")
