"""Which strategy moves less between ranks, and which ranks share a Gram matrix."""

import pytest

from dkd.global_batch import GramScope, GramTensor, cheapest_strategies, ranks_per_group
from dkd.global_batch.cost import collectives, received


def pair(width):
    return [GramTensor(width, backward=True), GramTensor(width, backward=False)]


@pytest.mark.parametrize(
    ("rows", "width", "world", "strategy"),
    [
        (64, 25088, 64, "exchange"),  # ResNet-18's layer4 at 224 pixels, 64 ranks
        (32, 25088, 8, "exchange"),
        (512, 512, 64, "gather"),  # a Gram matrix of 32,768² is larger than its features
    ],
)
def test_auto_takes_what_moves_less(rows, width, world, strategy):
    assert cheapest_strategies(pair(width), rows, world) == (strategy, strategy)


def test_two_strategies_in_one_call_must_pay_for_their_collectives():
    """Wide and narrow features: each its own way where the bytes are many, one way for both where collectives cost more
    than bytes."""
    assert cheapest_strategies([*pair(25088), *pair(64)], 64, 64) == ("exchange", "exchange", "gather", "gather")
    assert len(set(cheapest_strategies([*pair(2048), *pair(16)], 8, 2))) == 1


def test_tensors_share_collectives():
    tensors = pair(100) + pair(50)
    assert collectives(("exchange",) * 4, tensors) == 4  # all-to-all and reduce-scatter, all-gather and all-to-all
    assert collectives(("gather",) * 4, tensors) == 2
    assert (
        collectives(("gather", "exchange") * 2, tensors) == 2 + 2
    )  # the student's by gather, the teacher's by exchange
    assert (
        collectives(("gather",) * 2, [GramTensor(8, True, 4), GramTensor(8, False, 2)]) == 3
    )  # float32 and bfloat16 apart


def test_elements_of_the_example_in_the_documentation():
    """b = 64, W = 64, d = 25,088 for student and teacher, without the factor (W−1)/W: 206 M by gather, 55 M by
    exchange."""
    for strategy, millions in (("gather", 206), ("exchange", 55)):
        both = sum(received(strategy, tensor, 64, 64).elements for tensor in pair(25088))
        assert round(both * 64 / 63 / 1e6) == millions


def test_scopes_are_groups_that_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks_per_group(scope, 8) for scope in ("global", "node", 2, "local")] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="groups of 3 ranks do not divide 8 ranks"):
        ranks_per_group(3, 8)
    with pytest.raises(ValueError, match="must be global, node, local or a number of ranks"):
        GramScope("rack")
