"""Every file of launch/, by the command that docs/guides/engines.md gives; and launches that are not what was
asked for."""

import json
import os
import sys

import pytest
from launched import ROOT, accelerate_command, run
from reference_material import FOLDER

from dkd.cli import main
from dkd.launch import Launch, LaunchError

FILES = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
RECIPE = "configs/examples/cifar10_wrn16-2_wrn16-1.yaml"


HERE = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29500"]
ONE_OF_EACH = ("cpu", "zero2")  # started for real by `make test`; all of them by `make test-all`


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_launch_file_gives_its_ranks_the_environment_of_its_engine(file, monkeypatch):
    """What `accelerate launch` would tell its ranks; test_engines.py trains under just that environment, for each
    engine."""
    import torch.distributed.run as torchrun
    from accelerate.commands import launch as command
    from engines import environment

    told = {}
    monkeypatch.setattr(torchrun, "run", lambda arguments: told.update(os.environ, processes=arguments.nproc_per_node))
    monkeypatch.chdir(ROOT)
    words = [
        "--config_file",
        str(file.relative_to(ROOT)),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "dkd",
        "train",
        "x",
    ]
    command.launch_command(command.launch_command_parser().parse_args(words))
    assert told.pop("processes") == "2"
    engine = {"cpu": "ddp"}.get(file.stem, file.stem)
    for variable, value in environment(engine).items():
        assert told.get(variable) == value, variable
    for variable, value in {**told, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, str(value))
    assert Launch.read().engine == engine


@pytest.mark.parametrize("engine", ["cpu", "zero2"])
def test_dkd_launch_gives_its_ranks_the_same_environment_in_any_folder(engine, tmp_path, monkeypatch):
    import torch.distributed.run as torchrun
    from engines import environment

    from dkd.engines import starting

    told = {}
    monkeypatch.setattr(torchrun, "run", lambda arguments: told.update(os.environ, arguments=arguments))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    assert starting.run_ranks(["train", "x", "--dry-run"], 2, engine, max_restarts=1) == 0
    arguments = told.pop("arguments")
    assert (arguments.nproc_per_node, arguments.max_restarts, arguments.standalone) == ("2", 1, True)
    assert [arguments.training_script, *arguments.training_script_args] == ["dkd", "train", "x", "--dry-run"]
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "launch" / "deepspeed" / f"{engine}.json")}
    wanted = environment({"cpu": "ddp"}.get(engine, engine))
    for variable, value in {**wanted, **(file if wanted else {}), "OMP_NUM_THREADS": "3"}.items():
        assert told.get(variable) == value, variable
    # cpu.yaml: `use_cpu` alone does not reach the ranks.
    assert (told.get("CUDA_VISIBLE_DEVICES") == "-1,-1") == (engine == "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CIFAR-10's first training images and 20 of its test images; the digits where CIFAR-10 is not at hand."""
    cifar10 = FOLDER / "data" / "cifar10"
    if not cifar10.exists():
        return ["data.train=digits", "data.validation=digits", "data.transforms=digits"]
    import pyarrow.parquet as parquet

    few = tmp_path_factory.mktemp("data") / "test.parquet"
    parquet.write_table(parquet.read_table(next(cifar10.glob("test-*.parquet"))).slice(0, 20), few)
    return [f"data.train={cifar10}/train-00000-*.parquet", f"data.validation={few}"]


@pytest.fixture(scope="module")
def losses():
    """What the first launch file has logged."""
    return []


@pytest.mark.parametrize(
    "file",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in ONE_OF_EACH else pytest.mark.slow) for path in FILES],
)
def test_a_launch_file_starts_the_engine_of_its_name(file, data, losses, tmp_path):
    """2 processes, 3 steps. The same training under each, in float32: sums in another order."""
    command = accelerate_command(
        2,
        "-m",
        "dkd",
        "train",
        RECIPE,
        *data,
        f"run.dir={tmp_path / 'run'}",
        "run.trackers=[]",
        "train.global_batch=16",
        "train.micro_batch=4",
        "train.max_steps=3",
        "train.precision=fp32",
        "teacher.weights=random",
        "optimizer.lr=0.01",
        file=file.relative_to(ROOT),
    )
    result = run(command)
    engine = {"cpu": "ddp"}.get(file.stem, file.stem)
    assert f"2 processes of {engine} on cpu" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "step" in line]
    losses[:] = losses or logged
    assert logged == pytest.approx(losses, rel=1e-4)
    assert len(logged) == 3


def test_accelerate_launch_with_cpu_is_refused_by_the_right_command(tmp_path):
    """It would start one process, whatever --num_processes states."""
    words = ["--cpu", "--num_processes", 2, "-m", "dkd", "train", "configs/quickstart.yaml", "teacher.weights=random"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, f"run.dir={tmp_path / 'run'}"]
    result = run(command, check=False)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("dkd: ")]
    assert "accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes N -m dkd train RECIPE" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["--num_processes", "1"]])
