"""Wrong input: exit code 2, one line a problem, no traceback, before anything starts."""

import engines
import pytest
import torch
import yaml
from launched import DKD, run

from dkd.cli import main
from dkd.config import load_recipe, recipe_to_yaml
from dkd.config.loading import validate

BASE = {
    "run": {"name": "wrong", "seed": 0},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {
        "at": {"beta": 1000, "pairs": [["layer1", "block1"], ["layer2", "block2"]]},
        "sp": {"gamma": 3000, "reference_batch": 128, "pairs": [["layer3", "block3"]]},
        "kd": {"alpha": 0.9, "temperature": 4},
    },
    "train": {"global_batch": 64, "epochs": 1},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "cosine"},
}

WRONG = [
    # misspelt keys
    ("student.nmae=resnet8", ["student.nmae: unknown key; did you mean student.name?"]),
    ("trian.epochs=3", ["trian: unknown key; did you mean train?"]),
    ("epochs=3", ["epochs: unknown key; did you mean train.epochs?"]),
    ("losses.at.bta=3", ["losses.at.bta: unknown key; did you mean losses.at.beta?"]),
    ("optimizer.betas=[0.9, 0.99]", ["optimizer.betas: unknown key; allowed here: name, lr, momentum"]),
    ("train.compile.studnet=true", ["train.compile.studnet: unknown key; did you mean train.compile.student?"]),
    ("losses.at.beta={start: 1, edn: 0}", ["losses.at.beta.edn: unknown key; did you mean losses.at.beta.end?"]),
    # missing keys
    ("data.classes=some", ["data.classes: must be a whole number"]),
    ("data.validation=1.5", ["data.validation: must be the name of a data set, a fraction of the training images such as 0.1, or null"]),
    ("data.validation=true", ["data.validation: must be the name of a data set"]),
    ("student.head=new", ["student.head: new belongs to student.weights, which are null"]),
    ("student.freeze_batch_norm=true", ["student.freeze_batch_norm: belongs to student.freeze, which names no module"]),
    ("student.freeze=[block9]", ["student.freeze: 'block9' is neither a module nor a parameter of CifarResNet"]),
    ("student.weights=as_built", ["student.weights: as_built is for module:callable"]),
    ("student.weights=pretrained", ["student.weights: no such file: 'pretrained' (only torchvision/"]),
    ("student={}", ["student.name: is required and missing"]),
    ("optimizer={lr: 0.1}", ["optimizer.name: is required and missing; allowed: sgd, adamw"]),
    ("teacher={name: wrn_16_1}", ["teacher.weights: is required and missing"]),
    # wrong types
    ("train.epochs=many", ["train.epochs: must be a whole number, not 'many'"]),
    ("train.epochs=2.5", ["train.epochs: must be a whole number, not 2.5"]),
    ("train.epochs=true", ["train.epochs: must be a whole number, not True"]),
    ("optimizer.lr=fast", ["optimizer.lr: must be a number, not 'fast'"]),
    ("optimizer.nesterov=maybe", ["optimizer.nesterov: must be true or false, not 'maybe'"]),
    ("train=5", ["train: must be a section (keys and values), not 5"]),
    ("run.trackers=wandb", ["run.trackers: must be a list, not 'wandb'"]),
    ("data.workers=lots", ["data.workers: must be auto or a whole number from 0, not 'lots'"]),
    ("losses.at.pairs=layer1", ["losses.at.pairs: must be a list, not 'layer1'"]),
    # values out of range
    ("train.global_batch=0", ["train.global_batch: must be greater than 0, not 0"]),
    ("losses.at.beta=-1", ["losses.at.beta: must be greater than or equal to 0, not -1"]),
    ("losses.kd.temperature=0", ["losses.kd.temperature: must be greater than 0, not 0"]),
    ("optimizer.lr=.nan", ["optimizer.lr: must be a finite number, not nan"]),
    ("losses.ce.label_smoothing=1", ["losses.ce.label_smoothing: must be less than 1, not 1"]),
    ("data.normalization={mean: [0, 0], std: [1, 1, 0]}", ["data.normalization.mean: must have at least 3 items", "data.normalization.std.2: must be greater than 0"]),
    ("losses.at.preset=[authors]", ["losses.at.preset: "]),
    ("losses.sp.preset=mdistiller", ["losses.sp.preset: 'mdistiller' is not allowed; allowed: paper, repdistiller"]),
    ("losses.custom=[{name: step, loss: 'a:b', weight: 1, of: labels}]", ["losses.custom.0: name 'step' is taken"]),
    ("losses.custom=[{name: My Loss, loss: 'a:b', weight: 1, of: labels}]", ["losses.custom.0.name: must be a word of small letters"]),
    ("losses.custom=[{name: a, loss: ab, weight: 1, of: labels}]", ["losses.custom.0.loss: must be module:attribute, not 'ab'"]),
    # choices
    ("optimizer.name=sdg", ["optimizer.name: 'sdg' is not allowed; allowed: sgd, adamw, lamb; did you mean sgd?"]),
    ("schedule.name=polynomial", ["schedule.name: 'polynomial' is not allowed; allowed: constant, step, cosine, one_cycle"]),
    ("train.precision=float32", ["train.precision: 'float32' is not allowed; allowed: auto, fp32, tf32, bf16, fp16"]),
    ("losses.at.map=sum_q", ["losses.at.map: 'sum_q' is not allowed; allowed: sum, sum_p, max_p; did you mean"]),
    ("data.transforms=imagnet", ["data.transforms: must be imagenet, cifar, digits or a list of transforms"]),
    # models and taps
    ("student.name=resnet9", ["student.name: 'resnet9' is not a known model; did you mean resnet8"]),
    ("student.name=torchvision/resnet17", ["student.name: 'torchvision/resnet17' is not a known model; did you mean torchvision/resnet1"]),
    ("student.name=nowhere.nets:build", ["student.name: 'nowhere.nets:build': cannot import 'nowhere.nets'"]),
    ("student.norm=layer", ["student.norm: 'layer' is not allowed; allowed: batch, group"]),
    ("student.options={depth: 3}", ["student.name: 'resnet8' cannot be built with"]),
    ("losses.sp.pairs=[[layer4, block3]]", ["losses.sp.pairs.0: 'layer4' is not a module of CifarResNet; did you mean layer"]),
    ("losses.at.pairs=[[layer1, blok1]]", ["losses.at.pairs.0: 'blok1' is not a module of WideResNet; did you mean block1"]),
    ("losses.at.pairs=[[layer1, block1], [layer2]]", ["losses.at: pair 1 is ['layer2']: must be [student path, teacher path]"]),
    ("losses.at.pairs=[[layer1, block3]]", ["losses.at.pairs.0: resolutions differ: 'layer1' yields (16, 16, 16), 'block3' yields (64, 4, 4)"]),
    ("losses.at.pairs=[[fc, fc]]", ["losses.at.pairs.0: a map needs a feature of shape (C, H, W), not (10,)"]),
    # files
    ("teacher.weights=no/such/file.safetensors", ["teacher.weights: no such file: 'no/such/file.safetensors'"]),
    ("teacher.weights=IMAGENET1K_V1", ["teacher.weights: no such file: 'IMAGENET1K_V1'"]),
    ("data.train=no/such/*.parquet", ["data.train: no file matches 'no/such/*.parquet'"]),
    ("data.validation=cifar10", ["data.validation: 'cifar10' names no data set"]),
    # keys that do not go together
    ("teacher=null", ["losses.at: needs a teacher", "losses.sp: needs a teacher", "losses.kd: needs a teacher"]),
    ("losses=", ["losses: must be a section (keys and values), not None"]),
    ("losses={ce: null}", ["losses: ce is null, and there is no other loss: nothing would be learned"]),
    ("losses={}", ["teacher: no loss uses it"]),
    ("train.micro_batch=48", ["train.micro_batch: 48 does not divide train.global_batch=64"]),
    ("losses.sp.grid=ring", ["losses.sp.grid: must be auto, gather, exchange or three whole numbers above 0, such as [4, 2, 8], not 'ring'"]),
    ("losses.sp.grid=[2, 1, 1]", ["losses.sp.grid: grid=[2, 1, 1] is for 2 ranks, and 1 ranks share a batch here"]),
    ("losses.sp={preset: paper, grid: exchange, strategy: gather, pairs: [[layer3, block3]]}", ["losses.sp: grid exchange and strategy gather contradict each other; remove strategy"]),
    ("losses.rkd={distance: 0, angle: 0, pairs: [[layer3, block3]]}", ["losses.rkd: distance and angle are both 0; remove the loss, or give one of the two a weight"]),
    ("losses.pkt={preset: paper, weight: 1, reference_batch: 1, pairs: [[layer3, block3]]}", ["losses.pkt.preset: 'paper' is not allowed; allowed: repdistiller"]),
    # losses that train something
    ("losses.sp.adapter=linear", ["losses.sp.adapter: unknown key"]),
    ("losses.fitnet={pairs: [[layer2, block2]]}", ["losses.fitnet.weight: is required and missing"]),
    ("losses.fitnet={weight: 1, adapter: conv3x3, pairs: [[layer2, block2]]}", ["losses.fitnet.adapter: must be linear, linear_bn, conv1x1, conv1x1_bn, conv1x1_bn_relu, mlp, orthogonal or module:callable, not 'conv3x3'"]),
    ("losses.fitnet={weight: 1, adapter: 'nowhere:build', pairs: [[layer2, block2]]}", ["losses.fitnet: 'nowhere:build': cannot import 'nowhere'"]),
    ("losses.fitnet={weight: 1, adapter: 'collections:OrderedDict', pairs: [[layer2, block2]]}", ["losses.fitnet: 'collections:OrderedDict', called with (32, 8, 8), (32, 8, 8) and {}: TypeError"]),
    ("losses.fitnet={weight: 1, adapter_options: {width: 3}, pairs: [[layer2, block2]]}", ["losses.fitnet: adapter_options belong to an adapter that is module:callable, not to conv1x1_bn_relu"]),
    ("losses.fitnet={weight: 1, pairs: [[layer1, block2]]}", ["losses.fitnet: resolutions differ: student (16, 16), teacher (8, 8); ask for resize='pool' or resize='interpolate'"]),
    ("losses.fitnet={weight: 1, resize: crop, pairs: [[layer1, block2]]}", ["losses.fitnet.resize: 'crop' is not allowed; allowed: error, pool, interpolate"]),
    ("losses.fitnet={weight: 1, teacher_norm: instance, pairs: [[layer2, block2]]}", ["losses.fitnet.teacher_norm: 'instance' is not allowed; allowed: none, layer, batch, standardize"]),
    ("losses.fitnet={weight: 1, preset: mdistiller, pairs: [[layer2, block2]]}", ["losses.fitnet.preset: 'mdistiller' is not allowed; allowed: repdistiller"]),
    ("losses.feature={weight: 1, of: vectors, adapter: conv1x1, pairs: [[layer3, block3]]}", ["losses.feature: adapter='conv1x1' is for maps (C, H, W), not for vectors (64,); take linear or mlp"]),
    ("losses.feature={weight: 1, adapter: null, pairs: [[layer2, block3]], resize: pool}", ["losses.feature: features of shape (32, 4, 4) and (64, 4, 4) cannot be compared; name an adapter"]),
    ("losses.feature={weight: 1, distance: l3, pairs: [[layer3, block3]]}", ["losses.feature.distance: 'l3' is not allowed; allowed: mse, smooth_l1, cosine"]),
    ("losses.feature={weight: 1, adapter: 'torch.nn:Identity', pairs: [[layer2, block3]], resize: pool}", ["losses.feature: features of shape (32, 4, 4) and (64, 4, 4) cannot be compared; the adapter has to yield the teacher's shape"]),
    ("losses.vkd={weight: 1, pairs: [[layer3, block2]]}", ["losses.vkd: adapter='orthogonal' cannot map 64 numbers to 32: columns that are orthonormal need a teacher's feature at least as wide"]),
    ("losses.vkd={weight: 1, pairs: [[layer9, block2]]}", ["losses.vkd.pairs.0: 'layer9' is not a module of CifarResNet"]),
    ("losses.srd={weight: 1, alpha: 0.5, pairs: [[layer3, block3]]}", ["losses.srd.alpha: must be greater than or equal to 1, not 0.5"]),
    ("losses.srd={weight: 1, scope: node, pairs: [[layer3, block3]]}", ["losses.srd.scope: unknown key"]),
    ("losses.vid={preset: repdistiller, pairs: []}", ["losses.vid.pairs: must have at least 1"]),
    ("losses.review={weight: 1, width: 0, pairs: [[layer3, block3]]}", ["losses.review.width: must be greater than 0, not 0"]),
    ("losses.crd={preset: repdistiller, pairs: [[layer3, block3], [layer2, block2]]}", ["losses.crd: 2 pairs: this loss has one"]),
    ("losses.crd={preset: repdistiller, pairs: [[layer3, block3, 2]]}", ["losses.crd: pair 0 has the weight 2: with one pair, write it as `weight`"]),
    ("losses.queue={weight: 1, pairs: [[layer3, block3, 0.5]]}", ["losses.queue: pair 0 has the weight 0.5: with one pair, write it as `weight`"]),
    ("losses.crd={preset: repdistiller, momentum: 1, pairs: [[layer3, block3]]}", ["losses.crd.momentum: must be less than 1, not 1"]),
    ("losses.queue={weight: 1, size: 32, pairs: [[layer3, block3]]}", ["losses.queue.size: 32 is less than train.global_batch=64, which a step adds"]),
    ("losses.queue={weight: 1, adapter: null, pairs: [[layer2, block3]]}", ["losses.queue: features of shape (32,) and (64,) cannot be compared; name an adapter"]),
    ("losses.queue={weight: 1, size: 900000000000, pairs: [[layer3, block3]]}", ["losses.queue: "]),
    ("losses.queue={weight: 1, temperature: 0, pairs: [[layer3, block3]]}", ["losses.queue.temperature: must be greater than 0, not 0"]),
    ("optimizer.adapters={lr: 0.1}", ["optimizer.adapters: no loss trains anything beside the student; remove this section"]),
    ("optimizer.adapters={momentum: 0.1}", ["optimizer.adapters.momentum: unknown key"]),
    ("losses.dkd={beta: 2, temperature: 0}", ["losses.dkd.temperature: must be greater than 0, not 0"]),
    ("losses.dkd={}", ["losses.dkd.beta: is required and missing"]),
    ("losses.dkd={beta: 1, weight: {start: 0, end: 1, schedule: warmup}}", ["losses.dkd.weight: schedule: warmup needs warmup_epochs"]),
    ("losses.at.beta={start: 0, end: 1, warmup_epochs: 5}", ["losses.at.beta: schedule: warmup needs warmup_epochs, and no other schedule has them"]),
    ("losses.nkd={gamma: -1}", ["losses.nkd.gamma: must be greater than or equal to 0, not -1"]),
    ("losses.kd.standardize=2", ["losses.kd.standardize: must be true or false, not 2"]),
    ("losses.dist={weight: 1, tau: 0}", ["losses.dist.tau: must be greater than 0, not 0"]),
    ("train.links=no/such.json", ["train.links: 'no/such.json' cannot be read: No such file or directory"]),
    ("losses.sp.scope=rack", ["losses.sp.scope: must be global, node, local or a number of ranks, not 'rack'"]),
    ("losses.sp.comm_dtype=int8", ["losses.sp.comm_dtype: 'int8' is not allowed; allowed: bf16"]),
    ("losses.sp.floor=1", ["losses.sp.floor: must be less than 1, not 1"]),
    ("losses.sp.floor=-0.1", ["losses.sp.floor: must be greater than or equal to 0, not -0.1"]),
    ("train.sync_batch_norm=true", ["train.sync_batch_norm: needs DDP on GPUs"]),
    ("data.mixup=-1", ["data.mixup: must be greater than or equal to 0, not -1"]),
    ("run.collective_timeout=0", ["run.collective_timeout: must be greater than 0, not 0"]),
    ("losses.sp.scope=3", ["losses.sp.scope: scope=3: groups of 3 ranks do not divide 1 ranks"]),
    ("losses.sp.batch=epoch", ["losses.sp.batch: 'epoch' is not allowed; allowed: step, micro"]),
    ("train.global_batch=4096", ["train.global_batch: 4096 is more than the 1348 training images"]),
    ("data.classes=5", ["data.train: labels go from 0 to 9, but data.classes is 5", "data.validation: labels go from 0 to 9"]),
    ("schedule.warmup_epochs=-1", ["schedule.warmup_epochs: must be greater than or equal to 0, not -1"]),
    ("data.transforms=[RandomCropp]", ["data.validation_transforms: is required", "data.image_size: is required", "data.normalization: is required"]),
    ("run.trackers=[tensorbord]", ["run.trackers: 'tensorbord' is not a tracker of Accelerate"]),
    ("run.trackers=[mlflow]", ["run.trackers: 'mlflow' is not installed"]),
    ("student", ["'student' is not an override; write key=value"]),
    # images without labels
    ("data.labels=none", ["data.labels: must be true or false, not 'none'"]),
    ("data.labels=false", ["losses.ce: reads labels, but data.labels is false; remove it with losses.ce=null"]),
    (("data.labels=false", "losses.ce={class_weights: balanced}"), ["losses.ce: reads labels, but data.labels is false; remove it with losses.ce=null"]),
    (("data.labels=false", "losses.ce=null", "losses.custom=[{name: a, loss: 'a:b', weight: 1, of: labels}]"), ["losses.custom.0: reads labels, but data.labels is false; remove it from losses.custom"]),
    (("data.labels=false", "losses.ce=null", "losses.custom=[{name: a, loss: 'asking_losses:OfLabels', weight: 1, of: logits}]"), ["losses.custom.0.loss: 'asking_losses:OfLabels' has a parameter labels, but data.labels is false; remove the parameter, or the loss"]),
    (("data.labels=false", "losses.ce=null", "data.label_column=kind"), ["data.label_column: belongs to images with labels, but data.labels is false; remove one of the two"]),
    (("data.labels=false", "losses.ce=null", "train.stop_when={}"), ["train.stop_when.metric: top1 needs labels, but data.labels is false; take agreement"]),
    (("data.labels=false", "losses.ce=null", "train.stop_when={metric: loss}"), ["train.stop_when.metric: loss needs labels, but data.labels is false; take agreement"]),
    (("data.labels=false", "losses.ce=null", "evaluation.agreement=false"), ["evaluation.agreement: false leaves nothing to measure on images without labels"]),
    (("data.labels=false", "losses.ce=null", "evaluation.agreement=false", "checkpoint.keep_best=2"), ["checkpoint.keep_best: needs the agreement with the teacher; remove evaluation.agreement=false"]),
    (("data.labels=false", "losses={ce: null, at: {beta: 1, pairs: [[layer1, block1]]}}", "teacher.classes=7", "train.stop_when={metric: agreement}"), ["train.stop_when.metric: needs a teacher of the student's classes, but it has 7, and data.classes is 10"]),
    (("data.labels=false", "losses.ce=null", "data.classes=null"), ["data.classes: the images have no labels to count, and the teacher's weights state no classes; write teacher.classes"]),
    (("data.labels=false", "losses.ce=null", "data.classes=null", "teacher.weights=no/such.pth"), ["teacher.weights: no such file: 'no/such.pth'"]),
    (("data.labels=false", "losses.ce=null", "data.classes=null", "teacher.weights=a.pth", "teacher.name=resnet9"), ["teacher.name: 'resnet9' is not a known model"]),
    (("train.stop_when={metric: agreement}", "teacher=null", "losses={}"), ["train.stop_when.metric: agreement is that with a teacher; add `teacher`, or choose by another number"]),
    ("train.stop_when={metric: accuracy}", ["train.stop_when.metric: 'accuracy' is not allowed; allowed: top1, top5, loss, agreement"]),
    # neighbours
    ("evaluation.knn={k: 0}", ["evaluation.knn.k: must be greater than 0, not 0"]),
    ("evaluation.knn={temperature: 0}", ["evaluation.knn.temperature: must be greater than 0, not 0"]),
    ("evaluation.knn={tap: layer9}", ["evaluation.knn.tap: 'layer9' is not a module of CifarResNet; did you mean layer"]),
    ("evaluation.knn={train: 'no/such/*.tar'}", ["evaluation.knn.train: no file matches 'no/such/*.tar'"]),
    ("evaluation={every_epochs: 2, knn: {every_epochs: 3}}", ["evaluation.knn.every_epochs: 3 is no multiple of evaluation.every_epochs=2, after which evaluations are"]),
    ("evaluation.knn={label_column: kind}", ["evaluation.knn.label_column: belongs to evaluation.knn.train or evaluation.knn.validation, which name no images; use data.label_column"]),
    (("evaluation.knn={}", "data.validation=null"), ["evaluation.knn: needs evaluations, but data.validation is null"]),
    (("evaluation.knn={train: digits}", "data.labels=false", "losses.ce=null"), ["evaluation.knn.validation: is needed, since data.labels is false; name images with labels"]),
    # recipes of strong trainings
    ("losses.bce={}", ["losses.bce: is in the place of losses.ce, which is used, too; remove that with losses.ce=null"]),
    (("losses.ce=null", "losses.bce={target_threshold: 1}"), ["losses.bce.target_threshold: must be less than 1, not 1"]),
    (("losses.ce=null", "losses.bce={label_smoothing: -0.1}"), ["losses.bce.label_smoothing: must be greater than or equal to 0"]),
    (("losses.ce=null", "losses.bce={class_weights: balanced}"), ["losses.bce.class_weights: unknown key"]),
    (("losses.ce=null", "losses.bce={}", "data.labels=false"), ["losses.bce: reads labels, but data.labels is false; remove it with losses.bce=null"]),
    ("data.repeated_augmentation=0", ["data.repeated_augmentation: must be greater than 0, not 0"]),
    ("data.repeated_augmentation=3", ["data.repeated_augmentation: 3 does not divide train.global_batch=64"]),
    (("data.repeated_augmentation=2", "losses.crd={preset: repdistiller, pairs: [[layer3, block3]]}"), ["losses.crd: its banks have one vector of each image, and a step has data.repeated_augmentation=2 of them; set data.repeated_augmentation=1"]),
    ("data.train_image_size={10: 16}", ["data.train_image_size: must be a number of pixels, or the pixels from epoch 0 and from later ones on, such as {0: 160, 10: 224}, not {10: 16}"]),
    ("data.train_image_size={0: 16, 2: -8}", ["data.train_image_size: must be a number of pixels, or the pixels from epoch 0"]),
    ("data.train_image_size={0: 16, half: 8}", ["data.train_image_size: must be a number of pixels, or the pixels from epoch 0"]),
    ("data.train_image_size=large", ["data.train_image_size: must be a number of pixels, or the pixels from epoch 0"]),
    (("data.train_image_size={0: 8, 1: 16}", "data.augmentation_period=2"), ["data.train_image_size: changes with the epoch, and data.augmentation_period repeats epochs; remove one of the two"]),
    (("data.train_image_size={0: 8, 1: 16}", "data.in_memory=device"), ["data.in_memory: device keeps images of one size, and data.train_image_size changes it; take true"]),
    (("data.train_image_size={0: 8, 1: 16}", "teacher.cache=no/such"), ["teacher.cache: is of images of one size, and data.train_image_size changes it; remove one of the two"]),
    (("data.train_image_size={0: 32, 1: 48}", "data.image_size=32", "student={name: timm/vit_tiny_patch16_224, options: {img_size: 32}}", "losses={ce: {}}", "teacher=null"), ["student.name: 'timm/vit_tiny_patch16_224' fails on one image of 48×48: AssertionError: Input height (48) doesn't match model (32)"]),
    # what only a closer look finds
    ("student.name=torchvision/googlenet", ["student.name: GoogLeNet returns GoogLeNetOutputs, not the logits as one tensor"]),
    ("student.name=torchvision/vit_b_16", ["student.name: 'torchvision/vit_b_16' fails on one image of 16×16: AssertionError: Wrong image height"]),
    ("student.name=builtins:print", ["student.name: 'builtins:print' cannot be built with num_classes=10"]),
    ("losses.at.beta={start: 1, milestones: [2]}", ["losses.at.beta: milestones and factor belong to schedule: step"]),
    ("losses.at.norm=1", ["losses.at: norm belongs to reduction: paper"]),
    ("losses.at.p=0.5", ["losses.at.p: must be greater than or equal to 1, not 0.5"]),
    ("losses.at.pairs=[[layer1, block1, .inf]]", ["losses.at: pair 0 is ['layer1', 'block1', inf]"]),
    ("run.seed=18446744073709551616", ["run.seed: must be less than 9223372036854775808"]),
    ("run.name=a/b", ["run.name: must be a name without slashes, not 'a/b'"]),
    ("run.dir=/dev/null/run", ["run.dir: '/dev/null' is a file"]),
    ("teacher.weights=''", ["teacher.weights: must not be empty"]),
    ("data.train=folder:no/such", ["data.train: no such folder: 'no/such'"]),
]  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**BASE, "run": {**BASE["run"], "dir": str(tmp_path / "run")}}))
    return path


