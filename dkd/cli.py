"""The command line: `dkd train · evaluate · status · report · export · inspect · plan · launch-check`.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from dkd import __version__, console, environment
from dkd.errors import InputError
from dkd.text import shorten

if TYPE_CHECKING:
    from dkd.config import Recipe
    from dkd.runs.launches import IfRunExists

BAD_INPUT = 2
INTERRUPTED = 130  # by SIGINT, as shells say it
OPEN_FILES = 256
"""A process may need this many at once, for 8 worker processes, their batches, and libraries that are loaded on the
way."""
_MOST_DIGITS = 12
_MOST_SECONDS = 86_400

_EXAMPLES = {
    "dkd": """
examples:
  dkd train configs/quickstart.yaml --dry-run
  accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m dkd train configs/quickstart.yaml
  dkd evaluate runs/quickstart
  dkd inspect torchvision/resnet18
  dkd plan configs/examples/imagenet_r34_r18_at_sp.yaml --nodes 8 --gpus-per-node 8
  dkd status runs/quickstart
  dkd report runs/quickstart
  dkd export runs/quickstart --format onnx

exit codes: 0 done; 2 wrong input (a recipe, file, name, argument or environment variable), nothing was started; 75 stopped when asked, the
same command resumes; 1 anything else
""",
    "train": """
examples:
  dkd train recipe.yaml                                   one process
  dkd train recipe.yaml train.epochs=10 optimizer.lr=0.05 keys of the recipe overridden; values are YAML
  dkd train recipe.yaml teacher=null losses.at=null       sections removed
  dkd train recipe.yaml --dry-run                         check files, models and taps; train nothing
  dkd train recipe.yaml                                   again: go on behind the newest checkpoint in run.dir
  dkd train recipe.yaml train.epochs=20 --allow-recipe-change   go on, but longer
  dkd train recipe.yaml --overwrite                       start anew
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd train recipe.yaml
  sbatch launch/slurm/train.sbatch recipe.yaml            on a cluster
  touch RUN/STOP                                          stop it behind a checkpoint; so do SIGTERM, SIGUSR1, SIGHUP (exit code 75)
""",
    "evaluate": """
examples:
  dkd evaluate runs/quickstart                            the finished student of a run
  dkd evaluate runs/quickstart/checkpoints/step_00000100  the weights after a step
  dkd evaluate runs/quickstart data.validation='other-*.parquet' evaluation.batch=64
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd evaluate runs/quickstart
""",
    "status": """
examples:
  dkd status runs/quickstart
  dkd status recipe.yaml run.name=other                   the run that `dkd train` of the same words makes
  dkd status recipe.yaml --print-directory                its folder alone, for scripts; a file in it tells how it ended:
                                                          FINISHED, PREEMPTED or STOPPED
""",
    "launch-check": """
examples:
  dkd launch-check recipe.yaml                            this process alone
  accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8 -m dkd launch-check recipe.yaml

exit codes: 0 all is well; 1 a rank did not come, differs from the others, or cannot talk to them; 2 the recipe is wrong
""",
    "inspect": """
examples:
  dkd inspect torchvision/resnet34                        paths, output shapes and parameters
  dkd inspect wrn_40_2 --image-size 32 --classes 100
  dkd inspect --list                                      names of models
""",
    "report": """
examples:
  dkd report runs/quickstart                              writes runs/quickstart/report.html
  dkd report runs/a runs/b runs/c --output compared.html  several runs, compared
""",
    "export": """
examples:
  dkd export runs/quickstart --format onnx                runs/quickstart/student.onnx
  dkd export runs/quickstart --format onnx --normalization --output digits.onnx
  dkd export runs/r34_r18 --format torchvision            for torchvision.models.resnet18().load_state_dict(torch.load(...))
  dkd export runs/quickstart/checkpoints/step_00000100 --format safetensors --output step100.safetensors
""",
    "plan": """
examples:
  dkd plan recipe.yaml --gpus-per-node 8                  one machine with 8 GPUs
  dkd plan recipe.yaml --nodes 8 --gpus-per-node 8        64 processes
  dkd plan recipe.yaml --nodes 8 train.global_batch=4096 losses.sp.comm_dtype=bf16
