"""What must be the same on 1, 2 and 4 ranks, under a real launch."""

import functools
import itertools
import math
import re
import sys

import evaluation_cases
import loss_cases
import plain_reference
import pytest
import torch
import trainer_cases
from launched import CASES as SCRIPTS
from launched import STEPS, Launch, limit
from measured import as_measured
from shared_launches import SharedLaunches, launch, names_in, parameters, without_errors

from dkd.commands.loss_trial import Measured, judge

WORLDS = (1, 2, 4)


CASES = {
    case.__name__: (f"{case.__module__}:{case.__name__}",)
    for case in (*loss_cases.CASES, *evaluation_cases.CASES, *trainer_cases.CASES)
}


def uses(item):
    """Return the cases that a test speaks of. What several ranks return is often compared with what one returns."""
    names = names_in(item, set(CASES))
    values = parameters(item)
    worlds = {1, values["world"]} if "world" in values else WORLDS
    return [(world, {name: CASES[name] for name in names}) for world in worlds]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    def start(world, cases):
        # One process has no process group here: what a user's own loop is without a launcher.
        ordered = {name: case for name, case in CASES.items() if name in cases}
        return launch(world, tmp_path_factory.mktemp(f"world{world}"), ordered, launcher=world > 1)

    return SharedLaunches(request, uses, start)


def returned(results, world, case):
    return without_errors(results[world][case])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["losses_on_even_batches", "losses_on_uneven_batches"])
def test_value_and_gradient_are_those_of_the_global_batch(results, world, case):
    for errors in returned(results, world, case):
        for loss, (value, gradient) in errors.items():
            assert value < 1e-12, (loss, value)
            assert gradient < 1e-12, (loss, gradient)


@pytest.mark.parametrize("world", WORLDS)
def test_relations_on_every_grid_are_those_of_the_global_batch(results, world):
    """Grids of 6, 8 and more ranks: tests/unit/test_relations.py, whose ranks are threads."""
    grids = {1: 1, 2: 3, 4: 6}[world]
    for errors in returned(results, world, "relations_on_every_grid"):
        assert len(errors) == 7 * grids * 2 * 2
        for case, (value, gradient) in errors.items():
            assert value < 1e-12, (case, value)
            assert gradient < 1e-12, (case, gradient)


@pytest.mark.parametrize("world", WORLDS)
def test_class_weights_are_those_of_torch_on_the_whole_batch_of_a_step(results, world):
    for errors in returned(results, world, "class_weights_of_whole_steps"):
        assert len(errors) == 8
        for name, (value, gradient) in errors.items():
            assert value < 1e-12, (name, value)
            assert gradient < 1e-12, (name, gradient)


@pytest.mark.parametrize("world", WORLDS)
def test_the_losses_work_in_a_users_own_ddp_loop(results, world):
    assert max(returned(results, world, "the_documented_three_lines_in_a_users_own_ddp_loop")) < 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_attention_transfer_is_that_of_really_gathered_feature_maps(results, world):
    for errors in returned(results, world, "attention_transfer_of_gathered_feature_maps"):
        assert set(errors) == {"even", "uneven"}
        assert max(max(pair) for pair in errors.values()) < 1e-12, errors


@pytest.mark.parametrize("world", WORLDS)
def test_half_precision_features_travel_as_they_are_and_lose_nothing_by_it(results, world):
    for ways in returned(results, world, "features_travel_in_half_precision"):
        for strategy, found in ways.items():
            assert found["equal"], strategy
            assert found["rounded equal"], strategy
            # comm_dtype rounds float32 features, and for exchange their gradients too, to 8 bits: 2⁻⁹ each at most,
            # less in the norm.
            assert found["gradient error"] < 4e-3 or world == 1, (strategy, found)
            own, promoted = found["bytes"]
            assert own < promoted or world == 1


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_received_are_those_of_the_cost_model(results, world):
    for cases in returned(results, world, "received_bytes_of_every_strategy"):
        assert len(cases) == 16
        for counted, collectives, formula, number in cases:
            assert (counted, collectives) == (formula, number)


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_receives_the_bytes_that_the_plan_says(results, world):
    for found in returned(results, world, "received_bytes_of_a_step_and_of_its_plan"):
        assert len(found) == 9
        for name, (counted, planned) in found.items():
            assert counted == planned, name
            assert (counted == [0, 0]) == (world == 1), name