@pytest.mark.parametrize(
    ("override", "messages"),
    WRONG,
    ids=[override if isinstance(override, str) else " ".join(override) for override, _ in WRONG],
)
def test_wrong_recipe_gives_one_line_a_problem_and_exit_code_2(recipe_file, capsys, override, messages):
    overrides = [override] if isinstance(override, str) else list(override)
    if override == "losses=":
        overrides = ["losses=null"]
    if "RandomCropp" in override:
        overrides.append("data.image_size=null")
    assert main(["train", str(recipe_file), *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"dkd: {message}"), line
    assert not (recipe_file.parent / "run").exists()


def test_the_base_of_these_recipes_is_right(recipe_file, capsys):
    assert main(["train", str(recipe_file), "--dry-run"]) == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_all_problems_are_shown_at_once(recipe_file, capsys):
    assert (
        main(
            [
                "train",
                str(recipe_file),
                "student.name=resnet9",
                "train.precision=fp16",
                "data.train=x.parquet",
                "--dry-run",
            ]
        )
        == 2
    )
    lines = capsys.readouterr().err
    assert "student.name" in lines
    assert "data.train" in lines
    if not torch.accelerator.is_available():
        assert "train.precision: fp16 needs a GPU" in lines


def test_options_and_overrides_come_in_any_order(recipe_file, capsys):
    for arguments in (
        ["--dry-run", "train.epochs=3", str(recipe_file)],
        [str(recipe_file), "--dry-run", "train.epochs=3"],
    ):
        code = main(["train", *arguments])
        assert code == (0 if arguments[0] == str(recipe_file) else 2), (
            arguments
        )  # the recipe comes before the overrides
    assert "epochs: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.compile.student=true", "train.compile.student: losses.gradient_at differentiates twice"),
        ("train.compile.teacher=true", "train.compile.teacher: losses.gradient_at differentiates twice"),
        ("teacher.placement=fsdp2", "teacher.placement: losses.gradient_at needs a whole teacher"),
        ("train.precision=fp16", "train.precision: losses.gradient_at: gradients of images vanish in fp16"),
        ("train.sync_batch_norm=true", "train.sync_batch_norm: losses.gradient_at differentiates twice"),
        ("teacher=null", "losses.gradient_at: needs a teacher"),
    ],
)
def test_what_cannot_differentiate_twice_is_refused(recipe_file, capsys, override, message):
    assert main(["train", str(recipe_file), "losses={gradient_at: {beta: 1}}", override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_gradient_attention_is_refused_under_engines_that_shard(recipe_file, capsys, monkeypatch, engine):
    for name, value in {**engines.environment(engine), "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(recipe_file), "losses.gradient_at={beta: 1}"]) == 2
    assert "losses.gradient_at: differentiates twice, which FSDP2 and DeepSpeed cannot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "override", "wanted"),
    [
        ("authors", {}, {"beta": 1000.0, "reduction": "mean_squared", "resize": "error"}),
        ("repdistiller", {"beta": 7, "resize": "map"}, {"beta": 7.0, "resize": "map"}),
        ("paper", {"beta": 3}, {"reduction": "paper", "norm": 2.0, "resize": "map"}),
    ],
)
def test_a_preset_fills_what_is_left_out_and_survives_being_written(tmp_path, preset, override, wanted):
    values = {**BASE, "losses": {"at": {"preset": preset, "pairs": [["layer1", "block1"]], **override}}}
    recipe = validate(values)
    assert {key: getattr(recipe.losses.at, key) for key in wanted} == wanted
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "holds no recipe"),
        ("run: {}\nrun: {}", "key 'run' is there twice"),
        ("", "holds no recipe"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_missing_recipe_names_the_nearest(recipe_file, capsys):
    assert main(["train", str(recipe_file.with_name("recpe.yaml"))]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["dkd={beta: 2}", "nkd={}", "crd={preset: repdistiller, pairs: [[layer3, block3]]}"])
def test_losses_of_one_image_for_each_sample_do_not_go_with_mixing(recipe_file, capsys, loss):
    assert main(["train", str(recipe_file), "--dry-run", f"losses.{loss}", "data.cutmix=1"]) == 2
    name = loss.partition("=")[0]
    wanted = f"losses.{name}: needs one image for each sample, and data.cutmix mixes images of two; set data.cutmix=0"
    assert wanted in capsys.readouterr().err


def test_a_student_with_parameters_that_no_loss_reaches(recipe_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "spare_net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.used, self.spare = torch.nn.Linear(3, num_classes), torch.nn.Linear(3, 3)\n"
        "    def forward(self, x):\n        return self.used(x.mean((2, 3)))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", str(recipe_file), "--dry-run", "student.name=spare_net:Net", "losses={}", "teacher=null"]) == 2
    )
    wanted = "student.name: 'spare_net:Net': no gradient reaches spare.weight, spare.bias from the logits"
    assert wanted in capsys.readouterr().err


