"""Run the student and the teacher of a finished run on the same validation images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dkd.build.data import build_image_pipeline, open_validation_part, teacher_normalize
from dkd.build.models import load_teacher_weights, teacher_spec
from dkd.build.models import pairs as loss_pairs
from dkd.config import Recipe
from dkd.config.derived import classes
from dkd.data import DataError, ImagePipeline, ImageSource, Normalize
from dkd.data.sources import has_labels, match_classes, runs_user_code
from dkd.data.transforms import BatchTransform
from dkd.losses.attention_transfer import attention_map, token_grid, tokens_of_both
from dkd.models import (
    ModelSpec,
    TapError,
    TappedModel,
    UnknownModelError,
    WeightsError,
    build_model,
    load_student,
    read_description,
    student_spec,
)
from dkd.report.run_files import RunFiles
from dkd.user_code import describe_error

CLASSES_SHOWN = 10
IMAGES_OF_A_CLASS = 20
UNLABELLED = "all images"
"""What images without labels are called in place of a class."""
_BATCH = 50
_GRAM_BYTES = 2**29  # a tap whose float32 features take more bytes gets no Gram matrix


@dataclass(frozen=True)
class ModelView:
    """The outputs and features of one model on the images of an `Observation`.

    There are n classified images and s shown images.

    Args:
        classifies: whether the model's outputs are the classes of the data.
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
    """The views of both models of a run on the same validation images.

    Args:
        pairs: (student path, teacher path), shown one after the other.
        images: (s, 3, H, W) uint8, the shown images, sorted by class.
        shown_labels: (s,) classes of the shown images.
        labels: (n,) classes of the classified images; None where these have no labels.
        class_names: the name of each class. Images without labels are shown as those of one class.
        notes: one sentence for each thing that could not be observed, and why.
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
        run: the run whose student is observed.
        others: runs of the same report. A run without taps or without a teacher is observed with theirs where the
            students are alike.
        count: images to classify, spread over the validation set; None: 2,000, or 20 a class where that is more.
        trust_code: import every module:callable that the recipe and student.json name.

    Returns:
        The observation. Its notes state what could not be observed, and why.
    """
    notes: list[str] = []
    if not run.weights.is_file():
        return Observation(
            notes=["there is no finished student yet: no attention maps, Gram matrices or accuracies of classes"]
        )
    recipe = _with_taps(run, others, notes)
    try:
        description = read_description(run.weights)
        spec = student_spec(description)
        images = _open_images(recipe, count, trust_code, description.get("class_names"), notes)
        student = load_student(run.weights, trust_code)
    except (DataError, UnknownModelError, WeightsError, OSError) as error:
        return Observation(notes=[*notes, f"no pictures of features: {error}"])
    pairs = list(dict.fromkeys(loss_pairs(recipe)))
    own = teacher = None
    try:
        taps = [s for s, _ in pairs]
        own = _view_model(spec, student, taps, images, images.pipeline.normalize, None, recipe, notes)
        if recipe.teacher is not None:
            teacher = _view_teacher(recipe, [t for _, t in pairs], images, trust_code, notes)
    except (DataError, UnknownModelError, WeightsError, TapError, RuntimeError, OSError) as error:
        notes.append(f"pictures are missing: {error} (paths of a recipe are relative to where the command is started)")
        if own is None:
            return Observation(notes=notes)
    shown = np.concatenate([batch.numpy() for batch in images.read(images.shown)])
    if not recipe.data.labels:
        of_one_class = np.zeros(len(images.shown), dtype=np.int64)
        return Observation(pairs, shown, of_one_class, None, [UNLABELLED], own, teacher, notes)
    labels = images.source.labels
    names = images.source.class_names or [str(label) for label in range(classes(recipe))]
    return Observation(pairs, shown, labels[images.shown], labels[images.classified], names, own, teacher, notes)


@dataclass(frozen=True)
class _Images:
    """The validation images of an observation.

    Args:
        shown, classified: indices into `source`.
    """

    source: ImageSource
    pipeline: ImagePipeline
    shown: np.ndarray
    classified: np.ndarray

    def read(self, indices: np.ndarray) -> Iterator[torch.Tensor]:
        """Yield batches of images, (b, 3, H, W) uint8, not normalised yet."""
        transform = self.pipeline.validation
        for start in range(0, len(indices), _BATCH):
            decoded = [self.source.image(int(index)) for index in indices[start : start + _BATCH]]
            if isinstance(transform, BatchTransform) and len({image.shape for image in decoded}) == 1:
                yield transform(torch.stack(decoded))
            else:
                yield torch.stack([transform(image) for image in decoded])


def _open_images(
    recipe: Recipe, count: int | None, trust_code: bool, names: list[str] | None, notes: list[str]
) -> _Images:
    """Open the validation images and choose those to show and to classify. Raises DataError.

    Args:
        names: of the student's classes; None: not known.
    """
    data = recipe.data
    place = data.validation if isinstance(data.validation, str) else data.train
    if runs_user_code(place) and not trust_code:
        raise DataError(f"{place!r} is code to be imported; allow it with --trust-code")
    source = open_validation_part(recipe)
    if source is None:
        raise DataError("the run has no validation images")
    match_classes(names, source)
    wanted = count or max(2000, 20 * classes(recipe))
    shown, classified = (_select_readable(source, chosen, recipe, notes) for chosen in _choose(source, wanted))
    return _Images(source, build_image_pipeline(recipe), shown, classified)


