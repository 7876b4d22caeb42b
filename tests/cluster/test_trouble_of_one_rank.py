"""One of three ranks meets a NaN, an image that cannot be read, or one of another size: all end together, and say
which."""

import re
import time

import pytest
from few_images import write_images
from launched import Launch, accelerate_command

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("model", "images", "said"),
    [
        ("NotFinite", {}, r"the loss is not finite at step 4 \(on rank 0; "),
        (
            "Regularized",
            {"broken": [(21, "truncated")]},
            r"step \d+: rank \d: .*images\.parquet: image 21 \(no name\) cannot be read: ",
        ),
        (
            "Regularized",
            {"larger": [21]},
            r"step \d+: rank \d: images of 24×24 pixels, not 16×16; add a Resize or a crop",
        ),
    ],
    ids=["NaN", "broken image", "another size"],
)
def test_all_ranks_end_and_the_message_names_the_rank(model, images, said, tmp_path):
    write_images(tmp_path / "images.parquet", 96, **images)
    write_images(tmp_path / "whole.parquet", 12)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
run: {{dir: {tmp_path / "run"}, trackers: [], collective_timeout: 30}}
data:
  train: {tmp_path / "images.parquet"}
  validation: {tmp_path / "whole.parquet"}
  classes: 10
  transforms: [{{RandomHorizontalFlip: {{}}}}]
  validation_transforms: [{{RandomHorizontalFlip: {{}}}}]
  normalization: {{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
  image_size: 16
  workers: 1
  in_memory: false
student: {{name: "small_models:{model}"}}
train: {{global_batch: 3, epochs: 1, precision: fp32}}
optimizer: {{name: sgd, lr: 0.01}}
schedule: {{name: constant}}
""")
    begun = time.monotonic()
    with Launch(accelerate_command(3, "-m", "dkd", "train", recipe), tmp_path / "log") as launch:
        assert launch.wait(90) == 1
        out = launch.said()
    # One sentence, and no rank that waited for another until the timeout, or died of its loss.
    assert len(re.findall(r"^dkd: ", out, re.MULTILINE)) == 1, out
    assert re.search(rf"^dkd: {said}", out, re.MULTILINE), out
    assert "cannot continue" not in out
    assert time.monotonic() - begun < 60