""",
}


_IMPORTS = (
    "Whatever the recipe names as module:callable (models, losses, data) is imported and called: that runs its code."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    console.accept_all_letters()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {
        "train": (_train_parser, _train),
        "evaluate": (_evaluate_parser, _evaluate),
        "status": (_status_parser, _status),
        "inspect": (_inspect_parser, _inspect),
        "plan": (_plan_parser, _plan),
        "report": (_report_parser, _report),
        "export": (_export_parser, _export),
        "launch-check": (_launch_check_parser, _launch_check),
    }
    if not arguments or arguments[0] not in commands:
        parser = _parser("dkd", "Distributed knowledge distillation for vision models.")
        parser.add_argument("--version", action="version", version=f"dkd {__version__}")
        parser.add_argument(
            "command",
            metavar="COMMAND",
            choices=commands,
            help=f"{', '.join(list(commands)[:-1])} or launch-check; each has its own --help",
        )
        parser.parse_args(arguments)
    make_parser, run = commands[arguments[0]]
    # Intermixed: options and overrides come in any order.
    options = make_parser().parse_intermixed_args(arguments[1:])
    options.started = False
    try:
        if any("\0" in argument for argument in arguments):  # from Python code: a shell cannot pass it
            raise InputError("an argument holds a zero byte, which no name can")
        _allow_open_files()
        return run(options)
    except KeyboardInterrupt:
        if environment.speaks_for_machine():
            console.say("")
            console.say("dkd: interrupted; what was written stays")
        os._exit(INTERRUPTED)  # at once, as was asked for
    except console.Unwritable as error:
        if error.reason:
            console.say(f"dkd: the result cannot be written to standard output: {error.reason}")
        return 1
    except (Exception, SystemExit) as error:
        if _is_data_error(error):
            # An image that cannot be read, found on the way: whichever rank met it says so; the launcher ends the
            # others.
            console.say(f"dkd: rank {os.environ.get('RANK', '0')}: {_one_line(error)}")
            return 1
        if options.started:
            raise
        problems = _problems_of_input(error)
        if problems is None:
            raise
        # One process of each machine speaks; what is wrong is the same for its neighbours.
        if environment.speaks_for_machine():
            for problem in problems:
                console.say(f"dkd: {problem}")
        return BAD_INPUT
    finally:
        console.settle()


def _problems_of_input(error: BaseException) -> list[str] | None:
    """Return a line for each thing that is wrong with what this process was given, or None for any other error: that is
    a bug of dkd."""
    problems = getattr(error, "problems", None)
    if isinstance(error, InputError):
        return [str(problem) for problem in problems] if problems else [_one_line(error)]
    if isinstance(error, OSError):
        files = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        return [
            shorten(f"{files}: {error.strerror}")
            if files and error.strerror
            else f"{type(error).__name__}: {_one_line(error)}"
        ]
    if isinstance(error, SystemExit):  # dkd has none of its own here
        from dkd.user_code import describe_error

        return [f"code that the recipe or the command names ended the program: {describe_error(error)}"]
    return None


@contextmanager
def _input_is_refused() -> Iterator[None]:
    """Make a RecipeError of any error of input: the ranks of a launch tell each other of those."""
    from dkd.config import Problem, RecipeError

    try:
        yield
    except (Exception, SystemExit) as error:
        problems = None if isinstance(error, RecipeError) else _problems_of_input(error)
        if problems is None:
            raise
        raise RecipeError([Problem("", problem) for problem in problems]) from error


def _one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split())) or type(error).__name__


def _allow_open_files() -> None:
    """Raise this process's limit of open files, where it is low and the system lets it. Raises InputError where it
    stays low."""
    import resource

    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if limit == unlimited or limit >= OPEN_FILES:
        return
    if highest != unlimited and highest < OPEN_FILES:
        raise InputError(
            f"this process may open {highest} files at once, and dkd needs {OPEN_FILES}; raise the limit: ulimit -n "
            f"{4 * OPEN_FILES}"
        )
    wanted = 4 * OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if highest == unlimited else min(highest, wanted), highest))


def _check_environment() -> None:
    """Refuse wrong environment variables, for commands that a launcher may start. Raises RecipeError."""
    from dkd.config import Problem, RecipeError

    found = environment.problems()
    if found:
        with _refused_by_all():
            raise RecipeError([Problem("", problem) for problem in found])


@contextmanager
def _refused_by_all() -> Iterator[None]:
    """Make a RecipeError of any error of input, and tell it to the other ranks, which have not met yet: it may be one
    machine's alone."""
    from dkd.config import RecipeError

    try:
        with _input_is_refused():
            yield
    except RecipeError:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not environment.ranks_can_meet():
            raise
        from dkd.distributed import process_group

        with process_group.tells_refusals():
            raise


def _load(options: argparse.Namespace) -> Recipe:
    """The recipe, for a command that all ranks run together."""
    from dkd.config import load_recipe

    with _refused_by_all():
        return load_recipe(options.recipe, options.overrides)


