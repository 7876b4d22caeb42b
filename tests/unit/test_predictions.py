"""`dkd evaluate --predictions`: a row for each image, in the order of the data set."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from few_images import write_images
from test_evaluation import recipe_in

import dkd
from dkd.cli import main
from dkd.data import build_pipeline
from dkd.training import predictions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of 96 images of 10 classes, of which two of validation cannot be read."""
    folder = tmp_path_factory.mktemp("predictions")
    write_images(folder / "train.parquet", 96)
    write_images(folder / "validation.parquet", 45, seed=1, broken=((0, "no image"), (20, "truncated")))
    data = {"train": f"{folder}/train.parquet", "validation": f"{folder}/validation.parquet", "on_error": "skip"}
    dkd.train(recipe_in(folder / "run", data={**data, "workers": 0}, train={"max_steps": 1}))
    return folder / "run"


def test_rows_are_those_of_the_data_set_in_order_without_the_images_that_cannot_be_read(run, tmp_path):
    file = tmp_path / "rows.parquet"
    evaluated = dkd.evaluate(run, ["evaluation.batch=16", "data.workers=2"], predictions=file)
    table = parquet.read_table(file)
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert table.column_names == ["path", "label", "prediction", "scores"]  # numbers have no names
    labels = parquet.read_table(run.parent / "validation.parquet")["label"].to_pylist()
    readable = [index for index in range(45) if index not in (0, 20)]
    rows = table.to_pydict()
    assert rows["label"] == [labels[index] for index in readable]
    assert len(set(rows["path"])) == 43
    scores = np.array(rows["scores"])
    assert scores.sum(1) == pytest.approx(1, abs=1e-6)
    assert scores.argmax(1).tolist() == rows["prediction"]
    right = sum(label == first for label, first in zip(rows["label"], rows["prediction"], strict=True))
    assert (evaluated.result.samples, evaluated.result.top1_correct) == (43, right)
    with pytest.raises(dkd.InputError, match="exists; add --overwrite"):
        dkd.evaluate(run, predictions=file)
    assert dkd.evaluate(run, predictions=file, overwrite=True).result.top1_correct == right
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]  # nothing temporary is left


def test_scores_are_the_softmax_of_the_students_logits_and_names_are_those_of_the_classes(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("validation", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    data = {"train": f"folder:{tmp_path}/train", "validation": f"folder:{tmp_path}/validation", "classes": 2}
    values = recipe_in(tmp_path / "run", data={**data, "workers": 0}, train={"global_batch": 8, "max_steps": 1})
    run = dkd.train(values).run_dir
    assert main(["evaluate", str(run), "--predictions", str(tmp_path / "rows.parquet")]) == 0
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert rows["label_name"] == ["cat"] * 3 + ["dog"] * 3
    assert rows["prediction_name"] == [["cat", "dog"][first] for first in rows["prediction"]]
    assert rows["path"] == [
        f"{tmp_path}/validation/{name}/{number}.png" for name in ("cat", "dog") for number in (0, 1, 2)
    ]
    pipeline = build_pipeline("digits", image_size=8)
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in rows["path"]]
    with torch.no_grad():
        logits = dkd.load_student(run)(pipeline.normalize(pipeline.validation(torch.stack(pixels))))
    assert np.array(rows["scores"]) == pytest.approx(logits.softmax(1).numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "rows.csv"], "must end in .parquet"),
        (["--predictions", "nowhere/rows.parquet"], "the folder 'nowhere' is not there"),
        (["--predictions", "folder.parquet"], "is a folder"),
        (["--predictions", "link.parquet"], "exists; add --overwrite"),
        (["--overwrite"], "it belongs to --predictions"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(
    run, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "link.parquet").symlink_to("elsewhere")
    assert main(["evaluate", str(run), *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_disk_that_fills_up_loses_the_file_and_not_the_numbers(run, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    file = tmp_path / "rows.parquet"
    with monkeypatch.context() as full:
        full.setattr(predictions.os, "pwrite", refuse)
        assert main(["evaluate", str(run), "--predictions", str(file)]) == 1
        printed = capsys.readouterr()
        assert json.loads(printed.out)["samples"] == 43
        assert f"dkd: {str(file)!r} cannot be written: [Errno 28] No space left on device" in printed.err
        with pytest.raises(dkd.RunError, match="No space left"):
            dkd.evaluate(run, predictions=file)
    assert os.listdir(tmp_path) == []
