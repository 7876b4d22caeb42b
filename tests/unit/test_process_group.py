"""Which GPU a rank uses, how the process group is bound to it, and the variables that NCCL and torch's watch over it
read."""

import json
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launched import run

from dkd.config import RecipeError
from dkd.distributed import nccl_settings
from dkd.distributed.process_group import choose_device, device_of, name_gpu
from dkd.launch import Launch
from dkd.library_internals.torch import members_alone


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 1, 0), (0, 8, 0), (7, 8, 7), (3, 1, 0), (8, 8, None), (2, 2, None), (0, 0, None)],
)
def test_a_rank_uses_the_gpu_of_its_number_or_the_only_one_that_it_sees(local_rank, visible, index):
    assert device_of(local_rank, visible) == index


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_a_rank_without_a_gpu_is_refused_with_the_numbers(monkeypatch):
    gpus(monkeypatch, 2)
    assert choose_device(Launch(rank=1, local_rank=1, world_size=2, local_world_size=2)) == torch.device("cuda", 1)
    message = r"process 2 of this machine \(LOCAL_RANK\) sees 2 GPUs, numbered from 0: start one process for each GPU"
    with pytest.raises(RecipeError, match=message):
        choose_device(Launch(rank=2, local_rank=2, world_size=4, local_world_size=4))


def test_gpus_are_compared_unless_nccl_is_told_that_ranks_share_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    for name in ("NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    here = name_gpu(torch.device("cuda", 0))
    assert here.endswith(" GPU-1")
    monkeypatch.setenv("NCCL_HOSTID", "host7")
    assert name_gpu(torch.device("cuda", 0)) == "host7 GPU-1"
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert name_gpu(torch.device("cuda", 0)) is None


OPENED = """
import json, os, socket, sys
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from dkd.distributed.process_group import open_process_group
from dkd.launch import Launch, speaks_for_machine

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])
found = {}
torch.accelerator.current_accelerator = lambda: torch.device("cuda")
torch.accelerator.device_count = lambda: 1
torch.accelerator.set_device_index = lambda index: found.update(set=index)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="GPU-1")
dist.init_process_group = lambda backend, device_id, **more: found.update(backend=backend, device_id=str(device_id))
open_process_group(Launch.read_ranks(), sys.argv[1] == "cpu", 30, Path("runs/a"))
found["variables"] = {name: os.environ.get(name) for name in sys.argv[2:]}
found["launch"] = [Launch.read_ranks().local_rank, speaks_for_machine()]
print(json.dumps(found))
"""
NAMES = [*nccl_settings.settings(None), "TORCH_FR_DUMP_TEMP_FILE", "LOCAL_RANK"]


def opened(device, **variables):
    """Open the process group of a rank that sees one GPU, as number 3 of its machine; nothing of CUDA is called."""
    launch = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1"}
    result = run([sys.executable, "-c", OPENED, device, *NAMES], **launch, **variables)
    return json.loads(result.stdout.splitlines()[-1])


def test_the_process_group_is_bound_to_the_gpu_and_libraries_are_told_its_number():
    found = opened("cuda")
    assert (found["set"], found["backend"], found["device_id"]) == (0, "nccl", "cuda:0")
    # Accelerate and DeepSpeed take LOCAL_RANK for the number of the GPU; dkd keeps the number on the machine.
    assert found["variables"]["LOCAL_RANK"] == "0"
    assert found["launch"] == [3, False]


def test_nccl_and_its_flight_recorder_are_set_up_on_gpus_alone():
    found = opened("cuda")["variables"]
    path = found.pop("TORCH_FR_DUMP_TEMP_FILE")
    assert path.startswith("/")
    assert path.endswith("/runs/a/flight_recorder_rank_")
    assert {name: value for name, value in found.items() if name != "LOCAL_RANK"} == nccl_settings.settings(None)
    found = opened("cpu")
    assert {name for name, value in found["variables"].items() if value is not None} == {"LOCAL_RANK"}
    assert (found["backend"], found["device_id"], found["variables"]["LOCAL_RANK"]) == ("gloo", "None", "3")


@pytest.mark.parametrize("name", [*nccl_settings.settings(None), "TORCH_FR_DUMP_TEMP_FILE"])
def test_a_variable_of_the_user_stays_as_it_is(name):
    assert opened("cuda", **{name: "7"})["variables"][name] == "7"


@pytest.mark.parametrize(
    ("older", "name"),
    [
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
    ],
)
def test_an_older_name_of_a_variable_counts_too(older, name):
    assert opened("cuda", **{older: "0"})["variables"][name] is None


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_torch_knows_the_variables():
    """A name that a release drops would be set for nothing."""
    wanted = {name for name in NAMES if name.startswith("TORCH_")}
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_c*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            wanted -= {name for name in wanted if library.find(name.encode()) >= 0}
    assert not wanted


def test_a_group_of_some_ranks_is_made_by_its_members_alone():
    """A default group that is bound to a GPU would make torch wait for all ranks of the job."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = dist.group.WORLD
        with members_alone():
            assert whole.bound_device_id is None
        whole.bound_device_id = torch.device("cuda", 0)
        with members_alone():
            assert whole.bound_device_id is None
        assert whole.bound_device_id == torch.device("cuda", 0)
    finally:
        dist.destroy_process_group()
