"""Files that appear whole or not at all, through no link; and reading that returns a reason where it cannot."""

import os

import pytest

from dkd import atomic_files


def test_a_file_that_is_replaced_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    atomic_files.replace_text(path, "old")

    def fails():
        with atomic_files.replacing(path) as unfinished:
            assert (unfinished.suffix, unfinished.parent) == (".txt", tmp_path)
            unfinished.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert path.read_text() == "old"
    atomic_files.replace_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_library_that_makes_a_private_file_leaves_one_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_files.replacing(tmp_path / "a") as unfinished:
            unfinished.unlink()
            os.close(os.open(unfinished, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [
    lambda path: atomic_files.open_to_append(path).write(b"x"),
    lambda path: atomic_files.open_lock(path).write(b"x"),
    lambda path: atomic_files.create(path, "x"),
    lambda path: atomic_files.replace_text(path, "x"),
])  # fmt: skip
def test_no_writer_follows_a_link(tmp_path, write):
    target = tmp_path / "target"
    target.write_text("text")
    (tmp_path / "link").symlink_to(target)
    try:
        write(tmp_path / "link")
    except OSError as error:
        assert isinstance(error, atomic_files.LinkError | FileExistsError)  # noqa: PT017 (one of them replaces the link)
    assert target.read_text() == "text"


def test_a_link_is_named_in_the_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(
        atomic_files.LinkError, match=r"link' is a link, and dkd writes through no link in a run directory; remove it"
    ):
        atomic_files.open_to_append(tmp_path / "link")
    assert not (tmp_path / "nothing").exists()


def test_a_pipe_is_neither_waited_for_nor_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in atomic_files.read_bytes(tmp_path / "pipe")[1]
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="is no regular file"):
        atomic_files.open_to_append(tmp_path / "pipe")
    os.close(reader)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"[" * 10**5, "it is nested too deeply"),
        (b"9" * 5000, "it is not JSON"),
    ],
)
def test_damaged_json_is_a_reason(tmp_path, content, reason):
    (tmp_path / "a").write_bytes(content)
    value, found = atomic_files.read_json(tmp_path / "a")
    assert value is None
    assert found.startswith(f"'{tmp_path}/a' is damaged: {reason}")


def test_what_cannot_be_opened_is_a_reason(tmp_path):
    assert atomic_files.read_json(tmp_path / "a") == (None, f"'{tmp_path}/a' is not there")
    assert "is no regular file" in atomic_files.read_json(tmp_path)[1]
    assert "cannot be read" in atomic_files.read_bytes(tmp_path / ("n" * 300))[1]
