"""docs/guides/own_images.md, run as it stands there, with small models in place of large ones and without a network."""

import json
import re
import shlex
import sys
from pathlib import Path

import launched
import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "own_images.md"
SMALLER = {"torchvision/resnet34=pretrained": "wrn_16_1", "torchvision/mobilenet_v3_small": "resnet8"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with photos/train and photos/val, two classes of one colour each, 24 pixels."""
    folder = tmp_path_factory.mktemp("page")
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("val", 10)):
        for low, name in ((0, "cat"), (128, "dog")):
            (folder / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(low, low + 128, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / part / name / f"{number}.jpg")
    return folder


def commands():
    text = PAGE.read_text().replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in re.findall(r"^    (dkd .*)$", text, re.MULTILINE)]
    return [[SMALLER.get(word, word) for word in command[1:]] for command in found]


def test_the_page_leads_from_a_folder_to_a_file_that_names_its_classes(photos):
    for command in commands():
        if command[0] in ("distill", "launch"):
            command += ["train.epochs=2", "train.precision=fp32", "run.trackers=[]"]
        if command[0] == "launch":
            command += ["run.dir=runs/on_two"]
        done = launched.run([*launched.DKD, *command], check=False, cwd=photos)
        assert done.returncode == 0, (command, done.stderr[-3000:])
    assert json.loads((photos / "runs" / "on_two" / "student.json").read_text())["world_size"] == 2
    assert (photos / "found.parquet").is_file()
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    named = launched.run([sys.executable, "-c", block], cwd=photos).stdout.split()
    assert named == ["cat"]
