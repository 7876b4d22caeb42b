"""What `Launch.read` makes of the environment and of the engine's file, and what each engine can do."""

import json
import os
import sys
from dataclasses import FrozenInstanceError

import engines
import pytest
from launched import ROOT, run

from dkd.engines.rules import rules_of
from dkd.launch import (
    Launch,
    LaunchError,
    Start,
    local_world_size,
    named_rank,
    report_to_launcher,
    speaks_for_machine,
)

RANKS = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
FSDP2, ZERO = engines.FSDP2, {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher and no batch system but those that a test names; paths as for a launch in the repository."""
    for name in list(os.environ):
        if name in RANKS or name.startswith(("ACCELERATE_", "FSDP_", "SLURM_", "TORCHELASTIC_", "DKD_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def environment(monkeypatch):
    """Set variables of this process."""
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_process_without_a_launcher_is_alone():
    launch = Launch.read()
    assert launch == Launch()
    assert (launch.engine, launch.world_size, launch.is_main, launch.has_several_machines) == ("single", 1, True, False)
    assert (launch.address, launch.named_address) == (None, "no address")


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_launch_files_of_each_engine_are_read(environment, engine):
    environment(**RANKS, **engines.environment(engine))
    launch = Launch.read()
    assert launch.engine == engine
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size) == (3, 1, 4, 2)
    assert (launch.is_main, launch.has_launcher, launch.has_several_machines) == (False, True, True)
    assert (launch.address, launch.named_address) == (("node1", 29500), "node1:29500")
    if engine.startswith("zero"):
        assert launch.deepspeed == json.loads((ROOT / "launch" / "deepspeed" / f"{engine}.json").read_text())
    else:
        assert launch.deepspeed is None


def test_the_engine_is_not_needed_to_know_the_ranks(environment):
    environment(**RANKS, **ZERO, ACCELERATE_DEEPSPEED_CONFIG_FILE="no/such/file.json")
    launch = Launch.read_ranks()
    assert (launch.engine, launch.rank, launch.world_size, launch.address) == ("single", 3, 4, ("node1", 29500))


def test_one_process_of_a_launcher_is_single(environment):
    environment(**{**RANKS, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert Launch.read().engine == "single"


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"])
def test_ranks_meet_nowhere_when_a_variable_is_missing(environment, missing):
    environment(**{name: value for name, value in RANKS.items() if name != missing})
    assert Launch.read_ranks().address is None


def test_all_other_variables_are_read(environment):
    environment(
        LOCAL_RANK="0",
        ACCELERATE_USE_CPU="True",
        TORCHELASTIC_RUN_ID="none",
        TORCHELASTIC_MAX_RESTARTS="3",
        DKD_STOP_EXIT_CODE="9",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
        ACCELERATE_MIXED_PRECISION="bf16",
        ACCELERATE_DYNAMO_BACKEND="INDUCTOR",
    )
    launch = Launch.read()
    assert (launch.asks_for_cpu, launch.is_elastic, launch.restarts_ranks, launch.stop_exit_code) == (
        True,
        True,
        True,
        9,
    )
    assert (launch.accumulation_steps, launch.mixed_precision, launch.dynamo_backend) == ("4", "bf16", "inductor")
    environment(TORCHELASTIC_MAX_RESTARTS="0", ACCELERATE_USE_CPU="0")
    launch = Launch.read()
    assert (launch.restarts_ranks, launch.asks_for_cpu) == (False, False)


ALONE = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_one_process_in_place_of_several_is_refused(environment):
    """What Accelerate sets there: tests/distributed/test_launch_files.py."""
    environment(**ALONE)
    assert Launch.read().engine == "single"
    environment(**ADDRESS)
    with pytest.raises(LaunchError, match=r"was asked for several processes and has started one.* dkd launch -n N REC"):
        Launch.read()
    environment(LOCAL_RANK="0")
    assert Launch.read().has_launcher


def test_an_address_that_was_there_before_accelerate_is_the_users_own():
    code = "from dkd.launch import Launch; print(Launch.read().engine)"
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]  # stays the parent, as Accelerate does
    assert run(shell, **ALONE, **ADDRESS).stdout == "single\n"
    other = run(
        ["env", *shell[:2], f"export MASTER_ADDR=10.0.0.1; {shell[2]}", *shell[3:]], check=False, **ALONE, **ADDRESS
    )
    assert "was asked for several processes" in other.stderr


def test_dkds_own_deepspeed_file_is_read_where_the_launch_files_path_leads_nowhere(environment, tmp_path, monkeypatch):
    environment(**RANKS, **engines.environment("zero2"))
    assert Launch.read().notes == ()
    monkeypatch.chdir(tmp_path)
    launch = Launch.read()
    own = ROOT / "launch" / "deepspeed" / "zero2.json"
    assert launch.deepspeed == json.loads(own.read_text())
    (note,) = launch.notes
    assert str(own) in note
    changed = tmp_path / "launch" / "deepspeed" / "zero2.json"
    changed.parent.mkdir(parents=True)
    changed.write_text('{"zero_optimization": {"stage": 1}}')
    assert (Launch.read().engine, Launch.read().notes) == ("zero1", ())


def test_torchs_launcher_prints_the_reason_as_the_root_cause(environment, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    report_to_launcher("without a launcher, this does nothing")
    environment(TORCHELASTIC_ERROR_FILE=str(file))
    report_to_launcher("dkd: a: wrong\ndkd: b: wrong, too")
    failures = {rank: ProcessFailure(rank, 1000, 2, str(file)) for rank in (0, 1)}
    shown = str(ChildFailedError("dkd", failures)).splitlines()
    assert shown[-3:-1] == ["  traceback : dkd: a: wrong", "  dkd: b: wrong, too"]
    environment(TORCHELASTIC_ERROR_FILE=str(tmp_path / "no" / "such" / "folder" / "error.json"))
    report_to_launcher("what cannot be written ends nothing")


def test_a_launch_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Launch().rank = 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_CPU": "true"}, "`accelerate launch --cpu` starts one process, whatever --num_processes"),
        (
            FSDP2,
            "the launch asks for fsdp2, but started one process without a launcher; launch with: dkd launch -n N "
            "--engine fsdp2 RECIPE, or accelerate launch --config_file launch/accelerate/fsdp2.yaml",
        ),
        (engines.environment("zero2"), "asks for zero2, but started one process without a launcher"),
        ({**RANKS, **FSDP2, "FSDP_VERSION": "1"}, "the launch asks for FSDP version 1; only version 2 is supported"),
        ({**RANKS, "ACCELERATE_USE_FSDP": "1"}, "the launch asks for FSDP version 1; only version 2 is supported"),
        (
            {**RANKS, **FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "True"},
            "sets FSDP_ACTIVATION_CHECKPOINTING=True: BatchNorm would see every batch twice",
        ),
        (
            {**RANKS, **FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "1"},
            "sets FSDP_CPU_RAM_EFFICIENT_LOADING=1: Accelerate cannot do that with BatchNorm's buffers",
        ),
        ({**RANKS, **FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "sets FSDP_OFFLOAD_PARAMS=true: not supported"),
        (
            {**RANKS, **FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
            "sets FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP: not supported; TRANSFORMER_BASED_WRAP finds the blocks",
        ),
        ({**RANKS, **ZERO}, "the launch asks for DeepSpeed without a DeepSpeed file"),
        (
            {**RANKS, **ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"},
            "the launch's DeepSpeed file 'no/such.json' cannot be read: ",
        ),
    ],
)
def test_a_launch_that_cannot_train_is_refused(environment, variables, said):
    environment(**variables)
    with pytest.raises(LaunchError) as error:
        Launch.read()
    (problem,) = error.value.problems
    assert said in problem
    assert str(error.value) == problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read: "),
        ("[1]", "holds no JSON object"),
        ("{}", "ZeRO stage 0; take stage 1, 2 or 3"),
        ('{"zero_optimization": {}}', "ZeRO stage 0; take stage 1, 2 or 3"),
        ('{"zero_optimization": []}', "ZeRO stage 0; take stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 4}}', "ZeRO stage 4; take stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "3"}}', "ZeRO stage '3'; take stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "ZeRO stage True; take stage 1, 2 or 3"),
        ('{"zero_optimization": {"stage": null}}', "ZeRO stage None; take stage 1, 2 or 3"),
    ],
)
def test_wrong_deepspeed_files_are_refused(environment, tmp_path, text, said):
    (tmp_path / "deepspeed.json").write_text(text)
    environment(**RANKS, **ZERO, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "deepspeed.json"))
    with pytest.raises(LaunchError) as error:
        Launch.read()
    assert said in str(error.value)


def test_all_wrong_variables_are_reported_together(environment):
    wrong = {"WORLD_SIZE": "two", "RANK": "5", "LOCAL_RANK": "2", "ACCELERATE_USE_FSDP": "maybe"}
    environment(**{**RANKS, **wrong})
    for read in (Launch.read, Launch.read_ranks):
        with pytest.raises(LaunchError) as error:
            read()
        assert error.value.problems == [
            "the environment variable WORLD_SIZE must be a whole number from 1, not 'two'",
            "the environment variable LOCAL_RANK must be less than LOCAL_WORLD_SIZE=2, not 2",
            "the environment variable ACCELERATE_USE_FSDP must be true or false, not 'maybe'",
        ]
    assert Launch.read_rendezvous() == Launch()
    environment(WORLD_SIZE="6")
    assert Launch.read_rendezvous() == Launch()  # LOCAL_RANK is still wrong
    environment(LOCAL_RANK="1")
    # What is wrong is no matter of the rendezvous, where it is reported to the other ranks.
    launch = Launch.read_rendezvous()
    assert (launch.rank, launch.world_size, launch.named_address) == (5, 6, "node1:29500")


def test_questions_that_are_asked_without_a_launch(environment):
    assert (speaks_for_machine(), named_rank(), local_world_size()) == (True, "0", None)
    environment(LOCAL_RANK="1", RANK="3", LOCAL_WORLD_SIZE="2")
    assert (speaks_for_machine(), named_rank(), local_world_size()) == (False, "3", 2)
    environment(LOCAL_RANK="x", RANK="x", LOCAL_WORLD_SIZE="x")
    assert (speaks_for_machine(), named_rank(), local_world_size()) == (True, "x", None)


def test_a_start_is_read_from_launcher_and_batch_system(environment):
    environment(DKD_LAUNCH_ID="a", SLURM_JOB_ID="70", SLURM_CLUSTER_NAME="c", SLURM_RESTART_COUNT="2")
    assert Launch.read().start == Start((), "a", "c 70", 2)
    environment(SLURM_ARRAY_JOB_ID="69", SLURM_ARRAY_TASK_ID="1", SLURM_RESTART_COUNT="many")
    assert Launch.read().start == Start((), "a", "c 69_1", 0)
    environment(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_ERROR_FILE="/tmp/logs/none_x/attempt_1/0/error.json")
    assert Launch.read().start.launchers == (f"{os.uname().nodename} /tmp/logs/none_x",)
    environment(TORCHELASTIC_ERROR_FILE="")  # a launcher that writes no such file is known by its process
    (launcher,) = Launch.read().start.launchers
    assert f" process {os.getppid()} " in launcher


FIRST = Start(("one", "two"), "id", "c 70", 1)


@pytest.mark.parametrize(
    ("start", "belongs"),
    [
        (Start(("two", "three")), True),
        (Start(("three",)), False),
        (Start(launch_id="id"), True),
        (Start(launch_id="other"), False),
        (Start(slurm_job="c 70", slurm_start=2), True),
        (Start(slurm_job="c 70", slurm_start=1), False),  # a person may launch twice in an interactive job
        (Start(slurm_job="c 71", slurm_start=2), False),
        (Start(), False),
    ],
)
def test_which_starts_belong_to_one_launch(start, belongs):
    assert start.belongs_to(FIRST) == belongs


def test_starts_without_a_name_do_not_belong_together():
    assert not Start().belongs_to(Start())


@pytest.mark.parametrize(
    ("engine", "shards_weights", "shards_training", "uses_deepspeed"),
    [
        ("single", False, False, False),
        ("ddp", False, False, False),
        ("fsdp2", True, True, False),
        ("zero1", False, True, True),
        ("zero2", False, True, True),
        ("zero3", True, True, True),
    ],
)
def test_what_each_engine_can_do(engine, shards_weights, shards_training, uses_deepspeed):
    rules = rules_of(Launch(engine=engine))
    assert rules.name == engine
    assert (rules.shards_weights, rules.shards_training, rules.uses_deepspeed) == (
        shards_weights,
        shards_training,
        uses_deepspeed,
    )
    # What needs the whole student on each rank: fp16's loss scaling, a compiled student, a second derivative.
    assert {rules.scales_losses, rules.compiles_student, rules.differentiates_twice} == {not shards_training}
    assert rules.trains_in_float64 == (not uses_deepspeed)
    assert rules.syncs_batch_norm == (engine == "ddp")
    for name in rules.launch_file.replace("(or ddp.yaml)", "").split():
        assert (ROOT / name).is_file()
