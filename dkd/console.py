"""Print messages and results so that neither can stop a training or command a terminal.

Standard error can fail at any moment: the disk that holds the log fills up, the reader of a pipe (`| head`) ends, the
terminal closes. `say` prints messages and drops a line that cannot be written; `show` prints a command's result and
raises an error when the result is lost. Both print names that files and recipes chose, so both escape every character
that moves the cursor, hides text or changes the terminal's settings.
"""

from __future__ import annotations

import codecs
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TextIO

from dkd import atomic_files, launch
from dkd.errors import RunError

LONGEST_WRITE = 5.0
"""Seconds that the end of a run waits at most for its log to be written."""
# Control characters of ASCII and of Latin-1, separators of lines, marks of the direction of text, and halves of
# characters, which stand for bytes of a file's name that are not UTF-8.
_UNPRINTABLE = {
    *range(0x20),
    *range(0x7F, 0xA0),
    *(0x2028, 0x2029),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
}
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNPRINTABLE}
# For terminals whose encoding has few characters. Any other character that the encoding lacks is escaped.
_PLAIN = {
    "×": "x", "·": "*", "←": "<-", "→": "->", "−": "-", "≤": "<=", "≥": ">=", "…": "...", "‖": "||", "²": "^2",
    "Σ": "sum", "α": "alpha", "β": "beta", "γ": "gamma", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip


class Unwritable(RunError):
    """The result of a command cannot be written to standard output.

    Args:
        reason: the system's message; empty when the reader of a pipe has ended.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def printable(text: str) -> str:
    """Return `text` with escapes such as `\\x1b` for control characters, which a terminal would obey. `text` may hold
    names of files, classes, models and keys."""
    return text.translate(_ESCAPES)


def accept_all_letters() -> None:
    """Let both streams of this process print every character: one that a stream's encoding lacks is spelled out and
    raises no error."""
    codecs.register_error("dkd.spell_out", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) in (
            "strict",
            "backslashreplace",
            "surrogateescape",
        ):
            reconfigure(errors="dkd.spell_out")


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(
        _PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in found
    ), error.end


class _StandardError(logging.Handler):
    """Prints plain lines to standard error, and drops a line that the stream does not take."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr  # None when the process was started with standard error closed
        if stream is None:
            return
        try:
            print(printable(record.getMessage()), file=stream, flush=True)
        except (OSError, ValueError):  # a full disk, a closed pipe, or a stream that a host program has closed
            return


LOGGER = logging.getLogger("dkd")
"""Receives every line that dkd reports. A host program that wants none of them sets its level
(`logging.getLogger("dkd").setLevel(logging.ERROR)`), and one that wants them elsewhere adds a handler of its own before
dkd is imported, as with the loggers of transformers and datasets."""
if not LOGGER.handlers:
    LOGGER.addHandler(_StandardError())
    LOGGER.propagate = False  # a root logger with a handler would print each line again
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


def say(message: str) -> None:
    """Report one line: to standard error, and to the log files that are open. Raises nothing: a line that cannot be
    written is dropped."""
    level = logging.WARNING if message.removeprefix("dkd: ").startswith("warning: ") else logging.INFO
    if level < LOGGER.level:
        return
    record = LOGGER.makeRecord(LOGGER.name, level, __file__, 0, "%s", (message,), None)
    # Handed over here, not by LOGGER.log: a module that configures logging, or turns it off, would silence the reason
    # why a run ends. A handler of another program may raise.
    with suppress(Exception):
        LOGGER.callHandlers(record)


class _LogFile(logging.Handler):
    """Appends lines with time and rank to a file. A thread of its own writes, so that a disk that hangs holds up no
    rank, and drops a line that the file does not take."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
        self._path = path
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="train.log", daemon=True)
        self._thread.start()

    def createLock(self) -> None:
        """Make no lock: the queue needs none, and a rank must never wait for another thread here."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(printable(self.format(record)).encode() + b"\n")

    def _write(self) -> None:
        file: IO[bytes] | None = None
        with suppress(OSError):
            file = atomic_files.open_to_append(self._path)
        while (line := self._lines.get()) is not None:
            if file is not None:
                with suppress(OSError, ValueError):
                    file.write(line)
        if file is not None:
            with suppress(OSError):
                file.close()

    def finish(self) -> None:
        """Wait for the lines that were reported, some seconds at most, and close the file. Not `close`, which logging
        calls whenever a program configures it."""
        self._lines.put(None)
        self._thread.join(LONGEST_WRITE)


@contextmanager
def log_file(path: Path, rank: int) -> Iterator[Callable[[str], None]]:
    """Append every line that is reported inside to a file, with time and rank. A file that cannot be written is left
    out: no log ends a training.

    Yields:
        A function that writes a line to this file alone.
    """
    handler = _LogFile(path, rank)
    LOGGER.addHandler(handler)

    def note(message: str) -> None:
        handler.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, __file__, 0, "%s", (message,), None))

    try:
        yield note
    finally:
        LOGGER.removeHandler(handler)
        handler.finish()


def say_on_first_rank(message: str) -> None:
    """Print one line to standard error on rank 0 only, for a message that is the same on all ranks."""
    if launch.named_rank() == "0":
        say(message)


def show(*lines: str) -> None:
    """Print a command's result to standard output.

    Raises:
        Unwritable: the result, or a part of the result, is lost.
    """
    if sys.stdout is None:
        raise Unwritable("it is closed")
    try:
        print("\n".join(map(printable, lines)), flush=True)
    except BrokenPipeError:
        raise Unwritable("") from None
    except (OSError, ValueError) as error:
        raise Unwritable(getattr(error, "strerror", None) or str(error)) from error


def never_fail() -> None:
    """Replace both streams of this process by streams that raise no error in writes and flushes, for the rest of its
    life.

    Used by commands that train: progress bars, warnings and other libraries write to the same streams as `say`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 (kept open for the life of the process)
        if not isinstance(stream, _Unfailing):
            setattr(sys, name, _Unfailing(stream))


class _Unfailing:
    """A text stream that drops text which the system does not take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a terminal whose encoding has few characters
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
    """Flush both streams before the process ends. A stream that cannot be flushed is connected to the null device, so
    that Python's own flush cannot change the exit code to 120."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        try:
            # Flush the original stream, which the interpreter flushes too, not the one from `never_fail`.
            getattr(stream, "_stream", stream).flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue
