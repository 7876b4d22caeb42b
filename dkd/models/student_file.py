"""Write and read a finished student: `NAME.safetensors`, and a small `NAME.json` that describes how to build the model.

The weights file holds the keys of the plain model: `safetensors.torch.load_file` and the architecture are enough to use
the student elsewhere.
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
from dkd.models.hugging_face import is_hugging_face, model_config
from dkd.models.registry import ModelSpec, UnknownModelError, build_model, runs_user_code
from dkd.models.weights import WeightsError, load_weights


def save_student(
    folder: Path, spec: ModelSpec, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any], name: str = "student"
) -> Path:
    """Write FOLDER/name.safetensors and FOLDER/name.json. A reader sees the old files or the new files, never half a
    file.

    Args:
        folder: made where it does not exist.
        spec: the architecture.
        state: the weights, by the plain model's keys.
        facts: further entries of the JSON: normalisation, image size, metrics, and `class_names`, in the order of the
            logits, which the metadata of the weights file state too.
        name: the files' name without suffix.

    Returns:
        The path of the weights.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    architecture = {"name": spec.name, "classes": spec.classes, "norm": spec.norm, "options": dict(spec.options)}
    if is_hugging_face(spec.name):  # the folder that the name leads to may be gone when the student is loaded
        config = model_config(spec.name, spec.classes, spec.options, spec.config)
        if facts.get("class_names"):
            config.id2label = dict(enumerate(facts["class_names"]))
            config.label2id = {name: number for number, name in config.id2label.items()}
        architecture["config"] = config.to_dict()
    names = facts.get("class_names")
    metadata = {"format": "pt", **({} if names is None else {"class_names": json.dumps(names)})}
    with replacing(weights) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)
    replace_text(description, json.dumps({"architecture": architecture, **facts}, indent=2) + "\n")
    return weights


def read_description(weights: Path) -> dict[str, Any]:
    """Return the content of the JSON beside a weights file.

    Raises:
        WeightsError: the JSON is missing, cannot be read, or does not describe a student.
    """
    path = weights.with_suffix(".json")
    description, reason = read_json(path)
    if reason is None:
        wrong = find_wrong(description)
        reason = None if wrong is None else f"{str(path)!r} is damaged: {wrong}"
    if reason is not None:
        raise WeightsError(f"{reason}; it should describe the student in {weights.name!r}")
    return dict(description)


def find_wrong(description: Any) -> str | None:
    """Return which entry of a description has a wrong type or value; None: no entry has."""
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
    names = description.get("class_names", [])
    classes = description["architecture"]["classes"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) in (0, classes)):
        return f"class_names are not the names of {classes} classes"
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
    """Return the architecture that a description names. Raises KeyError, TypeError or ValueError when the description
    names none."""
    architecture = description["architecture"]
    name, classes = architecture["name"], architecture["classes"]
    norm, options = architecture.get("norm"), architecture.get("options") or {}
    config = architecture.get("config")
    if not (
        isinstance(name, str)
        and isinstance(classes, int)
        and isinstance(options, dict)
        and (norm is None or isinstance(norm, str))
        and (config is None or isinstance(config, dict))
    ):
        raise TypeError("architecture")
    return ModelSpec(name, classes, norm, options, config)


def load_student(path: str | Path, trust_code: bool = False) -> nn.Module:
    """Build the student of a run directory or of a `student.safetensors`, with its weights, in eval mode, on the CPU.

    Args:
        path: the run directory or the file.
        trust_code: allow student.json to name a `module:callable`, which is imported and called. All other names run
            only code of this package, torchvision, timm and transformers.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit the architecture.
        UnknownModelError: the architecture cannot be built, or is code that is not trusted.

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
