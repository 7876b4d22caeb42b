"""Whatever dkd is given that is wrong (files, YAML, names, arguments, environment variables): exit code 2 and one line
that can be read."""

import io
import json
import resource
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dkd import cli, console
from dkd.cli import main
from dkd.config import load_recipe, yaml_text
from dkd.data import DataError, open_source
from dkd.models import ModelSpec, build_model, save_student

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")
LONG = "a" * 300


def refused(capsys, *arguments):
    """The one line with which `dkd ARGUMENTS` is refused."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("dkd: ")
    assert len(line) < 1100
    assert out == ""
    return line


def dry_run(tmp_path, *overrides):
    return [
        "train",
        QUICKSTART,
        "--dry-run",
        f"run.dir={tmp_path}/run",
        "teacher.weights=random",
        "train.precision=fp32",
        *overrides,
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"run.name={LONG}", "run.name: must be at most 255 bytes long"),
        (f"run.name={'é' * 128}", "run.name: must be at most 255 bytes long"),
        (f"run.dir=runs/{LONG}/x", "run.dir: must be a path with names of at most 255 bytes"),
        ('run.name="a\\0b"', "run.name: must be a name without slashes"),
        ('run.dir="a\\0b"', "run.dir: must be one line of text without control characters"),
        ('data.train="a\\nb.parquet"', "data.train: must be one line of text without control characters"),
        ('teacher.weights="\\e[31m.pth"', "teacher.weights: must be one line of text without control characters"),
        (f"teacher.weights={LONG}.pth", "teacher.weights: [Errno 36] File name too long"),
        ("run.start_timeout=1e300", "run.start_timeout: must be less than or equal to 10000000"),
        ("data.workers=100000", "data.workers: must be at most 1024"),
        (f"train.epochs=1{'0' * 400}", "train.epochs: must be less than or equal to 1000000000000"),
        (f"student.options{'.a' * 5000}=1", "is not an override"),
    ],
    ids=lambda text: text[:25],
)
def test_values_that_no_file_system_or_clock_takes(tmp_path, capsys, override, said):
    assert said in refused(capsys, *dry_run(tmp_path, override))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("9" * 5000, "cannot be read as int"),
        ("[" * 5000, "is nested more than 50 levels deep"),
        ("{a: " * 60 + "1" + "}" * 60, "is nested more than 50 levels deep"),
        ("!!timestamp 2024-02-30", "cannot be read as timestamp"),
        ("!!timestamp x", "cannot be read as timestamp"),
        ("!!bool x", "cannot be read as bool"),
        ("!!int ''", "cannot be read as int"),
        ("!!float x", "cannot be read as float"),
        ('"\\ud800"', "holds half of a character"),
        ("&a [*a]", "holds a value that contains itself"),
        ("*.parquet", "write text in quotes of its own"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
    ids=lambda text: text[:25],
)
def test_yaml_that_is_none(tmp_path, capsys, text, said):
    line = refused(capsys, *dry_run(tmp_path, f"run.name={text}"))
    assert line.startswith("dkd: run.name: ")
    assert said in line
    (tmp_path / "recipe.yaml").write_text(f"run:\n  name: {text}\n")
    if "parquet" not in text:
        assert said in refused(capsys, "train", tmp_path / "recipe.yaml")


def test_a_name_that_looks_like_a_date_is_a_name(tmp_path):
    for name in ("2024-02-28", "2024-02-30", "2024-02-28 12:00:00"):
        assert load_recipe(QUICKSTART, [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/exp #1/seed_0", "runs/exp #1/seed_0"),
        ("#1", "#1"),
        ("a#b", "a#b"),
        ("3 # three", "3 # three"),
        ('"exp #1"', "exp #1"),
        ("'# 1'", "# 1"),
        ("{a: 'x # y'}", {"a": "x # y"}),
        ("3", 3),
        ("", None),
    ],
)
def test_a_hash_on_the_command_line_begins_no_comment(text, value):
    assert yaml_text.read_argument(text) == value


@pytest.mark.parametrize("text", ["[a, b] # c", '"a" # b', "{a: 1 # c\n}", "a: b # c"])
def test_a_comment_that_would_be_cut_is_refused(tmp_path, capsys, text):
    assert "holds a # with which YAML begins a comment" in refused(capsys, *dry_run(tmp_path, f"run.dir={text}"))


def aliases(levels, each=10, leaf="x"):
    """A mapping that stands for each^levels values."""
    lines = [f"a0: &a0 [{', '.join([leaf] * each)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, levels)]
    return "{" + ", ".join(lines) + "}"


def merge_keys(levels):
    """A mapping whose merge keys stand for 9^levels pairs."""
    lines = ["m0: &m0 {a: 1, b: 2}"]
    lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "{" + ", ".join(lines) + "}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (aliases(5), "holds more than 20,000 values"),
        (aliases(3, 20, "y" * 200), "holds more than 1,048,576 characters"),
        (merge_keys(6), "holds more than 20,000 values"),
    ],
    ids=["values", "characters", "merge keys"],
)
def test_few_bytes_cannot_stand_for_many(tmp_path, capsys, options, said):
    (tmp_path / "recipe.yaml").write_text(f"student: {{name: resnet8, options: {options}}}\n")
    assert said in refused(capsys, "plan", tmp_path / "recipe.yaml")
    assert said in refused(capsys, "plan", QUICKSTART, f"student.options={options}")


def test_aliases_within_the_bounds_are_read():
    assert len(yaml_text.read(aliases(4))["a3"][9][9][9]) == 10


def test_a_file_that_is_too_long_to_be_a_recipe(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("a: " + "x" * 2**21)
    assert "holds more than 1,048,576 characters" in refused(capsys, "train", tmp_path / "recipe.yaml")


def test_a_thousand_problems_are_not_a_thousand_lines(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("".join(f"key{i}: 1\n" for i in range(1000)))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "dkd: and 985 more problems"


@pytest.mark.parametrize(
    "command", [["train"], ["plan"], ["status"], ["launch-check"], ["evaluate"], ["export", "--format", "onnx"]]
)
def test_paths_that_the_system_refuses(tmp_path, capsys, command):
    assert "File name too long" in refused(capsys, *command, tmp_path / LONG)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE must be a whole number from 1, not 'abc'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number from 1, not '0'"),
        ("WORLD_SIZE", "9" * 5000, "WORLD_SIZE must be a whole number from 1"),
        ("LOCAL_WORLD_SIZE", "2.5", "LOCAL_WORLD_SIZE must be a whole number from 1, not '2.5'"),
        ("RANK", "-1", "RANK must be a whole number from 0, not '-1'"),
        ("LOCAL_RANK", "abc", "LOCAL_RANK must be a whole number from 0, not 'abc'"),
        ("MASTER_PORT", "65536", "MASTER_PORT must be a whole number from 1 to 65535, not '65536'"),
        # torchrun with --master_port 0: the ranks would wait for each other until their patience ends.
        ("MASTER_PORT", "0", "MASTER_PORT must be a whole number from 1 to 65535, not '0'"),
        ("TORCHELASTIC_MAX_RESTARTS", "many", "TORCHELASTIC_MAX_RESTARTS must be a whole number from 0, not 'many'"),
        ("DKD_STOP_EXIT_CODE", "abc", "DKD_STOP_EXIT_CODE must be a whole number from 0 to 255, not 'abc'"),
        ("DKD_STOP_EXIT_CODE", "256", "DKD_STOP_EXIT_CODE must be a whole number from 0 to 255, not '256'"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "must be a whole number from 1, not 'auto'"),
        ("ACCELERATE_USE_CPU", "maybe", "ACCELERATE_USE_CPU must be true or false, not 'maybe'"),
    ],
)
def test_wrong_environment_variables(tmp_path, capsys, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    for command in (dry_run(tmp_path), ["evaluate", tmp_path], ["launch-check"]):
        assert said in refused(capsys, *command)


def test_ranks_that_do_not_fit_their_number(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK must be less than WORLD_SIZE=2, not 2" in refused(capsys, "launch-check")


@pytest.mark.parametrize("limits", [(20, 20), (20, 255)])
def test_too_few_open_files_are_said_at_once(capsys, monkeypatch, limits):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    line = refused(capsys, "inspect", "resnet8")
    assert (
        f"this process may open {limits[1]} files at once, and dkd needs 256; raise the limit: ulimit -n 1024" in line
    )


def test_a_low_limit_of_open_files_is_raised_where_it_can_be(capsys, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    for highest in (4096, 300, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, highest=highest: (20, highest))
        assert main(["inspect", "resnet8"]) == 0
    assert limits == [(1024, 4096), (300, 300), (1024, resource.RLIM_INFINITY)]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_terminal_of_few_letters_gets_other_letters(capsys, monkeypatch, errors):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["inspect", "resnet8", "--image-size", "32"]) == 0
    console.show("γ·B ← 3 “quoted” \udcff")
    shown = terminal.buffer.getvalue().decode("ascii")
    assert "64x8x8" in shown
    assert "gamma*B <- 3 \\u201cquoted\\u201d \\udcff" in shown


ESCAPES = "\x1b[31m\x9b2J\r\u202e\x07\n"


def test_names_cannot_command_a_terminal(tmp_path, capsys):
    folder = tmp_path / f"run{ESCAPES}"
    folder.mkdir()
    assert main(["status", str(folder)]) == 0
    assert main(["status", str(folder / "x")]) == 2
    console.say(f"said {ESCAPES}")
    console.show(f"shown {ESCAPES}")
    with pytest.raises(SystemExit):
        main(["status", str(folder), f"--no{ESCAPES}"])
    out, err = capsys.readouterr()
    assert not set("\x1b\x9b\r\u202e\x07") & {*out, *err}
    spelled = "\\x1b[31m\\x9b2J\\x0d\\u202e\\x07\\x0a"
    assert out.splitlines() == [f"{tmp_path}/run{spelled}: no run has been started here", f"shown {spelled}"]
    assert f"said {spelled}" in err.splitlines()
    assert f"--no{spelled}" in err.splitlines()[-1]


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (Full(), ["dkd: the result cannot be written to standard output: No space left on device"]),
        (Gone(), []),
        (None, ["it is closed"]),
    ],
)
def test_a_result_that_is_lost_is_no_success(capsys, monkeypatch, stream, said):
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", "resnet8"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


OWN_CODE = """
import sys
import torch

