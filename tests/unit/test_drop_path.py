"""Stochastic depth, an option of the library's models: what is dropped is a function of the seed, the step and the
micro-batch, in both passes; a teacher drops nothing."""

import pytest
import torch
from interrupted import train_in_starts
from test_evaluation import recipe_in
from timm.layers import DropPath
from torchvision.ops import StochasticDepth

from dkd.config.loading import validate
from dkd.distillation import DistillationStep, FrozenTeacher, LabelTerm, Objective
from dkd.losses import CrossEntropy
from dkd.models import ModelSpec, TappedModel, build_model
from dkd.training.trainer import Trainer

VIT = {"img_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 24, "num_heads": 2}


def vit(rate):
    return ModelSpec("timm/vit_tiny_patch16_224", 10, options={**VIT, "drop_path_rate": rate})


def test_the_options_of_the_libraries_reach_their_models():
    timm = build_model(vit(0.2))
    rates = [module.drop_prob for module in timm.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.2)
    assert rates == sorted(rates)
    resnet = build_model(ModelSpec("timm/resnet18", 10, options={"drop_path_rate": 0.05}))
    assert any(isinstance(module, DropPath) for module in resnet.modules())
    torchvision = build_model(ModelSpec("torchvision/convnext_tiny", 10, options={"stochastic_depth_prob": 0.3}))
    assert max(m.p for m in torchvision.modules() if isinstance(m, StochasticDepth)) == pytest.approx(0.3)


def test_the_option_reaches_models_of_transformers(tmp_path):
    from transformers import ConvNextConfig

    sizes = {"hidden_sizes": [8, 8], "depths": [1, 2], "num_stages": 2, "image_size": 16}
    ConvNextConfig(**sizes).save_pretrained(tmp_path / "net")
    model = build_model(ModelSpec(f"hf/{tmp_path / 'net'}", 10, options={"drop_path_rate": 0.4}))
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "ConvNextDropPath"]
    assert max(rates) == pytest.approx(0.4)


def losses(student, step, seed=0):
    objective = Objective([LabelTerm("ce", lambda step: 1.0, CrossEntropy())])
    trained = DistillationStep(student, None, objective, micro_steps=3, seed=seed)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.randint(10, (6,), generator=generator)
    trained.begin([(images, labels)] * 3, step)
    found = [trained.loss(i).total.item() for i in range(3)]
    trained.end()
    return found


def test_what_is_dropped_is_a_function_of_seed_step_and_micro_batch():
    torch.manual_seed(0)
    student = TappedModel(build_model(vit(0.5)), []).train()
    found = losses(student, 4)
    torch.manual_seed(99)
    assert losses(student, 4) == found
    assert len(set(found)) == 3  # the same images, other draws
    assert losses(student, 5) != found
    assert losses(student, 4, seed=1) != found


def test_a_teacher_drops_nothing():
    torch.manual_seed(0)
    model = build_model(vit(0.9))
    images = torch.randn(4, 3, 16, 16)
    wanted = model.eval()(images)
    teacher = FrozenTeacher(model, ["blocks.2"], needs_logits=True)
    teacher.train()
    assert torch.equal(teacher(images)[0], wanted)
    assert not torch.equal(model.train()(images), wanted)


def recipe_of(folder, rate=0.5):
    pairs = [["blocks.1", "blocks.1"], ["blocks.2", "blocks.2"]]
    return recipe_in(
        folder,
        data={"image_size": 16},
        student={"name": "timm/vit_tiny_patch16_224", "options": {**VIT, "drop_path_rate": rate}},
        teacher={"name": "timm/vit_tiny_patch16_224", "weights": "random", "options": {**VIT, "drop_path_rate": 0.9}},
        losses={"sp": {"preset": "paper", "pairs": pairs}, "kd": {"alpha": 1}},
        train={"micro_batch": 16, "max_steps": 5},
        checkpoint={"every_steps": 2},
        optimizer={"name": "adamw", "lr": 1e-3},
    )


def test_both_passes_drop_alike_and_an_interrupted_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    differences, loss = [], DistillationStep.loss

    def compared(self, micro_step):
        assert self.has_two_passes
        found = loss(self, micro_step)
        differences.append(found.counts["pass_difference"].item())
        return found

    monkeypatch.setattr(DistillationStep, "loss", compared)
    whole = train_in_starts(recipe_of(tmp_path / "whole"))
    assert len(differences) == 5 * 4
    assert max(differences) < 1e-6
    assert train_in_starts(recipe_of(tmp_path / "again"), [3, None]) == whole
    assert train_in_starts(recipe_of(tmp_path / "other", rate=0.0))[0] != whole[0]
    assert not Trainer.from_recipe(validate(recipe_of(tmp_path / "built"))).parts.step.teacher.tapped.training
