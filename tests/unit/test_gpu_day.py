"""The day on a GPU: its slices, and what becomes of them. `python -m benchmarks.gpu_day --rehearse` runs them."""

import argparse
import json
import sys
import time

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import Result, Slice, card, main, page, slices, take
from benchmarks.peer_step import PeerRow


def options(folder, **changes):
    values = {"out": folder, "rehearse": True, "peer": None, "data": None, "seeds": 1, "jobs": 1, "set": []}
    return argparse.Namespace(**{**values, **changes})


def script(name, code):
    return Slice(name, ["-c", code], f"about {name}")


def test_a_slice_passes_fails_or_is_cut_off(tmp_path):
    passing = script("good", "print('deterministic True: 1'); print('3 passed, 1 skipped in 2 s')")
    found = take(passing, options(tmp_path), 60)
    assert (found.state, found.numbers) == ("passed", {"passed": 3, "skipped": 1, "printed": ["deterministic True: 1"]})
    failing = script("bad", "print('FAILED tests/a.py::test_b - no'); print('1 failed'); raise SystemExit(1)")
    found = take(failing, options(tmp_path), 60)
    assert (found.state, found.numbers) == ("failed", {"failed": 1, "failures": ["tests/a.py::test_b"]})
    begun = time.monotonic()
    # Also its children, which a training has: here one that would write a file later.
    late = tmp_path / "late"
    child = f"import time; time.sleep(8); open({str(late)!r}, 'w')"
    hanging = script("long", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert take(hanging, options(tmp_path), 3).state == "cut off"
    time.sleep(max(0.0, 10 - (time.monotonic() - begun)))
    assert not late.exists()


def test_numbers_that_a_slice_has_written_are_its_result(tmp_path):
    written = tmp_path / "speed.numbers.json"
    code = f"import json; json.dump({{'seconds': {{'a row': 0.5}}}}, open({str(written)!r}, 'w'))"
    assert take(script("speed", code), options(tmp_path), 60).numbers == {"seconds": {"a row": 0.5}}
    assert not written.exists()


def test_a_later_start_takes_what_is_left(tmp_path, monkeypatch, capsys):
    runs = []
    states = {"one": ["passed", "passed"], "two": ["cut off", "passed"], "three": ["failed", "passed"]}

    def pretend(part, _options, _seconds):
        runs.append(part.name)
        return Result(part.name, part.about, "", states[part.name].pop(0), 1.0, "2026-01-01", "abc", {}, "")

    monkeypatch.setattr(gpu_day, "take", pretend)
    monkeypatch.setattr(gpu_day, "slices", lambda _options: [script(name, "") for name in states])

    def start(*words):
        runs.clear()
        monkeypatch.setattr(sys, "argv", ["gpu_day", "--rehearse", "--out", str(tmp_path), *words])
        assert main() == 0
        return list(runs)

    assert start("--minutes", "0.1") == []  # there is no time for any
    assert "3 slices are left: the same command continues with them" in capsys.readouterr().out
    assert start() == ["one", "two", "three"]
    assert "1 slices are left" in capsys.readouterr().out
    assert start() == ["two"]
    assert start() == []
    assert start("--again", "three") == ["three"]
    assert start("--only", "o", "--again", "one", "two", "three") == ["one"]
    assert json.loads((tmp_path / "three.json").read_text())["state"] == "passed"
    assert "| three | about three | 2026-01-01 | abc | passed, 1 s |" in (tmp_path / "README.md").read_text()


def test_the_page_shows_speed_beside_a_peers(tmp_path):
    seconds = {"the defaults": 0.004, "  a graph": 0.002, "mdistiller: AT, float32": 0.012}
    numbers = {"what": "wrn_16_2 → wrn_16_1, batch 64, 32×32", "seconds": seconds}
    results = [
        Result("speed-64", "speed", "", "passed", 60.0, "2026-01-01", "abc", numbers, ""),
        Result("step", "checks", "", "failed", 9.0, "2026-01-01", "abc", {"failures": ["a::b"]}, "the end"),
    ]
    text = page(results, {"card": "a card", "torch": "2"})
    assert "| a graph | 2.00 | 32,000 | 6.0 |" in text
    assert "## step: failed\n\n```\na::b\nthe end\n```" in text


PEER = {
    "__init__.py": "",
    "models/__init__.py": "",
    "models/cifar.py": """
import torch
class Model(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, num_classes, 3)
    def forward(self, images):
        feature = self.layer(images)
        return feature.mean((2, 3)), {"feats": [feature]}
cifar_model_dict = {"large": (Model, None), "small": (Model, None)}
""",
    "distillers/__init__.py": "",
    "distillers/AT.py": """
import torch
class AT(torch.nn.Module):
    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.teacher, self.weight = student, teacher, cfg.AT.LOSS.FEAT_WEIGHT
        self.steps = 0
    def get_learnable_parameters(self):
        return list(self.student.parameters())
    def forward(self, image, target, epoch):
        self.steps += 1
        logits, mine = self.student(image)
        theirs = self.teacher(image)[1]
        apart = (mine["feats"][0] - theirs["feats"][0]).square().mean()
        ce = torch.nn.functional.cross_entropy(logits, target)
        return logits, {"ce": ce, "kd": self.weight * apart}
""",
}


def test_a_peers_step_is_read_from_its_checkout(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="there is no folder mdistiller in it"):
        PeerRow(tmp_path, "large", "small", 4, torch.device("cpu"))
    for name, text in PEER.items():
        path = tmp_path / "mdistiller" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    row = PeerRow(tmp_path, "large", "small", 4, torch.device("cpu"))
    seconds = row.take(3)
    assert len(seconds) == 3
    assert all(each > 0 for each in seconds)


def test_every_slice_names_files_that_are_there():
    root = gpu_day.ROOT
    for rehearse in (True, False):
        parts = slices(options(root / "unused", rehearse=rehearse, data=root, peer=root))
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            for word in part.command:
                if word.startswith("tests/"):
                    assert (root / word).is_file(), word


def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch, capsys):
    if not card().startswith("CPU"):
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    assert main() == 2
    assert "there is no GPU: nothing is run; --rehearse runs it on CPUs, tiny" in capsys.readouterr().err
