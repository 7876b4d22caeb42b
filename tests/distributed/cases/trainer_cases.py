"""The trainer's own loop on this launch."""

import dataclasses
import json
import os
from unittest import mock

import torch
import torch.distributed as dist
from few_images import write_images
from launched import STEPS
from safetensors.torch import save_file

from dkd.build import objective as objectives
from dkd.commands.plan.plan import plan
from dkd.config import RecipeError
from dkd.config.loading import validate
from dkd.distillation import grad_cache
from dkd.engines.accelerated import forget_settings
from dkd.errors import TrainingError
from dkd.global_batch import BatchLayout, collectives, gram, relational
from dkd.launch import Launch
from dkd.models import ModelSpec, build_model, weights_fingerprint
from dkd.preflight import hardware
from dkd.preflight.check import check
from dkd.training.components import build_trial
from dkd.training.lr_range import LearningRates, measure
from dkd.training.trainer import Trainer

RECIPE = {
    "run": {"name": "parity", "seed": 3, "trackers": []},
    "data": {"train": "digits", "validation": "digits", "classes": 10, "transforms": "digits", "image_size": 16},
    "student": {"name": "resnet8", "norm": "group"},
    "teacher": {"name": "wrn_16_1", "weights": "random"},
    "losses": {
        "at": {"beta": 100, "pairs": [["layer1", "block1"], ["layer2", "block2"], ["layer3", "block3"]]},
        "sp": {"gamma": 3000, "reference_batch": 128, "pairs": [["layer3", "block3"]]},
        "kd": {"alpha": {"start": 0.9, "end": 0.1}, "temperature": 4},
    },
    "train": {"global_batch": 32, "epochs": 1, "max_steps": STEPS, "precision": "fp64"},
    "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "schedule": {"name": "cosine", "warmup_epochs": 0.2},
}


def recipe_of(folder, name, changes):
    values = {
        **RECIPE,
        **{key: {**RECIPE.get(key, {}), **value} if key != "optimizer" else value for key, value in changes.items()},
    }
    values["run"] = {**values["run"], "name": name, "dir": str(folder / name)}
    return validate(values)


def train(folder, name, changes, tamper=lambda trainer: None, kind=Trainer):
    """Run the recipe with `changes` (section -> keys); return logged lines, evaluation and the final state.

    `tamper` may break the trainer before it runs, which is one of class `kind`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    recipe = recipe_of(folder, name, changes)
    # Accelerate keeps its settings for the life of a process; each case here is a launch of its own.
    forget_settings()
    launch = Launch.read()
    check(recipe, launch)
    trainer = kind.from_recipe(recipe, launch)
    teacher, model = trainer.parts.step.teacher, trainer.parts.engine.model
    teacher_before = weights_fingerprint(teacher) if teacher is not None else None
    tamper(trainer)
    result = trainer.fit()
    state = model.state_dict()
    if world > 1:
        dist.barrier()
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [line for line in lines if "step" in line],
        "evaluation": result.facts(),
        "state": {key: value.double().flatten()[:64].tolist() for key, value in state.items()},
        "fingerprint": weights_fingerprint(model),
        "teacher_unchanged": teacher_before == (weights_fingerprint(teacher) if teacher is not None else None),
        "teacher_trains": any(m.training for m in teacher.modules()) if teacher is not None else False,
    }


def all_four_losses(folder):
    return train(folder, "all_four_losses", {"losses": with_strategy("gather")})


def all_four_losses_by_exchange(folder):
    return train(folder, "by_exchange", {"losses": with_strategy("exchange")})


PAIRS = [["layer3", "block3"]]
RELATIONS = {
    "at": None, "kd": None, "sp": None,
    "pkt": {"preset": "repdistiller", "pairs": PAIRS, "floor": 0},
    "cc": {"weight": 20, "pairs": PAIRS, "floor": 0},
    "cka": {"weight": 2, "pairs": PAIRS},
    "rkd": {"preset": "repdistiller", "pairs": PAIRS},
    "dist": {"preset": "cifar", "weight": 0.5},
}  # fmt: skip


def all_relations(folder):
    """In one pass, by the grid that is chosen."""
    return train(folder, "relations", {"losses": RELATIONS})


def all_relations_accumulated(folder):
    """In two passes on few ranks, by a grid that is neither corner on four ranks."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    grid = [2, 1, 2] if size == 4 else "exchange"
    losses = {
        key: {**section, "grid": grid} if section and key != "dist" else section for key, section in RELATIONS.items()
    }
    return train(folder, "relations_accumulated", {"losses": losses, "train": {"micro_batch": 8}})


