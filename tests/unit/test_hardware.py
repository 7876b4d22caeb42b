"""What `auto` means on each kind of hardware, that a run keeps it, and that all ranks choose alike. The hardware is
pretended."""

import json

import pytest
import torch
import yaml

from dkd.cli import main
from dkd.config import recipe_changes
from dkd.config.loading import load_recipe, validate
from dkd.engines.arithmetic import Arithmetic, set_arithmetic
from dkd.launch import Launch
from dkd.preflight import hardware
from dkd.preflight.hardware import Hardware, choose, probe, settled

VALUES = {
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits"},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_2", "weights": "random"},
    "losses": {"kd": {"alpha": 0.9}},
    "train": {"global_batch": 64, "epochs": 1},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "constant"},
}


def recipe(**sections):
    """The recipe above, with further keys in some of its sections."""
    return validate({key: {**VALUES.get(key, {}), **sections.get(key, {})} for key in {**VALUES, **sections}})


def clock(float32, bfloat16):
    """A convolution that takes so many milliseconds."""
    calls = []

    def measure(dtype, last):
        calls.append(dtype)
        return bfloat16 if dtype == torch.bfloat16 else float32

    measure.calls = calls
    return measure


X86 = {"architecture": "x86_64", "cpu_name": "a CPU"}
AVX512_BF16, AMX = {**X86, "avx512_bf16": True}, {**X86, "avx512_bf16": True, "amx_bf16": True}
AVX2, ARM = {**X86, "avx512_bf16": False, "amx_bf16": False}, {"architecture": "aarch64", "cpu_name": "an Arm"}
CPUS = {
    "amx": (AMX, clock(5, 1.5), "bf16"),
    "avx512_bf16": (AVX512_BF16, clock(5, 2.5), "bf16"),
    "avx512_bf16 on a busy machine": (AVX512_BF16, clock(5, 15), "bf16"),
    "avx512_bf16 that the library does not use": (AVX512_BF16, clock(5, 60), "fp32"),
    "avx2": (AVX2, clock(5, 60), "fp32"),
    "avx2 on a busy machine": (AVX2, clock(60, 50), "fp32"),
    "arm with units": (ARM, clock(5, 3), "bf16"),
    "arm without": (ARM, clock(5, 20), "fp32"),
    "an older torch, which lists no instructions, with units": ({}, clock(5, 3), "bf16"),
    "an older torch without": ({}, clock(5, 60), "fp32"),
}
GPU, OLD_GPU = Hardware("cuda", "H100", bf16=True), Hardware("cuda", "T4", bf16=False)
FAST, SLOW = Hardware("cpu", "Xeon", True, 2.0), Hardware("cpu", "laptop", False, 0.1)


@pytest.mark.parametrize("kind", CPUS)
def test_a_cpu_computes_in_bfloat16_only_where_it_has_units_for_it(kind):
    capabilities, measure, wanted = CPUS[kind]
    found = probe("cpu", measure, capabilities)
    assert choose([found]).precision == wanted


def test_apples_gpu_is_not_used_and_the_reason_is_reported(monkeypatch):
    (line,) = hardware.unused_gpu("cpu", apple_gpu=True)
    assert line == "the CPU is used: Apple's GPU (MPS) has no float64, in which evaluation and logs are summed"
    assert hardware.unused_gpu("cpu", apple_gpu=True, asks_for_cpu=True) == []
    assert hardware.unused_gpu("cpu", apple_gpu=False) == []
    assert hardware.unused_gpu("cuda", apple_gpu=False) == []
    fp32 = recipe(train={"precision": "fp32"})
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "device_type", lambda asks_for_cpu: "cpu")
    assert line in hardware.settle(fp32, Launch())[1]
    assert line in hardware.settled_here(fp32, Launch(), resumes=False)[1]


def test_an_emulation_is_not_waited_for_again_and_again():
    probe("cpu", measure := clock(5, 60), AVX2)
    assert measure.calls.count(torch.bfloat16) == 2  # once in each memory format


def test_a_slow_first_moment_does_not_decide_where_there_are_units():
    milliseconds = {torch.float32: iter([5.0] * 99), torch.bfloat16: iter([900.0] * 4 + [3.0] * 99)}
    found = probe("cpu", lambda dtype, last: next(milliseconds[dtype]), AVX512_BF16)
    assert choose([found]).precision == "bf16"


def test_the_memory_format_is_no_matter_of_the_clock():
    """A busy machine would choose otherwise now and then, and the same command be another training in its last bits."""
    for hardware_ in (FAST, SLOW, GPU, OLD_GPU):
        assert settled(recipe(), [hardware_])[0].train.channels_last is True
    assert settled(recipe(), [FAST], {"train.channels_last": False})[0].train.channels_last is False


def test_a_gpu_is_asked_for_units_and_not_for_an_emulation(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation)
    )
    assert not probe("cuda").bf16
    assert asked == [False]


@pytest.mark.parametrize(
    ("ranks", "fp16_works", "precision", "reason"),
    [
        ([GPU, GPU], True, "bf16", "H100 has bfloat16 units"),
        ([OLD_GPU], True, "fp16", "T4 has no bfloat16 units"),
        ([OLD_GPU], False, "fp32", "T4 has no bfloat16 units"),
        ([GPU, OLD_GPU], True, "fp16", "T4 of rank 1 has no bfloat16 units"),
        ([FAST, FAST], True, "bf16", "Xeon has bfloat16 units; a convolution is 2.0 times as fast as in float32"),
        (
            [FAST, FAST, SLOW],
            True,
            "fp32",
            "laptop of rank 2 has no bfloat16 units; a convolution takes 10.0 times as long as in float32",
        ),
    ],
)
def test_all_ranks_choose_what_the_slowest_of_them_is_fast_in(ranks, fp16_works, precision, reason):
    choice = choose(ranks, fp16_works)
    assert (choice.precision, choice.reason) == (precision, reason)