class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, num_classes)

class InInit(Net):
    def __init__(self, num_classes):
        sys.exit("no licence")

class InForward(Net):
    def forward(self, x):
        sys.exit(3)

class Wordless(Exception):
    def __str__(self):
        raise KeyError("text")

class WithoutText(Net):
    def forward(self, x):
        raise Wordless

class Deep(Net):
    def forward(self, x):
        return self.forward(x)

class Files(Net):
    def forward(self, x):
        return open("/no/such/file")

class Data:
    labels = [0] * 2000

    def __init__(self, training):
        pass

    def __getitem__(self, index):
        sys.exit("no images")
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "code_of_a_user.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("code_of_a_user", None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("InInit", "cannot be built with num_classes=1000: SystemExit: no licence"),
        ("InForward", "SystemExit: 3"),
        ("WithoutText", "Wordless: (its text cannot be had: KeyError)"),
        ("Deep", "RecursionError"),
        ("Files", "FileNotFoundError"),
    ],
)
def test_errors_in_code_of_the_user_name_it(own_code, capsys, name, said):
    line = refused(capsys, "inspect", f"code_of_a_user:{name}", "--image-size", "8")
    assert f"'code_of_a_user:{name}'" in line
    assert said in line
    assert "code_of_a_user.py:" in line


