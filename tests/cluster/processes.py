"""Launches in the background, their output, and the ranks they started, found by their environment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def environment(**more):
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **{key: str(value) for key, value in more.items()},
    }


class Launch:
    """A command in a session of its own, whose output goes to a file.

    Args:
        command: words.
        log: the file; appended to.
        more: of the environment.
    """

    def __init__(self, command, log, **more):
        self.log = Path(log)
        self._file = self.log.open("a")
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()
        self._file.close()

    def said(self):
        return self.log.read_text(errors="replace")

    def wait(self, seconds):
        """The exit code, within that time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()[-4000:]}") from None

    def end(self):
        """Nothing that it started outlives it: not ranks in sessions of their own, either."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


def until(condition, seconds, launch=None):
    """Wait until `condition` is true, and return what it was."""
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
    """rank -> pid of the processes that train in `run_dir`, without their workers."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        variables = _environment_of(pid)
        if "RANK" in variables and str(run_dir) in _command_of(pid) and "RANK" not in _environment_of(_parent_of(pid)):
            found[int(variables["RANK"])] = pid
    return found


def descendants(pid):
    """Of a process: children, their children, and so on."""
    children = {}
    for child in map(int, filter(str.isdigit, os.listdir("/proc"))):
        children.setdefault(_parent_of(child), []).append(child)
    found, unseen = [], [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


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
