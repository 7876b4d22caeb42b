"""Trainings that are interrupted and go on, on this launch. What each returns: its logged lines, its final weights, the
images it saw."""

import hashlib
import json
import resource
from contextlib import contextmanager, nullcontext
from unittest import mock

import plain_trained
import torch
import torch.distributed as dist
import trainer_cases
from engine_cases import launched_as
from launched import pause

from dkd.checkpoints import CheckpointError, checkpointer
from dkd.checkpoints.tensors import load_tensors, saved_tensors
from dkd.engines.sharded_weights import local_part
from dkd.launch import Launch
from dkd.models.weights import read_file
from dkd.preflight.check import check
from dkd.training.trainer import Trainer

TIMINGS = ("images_per_second", "data_wait", "seconds")
MIXED = {"mixup": 0.4, "cutmix": 1.0}
MODELS = {
    "plain": {},
    "awkward": {"student": {"name": "small_models:Awkward", "norm": None}, "losses": {"at": None, "kd": None}},
    # Everything that has a state or draws random numbers.
    "regularized": {
        "student": {"name": "small_models:Regularized", "norm": None},
        "data": MIXED,
        "train": {"ema": {"decay": 0.9}},
    },
    # What recipes of long trainings use.
    "strong": {
        "student": {"name": "small_models:Regularized", "norm": None},
        "data": {**MIXED, "repeated_augmentation": 4, "train_image_size": {0: 12, 1: 16}},
        "losses": {"ce": None, "bce": {"label_smoothing": 0.1, "target_threshold": 0.2}},
        "train": {"clip_grad_norm": 1.0, "ema": {"decay": 0.9}},
    },
    # Adapters, one of them with BatchNorm, banks, a queue, and measured statistics of the teacher.
    "trained": {
        "train": {"ema": {"decay": 0.9}},
        "losses": {
            **plain_trained.LOSSES,
            "fitnet": {**plain_trained.LOSSES["fitnet"], "teacher_norm": "standardize", "measured_images": 40},
        },
    },
}


class Interrupted(Exception):
    pass


def train(folder, case):
    """Train in FOLDER/run as a case says, once for each of its `interruptions`: the step before which training stops,
    or None."""
    for until in case["interruptions"]:  # the step that does not come about
        with launched_as(case["engine"]):
            recipe = recipe_of(folder, case)
            launch = Launch.read()
            check(recipe, launch)
            trainer = Interruptible.from_recipe(recipe, launch)
            log_images(trainer, folder / f"{case['run']}_images_{launch.rank}.jsonl")
            with one_rank_does_not_write(launch.rank, case.get("absent")):
                finished = run_until(trainer, until, case.get("full_disk"))
            if finished:
                assert_copies(trainer)
        if dist.is_initialized():
            dist.barrier()
    return described(folder, case, finished)


@contextmanager
def one_rank_does_not_write(rank, absent):
    """`absent`: that rank stays away from the writing of one checkpoint, for which the others wait in vain."""
    save = checkpointer.save_tensors

    def stays_away(folder, tensors, group):
        if folder.parent.name == f"writing_{absent['step']:08d}" and rank == absent["rank"]:
            raise CheckpointError("stayed away")
        save(folder, tensors, group)

    with mock.patch.object(checkpointer, "save_tensors", stays_away) if absent else nullcontext():
        yield


def recipe_of(folder, case):
    model = MODELS[case["model"]]
    changes = {
        **model,
        "losses": {**trainer_cases.with_strategy("gather"), **model.get("losses", {})},
        "data": {**model.get("data", {}), "workers": case["workers"]},
        "train": {
            **model.get("train", {}),
            "global_batch": 32,
            "micro_batch": case["micro_batch"],
            "epochs": 1,
            "max_steps": 12,
            "precision": case["precision"],
            "channels_last": False,
        },
        "checkpoint": {"every_steps": 3, "keep_last": 2, **case.get("checkpoint", {})},
        "optimizer": case["optimizer"],
    }
    # An epoch of 5 steps: interruptions fall on its end, before and after it.
    changes["data"] |= {
        "train": str(folder / "few.parquet"),
        "streaming": case.get("streaming", False),
        "stream_lanes": 16,
    }
    changes["data"] |= {"shuffle_window": 16, "validation": str(folder / "few.parquet"), "allow_same_images": True}
    changes["data"]["in_memory"] = False
    changes["train"]["epochs"] = 3
    if "absent" in case:
        changes["run"] = {"start_timeout": pause(3)}
    return trainer_cases.recipe_of(folder, case["run"], changes)