def test_nothing_is_left_to_the_hardware_and_the_reason_is_reported():
    (found, lines) = settled(recipe(), [FAST])
    assert (found.train.precision, found.train.channels_last, found.teacher.weights_dtype) == ("bf16", True, "bf16")
    assert lines == ["precision bf16: Xeon has bfloat16 units; a convolution is 2.0 times as fast as in float32"]
    found, _ = settled(recipe(), [SLOW])
    assert (found.train.precision, found.teacher.weights_dtype) == ("fp32", "fp32")
    found, _ = settled(recipe(teacher={"placement": "zero3"}), [GPU])
    assert found.teacher.weights_dtype == "fp32"
    found, _ = settled(recipe(losses={"gradient_at": {"beta": 1.0}}), [OLD_GPU])
    assert found.train.precision == "fp32"


def test_what_the_recipe_says_is_never_overruled():
    said = recipe(train={"precision": "fp32", "channels_last": False}, teacher={"weights_dtype": "fp32"})
    assert settled(said, [GPU], {"train.precision": "bf16", "train.channels_last": True}) == (said, [])
    assert not hardware.needs_probe(said)


def test_a_resumed_run_keeps_its_arithmetic_on_other_hardware():
    stored = {"train.precision": "bf16", "train.channels_last": True, "teacher.weights_dtype": "bf16"}
    found, (line,) = settled(recipe(), [SLOW], stored)
    assert (found.train.precision, found.teacher.weights_dtype) == ("bf16", "bf16")
    assert "as at the run's first start; this hardware alone would choose fp32 (laptop has no bfloat16 units" in line
    assert settled(recipe(), [GPU], {**stored, "train.precision": "fp32"})[0].train.precision == "fp32"
    # Not another recipe: `auto` is what the run was begun with.
    before = recipe(train={"precision": "bf16", "channels_last": True}, teacher={"weights_dtype": "bf16"})
    assert recipe_changes(before, recipe()) == []
    explicit = recipe(train={"precision": "fp32"})
    assert [change.path for change in recipe_changes(before, explicit)] == ["train.precision"]


def test_bf16_on_a_cpu_that_emulates_it_is_warned_of_with_the_factor():
    (line,) = settled(recipe(train={"precision": "bf16"}), [FAST, SLOW])[1]
    assert line.startswith(
        "warning: train.precision is bf16, which laptop (rank 1) emulates: a convolution takes 10.0 times as long"
    )
    assert settled(recipe(train={"precision": "bf16"}), [FAST])[1] == []


def test_float32_is_ieee_on_gpus_and_tf32_has_a_name_of_its_own():
    for precision, allowed in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        set_arithmetic(recipe(train={"precision": precision}))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    found = Arithmetic.of(recipe(train={"precision": "tf32"}))
    assert (found.dtype, found.autocast) == (torch.float32, None)


def test_deterministic_asks_torch_for_bits(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        with inductor.patch("deterministic", False):  # monkeypatch would leave this module without the setting
            set_arithmetic(recipe(run={"deterministic": True}))
            assert torch.are_deterministic_algorithms_enabled()
            assert inductor.deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def train(tmp_path, *overrides):
    small = [
        "teacher=null",
        "losses={}",
        "run.trackers=[]",
        "train.global_batch=512",
        "data.image_size=8",
        "train.max_steps=1",
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return main(["train", str(path), f"run.dir={tmp_path / 'run'}", *small, *overrides])


def test_a_run_stores_the_choice_and_a_resume_on_other_hardware_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "probe", lambda device: SLOW)
    assert train(tmp_path) == 0
    assert "precision fp32: laptop has no bfloat16 units" in capsys.readouterr().err
    stored = load_recipe(tmp_path / "run" / "recipe.yaml").train
    assert (stored.precision, stored.channels_last) == ("fp32", True)

    monkeypatch.setattr(hardware, "probe", lambda device: FAST)
    assert train(tmp_path, "train.max_steps=2", "--allow-recipe-change") == 0
    assert (
        "precision fp32, as at the run's first start; this hardware alone would choose bf16" in capsys.readouterr().err
    )
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.precision == "fp32"

    assert train(tmp_path, "--dry-run", f"run.dir={tmp_path / 'other'}") == 0
    assert "hardware    precision bf16: Xeon has bfloat16 units" in capsys.readouterr().out
    assert train(tmp_path, "--overwrite") == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.precision == "bf16"
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 449


def test_a_run_in_fp16_is_not_resumed_on_cpus(tmp_path, capsys):
    assert train(tmp_path, "train.precision=fp32") == 0
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("precision: fp32", "precision: fp16"))
    assert train(tmp_path) == 2
    assert "train.precision: fp16 needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_needs_a_gpu_is_refused_without_one(precision, tmp_path, capsys):
    assert train(tmp_path, f"train.precision={precision}") == 2
    assert f"train.precision: {precision} needs a GPU" in capsys.readouterr().err
