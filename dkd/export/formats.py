"""Export a student: each format has a writer, and a reader independent of the trainer that checks the written file.

safetensors    the plain model's tensors under the architecture's own names; the architecture is in the metadata
torchvision    a state dict for torchvision.models.NAME(num_classes=K), read with torch.load(weights_only=True)
onnx           the whole model for batches of any size, for onnxruntime and others
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import nn

from dkd.atomic_files import replacing
from dkd.errors import InputError, RunError
from dkd.installation import command_for
from dkd.models import (
    LogitsOnly,
    ModelSpec,
    UnknownModelError,
    WeightsError,
    build_model,
    load_student,
    read_description,
    student_spec,
)
from dkd.text import shorten
from dkd.user_code import describe_error

LARGEST_DIFFERENCE = 1e-4
"""Largest accepted difference of a logit, relative to the largest logit: other libraries sum float32 in another
order."""
_BATCHES = (1, 3)  # sizes of the batches that check a written file


class ExportError(InputError):
    """There is no student, or the student does not fit the format."""


class OtherLogitsError(RunError):
    """The written file does not give the student's logits."""


@dataclass(frozen=True)
class Student:
    """The student to export.

    Args:
        spec: its architecture.
        model: the model in eval mode, on the CPU; it expects normalised images (b, 3, H, W).
        image_size: pixels, the side of an image.
        mean, std: the normalisation of each channel, on the scale 0 to 1.
        class_names: in the order of the logits; None: not known.
    """

    spec: ModelSpec
    model: nn.Module
    image_size: int
    mean: list[float]
    std: list[float]
    class_names: list[str] | None = None


