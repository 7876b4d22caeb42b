"""shellcheck, where the cluster's tools are installed."""

import shutil
import subprocess

import pytest
from processes import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.short]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; make test-cluster installs Debian's")
    scripts = [path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 6
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
