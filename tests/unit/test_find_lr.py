"""The learning-rate range test: what it suggests, what it prints, and what it leaves alone."""

import json
import math
import re

import pytest
from launched import ROOT
from PIL import Image

from dkd.cli import main
from dkd.config import load_recipe
from dkd.training.lr_range import LearningRates, LossCurve

RECIPE = str(ROOT / "configs" / "quickstart.yaml")
TINY = [
    "teacher={name: resnet8, weights: random}",
    "losses={kd: {alpha: 1}, sp: {gamma: 100, reference_batch: 128, pairs: [[layer3, layer3]]}}",
    "train.precision=fp32",
    "train.global_batch=32",
    "train.micro_batch=32",
    "data.image_size=8",
    "data.workers=0",
]


def curve(loss, steps=120, lowest=1e-6, highest=10.0):
    rates = LearningRates(lowest, highest, steps)
    return LossCurve([rates.at(i) for i in range(steps)], [loss(math.log10(rates.at(i)), i) for i in range(steps)])


def test_rates_grow_exponentially_from_the_lowest_to_the_highest():
    rates = LearningRates(1e-4, 1e2, 7)
    assert [rates.at(step) for step in range(7)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100])


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    # A fall whose steepest place is 10⁻², and a rise from 1 on; every second step has noise of the other sign.
    found = curve(lambda x, i: 2 - math.tanh(2 * (x + 2)) + max(0.0, x) * 5 + 0.02 * (-1) ** i)
    assert 0.006 < found.steepest < 0.016
    assert 0.01 < found.suggestion < 0.05
    assert f"{found.suggestion:.1e}" == f"{found.suggestion:.15e}"[:3] + f"{found.suggestion:.15e}"[-4:]


def test_a_range_that_begins_too_high_is_reported():
    def loss(x, i):
        return 2 - math.tanh(2 * (x + 2)) + max(0.0, x) * 5

    assert not curve(loss).begins_too_high
    assert curve(loss, lowest=0.15).begins_too_high


def test_a_feature_loss_that_falls_at_any_rate_does_not_decide():
    # A large term collapses from 10⁻⁵ on, and the rest is lowest at 10⁻².
    found = curve(lambda x, i: 20 / (1 + 10 ** (2 * (x + 5))) + 4 * (x + 2) ** 2 / 16 + 2)
    assert found.steepest < 1e-4
    assert 5e-4 < found.suggestion < 2e-3


def test_the_curve_is_not_shifted_by_smoothing():
    line = curve(lambda x, i: 5.0 - x, steps=60)
    assert line.smoothed[10:50] == pytest.approx(line.losses[10:50])


@pytest.mark.parametrize("loss", [lambda x, i: 2.0 + 0.001 * (-1) ** i, lambda x, i: 2.0 + 0.1 * (x + 6)])
def test_a_loss_that_does_not_fall_gives_no_suggestion(loss):
    assert curve(loss).suggestion is None
    assert LossCurve([], []).suggestion is None


def test_the_test_trains_the_whole_objective_and_leaves_the_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, picture = tmp_path / "run", tmp_path / "lr.png"
    words = [*TINY, f"run.dir={run}"]
    assert main(["train", RECIPE, *words, "train.max_steps=1"]) == 0
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")}
    capsys.readouterr()
    # A recipe that the run of run.dir does not have is no matter here.
    arguments = ["--steps", "16", "--lowest", "1e-3", "--highest", "1", "--picture", str(picture)]
    assert main(["find-lr", RECIPE, *words, "optimizer.lr=7", *arguments]) == 0
    out = capsys.readouterr().out
    rows = [list(map(float, line.split())) for line in out.splitlines() if re.match(r"\s+[\d.e-]+\s+[\d.]+\s", line)]
    assert len(rows) == 16
    # Step 1 of the run has the same objective, weights and images.
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert rows[0][:2] == [0.001, pytest.approx(first["loss"], rel=1e-4)]
    suggested = re.search(r"^optimizer\.lr=(\S+)$", out, re.MULTILINE).group(1)
    assert load_recipe(RECIPE, [f"optimizer.lr={suggested}"]).optimizer.lr == float(suggested)
    assert {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")} == before
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.png", "run"]


def test_a_test_that_diverges_ends_there(tmp_path, capsys):
    arguments = ["--steps", "40", "--lowest", "1", "--highest", "1e6"]
    code = main(["find-lr", RECIPE, *TINY, f"run.dir={tmp_path / 'run'}", *arguments])
    out = capsys.readouterr().out
    found = re.search(r"the loss diverged at \S+, after (\d+) of 40 steps", out)
    assert found, out
    assert int(found.group(1)) < 40
    assert code == (0 if "optimizer.lr=" in out else 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lowest", "1", "--highest", "0.5"], "--lowest 1 must be below --highest 0.5"),
        (["--steps", "3"], "--steps 3: a test needs at least 10 steps"),
        (["--picture", "x.pdf"], "--picture 'x.pdf' must end in .png"),
        (["student.name=resnet9"], "student.name: "),
    ],
)
def test_wrong_input_is_one_line_and_nothing_starts(capsys, words, message):
    assert main(["find-lr", RECIPE, *TINY, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dkd: ")]
    assert message in line


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_rate_is_a_number_above_0(capsys, value):
    with pytest.raises(SystemExit) as exit_:
        main(["find-lr", RECIPE, f"--lowest={value}"])
    assert exit_.value.code == 2
    assert "is not a finite number above 0" in capsys.readouterr().err


def test_a_test_trains_with_weights_that_do_not_change():
    from dkd.config.losses import with_constant_weights

    schedule = "losses={kd: {alpha: {start: 50, end: 1}}, custom: []}"
    losses = with_constant_weights(load_recipe(RECIPE, [schedule]).losses)
    assert losses.kd.alpha == 50
    assert losses.ce.weight == 1
