"""What a teacher's cache saves: seconds of a step with the live teacher, with a cache that is filled, and with one that
is read; bytes on the disk against the formula; and one teacher with five students.

    python -m benchmarks.teach_once                      both pairs, 1 process, and WRN on 2: about 10 minutes
    python -m benchmarks.teach_once --pairs wrn --rounds 10
    python -m benchmarks.teach_once --json found.json    the numbers, too
    python -m benchmarks.teach_once --students           five students of one teacher, live and from the cache

    wrn   WRN-40-2 → WRN-16-2, 32×32, AT on three taps, SP and KD, batches of 64 digits
    vit   ViT-B/16 → ResNet-18, 224 px, AT on one tap and KD, batches of 16 random images, 64 in all

Each row is the trainer's own step in float32, built from a recipe; random weights, nothing is downloaded. The rows
take their steps in turn, in another order in each round. Ratios are medians over rounds. "from memory" is the step that
reads a cache, and is given the same tensors by a dictionary: what reading costs is the difference. "student alone" has
no teacher and cross-entropy alone: less a step cannot take. What `dkd teach` has stored is what the rows read, on 2
processes, too. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.taught_students import study
from dkd.config import Recipe
from dkd.config.loading import validate
from dkd.teacher_cache import StepCache, Value
from dkd.teacher_cache.index import EpochIndex

PERIOD = 2
"""Epochs that `dkd teach` stores, and that the rows which read repeat."""
LIVE, FILLED, READ, MEMORY = "live teacher", "cache being filled", "cache read", "the same, from memory"
ALONE = "student without teacher"


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and how they are compared."""

    title: str
    teacher: str
    student: str
    classes: int
    data: dict[str, Any]
    losses: dict[str, Any]
    batch: int
    aim: float


_BLOCKS = [[block, block] for block in ("block1", "block2", "block3")]
PAIRS = {
    "wrn": Pair(
        "WRN-40-2 → WRN-16-2, 32 px, batch 64",
        "wrn_40_2",
        "wrn_16_2",
        10,
        {"train": "digits", "transforms": "cifar"},
        {
            "at": {"beta": 1000, "pairs": _BLOCKS},
            "sp": {"gamma": 3000, "reference_batch": 64, "pairs": _BLOCKS[-1:]},
            "kd": {"alpha": 0.9},
        },
        64,
        1.7,
    ),
    "vit": Pair(
        "ViT-B/16 → ResNet-18, 224 px, batch 16",
        "torchvision/vit_b_16",
        "torchvision/resnet18",
        1000,
        {"train": "python:benchmarks.teach_once:random_images", "transforms": "imagenet"},
        {
            "at": {"beta": 1000, "class_tokens": 1, "pairs": [["layer3", "encoder.layers.encoder_layer_11"]]},
            "kd": {"alpha": 0.9},
        },
        16,
        3.0,
    ),
}


class RandomImages:
    """Images of random pixels, in memory."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count)
        self._pixels = np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._pixels[index], int(self.labels[index])


def random_images(training: bool) -> RandomImages:
    """The data of the pair `vit`: the recipe names this function."""
    return RandomImages(64)


def recipe_of(
    pair: Pair, folder: Path, name: str, cache: str | None, period: int | None, is_taught: bool = True
) -> Recipe:
    """Return the recipe of a row.

    Args:
        folder: of the weights, the runs and the caches.
        name: of the run.
        cache: the folder of the cache, in `folder`.
        period: data.augmentation_period.
        is_taught: whether there is a teacher.
    """
    weights = str(folder / f"{pair.teacher.replace('/', '-')}.safetensors")
    teacher = {"name": pair.teacher, "weights": weights, "cache": None if cache is None else str(folder / cache)}
    data = {"validation": None, "classes": pair.classes, "augmentation_period": period}
    return validate(
        {
            "run": {"dir": str(folder / name), "trackers": []},
            "data": {**pair.data, **data},
            "student": {"name": pair.student},
            "teacher": teacher if is_taught else None,
            "losses": pair.losses if is_taught else {},
            "train": {"global_batch": pair.batch, "epochs": 1000, "precision": "fp32"},
            "optimizer": {"name": "sgd", "lr": 0.01, "nesterov": True},
            "schedule": {"name": "constant"},
        }
    )


class Clock:
    """Adds up the seconds in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def around(self, owner: object, *names: str) -> None:
        """Measure methods of an object; one that another one of them calls counts once."""
        for name in names:
            setattr(owner, name, self._measured(getattr(owner, name)))

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, begun = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside, self.seconds = False, self.seconds + time.perf_counter() - begun

        return measured


