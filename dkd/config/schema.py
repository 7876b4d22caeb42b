"""Define the recipe's schema: every key, its type, default and meaning. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dkd.config.image_sizes import TrainImageSize
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
    matches,
    one_line,
)
from dkd.config.losses import ENSEMBLE, LossesSection
from dkd.config.optimizers import AdamWSection, LambSection, SgdSection
from dkd.config.teacher_cache import CacheSection


def _is_file_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and "/" not in value
        and "\\" not in value
        and is_one_line(value)
    )


_Seconds = Annotated[Number, Field(gt=0, le=10**7)]  # four months; the system's clocks count to less than 1e10
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
CompileSwitch = Annotated[
    bool | Literal["blocks"],
    allow(lambda v: v == "blocks" or isinstance(v, bool), "true, false or blocks"),
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


def _is_validation(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and is_one_line(value)
    return value is None or (isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1)


Validation = Annotated[
    str | float | None,
    allow(
        _is_validation,
        "the name of a data set, a fraction of the training images such as 0.1, or null (no evaluation)",
    ),
]


class RunSection(Section):
    """Set where a run writes, how it repeats, and how long its ranks wait."""

    name: _Name = "run"
    """Name of the run in trackers; default: the recipe's file name."""
    dir: _Path = ""
    """Folder of the run; default: runs/NAME."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of everything that is drawn."""
    trackers: list[Text] = ["tensorboard"]
    """Names of Accelerate's trackers: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio.
    Their files lie in the run's folder."""
    start_timeout: _Seconds = 1800.0
    """Seconds that a rank waits for the other ranks until the first step is done, while data are indexed, weights
    fetched and models compiled; later, seconds that it waits for ranks that write a checkpoint."""
    collective_timeout: _Seconds = 300.0
    """Seconds that a rank waits for another rank after the first step, before the run stops."""
    deterministic: Switch = False
    """Whether GPUs use only algorithms that give the same bits each time, in torch, cuDNN, cuBLAS and the compiler,
    which is slower. With false, a GPU's sums may differ in their last bits from one start to the next. CPUs repeat
    their bits either way."""
    log_every: Count = 1
    """Steps between lines of metrics.jsonl and the trackers."""

    @model_validator(mode="before")
    @classmethod
    def _default_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("dir"):
            return {**data, "dir": f"runs/{data.get('name', 'run')}"}
        return data


class Normalization(Section):
    """Compute (image − mean) / std for each channel, on values from 0 to 1."""

    mean: Annotated[list[Number], Field(min_length=3, max_length=3)]
    """Mean of each channel."""
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    """Standard deviation of each channel."""


class DataSection(Section):
    """Set the images and labels, and how images are transformed and loaded."""

    train: Text
    """The training images: parquet or tar files or globs, `hub:NAME[:SPLIT]`, `disk:PATH[:SPLIT]`, `folder:PATH`,
    `torchvision:NAME`, `python:MODULE:CALLABLE`, or `digits` (part of scikit-learn)."""
    validation: Validation
    """The validation images, named as for `train`; or a fraction such as 0.1 of the training images, drawn by
    `data.seed`, the same fraction of each class; null: nothing is evaluated."""
    labels: Switch = True
    """Whether the images have labels. false: none is read, so that a folder needs no folders of classes, and parquet
    and hub data no column of labels; the losses have to be of the teacher alone (`losses.ce: null`)."""
    classes: Count | None = None
    """Number of classes, the student's outputs; default: as many as the training data name or show. Without labels: as
    many as the teacher has, where `teacher.classes` or the teacher's weights state it."""
    allow_same_images: Switch = False
    """Whether training and validation may be the same images. Such an evaluation measures memory; false refuses it."""
    transforms: Transforms
    """A preset, or a list of torchvision.transforms.v2 names, each with its arguments: [RandomCrop: {size: 32, padding:
    4}, ...]."""
    validation_transforms: Transforms | None = None
    """Transforms of the validation images, where `transforms` is a list."""
    image_size: Count | None = None
    """Side of the images that the models see, in pixels; default: the last of `train_image_size`, or the preset's
    (imagenet 224, cifar 32, digits 32)."""
    train_image_size: TrainImageSize = None
    """Side of the training images alone, in pixels, where it is not image_size: a number, or a number from some epochs
    on, {0: 160, 10: 192, 20: 224}. Evaluations, and student.json, have image_size."""
    normalization: Normalization | None = None
    """Mean and standard deviation of the channels; default: the preset's."""
    mixup: NonNegative = 0.0
    """α of mixup; 0: off. Images are mixed within a micro-batch, after the transforms; the teacher sees the mixed
    images too."""
    cutmix: NonNegative = 0.0
    """α of CutMix; 0: off. With mixup and CutMix, one of them is drawn for each micro-batch, at equal odds."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = None
    """Seed of the order of the images, of their augmentation and mixing, and of validation images that are drawn;
    default: `run.seed`. Runs of one data.seed and several run.seed see the same images in the same order."""
    repeated_augmentation: Count = 1
    """R: each global batch holds B/R images, R times each, with different augmentations. An epoch still has N // B
    steps, and so 1/R as many different images, drawn anew in each epoch."""
    augmentation_period: Count | None = None
    """Epochs after which order, augmentation and mixing repeat: those of epoch e are those of e mod the period. So a
    `teacher.cache` of that many epochs serves every epoch; null: no epoch is like another."""
    image_column: Text | None = None
    """Column of the images in parquet and hub data; default: the only column that fits."""
    label_column: Text | None = None
    """Column of the labels in parquet and hub data; default: the only column that fits."""
    root: Text = "data"
    """Folder where `torchvision:NAME` looks for its files."""
    workers: Workers = "auto"
    """Number of worker processes of a rank. auto: 0 for images held in memory, else the rank's share of the machine's
    cores, up to 16 (streaming: 8)."""
    streaming: Switch = False
    """Whether parquet (files, or of the hub) is read in place, in the order of StreamedBatchSampler, instead of being
    copied and read at random."""
    stream_lanes: Count = 64
    """`streaming`: number of places in the data that are read at the same time, over all ranks."""
    shuffle_window: Count = 256
    """`streaming`: number of rows of each lane that are shuffled with each other."""
    on_error: Literal["raise", "skip"] = "raise"
    """raise: an image that cannot be read stops the run, on all ranks together. skip: another image stands in its
    place, and is counted."""
    in_memory: AutoSwitch | Literal["device"] = "auto"
    """Whether the training set is decoded once into memory, on each rank. auto: when all images have one size and fit 1
    GiB and the rank's share of an eighth of this machine's memory. device: into the memory of the device that trains,
    where each batch is cropped and mirrored, to the same pixels; with the transforms `cifar` or `digits`. auto does so
    on GPUs, where the images fit an eighth of the GPU's memory."""


