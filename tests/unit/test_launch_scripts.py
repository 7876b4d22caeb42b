"""What the launch scripts would run, word by word."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launched import limit

from dkd.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))
WORDS = ["configs/quickstart.yaml", "losses.at.pairs=[[layer1, block1]]", "data.train=a 'b' $c"]


def dry_run(script, *words, **variables):
    names = ("ENGINE", "PROCESSES", "MAX_RESTARTS", "DKD", "HEAD", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("SLURM")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", str(LAUNCH / script), "--dry-run", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=limit(30))
    assert result.returncode == 0, result.stdout + result.stderr
    return shlex.split(result.stdout.splitlines()[-1])


def test_on_one_machine():
    engine = str(LAUNCH / "accelerate" / "cpu.yaml")
    begin = [
        "accelerate",
        "launch",
        "--config_file",
        engine,
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "--max_restarts",
        "0",
    ]
    assert dry_run("local.sh", *WORDS) == [*begin, "-m", "dkd", "train", *WORDS]
    words = dry_run("local.sh", *WORDS, ENGINE="zero2", PROCESSES="8", MAX_RESTARTS="3")
    assert words[3:6] == [str(LAUNCH / "accelerate" / "zero2.yaml"), "--num_processes", "8"]
    assert words[9] == "3"


def test_by_torchrun():
    begin = ["torchrun", "--standalone", "--nproc_per_node", "gpu", "--max_restarts", "0", "-m", "dkd", "train"]
    assert dry_run("torchrun/one_machine.sh", *WORDS) == [*begin, *WORDS]
    words = dry_run("torchrun/machines.sh", *WORDS, HEAD="10.0.0.1", MACHINES="4", PROCESSES="8")
    begin = ["torchrun", "--nnodes", "4", "--nproc_per_node", "8", "--max_restarts", "3", "--rdzv_backend", "c10d"]
    assert words == [*begin, "--rdzv_endpoint", "10.0.0.1:29400", "--rdzv_id", "dkd", "-m", "dkd", "train", *WORDS]


def test_on_a_slurm_cluster():
    words = dry_run(
        "slurm/train.sbatch", *WORDS, PROCESSES_PER_NODE="4", SLURM_NNODES="3", SLURM_JOB_ID="77", ENGINE="fsdp2"
    )
    begin = [
        "accelerate",
        "launch",
        "--config_file",
        "launch/accelerate/fsdp2.yaml",
        "--num_machines",
        "3",
        "--machine_rank",
        "0",
    ]
    begin += [
        "--num_processes",
        "12",
        "--main_process_ip",
        "first-node",
        "--main_process_port",
        "15077",
        "--max_restarts",
        "0",
    ]
    assert words[: len(begin)] == begin
    assert words[-len(WORDS) - 3 :] == ["-m", "dkd", "train", *WORDS]


def test_seeds_and_lists_of_an_array(tmp_path):
    words = dry_run("slurm/array.sbatch", *WORDS, SLURM_ARRAY_TASK_ID="3")
    assert words[-len(WORDS) - 3 :] == ["train", *WORDS, "run.seed=3", "run.dir=runs/quickstart/seed_3"]
    listed = tmp_path / "list"
    listed.write_text("""a.yaml optimizer.lr=0.1\nb.yaml 'losses.at.pairs=[[layer1, block1]]' run.dir=runs/b\n""")
    words = dry_run("slurm/array.sbatch", "--list", str(listed), SLURM_ARRAY_TASK_ID="2")
    assert words[-4:] == ["train", "b.yaml", "losses.at.pairs=[[layer1, block1]]", "run.dir=runs/b"]


@pytest.mark.parametrize("name", ["exp #1", "it's: [a] 'name'", "plain-1.5_x"])
def test_each_seed_has_a_run_of_its_own_whatever_the_recipes_name(tmp_path, name):
    """Values of overrides are YAML, in which " #" begins a comment."""
    recipe = tmp_path / f"{name}.yaml"
    shutil.copy(ROOT / "configs" / "quickstart_teacher.yaml", recipe)
    for seed in ("0", "12"):
        words = dry_run("slurm/array.sbatch", str(recipe), SLURM_ARRAY_TASK_ID=seed)
        loaded = load_recipe(recipe, words[words.index(str(recipe)) + 1 :])
        assert loaded.run.dir == f"runs/{name}/seed_{seed}"
        assert loaded.run.seed == int(seed)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "node.sh"], ids=lambda path: path.name)
def test_without_a_recipe_a_script_says_how_it_is_used(script):
    result = subprocess.run(["bash", script], capture_output=True, text=True, cwd=ROOT, timeout=limit(30))
    assert result.returncode == 2
    assert "--dry-run" in result.stdout


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed; make test-cluster installs Debian's"
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=limit(60))
    assert result.returncode == 0, result.stdout


def test_the_example_for_kubernetes_is_yaml_and_says_that_it_was_not_run():
    path = LAUNCH / "kubernetes" / "pytorchjob.yaml"
    assert yaml.safe_load(path.read_text())["kind"] == "PyTorchJob"
    assert "NOT been run" in path.read_text()
