"""Copies of a GPU's tensors through one buffer: here of a CPU's, into ordinary memory."""

import pytest
import torch

from dkd.engines.host_buffer import HostBuffer, page_locked


def tensors():
    torch.manual_seed(0)
    return {
        "weight": torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last),
        "plain": torch.randn(5, 7),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(17),
        "nothing": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "transposed": torch.randn(4, 6, dtype=torch.float64).T,
        "with gaps": torch.randn(6, 6)[:, ::2],
        "repeated": torch.randn(1, 4).expand(3, 4),
        "trained": torch.nn.Parameter(torch.randn(2, 2)),
    }


def test_copies_have_the_same_numbers_shapes_types_and_layouts():
    taken = []

    def make(size):
        taken.append(torch.zeros(size, dtype=torch.uint8))
        return taken[-1]

    buffer, live = HostBuffer(make), tensors()
    copies = buffer.copy(live)
    assert list(copies) == list(live)
    for name, tensor in live.items():
        assert torch.equal(copies[name], tensor), name
        assert (copies[name].dtype, copies[name].shape) == (tensor.dtype, tensor.shape), name
        assert not copies[name].requires_grad
        if name not in ("with gaps", "repeated"):
            assert copies[name].stride() == tensor.stride(), name
    with torch.no_grad():
        wanted = live["plain"].clone()
        live["plain"].zero_()
    assert torch.equal(copies["plain"], wanted)  # a copy, and no view
    buffer.copy(live)
    assert len(taken) == 1  # the same memory
    buffer.copy({**live, "more": torch.zeros(1000)})
    assert len(taken) == 2


def test_ordinary_memory_stands_in_for_memory_that_cannot_be_locked(monkeypatch):
    ordinary = torch.empty

    def refuse(*args, pin_memory=False, **more):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return ordinary(*args, **more)

    monkeypatch.setattr(torch, "empty", refuse)
    assert page_locked(10).shape == (10,)
    with pytest.raises(RuntimeError):
        torch.empty(1, pin_memory=True)
