"""The walls between the rooms of dkd, and rules that hold for every module and every test."""

import ast
import sys
from pathlib import Path

import pytest
from launched import run

ROOT = Path(__file__).resolve().parents[2]
DKD, TESTS = ROOT / "dkd", ROOT / "tests"

# A room or leaf may import those of earlier lines; none of its own line, and none of a later one.
ORDER = (
    # Leaves: single modules that every room may import.
    ("errors", "text", "rng", "machine", "provenance", "files", "installation", "library_internals"),
    ("atomic_files", "user_code"),
    ("launch",),
    ("console",),
    # Rooms.
    ("config", "global_batch"),
    ("losses", "models", "data"),
    ("teacher_cache",),
    ("distillation",),
    ("checkpoints",),
    ("distributed",),
    ("engines",),
    ("build",),
    ("runs",),
    ("preflight",),
    ("training",),
    ("report", "export"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {room: height for height, rooms in enumerate(ORDER) for room in rooms}
# The package itself: its version, and the folder that its code lies in.
IMPORT_THE_PACKAGE = ("cli.py", "commands/launch_check/facts.py")
KNOW_ACCELERATE = ("engines", "library_internals")
KNOW_ENGINES_BY_NAME = ("engines", "launch")
ENGINES = {"single", "ddp", "fsdp2", "zero1", "zero2", "zero3"}

MOST_LINES = 50

MODULES = {path.relative_to(DKD).as_posix(): ast.parse(path.read_text()) for path in sorted(DKD.rglob("*.py"))}


def room_of(module):
    """Return the room or leaf that a module of dkd is in, given its path in dkd/."""
    return Path(module).parts[0].removesuffix(".py")


def imported(tree):
    """Return the full names of the modules that a module imports, wherever in it. Of `from dkd import name`, that is
    dkd.name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            found += [f"dkd.{alias.name}" for alias in node.names] if node.module == "dkd" else [node.module]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_every_room_and_leaf_has_a_place():
    assert {room_of(module) for module in MODULES} - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("room", HEIGHT)
def test_a_room_imports_only_what_stands_before_it(room):
    for module, tree in MODULES.items():
        if room_of(module) != room:
            continue
        for name in imported(tree):
            first, _, rest = name.partition(".")
            if first != "dkd":
                continue
            other = rest.partition(".")[0]
            if other in HEIGHT:
                assert other == room or HEIGHT[other] < HEIGHT[room], f"dkd/{module} imports {name}"
            else:
                assert module in IMPORT_THE_PACKAGE, f"dkd/{module} imports {name}"


def test_the_package_itself_is_lazy():
    code = "import sys, dkd; print([name for name in sys.modules if name.startswith(('dkd.', 'torch', 'pydantic'))])"
    assert run([sys.executable, "-c", code]).stdout.strip() == "[]"


def test_only_engines_know_accelerate_and_deepspeed():
    for module, tree in MODULES.items():
        known = {name.partition(".")[0] for name in imported(tree)} & {"accelerate", "deepspeed"}
        assert not known or room_of(module) in KNOW_ACCELERATE, f"dkd/{module} imports {', '.join(known)}"


def test_only_the_launch_reads_the_environment():
    """And the command line asks whether a shell wants completions."""
    for module, tree in MODULES.items():
        names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        found = [name for name in names if name in ("environ", "environb", "getenv", "putenv", "unsetenv")]
        if module == "cli.py":
            asked = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
            assert len(found) == [ast.unparse(node) for node in asked].count("'_ARGCOMPLETE' in os.environ") == 1
        else:
            assert module == "launch.py" or not found, f"dkd/{module} uses os.{found[0]}"


def comparisons(tree):
    """Return, as text, what compares something with the name of an engine, or with how such a name begins."""
    found = []
    for node in ast.walk(tree):
        looked_at = []
        if isinstance(node, ast.Compare):
            looked_at = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            looked_at = [node.pattern]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            looked_at = node.args if node.func.attr in ("startswith", "endswith", "removeprefix", "partition") else []
        texts = {part.value for look in looked_at for part in ast.walk(look) if isinstance(part, ast.Constant)}
        if texts & {*ENGINES, "zero", "fsdp"}:
            found.append(ast.unparse(node))
    return found


def test_engines_are_compared_by_name_in_one_room_only():
    """Placements of the teacher are named after the library that cuts it; they are no engines."""
    for module, tree in MODULES.items():
        if room_of(module) not in KNOW_ENGINES_BY_NAME:
            for comparison in comparisons(tree):
                assert "placement" in comparison, f"dkd/{module}: {comparison}: ask dkd.engines.rules"


def test_a_comparison_with_an_engines_name_is_found():
    code = (
        "if name.startswith('zero') or launch.engine in ('ddp', 'single'):\n    match name:\n        case 'fsdp2': pass"
    )
    assert len(comparisons(ast.parse(code))) == 3
    assert comparisons(ast.parse("rules.uses_deepspeed and x == 'other'")) == []


def test_every_module_has_a_docstring():
    assert [module for module, tree in MODULES.items() if not ast.get_docstring(tree)] == []


def test_no_function_is_long():
    found = {
        f"{module}: {node.name}": node.end_lineno - node.lineno + 1
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES} == {}


# Tests look at dkd from outside.
FROM_OUTSIDE = (TESTS,)
# A process that must end at once has no other way; and test_library_internals.py asks Accelerate itself whether all of
# its settings are forgotten.
NOT_PRIVATE = {"os._exit", "AcceleratorState._shared_state", "state._shared_state"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree):
    """Return, as text, the uses of private names: attributes of anything but self and cls, imports, and names given as
    text to setattr and its like."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found += [] if own or ast.unparse(node) in NOT_PRIVATE else [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [ast.unparse(node)] if node.module.startswith("dkd") and any(map(is_private, names)) else []
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in (
                "setattr",
                "getattr",
                "delattr",
                "hasattr",
                "patch",
                "object",
                "attrgetter",
                "methodcaller",
            ):
                texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
                named = [text for text in texts if isinstance(text, str) and is_private(text.rpartition(".")[2])]
                found += [ast.unparse(node)] if named else []
    return found


def test_tests_use_no_private_name():
    found = {
        path.relative_to(TESTS).as_posix(): uses
        for folder in FROM_OUTSIDE
        for path in sorted(folder.rglob("*.py"))
        if (uses := private_uses(ast.parse(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "trainer._step(0)",
        "a.b._c = 1",
        "from dkd.engines.engine import _settle",
        "monkeypatch.setattr(Trainer, '_step', acting)",
        "monkeypatch.setattr('dkd.training.trainer._PHASES', ())",
        "mock.patch.object(trainer, '_losses')",
        "getattr(source, '_kept')",
    ],
)
def test_a_private_use_is_found(code):
    assert len(private_uses(ast.parse(code))) == 1


def test_what_is_not_private_is_left_alone():
    code = (
        "self._x = cls._y; a.__class__; os._exit(1); monkeypatch.setenv('_ARGCOMPLETE', '1'); from dkd.data import jpeg"
    )
    assert private_uses(ast.parse(code)) == []


def test_no_two_test_files_have_one_name():
    """pytest imports them without packages: the second of a name is an error where one process collects both."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
