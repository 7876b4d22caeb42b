"""Models of transformers and timm, and models that load their own weights: built from configurations, without a
network."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dkd
from dkd.models import (
    Head,
    ModelSpec,
    TappedModel,
    UnknownModelError,
    WeightsError,
    build_model,
    head_keys,
    load_weights,
    stated_classes,
    stated_input,
)
from dkd.preflight.completion import complete
from dkd.training.entry import resolve

timm = pytest.importorskip("timm")
RECIPE = {
    "run": {"trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 32},
    "train": {"global_batch": 16, "epochs": 1, "max_steps": 2, "precision": "fp32"},
    "optimizer": {"name": "adamw", "lr": 0.001},
    "schedule": {"name": "constant"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT of transformers of 24,000 parameters, five classes, with its processor, as `save_pretrained` writes it."""
    from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

    path = tmp_path_factory.mktemp("hf") / "vit"
    names = dict(enumerate(("ant", "bee", "cat", "dog", "eel")))
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(path)
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(path)
    return path


def test_a_model_of_transformers_teaches_and_learns(folder, tmp_path, capsys):
    values = {
        **RECIPE,
        "run": {**RECIPE["run"], "dir": str(tmp_path / "run")},
        "student": {"name": f"hf/{folder}", "weights": "pretrained", "options": {"image_size": 32}, "head": "new"},
        "teacher": {"name": f"hf/{folder}", "weights": "pretrained", "classes": 5},
        "losses": {"sp": {"preset": "paper", "pairs": [["vit.layers.1", "vit.layers.1"]]}},
    }
    with pytest.raises(dkd.InputError, match="position_embeddings"):  # of another image size
        dkd.train(values)
    del values["student"]["weights"], values["student"]["head"]
    result = dkd.train(values)
    said = capsys.readouterr().err
    assert "warning" not in said
    assert "teacher.normalization: mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6], as its processor states" in said
    assert "teacher.input_size: 16 pixels, as its processor states" in said
    assert dkd.evaluate(result.run_dir).result == result.evaluation
    # The run holds the configuration: the folder of its name may be gone.
    description = json.loads((result.run_dir / "student.json").read_text())
    description["architecture"]["name"] = "hf/gone"
    (result.run_dir / "student.json").write_text(json.dumps(description))
    student = dkd.load_student(result.run_dir)
    assert student(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)
    from dkd.export import export_student

    assert export_student(result.run_dir, "onnx")[1] < 1e-4


def test_weights_of_transformers_fill_every_tensor_but_a_new_head(folder):
    spec = ModelSpec(f"hf/{folder}", 3)
    model = build_model(spec)
    assert head_keys(spec) == ("classifier.weight", "classifier.bias")
    assert load_weights(model, spec.name, "pretrained", Head(head_keys(spec))) == list(head_keys(spec))
    whole = build_model(ModelSpec(f"hf/{folder}", 5))
    assert load_weights(whole, spec.name, "pretrained") == []
    for key, tensor in model.state_dict().items():
        assert key in head_keys(spec) or torch.equal(tensor, whole.state_dict()[key]), key
    with pytest.raises(WeightsError, match="2 of another shape"):
        load_weights(model, spec.name, "pretrained")
    assert stated_classes(spec.name, "pretrained").names == ["ant", "bee", "cat", "dog", "eel"]


def test_a_place_without_a_model_is_one_line():
    with pytest.raises(UnknownModelError, match="its configuration cannot be read"):
        build_model(ModelSpec("hf//no/such/folder", 10))


