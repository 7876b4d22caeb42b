"""The launch: how many processes it has, which one this is, and which engine it asks for.

`accelerate launch`, `torchrun`, Slurm and Kubernetes describe a launch in environment variables, and DeepSpeed's engine
in a JSON file. The command reads all of them once, into one frozen `Launch`: a file that moves or a variable that
changes while training runs cannot change the run. No other module of dkd reads the environment.

The launch states processes and engine, and nothing else. Where it also states batches, accumulation, clipping or
precision and disagrees with the recipe, `dkd.preflight.launch` refuses the run.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dkd import atomic_files, files
from dkd.errors import InputError

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
LAUNCH_FILES = "launch/accelerate/{cpu,ddp,fsdp2,zero1,zero2,zero3}.yaml (dkd files launch . copies them)"
_RIGHT_COMMANDS = (
    "launch with: dkd launch -n N RECIPE, or accelerate launch --config_file launch/accelerate/cpu.yaml "
    "--num_processes N -m dkd train RECIPE (or ddp.yaml, fsdp2.yaml, zero1.yaml, ...), or for one process: dkd train "
    "RECIPE"
)

# Variable: (smallest, largest or None) whole number that it may hold.
_NUMBERS: Mapping[str, tuple[int, int | None]] = {
    "WORLD_SIZE": (1, None),
    "RANK": (0, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "MASTER_PORT": (1, 65535),
    "TORCHELASTIC_MAX_RESTARTS": (0, None),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (1, None),
    "DKD_STOP_EXIT_CODE": (0, 255),
}
_SWITCHES = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_SWITCH_VALUES = ("true", "false", "1", "0")
_YES = ("true", "1")
_BOUNDS = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
_RENDEZVOUS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NO_FSDP = (
    ("FSDP_ACTIVATION_CHECKPOINTING", _YES, "BatchNorm would see every batch twice"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", _YES, "Accelerate cannot do that with BatchNorm's buffers"),
    ("FSDP_OFFLOAD_PARAMS", _YES, "not supported"),
    (
        "FSDP_AUTO_WRAP_POLICY",
        ("size_based_wrap",),
        "not supported; TRANSFORMER_BASED_WRAP finds the blocks of any model",
    ),
)


class LaunchError(InputError):
    """A launch that cannot train. `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class Start:
    """What identifies one start of a launch, so that a restart of the same launch can be recognised."""

    launchers: tuple[str, ...] = ()
    """Names of the launchers that restart ranks by themselves; none where there is no such launcher."""
    launch_id: str | None = None
    """DKD_LAUNCH_ID, which a batch system may set."""
    slurm_job: str | None = None
    """Cluster and number of the Slurm job."""
    slurm_start: int = 0
    """How often Slurm has requeued the job."""

    def belongs_to(self, noted: Start) -> bool:
        """Return whether this start is a restart of the launch that `noted` is a start of."""
        return (
            not set(self.launchers).isdisjoint(noted.launchers)
            or (self.launch_id is not None and self.launch_id == noted.launch_id)
            or (
                self.slurm_job is not None
                and self.slurm_job == noted.slurm_job
                and self.slurm_start > noted.slurm_start
            )
        )


@dataclass(frozen=True)
class Launch:
    """One process of a launch. `Launch()` is a process that no launcher has started."""

    rank: int = 0
    local_rank: int = 0
    """Number of this process among those of its machine."""
    world_size: int = 1
    local_world_size: int = 1
    """Number of processes on this machine."""
    engine: EngineName = "single"
    """What wraps the student."""
    deepspeed: Mapping[str, Any] | None = None
    """Content of the launch's DeepSpeed file; None for other engines."""
    asks_for_cpu: bool = False
    """Training takes place on CPUs even where there is a GPU."""
    has_launcher: bool = False
    """A launcher has started this process, and may send it signals."""
    address: tuple[str, int] | None = None
    """Host and port where the ranks find each other; None: this process is alone."""
    restarts_ranks: bool = False
    """The launcher may restart its ranks, and takes any exit code but 0 for a crash."""
    is_elastic: bool = False
    """The launcher is torch's, and the parent of this process."""
    stop_exit_code: int = 0
    """DKD_STOP_EXIT_CODE: exit code of a process that was asked to stop, and did."""
    accumulation_steps: str | None = None
    """Accelerate's gradient accumulation steps, as its configuration file states them; None: it does not."""
    mixed_precision: str = "no"
    """Accelerate's precision, as its configuration file states it."""
    dynamo_backend: str = "no"
    """Accelerate's compiler, as its configuration file states it."""
    start: Start = field(default_factory=Start)
    notes: tuple[str, ...] = ()
    """Lines for people about how the launch was read, the same on all ranks of a machine."""

    @classmethod
    def read(cls) -> Launch:
        """Read the environment of this process and the engine's file.

        Raises:
            LaunchError: a variable is wrong, the engine is not supported, needs a launcher and has none, or its file
                cannot be read.
        """
        engine, deepspeed, notes = _engine(cls.read_ranks())
        return cls._read(engine, deepspeed, notes)

    @classmethod
    def read_ranks(cls) -> Launch:
        """Read everything but the engine, which is `single`: for what ranks tell each other before the engine is known.

        Raises:
            LaunchError: a variable is wrong.
        """
        problems = _environment_problems()
        if problems:
            raise LaunchError(*problems)
        return cls._read("single", None)

    @classmethod
    def read_rendezvous(cls) -> Launch:
        """Read only what ranks need to find each other, for a rank that is to report that the rest is wrong. A process
        whose variables do not describe a rendezvous is alone."""
        problems = _environment_problems()
        if any(name in problem for problem in problems for name in _RENDEZVOUS) or not _meets():
            return cls()
        environment = _launchers_variables()
        return cls(
            rank=int(environment["RANK"]),
            local_rank=int(environment["LOCAL_RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            address=(environment["MASTER_ADDR"], int(environment["MASTER_PORT"])),
        )

    @classmethod
    def _read(cls, engine: EngineName, deepspeed: Mapping[str, Any] | None, notes: tuple[str, ...] = ()) -> Launch:
        given = _launchers_variables()
        numbers = {name: int(given[name]) for name in _NUMBERS if name in given}
        return cls(
            rank=numbers.get("RANK", 0),
            local_rank=numbers.get("LOCAL_RANK", 0),
            world_size=numbers.get("WORLD_SIZE", 1),
            local_world_size=numbers.get("LOCAL_WORLD_SIZE", 1),
            engine=engine,
            deepspeed=deepspeed,
            asks_for_cpu=_is_on("ACCELERATE_USE_CPU"),
            has_launcher="LOCAL_RANK" in os.environ,
            address=(os.environ["MASTER_ADDR"], numbers["MASTER_PORT"]) if _meets() else None,
            restarts_ranks=numbers.get("TORCHELASTIC_MAX_RESTARTS", 0) > 0,
            is_elastic="TORCHELASTIC_RUN_ID" in os.environ,
            stop_exit_code=numbers.get("DKD_STOP_EXIT_CODE", 0),
            accumulation_steps=os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
            mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            dynamo_backend=os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(),
            start=_start(),
            notes=notes,
        )

    @property
    def is_main(self) -> bool:
        """Return whether this is the main process, rank 0."""
        return self.rank == 0

    @property
    def has_several_machines(self) -> bool:
        """Return whether processes of this launch run on other machines."""
        return self.world_size != self.local_world_size

    @property
    def named_address(self) -> str:
        """`host:port` of the rendezvous, for messages."""
        return "no address" if self.address is None else f"{self.address[0]}:{self.address[1]}"


def speaks_for_machine() -> bool:
    """Return whether this process prints what is the same for all processes of its machine. Never raises: it is asked
    when the environment is wrong, too."""
    return _whole_number(_launchers_variables().get("LOCAL_RANK", "0")) in (0, None)


def named_rank() -> str:
    """Return the rank of this process, for a message that is printed where there may be no `Launch`."""
    return os.environ.get("RANK", "0")


def is_started_by_launcher() -> bool:
    """Return whether a launcher has started this process. Never raises: it is asked before the environment is read."""
    return "LOCAL_RANK" in os.environ


def report_to_launcher(reason: str) -> None:
    """Leave the reason why this process ends with another code than 0 where torch's launcher looks for it: the launcher
    prints it as the root cause, at the end of its own lines. Without such a launcher, or where the file cannot be
    written, it does nothing."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    # The form that torch's own `record` writes, without a traceback: then the launcher prints the message alone. A
    # plain text in its place makes torchrun warn about it.
    content = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
    # At once or not at all: the launcher may end this process at any moment, and fails on half of a file.
    with suppress(OSError, ValueError):
        atomic_files.replace_text(Path(file), json.dumps(content))


def share_cores(threads: int) -> None:
    """Let each rank that this process starts compute with so many threads, unless the user has chosen otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def local_world_size() -> int | None:
    """Return the number of processes on this machine, or None where no launcher has set it to a number: for the losses
    in a training loop of the user's own, which has no `Launch`."""
    found = _whole_number(os.environ.get("LOCAL_WORLD_SIZE", ""))
    return found or None


def ask_for_repeatable_gpu_sums() -> None:
    """Ask CUDA's matrix library for the same bits each time, unless the user has chosen otherwise: it reads a
    variable."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_variable(name: str, value: str, older_names: Sequence[str] = ()) -> None:
    """Set a variable that a library reads, unless the user has set it, under that name or an older one."""
    if not any(older in os.environ for older in older_names):
        os.environ.setdefault(name, value)


def shares_gpus() -> bool:
    """Return whether the user has asked NCCL to let several ranks use one GPU, as tests on a machine with one GPU
    do."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def nccl_host() -> str:
    """Return what NCCL takes for this machine's name: ranks of one GPU whose machines differ are two GPUs to it."""
    return os.environ.get("NCCL_HOSTID") or platform.node()


def number_by_device(index: int) -> None:
    """Tell Accelerate and DeepSpeed the number of this process's GPU: they take LOCAL_RANK for it, which is another
    number where a launcher shows each process its own GPU alone. dkd itself keeps the launcher's number."""
    if "LOCAL_RANK" in os.environ:
        _given.setdefault("LOCAL_RANK", os.environ["LOCAL_RANK"])
        os.environ["LOCAL_RANK"] = str(index)


_given: dict[str, str] = {}


def _launchers_variables() -> Mapping[str, str]:
    """Return the environment as the launcher has made it."""
    return {**os.environ, **_given}


def keep_deepspeed_on_cpu() -> None:
    """Keep DeepSpeed from looking for a GPU, and from warning that there is none: it reads a variable."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _meets() -> bool:
    """Return whether a launcher has set all variables by which ranks find each other."""
    return all(name in os.environ for name in _RENDEZVOUS)


def _environment_problems() -> list[str]:
    """Return a sentence for each variable whose value is wrong. Variables that are not set are not wrong."""
    found = []
    numbers: dict[str, int] = {}
    for name, (smallest, largest) in _NUMBERS.items():
        if name not in os.environ:
            continue
        number = _whole_number(os.environ[name])
        if number is None or number < smallest or (largest is not None and number > largest):
            bounds = f"from {smallest} to {largest}" if largest is not None else f"from {smallest}"
            found.append(
                f"the environment variable {name} must be a whole number {bounds}, not {os.environ[name][:80]!r}"
            )
        else:
            numbers[name] = number
    for rank, size in _BOUNDS:
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            found.append(
                f"the environment variable {rank} must be less than {size}={numbers[size]}, not {numbers[rank]}"
            )
    for name in _SWITCHES:
        value = os.environ.get(name, "false")
        if value.lower() not in _SWITCH_VALUES:
            found.append(f"the environment variable {name} must be true or false, not {value[:80]!r}")
    return found


def _whole_number(text: str) -> int | None:
    text = text.strip()
    # At most 18 digits: int() itself refuses thousands of them.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in _YES


def _engine(ranks: Launch) -> tuple[EngineName, Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the engine that the launch asks for, its DeepSpeed file, and what to report of that file. Raises
    LaunchError."""
    _refuse_one_process_in_place_of_several(ranks)
    deepspeed: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    name: str
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        deepspeed, notes = _deepspeed_file()
        zero = deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        name = f"zero{stage}" if isinstance(stage, int) else ""  # '3' would not be 3 to `filled_settings`
        if name not in get_args(EngineName):
            raise LaunchError(
                f"the launch asks for DeepSpeed with ZeRO stage {stage!r}; take stage 1, 2 or 3: {LAUNCH_FILES}"
            )
    elif _is_on("ACCELERATE_USE_FSDP"):
        _check_fsdp()
        name = "fsdp2"
    else:
        return ("ddp" if ranks.has_launcher and ranks.world_size > 1 else "single"), None, ()
    if not ranks.has_launcher:
        raise LaunchError(
            f"the launch asks for {name}, but started one process without a launcher; launch with: dkd launch -n N "
            f"--engine {name} RECIPE, or accelerate launch --config_file launch/accelerate/{name}.yaml --num_processes "
            "N -m dkd train RECIPE"
        )
    return name, deepspeed, notes  # type: ignore[return-value]


def _refuse_one_process_in_place_of_several(ranks: Launch) -> None:
    """Raise LaunchError where `accelerate launch` has started one process, and several were asked for."""
    if ranks.has_launcher:
        return
    if ranks.asks_for_cpu:
        raise LaunchError(
            f"`accelerate launch --cpu` starts one process, whatever --num_processes and the engine are; "
            f"{_RIGHT_COMMANDS}"
        )
    if _accelerate_dropped_processes():
        raise LaunchError(
            "`accelerate launch` was asked for several processes and has started one, as it does without a "
            f"--config_file on a machine with less than two GPUs; {_RIGHT_COMMANDS}"
        )


_PROCESSES = ("--num_processes", "--num-processes")


def _accelerate_dropped_processes() -> bool:
    """Return whether Accelerate has started this process alone although it was asked for several processes.

    Its launcher of one process (`prepare_simple_launcher_cmd_env`, read in 1.15) sets ACCELERATE_USE_CPU, which its
    other launchers do not, and the address of a rendezvous only where it was asked for more than one process or
    machine. An address that was there before is the user's own; where the system does not show the environment of
    Accelerate's process, it counts as Accelerate's.
    """
    names = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR")
    if not all(name in os.environ for name in names):
        return False
    content, _ = atomic_files.read_bytes(Path(f"/proc/{os.getppid()}/environ"))
    before = content.split(b"\0")
    address = ("MASTER_ADDR", "MASTER_PORT")
    if not all(f"{name}={os.environ.get(name, '')}".encode() in before for name in address):
        return True
    # The user's own address may be Accelerate's default: then only its command line tells.
    content, _ = atomic_files.read_bytes(Path(f"/proc/{os.getppid()}/cmdline"))
    words = content.decode(errors="replace").split("\0")
    asked = [words[place + 1] for place, word in enumerate(words[:-1]) if word in _PROCESSES]
    asked += [word.partition("=")[2] for word in words if word.startswith(tuple(f"{name}=" for name in _PROCESSES))]
    return any((_whole_number(number) or 0) > 1 for number in asked)


def _check_fsdp() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise LaunchError(
            f"the launch asks for FSDP version {version}; only version 2 is supported: launch/accelerate/fsdp2.yaml"
        )
    for variable, wrong, reason in _NO_FSDP:
        if os.environ.get(variable, "").lower() in wrong:
            value = os.environ[variable]
            raise LaunchError(f"the launch sets {variable}={value}: {reason}; see launch/accelerate/fsdp2.yaml")


def _deepspeed_file() -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the content of the launch's DeepSpeed file, and what to report of its place. Raises LaunchError: there is
    none (Accelerate's flags in its place would be half of one), or it is no JSON object."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        raise LaunchError(
            f"the launch asks for DeepSpeed without a DeepSpeed file; launch with one of {LAUNCH_FILES}, or with: "
            "dkd launch -n N --engine zero2 RECIPE"
        )
    found = Path(path)
    notes: tuple[str, ...] = ()
    own = files.folder("launch").parent / path
    # The launch files name theirs relative to the folder that holds launch/, and may be used from any other folder.
    if not found.exists() and found.parts[:2] == ("launch", "deepspeed") and own.is_file():
        found = own
        notes = (f"the launch's DeepSpeed file {path!r} is not in this folder; dkd's own is read: {str(own)!r}",)
    try:
        settings = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"the launch's DeepSpeed file {path!r} cannot be read: {error}; paths are relative to the folder of the "
            "launch"
        ) from error
    if not isinstance(settings, dict):
        raise LaunchError(f"the launch's DeepSpeed file {path!r} holds no JSON object")
    return settings, notes


def _start() -> Start:
    job = os.environ.get("SLURM_JOB_ID")
    if os.environ.get("SLURM_ARRAY_JOB_ID"):  # the number of a task may stand for the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Start(
        launchers=_launchers(),
        launch_id=os.environ.get("DKD_LAUNCH_ID") or None,
        slurm_job=f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {job}" if job else None,
        slurm_start=int(restarts) if restarts.isdecimal() else 0,
    )


def _launchers() -> tuple[str, ...]:
    """Return the name of the torch launcher that this process is a rank of."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ()
    # LOG_DIR/RUN_ID_random/attempt_N/RANK/error.json: the launcher makes the second of these once, under a new name.
    folders = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return (f"{platform.node()} {folders[2] if len(folders) > 2 else _parent()}",)


def _parent() -> str:
    """Return the process that has started this one, by its number and the time at which it began: numbers are
    reused."""
    content, reason = atomic_files.read_bytes(Path(f"/proc/{os.getppid()}/stat"))
    began = content.rpartition(b")")[2].split()[19:20] if reason is None else []
    return f"process {os.getppid()} {b''.join(began).decode()}"
