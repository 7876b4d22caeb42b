"""A finished student on disk: `NAME.safetensors` and a small `NAME.json` that says how to build it.

The weights file holds the plain model's keys: `safetensors.torch.load_file` and the architecture are enough to use it
elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dkd.atomic_files import read_json, replace_text, replacing
from dkd.models.registry import ModelSpec, UnknownModelError, build_model, runs_user_code
from dkd.models.weights import WeightsError, load_weights


def save_student(
    folder: Path, spec: ModelSpec, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any], name: str = "student"
) -> Path:
    """Write FOLDER/name.safetensors and FOLDER/name.json. A reader sees the old files or the new ones, never half a
    file.

    Args:
        facts: what else to say in the JSON: normalisation, image size, metrics.

    Returns:
        The path of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    architecture = {"name": spec.name, "classes": spec.classes, "norm": spec.norm, "options": dict(spec.options)}
    with replacing(weights) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    replace_text(description, json.dumps({"architecture": architecture, **facts}, indent=2) + "\n")
    return weights


def read_description(weights: Path) -> dict[str, Any]:
    """Return the JSON beside a weights file.

    Raises:
        WeightsError: the JSON is not there, cannot be read, or does not describe a student.
    """
    path = weights.with_suffix(".json")
    description, reason = read_json(path)
    if reason is None:
        wrong = _wrong_in(description)
        reason = None if wrong is None else f"{str(path)!r} is damaged: {wrong}"
    if reason is not None:
        raise WeightsError(f"{reason}; it should describe the student in {weights.name!r}")
    return dict(description)


def _wrong_in(description: Any) -> str | None:
    """Return what in a description is not of the kind that its readers need; None: nothing."""
    try:
        student_spec(description)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "it names no architecture"
    kinds: dict[str, Any] = {
        "image_size": int,
        "parameters": int,
        "global_batch": int,
        "world_size": int,
        "seconds": (int, float),
    }
    for key, kind in kinds.items():
        value = description.get(key, 0)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value < 2**63:
            return f"{key} is {str(value)[:40]!r}"
    normalization = description.get("normalization")
    if normalization is not None:
        parts = [normalization.get(key) if isinstance(normalization, dict) else None for key in ("mean", "std")]
        if not all(
            isinstance(part, list) and len(part) == 3 and all(isinstance(v, int | float) for v in part)
            for part in parts
        ):
            return "normalization is not the mean and std of 3 channels"
    return None


def student_spec(description: Mapping[str, Any]) -> ModelSpec:
    """The architecture that a description names. Raises KeyError, TypeError or ValueError when it is not one of
    ours."""
    architecture = description["architecture"]
    name, classes, norm, options = (
        architecture["name"],
        architecture["classes"],
        architecture.get("norm"),
        architecture.get("options") or {},
    )
    if not (
        isinstance(name, str)
        and isinstance(classes, int)
        and isinstance(options, dict)
        and (norm is None or isinstance(norm, str))
    ):
        raise TypeError("architecture")
    return ModelSpec(name, classes, norm, options)


def load_student(path: str | Path, trust_code: bool = False) -> nn.Module:
    """The student of a run directory or of a `student.safetensors`, built and filled, in eval mode, on the CPU.

    Args:
        trust_code: allow a student.json to name a `module:callable`, which is imported and called. The other names run
            no code but this package's, torchvision's and timm's.

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
            f"{str(weights)!r} is of {spec.name!r}, which is code to be imported and run; trust it by trust_code=True, "
            "--trust-code"
        )
    model = build_model(spec)
    load_weights(model, spec.name, str(weights))
    return model.eval()
