"""Lines for the person or the file that watches a run. A line that cannot be written is dropped: it never ends a training.

Standard error can fail at any moment: the disk that holds the log fills up, the reader of a pipe (`| head`) leaves, the terminal closes.
Everything that dkd prints beside a command's result goes through `say`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


def say(message: str) -> None:
    """Print one line to standard error, or nothing when it cannot be written. Never raises for the sake of the stream."""
    stream = sys.stderr  # None when the process was started with it closed
    if stream is None:
        return
    try:
        print(message, file=stream, flush=True)
    except (OSError, ValueError):  # full disk, closed pipe; a stream that a host program has closed
        return


def never_fail() -> None:
    """From now on, nothing that any code of this process prints can raise, and neither can the flush at the interpreter's end.

    For the commands that train: progress bars, warnings and other libraries write to the same streams as `say`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 (kept open for the life of the process)
        if not isinstance(stream, _Unfailing):
            setattr(sys, name, _Unfailing(stream))


class _Unfailing:
    """A text stream whose writes and flushes drop what the system does not take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a terminal of few letters
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def settle() -> None:
    """Before the process ends: flush both streams. Where that fails, point them at nothing, so that Python's own flush cannot turn the
    exit code into 120."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        try:
            # The stream itself, not what `never_fail` put before it: the interpreter flushes that one.
            getattr(stream, "_stream", stream).flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue
