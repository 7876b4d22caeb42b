"""What another launch must measure of the same student."""

import pytest


def as_measured(evaluation, loss=1e-7, agreement=1e-9, shares=0.0):
    """Return an evaluation's facts with the same counts, and sums up to a relative error.

    Args:
        loss, agreement: relative errors of the loss, and of KL and CKA.
        shares: absolute error of the shares of student and teacher, for teachers whose batches differ.
    """
    expected = {**evaluation, "loss": pytest.approx(evaluation["loss"], rel=loss)}
    if "agreement" in evaluation:
        found = {**evaluation["agreement"]}
        for key in ("kl", "cka"):
            found[key] = pytest.approx(found[key], rel=agreement)
        for key in ("top1", "teacher_top1"):
            found[key] = pytest.approx(found[key], rel=0, abs=shares)
        expected["agreement"] = found
    return expected
