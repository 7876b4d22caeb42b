"""Steps as CUDA graphs: what a graph is made of, on CPUs, where its parts run one after the other."""

import pytest
import torch
import yaml
from graph_runs import VARIANTS, outcome, recipe, train

from dkd.build.optimizers import SteppedRates
from dkd.cli import main
from dkd.distillation.loss_weights import LossWeights
from dkd.errors import TrainingError
from dkd.library_internals.torch import FakeTensorMode
from dkd.training.step_graph import largest_difference


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_steps_are_those_of_the_usual_way_interrupted_or_not(tmp_path, variant, capsys):
    usual, graph, resumed = (tmp_path / name for name in ("usual", "graph", "resumed"))
    train(usual, False, variant)
    assert "graph" not in capsys.readouterr().err
    train(graph, True, variant)
    assert "CPUs have no CUDA graphs; the parts of one run one after the other" in capsys.readouterr().err
    assert len([line for line in outcome(usual)[0] if "loss" in line]) > 90
    assert outcome(graph) == outcome(usual)
    train(resumed, True, variant, steps=60)
    train(resumed, True, variant)
    assert outcome(resumed)[1] == outcome(usual)[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["train.micro_batch=16"], "it accumulates gradients"),
        (["train.skip_nonfinite=1"], "train.skip_nonfinite waits for the gradient"),
        (["losses.ce.class_weights=balanced"], "a loss keeps something from step to step"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_as_usual_and_one_line_gives_the_reason(tmp_path, changes, reason, capsys):
    values = recipe(tmp_path / "run", True, "bf16, images on the device", steps=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "train.precision=fp32", *changes]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "graph" in line]
    assert said == [f"train.graph: a step is not captured, because {reason}; it runs operator by operator"]


def test_rates_and_weights_stay_in_the_same_tensors():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter]}, {"params": [], "lr_scale": 0.5}], lr=1.0)
    rates = SteppedRates(optimizer, torch.device("cpu"))
    before = [group["lr"] for group in optimizer.param_groups]
    for rate in (0.1, 0.1, 0.3):
        rates.write(rate)
        assert [group["lr"].item() for group in optimizer.param_groups] == [rate, rate * 0.5]
    assert all(a is group["lr"] for a, group in zip(before, optimizer.param_groups, strict=True))
    weights = LossWeights([lambda step: 0.1, lambda step: float(step)])
    first = weights.at(1, torch.zeros(2))
    assert weights.at(1, torch.zeros(2)) is first
    second = weights.at(2, torch.zeros(2))
    assert torch.equal(first, torch.tensor([0.1, 1.0]))  # a backward may still need it
    weights.hold(3)
    assert weights.at(3, torch.zeros(2)) is second
    assert torch.equal(second, torch.tensor([0.1, 3.0]))
    weights.hold(4)
    assert torch.equal(second, torch.tensor([0.1, 4.0]))


def test_weights_of_losses_survive_what_users_do_with_an_objective():
    """Several steps before one backward; inference mode, fake tensors and transforms first."""
    losses = torch.ones(2, requires_grad=True)
    weights = LossWeights([lambda step: 1.0, lambda step: float(step)])
    with torch.inference_mode():
        weights.at(0, torch.zeros(2))
    with FakeTensorMode():
        weights.at(0, torch.zeros(2))
    torch.func.vmap(lambda each: (each * weights.at(0, each)).sum())(torch.ones(3, 2))
    total = sum((losses * weights.at(step, losses)).sum() for step in (1, 2, 3))
    total.backward()
    assert torch.equal(losses.grad, torch.tensor([3.0, 6.0]))
    assert type(weights.at(3, losses)) is torch.Tensor


def test_a_graph_that_computes_something_else_is_recognised():
    old, new = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
    assert largest_difference(new, [each.clone() for each in new], old) == 0
    assert largest_difference(new, [new[0] * 1.001, new[1]], old) == pytest.approx(1e-3, rel=1e-3)
    assert largest_difference(new, old, old) == pytest.approx(1)  # a graph that does nothing
    assert not largest_difference(new, [new[0] * torch.nan, new[1]], old) <= 0.1


