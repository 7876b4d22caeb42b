"""What of the machine a training takes: its cores for worker processes, its memory for images."""

import pytest
from few_images import write_images

from dkd.data import (
    open_source,
)


@pytest.mark.parametrize(
    ("cores", "ranks", "streaming", "workers"),
    [
        (2, 1, False, 2),
        (12, 1, False, 12),
        (96, 4, False, 16),
        (96, 8, False, 12),
        (3, 8, False, 1),
        (12, 1, True, 8),
        (24, 4, True, 4),
    ],
)
def test_workers_are_a_share_of_the_cores_that_may_be_used(monkeypatch, tmp_path, cores, ranks, streaming, workers):
    from dkd import machine
    from dkd.build.data import loader_workers
    from dkd.config.schema import DataSection
    from dkd.data import open_row_groups

    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(cores)))
    write_images(tmp_path / "a.parquet", 16)
    source = (open_row_groups if streaming else open_source)(str(tmp_path / "a.parquet"), training=True)
    data = DataSection(train="a.parquet", validation="a.parquet", classes=10, transforms="cifar")
    assert loader_workers(data, source, ranks) == workers
    assert loader_workers(data.model_copy(update={"workers": 5}), source, ranks) == 5
    assert loader_workers(data, open_source("digits", training=True), ranks) == 0


def test_what_a_cgroup_allows_counts(monkeypatch, tmp_path):
    from dkd import machine

    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)))
    assert machine.cores() == 64
    installed = machine.memory()
    (tmp_path / "own").write_text("5:memory:/job/step\n0::/job/step\n")
    for path, text in {
        "job/cpu.max": "1250000 100000",
        "job/step/cpu.max": "max 100000",
        "job/memory.max": str(2**30),
        "job/step/memory.max": "max",
        "memory/job/memory.limit_in_bytes": str(2**31),
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert machine.cores() == 12
    assert machine.memory() == 2**30
    (tmp_path / "own").write_text("5:memory,cpu:/job/step\n")
    assert machine.memory() == min(2**31, installed)


def test_images_are_kept_in_memory_where_all_ranks_have_room_for_them(monkeypatch):
    from dkd import machine
    from dkd.build.data import memory_for_images

    for memory, ranks, most in (
        (512 * 2**30, 8, 2**30),
        (16 * 2**30, 1, 2**30),
        (16 * 2**30, 8, 2**28),
        (4 * 2**30, 2, 2**28),
    ):
        monkeypatch.setattr(machine, "memory", lambda memory=memory: memory)
        assert memory_for_images(ranks) == most


def test_a_system_that_binds_no_process_to_cores_counts_all(monkeypatch, tmp_path):
    """As macOS."""
    from dkd import machine

    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "missing")
    assert machine.cores() == 6