def test_timm_states_its_own_input(tmp_path):
    assert stated_input("timm/vit_tiny_patch16_224", "pretrained").mean == (0.5, 0.5, 0.5)
    assert stated_input("timm/vit_tiny_patch16_224", "pretrained").size == 224
    assert stated_input("timm/resnet18", "pretrained").size is None
    values = {
        **RECIPE,
        "run": {**RECIPE["run"], "dir": str(tmp_path / "run")},
        "student": {"name": "resnet8"},
        "teacher": {"name": "timm/vit_tiny_patch16_224", "weights": "pretrained", "classes": 1000},
        "losses": {"sp": {"preset": "paper", "pairs": [["layer3", "blocks.11"]]}},
    }
    recipe, said = complete(resolve(values))
    assert recipe.teacher.input_size == 224
    assert recipe.teacher.normalization.mean == [0.5, 0.5, 0.5]
    assert len(said) == 2
    assert complete(recipe) == (recipe, [])
    # What the recipe states stays.
    values["teacher"] |= {"input_size": 32, "normalization": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    assert complete(resolve(values))[1] == []


def test_a_model_of_timm_is_trained_from_a_file_in_its_layout(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=21, depth=1)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth.tar")
    student = {
        "name": "timm/vit_tiny_patch16_224",
        "weights": str(tmp_path / "checkpoint.pth.tar"),
        "options": {"img_size": 32, "depth": 1},
    }
    result = dkd.train({**RECIPE, "run": {**RECIPE["run"], "dir": str(tmp_path / "run")}, "student": student})
    assert result.steps == 2


def test_a_model_that_loads_its_own_weights_is_taken_as_it_is_built(tmp_path, monkeypatch, capsys):
    model = build_model(ModelSpec("resnet8", 10))
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    (tmp_path / "own_models.py").write_text(f"""
from safetensors.torch import load_file
from dkd.models import ModelSpec, build_model

def teacher(num_classes):
    model = build_model(ModelSpec("resnet8", num_classes))
    model.load_state_dict(load_file({str(tmp_path / "own.safetensors")!r}))
    return model
""")
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        **RECIPE,
        "run": {**RECIPE["run"], "dir": str(tmp_path / "run")},
        "student": {"name": "own_models:teacher", "weights": "as_built"},
        "teacher": {"name": "own_models:teacher", "weights": "as_built"},
        "losses": {"kd": {"alpha": 1.0}},
        "optimizer": {"name": "sgd", "lr": 1e-30},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's, that a copy to the meta device is a no-op
        result = dkd.train(values)
    said = capsys.readouterr().err
    assert "random" not in said
    assert "warning: the teacher's first class is right for" in said  # it was never trained
    trained = dkd.load_student(result.run_dir, trust_code=True).state_dict()
    assert torch.equal(trained["layer3.0.conv1.weight"], model.state_dict()["layer3.0.conv1.weight"])
    sys.modules.pop("own_models")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.", "net.backbone."])
def test_wrappers_prefixes_in_a_file_are_taken_away(tmp_path, prefix):
    model = build_model(ModelSpec("resnet8", 10))
    torch.save({"state_dict": {prefix + key: value for key, value in model.state_dict().items()}}, tmp_path / "a.pt")
    other = build_model(ModelSpec("resnet8", 10))
    load_weights(other, "resnet8", str(tmp_path / "a.pt"))
    assert torch.equal(other.fc.weight, model.fc.weight)


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build_model(ModelSpec("resnet8", 10))


def test_a_file_of_the_plain_model_fills_a_wrapper(tmp_path):
    plain, wrapper = build_model(ModelSpec("resnet8", 10)), Wrapper()
    save_file(plain.state_dict(), tmp_path / "a.safetensors")
    load_weights(wrapper, "mine:Wrapper", str(tmp_path / "a.safetensors"))
    assert torch.equal(wrapper.inner.fc.weight, plain.fc.weight)
    other = {key.replace("layer1", "layer7"): value for key, value in plain.state_dict().items()}
    save_file(other, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        load_weights(wrapper, "mine:Wrapper", str(tmp_path / "b.safetensors"))


class Blocks(torch.nn.Module):
    """Yields what blocks and models of transformers yield."""

    def __init__(self):
        super().__init__()
        self.block, self.encoder = Tuple(), Mapped()

    def forward(self, images):
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=self.encoder(self.block(images)[0]).last_hidden_state.mean((2, 3)))


class Tuple(torch.nn.Module):
    def forward(self, images):
        return images * 2, None


class Mapped(torch.nn.Module):
    def forward(self, images):
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=images + 1)


def test_outputs_of_transformers_are_logits_and_features():
    images = torch.rand(2, 3, 4, 4)
    logits, features = TappedModel(Blocks(), ["block", "encoder"])(images)
    assert torch.equal(features["block"], images * 2)
    assert torch.equal(features["encoder"], images * 2 + 1)
    assert torch.equal(logits, (images * 2 + 1).mean((2, 3)))


def test_the_teachers_student_json_states_its_input(tmp_path):
    run = {**RECIPE["run"], "dir": str(tmp_path / "teacher")}
    data = {**RECIPE["data"], "image_size": 16, "normalization": {"mean": [0.2] * 3, "std": [0.3] * 3}}
    dkd.train({**RECIPE, "run": run, "data": data, "student": {"name": "resnet8"}})
    values = {
        **RECIPE,
        "student": {"name": "resnet8"},
        "teacher": {"name": "resnet8", "weights": str(Path(run["dir"]))},
        "losses": {"kd": {"alpha": 1.0}},
    }
    recipe, said = complete(resolve(values))
    assert recipe.teacher.normalization.mean == [0.2] * 3
    assert said == ["teacher.normalization: mean [0.2, 0.2, 0.2], std [0.3, 0.3, 0.3], as its student.json states"]


def test_the_example_recipes_tap_what_is_there(tmp_path, monkeypatch):
    from transformers import AutoModelForImageClassification, ViTConfig

    from dkd.preflight.models import model_problems

    examples = Path(__file__).resolve().parents[2] / "configs" / "examples"
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5}
    AutoModelForImageClassification.from_config(ViTConfig(**small)).save_pretrained(tmp_path / "fine_tuned")
    monkeypatch.chdir(tmp_path)
    for name in ("photos_timm_vit_resnet18", "photos_hf_vit_mobilenet"):
        recipe = dkd.load_recipe(examples / f"{name}.yaml", ["data.classes=5"])
        assert model_problems(recipe, 224, 2, with_weights=False) == []


def test_a_folder_without_a_processor_states_its_size_alone(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    stated = stated_input(f"hf/{tmp_path / 'bare'}", "pretrained")
    assert (stated.normalization, stated.size) == (None, 16)
    values = {
        **RECIPE,
        "student": {"name": "resnet8"},
        "teacher": {"name": f"hf/{tmp_path / 'bare'}", "weights": "pretrained", "classes": 5},
        "losses": {"sp": {"preset": "paper", "pairs": [["layer3", "vit.layers.1"]]}},
    }
    recipe, said = complete(resolve(values))
    assert recipe.teacher.input_size == 16
    assert any("state no normalisation; it gets the student's" in line for line in said)


def test_a_processors_own_factor_is_part_of_the_normalisation(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "scaled")
    path = tmp_path / "scaled" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 1 / 127.5}))
    mean, std = stated_input(f"hf/{tmp_path / 'scaled'}", "pretrained").normalization
    assert mean == pytest.approx([0.05, 0.1, 0.15])  # (2·x − m) / s = (x − m/2) / (s/2)
    assert std == pytest.approx([0.2, 0.25, 0.3])
