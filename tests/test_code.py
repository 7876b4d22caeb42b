"""The rooms of docs/code.md and who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "config": set(),
    "checkpoints": set(),
    "models": set(),
    "global_batch": set(),
    "losses": {"global_batch"},
    "teacher": {"models"},
    "data": set(),
    "training": {"config", "checkpoints", "models", "global_batch", "losses", "teacher", "data"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    for path in (ROOT / "dkd" / room).rglob("*.py"):
        for module in imports(path):
            if module.startswith("dkd.") and module != "dkd.user_code":
                other = module.split(".")[1]
                assert other == room or other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"
            if module.split(".")[0] in ("accelerate", "deepspeed"):
                assert room == "training", f"{path.relative_to(ROOT)} imports {module}"


def test_what_every_room_may_import_imports_nothing_of_ours():
    assert not [module for module in imports(ROOT / "dkd" / "user_code.py") if module.startswith("dkd")]


def test_every_room_is_listed():
    rooms = {path.name for path in (ROOT / "dkd").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)
