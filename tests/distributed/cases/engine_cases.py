"""The trainer under each engine and placement of the teacher, many in one launch. What they return is judged in
test_engines.py."""

import dataclasses
import hashlib
import json
import os
from contextlib import contextmanager

import plain_trained
import torch
import torch.distributed as dist
import trainer_cases
from engines import environment, name_of
from launched import LONG
from torch.utils.data import Subset

from dkd.build.data import build_image_pipeline, open_part
from dkd.data import EvaluationLoader
from dkd.engines import accelerated
from dkd.engines.accelerated import forget_settings
from dkd.engines.arithmetic import Arithmetic
from dkd.engines.opening import open_engine
from dkd.engines.sharded_weights import local_part, parameter_counts
from dkd.errors import TrainingError
from dkd.launch import Launch
from dkd.preflight.check import check
from dkd.training.evaluate_student import evaluate_student
from dkd.training.trainer import Trainer

VIT = "torchvision/vit_b_32" if LONG else "small_models:Transformer"
VIT_BLOCK = f"encoder.layers.encoder_layer_{11 if LONG else 3}"


@contextmanager
def launched_as(engine):
    """A launch of its own, within this one: Accelerate keeps its settings for the life of a process."""
    before = dict(os.environ)
    forget_settings()
    os.environ.update(environment(engine))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget_settings()


def train(folder, case):
    """Train as a case says: engine, micro_batch, teacher (placement), model (plain, regularized, or trained, with
    losses that train something), and keys of the recipe."""
    model = trainer_cases.REGULARIZED if case["model"] == "regularized" else {}
    changes = {**model, "losses": trainer_cases.with_strategy(case["strategy"])}
    changes["train"] = {
        **model.get("train", {}),
        "micro_batch": case["micro_batch"],
        "precision": case["precision"],
        "channels_last": False,
    }
    changes["train"] |= case.get("train", {})
    if case["model"] == "trained":
        changes["losses"] = plain_trained.LOSSES
    if case["model"] == "vit":
        # A vision transformer; its 7×7 tokens of 32 pixels are the resolution of a ResNet's layer4.
        changes |= {
            "student": {"name": "torchvision/resnet18", "norm": None},
            "data": {"image_size": 224},
            "losses": {
                "at": {**trainer_cases.RECIPE["losses"]["at"], "pairs": [["layer4", VIT_BLOCK]], "class_tokens": 1},
                "sp": {**trainer_cases.RECIPE["losses"]["sp"], "pairs": [["layer4", VIT_BLOCK]]},
            },
        }
    changes["checkpoint"] = case.get("checkpoint", {})
    changes["optimizer"] = {**trainer_cases.RECIPE["optimizer"], "lr": case["lr"]}
    changes["teacher"] = {"placement": case["teacher"], **({"name": VIT} if case["model"] == "vit" else {})}
    if "freeze" in case:
        changes["student"] = {"norm": "batch", "freeze": case["freeze"].split(), "freeze_batch_norm": True}
    name = name_of(case)
    if "images" in case:
        path = trainer_cases.images_on_disk(folder, "few.parquet", case["images"])
        changes["data"] = {**changes.get("data", {}), "train": path, "validation": path, "allow_same_images": True}
    recipe = trainer_cases.recipe_of(folder, name, changes)
    with launched_as(case["engine"]):
        launch = Launch.read()
        check(recipe, launch)
        trainer = (Broken if "nonfinite" in case else Trainer).from_recipe(recipe, launch)
        parts = trainer.parts
        if "samples" in case:
            few = FewSamples(open_part(recipe.data, "validation"), case["samples"])
            transform = build_image_pipeline(recipe).validation
            few = EvaluationLoader(few, transform, 4, launch.rank, launch.world_size)
            parts.data = dataclasses.replace(parts.data, validation=few)
        hashes = trainer.break_steps(case["nonfinite"]) if "nonfinite" in case else {}
        try:
            result = trainer.fit()
        except TrainingError as error:
            return {"ended": str(error), "hashes": hashes}
        state = parts.engine.full_weights()
        buffers = parts.engine.model.model
    if dist.is_initialized():
        dist.barrier()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [line for line in lines if "step" in line],
        "evaluation": result.facts(),
        "state": {key: value.double().flatten()[:64].tolist() for key, value in state.items()},
        "buffers": {key: value.double().flatten()[:64].tolist() for key, value in buffers.named_buffers()},
        "parameters": list(parameter_counts(parts.engine.model)),
        "teacher": parameter_counts(parts.step.teacher),
        "hashes": hashes,
    }