def all_four_losses_accumulated(folder):
    """Micro-batches of 8 without batch statistics: the same training as without accumulation."""
    return train(folder, "accumulated", {"train": {"micro_batch": 8}})


def all_four_losses_accumulated_with_batch_norm(folder):
    return train(folder, "accumulated_batch_norm", {"student": {"norm": "batch"}, "train": {"micro_batch": 8}})


def gradient_attention_accumulated(folder):
    """Beside SP, whose two passes run teacher and student once more."""
    return train(folder, "gradients", {"losses": GRADIENTS["transfer"], "train": {"micro_batch": 8}})


def a_relational_loss_of_ones_own(folder):
    """SP as if it were somebody's: the same training as with `losses.sp`, accumulated, in two passes."""
    own = {
        "name": "mine",
        "loss": "small_models:Relational",
        "weight": 3000 * 32 / 128,
        "pairs": [["layer3", "block3"]],
    }
    return train(
        folder, "own", {"losses": {**RECIPE["losses"], "sp": None, "custom": [own]}, "train": {"micro_batch": 8}}
    )


def a_loss_that_asks_for_labels_and_indices(folder):
    """Accumulated, in two passes on few ranks; over the end of an epoch."""
    own = {"name": "asking", "loss": "small_models:Asking", "weight": 1e-3, "pairs": [["layer3", "block3"]]}
    changes = {"losses": {"custom": [own]}, "train": {"global_batch": 448, "micro_batch": 112, "epochs": 2}}
    return train(folder, "asking", {**changes, "data": {"image_size": 8}, "optimizer": RECIPE["optimizer"]})


def gradient_attention_with_batch_norm(folder):
    """A teacher with a normalisation of its own; micro-batches of 8, the unit of BatchNorm."""
    normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    changes = {"student": {"norm": "batch"}, "teacher": {"normalization": normal}, "losses": GRADIENTS["transfer"]}
    return train(folder, "gradients_batch_norm", {**changes, "train": {"micro_batch": 8}})


def gradient_attention_of_mirror_images(folder):
    return train(folder, "mirrored", {"losses": GRADIENTS["symmetric"], "train": {"micro_batch": 8}})


GRADIENTS = {form: {"gradient_at": {"beta": 0.3, "form": form}} for form in ("transfer", "symmetric")}


def gram_matrices_of_micro_steps(folder):
    losses = {"sp": {**RECIPE["losses"]["sp"], "batch": "micro"}}
    return train(folder, "micro", {"losses": losses, "train": {"micro_batch": 8}})


def gram_matrices_of_groups(folder):
    """Two groups: of 2 ranks each on 4, of 1 rank each on 2."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    losses = {"sp": {**RECIPE["losses"]["sp"], "scope": 2 if size == 4 else "local"}}
    return train(folder, "groups", {"losses": losses})


def gram_matrices_of_nodes(folder):
    """As on two machines with half of the ranks each: the same groups as above."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    losses = {"sp": {**RECIPE["losses"]["sp"], "scope": "node"}}
    local = max(1, size // 2)
    rank = dist.get_rank() if dist.is_initialized() else 0
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local)}):
        return train(folder, "nodes", {"losses": losses, "train": {"max_steps": 5}})


