"""Use the private names of Python's pickle. They were read in Python 3.10 to 3.12."""

from __future__ import annotations

import pickle
from typing import Any

PythonUnpickler: Any = pickle._Unpickler
"""The unpickler written in Python, with one method for each step of a pickle. The public Unpickler is written in C, and
offers no way to refuse the step that changes attributes of a class."""
