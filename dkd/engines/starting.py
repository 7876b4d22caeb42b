"""Start the ranks of a launch on this machine, in place of `accelerate launch`: by the same code and the same files of
launch/accelerate/, with one line in place of a traceback, the ranks' own exit code, and signals that stop a run after a
checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dkd import console, files, machine
from dkd.engines.arithmetic import has_gpu
from dkd.errors import InputError
from dkd.launch import keep_deepspeed_on_cpu, share_cores
from dkd.text import first_line

ENGINES = ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3")
"""Names of the files of launch/accelerate/."""
INTERRUPTED = 130
"""Exit code after SIGINT, as in shells."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LOOK_EVERY = 0.2  # seconds between looks for a signal, and for the end of the ranks
_ASK_EVERY = 2.0  # seconds between two requests to stop


def devices() -> int:
    """Return the number of processes that this machine trains on by default: one for each GPU; 1 where there is
    none."""
    return torch.accelerator.device_count() if has_gpu() else 1


_KINDS = ("MULTI_GPU", "FSDP", "DEEPSPEED")
"""Kinds of launches in Accelerate's files that start several ranks."""


def engine_file(engine: str) -> Path:
    """Return Accelerate's configuration file of an engine.

    Args:
        engine: one of ENGINES, for dkd's own file, or the path of another one.

    Raises:
        InputError: there is no such file.
    """
    if engine in ENGINES:
        return files.folder("launch") / "accelerate" / f"{engine}.yaml"
    if not Path(engine).is_file():
        raise InputError(f"--engine {engine}: no such file; take one of {', '.join(ENGINES)}, or a YAML file")
    return Path(engine)


def check_processes(processes: int, engine: str) -> None:
    """Check that each process has a device of its own. Raises InputError."""
    found = devices()
    if has_gpu() and engine != "cpu" and processes > found:
        raise InputError(
            f"-n {processes}: this machine has {found} GPU{'s' if found > 1 else ''}, and each process needs one; take "
            f"-n {found}, or --engine cpu"
        )


