"""`dkd new`: write a recipe for a teacher, a student and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkd import console
from dkd.commands.arguments import positive
from dkd.commands.command import Command
from dkd.errors import InputError

if TYPE_CHECKING:
    from dkd.commands.new.choices import Choices
    from dkd.commands.new.models import NamedModel

_EXAMPLES = """
examples:
  dkd new --teacher torchvision/resnet34 --student torchvision/resnet18 --data photos
                                                          photos/CLASS/*.jpg, or photos/train and photos/val
  dkd new --student torchvision/resnet34=pretrained --data photos -o teacher.yaml
                                                          no teacher: fine-tune a model, which may teach another
  dkd new --teacher runs/teacher --student wrn_16_1 --data 'images/*.parquet' --validation 0.2
  dkd new --teacher timm/vit_small_patch16_224 --student timm/vit_tiny_patch16_224 --data hub:NAME --losses at,sp
  dkd new --teacher hf/FOLDER --student torchvision/mobilenet_v3_small --data folder:photos -o -

  dkd new --teacher torchvision/resnet50 --student torchvision/resnet18 --data photos --no-labels
                                                          all images in photos, which need no labels

then: dkd train RECIPE --dry-run, dkd launch RECIPE; or at once: dkd distill with the same options
"""


OUTPUTS = 1000
"""Outputs of a student without labels, where the teacher's weights state no classes: no loss reads them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dkd new`."""
    add_choices(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="recipe.yaml", help="the recipe (default recipe.yaml); - prints it"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `dkd new` and `dkd distill` share."""
    model = "a model of `dkd inspect --list`, torchvision/NAME, timm/NAME, hf/NAME-OR-FOLDER or module:callable"
    parser.add_argument(
        "--teacher",
        metavar="NAME[=WEIGHTS]",
        help=f"{model}; or a run of dkd. WEIGHTS: a file, a run, a weight set of torchvision, pretrained or as_built "
        "(default: the library's own)",
    )
    parser.add_argument("--student", metavar="NAME[=WEIGHTS]", required=True, help="likewise (default: no weights)")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        required=True,
        help="a folder of images, of parquet files or of a saved data set; or a name as in data.train",
    )
    parser.add_argument(
        "--validation",
        metavar="SOURCE",
        help="likewise, or a fraction of the training images, or none (default: what lies beside them, else 0.1)",
    )
    parser.add_argument(
        "--no-labels",
        action="store_true",
        help="the images have no labels: a folder needs no folders of classes, and the teacher alone is learned from",
    )
    parser.add_argument("--losses", metavar="LIST", help="of at, sp and kd, with commas (default: all that fit)")
    parser.add_argument("--name", metavar="NAME", help="name of the run (default: made of the models' names)")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images, of data in columns")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels, of data in columns")
    for whose in ("student", "teacher"):
        parser.add_argument(
            f"--{whose}-options",
            metavar="YAML",
            help=f"keyword arguments of the {whose}, such as '{{img_size: 64}}'",
        )
    for name, metavar, what in (
        ("--image-size", "PIXELS", "side of the images that the student sees"),
        ("--teacher-size", "PIXELS", "side of the images that the teacher sees"),
        ("--batch", "B", "samples of a step, over all processes"),
        ("--epochs", "N", "epochs"),
    ):
        parser.add_argument(name, type=positive, metavar=metavar, help=f"{what} (default: chosen)")


def run(options: argparse.Namespace) -> int:
    """Write the recipe, print what was chosen, and return exit code 0."""
    path = Path(options.output)
    if options.output != "-" and path.exists() and not options.force:
        raise InputError(f"{options.output!r} exists; choose another -o FILE, or replace it with --force")
    chosen, text = make_recipe(options)
    if options.output == "-":
        console.show(*text.rstrip("\n").split("\n"))
        return 0
    write_recipe(path, text)
    console.show(*describe(chosen), f"written      {path}", f"next         dkd train {path} --dry-run")
    return 0


def make_recipe(options: argparse.Namespace) -> tuple[Choices, str]:
    """Choose everything of a recipe, and return the choices with the recipe's text, which has been read back and
    checked. Raises InputError."""
    from dkd.commands.new.choices import Asked, choose
    from dkd.commands.new.images import look_at
    from dkd.commands.new.models import read_model
    from dkd.commands.new.text import recipe_text
    from dkd.data import DataError

    losses = None if options.losses is None else tuple(filter(None, options.losses.split(",")))
    asked = Asked(losses, options.image_size, options.epochs, options.batch, options.name, options.teacher_size)
    student = read_model(options.student, is_teacher=False, options=_read_options(options.student_options, "student"))
    teacher = None
    if options.teacher is not None:
        teacher = read_model(
            options.teacher, is_teacher=True, options=_read_options(options.teacher_options, "teacher")
        )
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    try:
        unlabelled = _count_unlabelled(options, teacher) if options.no_labels else 0
        images = look_at(options.data, options.validation, columns, unlabelled)
    except DataError as error:  # in a training, that is an image which cannot be read; here it is the argument
        said = str(error).replace("set data.labels=false", "add --no-labels")
        raise InputError(said.replace("set data.", "name it by --").replace("_column", "-column")) from error
    chosen = choose(images, student, teacher, asked)
    text = recipe_text(chosen)
    _check(text)
    return chosen, text


def _count_unlabelled(options: argparse.Namespace, teacher: NamedModel | None) -> int:
    """Return the number of classes of images without labels: the teacher's. Raises InputError."""
    if teacher is None:
        raise InputError("--no-labels needs --teacher: without labels there is nothing else to learn from")
    if options.label_column is not None:
        raise InputError("--label-column names labels, and --no-labels ignores them: leave one of the two out")
    return teacher.known_classes() or OUTPUTS


def _read_options(text: str | None, whose: str) -> dict[str, Any]:
    """Return keyword arguments that the command line gives as YAML. Raises InputError."""
    if text is None:
        return {}
    from dkd.config.yaml_text import YamlTextError, read_argument

    try:
        values = read_argument(text)
    except YamlTextError as error:
        raise InputError(f"--{whose}-options {text!r} {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--{whose}-options {text!r}: write a mapping such as '{{img_size: 64}}'")
    return values


def _check(text: str) -> None:
    """Check the recipe as `dkd train` would. Raises RecipeError: what the options ask for does not work."""
    import yaml

    from dkd.config.loading import build_recipe
    from dkd.launch import Launch
    from dkd.preflight.check import check
    from dkd.preflight.completion import complete
    from dkd.preflight.data import open_sources
    from dkd.preflight.models import check_class_order

    recipe, _ = complete(build_recipe(yaml.safe_load(text)))
    check(recipe, Launch(), None)
    on_disk = recipe.model_copy(update={"data": recipe.data.model_copy(update={"in_memory": False})})
    training, _ = open_sources(on_disk, Launch())
    check_class_order(recipe, training.class_names)


def write_recipe(path: Path, text: str) -> None:
    """Write a recipe. Raises InputError where the file cannot be written."""
    from dkd import atomic_files

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.replace_text(path, text)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def describe(chosen: Choices) -> list[str]:
    """Return lines that report what was chosen."""
    images, student, teacher = chosen.images, chosen.student, chosen.teacher
    names = (
        "" if images.class_names is None else f" ({', '.join(images.class_names[:4])}{', ...' * (images.classes > 4)})"
    )
    validation = (
        "no validation"
        if images.validation is None
        else f"{images.validation:.0%} of them for validation"
        if isinstance(images.validation, float)
        else f"validation {images.validation}"
    )
    lines = [
        (
            "data",
            f"{images.count:,} images of {images.classes} classes{names}; {validation}"
            if images.labels
            else f"{images.count:,} images without labels; {validation}",
        ),
        ("student", f"{student.name}, {student.weights or 'random weights'}, images of {chosen.image_size} pixels"),
    ]
    if teacher is not None:
        size = chosen.teacher_size or chosen.image_size
        lines.append(("teacher", f"{teacher.name}, {teacher.weights}, images of {size} pixels"))
    if chosen.losses:
        lines.append(("losses", ", ".join((*(("ce",) if images.labels else ()), *chosen.losses))))
    if chosen.pairs is not None:
        lines += [("pairs" if number == 0 else "", line) for number, line in enumerate(chosen.pairs.table())]
    optimizer = "adamw" if chosen.adamw else "sgd"
    lines.append(
        ("training", f"{chosen.epochs} epochs, global batch {chosen.global_batch}, {optimizer}, lr {chosen.lr:g}")
    )
    if images.columns:
        lines.insert(1, ("columns", ", ".join(f"{key} {column}" for key, column in images.columns.items())))
    lines += [("note", note) for note in chosen.notes]
    return [f"{name:<12} {text}" for name, text in lines]


COMMAND = Command(
    "new",
    "Write a recipe for a teacher, a student and your images.",
    _EXAMPLES,
    add_arguments,
    run,
    "Write a complete, commented recipe for a student, a teacher and images: the pairs of features, sizes, "
    "normalisation, batch, optimizer and schedule are chosen, and the choices are printed. A model or data set that is "
    "named as module:callable is imported and called: its code runs.",
)