@pytest.mark.parametrize("world", WORLDS)
def test_half_precision_features_are_promoted(results, world):
    assert all(
        dtype == "torch.float32" for dtype, _ in returned(results, world, "half_precision_features_are_promoted")
    )


@pytest.mark.parametrize("world", [2, 4])
def test_shapes_that_differ_between_ranks_end_all_ranks_with_their_names(results, world):
    messages = returned(results, world, "shapes_that_differ_end_all_ranks")
    assert set(messages) == {"features differ between ranks: rank 0 has 2×4×3×3, 2×4×3×3, rank 1 has 2×5×3×3, 2×4×3×3"}


@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_must_agree_on_beside_shapes(results, world):
    (message,) = set(returned(results, world, "features_with_a_gradient_on_one_rank_only_end_all_ranks"))
    assert "rank 0 has 2×4×3×3 without gradient, 2×4×3×3 without gradient, rank 1 has 2×4×3×3 with gradient" in message
    (message,) = set(returned(results, world, "a_group_without_rows_ends_all_ranks"))
    assert message.startswith("a group of ranks holds no row: [(2,), (0,)")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_call_different_losses_all_end_and_both_losses_are_named(results, world):
    ranks = returned(results, world, "losses_that_differ_end_all_ranks")
    assert all(rank == ranks[0] for rank in ranks)
    assert len(ranks[0]) == 12
    for what, message in ranks[0].items():
        assert message.startswith("losses differ between ranks: rank 0 calls "), (what, message)
        assert f", rank {world - 1} calls " in message, (what, message)
    assert re.search(r"calls SimilarityPreserving\(.*rank \d calls AttentionTransfer\(", ranks[0]["kinds"])
    assert re.search(r"floor=0.01, .*, rank \d calls SimilarityPreserving\(floor=0.0,", ranks[0]["floors"])


@pytest.mark.parametrize("world", [2, 4])
def test_features_that_one_rank_lacks_end_all_ranks(results, world):
    ranks = returned(results, world, "features_that_are_missing_end_all_ranks")
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0]["none"].endswith(f"rank {world - 1} has no tensors")
    assert ranks[0]["scalar"].startswith(f"rank {world - 1}: a loss needs tensors of shape (b, ...)")


@pytest.mark.parametrize("world", [2, 4])
def test_gram_matrices_of_machines_and_of_groups_whose_loss_was_copied(results, world):
    for errors in returned(results, world, "gram_matrices_of_machines"):
        assert max(errors) < 1e-12
    for copies in returned(results, world, "copies_of_a_loss_with_groups"):
        assert len(copies) == 3
        assert max(map(max, copies)) < 1e-12


def test_ranks_that_have_made_different_numbers_of_groups_all_end(results):
    ranks = returned(results, 4, "ranks_that_have_made_other_groups_end_all_ranks")
    assert all(rank == ranks[0] for rank in ranks)
    for message in ranks[0].values():
        assert message.startswith("ranks have made different numbers of process groups before this loss (["), message
    assert set(ranks[0]) == {"grid", "scope"}


@pytest.mark.parametrize("world", [2, 4])
def test_machines_that_run_different_numbers_of_ranks_end_all_ranks(results, world):
    ranks = returned(results, world, "machines_that_differ_end_all_ranks")
    assert all(rank == ranks[0] for rank in ranks)
    different, unknown = ranks[0]
    assert f"LOCAL_WORLD_SIZE of the ranks is {[1] + [world] * (world - 1)}" in different
    assert unknown.startswith(f"scope 'node': LOCAL_WORLD_SIZE is no number on rank {world - 1}")


