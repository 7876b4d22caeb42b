"""dkd distill: the recipe of dkd new, trained at once; the same command again, and other options."""

import pytest

from dkd.cli import main
from dkd.config import load_recipe

SHORT = ("train.max_steps=1", "train.precision=fp32", "run.trackers=[]")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distill(*arguments):
    return main(["distill", "--student", "resnet8", "--teacher", "wrn_16_1=random", "--data", "digits", *arguments])


def test_the_recipe_is_written_and_trained_and_the_run_resumed(folder, capsys):
    assert distill(*SHORT) == 0
    said = capsys.readouterr().err
    assert "pairs        layer1 16×16×16  ←  block1 16×16×16" in said
    assert "finished in" in said
    recipe = load_recipe(folder / "resnet8_from_wrn_16_1.yaml")
    assert recipe.train.max_steps is None  # an override is of this training alone
    assert (folder / "runs" / "resnet8_from_wrn_16_1" / "FINISHED").is_file()
    assert distill(*SHORT) == 0
    assert "resumed from" in capsys.readouterr().err


def test_another_recipe_of_that_name_is_not_replaced_unasked(folder, capsys):
    assert distill(*SHORT, "--name", "mine", "-o", "mine.yaml") == 0
    before = (folder / "mine.yaml").read_text()
    assert distill(*SHORT, "--name", "mine", "-o", "mine.yaml", "--epochs", "7") == 2
    said = capsys.readouterr().err
    assert "'mine.yaml' exists and is not what these options make; train it as it is with dkd launch mine.yaml" in said
    assert (folder / "mine.yaml").read_text() == before
    assert distill(*SHORT, "--name", "other", "-o", "mine.yaml", "--epochs", "7", "--force") == 0
    assert load_recipe(folder / "mine.yaml").train.epochs == 7


def test_wrong_input_of_either_part_is_one_line(folder, capsys):
    assert distill("train.max_steps=-1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dkd: train.max_steps: must be")
    assert main(["distill", "--student", "resnet8", "--data", "nowhere", "-n", "2"]) == 2
    assert "names no data set" in capsys.readouterr().err
    assert not (folder / "runs").exists()
