"""The launch files and recipes that are installed with dkd: where they are, what of them a wheel holds, and `dkd
files`, which copies them."""

import os
import stat

import pytest
from launched import ROOT

from dkd import files
from dkd.cli import main
from dkd.config import load_recipe


def test_they_are_the_files_of_the_repository():
    for kind in files.FOLDERS:
        assert files.folder(kind) == ROOT / kind
        assert files.names(kind)
    assert "deepspeed/zero2.json" in files.names("launch")
    assert load_recipe(files.folder("configs") / "quickstart.yaml").run.name == "quickstart"


def test_a_wheel_holds_all_of_them(monkeypatch):
    """What setuptools would put into the package, without building a wheel."""
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # what version control would add to it takes a build to find out
    held = {path.removeprefix("dkd/files/") for path in command.find_data_files("dkd", "dkd")} - {"dkd/py.typed"}
    assert held == {f"{kind}/{name}" for kind in files.FOLDERS for name in files.names(kind)}


def test_they_are_listed(capsys):
    assert main(["files"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "launch/accelerate/fsdp2.yaml" in listed
    assert "configs/quickstart.yaml" in listed


def test_they_are_copied_and_nothing_is_overwritten(tmp_path, capsys):
    assert main(["files", "launch", str(tmp_path)]) == 0
    copied = tmp_path / "launch"
    assert sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()) == files.names(
        "launch"
    )
    own = files.folder("launch")
    for name in ("local.sh", "slurm/train.sbatch"):
        assert (copied / name).read_bytes() == (own / name).read_bytes()
        assert bool((copied / name).stat().st_mode & stat.S_IXUSR) == bool((own / name).stat().st_mode & stat.S_IXUSR)
    assert main(["files", "launch", str(tmp_path)]) == 0  # the same already
    (copied / "local.sh").write_text("mine")
    (copied / "deepspeed" / "zero1.json").unlink()
    capsys.readouterr()
    assert main(["files", "launch", str(tmp_path)]) == 2
    assert f"{copied / 'local.sh'}: already there, and not the same" in capsys.readouterr().err
    assert (copied / "local.sh").read_text() == "mine"
    assert not (copied / "deepspeed" / "zero1.json").exists()
    assert main(["files", "launch", str(tmp_path), "--force"]) == 0
    assert (copied / "local.sh").read_bytes() == (own / "local.sh").read_bytes()
    assert os.access(copied / "local.sh", os.X_OK)
    assert (copied / "deepspeed" / "zero1.json").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_no_link_is_followed(tmp_path, capsys, force):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "launch").symlink_to(elsewhere)
    assert main(["files", "launch", str(tmp_path / "a"), *force]) == 2
    assert "is a link; take another DIR" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
    file = tmp_path / "b" / "launch" / "local.sh"
    file.parent.mkdir(parents=True)
    (elsewhere / "precious").write_text("precious")
    file.symlink_to(elsewhere / "precious")
    assert main(["files", "launch", str(tmp_path / "b"), *force]) == (0 if force else 2)
    assert (elsewhere / "precious").read_text() == "precious"
    assert file.is_symlink() == (not force)
    same = tmp_path / "c" / "launch" / "local.sh"  # a link to the same content is no copy
    same.parent.mkdir(parents=True)
    same.symlink_to(files.folder("launch") / "local.sh")
    assert main(["files", "launch", str(tmp_path / "c"), *force]) == (0 if force else 2)
    assert same.is_symlink() == (not force)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["launch"], "a folder is missing, such as: dkd files launch ."), (["--force"], "--force belongs to a copy")],
)
def test_what_is_missing_is_reported(words, message, capsys):
    assert main(["files", *words]) == 2
    assert message in capsys.readouterr().err
