"""What student and teacher of a finished run yield for the same validation images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dkd.build import recipe_objects
from dkd.config import Recipe
from dkd.data import DataError, ImageSource, Normalize
from dkd.data.sources import runs_user_code
from dkd.data.transforms import BatchTransform
from dkd.losses.attention_transfer import attention_map, token_grid
from dkd.models import (
    ModelSpec,
    TapError,
    TappedModel,
    UnknownModelError,
    WeightsError,
    build_model,
    load_student,
    load_weights,
    read_description,
    student_spec,
)
from dkd.report.run_files import RunFiles
from dkd.user_code import describe_error

CLASSES_SHOWN = 10
IMAGES_OF_A_CLASS = 20
_BATCH = 50
_GRAM_BYTES = 2**29  # of one tap's features, in float32


@dataclass(frozen=True)
class ModelView:
    """One model on the images of an `Observation`.

    Args:
        classifies: whether its outputs are the classes of the data.
        predictions: (n,) classes, of all images.
        channels: by tap, (n, C) activation of each channel, averaged over positions, of the shown images.
        attention: by tap, (s, h, w) attention maps Σ_c A_c² of the shown images; taps without positions have none.
        gram: by tap, (s, s) row-normalised Gram matrices of the shown images, as SP compares them.
    """

    name: str
    classifies: bool
    predictions: np.ndarray
    channels: Mapping[str, np.ndarray]
    attention: Mapping[str, np.ndarray]
    gram: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Observation:
    """Both models of a run on the same validation images.

    Args:
        pairs: (student path, teacher path), shown one after the other.
        images: (s, 3, H, W) uint8, the shown ones, sorted by class.
        shown_labels: (s,).
        labels: (n,), of all images that were classified.
        class_names: of all classes.
        notes: what could not be shown, and why.
    """

    pairs: Sequence[tuple[str, str]] = ()
    images: np.ndarray | None = None
    shown_labels: np.ndarray | None = None
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()
    student: ModelView | None = None
    teacher: ModelView | None = None
    notes: list[str] = field(default_factory=list)


def observe(
    run: RunFiles, others: Sequence[RunFiles], count: int | None = None, trust_code: bool = False
) -> Observation:
    """Run the models of a run on its validation images.

    Args:
        run: whose student.
        others: runs of the same report; a run without taps or without a teacher is looked at with theirs where the
            students are alike.
        count: images to classify, spread over the validation set; None: 2,000, or 20 a class where that is more.
        trust_code: import what recipe and student.json name as `module:callable`.
    """
    notes: list[str] = []
    if not run.weights.is_file():
        return Observation(
            notes=["there is no finished student yet: no attention maps, Gram matrices or accuracies of classes"]
        )
    recipe = _with_taps(run, others, notes)
    try:
        if runs_user_code(recipe.data.validation) and not trust_code:
            raise DataError(
                f"data.validation={recipe.data.validation!r} is code to be imported; allow it with --trust-code"
            )
        source = recipe_objects.open_part(recipe.data, "validation")
        wanted = count or max(2000, 20 * recipe.data.classes)
        shown, classified = (_readable(source, chosen, recipe, notes) for chosen in _chosen(source, wanted))
        spec = student_spec(read_description(run.weights))
        student = load_student(run.weights, trust_code)
    except (DataError, UnknownModelError, WeightsError, OSError) as error:
        return Observation(notes=[*notes, f"no pictures of features: {error}"])
    pipeline = recipe_objects.build_image_pipeline(recipe)
    pairs = list(dict.fromkeys(recipe_objects.pairs(recipe)))

    def images_at(indices: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(indices), _BATCH):
            decoded = [source.image(int(index)) for index in indices[start : start + _BATCH]]
            if isinstance(pipeline.validation, BatchTransform) and len({image.shape for image in decoded}) == 1:
                yield pipeline.validation(torch.stack(decoded))
            else:
                yield torch.stack([pipeline.validation(image) for image in decoded])

    def view(
        spec: ModelSpec, model: nn.Module, taps: list[str], normalize: Normalize, input_size: int | None
    ) -> ModelView:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tapped = TappedModel(model, taps).to(device).eval()

        @torch.no_grad()
        def run_on(images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            normalized = normalize(images.to(device))
            if input_size is not None and input_size != normalized.shape[-1]:
                normalized = F.interpolate(normalized, (input_size, input_size), mode="bilinear", antialias=True)
            try:
                logits, features = tapped(normalized)
            except TapError:
                raise
            except (Exception, SystemExit) as error:  # any model's own code
                raise UnknownModelError(f"{spec.name!r} fails: {describe_error(error)}") from error
            assert logits is not None
            return logits, features

        predictions = np.concatenate([run_on(images)[0].argmax(1).cpu().numpy() for images in images_at(classified)])
        parts: dict[str, list[torch.Tensor]] = {tap: [] for tap in taps}
        for images in images_at(shown):
            for tap, feature in run_on(images)[1].items():
                parts[tap].append(feature.float().cpu())
        class_tokens = recipe.losses.at.class_tokens if recipe.losses.at else None
        found = {tap: torch.cat(features) for tap, features in parts.items() if features}
        return _view(spec.name, spec.classes == recipe.data.classes, predictions, found, class_tokens, notes)

    seen = teacher = None
    try:
        seen = view(spec, student, [s for s, _ in pairs], pipeline.normalize, None)
        if recipe.teacher is not None:
            section, teacher_spec = recipe.teacher, recipe_objects.teacher_spec(recipe)
            if ":" in section.name and not trust_code:
                raise UnknownModelError(
                    f"the teacher {section.name!r} is code to be imported; allow it with --trust-code"
                )
            model = build_model(teacher_spec)
            if section.weights == "random":
                raise WeightsError("the teacher's weights were random")
            load_weights(model, section.name, section.weights)
            normalize = recipe_objects.teacher_normalize(recipe, pipeline.normalize)
            teacher = view(teacher_spec, model, [t for _, t in pairs], normalize, section.input_size)
    except (DataError, UnknownModelError, WeightsError, TapError, RuntimeError, OSError) as error:
        notes.append(f"pictures are missing: {error} (paths of a recipe are relative to where the command is started)")
        if seen is None:
            return Observation(notes=notes)
    names = source.class_names or [str(label) for label in range(recipe.data.classes)]
    shown_images = np.concatenate([images.numpy() for images in images_at(shown)])
    return Observation(
        pairs, shown_images, source.labels[shown], source.labels[classified], names, seen, teacher, notes
    )


def _with_taps(run: RunFiles, others: Sequence[RunFiles], notes: list[str]) -> Recipe:
    """The run's recipe, with taps and teacher of a run of the same student where it has none."""
    if recipe_objects.pairs(run.recipe):
        return run.recipe
    for other in others:
        alike = other.recipe.student == run.recipe.student and run.recipe.teacher in (None, other.recipe.teacher)
        if alike and recipe_objects.pairs(other.recipe):
            notes.append(f"this run taps no features; those of {other.label} are shown, with its teacher")
            return run.recipe.model_copy(update={"teacher": other.recipe.teacher, "losses": other.recipe.losses})
    notes.append("the recipe taps no features: no attention maps and no Gram matrices")
    return run.recipe