def test_accelerate_launch_of_one_process_trains(words, monkeypatch):
    assert not refused_after(words, monkeypatch)


@pytest.mark.parametrize("words", [["--num_processes", "2"], ["--num_machines", "2", *HERE]])
def test_accelerate_launch_that_starts_one_process_in_place_of_several_is_refused(words, monkeypatch):
    """As it does on CPUs, and on one GPU, without a configuration file."""
    assert refused_after(words, monkeypatch)


def refused_after(words, monkeypatch):
    """Return whether a process is refused that Accelerate's launcher of one process starts after these options."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    arguments = launch_command_parser().parse_args([*words, "-m", "dkd", "train", "x"])
    arguments.num_machines = arguments.num_machines or 1  # what `accelerate launch` fills in
    arguments.use_cpu, arguments.mixed_precision, arguments.dynamo_backend = False, "no", "no"
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        return Launch.read().world_size != 1
    except LaunchError as error:
        return "was asked for several processes and has started one" in str(error)


def test_deepspeeds_buffers_fit_the_student():
    """Left alone, DeepSpeed would take 2 GB of each GPU for gradients that travel, and not overlap them with the
    backward."""
    from dkd.config import load_recipe
    from dkd.engines.deepspeed import filled_settings

    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml")

    def zero(parameters, on_gpu, **settings):
        launch = Launch(engine="zero2", deepspeed={"zero_optimization": {"stage": 2, **settings}})
        found = filled_settings(recipe, launch, parameters, on_gpu)["zero_optimization"]
        return found.get("reduce_bucket_size"), found.get("overlap_comm")

    assert zero(78_042, True) == (78_042, True)
    assert zero(78_042, False, reduce_bucket_size="auto") == (78_042, False)
    assert zero(7_000_000_000, True) == (500_000_000, True)
    assert zero(78_042, True, reduce_bucket_size=1000, overlap_comm=False) == (1000, False)
    assert zero(None, True) == (None, None)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LOCAL_RANK": "0"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "deepspeed", "overrides", "message"),
    [
        ({"ACCELERATE_USE_CPU": "true"}, None, [], "`accelerate launch --cpu` starts one process"),
        (
            {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0"},
            None,
            [],
            "FSDP version 1; only version 2 is supported: launch/accelerate/fsdp2.yaml",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            None,
            [],
            "asks for fsdp2, but started one process without a launcher",
        ),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, None, [], "BatchNorm would see every batch twice"),
        (
            {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            None,
            [],
            "Accelerate cannot do that with BatchNorm's buffers",
        ),
        ({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, None, [], "TRANSFORMER_BASED_WRAP finds the blocks"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, None, [], "train.compile: the launch asks for a dynamo_backend"),
        (DEEPSPEED, None, [], "DeepSpeed without a DeepSpeed file"),
        (DEEPSPEED, {"zero_optimization": {"stage": 0}}, [], "DeepSpeed with ZeRO stage 0; take stage 1, 2 or 3"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no.json"},
            None,
            [],
            "DeepSpeed file 'no.json' cannot be read",
        ),
        (DEEPSPEED, {"gradient_clipping": 5.0}, [], 'sets gradient_clipping = 5.0, the recipe 0.0; write "auto" there'),
        (
            DEEPSPEED,
            {"train_micro_batch_size_per_gpu": 3},
            [],
            "sets train_micro_batch_size_per_gpu = 3, the recipe 64",
        ),
        (DEEPSPEED, {"bf16": {"enabled": True}}, [], "turns on bf16; leave it out"),
        (DEEPSPEED, {"optimizer": {"type": "Adam"}}, [], "holds 'optimizer'; leave it out"),
        (DEEPSPEED, {}, ["train.precision=fp64"], "train.precision: DeepSpeed keeps its weights in float32"),
        (DEEPSPEED, {}, ["train.compile.student=true"], "train.compile.student: is not supported under zero2"),
        ({}, None, ["teacher.placement=zero3"], "teacher.placement: zero3 needs a student under DeepSpeed"),
        (
            {},
            None,
            ["teacher.placement=fsdp2", "train.compile.teacher=true"],
            "train.compile.teacher: is not supported with",
        ),
        ({}, None, ["teacher.mesh=node"], "teacher.mesh: belongs to teacher.placement=fsdp2"),
        (
            {},
            None,
            ["teacher.weights_dtype=bf16", "train.precision=fp32"],
            "teacher.weights_dtype: bf16 needs train.precision=bf16",
        ),
    ],
)
def test_what_a_launch_cannot_do_is_refused_before_it_starts(
    environment, deepspeed, overrides, message, tmp_path, monkeypatch, capsys
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if deepspeed is not None:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **deepspeed}))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    arguments = [
        f"run.dir={tmp_path / 'run'}",
        "teacher.weights=random",
        "train.global_batch=64",
        "train.micro_batch=64",
        *overrides,
    ]
    assert main(["train", str(ROOT / "configs" / "quickstart.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
