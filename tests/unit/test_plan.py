"""`dkd plan`: what a recipe would move, hold and compute. test_ranks.py compares its bytes with those of a real
step."""

import json
import re
from pathlib import Path

import pytest

from dkd.cli import main

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "examples" / "imagenet_r34_r18_at_sp.yaml")


def planned(capsys, *arguments):
    code = main(["plan", RECIPE, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_plan_needs_neither_data_nor_weights(capsys):
    code, out, _ = planned(
        capsys, "--nodes", "8", "--gpus-per-node", "8", "train.global_batch=4096", "teacher.weights=no/such.safetensors"
    )
    assert code == 0
    assert "4,096 = 64 × 64 ranks × 1 micro-step\n" in out
    assert "sp          relations of 4,096 samples, 64 on each of 64 ranks, once a step" in out
    assert "student layer4, d = 25,088, 2 bytes each  ←  teacher layer4, d = 25,088, 2 bytes each" in out
    # The corners of docs/explanations/global_batch.md, and the vectors of norms and sums.
    gather, exchange = (line_of(out, name) for name in ("gather", "exchange"))
    assert gather.startswith("64 × 1 × 1: receives 202,329,792 elements, 405 MB a rank and step, in 4 collectives")
    assert exchange.startswith("1 × 1 × 64: receives 54,307,008 elements, 211 MB a rank and step, in 8 collectives")
    assert re.match(r"\d+ × \d+ × 8: receives .* the least expected time of the grids that fit", line_of(out, "grid"))
    assert re.match(r"the products alone: at least 7,055,674 elements on any grid, and ", line_of(out, "bound"))
    assert "inside a machine 100 GB/s and 20 µs, between machines 6 GB/s and 40 µs (assumed; " in out
    # 21,797,672 parameters and 17,060 numbers of BatchNorm's buffers, some of 8 bytes.
    assert "87.3 MB replicated; sharded 1.36 MB over all ranks, 10.9 MB over those of one machine" in out
    # torchvision says 1.814 and 3.664 giga multiply-adds.
    assert "11,689,512 parameters, 3.63 GFLOP an image forward" in out
    assert "21,797,672 parameters, 7.33 GFLOP an image forward" in out


def line_of(out, name):
    """Return the text of the first line of a name."""
    return next(line[len(name) :].strip() for line in out.splitlines() if line.startswith(f"{name} "))


def test_types_between_ranks_decide_the_bytes(capsys):
    sixty_four = ("--nodes", "8", "train.global_batch=4096", "losses.sp.grid=[4, 1, 16]")
    found = {}
    for name, more in (("fp32", []), ("rounded", ["losses.sp.comm_dtype=bf16"])):
        _, out, _ = planned(capsys, *sixty_four, "train.precision=fp32", *more)
        assert line_of(out, "grid").endswith("; the recipe asks for it")
        found[name] = re.search(r"([\d.]+) MB a rank and step, in (\d+) collectives", line_of(out, "grid")).groups()
    assert found["fp32"] == ("104", "10")
    assert found["rounded"] == ("75.6", "10")


def test_measured_links_decide_the_grid(capsys, tmp_path):
    sixty_four = ("--nodes", "8", "train.global_batch=4096")
    grids = {}
    for latency, bandwidth in ((10.0, 1e9), (1e-7, 1e7)):
        link = {"latency": latency, "bandwidth": bandwidth}
        (tmp_path / "links.json").write_text(json.dumps({"problems": [], "links": {"inside": link, "between": link}}))
        code, out, _ = planned(capsys, *sixty_four, f"train.links={tmp_path}/links.json")
        assert code == 0
        assert f"(measured, {tmp_path}/links.json)" in out
        grids[latency] = line_of(out, "grid").partition(":")[0]
    assert grids[10.0] == "64 × 1 × 1"  # the fewest collectives
    assert grids[1e-7] != grids[10.0]
    (tmp_path / "links.json").write_text(json.dumps({"problems": [], "links": {"inside": link}}))
    _, out, _ = planned(capsys, *sixty_four, f"train.links={tmp_path}/links.json")
    assert f"between machines 6 GB/s and 40 µs (measured, {tmp_path}/links.json; between machines assumed)" in out
    (tmp_path / "links.json").write_text('{"problems": [], "links": {}}')
    code, _, err = planned(capsys, *sixty_four, f"train.links={tmp_path}/links.json")
    assert (code, "holds no speeds of links: dkd launch-check measures them on several processes" in err) == (2, True)
    for text in ("{}", "no json", '{"problems": [], "links": {"inside": {"latency": 1, "bandwidth": 0}}}'):
        (tmp_path / "links.json").write_text(text)
        code, _, err = planned(capsys, *sixty_four, f"train.links={tmp_path}/links.json")
        assert (code, "is not a file of dkd launch-check --json" in err) == (2, True), err
    code, _, err = planned(capsys, *sixty_four, "train.links=no/such.json")
    assert (code, err) == (2, "dkd: train.links: 'no/such.json' cannot be read: No such file or directory\n")


def test_a_memory_that_no_grid_fits_into_is_refused_with_both_numbers(capsys):
    code, _, err = planned(capsys, "--nodes", "64", "train.global_batch=32768", "losses.sp.memory=0.001")
    assert code == 2
    assert re.search(r"losses.sp.memory: .* needs 0.\d+ GB a rank, the least of all, and 0.001 GB are allowed", err)


def test_every_loss_of_relations_has_its_lines(capsys):
    pairs = "pairs: [[layer4, layer4]]"
    losses = [
        f"losses.pkt={{preset: repdistiller, {pairs}}}",
        f"losses.cc={{weight: 1, {pairs}}}",
        f"losses.cka={{weight: 1, {pairs}}}",
        f"losses.rkd={{preset: repdistiller, {pairs}}}",
        "losses.dist={preset: imagenet}",
    ]
    code, out, _ = planned(capsys, *losses)
    assert code == 0
    assert "rkd         angles between 256 samples: every rank gathers the features" in out
    assert line_of(out, "dist").startswith("correlations over 256 samples: five sums a class are added over ranks")
    for name in ("sp", "pkt", "cc", "cka", "rkd"):
        assert line_of(out, name).startswith("relations of 256 samples, 32 on each of 8 ranks, once a step"), name
    assert "pkt         layer4 512×7×7  ←  layer4 512×7×7   weight·B/reference_batch = 30000 · 256 / 64 = 120000" in out
    # CKA and RKD subtract the mean of the features, which then travel in float32.
    found = [line for line in out.splitlines() if line.startswith("pair ")]
    assert [line.count("2 bytes each") for line in found] == [2, 2, 2, 0, 0]
    assert "cc          layer4 512×7×7  ←  layer4 512×7×7   CC 1" in out


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
    assert "relations of 2,048 samples, 256 on each of 8 ranks, once a step" in out
    assert line_of(out, "grid").startswith("8 × 1 × 1: ")
    assert "the recipe asks for it" in line_of(out, "grid")
    assert line_of(out, "gather") == "this grid"
    assert "(twice, for relations over micro-steps)" in out
    _, out, _ = planned(capsys, *arguments, "losses.sp.batch=micro")
    assert "relations of 512 samples, 64 on each of 8 ranks, 4 times a step" in out
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
        (
            ["losses.sp.grid=[2, 1, 2]"],
            "dkd: losses.sp.grid: grid=[2, 1, 2] is for 4 ranks, and 8 ranks share a batch here",
        ),
        (
            ["--nodes", "64", "train.global_batch=4096", "losses.rkd={preset: paper, pairs: [[layer4, layer4]]}"],
            "dkd: losses.rkd.scope: RKD's angles are counted in B³, and B = 4,096 samples are above 2,048",
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