def test_data_of_the_user_that_end_the_program_are_named(own_code, tmp_path, capsys):
    line = refused(capsys, *dry_run(tmp_path, "data.train=python:code_of_a_user:Data")).partition("SystemExit: ")[2]
    assert line.startswith("no images (")
    assert "code_of_a_user.py:" in line


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, TypeError, RecursionError, AssertionError])
def test_a_bug_of_dkd_shows_its_traceback(monkeypatch, error):
    def broken(options):
        raise error("a bug")

    monkeypatch.setitem(cli.COMMANDS, "status", replace(cli.COMMANDS["status"], run=broken))
    with pytest.raises(error):
        main(["status", "runs/x"])


def test_a_bug_in_the_checks_is_not_taken_for_a_wrong_recipe(tmp_path, monkeypatch):
    from dkd.preflight import models

    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(models, "unreached_parameters", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(dry_run(tmp_path))


@pytest.mark.parametrize("member", [("pth", "code"), ("json", "depth")], ids=lambda member: member[0])
def test_a_tar_with_members_that_cannot_be_read(tmp_path, capsys, member):
    """`datasets` decodes every member by its name: a .pth by torch (which refuses code), a .json by json."""

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    pickled = io.BytesIO()
    torch.save(Code(), pickled)
    content = {"pth": pickled.getvalue(), "json": b"[" * 100_000}[member[0]]
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name, data in ((f"0.{member[0]}", content), ("0.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"data\.tar' cannot be read as webdataset"):
        open_source(str(tmp_path / "data.tar"), training=True)
    assert "cannot be read as webdataset" in refused(capsys, *dry_run(tmp_path, f"data.train={tmp_path}/data.tar"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"image_size": -5}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"normalization": [1, 2]}, "normalization"),
        ({"normalization": {"mean": ["a"], "std": [1]}}, "normalization"),
        ({"normalization": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "must hold normalization as mean and std"),
    ],
    ids=str,
)
def test_a_description_of_a_student_that_cannot_be(tmp_path, capsys, facts, said):
    spec = ModelSpec("resnet8", 10)
    save_student(tmp_path, spec, build_model(spec).state_dict(), {"image_size": 16, **facts})
    assert json.loads((tmp_path / "student.json").read_text())["architecture"]["name"] == "resnet8"
    assert said in refused(capsys, "export", tmp_path, "--format", "onnx", "--normalization")
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("command", ["train", "plan", "inspect", "launch-check", "evaluate", "report", "export"])
def test_a_command_that_imports_code_says_so(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "module:callable" in said
    assert "import" in said


@pytest.mark.parametrize(
    "arguments", [["inspect", "resnet8", "--classes", "9" * 5000], ["launch-check", "--seconds", "9" * 12]]
)
def test_numbers_of_arguments_are_bounded(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err) < 2000
