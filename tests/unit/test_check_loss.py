"""`dkd check-loss` as a command: its exit codes and its lines. What it finds: tests/distributed/test_ranks.py."""

import pytest

from dkd.cli import main
from dkd.commands.loss_trial import Measured, measure
from dkd.global_batch import BatchLayout

SHAPES = ["--student", "4,2,2", "--teacher", "4,2,2"]


def check(capsys, loss, *words):
    code = main(["check-loss", f"small_models:{loss}", *words])
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("dkd: ")]


def test_a_loss_that_differs_ends_with_code_1_and_the_cause(capsys):
    code, out, _ = check(capsys, "LocalMean", *SHAPES)
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "small_models:LocalMean on 8 random samples, float64, tolerance 1e-05"
    assert [line.split()[0] for line in lines[2:4]] == ["value", "gradient,"]
    assert "gather_rows(x, layout)" in lines[4]


@pytest.fixture
def no_processes(monkeypatch):
    """Let two processes measure what is right of a loss, without starting them."""

    def halves(trial, processes, seconds):
        whole = measure(trial, slice(None), BatchLayout((trial.batch,)))
        return [Measured(whole.value, 2 * rows) for rows in whole.gradient.chunk(processes)]

    monkeypatch.setattr("dkd.commands.loss_trial.measure_on_ranks", halves)


@pytest.mark.parametrize(("loss", "states"), [("Unstated", False), ("Relational", True)])
def test_a_loss_that_compares_samples_is_asked_to_state_it(capsys, no_processes, loss, states):
    code, out, _ = check(capsys, loss, *SHAPES)
    assert code == 0
    assert "the loss is the same on 1 and on 2 processes\n" in out
    assert ("set relational = True on its class" in out) != states


def test_a_slope_that_is_not_the_derivative_of_the_value_is_found(capsys, no_processes):
    """It is the same on all process counts."""
    code, out, _ = check(capsys, "WrongSlope", *SHAPES)
    assert code == 1
    assert "slope differs from the derivative of value: the gradient by slope is 5.0e-01 from that by autograd" in out


def test_a_loss_of_products_that_depends_on_a_common_factor_is_found(capsys, no_processes):
    code, out, _ = check(capsys, "DependsOnScale", *SHAPES)
    assert code == 1
    assert "of its value where all features of a model are multiplied by 1.5" in out
    assert "slope differs" not in out


def test_a_loss_that_fails_on_one_process_is_one_line(capsys):
    """The other process waits for it, and is ended."""
    code, out, (line,) = check(capsys, "FailsOnRank1", *SHAPES)
    assert (code, out) == (2, "")
    assert "on 2 processes: rank 1: 'small_models:FailsOnRank1' cannot be computed: LookupError: only here (" in line
    assert "small_models.py:" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Summed"], "0 --student and 0 --teacher: give one of each for every pair of features"),
        (["Summed", *SHAPES, "--batch", "5"], "--batch 5 on 2 processes: N is from 2 to 16, and B a multiple of it"),
        (["Summed", *SHAPES, "-n", "1"], "--batch 8 on 1 processes: N is from 2 to 16"),
        (["Summed", *SHAPES, "--of", "labels"], "--of labels has logits of --classes numbers, and no --student"),
        (["Summed", *SHAPES, "width=3"], "cannot be made with options {'width': 3}: TypeError: "),
        (["Summed", *SHAPES, "a.b=3"], "'a.b' is no keyword argument of 'small_models:Summed'"),
        (["Missing", *SHAPES], "'small_models' has no callable 'Missing'"),
        (["no-name", *SHAPES], "write module:attribute"),
        (["Summed", "--student", "4,2,2", "--teacher", "9,2,2"], "cannot be computed: RuntimeError: "),
    ],
)
def test_wrong_input_is_one_line_and_no_process_starts(capsys, monkeypatch, words, message):
    monkeypatch.setattr("torch.multiprocessing.spawn", None)
    code, out, (line,) = check(capsys, *words)
    assert (code, out) == (2, "")
    assert message in line


def test_a_shape_is_whole_numbers(capsys):
    with pytest.raises(SystemExit) as exit_:
        check(capsys, "Summed", "--student", "4,x")
    assert exit_.value.code == 2


def test_a_function_in_place_of_what_makes_a_loss_is_explained(capsys):
    assert main(["check-loss", "torch.nn.functional:mse_loss", "--student", "4,2,2", "--teacher", "4,2,2"]) == 2
    said = capsys.readouterr().err
    assert "it is called once, with the options (and the pairs' shapes, as `shapes`), to make the loss: name a" in said
