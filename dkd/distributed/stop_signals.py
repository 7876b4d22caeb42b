"""Requests to stop a run: SIGTERM, SIGUSR1, SIGHUP (the terminal or the connection to it is gone), or a file called
STOP.

A request does no more than leave a note. The ranks read each other's notes together with a step's other numbers, and
stop at the same step, after a checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dkd import console
from dkd.launch import Launch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP_FILE = "STOP"
_LOOK_EVERY = 1.0  # seconds between looks for the file, which may be far away

_asked: int | None = None
_wakeup: socket.socket | None = None
_before: dict[int, Any] = {}


def note_signals(launch: Launch) -> None:
    """Let these signals ask this process to stop from now on, instead of ending it. Call it in the main thread."""
    global _wakeup
    # Python runs handlers when its main thread next executes bytecode, which it does not while it waits for another
    # rank; the bytes of a wakeup descriptor arrive at once.
    _wakeup, written = socket.socketpair()
    _wakeup.setblocking(False)
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # started by nohup: the run is to outlive its terminal
        _before[number] = signal.signal(number, _note)
    if launch.is_elastic:
        threading.Thread(target=_stop_without_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def _stop_without_launcher(launcher: int) -> None:
    """Ask the run to stop when its launcher is gone, killed by a signal that it could not pass on: no process would end
    these ranks. Another parent means that; asked by the clock, since the kernel's own notice (PR_SET_PDEATHSIG) is tied
    to the launcher's thread.

    A launcher of one machine takes the key-value store along. A run that has written a checkpoint has all the
    connections that it needs for another; one that has not ends with an error.
    """
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY)
        if _wakeup is None:  # training is over
            return
    console.say(
        f"dkd: the launcher (pid {launcher}) of this rank is gone: the run stops, after a checkpoint if one can be "
        "written"
    )
    os.kill(os.getpid(), signal.SIGTERM)


def stop_noting(launch: Launch) -> None:
    """Give the signals back their meaning: training is over. Under a launcher, which may send a SIGTERM because another
    rank has ended before this one, they are ignored: this process ends by itself, with the exit code that it has."""
    global _asked, _wakeup
    for number, before in _before.items():
        signal.signal(number, signal.SIG_IGN if launch.has_launcher else before)
    signal.set_wakeup_fd(-1)
    _before.clear()
    _asked, _wakeup = None, None


def signalled() -> int | None:
    """Return the signal that has asked this process to stop, or None. Any thread may call it."""
    global _asked
    wakeup = _wakeup
    if wakeup is not None:
        with suppress(BlockingIOError):
            for number in wakeup.recv(4096):
                if number in _before:
                    _asked = number
    return _asked


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number


class StopRequests:
    """Finds out what has asked this rank's run to stop.

    Args:
        run_dir: where the file is looked for.
        looks: whether this rank looks for the file; one rank is enough.
    """

    def __init__(self, run_dir: Path, looks: bool) -> None:
        self.path, self._looks = run_dir / STOP_FILE, looks
        self._looked = -_LOOK_EVERY
        self._found = False

    def asked_by(self, look: bool = False) -> str | None:
        """Return `STOP` for the file, a signal's name, or None.

        Args:
            look: look for the file now, however short ago the last look was.
        """
        now = time.monotonic()
        if self._looks and not self._found and (look or now - self._looked >= _LOOK_EVERY):
            self._looked = now
            self._found = self.path.exists()
        # The file first: a person wishes that the run shall not resume by itself.
        if self._found:
            return STOP_FILE
        number = signalled()
        return None if number is None else signal.Signals(number).name


def exit_code(launch: Launch) -> int:
    """Return the exit code of a process that stopped when asked: 0, or DKD_STOP_EXIT_CODE. Under a launcher that may
    restart its ranks it is always 0: that launcher takes any other code for a crash, and would start them again."""
    return 0 if launch.restarts_ranks else launch.stop_exit_code
