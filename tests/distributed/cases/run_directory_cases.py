"""What becomes of a run directory that two ranks do not see alike. Each case returns what this rank came to."""

import json
import re
import shutil
import threading
from unittest import mock

import torch.distributed as dist

from dkd.checkpoints import checkpointer, tensors
from dkd.config import RecipeError
from dkd.config.loading import validate
from dkd.engines.accelerated import forget_settings
from dkd.errors import TrainingError
from dkd.launch import Launch
from dkd.preflight.check import check
from dkd.training import resume
from dkd.training.trainer import Trainer


def recipe_of(run, steps=3):
    return validate(
        {
            "run": {"dir": str(run), "trackers": [], "start_timeout": 60},
            "data": {
                "train": "digits",
                "validation": "digits",
                "classes": 10,
                "transforms": "digits",
                "image_size": 8,
                "workers": 0,
            },
            "student": {"name": "small_models:Regularized", "norm": None},
            "train": {"global_batch": 32, "epochs": 1, "max_steps": steps, "precision": "fp32", "channels_last": False},
            "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
            "schedule": {"name": "constant"},
            "checkpoint": {"every_steps": 1},
        }
    )


def trainer_of(run, steps=3, allow_recipe_change=False):
    forget_settings()
    recipe, launch = recipe_of(run, steps), Launch.read()
    check(recipe, launch, allow_recipe_change=allow_recipe_change)
    return Acting.from_recipe(recipe, launch, allow_recipe_change=allow_recipe_change)


class Acting(Trainer):
    """Calls `before_step` between steps, when all ranks are together and nothing is being written."""

    def train_step(self):
        self.parts.checkpointer.wait()
        dist.barrier()
        self.before_step(self.state.step)
        dist.barrier()
        return super().train_step()


def errors_of(trainer, before_step=lambda number: None):
    """Run; returns the error of each checkpoint on this rank, and how the run ended."""
    checkpointer, errors = trainer.parts.checkpointer, {}
    finished = checkpointer.finished

    def noted():
        results = finished()
        errors.update({str(result.step): result.error for result in results})
        return results

    checkpointer.finished, trainer.before_step = noted, before_step
    try:
        trainer.fit()
    except TrainingError as error:
        return {"errors": errors, "ended": str(error)}
    return {"errors": errors}


def late_file(folder):
    """Rank 0 sees what rank 1 has written a while after it was written."""
    save = checkpointer.save_tensors

    def hidden_for_a_while(path, values, group):
        save(path, values, group)
        if dist.get_rank() == 0:
            (file,) = path.glob("__1_*.distcp")
            hidden = file.rename(path.parent.parent / f"hidden_{path.parent.name}")
            threading.Timer(0.5, lambda: hidden.rename(file)).start()

    with mock.patch.object(checkpointer, "save_tensors", hidden_for_a_while):
        return errors_of(trainer_of(folder / "late"))


def late_at_resume(folder):
    """Rank 1 does not see the files of the checkpoint when it first looks for them."""
    errors_of(trainer_of(folder / "resumed", steps=2))
    read, looks = tensors.read_metadata, []

    def not_at_first(path):
        looks.append(path)
        if dist.get_rank() == 1 and len(looks) <= 2:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path)

    with mock.patch.object(tensors, "read_metadata", not_at_first):
        trainer = trainer_of(folder / "resumed", 3, allow_recipe_change=True)
    errors_of(trainer)
    return {"first_step": trainer.state.first_step}


def refused(run):
    try:
        with mock.patch.object(resume, "LOOK_AGAIN_SECONDS", 0.2):
            return errors_of(trainer_of(run))
    except RecipeError as error:
        return {"refused": re.sub(r"/[^']*rank \d", "RUN", str(error))}


def private_folder(folder):
    return refused(folder / f"of rank {dist.get_rank()}")


def private_copy(folder):
    """Rank 1 has a copy of an older start."""
    run = folder / f"copy of rank {dist.get_rank()}"
    if dist.get_rank() == 0:
        for rank in (0, 1):
            shutil.copytree(folder / "late", folder / f"copy of rank {rank}")
    dist.barrier()
    return refused(run)


def private_checkpoints(folder):
    """The file system of rank 1 is gone, before its third step."""
    trainer = trainer_of(folder / "private")
    trainer.parts.checkpointer.patience = 0.2

    def leave(number):
        if number == 2 and dist.get_rank() == 1:
            trainer.parts.checkpointer.folder.path = folder / "elsewhere"

    return without_paths(errors_of(trainer, leave), folder)


def moved(folder):
    def move(number):
        if number == 2 and dist.get_rank() == 0:
            (folder / "moved").rename(folder / "there")

    return without_paths(errors_of(trainer_of(folder / "moved"), move), folder)


def without_paths(result, folder):
    return json.loads(json.dumps(result).replace(str(folder), "FOLDER"))


CASES = [late_file, late_at_resume, private_folder, private_copy, private_checkpoints, moved]