def _view_teacher(recipe: Recipe, taps: list[str], images: _Images, trust_code: bool, notes: list[str]) -> ModelView:
    """Load the teacher and return its view of the images. Raises UnknownModelError, WeightsError and TapError."""
    section, spec = recipe.teacher, teacher_spec(recipe)
    assert section is not None
    if ":" in section.name and not trust_code:
        raise UnknownModelError(f"the teacher {section.name!r} is code to be imported; allow it with --trust-code")
    model = build_model(spec)
    if section.weights == "random":
        raise WeightsError("the teacher's weights were random")
    load_teacher_weights(model, section)
    normalize = teacher_normalize(recipe, images.pipeline.normalize)[""]
    return _view_model(spec, model, taps, images, normalize, section.input_size, recipe, notes)


def _view_model(
    spec: ModelSpec,
    model: nn.Module,
    taps: list[str],
    images: _Images,
    normalize: Normalize,
    input_size: int | None,
    recipe: Recipe,
    notes: list[str],
) -> ModelView:
    """Run a model on the images and return its view of them. Raises TapError and UnknownModelError.

    Args:
        input_size: pixels, the side to which images are resized for this model; None: as they are.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tapped = TappedModel(model, taps).to(device).eval()

    @torch.no_grad()
    def run(batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        normalized = normalize(batch.to(device))
        if input_size is not None and input_size != normalized.shape[-1]:
            normalized = F.interpolate(normalized, (input_size, input_size), mode="bilinear", antialias=True)
        try:
            logits, features = tapped(normalized)
        except TapError:
            raise
        except (Exception, SystemExit) as error:  # a model may run a user's own code
            raise UnknownModelError(f"{spec.name!r} fails: {describe_error(error)}") from error
        assert logits is not None
        return logits, features

    predictions = np.concatenate([run(batch)[0].argmax(1).cpu().numpy() for batch in images.read(images.classified)])
    parts: dict[str, list[torch.Tensor]] = {tap: [] for tap in taps}
    for batch in images.read(images.shown):
        for tap, feature in run(batch)[1].items():
            parts[tap].append(feature.float().cpu())
    tokens = tokens_of_both(recipe.losses.at.class_tokens if recipe.losses.at else None)
    class_tokens = tokens[1 if recipe.teacher is not None and spec == teacher_spec(recipe) else 0]
    found = {tap: torch.cat(features) for tap, features in parts.items() if features}
    return _summarize(spec.name, spec.classes == classes(recipe), predictions, found, class_tokens, notes)


def _with_taps(run: RunFiles, others: Sequence[RunFiles], notes: list[str]) -> Recipe:
    """Return the run's recipe; where the recipe has no taps, with those of another run of the same student, and with
    that run's teacher."""
    if loss_pairs(run.recipe):
        return run.recipe
    for other in others:
        alike = other.recipe.student == run.recipe.student and run.recipe.teacher in (None, other.recipe.teacher)
        if alike and loss_pairs(other.recipe):
            notes.append(f"this run taps no features; those of {other.label} are shown, with its teacher")
            return run.recipe.model_copy(update={"teacher": other.recipe.teacher, "losses": other.recipe.losses})
    notes.append("the recipe taps no features: no attention maps and no Gram matrices")
    return run.recipe


def _choose(source: ImageSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to show (a few of each of several classes, sorted by class), and of those to
    classify."""
    present = np.unique(source.labels)
    if not has_labels(source):
        most = CLASSES_SHOWN * IMAGES_OF_A_CLASS
        return _spread(source, most), _spread(source, count)
    classes = present[np.linspace(0, len(present) - 1, min(CLASSES_SHOWN, len(present))).round().astype(int)]
    shown = np.concatenate([np.flatnonzero(source.labels == label)[:IMAGES_OF_A_CLASS] for label in classes])
    return shown, _spread(source, count)


def _spread(source: ImageSource, count: int) -> np.ndarray:
    """Return the indices of at most so many images, spread over a source."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))


def _select_readable(source: ImageSource, indices: np.ndarray, recipe: Recipe, notes: list[str]) -> np.ndarray:
    """Return `indices`; where the recipe skips images that cannot be read, without those images."""
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


def _summarize(
    name: str,
    classifies: bool,
    predictions: np.ndarray,
    features: Mapping[str, torch.Tensor],
    class_tokens: int | None,
    notes: list[str],
) -> ModelView:
    """Return the view of a model: its predictions, and what the report draws of its features."""
    channels, attention, gram = {}, {}, {}
    for tap, feature in features.items():
        as_map = _as_map(feature, class_tokens)
        # Tokens (s, N, C) of transformers have their channels last; (s, C) as it is.
        means = feature.mean(1) if feature.dim() == 3 else feature if as_map is None else as_map.mean((2, 3))
        channels[tap] = means.numpy()
        if as_map is not None:
            attention[tap] = attention_map(as_map).numpy()
        if feature.numel() * 4 <= _GRAM_BYTES:
            rows = feature.flatten(1)
            gram[tap] = F.normalize(rows @ rows.T).numpy()
        else:
            notes.append(f"{name} {tap}: {feature[0].numel():,} features an image are too many for a Gram matrix here")
    return ModelView(name, classifies, predictions, channels, attention, gram)


def _as_map(feature: torch.Tensor, class_tokens: int | None) -> torch.Tensor | None:
    """Return features as maps (s, C, h, w), or None for features without positions.

    Tokens (s, N, C) become maps when N, less the class tokens, fits a grid.

    Args:
        class_tokens: number of class tokens; None: try 0 and 1.
    """
    if feature.dim() == 4:
        shape = tuple(feature.shape[1:])
        return feature if token_grid(shape, None, square=True) == shape else feature.permute(0, 3, 1, 2)
    for count in ((0, 1) if class_tokens is None else (class_tokens,)) if feature.dim() == 3 else ():
        try:
            shape = token_grid(tuple(feature.shape[1:]), count)
        except ValueError:
            continue
        return feature[:, count:].transpose(1, 2).reshape(len(feature), *shape)
    return None
