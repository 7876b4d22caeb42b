"""Exported students give the same logits when they are read without dkd."""

import json

import numpy as np
import pytest
import torch

from dkd.cli import main
from dkd.export import formats
from dkd.models import ModelSpec, build_model, load_student, save_student

FACTS = {"normalization": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}}


def finished(folder, name, size=32, classes=7, **options):
    """A run directory's student with random weights and used BatchNorm statistics."""
    torch.manual_seed(0)
    spec = ModelSpec(name, classes, None, options)
    model = build_model(spec).train()
    with torch.no_grad():
        model(torch.randn(8, 3, size, size))
    save_student(folder, spec, model.state_dict(), {"image_size": size, **FACTS})
    return folder


def images(size=32, batch=5):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_safetensors_round_trip(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file

    run = finished(tmp_path, "wrn_16_1")
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    assert "logits differ by at most 0.0e+00" in capsys.readouterr().out
    model = build_model(ModelSpec("wrn_16_1", 7)).eval()
    model.load_state_dict(load_file(run / "exported.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(images()), load_student(run)(images()))
    with safe_open(run / "exported.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["student"])
    assert facts["architecture"]["name"] == "wrn_16_1"
    assert facts["normalization"] == FACTS["normalization"]


def test_torchvision_round_trip(tmp_path):
    import torchvision

    run = finished(tmp_path, "torchvision/resnet18", 64)
    assert main(["export", str(run), "--format", "torchvision"]) == 0
    model = torchvision.models.resnet18(num_classes=7).eval()
    model.load_state_dict(torch.load(run / "student.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(model(images(64)), load_student(run)(images(64)))


# One plain network, and one of all that is awkward in ONNX: grouped and depthwise convolutions, shuffled channels. The
# others are slow.
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("wrn_16_1", "vgg8_cifar", "mobilenetv2_x0_5", "shufflenetv2", "nin_thin")
]


@pytest.mark.parametrize("name", ["resnet8", "shufflenetv1", *SLOW])
def test_onnx_round_trip(tmp_path, name):
    import onnxruntime

    run = finished(tmp_path, name)
    assert main(["export", str(run), "--format", "onnx", "--output", str(tmp_path / "there" / "a.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "there" / "a.onnx"), providers=["CPUExecutionProvider"])
    student = load_student(run)
    for batch in (1, 5):
        (found,) = session.run(None, {"images": images(batch=batch).numpy()})
        with torch.no_grad():
            wanted = student(images(batch=batch)).numpy()
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_onnx_with_its_own_normalization(tmp_path):
    import onnxruntime

    run = finished(tmp_path, "resnet8")
    assert main(["export", str(run), "--format", "onnx", "--normalization"]) == 0
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(2)).float()
    (found,) = onnxruntime.InferenceSession(str(run / "student.onnx")).run(None, {"images": pixels.numpy()})
    mean, std = (torch.tensor(FACTS["normalization"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = load_student(run)((pixels / 255 - mean) / std).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "torchvision"], "'resnet8', which torchvision does not have"),
        (["--format", "safetensors", "--normalization"], "--normalization belongs to onnx"),
        (["--format", "safetensors", "--output", "student.safetensors"], "the run's own student"),
        (
            ["--format", "onnx", "--output", "recipe.yaml"],
            "is no name for a file of onnx: name a file that ends in .onnx",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(tmp_path, arguments, said, capsys, monkeypatch):
    finished(tmp_path, "resnet8")
    monkeypatch.chdir(tmp_path)
    assert main(["export", ".", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.json", "student.safetensors"]


def test_an_export_follows_no_links_and_may_be_read_by_others(tmp_path):
    run = finished(tmp_path / "run", "resnet8")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("exported.safetensors", ".partial_exported.safetensors"):
        (run / name).symlink_to(precious)
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    assert precious.read_text() == "precious"
    written = run / "exported.safetensors"
    assert not written.is_symlink()
    assert written.stat().st_mode & 0o777 == precious.stat().st_mode & 0o777
    assert {path.name for path in run.glob(".partial_*")} == {".partial_exported.safetensors"}


def test_a_model_that_fails_on_its_own_image_size_is_no_bug(tmp_path, capsys):
    run = finished(tmp_path, "resnet8")
    facts = json.loads((run / "student.json").read_text())
    (run / "student.json").write_text(json.dumps({**facts, "image_size": 10**7}))
    assert main(["export", str(run), "--format", "safetensors"]) == 2
    assert "'resnet8' fails on 1 images of 10000000×10000000: RuntimeError" in capsys.readouterr().err


def test_a_run_without_a_student_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--format", "onnx"]) == 2
    assert "no finished student" in capsys.readouterr().err


def test_a_file_that_gives_other_logits_is_not_left(tmp_path, capsys, monkeypatch):
    run = finished(tmp_path, "torchvision/resnet18", 64)
    broken = lambda path, student, model: torch.save({k: v * 1.01 for k, v in student.model.state_dict().items()}, path)  # noqa: E731
    monkeypatch.setitem(formats.FORMATS, "torchvision", (broken, formats.FORMATS["torchvision"][1], ".pth"))
    assert main(["export", str(run), "--format", "torchvision"]) == 1
    assert "the file's logits differ by" in capsys.readouterr().err
    assert not list(run.glob("*.pth"))
    assert not list(run.glob(".partial*"))