class StudentSection(Section):
    """Set the model that is trained."""

    name: Text
    """A model of this package, `torchvision/NAME`, `timm/NAME`, `hf/NAME-OR-FOLDER` (transformers' models for image
    classification), or your own `module:callable`."""
    weights: Text | None = None
    """A file; torchvision's name of a weight set; `pretrained`, the weights that torchvision, timm or the hf folder has
    for the name; `as_built`, what your own callable has loaded; null: the student is initialised at random."""
    head: Literal["auto", "new", "keep"] = "auto"
    """The last layer, where `weights` were trained on other classes. new: it is initialised at random. keep: it comes
    from `weights`, which must fit. auto: new when the shape of the head is all that differs, which is reported."""
    freeze: list[Text] = []
    """Dotted paths of modules and parameters that are not trained, such as [conv1, bn1, layer1]."""
    freeze_batch_norm: Switch = False
    """Whether BatchNorm in the modules of `freeze` keeps its running statistics, too, and normalises by them."""
    norm: Literal["batch", "group", "none"] | None = None
    """Normalisation of a CIFAR model of this package; null: the model's own."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the model."""


class TeacherSection(Section):
    """Set the frozen model that the student learns from."""

    name: Text
    """The model, named as for the student."""
    weights: Text
    """As for the student: a file, torchvision's name of a weight set, `pretrained` or `as_built`; or `random` (reported
    by a warning)."""
    check_class_names: Switch = True
    """Whether a teacher whose logits are learned from, and whose weights name their classes, is refused where these are
    not the data's, in the same order."""
    placement: Literal["replicated", "fsdp2", "zero3"] = "replicated"
    """replicated: whole on every rank. fsdp2: in shards, with any engine of the student. zero3: in shards, with a
    student under DeepSpeed."""
    mesh: Literal["world", "node"] = "world"
    """fsdp2: the ranks that share one teacher."""
    weights_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: Linear, convolution and attention weights are kept in bfloat16, at half the memory. It needs
    train.precision: bf16, which rounds these weights for every forward anyway. auto: bf16 with that precision (except
    under ZeRO-3, which keeps float32), else fp32."""
    norm: Literal["batch", "group", "none"] | None = None
    """Normalisation of a CIFAR model of this package; null: the model's own."""
    options: dict[str, Any] = {}
    """Further keyword arguments of the model."""
    classes: Count | None = None
    """Number of outputs of the teacher's head; default: data.classes. `losses.kd` needs them equal."""
    normalization: Normalization | None = None
    """Mean and standard deviation of the channels; default: those that its weights state (a student of dkd, weight sets
    of torchvision, timm and hf models), else the student's."""
    input_size: Count | None = None
    """Side, in pixels, that images are resized to for the teacher; default: the student's, or for timm and hf models of
    one fixed size that size."""
    cache: CacheSection | None = None
    """Folder where what the losses read of the teacher is stored, and read in later runs; null: the teacher computes it
    in each step."""


