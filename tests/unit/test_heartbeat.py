"""What the heartbeats of a launch show of a rank that is lost."""

import pytest

from dkd.distributed.heartbeat import RankStatus, compare


def statuses(**places):
    """rank0=(count, place, what, end)"""
    return {
        int(rank[4:]): RankStatus(count, "node", place, what, end) for rank, (count, place, what, end) in places.items()
    }


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        # Rank 1 hangs: it has a heartbeat, and is at an earlier place.
        (
            statuses(rank0=(5, (2,), "backward", ""), rank1=(5, (1,), "forward", "")),
            statuses(rank0=(8, (2,), "backward", "gave up waiting"), rank1=(8, (1,), "forward", "")),
            ["rank 1 on node: forward"],
        ),
        # Rank 1 is gone; the place that it had reached shows nothing.
        (
            statuses(rank0=(5, (2,), "backward", ""), rank1=(5, (2,), "backward", "")),
            statuses(rank0=(8, (2,), "backward", ""), rank1=(5, (2,), "backward", "")),
            ["rank 1 on node: no heartbeat, last seen at backward"],
        ),
        # Rank 1 ended by itself; rank 2 waits, as this one does.
        (
            statuses(
                rank0=(5, (2,), "x", ""), rank1=(5, (2,), "x", "ValueError: 3"), rank2=(5, (2,), "x", "gave up waiting")
            ),
            statuses(
                rank0=(8, (2,), "x", ""), rank1=(5, (2,), "x", "ValueError: 3"), rank2=(5, (2,), "x", "gave up waiting")
            ),
            ["rank 1 on node: ended at x: ValueError: 3"],
        ),
        (statuses(rank0=(5, (2,), "x", "")), statuses(rank0=(6, (2,), "x", "")), ["rank 1: has not joined"]),
    ],
)
def test_two_readings_of_all_statuses_show_which_ranks_are_lost(before, now, shown):
    assert compare(before, now, 0, max(len(now), 2)) == shown


def test_where_all_ranks_are_at_one_place_that_is_reported():
    here = statuses(rank0=(5, (2,), "x", ""), rank1=(6, (2,), "x", ""))
    later = statuses(rank0=(6, (2,), "x", ""), rank1=(8, (2,), "x", ""))
    assert compare(here, later, 0, 2) == ["all other ranks had reached the same place"]


def test_at_most_eight_ranks_are_named():
    assert compare({}, {}, 0, 12)[7:] == ["rank 8: has not joined", "and 3 more"]