REGULARIZED = {
    "student": {"name": "small_models:Regularized", "norm": None},
    "data": {"mixup": 0.4, "cutmix": 1.0},
    # Dropout draws its mask in the order of memory; the plain loop knows only one.
    "train": {"micro_batch": 8, "channels_last": False},
}


def batch_norm_dropout_mixup_and_cutmix(folder):
    """With micro-batches of 8 on any number of ranks: 4 micro-steps on 1, 2 on 2, 1 on 4."""
    return train(folder, "regularized", REGULARIZED)


def batch_norm_dropout_mixup_and_cutmix_by_exchange(folder):
    return train(folder, "regularized_exchange", {**REGULARIZED, "losses": with_strategy("exchange")})


def ranks_whose_hardware_differs(folder):
    """The last rank has no bfloat16 units, or all have; then the same run on ranks that all have them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    fast, slow = hardware.Hardware("cpu", "fast", True, 2.0), hardware.Hardware("cpu", "slow", False, 0.1)
    changes = {"train": {"global_batch": 448, "max_steps": 1, "precision": "auto", "channels_last": "auto"}}
    found = {}
    for name, own in (("one differs", slow if rank == size - 1 else fast), ("all alike", fast)):
        forget_settings()
        with mock.patch.object(hardware, "probe", lambda device, own=own: own):
            trainer = Trainer.from_recipe(recipe_of(folder, name, changes))
            trainer.fit()
            recipe, notes = trainer.parts.recipe, [note for note in trainer.parts.notes if "precision" in note]
            found[name] = [recipe.train.precision, recipe.teacher.weights_dtype, *notes]
    return found


def ranks_with_other_recipes_or_teachers(folder):
    """The last rank has an older copy of the recipe, then other weights of the teacher; its own place of the data is no
    difference."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    last = rank == size - 1
    weights = folder / f"teacher_{int(last)}.safetensors"
    if rank in (0, size - 1):
        torch.manual_seed(int(last))
        save_file(build_model(ModelSpec("wrn_16_1", 10)).state_dict(), weights)
    if dist.is_initialized():
        dist.barrier()
    found = {}
    for name, changes in (
        (
            "recipe",
            {"losses": {"sp": {**RECIPE["losses"]["sp"], "gamma": 2000 if last else 3000}}, "data": {"workers": rank}},
        ),
        ("teacher", {"teacher": {"weights": str(weights)}}),
    ):
        forget_settings()
        try:
            Trainer.from_recipe(recipe_of(folder, f"other_{name}", changes))
            found[name] = "no error"
        except RecipeError as error:
            found[name] = str(error)
    return found


