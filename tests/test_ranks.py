"""What must be the same on 1, 2 and 4 ranks, under a real launch."""

import math

import pytest
from launched import launch

WORLDS = (1, 2, 4)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """world size -> case -> what each rank returned."""
    return {world: launch(world, tmp_path_factory.mktemp(f"world{world}")) for world in WORLDS}


def returned(results, world, case):
    """What the ranks returned; an exception in the case is shown as it was."""
    for rank, value in enumerate(results[world][case]):
        if isinstance(value, dict) and "error" in value:
            pytest.fail(f"rank {rank}: {value['error']}")
    return results[world][case]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["losses_on_even_batches", "losses_on_uneven_batches"])
def test_value_and_gradient_are_those_of_the_global_batch(results, world, case):
    for errors in returned(results, world, case):
        for loss, (value, gradient) in errors.items():
            assert value < 1e-12, (loss, value)
            assert gradient < 1e-12, (loss, gradient)


@pytest.mark.parametrize("world", WORLDS)
def test_the_losses_work_in_a_users_own_ddp_loop(results, world):
    assert max(returned(results, world, "the_documented_three_lines_in_a_users_own_ddp_loop")) < 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_half_precision_features_are_promoted(results, world):
    assert all(dtype == "torch.float32" for dtype, _ in returned(results, world, "half_precision_features_are_promoted"))


@pytest.mark.parametrize("world", [2, 4])
def test_shapes_that_differ_between_ranks_end_all_ranks_with_their_names(results, world):
    messages = returned(results, world, "shapes_that_differ_end_all_ranks")
    assert set(messages) == {"features differ between ranks: rank 0 has 2×4×3×3, 2×4×3×3, rank 1 has 2×5×3×3, 2×4×3×3"}


def test_evaluation_counts_do_not_depend_on_batch_or_ranks(results):
    reference = returned(results, 1, "evaluation_counts")[0]
    for world in WORLDS:
        for counts in returned(results, world, "evaluation_counts"):
            for key, (samples, top1, top5, loss) in counts.items():
                assert samples == int(key.split()[0])
                same_data = f"{samples} samples, batch 64"
                assert [samples, top1, top5] == reference[same_data][:3], (world, key)
                assert math.isclose(loss, reference[same_data][3], rel_tol=1e-6), (world, key)


@pytest.mark.parametrize("case", ["all_four_losses", "batch_norm_with_fixed_micro_batches"])
@pytest.mark.parametrize("world", [2, 4])
def test_training_is_the_same_on_any_number_of_ranks(results, case, world):
    """In float64. Sums are taken in another order on every number of ranks, and 20 steps of momentum amplify that from 1e-16."""
    one, many = returned(results, 1, case)[0], returned(results, world, case)
    assert len(one["lines"]) == 20
    terms = [term for term in ("loss", "ce", "at", "sp", "kd") if term in one["lines"][0]]
    for a, b in zip(one["lines"], many[0]["lines"], strict=True):
        for term in terms:
            assert math.isclose(a[term], b[term], rel_tol=1e-9), (a["step"], term, a[term], b[term])
    for key, values in one["state"].items():
        assert values == pytest.approx(many[0]["state"][key], rel=1e-7, abs=1e-9), key


@pytest.mark.parametrize("case", ["all_four_losses", "batch_norm_with_fixed_micro_batches", "adamw_and_bf16_and_worker_processes"])
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_hold_the_same_student_and_the_teacher_is_untouched(results, case, world):
    ranks = returned(results, world, case)
    assert len({rank["fingerprint"] for rank in ranks}) == 1
    assert all(rank["teacher_unchanged"] and not rank["teacher_trains"] for rank in ranks)
    assert all(rank["evaluation"] == ranks[0]["evaluation"] for rank in ranks)
    assert ranks[0]["evaluation"]["samples"] == 449


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_ends_all_ranks_at_the_same_step(results, world):
    messages = set(returned(results, world, "a_loss_that_is_not_finite_ends_all_ranks"))
    assert len(messages) == 1
    assert "the loss is not finite at step" in messages.pop()
