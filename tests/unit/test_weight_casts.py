"""A student whose weights are cast together computes the bits of one whose layers cast them one by one."""

import copy
import io
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from benchmarks.launches import OperatorCount
from dkd import AttentionTransfer, SimilarityPreserving
from dkd.config.loading import validate
from dkd.distillation import forward
from dkd.distillation.forward import unpromoted_taps
from dkd.distillation.objective import FeatureTerm, Objective
from dkd.engines.accelerated import forget_settings
from dkd.models import ModelSpec, TappedModel, build_model
from dkd.models.weight_casts import WeightCasts
from dkd.training.trainer import Trainer

BF16 = torch.bfloat16


class Tricky(nn.Module):
    """Holds layers that are called in the ways in which layers can be called."""

    def __init__(self):
        super().__init__()
        self.plain, self.again = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.reentrant, self.checkpointed = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.precise, self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied, self.with_it = nn.Linear(8, 8), nn.Linear(8, 8)
        self.with_it.weight = self.tied.weight
        self.frozen.requires_grad_(False)
        self.sometimes, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.again(self.again(self.plain(x)).relu())
        x = checkpoint(self.reentrant, x, use_reentrant=True)
        x = checkpoint(self.checkpointed, x, use_reentrant=False)
        x = self.normed(x).mean((2, 3))
        with torch.autocast("cpu", enabled=False):
            x = self.precise(x.float())
        x = self.with_it(self.tied(self.frozen(x)))
        if self.calls > 1:
            x = self.sometimes(x)
        return self.head(F.gelu(x))


def shrink(layer, inputs):
    layer.weight.data.mul_(0.9)


class Restless(nn.Module):
    """Reads and changes parameters outside of the calls of their layers, and calls layers otherwise in later steps."""

    def __init__(self):
        super().__init__()
        self.first, self.scaled, self.shrunk = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.hooked, self.read = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight_norm = nn.utils.weight_norm(nn.Linear(8, 8))
        self.spectral_norm = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.replaced, self.compiled = nn.Linear(8, 8), nn.Linear(8, 8)
        self.precise_later, self.normed_later, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.hooked.register_forward_pre_hook(shrink)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.scaled.weight.mul_(0.9)
        self.shrunk.weight.data.mul_(0.9)
        x = self.shrunk(self.scaled(self.first(x))).mean((2, 3))
        x = self.read(self.hooked(x)) + self.read.weight.sum() + 0.01 * sum(p.sum() for p in self.parameters())
        self.replaced.weight.data = 0.9 * self.replaced.weight.data
        x = self.replaced(input=self.spectral_norm(self.weight_norm(x)))
        if self.calls == 2:  # after layers were chosen
            self.compiled.compile(backend="eager", fullgraph=True)
        x = self.compiled(x)
        with torch.autocast("cpu", BF16, enabled=self.calls < 3):
            x = self.precise_later(x if self.calls < 3 else x.float())
        if self.calls == 3:
            nn.utils.weight_norm(self.normed_later)
            self.head.bias = None
        return self.head(self.normed_later(x).relu())


def timm_model(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **options)


MODELS = {
    "resnet8": lambda: build_model(ModelSpec("resnet8", 5)),
    "wrn_16_1": lambda: build_model(ModelSpec("wrn_16_1", 5)),
    "torchvision/mobilenet_v2": lambda: build_model(ModelSpec("torchvision/mobilenet_v2", 5)),
    "timm/vit": timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "timm/convnext": timm_model("convnext_atto", depths=(1, 1, 1, 1)),
    "timm/swin": timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(3, 6)),
    "timm/resnetv2, standardised weights": timm_model("resnetv2_50", layers=(1, 1, 1, 1)),
    "tricky": Tricky,
    "restless": Restless,
}


