"""The benchmarks run; what they measure is not judged here."""

import sys

import launched
import pytest


def run(module, *arguments):
    return launched.run([sys.executable, "-m", f"benchmarks.{module}", *arguments]).stdout


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_step_benchmark_prints_its_table(compiled):
    flag = "--compile" if compiled else "--no-compile"
    out = run("step", "--student", "resnet8", "--teacher", "resnet8", "--batch", 4, "--rounds", 1, "--steps", 1, flag)
    assert "the defaults: precision " in out
    assert "share of the step, defaults: data" in out
    assert ("compiled teacher and student" in out) == compiled


def test_the_global_batch_benchmark_counts_the_bytes_of_the_formulas():
    """It would end with 1 if it did not, or if the strategies disagreed with common practice. How long anything takes
    is no subject of a test: `--slower`."""
    sizes = ["--worlds", 2, "--shapes", "pooled", "wrn3", "--rounds", 1]
    out = run("global_batch", *sizes, "--links", "loopback", "--slower", "inf")
    assert "| pooled features, 2,048, 64 | 2 | loopback |" in out
    assert "FAILED" not in out


def test_the_teach_once_benchmark_counts_the_bytes_of_the_formula(tmp_path):
    """It would end with 1 if the files held other bytes, or if students of the live teacher and of its cache were not
    equal."""
    out = run("teach_once", "--pairs", "wrn", "--rounds", 1, "--processes", 1, "--json", tmp_path / "found.json")
    assert "| bytes an image and epoch, by the formula | 5,680 |" in out
    assert "| students equal bit for bit | yes |" in out
    assert (tmp_path / "found.json").exists()


def test_the_benchmarks_of_a_step_run(tmp_path):
    """Smallest sizes; what they measure is no subject of a test."""
    assert "SGD on wrn_16_1: " in run("parts", "--threads", 1)
    words = ["--batch", 2, "--size", 8]
    assert "operators " in run("launches", *words, "--precision", "fp32", "--by-operator")
    short = ["--rounds", 1, "--steps", 1, "--threads", 1, "--rows", "plain float32"]
    run("step", *words, *short, "--json", tmp_path / "found.json")
    assert "student alone, plain float32" in (tmp_path / "found.json").read_text()


def test_the_cifar10_table_pairs_runs_by_seed(tmp_path):
    """Means over a row's seeds; differences and Student's interval over the seeds that both rows have; unfinished runs
    do not count."""
    import json

    from benchmarks.cifar10_short import table

    top1 = {"none": [0.80, 0.82, 0.84, 0.90], "kd": [0.81, 0.84, 0.85], "sp_global": [0.83], "sp_local": []}
    for row, values in top1.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{row}-seed{seed}"
            folder.mkdir()
            (folder / "FINISHED").write_text("")
            (folder / "student.json").write_text(json.dumps({"evaluation": {"top1": value}}))
    (tmp_path / "sp_local-seed0").mkdir()
    (tmp_path / "sp_local-seed0" / "student.json").write_text("half")
    lines = table(tmp_path, list(top1), 4).splitlines()
    assert "| no teacher | 4 | 84.00 % | 4.32 |  |  |" in lines
    # differences 1, 2 and 1: mean 1.33, standard deviation 0.577, half the interval 4.30 · 0.577 / √3 = 1.43
    assert "| KD | 3 | 83.33 % | 2.08 | +1.33 | -0.10 … +2.77 |" in lines
    assert "| SP, global (512 rows) | 1 | 83.00 % |  | +3.00 |  |" in lines
    assert "| SP, local (128 rows) | 0 | | | | |" in lines


