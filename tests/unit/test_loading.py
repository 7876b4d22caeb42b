"""Worker processes: the memory they share with their rank, and what happens when one hangs, is killed, or has no room
for a batch."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launched import limit, pause, run

from dkd.cli import main
from dkd.data import EvaluationLoader, GlobalBatchSampler, TrainLoader, open_source
from dkd.data.jpeg import jpeg_decoder
from dkd.data.samples import FilledSlot
from dkd.data.worker_memory import BatchSlots

ROOT = Path(__file__).resolve().parents[2]


class Numbered:
    """Images whose pixels are their index; at image `at`, `action` is done instead."""

    class_names = None

    def __init__(self, count, at=-1, action=None, size=8):
        self.labels, self.at, self.action, self.size = torch.arange(count).numpy(), at, action, size

    def __len__(self):
        return len(self.labels)

    def image(self, index):
        if index == self.at:
            self.action()
        return torch.full((3, self.size, self.size), index, dtype=torch.uint8)

    def neighbours(self, index):
        return range(len(self))


def as_it_is(image):
    return image


def in_order(source, batch, workers, **options):
    """The images of a source in batches, in their order: whose turn it is is known."""
    return EvaluationLoader(source, as_it_is, batch, workers=workers, image_size=8, **options)


def stop_this_process():
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_hangs_is_named_with_its_image_and_ended():
    # Two workers: the first has images 0 to 9, the second 10 to 19.
    batches = in_order(Numbered(20, at=12, action=stop_this_process), 5, 2, timeout=pause(3))
    loading = iter(batches)
    pids = [process.pid for process in multiprocessing.active_children()]
    assert next(loading).failure == ""
    begun = time.monotonic()
    failed = next(loading)
    assert "worker process 1 (pid " in failed.failure
    assert "at image 12, has read nothing for " in failed.failure
    assert failed.images.shape == (5, 3, 8, 8)
    assert failed.valid == 0
    # As many batches as the other ranks have, at once: they all end together.
    assert [batch.failure for batch in loading] == [failed.failure] * 2
    assert time.monotonic() - begun < limit(20)
    pid = int(failed.failure.split("(pid ")[1].split(")")[0])
    assert pid in pids
    end = time.monotonic() + limit(30)
    while alive(pid) and time.monotonic() < end:  # a stopped process obeys nothing but SIGKILL
        multiprocessing.active_children()
        time.sleep(0.1)
    assert not alive(pid)


def test_a_worker_that_is_killed_ends_all_ranks_together():
    batches = list(in_order(Numbered(20, at=3, action=kill_this_process), 5, 1))
    assert len(batches) == 4
    assert all("a worker process is lost: DataLoader worker (pid" in batch.failure for batch in batches)


def test_a_slow_worker_is_waited_for():
    """It takes longer for its batch than the limit, but no image does."""
    source = Numbered(6, at=-1)
    source.image = lambda index: time.sleep(pause(0.6)) or torch.full((3, 8, 8), index, dtype=torch.uint8)
    (batch,) = in_order(source, 6, 1, timeout=pause(3))
    assert batch.failure == ""
    assert batch.images[:, 0, 0, 0].tolist() == list(range(6))


def test_a_training_of_one_process_ends_when_its_loader_hangs(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        f"run: {{trackers: [], start_timeout: {pause(4)}, collective_timeout: {pause(4)}}}"
        """
data: {train: "python:few_images:hanging", validation: "python:few_images:hanging", classes: 10, transforms: digits,
  image_size: 8, workers: 1, in_memory: false}
student: {name: resnet8}
train: {global_batch: 8, epochs: 1, precision: fp32}
optimizer: {name: sgd, lr: 0.05}
schedule: {name: cosine}
"""
    )
    assert main(["train", str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    decoder = jpeg_decoder().name
    assert f"images are loaded by 1 worker process of each rank, JPEG files decoded by {decoder}" in said
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())[0]["jpeg_decoder"] == decoder
    assert "rank 0: worker process 0 (pid " in said
    assert "at image 20, has read nothing for " in said


NOT_BEGUN = """
import os, sys, time
sys.path.insert(0, "tests/unit")
from test_loading import Numbered, in_order
from dkd.data import loading
loading.START_SECONDS = float(sys.argv[1])
left = 1 if sys.argv[2] == "once" else 99
forked = 0

def hang():  # as in a lock that a thread of the rank held when the worker was forked
    if forked <= left:
        time.sleep(3600)

def count():
    global forked
    forked += 1

os.register_at_fork(before=count, after_in_child=hang)
for batch in in_order(Numbered(20), 5, 1, timeout=float(sys.argv[3])):
    print(batch.failure or batch.labels.tolist(), flush=True)
