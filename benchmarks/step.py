"""The distillation step: images a second with each option, and where the time goes.

    python -m benchmarks.step                       wrn_16_2 → wrn_16_1, batch 64, 32×32
    python -m benchmarks.step --teacher wrn_40_2 --student wrn_16_2
    python -m benchmarks.step --no-compile          without the compiled rows, which take a minute to compile on a CPU
    python -m benchmarks.step --teacher torchvision/resnet34 --student torchvision/resnet18 --size 224
    python -m benchmarks.step --rows defaults graph rows whose title has one of these words
    python -m benchmarks.step --peer ../mdistiller  its step beside, from a checkout

One process. Each row is the trainer's own step (data, teacher, student, losses, backward, optimizer), built from a
recipe. The rows are measured in turn, several rounds, and the median of each is shown; the last column is against the
first row of the same round. A GPU is waited for at the end of a round, and not in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.peer_step import PeerRow

TAPS = {"wrn": ["block1", "block2", "block3"], "res": ["layer1", "layer2", "layer3"]}
ONE_BY_ONE = "each layer casts its weights"
"""No key of a recipe: in the place of one cast of all of them, where that is the default."""
PLAIN = {"train.precision": "fp32", "train.channels_last": False}


def taps_of(name: str) -> list[str]:
    """Return the taps of a model by the beginning of its name, without its library's."""
    return TAPS[name.rpartition("/")[2][:3]]


def recipe_values(options: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    pairs = [list(pair) for pair in zip(taps_of(options.student), taps_of(options.teacher), strict=True)]
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "train": "digits",
            "validation": "digits",
            "classes": 10,
            "transforms": "cifar",
            "image_size": options.size,
        },
        "student": {"name": options.student},
        "teacher": {"name": options.teacher, "weights": str(folder / "teacher.safetensors")},
        "losses": {
            "at": {"beta": 1000, "pairs": pairs},
            "sp": {"gamma": 3000, "reference_batch": 64, "pairs": pairs[-1:]},
            "kd": {"alpha": 0.9},
        },
        "train": {"global_batch": options.batch, "epochs": 1000},
        "optimizer": {"name": "sgd", "lr": 0.01, "nesterov": True},
        "schedule": {"name": "constant"},
    }
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return values