def test_without_a_loss_of_logits_the_head_stays_as_it_is(recipe_file, capsys):
    assert main(["train", str(recipe_file), "--dry-run", "losses.ce=null", "losses.kd=null"]) == 0
    assert "fc.weight, fc.bias stay as they are: no loss reads the logits" in "".join(capsys.readouterr())


def test_the_process_itself_exits_with_2_and_prints_no_traceback(recipe_file):
    result = run([*DKD, "train", recipe_file, "losses.sp.pairs=[[layer9, block3]]"], check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "dkd: losses.sp.pairs.0: 'layer9' is not a module of CifarResNet; did you mean layer3 or layer2 or layer1?"
    ]


def test_a_run_is_not_overwritten_unasked(recipe_file, capsys):
    run = recipe_file.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("precious\n")
    assert main(["train", str(recipe_file)]) == 2
    assert "holds a run already, whose recipe.yaml cannot be read" in capsys.readouterr().err
    assert main(["train", str(recipe_file), "--fresh"]) == 2
    assert (
        "holds a run already, and --fresh was asked for; choose another run.dir, or add --overwrite"
        in capsys.readouterr().err
    )
    assert (run / "metrics.jsonl").read_text() == "precious\n"


def test_a_changed_recipe_is_shown_key_by_key_and_refused(recipe_file, capsys):
    run = recipe_file.parent / "run"
    run.mkdir()
    (run / "provenance.json").write_text("[]")
    (run / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(recipe_file, ["train.epochs=7", "losses.kd.alpha=2"])))
    assert main(["train", str(recipe_file), "losses.kd=null"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [
        "dkd: losses.kd: {teacher: null, alpha: 2.0, temperature: 4.0, standardize: False} before, null now",
        "dkd: train.epochs: 7 before, 1 now",
    ]
    assert "give --allow-recipe-change to resume it with the new one, --overwrite to replace" in lines[-1]
    assert main(["train", str(recipe_file), "losses.kd=null", "--allow-recipe-change", "--dry-run"]) == 0
    assert "the run resumes with a changed recipe: train.epochs: 7 before, 1 now" in capsys.readouterr().err


def test_the_resolved_recipe_reads_back_to_itself(recipe_file):
    recipe = load_recipe(recipe_file, ["optimizer.lr=1e-3", "losses.kd.alpha={start: 1, end: 0.5}"])
    assert recipe.optimizer.lr == 0.001  # YAML 1.1 alone would read text here
    assert validate(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "the launch asks for 4 accumulation steps"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "the launch asks for mixed_precision fp16, the recipe for auto"),
    ("ACCELERATE_USE_FSDP", "true", "the launch asks for FSDP version 1"),
    ("WORLD_SIZE", "3", "train.global_batch=64 is not a multiple of 63 = micro_batch 21 × 3 processes"),
])  # fmt: skip
def test_a_launch_that_disagrees_with_the_recipe_is_an_error(
    recipe_file, capsys, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    assert main(["train", str(recipe_file)]) == 2
    assert message in capsys.readouterr().err


LIST_OF_TRANSFORMS = [
    "data.image_size=16",
    "data.normalization={mean: [0, 0, 0], std: [1, 1, 1]}",
    "data.validation_transforms=[Resize: {size: [16, 16]}]",
]


@pytest.mark.parametrize(("transforms", "message"), [
    ("[Rezise: {size: 16}]", "data.transforms: 'Rezise' is not a transform of torchvision.transforms.v2"),
    ("[Resize: {size: -16}]", "data.transforms: "),
    ("[Normalize: {mean: [0], std: [1]}]", "data.transforms: Normalize is not a transform of single images here; give data.normalization"),
    ("[ToPILImage]", "data.transforms: the transforms make Image of an image of (3, 8, 8)"),
    ("[RandomHorizontalFlip]", "data.transforms: the transforms make torch.uint8 (3, 8, 8) of an image of (3, 8, 8); data.image_size asks for"),
    ("[CenterCrop: {size: a}]", "data.transforms: the transforms fail on an image of (3, 8, 8): TypeError"),
])  # fmt: skip
def test_wrong_transforms_are_named_where_they_stand(recipe_file, capsys, transforms, message):
    assert main(["train", str(recipe_file), f"data.transforms={transforms}", *LIST_OF_TRANSFORMS]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"dkd: {message}"), lines[0]


def test_yaml_anchors_and_merge_keys_work(tmp_path):
    path = tmp_path / "recipe.yaml"
    base = {key: value for key, value in BASE.items() if key != "optimizer"}
    path.write_text(
        yaml.safe_dump({**base, "losses": {"kd": {"alpha": 1}}})
        + "optimizer: {<<: {name: sgd, momentum: 0.5}, lr: 0.3}\n"
    )
    optimizer = load_recipe(path).optimizer
    assert (optimizer.lr, optimizer.momentum) == (0.3, 0.5)
