"""What dkd prints. A line for the person or the file that watches a run is dropped when it cannot be written: it never
ends a training.

Standard error can fail at any moment: the disk that holds the log fills up, the reader of a pipe (`| head`) leaves, the
terminal closes.
Everything that dkd prints beside a command's result goes through `say`, the result itself through `show`. Both print
names that files and recipes chose, so neither lets a character through that moves the cursor, hides text or changes the
terminal's settings.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any, TextIO

from dkd.errors import RunError

# Control characters of ASCII and of Latin-1, separators of lines, what turns the direction of text, and halves of
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
# For terminals of few letters. Any other character that they lack is escaped.
_PLAIN = {
    "×": "x", "·": "*", "←": "<-", "→": "->", "−": "-", "≤": "<=", "≥": ">=", "…": "...", "‖": "||", "²": "^2", "Σ": "sum",
    "α": "alpha", "β": "beta", "γ": "gamma", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip


class Unwritable(RunError):
    """Standard output does not take a command's result. `reason` is empty when its reader has left."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def printable(text: str) -> str:
    """Return `text`, which may hold names of files, classes, models and keys, with escapes such as `\\x1b` for what is
    no letter: a terminal would obey it."""
    return text.translate(_ESCAPES)


def accept_all_letters() -> None:
    """Let both streams of this process print every character, whatever their encoding: what it lacks is spelled out,
    not an error."""
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


def say(message: str) -> None:
    """Print one line to standard error, or nothing when it cannot be written. Never raises for the sake of the
    stream."""
    stream = sys.stderr  # None when the process was started with it closed
    if stream is None:
        return
    try:
        print(printable(message), file=stream, flush=True)
    except (OSError, ValueError):  # full disk, closed pipe; a stream that a host program has closed
        return


def show(*lines: str) -> None:
    """Print a command's result to standard output.

    Raises:
        Unwritable: the result, or a part of it, is lost.
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
    """From now on, nothing that any code of this process prints can raise, and neither can the flush at the
    interpreter's end.

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
    """Before the process ends: flush both streams. Where that fails, point them at nothing, so that Python's own flush
    cannot turn the exit code into 120."""
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
