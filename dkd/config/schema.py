"""The recipe's schema: every key, its type, default and meaning. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dkd.config.key_types import (
    LONGEST_NAME,
    Count,
    CountFromZero,
    Fraction,
    NonNegative,
    Number,
    Positive,
    Section,
    Switch,
    Text,
    allow,
    fits_file_system,
    is_one_line,
    one_line,
)
from dkd.config.losses import LossesSection


def _is_file_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and "/" not in value
        and "\\" not in value
        and is_one_line(value)
    )


_Seconds = Annotated[Number, Field(gt=0, le=10**7)]  # four months: a clock of the system counts to less than 1e10
_MOST_WORKERS = 1024
_Path = Annotated[
    str, AfterValidator(one_line), allow(fits_file_system, f"a path with names of at most {LONGEST_NAME} bytes")
]


def _at_most_workers(value: Any) -> Any:
    if isinstance(value, int) and value > _MOST_WORKERS:
        raise ValueError(f"must be at most {_MOST_WORKERS}, not {value}")
    return value


def _is_transform(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and len(value) == 1 and all(isinstance(k, str) for k in value)
    )


Workers = Annotated[
    int | Literal["auto"],
    AfterValidator(_at_most_workers),
    allow(
        lambda v: v == "auto" or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
        "auto or a whole number from 0",
    ),
]
AutoSwitch = Annotated[
    bool | Literal["auto"], allow(lambda v: v == "auto" or isinstance(v, bool), "auto, true or false")
]
PRESETS = ("imagenet", "cifar", "digits")
Transforms = Annotated[
    str | list[str | dict[str, Any]],
    allow(
        lambda v: (
            v in PRESETS if isinstance(v, str) else isinstance(v, list) and bool(v) and all(map(_is_transform, v))
        ),
        f"{', '.join(PRESETS)} or a list of transforms such as [RandomCrop: {{size: 32, padding: 4}}]",
    ),
]
_Name = Annotated[
    str, allow(fits_file_system, f"at most {LONGEST_NAME} bytes long"), allow(_is_file_name, "a name without slashes")
]


class RunSection(Section):
    name: _Name = "run"
    """Names the run in trackers; `run.dir` defaults to runs/NAME."""
    dir: _Path = ""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    trackers: list[Text] = ["tensorboard"]
    """Accelerate's trackers, by its names: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab,
    trackio."""
    start_timeout: _Seconds = 1800.0
    """Seconds that a rank waits for the others until the first step is done, while data are indexed, weights fetched
    and models compiled; later, for those that write a checkpoint."""
    collective_timeout: _Seconds = 300.0
    """Seconds that a rank waits for another from then on, before the run ends."""
    deterministic: Switch = False
    """GPUs: only algorithms that give the same bits each time, in torch, cuDNN, cuBLAS and the compiler; slower.
    Without it a GPU's sums may differ in their last bits from one start to the next. CPUs repeat their bits either
    way."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl and the trackers."""

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("dir"):
            return {**data, "dir": f"runs/{data.get('name', 'run')}"}
        return data


class Normalization(Section):
    """(image − mean) / std a channel, on values from 0 to 1."""

    mean: Annotated[list[Number], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]


class DataSection(Section):
    train: Text
    """Parquet or tar files or globs, `hub:NAME[:SPLIT]`, `disk:PATH`, `folder:PATH`, `torchvision:NAME`, or `digits`
    (embedded)."""
    validation: Text
    classes: Count
    transforms: Transforms
    """A preset, or a list of torchvision.transforms.v2 names, each with its arguments: [RandomCrop: {size: 32, padding:
    4}, ...]."""
    validation_transforms: Transforms | None = None
    """With a list of `transforms`: what validation images get."""
    image_size: Count | None = None
    """Side of the images that the models see, pixels; default: the preset's (imagenet 224, cifar 32, digits 32)."""
    normalization: Normalization | None = None
    """Default: the preset's."""
    mixup: NonNegative = 0.0
    """α of mixup, 0: off. Images are mixed within a micro-batch, after its transforms; the teacher sees the mixed
    images too."""
    cutmix: NonNegative = 0.0
    """α of CutMix, 0: off. With both, each micro-batch takes one of them, at equal odds."""
    image_column: Text | None = None
    label_column: Text | None = None
    root: Text = "data"
    """Where `torchvision:NAME` looks for its files."""
    workers: Workers = "auto"
    """Worker processes a rank. auto: 0 for images held in memory, else the rank's share of the machine's cores, up to
    16 (streaming: 8)."""
    streaming: Switch = False
    """Parquet (files or of the hub) is read where it lies, in the order of StreamedBatchSampler, instead of being
    copied and read at random."""
    stream_lanes: Count = 64
    """`streaming`: places in the data that are read at the same time, over all ranks."""
    shuffle_window: Count = 256
    """`streaming`: rows of each lane that are shuffled with each other."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read ends the run, on all ranks together; or another one stands in its place, and is
    counted."""
    in_memory: AutoSwitch = "auto"
    """Decode the training set once into memory, on each rank. auto: when all images have one size and fit 1 GiB and the
    rank's share of an eighth of this machine's memory."""


