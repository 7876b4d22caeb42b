"""Compiled models and losses: the numbers of plain ones, up to rounding."""

import pytest
import torch
from every_loss import ALL

from dkd.build.objective import compile_losses
from dkd.config.loading import validate
from dkd.engines.accelerated import forget_settings
from dkd.library_internals.torch import is_compiled
from dkd.models import ModelSpec, TappedModel, build_model
from dkd.models.compiling import compile_model
from dkd.training.trainer import Trainer

MEANS, RELATIONS = ("ce", "at", "kd", "dkd"), ("sp", "pkt", "cc", "cka", "rkd")


def recipe(folder, **settings):
    return validate(
        {
            "run": {"dir": str(folder), "trackers": []},
            "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 8},
            "student": {"name": "resnet8"},
            "teacher": {"name": "wrn_16_1", "weights": "random"},
            "losses": {name: ALL[name] for name in (*MEANS, *RELATIONS)},
            "train": {"global_batch": 16, "epochs": 1, "max_steps": 2, "precision": "fp32", "compile": settings},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "schedule": {"name": "constant"},
        }
    )


def losses_of_two_steps(folder, **settings):
    forget_settings()
    torch.manual_seed(0)
    trainer = Trainer.from_recipe(recipe(folder, **settings), if_run_exists="replace")
    try:
        trainer.load_images(2)
        return [trainer.train_step().terms for _ in range(2)], trainer.parts.step
    finally:
        trainer.close()


@pytest.fixture
def quick(monkeypatch):
    """Compile without generating code, which takes minutes on a CPU: what is traced is the same."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **more: plain(*args, **{**more, "backend": "aot_eager"}))
    torch.compiler.reset()


def test_a_step_with_compiled_losses_and_blocks_is_the_plain_one(tmp_path, quick):
    plain, step = losses_of_two_steps(tmp_path / "plain")
    assert not any(is_compiled(term.loss) for term in step.objective.terms)
    compiled, step = losses_of_two_steps(tmp_path / "compiled", losses=True, student="blocks", teacher="blocks")
    compiled_terms = {term.name for term in step.objective.terms if is_compiled(term.loss)}
    assert {*MEANS, *RELATIONS} - compiled_terms <= {"rkd"}, compiled_terms  # rkd is two terms, of their own names
    for one, other in zip(plain, compiled, strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_losses_of_relations_are_not_compiled_where_other_ranks_compute_with_them(tmp_path):
    _, step = losses_of_two_steps(tmp_path / "plain")
    compile_losses(step.objective, world_size=2)
    assert {term.name for term in step.objective.terms if is_compiled(term.loss)} == set(MEANS)


def test_blocks_of_a_kind_are_compiled_once_each_by_itself():
    model = TappedModel(build_model(ModelSpec("wrn_16_1", 10)), ["block2"])
    compile_model(model, "blocks")
    compiled = [path for path, module in model.named_modules() if is_compiled(module)]
    assert compiled == [f"model.block{group}.{number}" for group in (1, 2, 3) for number in (0, 1)]
    compile_model(other := TappedModel(build_model(ModelSpec("wrn_16_1", 10)), ["block2"]), False)
    assert not any(is_compiled(module) for module in other.modules())
