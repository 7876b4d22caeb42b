"""Trainings of a hundred steps with and without a graph, and what has become of them."""

import json

import yaml

from dkd.cli import main

AT = {"beta": 10, "pairs": [["layer1", "layer1"]], "resize": "map"}
VARIANTS = {
    "sgd, a schedule of rates and of a loss weight, clipping": {
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "losses": {
            "kd": {"alpha": {"schedule": "linear", "start": 0.9, "end": 0.1}},
            "sp": {"gamma": 3, "reference_batch": 32, "pairs": [["layer3", "layer3"]]},
        },
        "train": {"clip_grad_norm": 0.5},
    },
    "adamw, an averaged student, mixed images": {
        "optimizer": {"name": "adamw", "lr": 1.0e-3},
        "train": {"ema": {"decay": 0.9}},
        "data": {"mixup": 0.2, "cutmix": 1.0},
        "losses": {"kd": {"alpha": 0.5}, "at": AT},
    },
    "bf16, images on the device": {
        "train": {"precision": "bf16"},
        "data": {"in_memory": "device"},
        "losses": {"kd": {"alpha": 0.5}, "at": AT},
    },
}


def recipe(folder, graph, variant, steps=100, deterministic=False):
    values = {
        "run": {"dir": str(folder), "trackers": [], "deterministic": deterministic},
        "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
        "student": {"name": "small_models:Regularized"},
        "teacher": {"name": "resnet8", "weights": "random"},
        "train": {"global_batch": 32, "epochs": 4, "max_steps": steps, "precision": "fp32", "graph": graph},
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
        "schedule": {"name": "constant"},
        "checkpoint": {"every_steps": 45},
        "evaluation": {"every_epochs": 1},
    }
    for section, changes in VARIANTS[variant].items():
        kept = {} if section == "optimizer" else values.get(section, {})
        values[section] = {**kept, **changes}
    return values


def train(folder, graph, variant, *more, steps=100, deterministic=False):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder / "run", graph, variant, steps, deterministic)))
    assert main(["train", str(folder / "recipe.yaml"), "--allow-recipe-change", *more]) == 0


def outcome(folder):
    """Every number of every step and evaluation but clocks, and the finished student."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    clocks = ("images_per_second", "data_wait", "seconds")
    kept = [{k: v for k, v in line.items() if k not in clocks} for line in lines if "step" in line]
    return kept, (folder / "run" / "student.safetensors").read_bytes()
