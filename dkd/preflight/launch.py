"""Whether recipe and launch fit each other. Needs no process group."""

from __future__ import annotations

from dkd.build.links import read_links
from dkd.config import Problem, Recipe, RecipeError
from dkd.config.derived import micro_batch, micro_steps, teacher_key, teacher_views
from dkd.config.losses import ComparingSection, RelationsSection, RkdSection
from dkd.config.optimizers import LambSection
from dkd.engines.arithmetic import device_type, has_gpu
from dkd.engines.rules import EngineRules, rules_of
from dkd.errors import InputError
from dkd.global_batch import Grid, ranks_per_group
from dkd.global_batch.choice import check_size
from dkd.launch import Launch
from dkd.losses.relational_angle import check_batch


def launch_problems(recipe: Recipe, launch: Launch) -> list[Problem]:
    """Return what of the recipe a launch cannot do, and where the launch states something else than the recipe."""
    found = batch_problems(recipe, launch.world_size, launch.local_world_size)
    rules = rules_of(launch)
    if rules.uses_deepspeed:
        from dkd.engines.deepspeed import filled_settings

        try:
            filled_settings(recipe, launch)
        except RecipeError as error:
            found += error.problems
    found += _teacher_problems(recipe, launch, rules)
    found += _student_problems(recipe, rules)
    try:
        read_links(recipe, "cpu")
    except RecipeError as error:
        found += error.problems
    found += _device_problems(recipe, launch, rules)
    return found + _disagreements(recipe, launch, found)


def batch_problems(recipe: Recipe, world_size: int, local_world_size: int) -> list[Problem]:
    """Return where the recipe's batches do not fit a number of processes, in all and on one machine."""
    problems = []
    train = recipe.train
    b = micro_batch(recipe, world_size)
    per_step = b * world_size
    if train.global_batch % per_step:
        what = "train.micro_batch" if train.micro_batch else "train.global_batch"
        problems.append(
            Problem(
                what,
                f"train.global_batch={train.global_batch} is not a multiple of {per_step} = micro_batch {b} × "
                f"{world_size} processes; change one of the three",
            )
        )
    if (recipe.data.mixup or recipe.data.cutmix) and b == 1:
        key = "data.mixup" if recipe.data.mixup else "data.cutmix"
        problems.append(Problem(key, "a micro-batch of 1 image has none to mix it with"))
    for key, section in recipe.losses.compared:
        problems += _comparison_problems(recipe, key, section, world_size, local_world_size)
    return problems


def _comparison_problems(
    recipe: Recipe, key: str, section: ComparingSection, world_size: int, local_world_size: int
) -> list[Problem]:
    """Return where the scope or the grid of a loss does not fit the launch, or its batch is too large."""
    try:
        ranks = ranks_per_group(section.scope, world_size, local_world_size)
    except ValueError as error:
        return [Problem(f"losses.{key}.scope", str(error))]
    if isinstance(section, RelationsSection) and isinstance(section.grid, list):
        try:
            check_size(Grid(*section.grid), ranks)
        except ValueError as error:
            return [Problem(f"losses.{key}.grid", str(error))]
    if isinstance(section, RkdSection) and section.angle != 0:
        steps = micro_steps(recipe, world_size) if section.batch == "step" else 1
        try:
            check_batch(ranks * micro_batch(recipe, world_size) * steps)
        except InputError as error:
            return [Problem(f"losses.{key}.scope", str(error))]
    return []


def _teacher_problems(recipe: Recipe, launch: Launch, rules: EngineRules) -> list[Problem]:
    return [
        Problem(problem.path.replace("teacher.", f"{teacher_key(name)}."), problem.message)
        for name, view in teacher_views(recipe)
        for problem in _problems_of_one_teacher(view, launch, rules)
    ]


