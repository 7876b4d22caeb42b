"""A finished run for the tests of this folder."""

import os
import shutil

import pytest
from finished_run import TRAINING

from dkd.checkpoints import checkpointer
from dkd.cli import main
from dkd.training import resume


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher and no batch system but those that a test names; and nothing that appears late."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "DKD_")):
            monkeypatch.delenv(name)
    for module in (checkpointer, resume):
        monkeypatch.setattr(module, "LOOK_AGAIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 3 steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TRAINING, f"run.dir={run}"]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")