def run_ranks(arguments: Sequence[str], processes: int, engine: str, max_restarts: int = 0) -> int:
    """Start the processes of a launch on this machine, and return their exit code when all of them have ended: 0; else
    that of the first that failed, or 1 when a signal has ended it. Call it in the main thread.

    A signal that asks to stop (SIGINT, SIGTERM, SIGHUP, SIGUSR1) is passed on to the ranks, which stop after a
    checkpoint. A second SIGINT ends them at once, and this process with them. Ranks whose launcher is killed stop by
    themselves, as under torchrun.

    Args:
        arguments: of `dkd`, on every rank: a command and its arguments.
        processes: their number.
        engine: as for `engine_file`.
        max_restarts: how often all ranks start again when one of them fails.

    Raises:
        InputError: there is no such engine, or not a device for each process.
    """
    file = engine_file(engine)
    check_processes(processes, engine)
    # Without GPUs, ranks share the cores; with them, the main thread of each feeds one.
    share_cores(1 if has_gpu() and engine != "cpu" else max(1, machine.cores() // processes))
    if not has_gpu():
        keep_deepspeed_on_cpu()
    words = ["--config_file", str(file), "--num_processes", str(processes), "--max_restarts", str(max_restarts)]
    words += ["--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0"]
    if engine in ENGINES:
        deepspeed = file.parents[1] / "deepspeed" / f"{engine}.json"
        if deepspeed.is_file():  # which the launch file names relative to another folder
            words += ["--deepspeed_config_file", str(deepspeed)]
    else:
        _check_file(file)
    return _supervise(lambda: _launch([*words, "-m", "dkd", *arguments]))


def _check_file(file: Path) -> None:
    """Check that a file is one of Accelerate that starts ranks. Raises InputError."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--engine {str(file)!r} cannot be read: {first_line(error)}") from error
    kind = str(values.get("distributed_type", "")).upper() if isinstance(values, dict) else ""
    if kind not in _KINDS:
        found = f"its distributed_type is {kind or 'missing'}" if isinstance(values, dict) else "it holds no keys"
        raise InputError(
            f"--engine {str(file)!r} is no configuration of Accelerate that starts ranks: {found}, not one of "
            f"{', '.join(_KINDS)}"
        )


def _launch(words: Sequence[str]) -> None:
    """Do what `accelerate launch` does with these words, on a free port. Raises ChildFailedError, and what Accelerate
    raises for a configuration file that it does not take."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(list(words))
    # torchrun's --standalone and --local-addr, which Accelerate passes on and has no options for: the ranks meet at a
    # port that nothing else can take meanwhile, and under an address that needs no name service.
    arguments.standalone, arguments.local_addr = True, "127.0.0.1"
    launch_command(arguments)


def _supervise(start: Callable[[], None]) -> int:
    """Call `start` in a thread, pass signals on to the processes that it starts, and return the exit code.

    In a thread, since torch's launcher would take the signals in the main thread: it passes SIGINT on, which ends a
    rank without a checkpoint, and kills ranks that take longer than 30 s.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            start()
        except BaseException as error:
            raised.append(error)

    with _silent_launcher(), _signals() as asked:
        thread = threading.Thread(target=work, name="launcher", daemon=True)
        thread.start()
        next_request = 0.0
        while thread.is_alive():
            thread.join(_LOOK_EVERY)
            if asked and time.monotonic() >= next_request:
                if next_request == 0.0:
                    _say_that_ranks_stop(asked[0])
                # Again and again: torch's launcher may be starting a rank just now.
                _ask_ranks(signal.SIGTERM if asked[0] == signal.SIGINT else asked[0])
                next_request = time.monotonic() + _ASK_EVERY
            if asked.count(signal.SIGINT) > 1:
                _end_ranks()
    return _exit_code(raised[0] if raised else None, asked)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Inside, signals that ask to stop are noted in the list, and do nothing else."""
    asked: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    # Started by nohup, the run is to outlive its terminal.
    taken = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, note) for each in taken}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _silent_launcher() -> Iterator[None]:
    """Inside, torch's launcher logs nothing: what a rank has printed stays the last line, and `_exit_code` reports
    which rank a signal has ended."""
    import torch.distributed.run  # noqa: F401 (its loggers get their levels now)

    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _say_that_ranks_stop(by: signal.Signals) -> None:
    again = "; Ctrl-C again ends them at once" if by == signal.SIGINT else ""
    console.say(f"dkd: asked to stop by {by.name}: the ranks stop after a checkpoint{again}")


def _ranks() -> list[int]:
    """Return the numbers of the processes that this one has started."""
    import psutil  # Accelerate needs it, too

    return [process.pid for process in psutil.Process().children()]


def _ask_ranks(number: signal.Signals) -> None:
    for pid in _ranks():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _end_ranks() -> None:
    """End the ranks with all that they have started, and this process."""
    for pid in _ranks():
        try:
            os.killpg(pid, signal.SIGKILL)  # torch's launcher gives each rank a session of its own
        except (ProcessLookupError, PermissionError):
            continue
    console.say("dkd: interrupted; files that were written stay")
    os._exit(INTERRUPTED)


def _exit_code(error: BaseException | None, asked: Sequence[signal.Signals]) -> int:
    """Return the exit code of a launch. Raises the error when it is none of a rank."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if error is None:
        return 0
    if isinstance(error, subprocess.CalledProcessError):  # of a file that asks for no launcher of several ranks
        return max(1, error.returncode)
    if isinstance(error, ValueError | ImportError):  # Accelerate's, before anything is started
        raise InputError(f"Accelerate does not take the file of --engine: {error}") from error
    if not isinstance(error, ChildFailedError):
        raise error
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    if asked:
        console.say(
            "dkd: the ranks were stopped before they could write a checkpoint; the same command starts them again"
        )
        return INTERRUPTED if asked[0] == signal.SIGINT else 1
    why = " (as the system does when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
    console.say(f"dkd: rank {rank} was ended by {failure.signal_name()}{why}; the same command resumes the run")
    return 1
