"""The recipe's schema: every key, its type, default and meaning. Unknown keys are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; here it is the number everybody means."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_number), BeforeValidator(_no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(strict=True, gt=0)]
CountFromZero = Annotated[int, Field(strict=True, ge=0)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]


def _allow(test: Callable[[Any], bool], allowed: str) -> BeforeValidator:
    """For keys of more than one type: one message, where a union would give one for each member."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(f"must be {allowed}, not {value!r}")
        return value

    return BeforeValidator(check)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and "\\" not in value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WeightSchedule(Section):
    """A loss weight that changes over the run, from `start` to `end`."""

    start: NonNegative
    end: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "step"] = "linear"
    milestones: list[Count] = []
    """`step` only: the epochs at which the weight is multiplied by `factor`; `end` is not used."""
    factor: Positive = 0.1

    @model_validator(mode="after")
    def _keys_fit_the_schedule(self) -> WeightSchedule:
        if self.schedule == "step" and (self.end != 0 or not self.milestones):
            raise ValueError("schedule: step needs milestones (and a factor), and no end")
        if self.schedule != "step" and (self.milestones or self.factor != 0.1):
            raise ValueError("milestones and factor belong to schedule: step")
        return self


# Tags in parentheses are left out of the paths in messages.
Weight = Annotated[
    Annotated[NonNegative, Tag("(number)")] | Annotated[WeightSchedule, Tag("(section)")],
    Discriminator(lambda value: "(section)" if isinstance(value, dict | WeightSchedule) else "(number)"),
]


def _is_transform(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and len(value) == 1 and all(isinstance(k, str) for k in value))


Workers = Annotated[
    int | Literal["auto"],
    _allow(lambda v: v == "auto" or (isinstance(v, int) and not isinstance(v, bool) and v >= 0), "auto or a whole number from 0"),
]
AutoSwitch = Annotated[bool | Literal["auto"], _allow(lambda v: v == "auto" or isinstance(v, bool), "auto, true or false")]
PRESETS = ("imagenet", "cifar", "digits")
Transforms = Annotated[
    str | list[str | dict[str, Any]],
    _allow(
        lambda v: v in PRESETS if isinstance(v, str) else isinstance(v, list) and bool(v) and all(map(_is_transform, v)),
        f"{', '.join(PRESETS)} or a list of transforms such as [RandomCrop: {{size: 32, padding: 4}}]",
    ),
]


class RunSection(Section):
    name: Annotated[str, _allow(_is_file_name, "a name without slashes")] = "run"
    """Names the run in trackers; `run.dir` defaults to runs/NAME."""
    dir: str = ""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    trackers: list[Text] = ["tensorboard"]
    """Accelerate's trackers, by its names: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio."""
    start_timeout: Positive = 1800.0
    """Seconds that a rank waits for the others until the first step is done, while data are indexed, weights fetched and models compiled;
    later, for those that write a checkpoint."""
    collective_timeout: Positive = 300.0
    """Seconds that a rank waits for another from then on, before the run ends."""
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
    """Parquet or tar files or globs, `hub:NAME[:SPLIT]`, `disk:PATH`, `folder:PATH`, `torchvision:NAME`, or `digits` (embedded)."""
    validation: Text
    classes: Count
    transforms: Transforms
    """A preset, or a list of torchvision.transforms.v2 names, each with its arguments: [RandomCrop: {size: 32, padding: 4}, ...]."""
    validation_transforms: Transforms | None = None
    """With a list of `transforms`: what validation images get."""
    image_size: Count | None = None
    """Side of the images that the models see, pixels; default: the preset's (imagenet 224, cifar 32, digits 32)."""
    normalization: Normalization | None = None
    """Default: the preset's."""
    mixup: NonNegative = 0.0
    """α of mixup, 0: off. Images are mixed within a micro-batch, after its transforms; the teacher sees the mixed images too."""
    cutmix: NonNegative = 0.0
    """α of CutMix, 0: off. With both, each micro-batch takes one of them, at equal odds."""
    image_column: Text | None = None
    label_column: Text | None = None
    root: Text = "data"
    """Where `torchvision:NAME` looks for its files."""
    workers: Workers = "auto"
    """Worker processes a rank. auto: 0 for a data set held in memory, else up to 8."""
    streaming: Switch = False
    """Parquet (files or of the hub) is read where it lies, in the order of StreamedOrder, instead of being copied and read at random."""
    stream_lanes: Count = 64
    """`streaming`: places in the data that are read at the same time, over all ranks."""
    shuffle_window: Count = 256
    """`streaming`: rows of each lane that are shuffled with each other."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read ends the run, on all ranks together; or another one stands in its place, and is counted."""
    in_memory: AutoSwitch = "auto"
    """Decode the training set once into memory. auto: when it fits 1 GiB and all images have one size."""


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
    """Whole on every rank; or in shards, by FSDP2 (with any engine of the student) or by ZeRO-3 (with a student under DeepSpeed)."""
    mesh: Literal["world", "node"] = "world"
    """fsdp2: the ranks that share one teacher."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: Linear, convolution and attention weights are kept in bfloat16, at half the memory. Needs train.precision: bf16, which rounds
    them for every forward anyway."""
    norm: Literal["batch", "group", "none"] | None = None
    options: dict[str, Any] = {}
    classes: Count | None = None
    """Outputs of the teacher's head; default data.classes. `losses.kd` needs them equal."""
    normalization: Normalization | None = None
    """Default: the student's."""
    input_size: Count | None = None
    """The teacher sees the images resized to this; default: as the student sees them."""


