"""The scripts of docs/guides/own_loop.md, as they stand there."""

import re
import sys

import pytest
from launched import ROOT, accelerate_command, run, torchrun_command


def losses_of(output):
    return [[float(number) for number in re.findall(r"[\d.]+", line)] for line in output.splitlines() if " kd " in line]


def script_of(name, folder):
    """Write a script of the page into a folder. Returns its path."""
    page = (ROOT / "docs" / "guides" / "own_loop.md").read_text()
    (code,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        if block.startswith(f"# {name}.py")
    )
    path = folder / f"{name}.py"
    path.write_text(code)
    return path


@pytest.mark.parametrize("name", ["own_loop", "accelerate_loop"])
def test_a_loop_gives_the_same_losses_on_any_number_of_processes(tmp_path, name):
    on_two = {"own_loop": torchrun_command, "accelerate_loop": accelerate_command}[name]
    script = script_of(name, tmp_path)
    alone = losses_of(run([sys.executable, script]).stdout)
    assert len(alone) == 3
    assert [row[0] for row in alone] == [0, 1, 2]
    found = losses_of(run(on_two(2, script)).stdout)
    assert found == [pytest.approx(row, rel=2e-4) for row in alone]  # sums in another order


def test_a_layout_names_the_ranks_of_a_loss(tmp_path):
    """Two pairs of ranks: each pair's loss is that of its own rows."""
    script = tmp_path / "pairs.py"
    script.write_text(
        """
import sys, torch, torch.distributed as dist
from dkd import BatchLayout, SimilarityPreserving
dist.init_process_group("gloo")
rank = dist.get_rank()
groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
rows = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
student, teacher = rows.tensor_split(4, 1)[rank]
sp = SimilarityPreserving()
layout = BatchLayout.agree([student, teacher], group=groups[rank // 2], loss=sp)
loss = sp(student, teacher, layout=layout).reshape(1)
dist.all_reduce(loss, group=groups[rank // 2])
whole = SimilarityPreserving()
mine = rows[:, rank // 2 * 2 : rank // 2 * 2 + 2]
expected = sp(*mine, layout=BatchLayout((2,)))
said = "same" if torch.allclose(loss / 2, expected, rtol=1e-12) else f"other {loss / 2} {expected}"
sys.stdout.write(said + "\\n")
dist.destroy_process_group()
"""
    )
    assert run(torchrun_command(4, script)).stdout.split() == ["same"] * 4