class FromMemory:
    """Stands in the place of a StepCache: gives the numbers of the stored steps, which it has read before."""

    writer = None

    def __init__(self, cache: StepCache, units: dict[str, tuple[Value, int]], steps: int) -> None:
        self._slot, self.read_steps, self.computed_steps = 0, 0, 0
        self._numbers: dict[tuple[int, str, int], torch.Tensor] = {}
        for step in range(steps):
            assert cache.begin(step), f"step {step + 1} is not stored"
            for value, count in units.values():
                for unit in range(count):
                    self._numbers[step, value.id, unit] = cache.numbers(value, unit).clone()
        self._steps = steps
        cache.close()

    def begin(self, step: int) -> bool:
        self._slot = step % self._steps
        self.read_steps += 1
        return True

    def numbers(self, value: Value, unit: int = 0) -> torch.Tensor:
        return self._numbers[self._slot, value.id, unit]

    def confirm(self, steps: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Row:
    """One way to a teacher's outputs: a trainer that takes steps."""

    def __init__(self, title: str, recipe: Recipe) -> None:
        from dkd.engines.accelerated import forget_settings
        from dkd.training.trainer import Trainer

        self.title, self.seconds = title, list[float]()
        self.rounds: list[float] = []
        forget_settings()
        self.trainer = Trainer.from_recipe(recipe, if_run_exists="replace")
        stored: Any = self.trainer.parts.step.teaching.stored.get("")  # None: it has no cache
        self.stored = stored
        if title == MEMORY:
            units = {need.value.id: (need.value, len(need.units)) for need in self.stored.reads.needs()}
            steps = PERIOD * self.trainer.parts.schedule.steps_per_epoch
            self.stored.cache = FromMemory(self.stored.cache, units, steps)
        self.clock = Clock()
        if title == READ:
            self.clock.around(self.stored, "begin", "outputs", "relations")
            self.clock.around(self.stored.cache, "confirm")
        elif title == FILLED:
            self.clock.around(self.stored, "begin")
            self.clock.around(self.stored.cache, "put", "confirm", "flush")
        self.trainer.load_images(10**6)

    def take(self, steps: int) -> None:
        """Take the steps of a round."""
        before = len(self.seconds)
        for _ in range(steps):
            begun = time.perf_counter()
            self.trainer.after_step(self.trainer.train_step())
            self.seconds.append(time.perf_counter() - begun)
        self.rounds.append(sum(self.seconds[before:]))

    def forget(self) -> None:
        """Leave out what was measured until now."""
        self.seconds, self.rounds, self.clock.seconds = [], [], 0.0

    def check(self) -> None:
        """End where the steps were not what the title says."""
        cache = None if self.stored is None else self.stored.cache
        steps = (0, 0) if cache is None else (cache.read_steps > 0, cache.computed_steps > 0)
        wanted = {LIVE: (0, 0), ALONE: (0, 0), FILLED: (0, 1)}.get(self.title, (1, 0))
        if steps != wanted:
            sys.exit(f"{self.title}: steps were read and computed: {steps}, not {wanted}")


def in_turn(rows: list[Row], rounds: int, steps: int) -> None:
    """Let the rows take their steps in turn, after some that do not count."""
    for row in rows:
        row.take(3)
        row.forget()
    for number in range(rounds):
        first = number % len(rows)
        for row in rows[first:] + rows[:first]:
            row.take(steps)
    for row in rows:
        row.check()


def ratios(row: Row, other: Row) -> list[float]:
    """Return how many times as long as another a row takes: quartiles over the rounds."""
    each = [mine / theirs for mine, theirs in zip(row.rounds, other.rounds, strict=True)]
    return quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3


def same_students(rows: list[Row]) -> bool:
    """Return whether the students of rows that saw the same images are equal to the last bit."""
    states = [row.trainer.parts.engine.model.state_dict() for row in rows]
    return all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


def fill(pair: Pair, folder: Path) -> dict[str, float]:
    """Store PERIOD epochs as `dkd teach` does, and return what it took."""
    from dkd.engines.accelerated import forget_settings
    from dkd.launch import Launch
    from dkd.training.teach import Filling

    forget_settings()
    filling = Filling(recipe_of(pair, folder, "teach", "taught", PERIOD), Launch.read())
    begun = time.perf_counter()
    filled = filling.run()
    images = filled.computed * pair.batch
    return {"images": images, "fill_seconds_an_image": (time.perf_counter() - begun) / images}


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of the tensors in the parts of a cache, as their headers state them, and those of the files."""
    tensors, files = 0, 0
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        tensors += sum(end - begin for begin, end in spans)
        files += path.stat().st_size
    return {"tensors": tensors, "files": files}


def thread_seconds(row: Row) -> float:
    """Return the seconds a step that the thread which reads spends: files and digests of the stored steps."""
    cache, schedule = row.stored.cache, row.trainer.parts.schedule
    batch = row.trainer.parts.recipe.train.global_batch
    taken = []
    for epoch in range(PERIOD):
        wanted = [
            {
                need.value: [(step * batch + offset, rows) for unit in need.units for offset, rows in unit]
                for need in row.stored.reads.needs()
            }
            for step in range(schedule.steps_per_epoch)
        ]
        begun = time.perf_counter()
        index = EpochIndex(cache.folder, epoch)
        index.look()
        found = index.read(wanted)
        taken.append(time.perf_counter() - begun)
        assert None not in found
    return sum(taken) / (PERIOD * schedule.steps_per_epoch)


def measure(pair: Pair, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a pair on one process."""
    found: dict[str, Any] = {"pair": pair.title, "processes": 1, "aim": pair.aim, **fill(pair, folder)}
    rows = [
        Row(LIVE, recipe_of(pair, folder, "live", None, PERIOD)),
        Row(FILLED, recipe_of(pair, folder, "filled", "filled", None)),
        Row(READ, recipe_of(pair, folder, "read", "taught", PERIOD)),
        Row(MEMORY, recipe_of(pair, folder, "memory", "taught", PERIOD)),
        Row(ALONE, recipe_of(pair, folder, "alone", None, PERIOD, is_taught=False)),
    ]
    live, filled, read, memory, _ = rows
    in_turn(rows, options.rounds, options.steps)
    begun = time.perf_counter()
    filled.trainer.parts.caches.flush()
    taken = len(filled.seconds)
    flush = (time.perf_counter() - begun) / taken
    step = median(live.seconds)
    found |= {"ms": {row.title: 1e3 * median(row.seconds) for row in rows}, "live_by_read": ratios(live, read)}
    found |= {
        # What is written at the end would be written while training continues; here all of it counts.
        "fill_overhead": ratios(filled, live)[1] - 1 + flush / step,
        "fill_own_share": filled.clock.seconds / taken / step,
        "read_by_memory": ratios(read, memory)[1] - 1,
        "read_own_share": read.clock.seconds / sum(read.seconds),
        "thread_share": thread_seconds(read) / median(read.seconds),
        "same_students": same_students([live, read, memory]),
    }
    sizes = stored_bytes(folder / "taught")
    found |= {
        "bytes_an_image": sizes["tensors"] / found["images"],
        "formula": read.stored.reads.bytes_per_sample(),
        "headers": sizes["files"] / sizes["tensors"] - 1,
    }
    for row in rows:
        row.trainer.close()
    return found


def worker(options: argparse.Namespace) -> None:
    """One of several ranks: live against read. Rank 0 writes what was found."""
    from dkd.engines.accelerated import leave_process_group

    torch.set_num_threads(1)
    pair, folder = PAIRS[options.pairs[0]], Path(options.worker)
    world = int(os.environ["WORLD_SIZE"])
    live = Row(LIVE, recipe_of(pair, folder, f"live{world}", None, PERIOD))
    read = Row(READ, recipe_of(pair, folder, f"read{world}", "taught", PERIOD))
    in_turn([live, read], options.rounds, options.steps)
    if int(os.environ["RANK"]) == 0:
        found = {
            "pair": pair.title,
            "processes": world,
            "aim": pair.aim,
            "ms": {row.title: 1e3 * median(row.seconds) for row in (live, read)},
            "live_by_read": ratios(live, read),
            "read_own_share": read.clock.seconds / sum(read.seconds),
            "same_students": same_students([live, read]),
        }
        (folder / "found.json").write_text(json.dumps(found))
    for row in (live, read):
        row.trainer.close()
    leave_process_group()


def on_several(pair: str, folder: Path, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a pair on several processes, which read what one has stored."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "benchmarks.teach_once", "--worker", str(folder), "--pairs", pair]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a measurement failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def write_weights(pair: Pair, folder: Path) -> None:
    from safetensors.torch import save_file

    from dkd.models import ModelSpec, build_model

    torch.manual_seed(0)
    path = folder / f"{pair.teacher.replace('/', '-')}.safetensors"
    save_file(build_model(ModelSpec(pair.teacher, pair.classes)).state_dict(), path)


def cpu() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(found: list[dict[str, Any]]) -> None:
    """Print the tables."""
    titles = {LIVE: "live", FILLED: "being filled", READ: "read", MEMORY: "from memory", ALONE: "student alone"}
    columns = " | ".join(f"{title}, ms" for title in titles.values())
    print(f"\n| pair | processes | {columns} | live/read (quartiles) | aim |")
    print("|---" * (len(titles) + 4) + "|")
    for each in found:
        times = " | ".join(f"{each['ms'][title]:.0f}" if title in each["ms"] else "" for title in titles)
        low, middle, high = each["live_by_read"]
        speed = f"{middle:.2f} ({low:.2f} … {high:.2f})"
        print(f"| {each['pair']} | {each['processes']} | {times} | {speed} | {each['aim']} |")
    whole = [SimpleNamespace(**each) for each in found if "formula" in each]
    print("\n| | " + " | ".join(each.pair for each in whole) + " |")
    print("|---|" + "---|" * len(whole))
    lines: dict[str, Callable[[Any], str]] = {
        "filling: step against the live one": lambda each: f"{100 * each.fill_overhead:+.1f} %",
        "filling: in the cache's calls, of a live step": lambda each: f"{100 * each.fill_own_share:.1f} %",
        "reading: step against memory": lambda each: f"{100 * each.read_by_memory:+.1f} %",
        "reading: in the cache's calls, of a step": lambda each: f"{100 * each.read_own_share:.1f} %",
        "reading: files and digests, in its thread, of a step": lambda each: f"{100 * each.thread_share:.1f} %",
        "bytes an image and epoch, by the formula": lambda each: f"{each.formula:,}",
        "bytes an image and epoch, in the files": lambda each: f"{each.bytes_an_image:,.2f}",
        "headers of the files": lambda each: f"+{100 * each.headers:.1f} %",
        "dkd teach, an image": lambda each: f"{1e3 * each.fill_seconds_an_image:.2f} ms",
        "students equal bit for bit": lambda each: "yes" if each.same_students else "NO",
    }
    for title, line in lines.items():
        print(f"| {title} | " + " | ".join(map(line, whole)) + " |")


def main() -> int:
    """Measure, print the tables, and return 1 where bytes or students are not what they must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--rounds", type=int, help="rounds (default: wrn 60, vit 12)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a row in a round (default 2)")
    parser.add_argument("--processes", type=int, default=2, metavar="W", help="processes of the last row (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--students", action="store_true", help="five students of one teacher, live and from the cache")
    parser.add_argument("--epochs", type=int, default=6, help="--students: epochs of each (default 6)")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("dkd").setLevel(logging.ERROR)
    if options.worker:
        worker(options)
        return 0
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    if options.students:
        return study(options.epochs, options.json)
    found = []
    rounds = options.rounds
    for name in options.pairs:
        options.rounds = rounds or (60 if name == "wrn" else 12)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_weights(PAIRS[name], folder)
            found.append(measure(PAIRS[name], folder, options))
            if name == "wrn" and options.processes > 1:
                found.append(on_several(name, folder, options.processes, options))
    show(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    wrong = [each for each in found if not each["same_students"] or each.get("bytes_an_image") != each.get("formula")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