"""


@pytest.mark.parametrize(("hangs", "timeout"), [("once", 60), ("always", 5)])
def test_a_worker_that_is_stuck_before_it_begins_is_replaced(hangs, timeout):
    # And the process ends: nothing waits for the worker that hangs.
    result = run([sys.executable, "-c", NOT_BEGUN, pause(2), hangs, pause(timeout)], 120)
    lines = result.stdout.splitlines()
    assert "warning: a worker process has not begun to load after " in result.stderr
    if hangs == "once":
        assert lines == [str(list(range(start, start + 5))) for start in range(0, 20, 5)]
    else:
        assert len(lines) == 4
        assert all(line.startswith("worker process 0, which has not started, has read nothing for ") for line in lines)


class Cycle:
    """Garbage that only a collector finds; it notes which process collects it."""

    def __init__(self, notes):
        self.notes, self.itself = notes, self

    def __del__(self):
        with open(self.notes, "a") as file:
            file.write(f"{os.getpid()} ")


def test_workers_do_not_collect_the_garbage_of_their_rank(tmp_path):
    source = Numbered(8)
    source.image = lambda index: (gc.collect() and None) or torch.full((3, 8, 8), index, dtype=torch.uint8)
    gc.collect()
    gc.disable()  # so that the rank has not collected it when it forks
    try:
        Cycle(tmp_path / "notes")
        frozen = gc.get_freeze_count()
        assert [batch.failure for batch in in_order(source, 4, 2)] == ["", ""]
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "notes").read_text() == f"{os.getpid()} "


def test_a_slot_is_free_when_the_last_tensor_of_its_batch_is_gone():
    slots = BatchSlots(1, 2, 4, torch.Size((3, 8, 8)))
    slot = slots.take(0)
    images, labels = slots.tensors(slot, channels_last=True)
    images.fill_(7)
    labels.fill_(3)
    batch = FilledSlot(slots.number, slot, True, 4, ()).batch()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.images.unique().tolist(), batch.labels.tolist()) == ([7], [3] * 4)
    kept = batch.labels[1:]
    del batch
    assert slots.taken() == 1  # the labels lie in it, too
    assert kept.tolist() == [3] * 3
    del kept
    assert slots.taken() == 0
    assert [slots.take(0), slots.take(0), slots.take(0)] == [0, 1, None]


def test_page_locked_batches_are_copies_and_free_their_slots(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    slots = BatchSlots(1, 1, 2, torch.Size((3, 4, 4)))
    images, labels = slots.tensors(slots.take(0), channels_last=True)
    images.fill_(9)
    labels.fill_(1)
    batch = FilledSlot(slots.number, 0, True, 2, ("unreadable",)).pin_memory()
    assert slots.taken() == 0
    assert (batch.images.unique().tolist(), batch.labels.tolist(), batch.unreadable) == ([9], [1, 1], ("unreadable",))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_stay_what_they_are_while_they_are_held(workers):
    """More of them than there are slots."""
    batches = list(in_order(Numbered(60), 5, workers))
    assert all(batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist() for batch in batches)
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(60))


def test_the_memory_that_is_shared_is_known_beforehand():
    order = GlobalBatchSampler(1348, 0, 32, 16)
    transform = torch.nn.Identity()
    batches = TrainLoader(open_source("digits", training=True), transform, order, workers=2, image_size=8)
    # Two loaded ahead, and half of the three that a step of two micro-batches holds; images and labels.
    assert batches.shared_bytes == 2 * (2 + 2) * (16 * 3 * 8 * 8 + 16 * 8)
    assert TrainLoader(open_source("digits", training=True), transform, order, image_size=8).shared_bytes == 0


SMALL_SHARED_MEMORY = """
import sys
sys.path.insert(0, "tests/unit")
from test_loading import Numbered, as_it_is
from dkd.data import GlobalBatchSampler, TrainLoader
order = GlobalBatchSampler(240, 0, 20, 20)
batches = TrainLoader(Numbered(240, size=224), as_it_is, order, workers=2, image_size=224)
for batch in batches.steps(0, 12):
    assert not batch.failure, batch.failure
    assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()
print("passed")
for batch in list(batches.steps(0, 12)):
    if batch.failure:
        print(batch.failure)
        break
"""


def test_a_small_shared_memory_is_enough_and_an_error_where_it_is_not():
    """Batches of 3 MB and a /dev/shm of 2, as Docker's 64 MB are to many workers. What is held beyond the slots has to
    go there."""
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c"]
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    tried = subprocess.run([*command, mount], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this user may not mount a small file system: {tried.stderr.strip()}")
    inside = [*command, f'{mount} && exec "$@"', "bash"]
    result = run([*inside, sys.executable, "-c", SMALL_SHARED_MEMORY], 60)
    passed, failure = result.stdout.splitlines()
    assert passed == "passed"
    assert failure.startswith("a batch of 3.0 MB does not fit /dev/shm, which has ")
    assert (
        "of 2.1 MB free: make it larger (docker run --shm-size=8g, or --ipc=host), or take fewer data.workers"
        in failure
    )
