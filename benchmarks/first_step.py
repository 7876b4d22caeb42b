"""Time from one command to the first step of training, and where it goes.

    python -m benchmarks.first_step                 # a folder of 400 photographs
    python -m benchmarks.first_step --images 4000

A process of its own runs `dkd distill` for a ResNet-34 (random weights) that teaches a ResNet-18 on JPEG files of 256
pixels, and notes when each part ends. Files are in the page cache; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PARTS = (
    ("imports", "Python, torch and dkd are imported"),
    ("images", "the folder is listed, classes counted, some images decoded"),
    ("choices", "pairs of features: both models are built and run on meta tensors"),
    ("check", "the written recipe is checked, as dkd train checks it"),
    ("check again", "and checked at the start of the training"),
    ("start", "data, process group, hardware, models, checkpoint folder"),
    ("step", "the first step"),
)


def main() -> None:
    """Print the seconds of each part, of the fastest of several processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, metavar="N", help="photographs (default 400)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="processes (default 3)")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "BEGUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), float(options.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photos", options.images)
        runs = [_run(Path(folder)) for _ in range(options.repeats)]
    best = min(runs, key=lambda ends: ends["step"])
    before = 0.0
    print(f"{'part':<12} {'seconds':>7}  what happens")
    for name, what in PARTS:
        print(f"{name:<12} {best[name] - before:7.2f}  {what}")
        before = best[name]
    every = ", ".join(f"{ends['step']:.1f}" for ends in runs)
    print(f"{'all':<12} {before:7.2f}  (of {every})")


def write_photographs(folder: Path, count: int) -> None:
    """Write JPEG files of 256 pixels into FOLDER/CLASS, of four classes."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)


def _run(folder: Path) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.first_step", "--measure", str(folder), str(time.time())]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    ends: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return ends


def measure(folder: Path, begun: float) -> dict[str, float]:
    """Run `dkd distill` in this process, and return when each part ended, in seconds after the process was started."""
    import os

    import dkd.commands.new.choices as choices
    import dkd.commands.new.images as images
    import dkd.preflight.check as check
    from dkd.cli import main as dkd_main
    from dkd.training.trainer import Trainer

    ends: dict[str, float] = {}

    def note(name: str) -> None:
        ends.setdefault(name, time.time() - begun)

    def noting(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
        left = list(names)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if left:
                note(left.pop(0))
            return result

        return call

    note("imports")
    images.look_at = noting(images.look_at, "images")
    choices.choose = noting(choices.choose, "choices")
    check.check = noting(check.check, "check", "check again")
    Trainer.from_recipe = noting(Trainer.from_recipe, "start")  # type: ignore[method-assign]
    Trainer.train_step = noting(Trainer.train_step, "step")  # type: ignore[method-assign]
    os.chdir(folder)
    words = ["--teacher", "torchvision/resnet34=random", "--student", "torchvision/resnet18", "--data", "photos"]
    more = ["train.max_steps=1", "run.trackers=[]", "evaluation.agreement=false", "--validation", "none", "--force"]
    name = f"run{os.getpid()}"
    code = dkd_main(["distill", *words, *more, "--name", name])
    assert code == 0, code
    return ends


if __name__ == "__main__":
    main()