def trained(make, together, side, format, steps=4):
    """Return the logits of some steps, and what the weights and gradients are at their end."""
    torch.manual_seed(0)
    tapped = TappedModel(make().to(memory_format=format), [], autocast=BF16)
    if together:
        tapped.cast_together()
    tapped.train()
    optimizer = torch.optim.SGD(tapped.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        logits, _ = tapped(torch.randn(4, 3, side, side).to(memory_format=format).requires_grad_())
        logits.float().square().mean().backward()
        found.append(logits.detach())
        if step < steps - 1:
            optimizer.step()
    found += [p.grad if p.grad is not None else torch.tensor(torch.nan) for p in tapped.parameters()]
    return tapped, [*found, *tapped.state_dict().values()]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_casts_one_by_one(name, format):
    side = 56 if "swin" in name else 32
    plain, wanted = trained(MODELS[name], False, side, format)
    tapped, found = trained(MODELS[name], True, side, format)
    assert list(tapped.state_dict()) == list(plain.state_dict())
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in tapped.model.parameters())
    for one, other in zip(wanted, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


class WeightsUsed(TorchFunctionMode):
    """Notes in which type each layer's call takes its weight."""

    def __init__(self, model):
        super().__init__()
        self.types, self.layer = {}, None
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_pre_hook(lambda layer, inputs, name=name: setattr(self, "layer", name))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.conv2d):
            self.types.setdefault(self.layer, set()).add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def test_layers_under_autocast_take_casts_from_the_second_call_on():
    torch.manual_seed(0)
    model = Tricky()
    casts = WeightCasts(model, BF16)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", BF16), WeightsUsed(model) as used:
        casts(images)
        assert set().union(*used.types.values()) == {torch.float32}
        used.types.clear()
        casts(images)
    taken, others = ({k for k, found in used.types.items() if found == {type_}} for type_ in (BF16, torch.float32))
    assert taken == {"plain", "again", "reentrant", "checkpointed", "frozen", "tied", "with_it", "head"}
    assert others == {"normed", "precise", "sometimes"}


def test_one_operation_casts_all_weights_and_one_all_gradients():
    model = build_model(ModelSpec("resnet8", 5)).train()
    counts = {}
    for together in (False, True):
        tapped = TappedModel(copy.deepcopy(model), [], autocast=BF16)
        if together:
            tapped.cast_together()
        for _ in range(2):
            with OperatorCount() as count:
                tapped(torch.randn(2, 3, 32, 32))[0].float().sum().backward()
        counts[together] = count.operators
    tensors = sum(1 for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for _ in m.parameters())
    assert counts[False]["_to_copy"] - counts[True]["_to_copy"] == 2 * tensors
    assert counts[True]["_foreach_copy_"] == 2


def test_a_failed_forward_chooses_nothing_and_leaves_nothing():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.precise, self.calls = nn.Linear(3, 3), nn.Linear(3, 2), 0

        def forward(self, x):
            self.calls += 1
            x = self.first(x)
            if self.calls in (1, 4):
                raise RuntimeError("a failure")
            with torch.autocast("cpu", enabled=False):
                return self.precise(x.float())

    model = Failing()
    tapped = TappedModel(model, [], autocast=BF16)
    tapped.cast_together()
    tapped.train()
    images = torch.randn(2, 3)
    for fails in (True, False, False, True, False):
        if fails:
            with pytest.raises(RuntimeError, match="a failure"):
                tapped(images)
        else:
            tapped(images)[0].sum().backward()
        assert not any("forward" in vars(layer) for layer in model.modules())
    assert model.first.weight.grad.dtype == torch.float32
    torch.save(tapped.state_dict(), io.BytesIO())
    assert copy.deepcopy(tapped).model.first.weight.equal(model.first.weight)


