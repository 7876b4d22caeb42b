"""Everything that one GPU is needed for, without a person: checks, the speed of a step, accuracy. Results go to
docs/results/.

    make gpu-day                                                   all of it, but what needs a folder
    make gpu-day DAY='--data cifar10 --peer ../mdistiller'         and the table of CIFAR-10, and a peer's step
    python -m benchmarks.gpu_day --minutes 9                       as much as 9 minutes allow; again: the rest
    python -m benchmarks.gpu_day --only speed                      slices whose name begins so
    python -m benchmarks.gpu_day --again speed-64                  a slice that has a result already
    python -m benchmarks.gpu_day --rehearse --out DIR              on CPUs, tiny: shows that this script works

The day is cut into slices of at most 9 minutes, the most telling ones first. A slice that has ended leaves a file, and
is left out by the next start; one that was cut off is started again, and trainings resume. The page of results is
written again after each slice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 540
"""Seconds of a slice."""
_STOPPING = 40
"""Seconds that a slice has to stop after it was asked to: a training writes a checkpoint."""
ROWS = ("none", "kd", "at", "sp_global", "at_kd", "dist", "dkd", "pkt", "crd")


@dataclass(frozen=True)
class Slice:
    """Hold a part of the day.

    Args:
        name: of its file.
        command: arguments of this Python.
        about: what it shows, for people.
        variables: of its environment.
    """

    name: str
    command: Sequence[str]
    about: str
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """Hold what has become of a slice."""

    name: str
    about: str
    command: str
    state: str
    """`passed`, `failed` or `cut off`."""
    seconds: float
    began: str
    """Date and time, UTC."""
    commit: str
    numbers: dict[str, Any]
    tail: str
    """The end of its output."""


def _tests(name: str, file: str, words: str, about: str, rehearse: bool) -> Slice:
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", "gpu", "-rfEs", "-s", "-q"]
    variables = {"DKD_REHEARSE_GPU": "1"} if rehearse else {}
    return Slice(name, [*command, f"tests/distributed/{file}", *(["-k", words] if words else [])], about, variables)


def _speed(name: str, words: Sequence[str], about: str, options: argparse.Namespace, peer: bool = False) -> Slice:
    out = ["--json", str(options.out / f"{name}.numbers.json")]
    beside = ["--peer", str(options.peer)] if peer and options.peer else []
    short = ["--rounds", "1", "--steps", "1", "--batch", "4", "--rows", "plain", "a graph"] if options.rehearse else []
    return Slice(name, ["-m", "benchmarks.step", *words, *beside, *out, *short], about)


def slices(options: argparse.Namespace) -> list[Slice]:
    """Return the parts of the day, in their order."""
    ours, one = "test_gpu_step.py", "test_one_gpu.py"
    rehearse = options.rehearse
    resnet = ["--teacher", "torchvision/resnet34", "--student", "torchvision/resnet18", "--size", "224"]
    found = [
        _tests("hashes", one, "equal_forwards", "100 equal forwards and gradients, hashed", rehearse),
        _tests("step", ours, "", "graphs, waits, images on the GPU, copies to the host", rehearse),
        _speed("speed-64", ["--batch", "64"], "WRN-16-2 → WRN-16-1, batch 64", options, peer=True),
        _speed("speed-128", ["--batch", "128"], "WRN-16-2 → WRN-16-1, batch 128", options, peer=True),
        _speed("speed-224", [*resnet, "--batch", "256"], "ResNet-34 → ResNet-18 at 224, batch 256", options),
        _tests("ranks-check", one, "launch_check or refused", "launch-check of two ranks on one GPU", rehearse),
        _tests("ranks-losses", one, "formulas or products or features", "losses of relations under NCCL", rehearse),
        _tests("ranks-stream", one, "stream", "the teacher on a stream of its own, 2 ranks", rehearse),
        _tests("ranks-engines", one, "plain_loop", "every engine on 2 ranks, DDP on 4, under NCCL", rehearse),
        _tests("ranks-killed", one, "killed", "a killed rank; a run of 2 ranks that 4 finish", rehearse),
        _tests("ranks-suspended", one, "suspended", "a suspended rank", rehearse),
        _tests("ranks-memory", one, "memory", "one rank's memory is full", rehearse),
    ]
    if not rehearse:
        found.append(_tests("engines", "test_gpu.py", "", "every engine on one process beside the plain loop", False))
    if options.data is not None:
        found.append(_table(options))
    return found


def _table(options: argparse.Namespace) -> Slice:
    """Return the trainings of the CIFAR-10 table, as graphs: batches are not cut into micro-batches."""
    command = ["-m", "benchmarks.cifar10_short", "--data", str(options.data.resolve()), "--rows", *ROWS]
    command += ["--seeds", str(options.seeds), "--jobs", str(options.jobs), "--output", str(options.out / "cifar10")]
    command += ["--set", "train.micro_batch=null", "train.graph=true", *options.set]
    if options.rehearse:
        command += ["train.max_steps=2"]
    return Slice("table", command, f"CIFAR-10, 20 epochs, {options.seeds} seeds")


def take(part: Slice, options: argparse.Namespace, seconds: float) -> Result:
    """Run a slice, and stop it when its time is over."""
    log = options.out / f"{part.name}.log"
    began, started = time.strftime("%Y-%m-%d %H:%M", time.gmtime()), time.monotonic()
    environment = {**os.environ, **part.variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        state = "passed"
        try:
            state = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "cut off"
            _stop(process)
    text = log.read_text(errors="replace")
    command = " ".join(["python", *part.command])
    spent = time.monotonic() - started
    return Result(
        part.name, part.about, command, state, spent, began, _commit(), _numbers(part, options, text), text[-4000:]
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask all processes of a slice to stop, and end those that do not."""
    for asked, patience in ((signal.SIGTERM, _STOPPING), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, asked)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _numbers(part: Slice, options: argparse.Namespace, text: str) -> dict[str, Any]:
    """Return what a slice has measured, or how many of its checks passed."""
    written = options.out / f"{part.name}.numbers.json"
    if written.exists():
        found: dict[str, Any] = json.loads(written.read_text())
        written.unlink()
        return found
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    printed = re.findall(r"^deterministic .*$", text, re.MULTILINE)
    return {**counts, **({"failures": failures} if failures else {}), **({"printed": printed} if printed else {})}


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "no git"