def a_rank_that_skips_a_step_ends_all_ranks(folder):
    """The last rank leaves out the third step: from then on it is one ahead."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    class Skipping(Trainer):
        def train_step(self):
            if rank == size - 1 and self.state.step == 2:
                self.state.step += 1
            return super().train_step()

    try:
        train(folder, "skipped", {}, kind=Skipping)
    except TrainingError as error:
        return str(error)
    return "no error"


def second_forwards_repeat_the_first(folder):
    """With dropout, two passes a step: the logged difference of their features."""
    losses = {"at": None, "kd": None}
    changes = {
        "student": {"name": "small_models:Dropped", "norm": None},
        "losses": losses,
        "train": {"micro_batch": 8, "max_steps": 3},
    }
    seen = []

    def tamper(trainer):
        read = trainer.metrics.read
        trainer.metrics.read = lambda mean: (seen.append(mean.read()) if mean else None, read(mean))[1]

    result = train(folder, "dropout", changes, tamper)
    return {"differences": [numbers.counts.get("pass_difference") for numbers in seen], "lines": result["lines"]}


def mutated_trainings(folder):
    """The first steps of the trainer with one mistake each in its arithmetic: what a parity test must notice."""

    def local_norms(sums, at):
        table = [torch.zeros(at.layout.total, dtype=s.dtype).index_copy(0, at.part_samples, s) for s in sums[0]]
        return [tuple(table)]

    def without_others(derivatives, columns, at):
        own = torch.isin(at.column_samples, at.row_samples)
        return [m[:, own] @ q[own] for m, q in zip(derivatives, columns, strict=True)]

    def without_divisor_a(cached, micro_step, features):
        return sum((features[path] * gradient).sum() for path, gradient in cached.gradients[micro_step].items())

    loss = grad_cache.CachedGradient.loss
    mistakes = {
        "factor W dropped": (BatchLayout, "factor", property(lambda layout: 1 / layout.total)),
        "gradient of own samples only": (gram, "multiply_columns", without_others),
        "norms of local rows": (relational, "add_by_sample", local_norms),
        "divisor A dropped": (grad_cache.CachedGradient, "loss", without_divisor_a),
        "divisor A doubled": (grad_cache.CachedGradient, "loss", lambda *arguments: 2 * loss(*arguments)),
        "γ_eff with the micro-batch": (
            objectives,
            "scaled_weight",
            lambda gamma, reference, rows: gamma * rows / 4 / reference,
        ),
    }
    results = {}
    for name, (owner, attribute, mistake) in mistakes.items():
        changes = {
            "losses": with_strategy("gather"),
            "train": {"max_steps": 3, **({"micro_batch": 8} if "divisor" in name else {})},
        }
        with mock.patch.object(owner, attribute, mistake):
            results[name] = train(folder, name.replace(" ", "_"), changes)["lines"]
    return results


def with_strategy(strategy):
    return {"sp": {**RECIPE["losses"]["sp"], "strategy": strategy}}


def received_bytes_of_a_step_and_of_its_plan(folder):
    """The second step of trainings, counted at the collective calls, and what `dkd plan` says: [bytes, collectives] of
    each."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    sp = RECIPE["losses"]["sp"]
    two_pairs = {**sp, "pairs": [["layer1", "block1"], ["layer3", "block3"]]}
    trainings = {
        "float64": {},
        "float32": {"losses": with_strategy("exchange"), "train": {"precision": "fp32"}},
        "bf16": {"train": {"precision": "bf16"}},
        "bf16 under way": {"losses": {"sp": {**sp, "comm_dtype": "bf16"}}, "train": {"precision": "bf16"}},
        "two pairs": {"losses": {"sp": {**two_pairs, "strategy": "exchange"}}, "train": {"precision": "bf16"}},
        "centred, bf16": {
            "losses": {"sp": None, "cka": {"weight": 1, "pairs": sp["pairs"]}},
            "train": {"precision": "bf16"},
        },
        "accumulated": {"train": {"micro_batch": 4, "precision": "fp32"}},
        "one Gram matrix a micro-step": {
            "losses": {"sp": {**two_pairs, "batch": "micro"}},
            "train": {"micro_batch": 4},
        },
        "groups": {"losses": {"sp": {**sp, "scope": 2 if size > 1 else 1}}},
    }
    found = {}
    for name, changes in trainings.items():
        counts = []

        class Counting(Trainer):
            seen = counts

            def train_step(self):
                with collectives.count_received() as received:
                    values = super().train_step()
                self.seen.append([received.bytes, received.collectives])
                return values

        changes = {**changes, "train": {**changes.get("train", {}), "max_steps": 2}}
        train(folder, "bytes_" + name.replace(" ", "_"), changes, kind=Counting)
        planned = plan(recipe_of(folder, name, changes), nodes=1, gpus_per_node=size, device_type="cpu")
        relations = planned.relations[0]
        found[name] = [counts[1], [relations.bytes(relations.grid), relations.collectives(relations.grid)]]
    return found


BATCH_NORM = {
    "student": {"norm": "batch"},
    "losses": {"at": RECIPE["losses"]["at"], "sp": None, "kd": RECIPE["losses"]["kd"]},
    "train": {"micro_batch": 8},
}


def batch_norm_with_fixed_micro_batches(folder):
    return train(folder, "batch_norm", BATCH_NORM)


