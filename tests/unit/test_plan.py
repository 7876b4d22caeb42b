"""`dkd plan`: what a recipe would move, hold and compute. test_ranks.py compares its bytes with those of a real
step."""

from pathlib import Path

import pytest

from dkd.cli import main

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "examples" / "imagenet_r34_r18_at_sp.yaml")


def planned(capsys, *arguments):
    code = main(["plan", RECIPE, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_needs_neither_data_nor_weights(capsys):
    """The example of docs/explanations/global_batch.md: 206 M elements by gather and 55 M by exchange, times 63/64."""
    code, out, _ = planned(
        capsys, "--nodes", "8", "--gpus-per-node", "8", "train.global_batch=4096", "teacher.weights=no/such.safetensors"
    )
    assert code == 0
    assert "4,096 = 64 × 64 ranks × 1 micro-step\n" in out
    assert "Gram matrices of 4,096 rows, 64 on each of 64 ranks, once a step" in out
    assert "student layer4, d = 25,088, 4 bytes each  ←  teacher layer4, d = 25,088, 2 bytes each" in out
    assert "gather      receives 202,567,680 elements, 608 MB a rank and step, in 3 collectives" in out
    assert "exchange    receives 54,286,848 elements, 214 MB a rank and step, in 6 collectives" in out
    assert "strategy    exchange: it moves 2.8 times less than gather" in out
    # 21,797,672 parameters and 17,060 numbers of BatchNorm's buffers, some of 8 bytes.
    assert "87.3 MB replicated; sharded 1.36 MB over all ranks, 10.9 MB over those of one machine" in out
    # torchvision says 1.814 and 3.664 giga multiply-adds.
    assert "11,689,512 parameters, 3.63 GFLOP an image forward" in out
    assert "21,797,672 parameters, 7.33 GFLOP an image forward" in out


def test_features_of_one_size_share_collectives(capsys):
    precision = "train.precision=fp32"
    _, out, _ = planned(capsys, "--nodes", "8", "train.global_batch=4096", precision)
    assert "exchange    receives 54,286,848 elements, 217 MB a rank and step, in 4 collectives" in out
    _, out, _ = planned(capsys, "--nodes", "8", "train.global_batch=4096", precision, "losses.sp.comm_dtype=bf16")
    assert "exchange    receives 54,286,848 elements, 208 MB a rank and step, in 4 collectives" in out


def test_the_floor_of_rows_is_one_more_collective(capsys):
    _, out, _ = planned(capsys)
    assert (
        "floor       one more collective once a step, of one number a tensor: the mean norm of the rows "
        "(losses.sp.floor)" in out
    )
    for without in ("losses.sp.floor=0", "losses.sp.scope=local"):
        _, out, _ = planned(capsys, without)
        assert "one more collective" not in out


@pytest.mark.parametrize(
    ("teacher", "tap", "kind"),
    [
        (
            "vit_b_16",
            "encoder",
            "d = 151,296, 4 bytes",
        ),  # ends with a LayerNorm, which CUDA's autocast computes in float32
        ("convnext_tiny", "features", "d = 37,632, 4 bytes"),
        (
            "googlenet",
            "inception5b",
            "d = 50,176, 2 bytes",
        ),  # returns a tuple in training, but a teacher does not train
        ("regnet_y_400mf", "trunk_output", "d = 21,560, 2 bytes"),  # cannot be built on meta tensors
    ],
)
def test_teachers_of_all_kinds_can_be_planned(capsys, teacher, tap, kind):
    code, out, _ = planned(
        capsys, f"teacher.name=torchvision/{teacher}", "losses.at=null", f"losses.sp.pairs=[[layer4, {tap}]]"
    )
    assert code == 0
    assert f"teacher {tap}, {kind} each" in out


def test_accumulation_scopes_and_fixed_strategies(capsys):
    arguments = [
        "--nodes",
        "2",
        "train.global_batch=4096",
        "train.micro_batch=64",
        "losses.sp.scope=node",
        "losses.sp.strategy=gather",
    ]
    _, out, _ = planned(capsys, *arguments)
    assert "4,096 = 64 × 16 ranks × 4 micro-steps" in out
    assert "Gram matrices of 2,048 rows, 256 on each of 8 ranks, once a step" in out
    assert "strategy    gather: the recipe asks for it" in out
    assert "(twice, for SP over micro-steps)" in out
    _, out, _ = planned(capsys, *arguments, "losses.sp.batch=micro")
    assert "Gram matrices of 512 rows, 64 on each of 8 ranks, 4 times a step" in out
    assert "twice" not in out
    _, out, _ = planned(capsys, "losses.sp.scope=local")
    assert "a rank's own samples only: nothing moves" in out
    code, out, _ = planned(capsys, "teacher=null", "losses.sp=null", "losses.at=null")
    assert code == 0
    assert "sp " not in out


def test_a_check_builds_a_model_once_for_all_its_taps(monkeypatch):
    """And once more for its training. Models of the user's own are not remembered from one check to the next."""
    import small_models

    from dkd.config import load_recipe
    from dkd.preflight.models import model_problems

    built = []
    init = small_models.Regularized.__init__

    def counted(self, num_classes):
        built.append(num_classes)
        init(self, num_classes)

    monkeypatch.setattr(small_models.Regularized, "__init__", counted)
    taps = ["layer1", "layer2", "layer3"]
    own = [
        "student.name=small_models:Regularized",
        "teacher.name=small_models:Regularized",
        "teacher.weights=random",
        "losses.sp=null",
    ]
    recipe = load_recipe(RECIPE, [*own, f"losses.at.pairs={[[tap, tap] for tap in taps]}"])
    assert model_problems(recipe, 16, 4) == []
    assert len(built) == 3  # shapes and training of the student, shapes of the teacher
    wrong = load_recipe(RECIPE, [*own, f"losses.at.pairs={[[tap, tap] for tap in [*taps, 'layer4']]}"])
    assert [problem.path for problem in model_problems(wrong, 16, 4)] == ["losses.at.pairs.3", "losses.at.pairs.3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--nodes", "3"],
            "dkd: train.global_batch: train.global_batch=256 is not a multiple of 240 = micro_batch 10 × 24 processes",
        ),
        (["losses.sp.scope=3"], "dkd: losses.sp.scope: scope=3: groups of 3 ranks do not divide 8 ranks"),
        (
            ["losses.sp.pairs=[[layer5, layer4]]"],
            "dkd: losses.sp.pairs.0: 'layer5' is not a module of ResNet; did you mean",
        ),
        (
            ["train.global_batch=8", "data.mixup=0.2"],
            "dkd: data.mixup: a micro-batch of 1 image has none to mix it with",
        ),
    ],
)
def test_wrong_plans_exit_with_2(capsys, arguments, message):
    code, out, err = planned(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