class StudentSection(Section):
    name: Text
    weights: Text | None = None
    norm: Literal["batch", "group", "none"] | None = None
    options: dict[str, Any] = {}
    """Further keyword arguments of the model."""


class TeacherSection(Section):
    name: Text
    weights: Text
    """A file, torchvision's name of a weight set, or `random` (said with a warning)."""
    placement: Literal["replicated", "fsdp2", "zero3"] = "replicated"
    """Whole on every rank; or in shards, by FSDP2 (with any engine of the student) or by ZeRO-3 (with a student under
    DeepSpeed)."""
    mesh: Literal["world", "node"] = "world"
    """fsdp2: the ranks that share one teacher."""
    weights_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: Linear, convolution and attention weights are kept in bfloat16, at half the memory. Needs train.precision:
    bf16, which rounds them for every forward anyway. auto: bf16 with that precision (but under ZeRO-3, which keeps
    float32), else fp32."""
    norm: Literal["batch", "group", "none"] | None = None
    options: dict[str, Any] = {}
    classes: Count | None = None
    """Outputs of the teacher's head; default data.classes. `losses.kd` needs them equal."""
    normalization: Normalization | None = None
    """Default: the student's."""
    input_size: Count | None = None
    """The teacher sees the images resized to this; default: as the student sees them."""


class CompileSection(Section):
    student: Switch = False
    teacher: Switch = False


class EmaSection(Section):
    decay: Annotated[Number, Field(gt=0, lt=1)]


class TrainSection(Section):
    global_batch: Count
    micro_batch: Count | None = None
    """Samples a rank forwards at once; default global_batch / world size."""
    epochs: Count
    max_steps: Count | None = None
    """Ends the run earlier."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = "auto"
    """bf16 and fp16 are autocast of student and teacher; weights and losses stay float32. auto: what the hardware of
    all ranks is fast in, chosen at the run's first start and kept by its resumes. fp32 is IEEE arithmetic on GPUs too;
    tf32 lets their convolutions and matrix products round to TF32. fp16 and tf32 need a GPU. fp64 is everything in
    float64: slow, for telling rounding from error."""
    channels_last: AutoSwitch = "auto"
    """The memory format of images and convolution weights. auto: true; a resumed run keeps what it was begun with."""
    sync_batch_norm: Switch = False
    """BatchNorm's batch is that of all ranks in a micro-step, not the micro-batch: dependent on the number of ranks.
    Needs DDP on GPUs."""
    clip_grad_norm: Positive | None = None
    skip_nonfinite: CountFromZero = 0
    """Updates in a row that are left out because the gradient is not finite, before the run ends. Above 0, each step
    waits for its gradient."""
    ema: EmaSection | None = None
    """Exponential moving average of the student; evaluated and exported in its place."""
    compile: CompileSection = CompileSection()


class EvaluationSection(Section):
    batch: Count = 256
    """Samples a rank forwards at once."""
    every_epochs: Count = 1


class SgdSection(Section):
    name: Literal["sgd"]
    lr: Positive
    momentum: Fraction = 0.9
    nesterov: Switch = False
    weight_decay: NonNegative = 0.0
    decay_norm_and_bias: Switch = True

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class AdamWSection(Section):
    name: Literal["adamw"]
    lr: Positive
    betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    decay_norm_and_bias: Switch = True


class _ScheduleSection(Section):
    warmup_epochs: NonNegative = 0.0


class ConstantSchedule(_ScheduleSection):
    name: Literal["constant"]


class StepSchedule(_ScheduleSection):
    name: Literal["step"]
    milestones: list[Positive]
    """Epochs at which the learning rate is multiplied by `factor`."""
    factor: Positive = 0.1


class CosineSchedule(_ScheduleSection):
    name: Literal["cosine"]
    final: Fraction = 0.0
    """The last learning rate, as a fraction of the first."""


class OneCycleSchedule(Section):
    name: Literal["one_cycle"]
    peak: Annotated[Number, Field(gt=0, lt=1)] = 0.3
    """The share of the run after which `optimizer.lr` is reached."""
    start: Positive = 0.04
    final: Fraction = 1e-4
    """First and last learning rate, as fractions of `optimizer.lr`."""


class CheckpointSection(Section):
    """When RUN/checkpoints/step_N is written, with all that training needs to go on from there. The last step always
    makes one."""

    every_epochs: Count | None = 1
    every_steps: Count | None = None
    every_minutes: Positive | None = None
    keep_last: Count = 2
    keep_best: CountFromZero = 0
    """Further ones that are kept: those with the highest top-1."""
    background: Switch = True
    """Training goes on while a copy of its state is written; false: it waits."""


class Recipe(Section):
    """One training: what is trained, on what, towards what, and how."""

    run: RunSection = RunSection()
    data: DataSection
    student: StudentSection
    teacher: TeacherSection | None = None
    losses: LossesSection = LossesSection()
    train: TrainSection
    evaluation: EvaluationSection = EvaluationSection()
    optimizer: Annotated[SgdSection | AdamWSection, Field(discriminator="name")]
    schedule: Annotated[
        ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule, Field(discriminator="name")
    ]
    checkpoint: CheckpointSection = CheckpointSection()