def averaged_weights_and_clipped_gradients(folder):
    changes = {**BATCH_NORM, "train": {"micro_batch": 8, "max_steps": 6, "clip_grad_norm": 1.0, "ema": {"decay": 0.5}}}
    return train(folder, "averaged", changes)


def adamw_and_bf16_and_worker_processes(folder):
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "decay_norm_and_bias": False}
    return train(
        folder,
        "adamw",
        {
            "data": {"workers": 1},
            "optimizer": optimizer,
            "train": {"max_steps": 4, "precision": "bf16"},
        },
    )


def a_loss_that_is_not_finite_on_one_rank_ends_all_ranks(folder):
    """The last rank's loss becomes NaN in the third step."""

    def tamper(trainer):
        step, launch = trainer.parts.step, trainer.parts.launch
        objective, last = step.objective, launch.rank == launch.world_size - 1

        class Broken:
            terms, names, begin = objective.terms, objective.names, objective.begin

            def __call__(self, *args, step, **kwargs):
                total, values = objective(*args, step=step, **kwargs)
                return (total * float("nan"), values) if last and step == 2 else (total, values)

        step.objective = Broken()

    try:
        train(folder, "broken", {}, tamper)
    except TrainingError as error:
        return str(error)
    return "no error"


def images_on_disk(folder, name, *args, **kwargs):
    """Files of few_images, written once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        (folder / name).parent.mkdir(exist_ok=True)
        write_images(folder / name, *args, **kwargs)
    if dist.is_initialized():
        dist.barrier()
    return str(folder / name)


def streaming_from_three_files(folder):
    """Files of 90, 17 and 60 images in row groups of 16, on fewer and on more ranks than files. Two epochs and a
    bit."""
    for number, count in enumerate((90, 17, 60)):
        images_on_disk(folder, f"three/{number}.parquet", count, seed=number)
    data = {
        "train": str(folder / "three" / "*.parquet"),
        "streaming": True,
        "workers": 1,
        "shuffle_window": 20,
        "stream_lanes": 16,
    }
    return train(folder, "three_files", {"data": data, "train": {"epochs": 3, "max_steps": 12}})


UNREADABLE = [(5, "truncated"), (21, "of zero bytes"), (22, "no image")]


def an_unreadable_image_ends_all_ranks(folder):
    """Each is in one rank's micro-batch alone, if there are several."""
    found = {}
    for index, how in UNREADABLE:
        path = images_on_disk(folder, f"broken {how}.parquet", 96, broken=[(index, how)])
        try:
            train(
                folder,
                f"raise {how}",
                {"data": {"train": path, "workers": 0, "in_memory": False}, "train": {"epochs": 3, "max_steps": 6}},
            )
        except TrainingError as error:
            found[how] = str(error)
    return found


def an_image_of_another_size_ends_all_ranks(folder):
    """Alone in its rank's micro-batch, if there are several ranks: nothing in that batch tells that it is not as the
    others'."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    path = images_on_disk(folder, "larger.parquet", 96, larger=[21])
    transforms = {
        "transforms": [{"RandomHorizontalFlip": {}}],
        "validation_transforms": [{"RandomHorizontalFlip": {}}],
        "image_size": 16,
    }
    normal = {"normalization": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    data = {
        "train": path,
        "validation": path,
        "allow_same_images": True,
        "workers": 0,
        "in_memory": False,
        **transforms,
        **normal,
    }
    changes = {
        "data": data,
        "losses": {"sp": None, "kd": None},
        "train": {"global_batch": world, "epochs": 1, "max_steps": 96 // world},
    }
    try:
        train(folder, "larger", changes)
    except TrainingError as error:
        return str(error)
    return "no error"


def features_of_another_shape_on_one_rank_end_all_ranks(folder):
    """The last rank's teacher yields maps of another size."""

    def tamper(trainer):
        forward, launch = trainer.parts.step.forward, trainer.parts.launch
        outputs, last = forward.teacher, launch.rank == launch.world_size - 1

        def smaller(pixels, images):
            found = outputs(pixels, images)
            return dataclasses.replace(
                found, features={path: f[..., 1:] if last else f for path, f in found.features.items()}
            )

        forward.teacher = smaller

    try:
        train(folder, "shapes", {"losses": {"at": None}}, tamper)
    except TrainingError as error:
        return str(error)
    return "no error"