def test_nothing_is_differentiated_through_frozen_layers():
    torch.manual_seed(0)
    model = build_model(ModelSpec("resnet8", 5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    tapped = TappedModel(model, ["layer3"], autocast=BF16)
    tapped.cast_together()
    tapped.train()
    images, kept = torch.randn(4, 3, 32, 32), []
    tapped(images)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits, features = tapped(images)
    assert logits.requires_grad
    assert not features["layer3"].requires_grad
    assert max(tensor.numel() for tensor in kept) <= 5 * 64


def test_transforms_of_functions_take_the_usual_way():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tapped = TappedModel(model, [], autocast=BF16)
    tapped.cast_together()
    tapped.train()
    images = torch.randn(5, 3)
    tapped(images)
    plain = TappedModel(model, [], autocast=BF16)
    found, wanted = (torch.vmap(lambda image, called=called: called(image)[0])(images) for called in (tapped, plain))
    assert torch.equal(found, wanted)
    parameters = dict(tapped.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(tapped, p, (images,))[0].float().sum())(parameters)


def test_gradients_of_gradients_pass_through_the_casts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    images = torch.randn(5, 3, requires_grad=True)
    found = []
    for together in (False, True):
        tapped = TappedModel(model, [], autocast=BF16)
        if together:
            tapped.cast_together()
            tapped(images)
        logits, _ = tapped(images)
        slopes = torch.autograd.grad(logits.float().sum(), list(model.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), images)[0])
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


RECIPE = {
    "run": {"trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 32},
    "student": {"name": "wrn_16_1"},
    "teacher": {"name": "wrn_16_2", "weights": "random"},
    "losses": {
        "ce": {},
        "at": {"beta": 1000, "pairs": [[f"block{i}", f"block{i}"] for i in (1, 2, 3)]},
        "sp": {"gamma": 3000, "reference_batch": 64, "pairs": [["block3", "block3"]]},
        "kd": {"alpha": 1, "temperature": 4},
    },
    "train": {"global_batch": 8, "epochs": 1, "max_steps": 4, "precision": "bf16", "channels_last": True},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "constant"},
}


def weights_of_a_run(folder, together):
    forget_settings()
    values = {**RECIPE, "run": {"dir": str(folder), "trackers": []}}
    trainer = Trainer.from_recipe(validate(values), if_run_exists="replace")
    trainer.parts.engine.model.cast_together(together)
    try:
        trainer.load_images(4)
        for _ in range(4):
            trainer.after_step(trainer.train_step())
        return [tensor.clone() for tensor in trainer.parts.engine.model.state_dict().values()]
    finally:
        trainer.close()


def test_a_training_gains_and_nothing_of_it_changes(tmp_path, monkeypatch):
    """Casts together, and features that keep their type where AT alone reads them: the bits of a training without."""
    calls = []
    original = WeightCasts.__call__
    monkeypatch.setattr(WeightCasts, "__call__", lambda self, images: (calls.append(1), original(self, images))[1])
    found = weights_of_a_run(tmp_path / "found", together=True)
    assert len(calls) == 4
    monkeypatch.setattr(forward, "unpromoted_taps", lambda objective: set())
    wanted = weights_of_a_run(tmp_path / "wanted", together=False)
    assert len(calls) == 4
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)


def test_what_several_losses_read_is_promoted():
    loss, other = AttentionTransfer(), SimilarityPreserving()
    pairs = [("a", "x"), ("b", "y")]
    at = FeatureTerm("at", float, loss, pairs=pairs)
    assert unpromoted_taps(Objective([at])) == {"a", "b"}
    assert unpromoted_taps(Objective([at, FeatureTerm("sp", float, other, pairs=pairs[1:])])) == {"a"}
    assert unpromoted_taps(Objective([at, FeatureTerm("at2", float, loss, pairs=pairs[1:])])) == {"a"}
    assert unpromoted_taps(Objective([FeatureTerm("sp", float, other, pairs=pairs)])) == set()
    unknown = types.SimpleNamespace(name="own", weight=float, value=None)
    assert unpromoted_taps(Objective([at, unknown])) == set()