def _problems_of_one_teacher(recipe: Recipe, launch: Launch, rules: EngineRules) -> list[Problem]:
    teacher, found = recipe.teacher, []
    assert teacher is not None
    if teacher.placement == "zero3" and not rules.uses_deepspeed:
        files = "launch/accelerate/{zero1,zero2,zero3}.yaml"
        found.append(
            Problem(
                "teacher.placement",
                f"zero3 needs a student under DeepSpeed ({files}); this launch is {rules.name}: take fsdp2",
            )
        )
    if teacher.placement != "replicated" and recipe.train.compile.teacher:
        found.append(Problem("train.compile.teacher", f"is not supported with teacher.placement={teacher.placement}"))
    if teacher.mesh != "world" and teacher.placement != "fsdp2":
        found.append(Problem("teacher.mesh", f"belongs to teacher.placement=fsdp2, not {teacher.placement}"))
    world, local = launch.world_size, launch.local_world_size
    if teacher.mesh == "node" and world % local:
        found.append(Problem("teacher.mesh", f"{world} processes are not {local} on every machine"))
    if teacher.weights_dtype == "bf16" and recipe.train.precision not in ("bf16", "auto"):
        found.append(Problem("teacher.weights_dtype", f"bf16 needs train.precision=bf16, not {recipe.train.precision}"))
    if teacher.placement == "zero3" and teacher.weights_dtype == "bf16":
        found.append(Problem("teacher.weights_dtype", "is fp32 under ZeRO-3; take teacher.placement=fsdp2"))
    return found


def _student_problems(recipe: Recipe, rules: EngineRules) -> list[Problem]:
    train, name, found = recipe.train, rules.name, []
    if train.compile.student and not rules.compiles_student:
        found.append(
            Problem("train.compile.student", f"is not supported under {name}; compile under DDP, or leave it out")
        )
    if train.precision == "fp16" and not rules.scales_losses:
        found.append(Problem("train.precision", f"fp16 needs DDP's loss scaling; use bf16 or fp32 under {name}"))
    if train.precision == "fp64" and not rules.trains_in_float64:
        found.append(
            Problem(
                "train.precision",
                f"DeepSpeed keeps its weights in float32; use fp32 under {name}, or fp64 under DDP or FSDP2",
            )
        )
    if isinstance(recipe.optimizer, LambSection) and not rules.updates_whole_tensors:
        found.append(
            Problem(
                "optimizer.name",
                f"lamb needs the norm of each weight tensor, and under {name} DeepSpeed updates many tensors as one; "
                "use adamw or sgd, or launch DDP or FSDP2",
            )
        )
    if recipe.losses.gradient_at is not None and not rules.differentiates_twice:
        found.append(
            Problem(
                "losses.gradient_at",
                "differentiates twice, which FSDP2 and DeepSpeed cannot; use launch/accelerate/ddp.yaml",
            )
        )
    return found


def _device_problems(recipe: Recipe, launch: Launch, rules: EngineRules) -> list[Problem]:
    found = []
    if recipe.train.sync_batch_norm and (not has_gpu() or not rules.syncs_batch_norm):
        found.append(Problem("train.sync_batch_norm", "needs DDP on GPUs: launch/accelerate/ddp.yaml"))
    if recipe.train.precision in ("fp16", "tf32") and device_type(launch.asks_for_cpu) == "cpu":
        found.append(Problem("train.precision", f"{recipe.train.precision} needs a GPU; use auto, bf16 or fp32"))
    return found


def _disagreements(recipe: Recipe, launch: Launch, found: list[Problem]) -> list[Problem]:
    """Return where the launch also states what the recipe states, and something else."""
    more = []
    if launch.dynamo_backend != "no":
        more.append(
            Problem(
                "train.compile", "the launch asks for a dynamo_backend; leave it out: train.compile.student states it"
            )
        )
    steps = micro_steps(recipe, launch.world_size)
    if launch.accumulation_steps not in (None, "auto", str(steps)) and not found:
        more.append(
            Problem(
                "train.micro_batch",
                f"the launch asks for {launch.accumulation_steps} accumulation steps "
                f"(ACCELERATE_GRADIENT_ACCUMULATION_STEPS), the recipe for {steps}; leave it out of the launch",
            )
        )
    precision = launch.mixed_precision
    if precision not in ("no", recipe.train.precision):  # auto is the hardware's choice, not the launch's
        more.append(
            Problem(
                "train.precision",
                f"the launch asks for mixed_precision {precision}, the recipe for {recipe.train.precision}; leave it "
                f"out of the launch, or write train.precision={precision}",
            )
        )
    return more
