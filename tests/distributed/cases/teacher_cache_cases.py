"""Trainings with a teacher's cache on this launch: what each returns must be the same, live, filled or read."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch.distributed as dist
import trainer_cases
from engine_cases import launched_as

from dkd.distillation import LazyTeacher
from dkd.launch import Launch
from dkd.preflight.check import check
from dkd.teacher_cache.index import EpochIndex
from dkd.training.teach import Filling
from dkd.training.trainer import Trainer

TIMINGS = ("images_per_second", "data_wait", "seconds")


def recipe_of(folder, case):
    teacher = {"placement": case.get("placement", "replicated")}
    if case.get("cache"):
        teacher["cache"] = {"dir": case["cache"]}
    losses = {**trainer_cases.with_strategy("auto"), **case.get("losses", {})}
    train = {"micro_batch": case["micro_batch"], "precision": "fp32", "channels_last": False, "max_steps": 6}
    changes = {
        "teacher": teacher,
        "losses": losses,
        "train": train,
        "data": {"workers": 0, **case.get("data", {})},
        "student": {"norm": "batch"},
        "evaluation": {"agreement": False},
    }
    return trainer_cases.recipe_of(folder, case["run"], changes)


def train(folder, case):
    """Return the student's SHA-256, the logged lines, and how many steps were read and computed."""
    with launched_as(case["engine"]), sees_nothing_at(case.get("blind_rank")):
        recipe, launch = recipe_of(folder, case), Launch.read()
        check(recipe, launch)
        trainer = Trainer.from_recipe(recipe, launch)
        trainer.fit()
    if dist.is_initialized():
        dist.barrier()
    run, teacher = folder / case["run"], trainer.parts.step.teacher
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    caches = [each.cache for each in trainer.parts.step.teaching.stored.values()]
    return {
        "sha256": hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest(),
        "lines": [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if "ce" in line],
        "read": [cache.read_steps for cache in caches],
        "computed": [cache.computed_steps for cache in caches],
        "built": not isinstance(teacher, LazyTeacher) or teacher.is_built,
    }


def sees_nothing_at(rank):
    """One rank sees no part of the cache, as on a file system that shows files late."""
    if rank is None or dist.get_rank() != rank:
        return nullcontext()
    return mock.patch.object(EpochIndex, "look", return_value=None)


def teach(folder, case):
    """Fill the cache without a student."""
    with launched_as(case["engine"]):
        filled = Filling(recipe_of(folder, case), Launch.read()).run()
    if dist.is_initialized():
        dist.barrier()
    return {"computed": filled.computed, "found": filled.found}


def damage(folder, case):
    """Flip a byte near the end of one part that rank 0 has written."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = sorted(Path(case["cache"]).rglob("part_*"))[0]
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    if dist.is_initialized():
        dist.barrier()