def test_the_scope_study_pairs_runs_by_seed_and_changes_only_the_rows_that_are_compared(tmp_path):
    """Means and differences are over the seeds that all three students of a line have finished."""
    import argparse
    import json

    from benchmarks.scope_study import Training, table

    top1 = {("none", ""): [0.40, 0.42, 0.41], ("sp", "local"): [0.41, 0.45], ("sp", "global"): [0.43, 0.45, 0.40]}
    for (loss, arm), values in top1.items():
        for seed, value in enumerate(values):
            folder = tmp_path / Training(loss, arm, 8, seed).name
            folder.mkdir()
            (folder / "FINISHED").write_text("")
            (folder / "student.json").write_text(json.dumps({"evaluation": {"top1": value}}))
    lines = table(tmp_path, ["sp"], [8, 16], 3).splitlines()
    # global − local is 2 and 0: mean 1, standard deviation √2, half the interval 12.71 · √2 / √2
    differences = "+2.00 ± 12.71 | +3.00 ± 0.00 | +1.00 ± 12.71"
    assert f"| SP | 8 | 2 | 41.00 % | 43.00 % | 44.00 % | {differences} |" in lines
    assert "| SP | 16 | 0 |  |  |  |  |  |  |" in lines

    options = argparse.Namespace(runs=tmp_path, data=tmp_path, images="*", epochs=1, teacher_epochs=1)
    local, whole = (Training("sp", arm, 8, 0).recipe(options) for arm in ("local", "global"))
    assert (local["losses"]["sp"].pop("batch"), whole["losses"]["sp"].pop("batch")) == ("micro", "step")
    del local["run"], whole["run"]
    assert local == whole


def test_the_methods_study_pairs_runs_by_seed_and_probes_a_frozen_student(tmp_path):
    """Differences are over the seeds that both rows have finished; the student of a probe is trained before it."""
    import argparse
    import json

    from benchmarks.methods_study import LOSSES, PROBES, ROWS, Training, list_jobs, table
    from dkd.config.loading import build_recipe

    top1 = {
        "none": [0.40, 0.42, 0.41],
        "kd": [0.41, 0.45],
        "queue_probe": [0.43, 0.45],
        "untrained_probe": [0.30, 0.32],
    }
    for row, values in top1.items():
        for seed, value in enumerate(values):
            folder = tmp_path / Training(row, seed=seed).name
            folder.mkdir()
            (folder / "FINISHED").write_text("")
            (folder / "student.json").write_text(json.dumps({"evaluation": {"top1": value}}))
    lines = table(tmp_path, ["none", "kd", "dkd", "queue_probe"], 3).splitlines()
    # KD − none is 1 and 3: mean 2, standard deviation √2, half the interval 12.71 · √2 / √2
    assert "| no teacher | 3 | 41.00 % |  | -2.00 ± 12.71 |" in lines
    assert "| KD | 2 | 43.00 % | +2.00 ± 12.71 |  |" in lines
    assert "| DKD | 0 |  |  |  |" in lines
    assert "| queue, without labels | 2 | 44.00 % | +3.00 ± 0.00 | +1.00 ± 12.71 | +13.00 ± 0.00 |  |" in lines

    assert [[t.name for t in job] for job in list_jobs(["kd", "queue_probe"], 1)] == [
        ["kd-seed0"],
        ["queue-seed0", "queue_probe-seed0"],
    ]
    options = argparse.Namespace(runs=tmp_path, data=tmp_path, images="*", epochs=1, teacher_epochs=1)
    recipes = {loss: Training(loss).recipe(options) for loss in ("teacher", *ROWS, *LOSSES, *PROBES)}
    for recipe in recipes.values():
        build_recipe(recipe)  # raises where a key is wrong
    of_data = {key: recipes["none"].pop(key) for key in ("data", "train", "schedule", "optimizer", "student")}
    assert all(of_data == {key: recipes[loss][key] for key in of_data} for loss in LOSSES)
    probe, untrained = recipes["queue_probe"], recipes["untrained_probe"]
    assert probe["student"].pop("weights") == f"{tmp_path}/queue-seed0/student.safetensors"
    assert probe["student"].pop("head") == "new"
    del probe["run"], untrained["run"]
    assert probe == untrained