class BrokenObjective:
    """The last rank's total is NaN in the first micro-step of some steps."""

    def __init__(self, whole, steps, seen, last):
        self.whole, self.steps, self.seen, self.last = whole, steps, seen, last

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def __call__(self, *args, step, **kwargs):
        total, values = self.whole(*args, step=step, **kwargs)
        first = step not in self.seen
        self.seen.append(step)
        return (total * float("nan"), values) if self.last and first and step in self.steps else (total, values)


class Broken(Trainer):
    def break_steps(self, steps):
        """Break the loss of these steps. Return what will hold a hash of all that a checkpoint would hold, before each
        step."""
        step, launch = self.parts.step, self.parts.launch
        seen, last = [], launch.rank == launch.world_size - 1
        self.hashes = {}
        step.objective = BrokenObjective(step.objective, steps, seen, last)
        step.separable = BrokenObjective(step.separable, steps, seen, last)
        return self.hashes

    def train_step(self):
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict()["tensors"].items()):
            digest.update(name.encode() + local_part(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.hashes[self.state.step] = digest.hexdigest()
        return super().train_step()


class FewSamples(Subset):
    def __init__(self, source, count):
        super().__init__(source, range(count))
        self.labels = source.labels[:count]

    def image(self, index):
        return self.dataset.image(index)


def features_of_teachers(folder):
    """The features of a sharded teacher against those of the whole one: bit for bit, with and without logits; and what
    a rank keeps."""
    from safetensors.torch import save_file

    from dkd.build.models import build_teacher
    from dkd.config.loading import validate
    from dkd.models import ModelSpec, build_model

    launch = Launch.read()
    found = {}
    for name, taps, options in (
        ("wrn_16_2", ["block1", "block2"], {}),
        ("torchvision/resnet18", ["layer2", "layer3"], {}),
        (VIT, ["encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_3"], {}),
    ):
        torch.manual_seed(1)
        pixels = 32 if name != VIT else 224
        path = folder / (name.replace("/", "_") + ".safetensors")
        if dist.get_rank() == 0:
            save_file(build_model(ModelSpec(name, 10)).state_dict(), path)
        dist.barrier()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images = torch.randn(2, 3, pixels, pixels, device=device)
        for kd in (None, {"alpha": 1.0}):
            features = {}
            for placement in ("replicated", "fsdp2"):
                values = {
                    **trainer_cases.RECIPE,
                    "teacher": {"name": name, "weights": str(path), "placement": placement, "options": options},
                    "losses": {
                        "sp": {"gamma": 1, "reference_batch": 1, "pairs": [["layer3", tap] for tap in taps]},
                        "kd": kd,
                    },
                    "train": {"global_batch": 4, "epochs": 1, "precision": "fp32", "channels_last": False},
                }
                teacher = build_teacher(recipe := validate(values), launch, Arithmetic.of(recipe), device)
                for _ in range(2):  # the second forward begins where the first has ended
                    logits, features[placement] = teacher(images)
                kept = parameter_counts(teacher)
                with_logits = logits is not None
            equal = all(torch.equal(features["replicated"][tap], features["fsdp2"][tap]) for tap in taps)
            found[f"{name}, {'logits' if with_logits else 'stops after its last tap'}"] = {"equal": equal, "kept": kept}
        halved = {}
        for weights_dtype in ("fp32", "bf16"):
            values["train"]["precision"], values["teacher"]["weights_dtype"] = "bf16", weights_dtype
            teacher = build_teacher(recipe := validate(values), launch, Arithmetic.of(recipe), device)
            halved[weights_dtype] = teacher(images)[1]
        kept = sum(local_part(p).numel() * p.element_size() for p in teacher.parameters())
        difference = max(
            ((halved["bf16"][t].float() - halved["fp32"][t].float()).norm() / halved["fp32"][t].float().norm()).item()
            for t in taps
        )
        found[f"{name}, weights in bfloat16"] = {
            "attends": name == VIT,
            "equal": difference == 0,
            "difference": difference,
            "kept": (kept, 4 * parameter_counts(teacher)[1]),
        }
    return found


def checks_of_sharded_gradients(folder):
    """A NaN in one element of each shard in turn; a parameter with fewer rows than ranks leaves some without a part of
    it."""
    from torch.distributed.fsdp import fully_shard

    from dkd.engines.gradient_check import gradient_is_finite

    size, rank = dist.get_world_size(), dist.get_rank()
    model = torch.nn.Sequential(torch.nn.Linear(3, 4 * size), torch.nn.Linear(4 * size, 1))
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (size,)))
    answers = []
    for broken in (None, *range(size)):
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        if rank == broken:
            local_part(model[0].weight.grad)[-1, -1] = float("nan")
        answers.append(gradient_is_finite(model))
    return {"answers": answers}


