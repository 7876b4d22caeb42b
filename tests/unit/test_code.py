"""The rooms of docs/code.md and who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "config": set(),
    "checkpoints": set(),
    "models": set(),
    "global_batch": set(),
    "losses": {"global_batch"},
    "teacher": {"models"},
    "data": set(),
    "training": {"config", "checkpoints", "models", "global_batch", "losses", "teacher", "data", "recipe_objects"},
    "report": {"config", "models", "losses", "data", "recipe_objects"},
    "export": {"config", "models"},
}
# Leaves: every room may import them, and they import no room.
LEAVES = {"user_code", "console", "errors", "environment", "atomic_files", "metrics_file"}
# Modules beside the rooms, and what they may import.
BESIDE = {**{leaf: set() for leaf in sorted(LEAVES)}, "recipe_objects": {"config", "models", "data"}}


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
            if module.startswith("dkd."):
                other = module.split(".")[1]
                assert other == room or other in LEAVES | MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"
            assert module != "dkd" or room in ("training", "report"), f"{path.relative_to(ROOT)} imports dkd as a whole"
            if module.split(".")[0] in ("accelerate", "deepspeed"):
                assert room == "training", f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("module", BESIDE)
def test_a_module_beside_the_rooms_imports_only_what_it_may(module):
    others = {name.split(".")[1] for name in imports(ROOT / "dkd" / f"{module}.py") if name.startswith("dkd.")}
    assert others <= BESIDE[module] | LEAVES


def test_every_room_is_listed():
    rooms = {path.name for path in (ROOT / "dkd").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)