def _train(options: argparse.Namespace) -> int:
    console.never_fail()  # whatever happens to the log, training goes on
    _check_environment()
    recipe = _load(options)

    from dkd.distributed import process_group, stop_signals
    from dkd.preflight import checks

    existing: IfRunExists = "replace" if options.overwrite else "refuse" if options.fresh else "resume"
    with process_group.tells_refusals(), _input_is_refused():
        changes = checks.check(recipe, existing, options.allow_recipe_change)
    for change in changes:
        _say_once(f"the run goes on with another recipe: {change}")
    if options.dry_run:
        return _dry_run(recipe)

    stop_signals.note_signals()

    from dkd.distributed.rendezvous import RendezvousError
    from dkd.engines.engine import leave_process_group
    from dkd.errors import LostRankError, Stopped, TrainingError
    from dkd.training.trainer import Trainer

    # All ranks leave the group together, or the process just ends: with NCCL, leaving it alone would wait for the
    # others.
    code = 0
    try:
        with process_group.tells_refusals(), _input_is_refused():
            trainer = Trainer(recipe, existing, options.allow_recipe_change)
        options.started = True
        trainer.run()
    except (TrainingError, Stopped) as error:
        _say_once(str(error))
        code = stop_signals.exit_code() if isinstance(error, Stopped) else 1
    except (LostRankError, RendezvousError) as error:
        console.say(f"dkd: rank {os.environ.get('RANK', '0')} cannot go on: {error}")
        # At once: what waits for the others at exit would wait for a rank that is gone.
        os._exit(1)
    finally:
        stop_signals.stop_noting()
    leave_process_group()
    return code


def _say_once(message: str) -> None:
    """On the first rank; it is the same on all."""
    if os.environ.get("RANK", "0") == "0":
        console.say(f"dkd: {message}")


def _is_data_error(error: BaseException) -> bool:
    data = sys.modules.get("dkd.data")
    return data is not None and isinstance(error, data.DataError)


def _dry_run(recipe: Recipe) -> int:
    from dkd.commands.dry_run import describe
    from dkd.config import recipe_to_yaml

    described = describe(recipe)
    console.show(*recipe_to_yaml(recipe).split("\n"), *described.split("\n"))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _check_environment()
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError(
            "the launch asks for a dynamo_backend (ACCELERATE_DYNAMO_BACKEND); leave it out: an evaluation compiles "
            "nothing"
        )

    from dkd.distributed import process_group
    from dkd.engines.engine import leave_process_group
    from dkd.training.evaluate_export import evaluate_export

    try:
        with process_group.tells_refusals():
            result = evaluate_export(options.target, options.overrides, options.trust_code)
    except console.Unwritable:  # on the rank that prints: the others are waiting for it
        leave_process_group()
        raise
    leave_process_group()
    if result.problem:
        _say_once(result.problem)
    return 1 if result.problem else 0


def _status(options: argparse.Namespace) -> int:
    from pathlib import Path

    from dkd.config import load_recipe

    target = Path(options.target)
    if target.is_dir() and options.overrides:
        raise InputError("overrides belong to a recipe, not to a run directory")
    run_dir = target if target.is_dir() else Path(load_recipe(target, options.overrides).run.dir)
    if options.print_directory:
        console.show(str(run_dir))
        return 0

    from dkd.runs.status import describe

    console.show(*describe(run_dir))
    return 0


def _launch_check(options: argparse.Namespace) -> int:
    _check_environment()
    recipe = None if options.recipe is None else _load(options)

    from dkd.commands.launch_check.check import check_launch
    from dkd.engines.engine import leave_process_group

    rank = os.environ.get("RANK", "0")
    try:
        found = check_launch(recipe, options.seconds)
    except RuntimeError as error:
        console.say(f"dkd: launch-check: rank {rank}: {error}")
        os._exit(1)  # the others may be out of reach: nothing is to wait for them
    try:
        if rank == "0":
            console.show(*found.lines)
            for warning in found.warnings:
                console.say(f"dkd: warning: {warning}")
            for problem in found.problems:
                console.say(f"dkd: launch-check: {problem}")
            console.show("launch-check: this launch cannot train" if found.problems else "launch-check: all is well")
    finally:
        leave_process_group()  # the other ranks are waiting for this one, whether its lines could be written or not
    return 1 if found.problems else 0