def card() -> str:
    """Return the name of the GPU, or of the CPU where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Return what the results depend on."""
    facts = {"card": card(), "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        facts |= {
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return facts


def page(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """Return the page of results, in Markdown."""
    lines = [f"# {facts['card']}", "", ", ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += ["| slice | what | when | commit | state | numbers |", "|---|---|---|---|---|---|"]
    for result in results:
        counts = ", ".join(f"{n} {word}" for word, n in result.numbers.items() if isinstance(n, int))
        took = f"{result.state}, {result.seconds:.0f} s"
        lines.append(f"| {result.name} | {result.about} | {result.began} | {result.commit} | {took} | {counts} |")
    for result in results:
        seconds = result.numbers.get("seconds")
        if not seconds:
            continue
        batch = int(re.search(r"batch (\d+)", result.numbers["what"]).group(1))  # type: ignore[union-attr]
        peer = next((s for title, s in seconds.items() if title.startswith("mdistiller")), None)
        lines += [
            "",
            f"## {result.numbers['what']}",
            "",
            "| | ms | images/s | times mdistiller's AT |",
            "|---|---|---|---|",
        ]
        for title, each in seconds.items():
            times = f"{peer / each:.1f}" if peer else ""
            lines.append(f"| {title.strip()} | {1e3 * each:.2f} | {batch / each:,.0f} | {times} |")
    for result in results:
        if result.numbers.get("failures") or result.state == "failed":
            names = "\n".join(result.numbers.get("failures", []))
            lines += ["", f"## {result.name}: failed", "", "```", names, result.tail[-1500:].strip(), "```"]
        elif result.numbers.get("printed"):
            lines += ["", f"## {result.name}", "", *(f"    {line}" for line in result.numbers["printed"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not options.rehearse:
        print("there is no GPU: nothing is run; --rehearse runs it on CPUs, tiny", file=sys.stderr)
        return 2
    until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    parts = [part for part in slices(options) if not options.only or part.name.startswith(tuple(options.only))]
    missing = 0
    for part in parts:
        path = options.out / f"{part.name}.json"
        if path.exists() and part.name not in options.again and json.loads(path.read_text())["state"] != "cut off":
            continue
        left = min(LONGEST, until - time.monotonic() - _STOPPING)
        if left < 20:
            missing += 1
            continue
        print(f"{part.name}: {part.about} …", flush=True)
        result = take(part, options, left)
        path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
        print(f"{part.name}: {result.state} after {result.seconds:.0f} s  {_short(result)}", flush=True)
        missing += result.state == "cut off"
        write_page(options)
    write_page(options)
    if missing:
        print(f"{missing} slices are left: the same command continues with them")
    print(f"results: {options.out}")
    return 0


def _short(result: Result) -> str:
    seconds = result.numbers.get("seconds", {})
    if seconds:
        return ", ".join(f"{title.strip()} {1e3 * each:.2f} ms" for title, each in seconds.items())
    return ", ".join(f"{n} {word}" for word, n in result.numbers.items() if isinstance(n, int))


def write_page(options: argparse.Namespace) -> None:
    """Write the page of all results in the folder."""
    order = [part.name for part in slices(options)]
    found = [Result(**json.loads(path.read_text())) for path in options.out.glob("*.json") if path.stem in order]
    found.sort(key=lambda result: order.index(result.name))
    (options.out / "README.md").write_text(page(found, versions()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = re.sub(r"[^a-z0-9]+", "-", card().lower()).strip("-")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results" / f"gpu-{name}", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="begin nothing that would run longer than this in all")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="slices whose name begins so")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="slices that have results already")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's train-*.parquet and test-*.parquet")
    parser.add_argument("--seeds", type=int, default=5, help="of the table (default 5)")
    parser.add_argument("--jobs", type=int, default=4, help="trainings of the table at a time (default 4)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="further keys of the table's recipes")
    parser.add_argument("--peer", type=Path, help="a checkout of mdistiller, whose step is timed beside")
    parser.add_argument("--rehearse", action="store_true", help="on CPUs, tiny")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    raise SystemExit(main())