class Interruptible(Trainer):
    """Stops before step `until`, as a killed process would; one of the ranks may meet a full disk."""

    until, full_disk = None, None

    def train_step(self):
        number, saver = self.state.step, self.parts.saver
        full = self.full_disk
        if full is not None and self.parts.launch.rank in full["ranks"] and number in (full["from"], full["to"]):
            self.parts.checkpointer.wait()
            # Files of this process cannot grow beyond 30 kB: a checkpoint's cannot be written, as on a full disk.
            limit = 30_000 if number == full["from"] else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if self.until is not None and number >= self.until:
            # With a line of metrics that the test counts; when it is written is a matter of timing.
            saver.wait()
            raise Interrupted
        return super().train_step()


def run_until(trainer, until, full_disk=None):
    trainer.until, trainer.full_disk = until, full_disk
    try:
        trainer.fit()
    except Interrupted:
        # A real process would be gone; what the thread still writes must not meet the next one.
        trainer.parts.checkpointer.wait()
        return False
    return True


def assert_copies(trainer):
    """What is being written must not change when training continues: weights, buffers, optimizer and average are all
    overwritten here."""
    collected = trainer.state_dict()["tensors"]
    before = {name: local_part(tensor).clone() for name, tensor in collected.items()}
    engine, average = trainer.parts.engine, trainer.parts.average
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = [value for values in getattr(optimizer, "optimizer", optimizer).state.values() for value in values.values()]
    averages = [tensor for _, _, tensor in average.named()] if average else []
    with torch.no_grad():
        for tensor in [*map(local_part, engine.model.parameters()), *engine.model.buffers(), *state, *averages]:
            if isinstance(tensor, torch.Tensor):
                local_part(tensor).fill_(7)
    assert all(torch.equal(local_part(collected[name]), tensor) for name, tensor in before.items())


def log_images(trainer, path):
    """Of each image of each step: its place in the global batch, its label and what was made of it."""
    loader, sampler = trainer.parts.data.train_loader, trainer.parts.data.sampler
    load = loader.steps

    def logged(first, last):
        with path.open("a") as file:
            for number, batch in enumerate(load(first, last)):
                step, micro_step = first + number // sampler.micro_steps, number % sampler.micro_steps
                start = (micro_step * sampler.world_size + sampler.rank) * sampler.micro_batch
                for place, (image, label) in enumerate(zip(batch.images, batch.labels, strict=True)):
                    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]
                    file.write(json.dumps([step, start + place, int(label), digest]) + "\n")
                file.flush()
                yield batch

    loader.steps = logged


def kept_by_losses(run):
    """Adapters, banks, queue and statistics in the newest checkpoint, by name, whole."""
    folder = max((run / "checkpoints").glob("step_*")) / "training"
    names = {
        name: torch.zeros(saved.shape, dtype=saved.dtype)
        for name, saved in saved_tensors(folder).items()
        if name.startswith(("loss/", "model/losses/"))
    }
    load_tensors(folder, names, None)
    return names


def described(folder, case, finished):
    run = folder / case["run"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in TIMINGS:
            line.pop(key, None)
    if dist.is_initialized() and dist.get_rank() > 0:
        return {}
    images = {}
    for path in sorted(folder.glob(f"{case['run']}_images_*.jsonl")):
        for step, place, *image in map(json.loads, path.read_text().splitlines()):
            assert images.setdefault(f"{step} {place}", image) == image  # computed again: the same image again
    written = [line["checkpoint"] for line in lines if "checkpoint" in line]
    values = {"written": [[line["step"], line["error"]] for line in written]}
    values["starts"] = [start["step"] for start in json.loads((run / "provenance.json").read_text())]
    values |= {
        "steps": [line for line in lines if "step" in line],
        "evaluations": [line for line in lines if "evaluation" in line],
    }
    values |= {
        "images": images,
        "finished": finished,
        "checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir()),
    }
    if finished:
        state = read_file(run / "student.safetensors")
        values["sha256"] = hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest()
        values["state"] = {key: value.double().flatten().tolist() for key, value in state.items()}
        values["kept"] = {key: value.double().flatten().tolist() for key, value in kept_by_losses(run).items()}
    return values
