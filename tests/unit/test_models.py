import pytest
import torch
from torch import nn

from dkd.models import (
    ModelSpec,
    TapError,
    TappedModel,
    UnknownModelError,
    WeightsError,
    build_model,
    check_weights,
    load_student,
    load_weights,
    module_rows,
    save_student,
    unreached_parameters,
)
from dkd.models.weights import read_file

# Parameters with 100 classes. In millions as published: CRD's CIFAR-100 benchmark (resnet20 0.28, resnet32 0.47,
# resnet56 0.86, resnet110 1.74, resnet8x4 1.23, resnet32x4 7.43, wrn_16_2 0.70, wrn_40_1 0.57, wrn_40_2 2.26) and the
# WRN paper's table 4 (wrn_16_8 11.0).
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_16_8": 11_007_540,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameter_counts_are_the_published_ones(name, parameters, norm):
    model = build_model(ModelSpec(name, 100, norm))
    assert sum(p.numel() for p in model.parameters()) == parameters
    batch_norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (batch_norms > 0) == (norm == "batch")


@pytest.mark.parametrize(
    ("name", "taps", "size"), [("resnet8", ["layer1", "layer2", "layer3"], 32), ("wrn_16_2", ["block1", "block3"], 32)]
)
def test_taps_are_the_stages(name, taps, size):
    torch.manual_seed(0)
    model = TappedModel(build_model(ModelSpec(name, 10)), taps)
    images = torch.randn(2, 3, size, size)
    logits, features = model(images)
    assert logits.shape == (2, 10)
    assert list(features) == taps
    assert all(feature.grad_fn is not None for feature in features.values())