def test_each_replica_of_a_mesh_is_a_batch_of_its_own(results):
    """By the layout that docs/reference/losses.md shows."""
    ranks = returned(results, 4, "replicas_of_a_mesh")
    assert [found["ranks"] for found in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(len(found["errors"]) == 4 and max(map(max, found["errors"])) < 1e-12 for found in ranks), ranks


@pytest.mark.parametrize("world", [2, 4])
def test_second_derivatives_are_refused(results, world):
    for messages in returned(results, world, "second_derivatives_are_refused"):
        assert all("has no second derivative" in message for message in messages), messages


@pytest.mark.parametrize("world", WORLDS)
def test_rows_that_differ_within_one_rank_end_all_ranks(results, world):
    messages = set(returned(results, world, "rows_that_differ_within_a_rank_end_all_ranks"))
    assert messages == {"rank 0: features of one batch have different numbers of rows: 4×4×3×3, 3×4×3×3"}


def test_evaluation_counts_are_right(results):
    """Against counts taken by hand, on all images at once."""
    for samples in (1, 7, 64, 1000):
        plain = evaluation_cases.plain_counts(samples)
        ours = returned(results, 1, "evaluation_counts")[0][f"{samples} samples, batch 64"]
        assert ours[:3] == plain[:3]
        assert math.isclose(ours[3], plain[3], rel_tol=1e-6)


def test_evaluation_counts_do_not_depend_on_batch_or_ranks(results):
    reference = returned(results, 1, "evaluation_counts")[0]
    for world in WORLDS:
        for counts in returned(results, world, "evaluation_counts"):
            for key, (samples, top1, top5, loss) in counts.items():
                assert samples == int(key.split()[0])
                same_data = f"{samples} samples, batch 64"
                assert [samples, top1, top5] == reference[same_data][:3], (world, key)
                assert math.isclose(loss, reference[same_data][3], rel_tol=1e-6), (world, key)


@pytest.mark.parametrize("world", WORLDS)
def test_the_confusion_matrix_is_exact_on_any_number_of_ranks(results, world):
    matrix = evaluation_cases.plain_confusion(64)
    for facts in returned(results, world, "class_counts_of_an_evaluation"):
        assert facts["confusion"] == matrix
        assert [each["samples"] for each in facts["classes"]] == [sum(row) for row in matrix]
        assert [each["top1_correct"] for each in facts["classes"]] == [row[i] for i, row in enumerate(matrix)]


@pytest.mark.parametrize("world", WORLDS)
def test_neighbours_vote_alike_on_any_number_of_ranks(results, world):
    for counts in returned(results, world, "knn_counts"):
        for key, found in counts.items():
            images, asked, k = map(int, key.split()[-3:])
            assert found == evaluation_cases.plain_knn(images, asked, k), (world, key)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_stop_early_at_the_same_step_and_stay_there(results, world):
    ranks = returned(results, world, "a_run_that_stops_early")
    assert all(rank == ranks[0] for rank in ranks)
    (first, end, reason), again = ranks[0]
    assert (first, end) == (0, 6)  # epochs of 3 steps: the first evaluation, and one without an improvement
    assert reason.startswith("top1 has not improved by more than 1 for 1 evaluation; the best was ")
    assert again == [6, 6, reason]


@functools.cache
def plain_loop(changes, micro_batch):
    """(lines, state) of the plain loop for a training that several cases share, named by what differs in its recipe."""
    recipe = trainer_cases.RECIPE
    sp = {**recipe["losses"], "sp": {"batch": "micro"}}
    by_pixels = {form: {**recipe["losses"], **losses} for form, losses in trainer_cases.GRADIENTS.items()}
    changed = {
        "nothing": recipe,
        "batch norm": (with_norm := {**recipe, "student": {**recipe["student"], "norm": "batch"}}),
        "batch norm, no sp": {**with_norm, "losses": {**recipe["losses"], "sp": None}},
        "regularized": {
            **recipe,
            **{key: {**recipe[key], **value} for key, value in trainer_cases.REGULARIZED.items()},
        },
        "gradients": {**recipe, "losses": by_pixels["transfer"]},
        "mirrored": {**recipe, "losses": by_pixels["symmetric"]},
        "sp of micro-batches": {**recipe, "losses": sp},
        "relations": {**recipe, "losses": {**recipe["losses"], **trainer_cases.RELATIONS}},
    }
    return plain_reference.train(changed[changes], STEPS, micro_batch=micro_batch)


REFERENCES = {
    "all_four_losses": ("nothing", 32),
    "all_four_losses_by_exchange": ("nothing", 32),
    "all_four_losses_accumulated": ("nothing", 32),
    "all_relations": ("relations", 32),
    "all_relations_accumulated": ("relations", 32),
    "all_four_losses_accumulated_with_batch_norm": ("batch norm", 8),
    "batch_norm_with_fixed_micro_batches": ("batch norm, no sp", 8),
    "batch_norm_dropout_mixup_and_cutmix": ("regularized", 8),
    "batch_norm_dropout_mixup_and_cutmix_by_exchange": ("regularized", 8),
    "gradient_attention_accumulated": ("gradients", 32),
    "gradient_attention_of_mirror_images": ("mirrored", 32),
    "gram_matrices_of_micro_steps": ("sp of micro-batches", 8),
    "gram_matrices_of_groups": ("sp of micro-batches", 16),
}


@pytest.mark.parametrize(
    ("case", "world"),
    [
        *itertools.product(
            [
                "all_four_losses",
                "all_four_losses_by_exchange",
                "all_four_losses_accumulated",
                "all_relations",
                "all_relations_accumulated",
                "all_four_losses_accumulated_with_batch_norm",
                "gradient_attention_accumulated",
                "gradient_attention_of_mirror_images",
                "batch_norm_with_fixed_micro_batches",
                "batch_norm_dropout_mixup_and_cutmix",
                "batch_norm_dropout_mixup_and_cutmix_by_exchange",
            ],
            WORLDS,
        ),
        ("gram_matrices_of_micro_steps", 1),  # on more ranks it is another training, as the recipe's documentation says
        ("gram_matrices_of_groups", 2),
        ("gram_matrices_of_groups", 4),
    ],
)
def test_training_on_any_number_of_ranks_is_that_of_a_plain_loop(results, case, world):
    """In float64. Sums are taken in another order on every number of ranks, and steps of momentum amplify that from
    1e-16."""
    (wanted, state), many = plain_loop(*REFERENCES[case]), returned(results, world, case)
    assert len(many[0]["lines"]) == len(wanted) == STEPS
    for ours, plain in zip(many[0]["lines"], wanted, strict=True):
        for name, value in plain.items():
            assert math.isclose(ours[name], value, rel_tol=1e-9), (ours["step"], name, ours[name], value)
    assert set(many[0]["state"]) == {f"model.{key}" for key in state}
    for key, values in state.items():
        assert many[0]["state"][f"model.{key}"] == pytest.approx(
            values.double().flatten()[:64].tolist(), rel=1e-7, abs=1e-9
        ), key


@pytest.mark.parametrize("world", [2, 4])
def test_gram_matrices_of_nodes_are_those_of_their_ranks(results, world):
    """Two machines, said by LOCAL_WORLD_SIZE: the groups of `gram_matrices_of_groups`, for 5 steps."""
    wanted, lines = (
        plain_loop(*REFERENCES["gram_matrices_of_groups"])[0],
        returned(results, world, "gram_matrices_of_nodes")[0]["lines"],
    )
    assert len(lines) == 5
    for ours, plain in zip(lines, wanted, strict=False):
        for name, value in plain.items():
            assert math.isclose(ours[name], value, rel_tol=1e-9), (ours["step"], name, ours[name], value)


@pytest.mark.parametrize("world", WORLDS)
def test_a_relational_loss_of_ones_own_is_computed_on_the_global_batch(results, world):
    wanted, lines = plain_loop("nothing", 32)[0], returned(results, world, "a_relational_loss_of_ones_own")[0]["lines"]
    for ours, plain in zip(lines, wanted, strict=True):
        assert math.isclose(ours["loss"], plain["loss"], rel_tol=1e-9)
        assert math.isclose(ours["mine"], plain["sp"], rel_tol=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_is_given_the_labels_and_indices_that_it_asks_for(results, world):
    """The loss itself looks whether these belong together."""
    one, many = (returned(results, w, "a_loss_that_asks_for_labels_and_indices")[0]["lines"] for w in (1, world))
    assert len(one) == 6
    for a, b in zip(one, many, strict=True):
        assert a["asking"] > 0
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_gathered_rows_carry_the_exact_gradient(results, world):
    for errors in returned(results, world, "gathered_rows"):
        assert set(errors) == {"even", "uneven"}
        assert all(max(found["errors"]) < 1e-12 and found["labels"] for found in errors.values()), errors


CAUSES = {
    "LocalMean": "each process computes the loss of its own rows alone, with a statistic of the local batch",
    "GatheredWithoutGradient": "the value is right, and the gradient is not: rows of other ranks were gathered without",
    "Summed": "the value is 1/2 of what it should be",
    "SummedGradient": "the value is right, and the gradient is 2 times what it should be",
    "Relational": None,
    "Unstated": None,
}


def test_a_loss_that_differs_between_numbers_of_ranks_is_found_with_its_cause(results):
    ranks, (whole, *_) = returned(results, 2, "checked_losses"), returned(results, 1, "checked_losses")

    def measured(found):
        return Measured(found["value"], torch.tensor(found["gradient"], dtype=torch.float64))

    for loss, cause in CAUSES.items():
        alone = [measured(each) for each in whole[loss]["alone"]]
        verdict = judge(measured(whole[loss]), [measured(rank[loss]) for rank in ranks], alone)
        assert (verdict.cause or "").startswith(cause or ""), (loss, verdict)
        assert (verdict.cause is None) == (cause is None), (loss, verdict)
        assert verdict.compares == (loss not in ("SummedGradient",)), loss


@pytest.mark.parametrize("world", [2, 4])
def test_gradient_attention_with_batch_norm_is_the_same_on_any_number_of_ranks(results, world):
    """With a teacher that has a normalisation of its own; on 4 ranks there is one pass, on fewer there are two."""
    (alone, *_), (ours, *_) = (returned(results, w, "gradient_attention_with_batch_norm") for w in (1, world))
    for a, b in zip(alone["lines"], ours["lines"], strict=True):
        for key in ("loss", "at", "sp", "gradient_at"):
            assert math.isclose(a[key], b[key], rel_tol=1e-9), (a["step"], key, a[key], b[key])


@pytest.mark.parametrize("world", [2, 4])
def test_mistakes_in_the_arithmetic_would_be_noticed(results, world):
    """The check above, on trainers that each have one mistake: after two steps the losses are off by far more than its
    tolerance."""
    wanted = plain_loop("nothing", 32)[0]
    for mistake, lines in returned(results, world, "mutated_trainings")[0].items():
        if "divisor" in mistake and world == 4:
            continue  # one micro-step: no divisor
        assert abs(lines[2]["loss"] / wanted[2]["loss"] - 1) > 1e-5, mistake


TRAININGS = [
    "all_four_losses",
    "batch_norm_with_fixed_micro_batches",
    "averaged_weights_and_clipped_gradients",
    "adamw_and_bf16_and_worker_processes",
]


@pytest.mark.parametrize("case", TRAININGS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_hold_the_same_student_and_the_teacher_is_untouched(results, case, world):
    ranks = returned(results, world, case)
    assert len({rank["fingerprint"] for rank in ranks}) == 1
    assert all(rank["teacher_unchanged"] and not rank["teacher_trains"] for rank in ranks)
    assert ranks[0]["evaluation"]["samples"] == 449


@pytest.mark.parametrize("case", TRAININGS[:3])
@pytest.mark.parametrize("world", [2, 4])
def test_evaluation_in_training_is_the_same_on_any_number_of_ranks(results, case, world):
    one, many = (returned(results, w, case)[0]["evaluation"] for w in (1, world))
    assert one["agreement"]["cka"].keys() == {"layer1:block1", "layer2:block2", "layer3:block3"}
    assert many == as_measured(one)


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_ranks_and_names_it(results, world):
    messages = set(returned(results, world, "a_loss_that_is_not_finite_on_one_rank_ends_all_ranks"))
    assert len(messages) == 1
    assert f"the loss is not finite at step 3 (on rank {world - 1};" in messages.pop()


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_choose_the_precision_that_each_is_fast_in(results, world):
    ranks = returned(results, world, "ranks_whose_hardware_differs")
    assert all(rank == ranks[0] for rank in ranks)
    where = f"slow of rank {world - 1}" if world > 1 else "slow"
    reason = f"precision fp32: {where} has no bfloat16 units; a convolution takes 10.0 times as long as in float32"
    assert ranks[0]["one differs"] == ["fp32", "fp32", reason]
    assert ranks[0]["all alike"][:2] == ["bf16", "bf16"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_learning_rate_range_test_is_the_same_on_any_number_of_ranks(results, world):
    (one, *_), ranks = (returned(results, w, "a_learning_rate_range_test") for w in (1, world))
    assert all(repr(rank) == repr(ranks[0]) for rank in ranks)
    for name, wanted in one.items():
        ours = ranks[0][name]
        assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-6), name
        assert [ours[key] for key in ("rates", "diverged", "suggestion", "left")] == [
            wanted[key] for key in ("rates", "diverged", "suggestion", "left")
        ]
    assert [len(one["sound"]["losses"]), one["sound"]["diverged"], one["sound"]["left"]] == [12, False, False]
    assert one["diverged"]["diverged"]
    assert len(one["diverged"]["losses"]) < 30


@pytest.mark.parametrize("world", [2, 4])
def test_a_machine_with_another_recipe_or_teacher_ends_all_ranks_and_what_differs_is_named(results, world):
    ranks = returned(results, world, "ranks_with_other_recipes_or_teachers")
    assert all(rank == ranks[0] for rank in ranks)
    said = f"losses.sp.gamma: is 2000.0 on rank {world - 1}, where rank 0 has 3000.0; every rank needs the same recipe"
    assert ranks[0]["recipe"] == said
    assert ranks[0]["teacher"].startswith(f"teacher.weights: rank {world - 1} has loaded other weights (")


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_skips_a_step_ends_all_ranks_and_is_named(results, world):
    messages = set(returned(results, world, "a_rank_that_skips_a_step_ends_all_ranks"))
    assert len(messages) == 1
    assert (
        f"ranks are at different steps (rank 0 at 3, {'rank 1' if world == 2 else 'rank 1 at 3, rank 2 at 3, rank 3'} "
        "at 4)" in messages.pop()
    )


@pytest.mark.parametrize("world", WORLDS)
def test_with_dropout_the_second_forward_of_a_step_repeats_the_first_bit_for_bit(results, world):
    one, many = (returned(results, w, "second_forwards_repeat_the_first")[0] for w in (1, world))
    # On 4 ranks a step is one micro-step: one forward, nothing to compare.
    assert many["differences"] == [0.0 if world < 4 else None] * 3
    for a, b in zip(one["lines"], many["lines"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_streaming_from_three_files_goes_through_epochs_on_any_number_of_ranks(results, world):
    one, many = (returned(results, w, "streaming_from_three_files") for w in (1, world))
    assert [line["step"] for line in many[0]["lines"]] == list(range(1, 13))
    for a, b in zip(one[0]["lines"], many[0]["lines"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9)
    assert len({rank["fingerprint"] for rank in many}) == 1


@pytest.mark.parametrize("world", WORLDS)
def test_an_image_that_cannot_be_read_ends_all_ranks_with_its_name(results, world):
    ranks = returned(results, world, "an_unreadable_image_ends_all_ranks")
    assert all(rank == ranks[0] for rank in ranks)
    assert list(ranks[0]) == ["truncated", "of zero bytes", "no image"]
    for (how, message), index in zip(ranks[0].items(), (5, 21, 22), strict=True):
        assert re.match(
            rf"step \d+: rank \d: .*broken {how}.parquet: image {index} \(no name\) cannot be read: ", message
        )
        assert "data.on_error=skip" in message


@pytest.mark.parametrize("world", WORLDS)
def test_an_image_of_another_size_ends_all_ranks_and_its_rank_is_named(results, world):
    messages = set(returned(results, world, "an_image_of_another_size_ends_all_ranks"))
    assert len(messages) == 1
    assert re.match(
        r"step \d+: rank \d: images of 24×24 pixels, not 16×16; add a Resize or a crop", message := messages.pop()
    ), message


@pytest.mark.parametrize("world", [2, 4])
def test_features_of_another_shape_on_one_rank_end_all_ranks_and_it_is_named(results, world):
    """SP gathers rows of features: unlike shapes must not meet in a collective."""
    messages = set(returned(results, world, "features_of_another_shape_on_one_rank_end_all_ranks"))
    assert len(messages) == 1
    assert "features differ between ranks: rank 0 has " in (message := messages.pop())
    assert f", rank {world - 1} has " in message


@pytest.mark.parametrize("world", WORLDS)
def test_images_that_cannot_be_read_are_replaced_alike_on_any_number_of_ranks(results, world):
    one, many = (returned(results, w, "unreadable_images_are_replaced") for w in (1, world))
    assert [line.get("replaced_images") for line in many[0]["lines"]] == [
        line.get("replaced_images") for line in one[0]["lines"]
    ]
    assert sum(line.get("replaced_images", 0) for line in many[0]["lines"]) == 6  # three in each of two epochs
    for a, b in zip(one[0]["lines"], many[0]["lines"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9)
    for rank in many:
        assert rank["evaluation"] == as_measured(one[0]["evaluation"])
    assert many[0]["evaluation"]["samples"] == 93


@pytest.mark.parametrize("world", WORLDS)
def test_an_image_that_cannot_be_read_ends_an_evaluation_on_all_ranks(results, world):
    messages = set(returned(results, world, "an_unreadable_image_ends_an_evaluation_on_all_ranks"))
    assert len(messages) == 1
    assert "evaluation after step 1: " in (message := messages.pop())
    assert "one broken.parquet: image 5 (no name) cannot be read: " in message


def test_groups_within_process_groups_that_are_not_the_default_one(tmp_path):
    """Two halves of a job of eight, each a batch of its own with `scope=2`: both make their groups at the same time."""
    with Launch([sys.executable, SCRIPTS / "eight_ranks.py", tmp_path], tmp_path / "log") as ranks:
        ranks.wait(limit(120))
    found = [(tmp_path / f"rank{rank}").read_text() for rank in range(8)]
    for rank, text in enumerate(found):
        assert re.fullmatch(r"\d\.\de[-+]\d+", text), f"rank {rank}: {text}"
        assert float(text) < 1e-12
