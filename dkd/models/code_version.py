"""Recognise the code that a model's name leads to: equal weights in another code compute something else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkd.models.hugging_face import is_hugging_face, model_config
from dkd.models.registry import runs_user_code
from dkd.user_code import load_callable

_LIBRARIES = {"torchvision/": "torchvision", "timm/": "timm", "hf/": "transformers"}


def code_version(name: str, classes: int, options: Mapping[str, Any]) -> str:
    """Return what identifies a model's code, beside its name and options: the version of its library, for models of
    transformers with their configuration; for a callable of the user's own the SHA-256 of the file that defines it.

    Args:
        name, classes, options: as ModelSpec.

    Raises:
        UnknownModelError, UserCodeError, HuggingFaceError: there is no such model.
    """
    if runs_user_code(name):
        return _source_digest(name)
    package = next((package for prefix, package in _LIBRARIES.items() if name.startswith(prefix)), "dkd")
    version = f"{package} {importlib.metadata.version(package)}"
    if is_hugging_face(name):
        config = json.dumps(model_config(name, classes, options).to_dict(), sort_keys=True, default=str)
        version += f", {hashlib.sha256(config.encode()).hexdigest()}"
    return version


def _source_digest(name: str) -> str:
    """Return the SHA-256 of the file of the module that a name begins with, and of the one that defines its
    callable."""
    found = load_callable(name)
    modules = {name.partition(":")[0], getattr(inspect.unwrap(found), "__module__", "")}
    digest = hashlib.sha256()
    for module in sorted(modules & set(sys.modules)):
        path = getattr(sys.modules[module], "__file__", None)
        if path is not None and Path(path).is_file():
            digest.update(module.encode() + Path(path).read_bytes())
    return digest.hexdigest()
