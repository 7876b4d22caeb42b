"""Start the processes that tests need: the one place that knows the command, the environment and the time limit.

`run` waits for a command, `Launch` leaves it in the background. `torchrun_command` and `accelerate_command` make the
commands that start ranks. Cases on ranks share their launches: tests/distributed/harness.
"""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# `make test-all` asks for long trainings; the claims of most are made in the first steps already, or not at all.
LONG = os.environ.get("DKD_TEST_LONG") == "1"
STEPS = 20 if LONG else 8

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CASES = TESTS / "distributed" / "cases"
# Where child processes find dkd, benchmarks, and the user code that recipes of tests name. For the test process itself:
# `pythonpath` in pyproject.toml.
PATHS = (ROOT, TESTS / "support", TESTS / "distributed" / "harness", CASES)
DKD = (sys.executable, "-m", "dkd")
# Holds, in the environment of every process of a launch, which launch it belongs to.
MARK = "DKD_TEST_LAUNCH"
_numbers = itertools.count()


@functools.cache
def slowness():
    """Return how many times as long as on an idle machine of 2020 something takes here and now, other work included.

    It is measured once, at the start of a session; child processes are given the number.
    """
    if "DKD_TEST_SLOWNESS" in os.environ:
        return float(os.environ["DKD_TEST_SLOWNESS"])
    begun = time.perf_counter()
    total = 0
    for number in range(1_000_000):
        total += number * number
    return max(1.0, (time.perf_counter() - begun) / 0.08)


def limit(seconds):
    """Return the seconds after which a process that should take a tenth of `seconds` is taken to hang.

    It is never a measure of speed.
    """
    return seconds * max(2.0, 2 * slowness())


def pause(seconds):
    """Return the seconds to wait for what tests wait for on purpose, such as a rank that is to be given up: longer on a
    slow machine."""
    return seconds * slowness()


def child_environment(**more):
    """Return the environment of a process that a test starts: one thread, no GPU, this checkout's modules.

    Args:
        more: further variables; None leaves a variable as it is here.
    """
    inherited = os.environ.get("PYTHONPATH")
    given = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *([inherited] if inherited else [])]),
        "DKD_TEST_SLOWNESS": f"{slowness():.3g}",
        **more,
    }
    return {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}


def torchrun_command(processes, *words):
    """Return the command that starts `processes` ranks of this machine by torchrun.

    Args:
        words: options of torchrun; then a script, or -m and a module; then its arguments.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *words]


def accelerate_command(processes, *words, file=ROOT / "launch" / "accelerate" / "cpu.yaml", port=0):
    """Return the command that starts `processes` ranks by `accelerate launch`, under the engine of a launch file.

    Args:
        words: options of `accelerate launch`; then a script, or -m and a module; then its arguments.
        port: where the ranks meet; 0 takes a free one, on one machine only.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    return [*launcher, "--num_processes", processes, "--main_process_port", port, *words]


def run(command, seconds=300, *, check=True, cwd=ROOT, **variables):
    """Run a command to its end and return its result, with stdout and stderr as text.

    Args:
        command: words.
        seconds: the time limit on an idle machine.
        check: whether a failure of the command is one of the test; it shows what the command printed.
        variables: of the environment, beyond `child_environment`.
    """
    with Launch(command, subprocess.PIPE, cwd=cwd, stderr=subprocess.PIPE, **variables) as launch:
        out, err = launch.process.communicate(timeout=limit(seconds))
    assert not check or launch.process.returncode == 0, out[-3000:] + err[-6000:]
    return subprocess.CompletedProcess(launch.process.args, launch.process.returncode, out, err)


class Launch:
    """A command in the background, in a session of its own; nothing that it started outlives the `with` block.

    Args:
        command: words.
        log: the file to which its output is appended, or subprocess.PIPE.
        cwd: its working directory.
        stdin, stderr: as subprocess.Popen takes them.
        variables: of the environment, beyond `child_environment`.
    """

    def __init__(self, command, log, *, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, **variables):
        self.mark = f"{os.getpid()}-{next(_numbers)}"
        self.log = None if log == subprocess.PIPE else Path(log)
        self._file = None if self.log is None else self.log.open("a")
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env=child_environment(**variables, **{MARK: self.mark}),
            stdin=stdin,
            stdout=self._file or subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()
        for stream in (self._file, self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def said(self):
        """Return the output so far."""
        return self.log.read_text(errors="replace") if self.log is not None and self.log.is_file() else ""

    def wait(self, seconds):
        """Return the exit code, within that time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()[-4000:]}") from None

    def end(self):
        """Kill every process of this launch, ranks whose launcher has died and ranks in other sessions included."""
        for pid in _processes():
            if _environment_of(pid).get(MARK) == self.mark:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self.process.wait(30)


def until(condition, seconds, launch=None):
    """Wait until `condition` returns something true, and return that.

    Raises:
        AssertionError: it was not true within that time, or before the end of `launch`.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        ended = launch is not None and launch.process.poll() is not None
        if ended or time.monotonic() > end:
            value = condition()
            if value:
                return value
            why = f"the launch ended with {launch.process.returncode}" if ended else f"not within {seconds} s"
            raise AssertionError(f"{why}: {launch.said()[-4000:] if launch else ''}")
        time.sleep(0.1)
    return value


def ranks(run_dir):
    """Return rank -> pid of the processes that train in `run_dir`, without their workers."""
    found = {}
    for pid in _processes():
        variables = _environment_of(pid)
        if "RANK" in variables and str(run_dir) in _command_of(pid) and "RANK" not in _environment_of(_parent_of(pid)):
            found[int(variables["RANK"])] = pid
    return found


def _processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment_of(pid):
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return {}
    return dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries if entry)


def _command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