class _WithNormalization(nn.Module):
    """The student, preceded by its normalisation: takes images (b, 3, H, W) on the scale 0 to 255."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = LogitsOnly(student.model)
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in student.std]).view(1, 3, 1, 1))
        self.register_buffer(
            "shift", torch.tensor([-m / s for m, s in zip(student.mean, student.std, strict=True)]).view(1, 3, 1, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images * self.scale + self.shift)
        return logits


def export_student(
    run: Path, form: str, output: Path | None = None, normalization: bool = False, trust_code: bool = False
) -> tuple[Path, float]:
    """Write the student of a run in another format, and check that it gives the same logits.

    Args:
        run: a run directory, a checkpoint in it, or a student.safetensors.
        form: one of FORMATS.
        output: the file to write; default: exported.safetensors, student.pth or student.onnx beside the student.
        normalization: the file takes images on the scale 0 to 255 and normalises them itself; onnx only.
        trust_code: import the module:callable that student.json names, as in `load_student`.

    Returns:
        The path of the file, and the largest difference of a logit, relative to the largest logit.

    Raises:
        ExportError: there is no student, or the student, the format and the path do not fit each other.
        OtherLogitsError: the file gives other logits. It has been removed.
    """
    try:
        student = _read(run, trust_code)
    except (WeightsError, UnknownModelError) as error:
        raise ExportError(str(error)) from error
    write, read, suffix = FORMATS[form]
    if normalization and form != "onnx":
        raise ExportError(f"--normalization belongs to onnx: a file of {form} holds tensors, and no operations")
    folder = run if run.is_dir() else run.parent
    if output is None and folder.parent.name == "checkpoints":
        raise ExportError(f"{str(folder)!r} is a checkpoint, which the run may remove: name a file with --output")
    path = output or folder / (f"exported{suffix}" if suffix == ".safetensors" else f"student{suffix}")
    if path.suffix != suffix or path.is_dir():
        raise ExportError(f"{str(path)!r} is no name for a file of {form}: name a file that ends in {suffix}")
    if path.resolve() in ((folder / "student.safetensors").resolve(), run.resolve()):
        raise ExportError(f"{str(path)!r} is the run's own student: name another --output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exported = (_WithNormalization(student) if normalization else LogitsOnly(student.model)).eval()
        with replacing(path) as partial:
            write(partial, student, exported)
            difference = _largest_difference(student, exported, read(partial, student), 255.0 if normalization else 1.0)
            if not difference <= LARGEST_DIFFERENCE:
                raise OtherLogitsError(
                    f"the file's logits differ by {difference:.1e} of the largest, more than {LARGEST_DIFFERENCE:.0e}"
                )
    except OSError as error:
        raise ExportError(f"{str(path)!r} cannot be written: {error}") from error
    return path, difference


def _read(run: Path, trust_code: bool) -> Student:
    """Read a student and its description. Raises WeightsError and UnknownModelError."""
    weights = run / "student.safetensors" if run.is_dir() else run
    if not weights.is_file():
        raise WeightsError(f"no finished student: {str(weights)!r} does not exist")
    description = read_description(weights)
    normalization = description.get("normalization") or {"mean": [0.0] * 3, "std": [1.0] * 3}
    size = description.get("image_size")
    name = str(weights.with_suffix(".json"))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise WeightsError(f"{name!r} must hold image_size, a number of pixels, not {size!r}")
    mean, std = (normalization.get(key) if isinstance(normalization, dict) else None for key in ("mean", "std"))
    if not _are_channels(mean, -math.inf) or not _are_channels(std, 0):
        held = shorten(repr(normalization), 200)
        raise WeightsError(
            f"{name!r} must hold normalization as mean and std, 3 numbers each and std above 0, not {held}"
        )
    model = load_student(weights, trust_code)
    return Student(student_spec(description), model, size, mean, std, description.get("class_names"))


def _are_channels(values: object, above: float) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(v, int | float) and above < v < math.inf for v in values)
    )


@torch.no_grad()
def _largest_difference(
    student: Student, model: nn.Module, exported: Callable[[torch.Tensor], torch.Tensor], scale: float
) -> float:
    """Return the largest difference of a logit, relative to the largest logit, on random images in batches of several
    sizes. Raises ExportError when the student fails, and OtherLogitsError when the shapes differ.

    Args:
        scale: the largest value of a pixel.
    """
    generator = torch.Generator().manual_seed(0)
    size = student.image_size
    found = 0.0
    for batch in _BATCHES:
        try:
            images = torch.rand(batch, 3, size, size, generator=generator) * scale
            wanted = model(images)
        except (Exception, SystemExit) as error:  # a user's own model, or images too large for memory
            raise ExportError(
                f"{student.spec.name!r} fails on {batch} images of {size}×{size}: {describe_error(error)}"
            ) from error
        given = exported(images)
        if given.shape != wanted.shape:
            shapes = f"{tuple(given.shape)}, the student {tuple(wanted.shape)}"
            raise OtherLogitsError(f"the file gives logits of shape {shapes}")
        found = max(found, ((given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item())
    return found


def _write_safetensors(path: Path, student: Student, exported: nn.Module) -> None:
    from safetensors.torch import save_file

    facts = {
        "architecture": {**vars(student.spec), "options": dict(student.spec.options)},
        "image_size": student.image_size,
        "normalization": {"mean": student.mean, "std": student.std},
        **({} if student.class_names is None else {"class_names": student.class_names}),
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in student.model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "student": json.dumps(facts)})


def _read_safetensors(path: Path, student: Student) -> Callable[[torch.Tensor], torch.Tensor]:
    from safetensors.torch import load_file

    model = build_model(student.spec)
    model.load_state_dict(load_file(path))
    return LogitsOnly(model.eval())


def _write_torchvision(path: Path, student: Student, exported: nn.Module) -> None:
    if not student.spec.name.startswith("torchvision/"):
        raise ExportError(
            f"the student is {student.spec.name!r}, which torchvision does not have: export it as safetensors or onnx"
        )
    torch.save(student.model.state_dict(), path)


def _read_torchvision(path: Path, student: Student) -> Callable[[torch.Tensor], torch.Tensor]:
    import torchvision

    name = student.spec.name.removeprefix("torchvision/")
    model = torchvision.models.get_model(name, weights=None, num_classes=student.spec.classes, **student.spec.options)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _write_onnx(path: Path, student: Student, exported: nn.Module) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"onnx needs {', '.join(missing)}, not installed here: {command_for('onnx')}")
    try:
        images = torch.zeros(2, 3, student.image_size, student.image_size)
        program = torch.onnx.export(
            exported,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    except Exception as error:  # torch.export raises errors of many classes for a model that it cannot follow
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(
            f"torch.export cannot follow {student.spec.name!r}: {type(error).__name__}: {first[:300]}"
        ) from error
    assert program is not None
    program.model.metadata_props.update(_onnx_metadata(student, exported))
    program.save(str(path), external_data=False)


def _onnx_metadata(student: Student, exported: nn.Module) -> dict[str, str]:
    """Return what the file states of itself, as JSON: names of the classes, and the input that it takes."""
    inside = isinstance(exported, _WithNormalization)
    facts = {
        "class_names": student.class_names,
        "image_size": student.image_size,
        "normalization": "inside: images on the scale 0 to 255"
        if inside
        else {"mean": student.mean, "std": student.std},
    }
    return {key: json.dumps(value) for key, value in facts.items() if value is not None}


def _read_onnx(path: Path, student: Student) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


_Write = Callable[[Path, Student, nn.Module], None]
_Read = Callable[[Path, Student], Callable[[torch.Tensor], torch.Tensor]]
FORMATS: dict[str, tuple[_Write, _Read, str]] = {
    "safetensors": (_write_safetensors, _read_safetensors, ".safetensors"),
    "torchvision": (_write_torchvision, _read_torchvision, ".pth"),
    "onnx": (_write_onnx, _read_onnx, ".onnx"),
}
