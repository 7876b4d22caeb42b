"""One step on a GPU: graphs, waits, images on the device, copies to the host. `make test-gpu`.

Without a GPU nothing is checked. `make rehearse-gpu` runs the same tests on CPUs, where they can run there.
"""

import numpy as np
import pytest
import torch
from graph_runs import VARIANTS, outcome, recipe, train
from one_gpu import REHEARSAL

from dkd.config.loading import validate
from dkd.data import DeviceImages, DeviceTrainLoader, GlobalBatchSampler, TrainLoader, build_pipeline, open_source
from dkd.distributed.async_mean import AsyncMean, StepValues
from dkd.engines.accelerated import forget_settings
from dkd.engines.host_buffer import HostBuffer
from dkd.models import TappedModel
from dkd.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REHEARSAL,
        reason="there is no GPU: nothing is checked; make rehearse-gpu runs it on CPUs",
    ),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hundred_replayed_steps_are_those_of_the_usual_way_interrupted_or_not(tmp_path, variant, capsys):
    """Bit for bit, with kernels that repeat their bits (`run.deterministic`)."""
    usual, graph, resumed = (tmp_path / name for name in ("usual", "graph", "resumed"))
    train(usual, False, variant, deterministic=True)
    train(graph, True, variant, deterministic=True)
    said = capsys.readouterr().err
    assert "differs" not in said, said
    assert ("CPUs have no CUDA graphs" in said) == (DEVICE.type == "cpu")
    assert outcome(graph) == outcome(usual)
    train(resumed, True, variant, steps=60, deterministic=True)
    train(resumed, True, variant, deterministic=True)
    assert outcome(resumed)[1] == outcome(usual)[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_on_a_stream_of_its_own_changes_no_bit(tmp_path, variant, capsys):
    """The kernels repeat their bits. A tensor of the teacher that is read too early, or whose memory is used again too
    early, shows here."""
    usual, beside = tmp_path / "usual", tmp_path / "beside"
    train(usual, False, variant, deterministic=True)
    train(beside, False, variant, "train.teacher_stream=true", deterministic=True)
    said = capsys.readouterr().err
    assert ("because cpu devices have no streams" in said) == (DEVICE.type == "cpu"), said
    assert outcome(beside) == outcome(usual)


def test_one_cast_of_all_weights_changes_no_bit(tmp_path, monkeypatch):
    variant = next(name for name in VARIANTS if "bf16" in name)
    train(tmp_path / "together", False, variant, deterministic=True)
    monkeypatch.setattr(TappedModel, "cast_together", lambda self, together=True: None)
    train(tmp_path / "one_by_one", False, variant, deterministic=True)
    assert outcome(tmp_path / "together") == outcome(tmp_path / "one_by_one")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_gpu(tmp_path, variant, graph):
    """torch raises an error where an operator lets the host wait."""
    forget_settings()
    trainer = Trainer.from_recipe(validate(recipe(tmp_path / "run", graph, variant)), if_run_exists="replace")
    try:
        trainer.load_images(40)
        for _ in range(25):  # the first 20 judge the teacher; a graph is captured after them
            trainer.after_step(trainer.train_step())
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(5):
            trainer.after_step(trainer.train_step())
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        trainer.close()


@pytest.mark.parametrize("preset", ["cifar", "digits"])
def test_images_on_the_gpu_are_those_of_the_loader(preset):
    source, pipeline = open_source("digits", training=True), build_pipeline(preset)
    order = GlobalBatchSampler(len(source), 3, 16, 16)
    loaders = (
        TrainLoader(source, pipeline.train, order),
        DeviceTrainLoader(DeviceImages(source, pipeline.train, DEVICE), order),
    )
    for theirs, ours in zip(*(each.steps(80, 90) for each in loaders), strict=True):
        assert ours.images.device.type == DEVICE.type
        assert torch.equal(ours.images.cpu(), theirs.images)
        assert torch.equal(ours.labels.cpu(), theirs.labels)


def test_numbers_of_a_step_come_home_as_they_were():
    """Also where their memory is written again before they are read."""
    numbers = torch.rand(3, device=DEVICE)
    wanted = numbers.double().tolist()
    mean = AsyncMean(5, StepValues({"a": numbers[0], "b": numbers[1]}, {"loss": numbers[2], "seconds": 0.1}))
    numbers.zero_()
    for found in (mean.read(), mean.local()):
        assert [*found.terms.values(), found.counts["loss"]] == wanted
        assert found.counts["seconds"] == 0.1
    assert mean.in_step()


def test_copies_for_a_checkpoint_are_the_tensors():
    generator = np.random.default_rng(0)
    live = {
        "weight": torch.from_numpy(generator.random((8, 3, 3, 3))).to(DEVICE, memory_format=torch.channels_last),
        "half": torch.rand(1000, device=DEVICE).bfloat16(),
        "count": torch.tensor(17, device=DEVICE),
    }
    copies = HostBuffer().copy(live)
    for name, tensor in live.items():
        assert copies[name].device.type == "cpu"
        assert torch.equal(copies[name], tensor.cpu())
        assert copies[name].stride() == tensor.stride()