class ReplayedGraphs:
    """Stands for CUDA's graphs: nothing is computed by a capture, and a replay computes with the numbers of the step
    that was captured but for what lies in tensors, and writes its results where those of the capture lie.

    Args:
        state: returns all tensors that a step changes.
        spoil: called before each replay; a mistake of a graph.
    """

    def __init__(self, state, spoil=lambda: None):
        self._state, self._spoil, self.replays = state, spoil, 0

    def warm_up(self, compute):
        return compute()

    def capture(self, compute):
        before = [tensor.clone() for tensor in self._state()]
        first = compute()
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)

        def replay():
            self.replays += 1
            self._spoil()
            again = compute()
            with torch.no_grad():
                first.total.copy_(again.total)
            for name, value in again.terms.items():
                first.terms[name].copy_(value)

        return first, replay


def trainer_with(tmp_path, monkeypatch, variant, make):
    """Return a trainer whose step is captured by `make(state)`."""
    from dkd.config.loading import validate
    from dkd.engines.accelerated import forget_settings
    from dkd.training import trainer as module

    forget_settings()
    values = recipe(tmp_path / "run", True, variant)
    found = []

    def open_graph(step, engine, average, max_norm, say, graphs):
        def state():
            kept = [v for each in engine.optimizer.state.values() for v in each.values() if torch.is_tensor(v)]
            averages = [] if average is None else [own for _, _, own in average.named()]
            return [t.detach() for t in (*engine.model.parameters(), *engine.model.buffers(), *kept, *averages)]

        found.append(make(state))
        return original(step, engine, average, max_norm, say, found[0])

    original = module.StepGraph
    monkeypatch.setattr(module, "StepGraph", open_graph)
    return module.Trainer.from_recipe(validate(values)), found[0]


@pytest.mark.parametrize("variant", list(VARIANTS)[:2])
def test_what_is_replayed_is_the_usual_step(tmp_path, monkeypatch, variant, capsys):
    """The capture, the step that is taken both ways, and the replays that follow."""
    train(tmp_path / "usual", False, variant)
    trainer, graphs = trainer_with(tmp_path / "graph", monkeypatch, variant, ReplayedGraphs)
    trainer.fit()
    assert graphs.replays == 100 - 20 - 3 - 1
    assert outcome(tmp_path / "graph") == outcome(tmp_path / "usual")
    assert "differs" not in capsys.readouterr().err


def refuse(state):
    class Refusing(ReplayedGraphs):
        def capture(self, compute):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    return Refusing(state)


def test_a_capture_that_fails_ends_the_run_with_what_to_do(tmp_path, monkeypatch):
    """The state of CUDA is not to be trusted then; the run has made 23 steps since its start."""
    variant = next(iter(VARIANTS))
    trainer, _ = trainer_with(tmp_path / "graph", monkeypatch, variant, refuse)
    reason = "operation not permitted when stream is capturing"
    with pytest.raises(TrainingError, match=rf"{reason}\); set train\.graph=false, and start again"):
        trainer.fit()


def misses_an_update(state):
    return ReplayedGraphs(state, lambda: state()[0].add_(1.0))


class Counting:
    """Something that Python decides again in each step: a graph has the number of its capture for ever."""

    def __init__(self):
        self.steps, self.frozen = 0, None

    def next(self):
        self.steps += 1
        return self.steps if self.frozen is None else self.frozen


COUNT = Counting()


def decides_anew(state):
    class Frozen(ReplayedGraphs):
        def capture(self, compute):
            COUNT.frozen = COUNT.steps + 1
            first, replay = super().capture(compute)
            captured, COUNT.frozen = COUNT.frozen, None

            def frozen_replay():
                COUNT.frozen = captured
                replay()
                COUNT.frozen = None

            return first, frozen_replay

    return Frozen(state)


@pytest.mark.parametrize("make", [misses_an_update, decides_anew])
def test_a_graph_that_computes_something_else_is_given_up_and_nothing_is_lost(tmp_path, monkeypatch, make, capsys):
    """The steps that are taken both ways are the usual ones."""
    from dkd.losses import soft_targets

    variant = next(iter(VARIANTS))
    if make is decides_anew:
        plain = soft_targets.SoftTargets.forward
        change = lambda loss, *args, **more: plain(loss, *args, **more) * (1 + 100 * (COUNT.next() % 7))  # noqa: E731
        monkeypatch.setattr(soft_targets.SoftTargets, "forward", change)
    COUNT.steps = 0
    train(tmp_path / "usual", False, variant)
    COUNT.steps = 0
    trainer, _ = trainer_with(tmp_path / "graph", monkeypatch, variant, make)
    trainer.fit()
    if make is misses_an_update:
        assert outcome(tmp_path / "graph") == outcome(tmp_path / "usual")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "a replayed step differs" in line]
    assert "steps run operator by operator" in line
