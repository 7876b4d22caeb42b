"""Every exception of dkd is one of input or one of a run: who calls it from Python can catch each family."""

import ast
import importlib
from pathlib import Path

from dkd.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]


def exceptions():
    """The exception classes that dkd defines; those whose names begin with `_` never leave their module."""
    for path in sorted((ROOT / "dkd").rglob("*.py")):
        names = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
        if path.name == "__main__.py" or not names:
            continue
        module = importlib.import_module(
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        )
        for name in names:
            found = getattr(module, name, None)
            if isinstance(found, type) and issubclass(found, BaseException) and not name.startswith("_"):
                yield found


def test_every_exception_belongs_to_a_family():
    found = list(exceptions())
    assert len(found) > 15
    others = [error.__qualname__ for error in found if not issubclass(error, InputError | RunError)]
    assert others == ["DkdError"], f"derive these from dkd.errors.InputError or RunError: {', '.join(others)}"


def test_families_are_the_builtin_errors_that_callers_expect():
    assert issubclass(InputError, ValueError)
    assert issubclass(RunError, RuntimeError)
