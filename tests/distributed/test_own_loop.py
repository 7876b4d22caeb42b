"""The script of docs/guides/own_loop.md, as it stands there."""

import re
import sys

import pytest
from launched import ROOT, run, torchrun_command


def losses_of(output):
    return [[float(number) for number in re.findall(r"[\d.]+", line)] for line in output.splitlines() if " kd " in line]


def test_the_loop_gives_the_same_losses_on_any_number_of_processes(tmp_path):
    page = (ROOT / "docs" / "guides" / "own_loop.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = tmp_path / "own_loop.py"
    script.write_text(code)
    alone = losses_of(run([sys.executable, script]).stdout)
    assert len(alone) == 3
    assert [row[0] for row in alone] == [0, 1, 2]
    found = losses_of(run(torchrun_command(2, script)).stdout)
    assert found == [pytest.approx(row, rel=2e-4) for row in alone]  # sums in another order
