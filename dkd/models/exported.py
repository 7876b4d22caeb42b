"""A finished student on disk: `NAME.safetensors` and a small `NAME.json` that says how to build it.

The weights file holds the plain model's keys: `safetensors.torch.load_file` and the architecture are enough to use it elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dkd.models.registry import ModelSpec, UnknownModelError, build_model, runs_user_code
from dkd.models.weights import WeightsError, load_weights


def save_student(folder: Path, spec: ModelSpec, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any], name: str = "student") -> Path:
    """Write FOLDER/name.safetensors and FOLDER/name.json. A reader sees the old files or the new ones, never half a file.

    Args:
        facts: what else to say in the JSON: normalisation, image size, metrics.

    Returns:
        The path of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    architecture = {"name": spec.name, "classes": spec.classes, "norm": spec.norm, "options": dict(spec.options)}
    _replace(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(description, lambda path: path.write_text(json.dumps({"architecture": architecture, **facts}, indent=2) + "\n"))
    return weights


def read_description(weights: Path) -> dict[str, Any]:
    """The JSON beside a weights file. Raises WeightsError when it is not there or not ours."""
    path = weights.with_suffix(".json")
    try:
        description = json.loads(path.read_text())
        student_spec(description)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{str(path)!r}, which should say what {weights.name!r} holds, is missing or unreadable") from error
    return description


def student_spec(description: Mapping[str, Any]) -> ModelSpec:
    """The architecture that a description names. Raises KeyError, TypeError or ValueError when it is not one of ours."""
    architecture = description["architecture"]
    name, classes, norm, options = (
        architecture["name"],
        architecture["classes"],
        architecture.get("norm"),
        architecture.get("options") or {},
    )
    if not (isinstance(name, str) and isinstance(classes, int) and isinstance(options, dict) and (norm is None or isinstance(norm, str))):
        raise TypeError("architecture")
    return ModelSpec(name, classes, norm, options)


def load_student(path: str | Path, trust_code: bool = False) -> nn.Module:
    """The student of a run directory or of a `student.safetensors`, built and filled, in eval mode, on the CPU.

    Args:
        trust_code: allow a student.json to name a `module:callable`, which is imported and called. The other names run no code but this
            package's, torchvision's and timm's.

    Raises:
        WeightsError, UnknownModelError: what is missing or does not fit, or may not be run.

    Example:
        >>> student = load_student("runs/quickstart")
    """
    path = Path(path)
    weights = path / "student.safetensors" if path.is_dir() else path
    spec = student_spec(read_description(weights))
    if runs_user_code(spec.name) and not trust_code:
        raise UnknownModelError(
            f"{str(weights)!r} is of {spec.name!r}, which is code to be imported and run; trust it by trust_code=True, --trust-code"
        )
    model = build_model(spec)
    load_weights(model, spec.name, str(weights))
    return model.eval()


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