def test_taps_change_neither_the_model_nor_its_statistics():
    torch.manual_seed(0)
    plain = build_model(ModelSpec("wrn_16_1", 10))
    tapped = TappedModel(build_model(ModelSpec("wrn_16_1", 10)), ["block1", "block2"])
    tapped.model.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(plain(images), tapped(images)[0])
    for (name, a), b in zip(plain.state_dict().items(), tapped.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_stopping_after_the_last_tap_runs_nothing_behind_it():
    model = build_model(ModelSpec("wrn_16_1", 10)).eval()
    full = TappedModel(model, ["block1", "block2"])
    wanted = full(torch.ones(2, 3, 32, 32))[1]
    stopped = TappedModel(build_model(ModelSpec("wrn_16_1", 10)).eval(), ["block1", "block2"], needs_logits=False)
    stopped.model.load_state_dict(model.state_dict())
    ran = []
    stopped.model.block3.register_forward_hook(lambda *_: ran.append("block3"))
    logits, features = stopped(torch.ones(2, 3, 32, 32))
    assert logits is None
    assert not ran
    assert all(torch.equal(features[tap], wanted[tap]) for tap in wanted)


def test_a_wrong_tap_fails_with_the_nearest_names():
    with pytest.raises(TapError, match=r"'blok3' is not a module of WideResNet; did you mean block3"):
        TappedModel(build_model(ModelSpec("wrn_16_1", 10)), ["blok3"])


class Reused(nn.Module):
    """One ReLU called twice, and a linear layer whose output an in-place ReLU overwrites."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Linear(3 * 8 * 8, 4)
        self.second = nn.Linear(4, 4)
        self.pair = nn.Identity()

    def forward(self, x):
        x = nn.functional.relu(self.first(x.flatten(1)), inplace=True)
        return self.relu(self.second(self.relu(x)))


def test_a_tap_that_fires_twice_is_an_error_with_the_count():
    with pytest.raises(TapError, match="'relu' fired 2 times"):
        TappedModel(Reused(), ["relu"])(torch.ones(2, 3, 8, 8))


def test_a_tap_that_never_fires_is_an_error():
    with pytest.raises(TapError, match="'pair' fired 0 times"):
        TappedModel(Reused(), ["pair"])(torch.ones(2, 3, 8, 8))


def test_a_tensor_changed_in_place_after_capture_is_an_error_that_names_the_path():
    with pytest.raises(TapError, match="'first' is changed in place"):
        TappedModel(Reused(), ["first"])(torch.ones(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_16_22", "did you mean wrn_16_2"),
        ("torchvision/resnte34", "did you mean torchvision/resnet34"),
        ("resnet34", "did you mean"),
        ("no_such_module_here:build", "cannot import 'no_such_module_here'"),
        ("json:no_such_function", "has no callable 'no_such_function'"),
        ("json:loads", "cannot be built with num_classes=10"),
        ("torchvision/nothing_like_it", "is not a known model"),
    ],
)
def test_unknown_models_are_named_with_what_to_do(name, message):
    with pytest.raises(UnknownModelError, match=message):
        build_model(ModelSpec(name, 10))


def test_timm_is_optional():
    try:
        import timm
    except ImportError:
        with pytest.raises(UnknownModelError, match=r"pip install -e '.*\[timm\]'"):
            build_model(ModelSpec("timm/resnet18", 10))
    else:
        name = f"timm/{timm.list_models('resnet18')[0]}"
        model = TappedModel(build_model(ModelSpec(name, 10)), ["layer1"]).eval()
        assert model(torch.ones(1, 3, 32, 32))[0].shape == (1, 10)


def test_a_users_callable_is_a_model():
    model = build_model(ModelSpec("torchvision.models:resnet18", 7, options={"zero_init_residual": True}))
    assert model.fc.out_features == 7
    assert not model.layer1[0].bn2.weight.any()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested", "prefixed"])
def test_weights_load_from_files_of_tensors(tmp_path, kind):
    from safetensors.torch import save_file

    source, target = (build_model(ModelSpec("resnet8", 10)) for _ in range(2))
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    state = source.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"pth": state, "nested": {"model": state}, "prefixed": {f"module.{k}": v for k, v in state.items()}}[kind],
            path,
        )
    load_weights(target, "resnet8", str(path))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), target.state_dict().values(), strict=True))


def test_a_mismatch_lists_the_keys(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(build_model(ModelSpec("resnet8", 10)).state_dict(), path)
    with pytest.raises(WeightsError, match=r"of another shape: fc.weight \(10, 64\) for \(100, 64\), fc.bias"):
        load_weights(build_model(ModelSpec("resnet8", 100)), "resnet8", str(path))
    with pytest.raises(WeightsError, match=r"missing: .*layer1.1.conv1.weight"):
        load_weights(build_model(ModelSpec("resnet14", 10)), "resnet14", str(path))


class RunsCode:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"weight": RunsCode()}, path)
    with pytest.raises(WeightsError, match="cannot be read as a file of tensors"):
        load_weights(build_model(ModelSpec("resnet8", 10)), "resnet8", str(path))
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"hello world", b"\x80\x02.", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b""]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_tensors_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    for device in ("cpu", "meta"):
        with pytest.raises(WeightsError, match="cannot be read as a file of tensors"):
            read_file(path, device)


def test_a_student_file_that_names_code_is_not_run_unasked(tmp_path):
    save_student(
        tmp_path,
        ModelSpec("torchvision.models:resnet18", 10),
        build_model(ModelSpec("torchvision/resnet18", 10)).state_dict(),
        {},
    )
    with pytest.raises(UnknownModelError, match="is code to be imported and run"):
        load_student(tmp_path)
    assert load_student(tmp_path, trust_code=True).fc.out_features == 10


def test_a_model_with_parameters_that_nothing_uses_is_refused(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.used, self.spare = torch.nn.Linear(3, num_classes), torch.nn.Linear(3, 3)\n"
        "    def forward(self, x):\n        return self.used(x.mean((2, 3)))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert unreached_parameters(ModelSpec("nets:Net", 5), 4, 8) == ["spare.weight", "spare.bias"]


def test_a_parameter_counts_as_reached_where_a_tapped_feature_reaches_it(tmp_path, monkeypatch):
    (tmp_path / "regressors.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.used, self.regressor = torch.nn.Linear(3, num_classes), torch.nn.Linear(3, 7)\n"
        "    def forward(self, x):\n        x = x.mean((2, 3))\n"
        "        self.regressor(x)\n        return self.used(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("regressors:Net", 5)
    assert unreached_parameters(spec, 4, 8, taps=["regressor"]) == []
    assert unreached_parameters(spec, 4, 8, taps=["regressor"], reads_logits=False) == ["used.weight", "used.bias"]


def test_torchvision_weights_by_name_are_checked_against_the_model():
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V9.*which has IMAGENET1K_V1"):
        load_weights(build_model(ModelSpec("torchvision/resnet18", 1000)), "torchvision/resnet18", "IMAGENET1K_V9")
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1.* has 1000 classes, the model 10"):
        check_weights(build_model(ModelSpec("torchvision/resnet18", 10)), "torchvision/resnet18", "IMAGENET1K_V1")
    with pytest.raises(WeightsError, match="only torchvision/"):
        load_weights(build_model(ModelSpec("resnet8", 10)), "resnet8", "IMAGENET1K_V1")


def test_inspection_gives_paths_shapes_and_parameters():
    rows = {row.path: row for row in module_rows(ModelSpec("torchvision/resnet18", 1000), 224)}
    assert rows["layer4"].shape == (512, 7, 7)
    assert rows["layer4"].calls == 1
    assert rows[""].parameters == 11_689_512
    assert rows["layer1.0.relu"].calls == 2