Pair = list[Any]


class CrossEntropySection(Section):
    weight: Weight = 1.0
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class _PairsSection(Section):
    pairs: Annotated[list[Pair], Field(min_length=1)]
    """[student path, teacher path] or [student path, teacher path, weight], one a pair."""

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> _PairsSection:
        if (problem := _pair_problem(self.pairs)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        return [(pair[0], pair[1]) for pair in self.pairs]

    @property
    def pair_weights(self) -> list[float]:
        return [float(_number(pair[2])) if len(pair) == 3 else 1.0 for pair in self.pairs]


def _fill_from_preset(presets: dict[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """What is not written in the section is taken from its preset."""

    def fill(values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in presets:
            return values
        return {**presets[preset], **values}

    return fill


# How implementations differ. Every key can still be written beside the preset.
AT_PRESETS: dict[str, dict[str, Any]] = {
    "authors": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
    "paper": {"reduction": "paper", "norm": 2, "map": "sum_p", "p": 2, "resize": "map"},
    "repdistiller": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "features"},
    "torchdistill": {"beta": 1000, "reduction": "mean_squared", "map": "sum_p", "p": 2, "resize": "error"},
}
SP_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"gamma": 3000, "reference_batch": 128},
    "repdistiller": {"gamma": 3000, "reference_batch": 64},
}


class AttentionTransferSection(_PairsSection):
    preset: Literal["authors", "paper", "repdistiller", "torchdistill"] | None = None
    """Defaults of the other keys as an implementation has them; see docs/losses.md. paper has no beta."""
    beta: Weight
    map: Literal["sum", "sum_p", "max_p"] = "sum_p"
    p: Annotated[Number, Field(ge=1)] = 2.0
    reduction: Literal["mean_squared", "paper"] = "mean_squared"
    norm: Annotated[Number, Field(ge=1)] = 2.0
    resize: Literal["error", "map", "features"] = "error"
    class_tokens: CountFromZero | None = None
    """Features of tokens (N, C), as transformers have: how many at the front are left out; the others make a square grid. null: refused."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(AT_PRESETS))

    @model_validator(mode="after")
    def _keys_fit_the_map_and_reduction(self) -> AttentionTransferSection:
        if self.reduction != "paper" and self.norm != 2:
            raise ValueError("norm belongs to reduction: paper")
        if self.map == "sum" and self.p != 2:
            raise ValueError("map: sum takes no p; use sum_p")
        return self


class SimilarityPreservingSection(_PairsSection):
    preset: Literal["paper", "repdistiller"] | None = None
    """gamma and reference_batch as published, or as the public implementation has them."""
    gamma: Weight
    reference_batch: Count
    """The batch `gamma` was published with: 128 in the paper, 64 in RepDistiller and mdistiller."""
    scope: Annotated[
        str | int,
        _allow(
            lambda v: v in ("global", "node", "local") or (isinstance(v, int) and not isinstance(v, bool) and v > 0),
            "global, node, local or a number of ranks",
        ),
    ] = "global"
    """Whose rows make one Gram matrix: those of all ranks, of one machine, of n neighbouring ranks, or of each rank alone. All but global
    depend on the number of ranks, and local is another loss than the published one."""
    batch: Literal["step", "micro"] = "step"
    """Under accumulation: one Gram matrix of the whole global batch, by two forwards a step; or one of each micro-step, averaged, which
    depends on the number of ranks."""
    strategy: Literal["auto", "gather", "exchange"] = "auto"
    """How ranks bring the rows of the Gram matrix together; the numbers are the same. auto: what moves less."""
    comm_dtype: Literal["bf16"] | None = None
    """Features and their gradients are rounded to this type on their way between ranks; null: they travel in their own."""

    _from_preset = model_validator(mode="before")(_fill_from_preset(SP_PRESETS))


class SoftTargetsSection(Section):
    alpha: Weight
    temperature: Positive = 4.0


class GradientAttentionSection(Section):
    """Needs a whole teacher, DDP or one process, and no compiled model: it differentiates a gradient."""

    beta: Weight
    form: Literal["transfer", "symmetric"] = "transfer"
    """Against the teacher's gradient; or of the student alone against that of the mirrored image."""
    squared: Switch = False
    """½‖·‖² instead of ½‖·‖."""


def _pair_problem(pairs: list[Pair], weighted: bool = True) -> str | None:
    """What the first pair that is none looks like; None: all are pairs."""
    for i, pair in enumerate(pairs):
        paths_ok = len(pair) in (2, 3) and all(isinstance(p, str) and p for p in pair[:2])
        weight = _number(pair[2]) if len(pair) == 3 else 1.0
        weight_ok = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        if not (paths_ok and weight_ok and (weighted or len(pair) == 2)):
            more = " or [student path, teacher path, weight ≥ 0]" if weighted else ""
            return f"pair {i} is {pair!r}: must be [student path, teacher path]{more}"
    return None


class CustomLossSection(Section):
    """A loss of your own: a callable made of `loss` with `options`. See docs/add_a_loss.md."""

    name: Annotated[str, _allow(lambda v: _matches(r"[a-z][a-z0-9_]*", v), "a word of small letters, digits and _")]
    """What it is called in metrics.jsonl."""
    loss: Annotated[str, _allow(lambda v: _matches(r"[\w.]+:\w+", v), "module:attribute")]
    """module:attribute, a class or a function that returns the loss."""
    weight: Weight
    of: Literal["features", "logits", "labels"] = "features"
    """What it is called with: lists of tapped features of student and teacher, their logits, or the student's logits and the labels."""
    pairs: list[Pair] = []
    """of: features. [student path, teacher path], one a pair."""
    options: dict[str, Any] = {}
    """Keyword arguments that `loss` is made with."""

    @model_validator(mode="after")
    def _pairs_belong_to_features(self) -> CustomLossSection:
        if self.name in (*_OWN_TERMS, *_LOGGED):
            raise ValueError(f"name {self.name!r} is taken: it means something else in metrics.jsonl")
        if (self.of == "features") != bool(self.pairs):
            raise ValueError("of: features needs pairs" if self.of == "features" else f"of: {self.of} has no pairs")
        if (problem := _pair_problem(self.pairs, weighted=False)) is not None:
            raise ValueError(problem)
        return self

    @property
    def paths(self) -> list[tuple[str, str]]:
        return [(pair[0], pair[1]) for pair in self.pairs]


_OWN_TERMS = ("loss", "ce", "at", "gradient_at", "sp", "kd")
# Keys that a line of metrics.jsonl or a step's numbers have beside the terms.
_LOGGED = (
    "step", "epoch", "lr", "images_per_second", "data_wait", "seconds", "seconds_waited", "sp_row_difference", "pass_difference", "skipped",
    "ranks", "stop", "minutes_over", "unreadable", "load_failures", "replaced_images", "evaluation", "checkpoint",
)  # fmt: skip


class LossesSection(Section):
    ce: CrossEntropySection = CrossEntropySection()
    at: AttentionTransferSection | None = None
    gradient_at: GradientAttentionSection | None = None
    sp: SimilarityPreservingSection | None = None
    kd: SoftTargetsSection | None = None
    custom: list[CustomLossSection] = []

    @model_validator(mode="after")
    def _names_differ(self) -> LossesSection:
        names = [section.name for section in self.custom]
        if len(set(names)) < len(names):
            raise ValueError(f"two losses of one name: {', '.join(names)}")
        return self

    @property
    def needs_teacher(self) -> list[str]:
        """Keys of the losses that compare with a teacher."""
        found = [name for name in ("at", "sp", "kd") if getattr(self, name) is not None]
        if self.gradient_at is not None and self.gradient_at.form == "transfer":
            found.append("gradient_at")
        return found + [f"custom.{i}" for i, section in enumerate(self.custom) if section.of != "labels"]

    @property
    def needs_teacher_logits(self) -> list[str]:
        """Keys of the losses that read the teacher's logits."""
        by_logits = [f"custom.{i}" for i, section in enumerate(self.custom) if section.of == "logits"]
        return [key for key in self.needs_teacher if key in ("kd", "gradient_at")] + by_logits


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
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Autocast of student and teacher; weights and losses stay float32. fp16 needs a GPU. fp64 is no autocast, but
    everything in float64: slow, for telling rounding from error."""
    channels_last: Switch = True
    sync_batch_norm: Switch = False
    """BatchNorm's batch is that of all ranks in a micro-step, not the micro-batch: dependent on the number of ranks. Needs DDP on GPUs."""
    clip_grad_norm: Positive | None = None
    skip_nonfinite: CountFromZero = 0
    """Updates in a row that are left out because the gradient is not finite, before the run ends. Above 0, each step waits for its
    gradient."""
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
    """When RUN/checkpoints/step_N is written, with all that training needs to go on from there. The last step always makes one."""

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
    schedule: Annotated[ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule, Field(discriminator="name")]
    checkpoint: CheckpointSection = CheckpointSection()
