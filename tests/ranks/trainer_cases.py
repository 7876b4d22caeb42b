"""The trainer's own loop on this launch."""

import json

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from dkd.config.loading import validate
from dkd.models import weights_fingerprint
from dkd.training import preflight
from dkd.training.trainer import Trainer, TrainingError

STEPS = 20
RECIPE = {
    "run": {"name": "parity", "seed": 3, "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8", "norm": "group"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {
        "at": {"beta": 100, "pairs": [["layer1", "block1"], ["layer2", "block2"], ["layer3", "block3"]]},
        "sp": {"gamma": 3000, "reference_batch": 128, "pairs": [["layer3", "block3"]]},
        "kd": {"alpha": {"start": 0.9, "end": 0.1}, "temperature": 4},
    },
    "train": {"global_batch": 32, "epochs": 1, "max_steps": STEPS, "precision": "fp64"},
    "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "schedule": {"name": "cosine", "warmup_epochs": 0.2},
}


def train(folder, name, changes, tamper=lambda trainer: None):
    """Run the recipe with `changes` (section -> keys); returns logged lines, evaluation and the final state.

    `tamper` may break the trainer before it runs.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    values = {**RECIPE, **{key: {**RECIPE[key], **value} if key != "optimizer" else value for key, value in changes.items()}}
    values["run"] = {**values["run"], "name": name, "dir": str(folder / name)}
    recipe = validate(values)
    # Accelerate keeps its settings for the life of a process; each case here is a launch of its own.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    preflight.check(recipe, overwrite=False)
    trainer = Trainer(recipe)
    teacher_before = weights_fingerprint(trainer.teacher) if trainer.teacher is not None else None
    tamper(trainer)
    result = trainer.run()
    state = trainer.accelerator.unwrap_model(trainer.student).state_dict()
    if world > 1:
        dist.barrier()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [line for line in lines if "step" in line],
        "evaluation": result.facts(),
        "state": {key: value.double().flatten()[:64].tolist() for key, value in state.items()},
        "fingerprint": weights_fingerprint(trainer.accelerator.unwrap_model(trainer.student)),
        "teacher_unchanged": teacher_before == (weights_fingerprint(trainer.teacher) if trainer.teacher is not None else None),
        "teacher_trains": any(m.training for m in trainer.teacher.modules()) if trainer.teacher is not None else False,
    }


def all_four_losses(folder):
    return train(folder, "all_four_losses", {})


BATCH_NORM = {
    "student": {"norm": "batch"},
    "losses": {"at": RECIPE["losses"]["at"], "sp": None, "kd": RECIPE["losses"]["kd"]},
    "train": {"micro_batch": 8},
}


def batch_norm_with_fixed_micro_batches(folder):
    return train(folder, "batch_norm", BATCH_NORM)


def averaged_weights_and_clipped_gradients(folder):
    changes = {**BATCH_NORM, "train": {"micro_batch": 8, "max_steps": 6, "clip_grad_norm": 1.0, "ema": {"decay": 0.5}}}
    return train(folder, "averaged", changes)


def adamw_and_bf16_and_worker_processes(folder):
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "decay_norm_and_bias": False}
    return train(
        folder,
        "adamw",
        {
            "data": {"workers": 1},
            "optimizer": optimizer,
            "train": {"max_steps": 4, "precision": "bf16"},
        },
    )


def a_loss_that_is_not_finite_on_one_rank_ends_all_ranks(folder):
    """The last rank's loss becomes NaN in the third step."""

    def tamper(trainer):
        objective, last = trainer.objective, trainer.order.rank == trainer.order.world_size - 1

        class Broken:
            terms, names = objective.terms, objective.names

            def __call__(self, *args, step, **kwargs):
                total, values = objective(*args, step=step, **kwargs)
                return (total * float("nan"), values) if last and step == 2 else (total, values)

        trainer.objective = Broken()

    try:
        train(folder, "broken", {}, tamper)
    except TrainingError as error:
        return str(error)
    return "no error"


CASES = [
    all_four_losses,
    batch_norm_with_fixed_micro_batches,
    averaged_weights_and_clipped_gradients,
    adamw_and_bf16_and_worker_processes,
    a_loss_that_is_not_finite_on_one_rank_ends_all_ranks,
]
