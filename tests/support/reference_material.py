"""Material that may lie beside the checkout: reference losses and CIFAR-10. Tests that need it say so, and are skipped
without it."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("DKD_TEST_MATERIAL", Path(__file__).resolve().parents[3] / "shared"))


def require_reference_losses():
    return _require_golden("reference_losses")


def require_method_losses():
    return _require_golden("method_losses")


def _require_golden(name):
    path = FOLDER / "golden" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(
            f"the reference losses are not there: {path} (set DKD_TEST_MATERIAL to the folder that holds golden/)"
        )
    from safetensors.torch import load_file

    return load_file(path)


def require_cifar10():
    folder = FOLDER / "data" / "cifar10"
    if not folder.exists():
        pytest.skip(
            f"CIFAR-10 as parquet is not there: {folder} (set DKD_TEST_MATERIAL to the folder that holds data/cifar10/)"
        )
    return folder
