import pytest

from dkd.global_batch import GramScope, cheaper_strategy, ranks_per_group, received_elements


@pytest.mark.parametrize(
    ("rows", "width", "world", "strategy"),
    [
        (64, 25088, 64, "exchange"),  # ResNet-18's layer4 at 224 pixels, 64 ranks
        (32, 25088, 8, "exchange"),
        (64, 2048, 4, "gather"),  # pooled features
        (512, 512, 64, "gather"),  # a Gram matrix of 32,768² is larger than its features
    ],
)
def test_auto_takes_what_moves_less(rows, width, world, strategy):
    assert cheaper_strategy(rows, width, world, backward=True) == strategy


def test_elements_of_the_example_in_the_documentation():
    """b = 64, W = 64, d = 25,088 for student and teacher, without the factor (W−1)/W: 206 M by gather, 55 M by exchange."""
    for strategy, millions in (("gather", 206), ("exchange", 55)):
        both = sum(received_elements(strategy, 64, 25088, 64, backward) for backward in (True, False))
        assert round(both * 64 / 63 / 1e6) == millions


def test_scopes_are_groups_that_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks_per_group(scope, 8) for scope in ("global", "node", 2, "local")] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match="groups of 3 ranks do not divide 8 ranks"):
        ranks_per_group(3, 8)
    with pytest.raises(ValueError, match="must be global, node, local or a number of ranks"):
        GramScope("rack")
