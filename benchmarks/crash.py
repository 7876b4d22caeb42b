"""Kills a rank of a training at random moments, starts the same command again, and compares the finished run with an
undisturbed one.

python -m benchmarks.crash                       20 trials, at least 5 of them while a checkpoint is being written
python -m benchmarks.crash --trials 3 --inside 1
python -m benchmarks.crash --cache               the same while each training fills a teacher's cache: the restart reads
                                                 what is there, and a third training reads all of it

Exits with 1 when a restart found no whole checkpoint, or a finished run differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
RECIPE = [
    "configs/quickstart.yaml", "teacher.weights=random", "train.precision=fp32", "run.trackers=[]",
    "train.max_steps=60", "evaluation.agreement=true",
    "checkpoint.every_steps=3", "train.ema={decay: 0.9}",
]  # fmt: skip
TIMINGS = ("images_per_second", "data_wait", "seconds")


def start(run: Path, log: Path, cache: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command += ["-m", "dkd", "train", *RECIPE, f"run.dir={run}"]
    command += [] if cache is None else [f"teacher.cache={cache}"]
    with log.open("a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def rank_processes(launcher: int) -> dict[int, int]:
    """Rank -> process id of what the launcher started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except (OSError, ValueError):
            continue  # it has ended
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(folder.name)
    return found


def result(run: Path) -> dict[str, Any]:
    """What must be equal: the weights, and everything logged but the clock's share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {key: value for key, value in line.items() if key not in TIMINGS} for line in lines if "checkpoint" not in line
    ]
    return {"sha256": hashlib.sha256((run / "student.safetensors").read_bytes()).hexdigest(), "lines": logged}


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum(line.startswith('{"step"') for line in path.read_text().splitlines()) if path.exists() else 0


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("writing_*"))


@dataclass
class Trial:
    rank: int
    step: int
    inside: bool
    resumed: str
    equal: bool
    parts: str = ""
    """Of a cache: parts that the killed training had written, and files that were being written."""


def wait_for(launcher: subprocess.Popen[bytes], condition: Any, seconds: float = 600) -> bool:
    """Until `condition()` holds; False when the launcher ends before."""
    until = time.monotonic() + seconds
    while not condition():
        if launcher.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.0005)
    return True


def trial(
    folder: Path,
    number: int,
    inside: bool,
    undisturbed: dict[str, Any],
    duration: float,
    draw: random.Random,
    with_cache: bool = False,
) -> Trial | None:
    """One training, killed once. None when it was over before the moment came."""
    run, log = folder / f"trial_{number}", folder / f"trial_{number}.log"
    cache = folder / f"cache_{number}" if with_cache else None
    launcher = start(run, log, cache)
    if not wait_for(launcher, lambda: any((run / "checkpoints").glob("step_*"))):
        raise SystemExit(f"the training did not start: see {log}")
    time.sleep(draw.uniform(0, 0.8 * duration))
    if inside:
        wait_for(launcher, lambda: not is_writing(run))
        wait_for(launcher, lambda: is_writing(run))
        time.sleep(draw.uniform(0, 0.05))
    rank = draw.randrange(PROCESSES)
    process = rank_processes(launcher.pid).get(rank)
    if process is None:
        launcher.wait()
        return None
    was_inside = is_writing(run)
    os.kill(process, signal.SIGKILL)
    was_inside = was_inside and is_writing(run)
    step = steps_logged(run)
    if launcher.wait(timeout=600) == 0:
        return None
    found = "" if cache is None else count_parts(cache)
    launcher = start(run, log, cache)
    code = launcher.wait(timeout=900)
    said = [line for line in log.read_text().splitlines() if line.startswith("resumed from")]
    resumed = said[-1].rpartition("/step_")[2].partition(",")[0].lstrip("0") if said else "nothing"
    equal = code == 0 and bool(said) and result(run) == undisturbed
    if cache is not None and equal:
        # Another training reads everything that the two have left.
        reading, log = folder / f"reading_{number}", folder / f"reading_{number}.log"
        equal = start(reading, log, cache).wait(timeout=900) == 0 and result(reading) == undisturbed
        equal = equal and "outputs are read from" in log.read_text()
    return Trial(rank, step, was_inside, resumed, equal, found)


def count_parts(cache: Path) -> str:
    """The parts of a cache, and the files that a killed process was writing."""
    written = list(cache.rglob("part_*")), list(cache.rglob(".writing_*"))
    return f"{len(written[0])} + {len(written[1])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="kills (default 20)")
    parser.add_argument(
        "--inside",
        type=int,
        metavar="N",
        help="at least so many while a checkpoint is being written (default a quarter)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--cache", action="store_true", help="fill a teacher's cache, and read it")
    options = parser.parse_args()
    inside = -(-options.trials // 4) if options.inside is None else options.inside
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="dkd_crash_") as name:
        folder = Path(name)
        launcher = start(folder / "undisturbed", folder / "undisturbed.log")
        wait_for(launcher, lambda: steps_logged(folder / "undisturbed") > 3)
        begun = time.monotonic()
        if launcher.wait(timeout=900) != 0:
            print((folder / "undisturbed.log").read_text()[-3000:], file=sys.stderr)
            return 1
        duration = time.monotonic() - begun
        undisturbed = result(folder / "undisturbed")
        print(
            f"undisturbed: {len(undisturbed['lines'])} lines, student {undisturbed['sha256'][:12]}; SIGKILL of one of "
            f"{PROCESSES} ranks:"
        )
        print(
            f"{'trial':>5} {'rank':>5} {'after step':>11} {'inside a checkpoint':>20} {'resumed from':>13}  finished "
            "run"
        )
        done: list[Trial] = []
        number = 0
        while len(done) < options.trials or sum(t.inside for t in done) < inside:
            number += 1
            if number > 3 * options.trials + 10:
                print("too many trainings were over before their moment came")
                return 1
            wanted = sum(t.inside for t in done) < inside
            tried = trial(folder, number, wanted, undisturbed, duration, draw, options.cache)
            if tried is None:
                continue
            done.append(tried)
            verdict = "equal" if tried.equal else f"DIFFERS: {(folder / f'trial_{number}.log').read_text()[-1500:]}"
            where = "yes" if tried.inside else "no"
            print(
                f"{len(done):>5} {tried.rank:>5} {tried.step:>11} {where:>20} {tried.resumed:>13}  {verdict}"
                + (f", {tried.parts} parts whole and unfinished" if options.cache else ""),
                flush=True,
            )
    wrong = [t for t in done if not t.equal]
    print(f"{len(done)} kills, {sum(t.inside for t in done)} inside a checkpoint, {len(wrong)} finished runs differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
