"""The CIFAR models against the published architectures, and files whose tensors others have named."""

import argparse
import math
import zlib

import pytest
import torch

from dkd.models import ModelSpec, TappedModel, WeightsError, build_model, known_names, load_weights

# name: parameters with 100 classes, tensors in its state, and the first three logits of `images()` under the weights of
# `fill`. Logits are those of another implementation of the architectures of RepDistiller and mdistiller, in float64;
# they depend on its names of tensors, too.
ZOO = {
    "vgg8_cifar": (3_965_028, 37, [-0.0363145, -0.0637956, -0.1534896]),
    "vgg13_cifar": (9_462_180, 72, [-0.0373315, -0.0961016, -0.10836]),
    "mobilenetv2_x0_5": (812_836, 320, [0.0545567, -0.0196583, -0.1190517]),
    "shufflenetv1": (949_258, 296, [0.0853746, -0.2296929, -0.3049138]),
    "shufflenetv2": (1_355_528, 338, [0.1460117, -0.0258775, -0.0407036]),
    "resnet50_cifar": (23_705_252, 320, [-0.1677818, -0.1954944, -0.1257768]),
    "resnet8x4": (1_233_540, 62, [0.1028704, -0.0261734, -0.0537221]),
    "wrn_16_2": (703_284, 83, [-0.0305706, 0.1569981, -0.0078181]),
}
TAPS = {
    "vgg8_cifar": (["block1", "block2", "block3", "block4"], [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg13_cifar": (["block1", "block2", "block3", "block4"], [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "mobilenetv2_x0_5": (["blocks.1", "blocks.2", "blocks.4", "blocks.6"], [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "shufflenetv1": (["layer1", "layer2", "layer3"], [(240, 16), (480, 8), (960, 4)]),
    "shufflenetv2": (["layer1", "layer2", "layer3"], [(116, 16), (232, 8), (464, 4)]),
    "resnet50_cifar": (["layer1", "layer2", "layer3", "layer4"], [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "mobilenetv1": (["stage1", "stage2", "stage3", "stage4"], [(128, 8), (256, 4), (512, 2), (1024, 1)]),
    "nin_wide": (["block1", "block2", "block3"], [(96, 32), (192, 16), (192, 8)]),
    "nin_thin": (["block1", "block2", "block3"], [(48, 32), (96, 16), (96, 8)]),
}
# Every model: channels that `pool` averages, and a checksum of the names of its tensors, which files of weights have.
# The channels of nin_wide and nin_thin are the classes.
POOLED = {
    "resnet8": (64, 3_672_859_873),
    "resnet14": (64, 381_662_146),
    "resnet20": (64, 2_657_425_992),
    "resnet32": (64, 18_527_721),
    "resnet44": (64, 3_891_680_470),
    "resnet56": (64, 4_089_289_422),
    "resnet110": (64, 3_376_164_012),
    "resnet8x4": (256, 2_722_463_901),
    "resnet32x4": (256, 1_911_522_655),
    "wrn_16_1": (64, 2_883_675_825),
    "wrn_16_2": (128, 2_116_092_301),
    "wrn_16_8": (512, 2_116_092_301),
    "wrn_40_1": (64, 1_505_326_399),
    "wrn_40_2": (128, 696_948_676),
    "resnet50_cifar": (2048, 1_620_541_467),
    "vgg8_cifar": (512, 155_866_499),
    "vgg11_cifar": (512, 2_475_613_585),
    "vgg13_cifar": (512, 3_903_723_412),
    "vgg16_cifar": (512, 3_865_373_425),
    "vgg19_cifar": (512, 1_241_742_846),
    "mobilenetv2_x0_5": (1280, 2_226_260_886),
    "mobilenetv2_x1_0": (1280, 2_226_260_886),
    "mobilenetv1": (1024, 604_488_675),
    "shufflenetv1": (960, 469_802_960),
    "shufflenetv2_x0_5": (1024, 1_875_395_266),
    "shufflenetv2": (1024, 1_875_395_266),
    "nin_wide": (10, 2_489_589_257),
    "nin_thin": (10, 2_489_589_257),
}


def theirs(name):
    """A tensor of a Wide ResNet as RepDistiller and mdistiller name it."""
    block, _, rest = name.partition(".")
    return f"{block}.layer.{rest.replace('shortcut', 'convShortcut')}" if block.startswith("block") else name


def fill(model):
    """Weights that depend on their names and shapes alone."""
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        called = theirs(name) if type(model).__name__ == "WideResNet" else name
        drawn = torch.rand(
            value.shape, generator=torch.Generator().manual_seed(zlib.crc32(called.encode())), dtype=torch.float64
        )
        if value.ndim == 4:
            drawn = (drawn - 0.5) * 2 * math.sqrt(2 / value[0].numel())
        elif value.ndim == 2:
            drawn = (drawn - 0.5) * 2 / math.sqrt(value.shape[1])
        elif name.endswith(("running_var", ".weight")):
            drawn = 0.5 + drawn
        else:
            drawn = (drawn - 0.5) * 0.2
        value.copy_(drawn)
    return model


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("name", ZOO)
def test_architectures_are_the_literatures(name):
    parameters, tensors, logits = ZOO[name]
    model = build_model(ModelSpec(name, 100))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    with torch.no_grad():
        found = fill(model.double()).eval()(images())[0, :3]
    assert found.tolist() == pytest.approx(logits, abs=1e-6)


@pytest.mark.parametrize(("name", "parameters"), [("nin_wide", 968_394), ("nin_thin", 246_890)])
def test_nin_has_the_size_of_the_papers(name, parameters):
    """1 M and 0.2 M, as table 1 of the AT paper rounds them."""
    assert sum(p.numel() for p in build_model(ModelSpec(name, 10)).parameters()) == parameters


def test_mobilenet_v1_has_the_size_of_the_paper():
    """4.2 M in its table 8; the sum of its table 1."""
    assert sum(p.numel() for p in build_model(ModelSpec("mobilenetv1", 1000)).parameters()) == 4_231_976


@pytest.mark.parametrize("name", TAPS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_taps_are_the_stages_and_train(name, norm):
    taps, shapes = TAPS[name]
    model = TappedModel(build_model(ModelSpec(name, 10, norm)), taps)
    logits, features = model(torch.randn(2, 3, 32, 32))
    assert [tuple(f.shape[1:3]) for f in features.values()] == shapes
    (logits.sum() + sum(f.square().mean() for f in features.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (norm == "batch") == any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_every_model_is_in_the_table_of_pooled_features():
    assert set(POOLED) == {name for name in known_names() if not name.startswith("torchvision/")}


@pytest.mark.parametrize("name", POOLED)
def test_pool_is_what_the_head_reads_and_has_no_tensors(name):
    channels, checksum = POOLED[name]
    model = build_model(ModelSpec(name, 10)).eval()
    assert zlib.crc32("\n".join(model.state_dict()).encode()) == checksum
    maps = []
    model.pool.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs))
    with torch.no_grad():
        logits, features = TappedModel(model, ["pool"])(images().float())
        assert features["pool"].shape == (2, channels)
        assert torch.equal(features["pool"], maps[0].mean((2, 3)))
        head = torch.nn.Identity() if name.startswith("nin_") else list(model.children())[-1]
        assert torch.equal(logits, head(features["pool"]))


@pytest.mark.parametrize("name", TAPS)
def test_other_image_sizes(name):
    assert build_model(ModelSpec(name, 7)).eval()(torch.zeros(1, 3, 48, 40)).shape == (1, 7)


def test_nin_without_norms():
    model = build_model(ModelSpec("nin_thin", 10, "none"))
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.GroupNorm)]
    with pytest.raises(ValueError, match="none is for nin_wide and nin_thin"):
        build_model(ModelSpec("resnet8", 10, "none"))


@pytest.mark.parametrize(
    "written", ["ckpt_epoch_240.pth", "wrn_last.pth", "student_best", "latest", "weights.safetensors"]
)
def test_files_of_other_projects_load(tmp_path, written):
    """Names and nesting as RepDistiller (.pth) and mdistiller write them."""
    source, target = (fill(build_model(ModelSpec("wrn_16_1", 10))) for _ in range(2))
    for value in target.state_dict().values():
        value.zero_()
    state = {theirs(name): value for name, value in source.state_dict().items()}
    path = tmp_path / written
    if written.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        both = {f"module.student.{k}": v for k, v in state.items()} | {
            f"module.teacher.{k}": v * 0 for k, v in state.items()
        }
        content = {
            "ckpt_epoch_240.pth": {
                "epoch": 240,
                "model": state,
                "accuracy": torch.tensor(75.0),
                "optimizer": {"state": {}, "param_groups": []},
            },
            "wrn_last.pth": {"opt": argparse.Namespace(batch_size=64), "model": state},
            "student_best": {"model": state},
            "latest": {"epoch": 1, "model": both, "best_acc": 0.5},
        }
        torch.save(content[written], path)
    load_weights(target, "wrn_16_1", str(path))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_of_ones_own_model_stay_though_they_look_like_those_of_others(tmp_path, suffix):
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block1 = Layers()

    for source, target in (
        (Own(), Own()),
        (torch.nn.ModuleDict({"module": Own()}), torch.nn.ModuleDict({"module": Own()})),
    ):
        path = tmp_path / f"weights{suffix}"
        if suffix == ".pth":
            torch.save(source.state_dict(), path)
        else:
            from safetensors.torch import save_file

            save_file(source.state_dict(), path)
        load_weights(target, "my:Own", str(path))
        assert all(
            torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        )


def test_names_of_others_do_not_hide_what_does_not_fit(tmp_path):
    path = tmp_path / "ckpt.pth"
    torch.save({"model": {theirs(n): v for n, v in build_model(ModelSpec("wrn_16_1", 10)).state_dict().items()}}, path)
    with pytest.raises(WeightsError, match=r"missing: block1.0.shortcut.weight"):
        load_weights(build_model(ModelSpec("wrn_16_2", 10)), "wrn_16_2", str(path))