def _chosen(source: ImageSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to show, a few of each of several classes, sorted by class; and of those to classify."""
    present = np.unique(source.labels)
    classes = present[np.linspace(0, len(present) - 1, min(CLASSES_SHOWN, len(present))).round().astype(int)]
    shown = np.concatenate([np.flatnonzero(source.labels == label)[:IMAGES_OF_A_CLASS] for label in classes])
    return shown, np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))


def _readable(source: ImageSource, indices: np.ndarray, recipe: Recipe, notes: list[str]) -> np.ndarray:
    """Where the recipe skips images that cannot be read, those that can."""
    if recipe.data.on_error != "skip":
        return indices
    kept = []
    for index in indices:
        try:
            source.image(int(index))
            kept.append(index)
        except DataError as error:
            notes.append(f"left out: {error}")
    return np.array(kept, dtype=int)


def _view(
    name: str,
    classifies: bool,
    predictions: np.ndarray,
    features: Mapping[str, torch.Tensor],
    class_tokens: int | None,
    notes: list[str],
) -> ModelView:
    channels, attention, gram = {}, {}, {}
    for tap, feature in features.items():
        # (s, C, h, w) of maps; tokens (s, N, C) of transformers have their channels last; (s, C) as it is.
        channels[tap] = (
            feature.mean((2, 3)) if feature.dim() == 4 else feature.mean(1) if feature.dim() == 3 else feature
        ).numpy()
        if (as_map := _as_map(feature, class_tokens)) is not None:
            attention[tap] = attention_map(as_map).numpy()
        if feature.numel() * 4 <= _GRAM_BYTES:
            rows = feature.flatten(1)
            gram[tap] = F.normalize(rows @ rows.T).numpy()
        else:
            notes.append(f"{name} {tap}: {feature[0].numel():,} features an image are too many for a Gram matrix here")
    return ModelView(name, classifies, predictions, channels, attention, gram)


def _as_map(feature: torch.Tensor, class_tokens: int | None) -> torch.Tensor | None:
    """(s, C, h, w), of tokens with as many class tokens as the recipe says, or none or one, too; None: no positions."""
    if feature.dim() == 4:
        return feature
    for count in ((0, 1) if class_tokens is None else (class_tokens,)) if feature.dim() == 3 else ():
        try:
            shape = token_grid(tuple(feature.shape[1:]), count)
        except ValueError:
            continue
        return feature[:, count:].transpose(1, 2).reshape(len(feature), *shape)
    return None