def _inspect(options: argparse.Namespace) -> int:
    from dkd.models import ModelSpec, known_names, module_rows

    if options.list:
        console.show(*known_names())
        return 0
    if options.model is None:
        raise InputError("name a model, such as wrn_16_2, or give --list")
    rows = module_rows(ModelSpec(options.model, options.classes, options.norm), options.image_size)
    width = max(len(row.path) for row in rows)
    lines = [f"{'path':{width}}  {'output':>18}  {'parameters':>12}  class"]
    for row in rows:
        shape = "×".join(map(str, row.shape)) if row.shape is not None else "-"
        called = "" if row.calls == 1 else f"  (called {row.calls} times: no tap)"
        lines.append(f"{row.path or '.':{width}}  {shape:>18}  {row.parameters:>12,}  {row.kind}{called}")
    console.show(*lines)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from dkd.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from dkd.commands.plan.plan import describe, plan

    console.show(*describe(plan(recipe, options.nodes, options.gpus_per_node)).split("\n"))
    return 0


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    output = Path(options.output) if options.output else Path(options.runs[0]) / "report.html"
    if output.suffix not in (".html", ".htm"):
        raise InputError(f"--output {str(output)!r} must end in .html")
    try:
        from dkd.report import write_report
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        raise InputError("dkd report draws with matplotlib: pip install 'dkd[report]'") from None

    def say(message: str) -> None:
        console.say(f"{message} ...")

    written = write_report([Path(run) for run in options.runs], output, options.images, options.trust_code, say)
    console.show(f"{written[0]}, and {len(written) - 1} pictures in {written[0].stem}_pictures/")
    return 0


def _export(options: argparse.Namespace) -> int:
    from pathlib import Path

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


def _train_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "train", "Train a student from a recipe; a run that is in run.dir already goes on behind its newest checkpoint."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the recipe to override")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"check everything that can be checked without training; print what would run. {_IMPORTS}",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start anew; refused where run.dir holds a run, unless --overwrite is given",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew and replace the run that is in run.dir already"
    )
    parser.add_argument(
        "--allow-recipe-change",
        action="store_true",
        help="go on with the run in run.dir although the recipe is no longer what it was",
    )
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = _parser("evaluate", "Exact top-1, top-5 and loss of a trained student: every sample counted once.")
    parser.add_argument(
        "target", metavar="RUN_OR_CHECKPOINT", help="a run directory, a checkpoint in it, or a student.safetensors"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="keys of the run's data and evaluation sections, train.precision",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import the module:callable that a student.json names as its architecture",
    )
    return parser


def _status_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "status", "What has become of a run: finished, preempted or stopped; its newest checkpoint, its last numbers."
    )
    parser.add_argument("target", metavar="RUN_OR_RECIPE", help="a run directory, or the recipe that a run is of")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="with a recipe: as they were given to train")
    parser.add_argument("--print-directory", action="store_true", help="print the run's folder and nothing else")
    return parser


def _launch_check_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "launch-check",
        "Under the launcher of a training: are all ranks there, alike, and able to talk to each other? Ends in under a "
        "minute. "
        f"With a RECIPE: {_IMPORTS}",
    )
    parser.add_argument("--seconds", type=_seconds, default=50, metavar="N", help="that it may take (default 50)")
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a YAML file: it is checked, too, and its run.dir looked for"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the recipe to override")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "inspect",
        "Paths of a model that can be tapped, with output shapes and parameters. A MODEL of the form module:callable "
        "is imported and "
        "called: that runs its code.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="as student.name in a recipe")
    parser.add_argument("--list", action="store_true", help="list the known names")
    parser.add_argument(
        "--classes", type=_positive, default=1000, metavar="N", help="outputs of the head (default 1000)"
    )
    parser.add_argument(
        "--image-size", type=_positive, default=224, metavar="PIXELS", help="side of the image (default 224)"
    )
    parser.add_argument(
        "--norm", choices=("batch", "group", "none"), help="normalisation of the CIFAR models (none: nin_* only)"
    )
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "report",
        "One self-contained HTML page, and PNGs, of one or several runs: curves, attention maps, Gram matrices.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
    parser.add_argument("--output", metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument(
        "--images", type=_positive, metavar="N", help="validation images to classify (default 2000, or 20 a class)"
    )
    parser.add_argument(
        "--trust-code", action="store_true", help="import what recipes and student.json name as module:callable"
    )
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _parser("export", "Write a finished student in another format, and check that it gives the same logits.")
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
    parser.add_argument(
        "--trust-code", action="store_true", help="import the module:callable that a student.json names"
    )
    return parser


def _plan_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "plan",
        "What a recipe would move between ranks, hold and compute on a cluster. Opens neither data nor weights, and "
        "needs no GPU. "
        f"{_IMPORTS}",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the recipe to override")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="G", help="GPUs of each, one process for each (default 8)"
    )
    return parser


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(
        prog="dkd" if command == "dkd" else f"dkd {command}",
        description=description,
        epilog=_EXAMPLES[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Names in arguments may come from a shell's `*`."""
        super().error(console.printable(shorten(message)))


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, of at most {_MOST_DIGITS} digits")
    return int(text)


def _seconds(text: str) -> int:
    if _positive(text) > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_SECONDS:,} seconds")
    return int(text)