class Row:
    """One setting of the trainer, ready to take steps."""

    def __init__(
        self, title: str, options: argparse.Namespace, folder: Path, settings: dict[str, Any], loads: bool = True
    ) -> None:
        from dkd.config.loading import validate
        from dkd.engines.accelerated import forget_settings
        from dkd.training.trainer import Trainer

        self.title, self.batch = title, options.batch
        settings = dict(settings)
        one_by_one = settings.pop(ONE_BY_ONE, False)
        forget_settings()
        recipe = validate(recipe_values(options, folder, settings))
        self.trainer = Trainer.from_recipe(recipe, if_run_exists="replace")
        self.device = self.trainer.parts.engine.device
        if one_by_one:
            self.trainer.parts.engine.model.cast_together(False)
        if loads:
            self.trainer.load_images(10**9 // options.batch)

    def take(self, steps: int) -> list[float]:
        """Take steps, and return the seconds of each, which are equal: a GPU computes while the host continues."""
        started = time.perf_counter()
        for _ in range(steps):
            self.trainer.after_step(self.trainer.train_step())
        _synchronize(self.device)
        return [(time.perf_counter() - started) / steps] * steps


def forward_only(row: Row) -> list[float]:
    """Return the seconds of the teacher's forward alone."""
    step = row.trainer.parts.step
    assert step.teacher is not None
    pixels = next(row.trainer.parts.data.train_loader.steps(0, 1)).images.to(row.device)
    images = step.forward.images(pixels)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        step.teacher(images)
        _synchronize(row.device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def shares(row: Row, steps: int) -> dict[str, float]:
    """Return the shares of the step's time in data, teacher, losses (their backward is the student's), and the student
    with backward and optimizer."""
    step, spent = row.trainer.parts.step, {"teacher": 0.0, "losses": 0.0}
    objective = step.objective

    class Clocked:
        """Adds the seconds of its calls to a part."""

        def __init__(self, called: Any, part: str) -> None:
            self._called, self._part = called, part

        def __getattr__(self, name: str) -> Any:
            return getattr(self._called, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            _synchronize(row.device)
            started = time.perf_counter()
            result = self._called(*args, **kwargs)
            _synchronize(row.device)
            spent[self._part] += time.perf_counter() - started
            return result

    forward_teacher = step.forward.teacher
    step.forward.teacher = Clocked(forward_teacher, "teacher")  # type: ignore[method-assign]
    step.objective = Clocked(step.objective, "losses")  # type: ignore[assignment]
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        waited += float(row.trainer.train_step().counts["seconds_waited"])
    _synchronize(row.device)
    total = time.perf_counter() - started
    step.forward.teacher = forward_teacher  # type: ignore[method-assign]
    step.objective = objective
    found = {"data": waited / total, **{part: seconds / total for part, seconds in spent.items()}}
    return {**found, "student": 1 - sum(found.values())}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_teacher(options: argparse.Namespace, folder: Path) -> None:
    from dkd.models import ModelSpec, build_model

    save_file(build_model(ModelSpec(options.teacher, 10)).state_dict(), folder / "teacher.safetensors")


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of what is trained: models, images of a step and their size."""
    parser.add_argument("--teacher", default="wrn_16_2")
    parser.add_argument("--student", default="wrn_16_1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default 32)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD", help="rows whose title has one of these words")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of mdistiller, whose step is timed beside")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians of all rows there, in seconds")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="measure torch.compile too"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    np.random.seed(0)

    no_teacher: dict[str, Any] = {"teacher": None, "losses": {}}
    no_kd: dict[str, Any] = {"losses.kd": None}
    at_alone: dict[str, Any] = {"losses.kd": None, "losses.sp": None}
    settings: dict[str, dict[str, Any]] = {
        "distillation, plain float32": PLAIN,
        "  + channels_last": {**PLAIN, "train.channels_last": True},
        "  + bf16": {**PLAIN, "train.precision": "bf16"},
        "  + both": {"train.precision": "bf16", "train.channels_last": True},
        "the defaults": {},
        "  no KD: teacher stops at last tap": no_kd,
        "  a teacher's stream": {"train.teacher_stream": True},
        "  a graph": {"train.graph": True},
        "AT alone, float32": {**PLAIN, **at_alone},
        "AT alone, defaults": at_alone,
        "AT alone, defaults, a graph": {**at_alone, "train.graph": True},
        "student alone, plain float32": {**no_teacher, **PLAIN},
        "student alone, defaults": no_teacher,
    }
    if options.compile:
        settings["  compiled teacher"] = {"train.compile": {"teacher": True}}
        settings["  compiled teacher and losses"] = {"train.compile": {"teacher": True, "losses": True}}
        settings["  compiled teacher, student, losses"] = {
            "train.compile": {"teacher": True, "student": True, "losses": True}
        }
        if torch.cuda.is_available():
            settings["  each layer casts its weights"] = {ONE_BY_ONE: True}
            settings["  all compiled, a graph"] = {
                "train.compile": {"teacher": True, "student": True, "losses": True},
                "train.graph": True,
            }
    settings = {t: s for t, s in settings.items() if not options.rows or any(word in t for word in options.rows)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_teacher(options, folder)
        rows: list[Any] = [Row(title, options, folder, setting) for title, setting in settings.items()]
        device = rows[0].device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} CPU threads"
        what = f"{options.teacher} → {options.student}, batch {options.batch}, {options.size}×{options.size}"
        print(f"{what}, {where}, torch {torch.__version__}")
        if options.peer is not None:
            rows.append(PeerRow(options.peer, options.teacher, options.student, options.batch, device))
        found = measure(rows, options)
        if options.json is not None:
            facts = {"what": what, "where": where, "torch": torch.__version__, "seconds": found}
            options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        if not options.rows:
            show_parts(rows, list(settings), options)
    return 0


def measure(rows: list[Any], options: argparse.Namespace) -> dict[str, float]:
    """Measure all rows in turn, print a table, and return the median seconds of a step by title."""
    on_gpu = rows[0].device.type == "cuda"
    # The first steps of a start report more than later ones, and a graph is captured after them.
    warm = {row.title: row.take(30 if on_gpu else 2)[-1] for row in rows}
    seconds: dict[str, list[float]] = {row.title: [] for row in rows}
    for _ in range(options.rounds):
        for row in rows:
            # A row that is many times slower than the first shows it in one step: bfloat16 where the CPU emulates it.
            steps = 1 if warm[row.title] > 5 * warm[rows[0].title] else options.steps
            seconds[row.title].append(median(row.take(50 if on_gpu else steps)))
    first = seconds[rows[0].title]
    print(f"{'':<48}{'ms':>8}{'images/s':>10}{'× first':>9}")
    for row in rows:
        mine = seconds[row.title]
        ratio = median(a / b for a, b in zip(first, mine, strict=True))
        print(f"{row.title:<48}{1e3 * median(mine):>8.1f}{options.batch / median(mine):>10.0f}{ratio:>9.2f}")
    return {title: median(times) for title, times in seconds.items()}


def show_parts(rows: list[Any], titles: list[str], options: argparse.Namespace) -> None:
    """Print what was chosen for the hardware, and where the time of a step goes."""
    defaults = rows[titles.index("the defaults")]
    print("\n".join(f"the defaults: {note}" for note in defaults.trainer.parts.notes))
    stops = rows[titles.index("the defaults") + 1]
    for title, row in (("plain float32", rows[0]), ("defaults", defaults), ("defaults, stops at last tap", stops)):
        alone = median(forward_only(row))
        print(f"teacher's forward alone, {title:<23}{1e3 * alone:>8.0f}{options.batch / alone:>10.0f}")
    for title, row in (("plain float32", rows[0]), ("defaults", defaults)):
        parts = ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares(row, options.steps).items())
        print(f"share of the step, {title}: {parts} (student: with backward and optimizer)")


if __name__ == "__main__":
    raise SystemExit(main())