def unreadable_images_are_replaced(folder):
    path = images_on_disk(folder, "three broken.parquet", 96, broken=UNREADABLE)
    data = {"train": path, "validation": path, "allow_same_images": True, "on_error": "skip", "workers": 1}
    return train(folder, "skip", {"data": data, "train": {"epochs": 2, "max_steps": 6}})


def an_unreadable_image_ends_an_evaluation_on_all_ranks(folder):
    path = images_on_disk(folder, "one broken.parquet", 96, broken=UNREADABLE[:1])
    try:
        train(
            folder,
            "broken validation",
            {"data": {"validation": path, "allow_same_images": True}, "train": {"max_steps": 1}},
        )
    except TrainingError as error:
        return str(error)
    return "no error"


def a_run_that_stops_early(folder):
    """Its evaluations never improve by 1; it is started again where it is finished."""
    stop_when = {"patience": 1, "min_delta": 1}
    train = {**RECIPE["train"], "max_steps": None, "global_batch": 448, "epochs": 9, "stop_when": stop_when}
    run = {"name": "early", "trackers": [], "dir": str(folder / "early")}
    recipe = validate({**RECIPE, "run": run, "train": train, "teacher": None, "losses": {}})
    steps = []
    for _ in range(2):
        forget_settings()
        launch = Launch.read()
        check(recipe, launch)
        trainer = Trainer.from_recipe(recipe, launch)
        trainer.fit()
        steps.append([trainer.state.first_step, trainer.state.step, trainer.parts.stopping.reason])
    return steps


def a_learning_rate_range_test(folder):
    """With accumulation and two passes on few ranks; the second test diverges."""
    found = {}
    for name, rates in (("sound", LearningRates(1e-3, 0.3, 12)), ("diverged", LearningRates(1.0, 1e9, 30))):
        forget_settings()
        launch, recipe = Launch.read(), recipe_of(folder, name, {"train": {"micro_batch": 8}})
        check(recipe, launch, None)
        curve = measure(build_trial(recipe, launch), rates)
        found[name] = {**dataclasses.asdict(curve), "suggestion": curve.suggestion, "left": (folder / name).exists()}
    return found


CASES = [
    a_run_that_stops_early,
    a_learning_rate_range_test,
    ranks_with_other_recipes_or_teachers,
    ranks_whose_hardware_differs,
    streaming_from_three_files,
    an_unreadable_image_ends_all_ranks,
    an_image_of_another_size_ends_all_ranks,
    features_of_another_shape_on_one_rank_end_all_ranks,
    unreadable_images_are_replaced,
    an_unreadable_image_ends_an_evaluation_on_all_ranks,
    all_four_losses,
    all_four_losses_by_exchange,
    all_relations,
    all_relations_accumulated,
    all_four_losses_accumulated,
    all_four_losses_accumulated_with_batch_norm,
    gradient_attention_accumulated,
    gradient_attention_of_mirror_images,
    gradient_attention_with_batch_norm,
    a_relational_loss_of_ones_own,
    a_loss_that_asks_for_labels_and_indices,
    gram_matrices_of_micro_steps,
    gram_matrices_of_groups,
    gram_matrices_of_nodes,
    second_forwards_repeat_the_first,
    mutated_trainings,
    batch_norm_with_fixed_micro_batches,
    averaged_weights_and_clipped_gradients,
    adamw_and_bf16_and_worker_processes,
    batch_norm_dropout_mixup_and_cutmix,
    batch_norm_dropout_mixup_and_cutmix_by_exchange,
    a_rank_that_skips_a_step_ends_all_ranks,
    received_bytes_of_a_step_and_of_its_plan,
    a_loss_that_is_not_finite_on_one_rank_ends_all_ranks,
]