def modes_of_the_student(folder, engine):
    """Whether BatchNorm trains, in training steps and in evaluations, across several evaluations."""
    seen = {"training": set(), "evaluation": set()}

    where = ["training"]

    class Watched(Trainer):
        def evaluate(self, *arguments):
            where[0] = "evaluation"
            try:
                return super().evaluate(*arguments)
            finally:
                where[0] = "training"

    with launched_as(engine):
        path = trainer_cases.images_on_disk(folder, "few.parquet", 96)
        changes = {"student": {"norm": "batch"}, "train": {"epochs": 3, "max_steps": None, "precision": "fp32"}}
        changes["data"] = {"train": path, "validation": path, "allow_same_images": True}
        recipe = trainer_cases.recipe_of(folder, f"modes_{engine}", {**changes, "losses": {"sp": None}})
        launch = Launch.read()
        check(recipe, launch)
        trainer = Watched.from_recipe(recipe, launch)
        (norm, *_) = [m for m in trainer.parts.engine.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        norm.register_forward_pre_hook(lambda module, inputs: seen[where[0]].add(module.training))
        trainer.fit()
    return {key: sorted(values) for key, values in seen.items()}


def images_without_labels(folder, engine):
    """What the last evaluation measures: agreement with the teacher, and neighbours of features of the moving average,
    which are read inside the forward of the student as the engine wraps it."""
    with launched_as(engine):
        changes = {
            "data": {"labels": False},
            "losses": {"ce": None, "sp": None},
            "train": {"max_steps": 3, "precision": "fp32", "ema": {"decay": 0.5}},
            "evaluation": {"batch": 100, "knn": {"train": "digits", "validation": "digits"}},
        }
        recipe = trainer_cases.recipe_of(folder, f"unlabelled_{engine}", changes)
        launch = Launch.read()
        check(recipe, launch)
        return Trainer.from_recipe(recipe, launch).fit().facts()


def another_engine_than_asked_for(folder):
    """FSDP2 is asked for, and Accelerate makes DDP of it, as it does on CPUs when left alone."""
    from contextlib import nullcontext
    from unittest import mock

    from dkd.config import RecipeError

    recipe = trainer_cases.recipe_of(folder, "other", {})
    with launched_as("fsdp2"), mock.patch.object(accelerated, "sharding_on_cpu", nullcontext):
        try:
            open_engine(recipe, Launch.read(), folder)
        except RecipeError as error:
            return {"message": str(error)}
    return {"message": "no error"}


def run(folder, case):
    """Run one case of any kind: a training, unless the case has a key of another kind."""
    if "evaluate" in case:
        return evaluate_student(folder / case["evaluate"], trust_code=True, teacher=True).result.facts()
    if "gradients" in case:
        return checks_of_sharded_gradients(folder)
    if "modes" in case:
        return modes_of_the_student(folder, case["modes"])
    if "unlabelled" in case:
        return images_without_labels(folder, case["unlabelled"])
    if "other" in case:
        return another_engine_than_asked_for(folder)
    if "features" in case:
        return features_of_teachers(folder)
    return train(folder, case)
