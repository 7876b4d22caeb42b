"""Draw the first micro-batch that a recipe trains on, as the models see it: `dkd train --dry-run --picture FILE`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from dkd.build.data import build_data
from dkd.commands import pictures
from dkd.config import Recipe, RecipeError
from dkd.config.derived import data_seed
from dkd.data import ImageSource
from dkd.distillation.step import mixing_seed
from dkd.engines.arithmetic import Arithmetic
from dkd.launch import Launch

MOST_IMAGES = 48
"""Images of a picture, at most."""
_COLUMNS = 8
_TILE = 112  # pixels that an image is enlarged to, about; larger images up to twice of it keep their pixels
_LINE, _MARGIN = 14, 6


@dataclass(frozen=True)
class FirstBatch:
    """Holds what rank 0 trains on in the first micro-step of step 1.

    Args:
        images: (b, 3, H, W) from 0 to 255: uint8 as they are loaded, or floating-point where they are mixed.
        labels: classes (b,), or probabilities (b, K) where images are mixed.
    """

    images: torch.Tensor
    labels: torch.Tensor


def load_first_batch(
    recipe: Recipe, launch: Launch, training: ImageSource, validation: ImageSource | None
) -> FirstBatch:
    """Load the first micro-batch of rank 0, transformed and mixed as in the training.

    Args:
        recipe: with nothing left to the hardware.
        training, validation: opened.

    Raises:
        RecipeError: the images cannot be loaded.
    """
    alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})
    parts = build_data(alone, training, validation, launch, Arithmetic.of(recipe).dtype, torch.device("cpu"))
    batch = next(parts.train_loader.steps(0, 1))
    problem = batch.failure or ("" if recipe.data.on_error == "skip" else "; ".join(batch.unreadable[:1]))
    if problem:
        raise RecipeError.at("data.train", problem)
    if parts.mixing is None:
        return FirstBatch(batch.images, batch.labels)
    return FirstBatch(*parts.mixing(batch.images, batch.labels, mixing_seed(data_seed(recipe), 0, launch.rank)))


def draw_first_batch(
    path: Path, recipe: Recipe, launch: Launch, training: ImageSource, validation: ImageSource | None
) -> str:
    """Draw the first micro-batch into a PNG file, and return a line about it. Further arguments as `load_first_batch`.

    Args:
        path: checked by `pictures.check_place`.

    Raises:
        InputError: the images cannot be loaded, or the file cannot be written.
    """
    batch = load_first_batch(recipe, launch, training, validation)
    shown = min(len(batch.images), MOST_IMAGES)
    views = [batch.images[:shown]]
    side = recipe.teacher.input_size if recipe.teacher is not None else None
    if side is not None and side != views[0].shape[-1]:
        views.append(F.interpolate(views[0].float(), (side, side), mode="bilinear", antialias=True))
    captions: list[list[str]] = [[]] * shown
    if recipe.data.labels:
        captions = [describe_label(label, training.class_names) for label in batch.labels[:shown]]
    picture = _draw([[_as_picture(image) for image in view] for view in views], captions)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    pictures.write(path, buffer.getvalue(), pictures.DRY_RUN)
    teachers = f", and below each the teacher's view of {side}×{side}" if len(views) > 1 else ""
    return f"{path}: {shown} of the {len(batch.images)} images of step 1's first micro-batch{teachers}"


def describe_label(label: torch.Tensor, names: Sequence[str] | None) -> list[str]:
    """Return the name of a class, or the shares and names of the two classes of a mixed image, one a line.

    Args:
        label: a class (), or probabilities (K,).
        names: of the classes; None: not known.
    """

    def name(index: int) -> str:
        return names[index] if names is not None and index < len(names) else f"class {index}"

    if label.dim() == 0:
        return [name(int(label))]
    shares, classes = label.topk(min(2, len(label)))
    found = [(name(int(i)), float(share)) for i, share in zip(classes, shares, strict=True) if share > 0]
    return [found[0][0]] if len(found) == 1 else [f"{share:.2f} {which}" for which, share in found]


def _as_picture(image: torch.Tensor) -> Image.Image:
    """Return an image (3, H, W) from 0 to 255 in its own pixels, whole multiples of them where it is small, or shrunk
    where it is large."""
    pixels = image.float().round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    side = picture.width
    if side > 2 * _TILE:
        return picture.resize((2 * _TILE, 2 * _TILE), Image.Resampling.LANCZOS)
    factor = max(1, round(_TILE / side))
    return picture.resize((factor * side, factor * side), Image.Resampling.NEAREST)


def _draw(views: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Return a sheet of tiles: the views of an image below each other, and the lines of its caption below them."""
    width = max(view[0].width for view in views)
    height = sum(view[0].height for view in views) + _LINE * max(map(len, captions))
    columns = min(_COLUMNS, len(captions))
    rows = math.ceil(len(captions) / columns)
    sheet = Image.new(
        "RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), (255, 255, 255)
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, caption in enumerate(captions):
        left = _MARGIN + i % columns * (width + _MARGIN)
        top = _MARGIN + i // columns * (height + _MARGIN)
        for view in views:
            sheet.paste(view[i], (left, top))
            top += view[i].height
        for number, line in enumerate(caption):
            # The font that Pillow brings has the letters of Latin-1.
            text = line.encode("latin-1", "replace").decode("latin-1")
            while len(text) > 1 and pen.textlength(text, font=font) > width:
                text = text[:-1]
            pen.text((left, top + 1 + number * _LINE), text, fill=(0, 0, 0), font=font)
    return sheet
