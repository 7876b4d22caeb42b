"""Load the user's own code, which a recipe names as `module:attribute`: models, losses, data sets."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from dkd.errors import InputError

_OWN_FILES = (os.path.dirname(__file__), *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")), "<")


class UserCodeError(InputError):
    """A name leads to nothing, or its module cannot be imported."""


def load_callable(name: str) -> Callable[..., Any]:
    """Return the callable that `module:attribute` names. Importing runs the module.

    Raises:
        UserCodeError: with the error of the user's code, and the place in that code where the error was raised.
    """
    module_name, _, attribute = name.partition(":")
    # `python -m` puts the working directory on the path, which `dkd` and `accelerate launch` may not: a user's module
    # there must be found.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserCodeError(f"{name!r}: cannot import {module_name!r}: {describe_error(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserCodeError(f"{name!r}: {module_name!r} has no callable {attribute!r}")
    return found


def describe_error(error: BaseException) -> str:
    """Return one line: the error, and the place in the user's own code where the error was raised."""
    try:
        lines = str(error).strip().splitlines()
    except Exception as broken:  # the user's code makes the text, too
        lines = [f"(its text cannot be had: {type(broken).__name__})"]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN_FILES)]
    where = f" ({os.path.relpath(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}{where}"