def _is_teacher_name(value: Any) -> bool:
    return matches(r"[a-z][a-z0-9_]*", value) and value != ENSEMBLE


TeacherName = Annotated[str, allow(_is_teacher_name, "a word of small letters, digits and _, and not ensemble")]


class CompileSection(Section):
    """Set which models are compiled by torch.compile."""

    student: CompileSwitch = False
    """Whether the student is compiled. blocks: each of its blocks by itself, which takes a fraction of the time where a
    model repeats one block, as transformers do."""
    teacher: CompileSwitch = False
    """Whether the teacher is compiled, as the student."""
    losses: Switch = False
    """Whether losses that are means over samples are compiled, each into one kernel or a few; on one process alone also
    the losses of relations."""


class EmaSection(Section):
    """Set the exponential moving average of the student."""

    decay: Annotated[Number, Field(gt=0, lt=1)]
    """Share of the average that stays at each step."""


class StopWhenSection(Section):
    """Set when training ends before its last step, because the student no longer improves. The numbers are those of
    the evaluations, and so are the steps at which a run can end."""

    metric: Literal["top1", "top5", "loss", "agreement"] = "top1"
    """The number of an evaluation that has to improve: top1 and top5 have to rise, loss has to fall. agreement, the
    share of images for which student and teacher name the same class first, has to rise; every evaluation then measures
    it."""
    patience: Count = 5
    """Number of consecutive evaluations without an improvement after which training ends."""
    min_delta: NonNegative = 0.0
    """Difference to the best value that is no improvement yet; accuracies are shares, 0 to 1."""
    threshold: Number | None = None
    """Value of the metric at which training ends at once; null: none."""

    @property
    def falls(self) -> bool:
        """Return whether a smaller value is better."""
        return self.metric == "loss"


class TrainSection(Section):
    """Set how much is trained, in which batches and in which precision."""

    global_batch: Count
    """B, samples of a step over all ranks."""
    micro_batch: Count | None = None
    """b, samples that a rank forwards at the same time; default: global_batch / world size."""
    epochs: Count
    """Number of epochs."""
    max_steps: Count | None = None
    """Number of steps after which the run stops, where that is earlier."""
    stop_when: StopWhenSection | None = None
    """Early stopping; null: the run has all of its steps. The last student is exported; `checkpoint.keep_best` keeps
    the best one, too."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = "auto"
    """bf16 and fp16 are autocast of student and teacher; weights and losses stay float32. auto: the precision that the
    hardware of all ranks is fast in, chosen at the run's first start and kept when the run resumes. fp32 is IEEE
    arithmetic on GPUs too; tf32 lets their convolutions and matrix products round to TF32. fp16 and tf32 need a GPU.
    fp64 computes everything in float64, which is slow and helps to tell rounding from error."""
    channels_last: AutoSwitch = "auto"
    """Whether images and convolution weights are in the memory format channels_last. auto: true; a resumed run keeps
    the format that it began with."""
    sync_batch_norm: Switch = False
    """Whether BatchNorm's batch is that of all ranks in a micro-step, instead of the micro-batch. The result then
    depends on the number of ranks. It needs DDP on GPUs."""
    clip_grad_norm: Positive | None = None
    """Largest L2 norm of the gradient; null: the gradient is not clipped."""
    skip_nonfinite: CountFromZero = 0
    """Number of consecutive updates that may be left out because the gradient is not finite, before the run stops.
    Above 0, each step waits for its gradient."""
    ema: EmaSection | None = None
    """Exponential moving average of the student, which is evaluated and exported in the student's place; null: none."""
    compile: CompileSection = CompileSection()
    """Models that are compiled."""
    graph: AutoSwitch = "auto"
    """Whether each step is one CUDA graph, captured once and replayed: one process alone, without accumulation. Where a
    recipe does not allow it, one line gives the reason, and steps run as usual. auto: false, until graphs have been
    run on a GPU."""
    teacher_stream: Switch = False
    """Whether the teacher computes on a CUDA stream of its own, beside the student's forward, with equal results and
    more memory. Where a recipe does not allow it, one line gives the reason. It has not been run on a GPU."""
    links: Text | None = None
    """File of `dkd launch-check --json FILE`, with the measured speeds between ranks, by which losses of relations
    choose their grid; null: the speeds of docs/explanations/global_batch.md."""


