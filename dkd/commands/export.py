"""`dkd export`: write a finished student in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from dkd import console
from dkd.commands.arguments import add_trust_code
from dkd.commands.command import Command

_EXAMPLES = """
examples:
  dkd export runs/quickstart --format onnx                runs/quickstart/student.onnx
  dkd export runs/quickstart --format onnx --normalization --output digits.onnx
  dkd export runs/r34_r18 --format torchvision            a state dict for torchvision.models.resnet18(num_classes=...)
  dkd export runs/quickstart/checkpoints/step_00000100 --format safetensors --output step100.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd export`."""
    parser.add_argument("run", metavar="RUN", help="a run directory, a checkpoint in it, or a student.safetensors")
    parser.add_argument("--format", choices=("safetensors", "torchvision", "onnx"), required=True)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: exported.safetensors, student.pth or student.onnx, beside the student",
    )
    parser.add_argument(
        "--normalization", action="store_true", help="onnx: take images on the scale 0 to 255 and normalise them inside"
    )
    add_trust_code(parser, "the module:callable that a student.json names")


def run(options: argparse.Namespace) -> int:
    """Export the student, and return the exit code: 0, or 1 when the written file gives other logits."""
    from dkd.export import OtherLogitsError, export_student

    output = Path(options.output) if options.output else None
    try:
        path, difference = export_student(
            Path(options.run), options.format, output, options.normalization, options.trust_code
        )
    except OtherLogitsError as error:
        console.say(f"dkd: {error}; nothing was written")
        return 1
    console.show(f"{path}: {path.stat().st_size:,} bytes; logits differ by at most {difference:.1e} of the largest")
    return 0


COMMAND = Command(
    "export",
    "Write a finished student in another format.",
    _EXAMPLES,
    add_arguments,
    run,
    "Write a finished student in another format, and check that the file gives the same logits.",
)