class KnnSection(Section):
    """Set the k-NN accuracy of the student's features, which needs labels of other images than those it is trained on,
    and no head: an image's class is voted by the images with the most similar features."""

    train: Text | None = None
    """The images with labels among which neighbours are looked for, named as `data.train` is; default: data.train,
    where it has labels."""
    validation: Text | None = None
    """The images with labels whose classes are voted for, named likewise; default: data.validation, where it has
    labels."""
    label_column: Text | None = None
    """Column of the labels in parquet and hub data that are named here; default: data.label_column."""
    tap: Text | None = None
    """Dotted path of the module whose output is the feature, averaged over the positions of a map, or over all tokens;
    default: the input of the student's head."""
    k: Count = 20
    """Number of neighbours that vote."""
    temperature: Positive = 0.07
    """T; a neighbour of cosine similarity s votes with weight exp(s/T)."""
    every_epochs: Count | None = None
    """Epochs between measurements, which belong to evaluations; default: evaluation.every_epochs. The run's last
    evaluation always measures it."""


class EvaluationSection(Section):
    """Set when and how the student is evaluated."""

    batch: Count = 256
    """Samples that a rank forwards at the same time."""
    every_epochs: Count = 1
    """Epochs between evaluations."""
    agreement: AutoSwitch = "auto"
    """Whether evaluations compare the student with its teacher: how often both name the same class first, KL, and
    linear CKA of tapped pairs. It costs a forward of the teacher for each validation image. auto: in the last
    evaluation of the run, where there is a teacher, and it was built although it has a cache; in each evaluation of
    images without labels, of which nothing else can be measured. true: in each."""
    knn: KnnSection | None = None
    """k-NN accuracy of the student's features; null: not measured."""


class _ScheduleSection(Section):
    warmup_epochs: NonNegative = 0.0
    """Epochs in which the learning rate grows linearly up to `optimizer.lr`."""


class ConstantSchedule(_ScheduleSection):
    """Keep the learning rate."""

    name: Literal["constant"]
    """The schedule."""


class StepSchedule(_ScheduleSection):
    """Multiply the learning rate by a factor at some epochs."""

    name: Literal["step"]
    """The schedule."""
    milestones: list[Positive]
    """Epochs at which the learning rate is multiplied by `factor`."""
    factor: Positive = 0.1
    """Factor of the learning rate at each milestone."""


class CosineSchedule(_ScheduleSection):
    """Lower the learning rate along half a cosine."""

    name: Literal["cosine"]
    """The schedule."""
    final: Fraction = 0.0
    """Last learning rate, as a fraction of `optimizer.lr`."""


class OneCycleSchedule(Section):
    """Raise the learning rate to its peak and lower it again, along half cosines."""

    name: Literal["one_cycle"]
    """The schedule."""
    peak: Annotated[Number, Field(gt=0, lt=1)] = 0.3
    """Share of the run after which `optimizer.lr` is reached."""
    start: Positive = 0.04
    """First learning rate, as a fraction of `optimizer.lr`."""
    final: Fraction = 1e-4
    """Last learning rate, as a fraction of `optimizer.lr`."""


class CheckpointSection(Section):
    """Set when RUN/checkpoints/step_N is written, with everything that training needs to resume from there. The last
    step always makes a checkpoint."""

    every_epochs: Count | None = 1
    """Epochs between checkpoints; null: epochs make none."""
    every_steps: Count | None = None
    """Steps between checkpoints; null: steps make none."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints; null: time makes none."""
    keep_last: Count = 2
    """Number of the newest checkpoints that are kept."""
    keep_best: CountFromZero = 0
    """Number of further checkpoints that are kept: those with the highest top-1, or for images without labels those
    that agree with the teacher most."""
    background: Switch = True
    """Whether training continues while a copy of its state is written; false: training waits."""


class Recipe(Section):
    """Describe one training: the student, the data, the teacher and losses, and how to train."""

    run: RunSection = RunSection()
    """Where a run writes, how it repeats, and how long its ranks wait."""
    data: DataSection
    """Images and labels."""
    student: StudentSection
    """The model that is trained."""
    teacher: TeacherSection | None = None
    """The frozen model that the student learns from; null: none."""
    teachers: dict[TeacherName, TeacherSection] = {}
    """Several frozen models by name, in the place of `teacher`; each loss names its own (`teacher: NAME`)."""
    losses: LossesSection = LossesSection()
    """The losses and their weights."""
    train: TrainSection
    """Batches, length and precision."""
    evaluation: EvaluationSection = EvaluationSection()
    """Evaluation of the student."""
    optimizer: Annotated[SgdSection | AdamWSection | LambSection, Field(discriminator="name")]
    """The optimizer."""
    schedule: Annotated[
        ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule, Field(discriminator="name")
    ]
    """The learning rate over the run."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints."""
