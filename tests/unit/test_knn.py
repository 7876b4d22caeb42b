"""k-NN accuracy over frozen features, against the plain formula on all images at once."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from few_images import write_images
from test_evaluation import recipe_in
from threaded_ranks import on_ranks

import dkd
from dkd.config.schema import KnnSection
from dkd.data import EvaluationLoader, build_pipeline, open_source
from dkd.global_batch import neighbours
from dkd.global_batch.neighbours import nearest
from dkd.models import ModelSpec, TapError, build_model, stated_class_count
from dkd.models.feature_reader import FeatureReader, feature_width, find_head, pool
from dkd.training.knn import measure_knn, rank_classes


def plain_neighbours(queries, bank, k):
    """Return similarities and places: of equal similarities, the smaller place first."""
    similarities = (queries.double().numpy() @ bank.double().numpy().T).astype(np.float32)
    order = [sorted(range(len(bank)), key=lambda i, row=row: (-row[i], i))[:k] for row in similarities]
    return np.take_along_axis(similarities, np.array(order), 1), np.array(order)


def plain_ranking(similarities, labels, classes, temperature):
    """Return the five classes with most votes of each query; of equally many votes, the smaller class first."""
    rows = []
    for row, voters in zip(similarities.astype(np.float64), labels, strict=True):
        votes = [0.0] * classes
        for similarity, label in zip(row, voters, strict=True):
            votes[label] += math.exp((similarity - row[0]) / temperature)
        ranked = sorted(range(classes), key=lambda c, votes=votes: (-votes[c], c))[:5]
        rows.append([c if votes[c] > 0 else -1 for c in ranked])
    return rows


@pytest.fixture
def vectors():
    """Queries and a bank of few different numbers, so that many similarities are equal, some of them negative."""
    generator = torch.Generator().manual_seed(4)
    bank = torch.randint(-1, 2, (300, 3), generator=generator).float()
    queries = torch.randint(-1, 2, (50, 3), generator=generator).float()
    labels = torch.randint(0, 7, (300,), generator=generator)
    return queries, bank, labels


@pytest.mark.parametrize("k", [1, 7, 20, 300, 1000])
def test_neighbours_are_those_of_a_full_sort_with_ties_by_place(vectors, monkeypatch, k):
    queries, bank, _ = vectors
    wanted = plain_neighbours(queries, bank, k)
    for rows in (16, 8192):
        monkeypatch.setattr(neighbours, "BANK_ROWS", rows)
        similarities, places = nearest(queries, bank, torch.arange(300), k)
        assert places.tolist() == wanted[1].tolist()
        assert np.array_equal(similarities.numpy(), wanted[0])


def test_similarities_of_every_size_and_sign_keep_their_bits():
    bank = torch.tensor([[1.0], [-1.0], [1e-30], [-1e-30], [0.0], [0.5], [math.nan], [-0.25]])
    similarities, places = nearest(torch.ones(1, 1), bank, torch.arange(8), 8)
    assert places.tolist() == [[0, 5, 2, 4, 3, 7, 1, 6]]  # a number that is none comes last
    assert similarities[0, :7].tolist() == torch.tensor([1, 0.5, 1e-30, 0, -1e-30, -0.25, -1]).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 1024])
def test_ranks_with_uneven_parts_find_the_same_neighbours(vectors, monkeypatch, world, rows):
    queries, bank, _ = vectors
    queries, k = queries[:11] if rows == 1 else queries, 9
    wanted = plain_neighbours(queries, bank, k)
    monkeypatch.setattr(neighbours, "QUERY_ROWS", rows * world)
    monkeypatch.setattr(neighbours, "BANK_ROWS", 13)
    # The places of a rank need not be neighbours; the last rank has fewer rows than k, and no query.
    owners = torch.arange(300) % max(1, world - 1)
    owners[::60] = world - 1
    askers = torch.arange(len(queries)) * max(1, world - 1) // len(queries)

    def own(rank, group):
        places = torch.arange(300)[owners == rank]
        turns = []
        found = nearest(queries[askers == rank], bank[places], places, k, group, turns.append)
        return *found, turns

    results = on_ranks(world, own)
    assert torch.cat([places for _, places, _ in results]).tolist() == wanted[1].tolist()
    assert np.array_equal(torch.cat([similarities for similarities, _, _ in results]).numpy(), wanted[0])
    assert len({len(turns) for _, _, turns in results}) == 1  # no rank takes a turn that others do not


def test_votes_are_those_of_plain_loops_with_ties_by_class(vectors):
    queries, bank, labels = vectors
    for k, temperature in ((20, 0.07), (5, 1.0), (20, 1e-4)):
        similarities, places = nearest(queries, bank, torch.arange(300), k)
        found = rank_classes(similarities, labels[places], 7, temperature)
        assert found.tolist() == plain_ranking(similarities.numpy(), labels[places].tolist(), 7, temperature)
    assert rank_classes(torch.ones(1, 2), torch.tensor([[3, 1]]), 9, 1.0).tolist() == [[1, 3, -1, -1, -1]]


# --- Features


def test_the_head_of_models_is_found_and_its_input_read():
    for name, path, width in (("resnet8", "fc", 64), ("torchvision/vit_b_16", "heads.head", 768)):
        spec = ModelSpec(name, 10)
        assert find_head(spec) == path
        assert feature_width(spec, None, 224 if "vit" in name else 32) == width
    spec = ModelSpec("resnet8", 10)
    model, images = build_model(spec).eval(), torch.randn(3, 3, 16, 16)
    whole, tapped = FeatureReader(model, spec, None), FeatureReader(model, spec, "layer3")
    with whole.reading(), tapped.reading(), torch.no_grad():
        logits = model(images)
        features = whole.take()
        assert torch.allclose(model.fc(features), logits, atol=1e-6)
        assert torch.allclose(tapped.take(), features, atol=1e-6)
    model(images)  # read by nobody
    with whole.reading(), pytest.raises(TapError, match="fired 0 times in one forward"):
        whole.take()
    with pytest.raises(TapError, match=r"'layer9' is not a module of CifarResNet; did you mean layer"):
        FeatureReader(model, spec, "layer9")
    with whole.reading():
        model(images)
        model.fc(features)
        with pytest.raises(TapError, match="fired 2 times in one forward"):
            whole.take()


def test_maps_and_tokens_are_averaged_over_positions():
    x = torch.randn(2, 5, 4, 4)
    wanted = x.mean((2, 3))
    for feature in (x, x.permute(0, 2, 3, 1), x.flatten(2).transpose(1, 2), wanted):
        assert torch.allclose(pool(feature), wanted, atol=1e-6)


# --- Runs


def plain_accuracy(student, train, queries, k, temperature, normalize=None):
    """top-1 and top-5 of a student's features of two sources, on all images at once."""
    pipeline = build_pipeline("digits", image_size=8)

    @torch.no_grad()
    def features(source):
        pixels = pipeline.validation(torch.stack([source.image(i) for i in range(len(source))]))
        read = []
        hook = student.fc.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        student((normalize or pipeline.normalize)(pixels))
        hook.remove()
        return torch.nn.functional.normalize(read[0].double(), dim=1).float()

    similarities, places = plain_neighbours(features(queries), features(train), k)
    ranked = plain_ranking(similarities, train.labels[places].tolist(), 10, temperature)
    top1 = np.mean([row[0] == label for row, label in zip(ranked, queries.labels.tolist(), strict=True)])
    top5 = np.mean([label in row for row, label in zip(ranked, queries.labels.tolist(), strict=True)])
    return top1, top5


def neighbours_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["evaluation"]["steps"]: line["evaluation"].get("knn_top1") for line in lines if "evaluation" in line}


def test_a_run_measures_its_average_on_its_own_data(tmp_path, capsys):
    train = {"epochs": 2, "global_batch": 448, "max_steps": 6, "ema": {"decay": 0.5}, "precision": "fp32"}
    values = recipe_in(tmp_path / "run", train=train, evaluation={"knn": {"k": 15, "temperature": 0.1}, "batch": 100})
    result = dkd.train(values)
    knn = result.evaluation.knn
    parts = open_source("digits", training=True), open_source("digits", training=False)
    top1, top5 = plain_accuracy(dkd.load_student(result.run_dir), *parts, 15, 0.1)
    assert (knn.samples, knn.bank, knn.k) == (449, 1348, 15)
    assert knn.top1 == pytest.approx(top1, abs=1.5 / 449)  # bits of the forward depend on the batch
    assert knn.top5 == pytest.approx(top5, abs=1.5 / 449)
    assert f"k-NN of 15 among 1348 images: top-1 {knn.top1:.4f}" in capsys.readouterr().err
    assert neighbours_of(result.run_dir) == {3: pytest.approx(top1, abs=1), 6: knn.top1}
    facts = json.loads((result.run_dir / "student.json").read_text())["evaluation"]
    assert (facts["knn_top1"], facts["knn_top5"]) == (knn.top1, knn.top5)
    from dkd.cli import main

    assert main(["compare", str(result.run_dir)]) == 0
    assert "k-NN top-1" in capsys.readouterr().out
    assert main(["report", str(result.run_dir), "--images", "20"]) == 0
    page = (result.run_dir / "report.html").read_text()
    assert f"<td>{100 * knn.top1:.2f}" in page.split("k-NN accuracy of the student")[1]


def test_images_without_labels_are_judged_by_others_with_labels(tmp_path):
    """Labels of both sets by name, in other orders; a tap in place of the head; every second epoch."""
    from test_own_images import NAMES, write_folder

    write_folder(tmp_path / "bank", each=12)
    write_folder(tmp_path / "queries", NAMES, each=4)
    shutil.rmtree(tmp_path / "queries" / NAMES[0])  # the labels of the others begin at 0 there
    knn = {"train": f"folder:{tmp_path / 'bank'}", "validation": f"folder:{tmp_path / 'queries'}", "tap": "layer2"}
    values = recipe_in(
        tmp_path / "run",
        data={"labels": False},
        teacher={"name": "wrn_16_1", "weights": "random"},
        losses={"ce": None, "kd": {"alpha": 1}},
        train={"global_batch": 448, "epochs": 3, "max_steps": None},
        evaluation={"knn": {**knn, "k": 5, "every_epochs": 2}},
    )
    result = dkd.train(values)
    assert result.evaluation.top1 is None
    assert (result.evaluation.knn.samples, result.evaluation.knn.bank) == (12, 48)
    assert result.evaluation.knn.top5 is None  # of four classes
    assert result.evaluation.knn.top1 > 0.8  # classes have colours of their own
    assert {steps: value is not None for steps, value in neighbours_of(result.run_dir).items()} == {
        3: False, 6: True, 9: True,
    }  # fmt: skip


def test_the_labels_of_the_bank_leave_those_of_evaluations_alone(tmp_path):
    """data.validation has labels in the order of data.train; the bank is named, and has another order."""
    from test_own_images import write_folder

    write_folder(tmp_path / "train", each=8)
    write_folder(tmp_path / "validation", each=3)
    write_folder(tmp_path / "bank", each=3)
    (tmp_path / "bank" / "ant").rename(tmp_path / "bank" / "aardvark")
    write_folder(tmp_path / "bank" / "ant" / "more", ("of",), each=3)
    data = {key: f"folder:{tmp_path / key}" for key in ("train", "validation")}
    data["classes"] = None
    train = {"global_batch": 16, "max_steps": 2}
    plain = dkd.train(recipe_in(tmp_path / "plain", data=data, train=train))
    knn = {"train": f"folder:{tmp_path / 'bank'}"}
    found = dkd.train(recipe_in(tmp_path / "run", data=data, train=train, evaluation={"knn": knn}))
    assert found.evaluation == plain.evaluation
    assert found.evaluation.knn.bank == 15


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"knn": {"tap": "layer9"}}}, "evaluation.knn.tap: 'layer9' is not a module"),
        ({"evaluation": {"knn": {"k": 0}}}, "evaluation.knn.k: must be greater than 0"),
        ({"evaluation": {"knn": {}}, "data": {"validation": None}}, "evaluation.knn: needs evaluations"),
        ({"evaluation": {"knn": {"every_epochs": 3}, "every_epochs": 2}}, "knn.every_epochs: 3 is no multiple"),
        ({"evaluation": {"knn": {"train": "no/such/*.tar"}}}, "evaluation.knn.train: no file matches"),
        ({"evaluation": {"knn": {"label_column": "y"}}}, "knn.label_column: belongs to evaluation.knn.train"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path, sections, message):
    with pytest.raises(dkd.InputError, match=message.replace(".", r"\.").replace("*", r"\*")):
        dkd.train(recipe_in(tmp_path / "run", **sections))


def test_a_bank_of_the_same_images_is_refused(tmp_path):
    from test_own_images import write_folder

    path = f"folder:{write_folder(tmp_path / 'images', each=3)}"
    with pytest.raises(dkd.InputError, match=r"evaluation\.knn\.validation: its images are those among which"):
        dkd.train(recipe_in(tmp_path / "run", evaluation={"knn": {"train": path, "validation": path}}))


def test_a_compiled_student_is_read_without_its_compiled_forward(tmp_path):
    train = {"max_steps": 2, "compile": {"student": True}}
    result = dkd.train(recipe_in(tmp_path / "run", train=train, evaluation={"knn": {}}))
    assert result.evaluation.knn.samples == 449


def test_the_command_measures_a_finished_student_where_it_is_asked_to(tmp_path, capsys):
    from dkd.cli import main

    values = recipe_in(tmp_path / "run", evaluation={"knn": {"k": 15}, "batch": 100})
    result = dkd.train(values)
    run = str(result.run_dir)
    assert "knn_top1" not in dkd.evaluate(run, ["evaluation.batch=100"]).facts()
    again = dkd.evaluate(run, ["evaluation.knn.k=15", "evaluation.batch=100"]).result
    assert again.knn == result.evaluation.knn
    assert main(["evaluate", run, "evaluation.knn={k: 3, tap: layer2}"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["knn_top1"] == pytest.approx(1, abs=1)
    assert "k-NN of 3 among 1348 images: top-1" in printed.err
    assert main(["evaluate", run, "evaluation.knn={tap: layer9}"]) == 2
    assert "evaluation.knn.tap: 'layer9' is not a module" in capsys.readouterr().err
    # A student of images without labels, without its teacher.
    other = recipe_in(
        tmp_path / "other",
        data={"labels": False},
        teacher={"name": "wrn_16_1", "weights": "random"},
        losses={"ce": None, "kd": {"alpha": 1}},
    )
    run = str(dkd.train(other).run_dir)
    found = dkd.evaluate(run, ["evaluation.knn={train: digits, validation: digits}"]).result
    assert (found.top1, found.agreement) == (None, None)
    assert found.knn.samples == 449
    assert main(["evaluate", run, "evaluation.knn={train: 'python:a:b', validation: digits}"]) == 2
    assert "evaluation.knn.train: 'python:a:b' is code to be imported and run" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_cannot_be_read_do_not_vote_and_are_not_asked(tmp_path, streaming):
    """In parquet files, read by worker processes where they are streamed."""
    write_images(tmp_path / "bank.parquet", 60, pixels=8, row_group=8, seed=1, broken=[(5, "truncated")])
    write_images(tmp_path / "queries.parquet", 21, pixels=8, row_group=8, seed=2, broken=[(3, "no image")])
    data = {"streaming": streaming, "on_error": "skip", "train": str(tmp_path / "train.parquet")}
    write_images(tmp_path / "train.parquet", 64, pixels=8, row_group=8)
    knn = {"train": str(tmp_path / "bank.parquet"), "validation": str(tmp_path / "queries.parquet"), "k": 100}
    values = recipe_in(tmp_path / "run", data=data, train={"global_batch": 16, "max_steps": 1}, evaluation={"knn": knn})
    found = dkd.train(values).evaluation.knn
    assert (found.samples, found.bank, found.k, found.unreadable) == (20, 59, 59, 2)
    values["data"]["on_error"] = "raise"
    with pytest.raises(dkd.TrainingError, match=r"evaluation after step 1: .*image 5"):
        dkd.train({**values, "run": {**values["run"], "dir": str(tmp_path / "other")}})


def test_labels_that_the_bank_does_not_have_are_refused(tmp_path):
    from test_own_images import write_rows

    bank = write_rows(tmp_path / "bank.parquet", [0, 1, 2] * 4)
    for labels, message in (
        ([0, 3], r"evaluation\.knn\.validation: labels go up to 3, but the images that vote have the classes 0 … 2"),
        ([-1, 0], r"evaluation\.knn\.validation: labels go from -1 to 0; a label is the index of a class"),
    ):
        queries = write_rows(tmp_path / f"queries{labels[1]}.parquet", labels)
        with pytest.raises(dkd.InputError, match=message):
            dkd.train(recipe_in(tmp_path / "run", evaluation={"knn": {"train": bank, "validation": queries}}))
    one = write_rows(tmp_path / "one.parquet", [0, 0])
    with pytest.raises(dkd.InputError, match=r"evaluation\.knn\.train: all images are of one class"):
        dkd.train(recipe_in(tmp_path / "run", evaluation={"knn": {"train": one, "validation": bank}}))
    found = dkd.train(recipe_in(tmp_path / "other", evaluation={"knn": {"train": bank, "validation": one}}))
    assert found.evaluation.knn.samples == 2


def test_neighbours_may_be_all_that_is_measured(tmp_path):
    values = recipe_in(
        tmp_path / "run",
        data={"labels": False},
        teacher={"name": "wrn_16_1", "weights": "random"},
        losses={"ce": None, "kd": {"alpha": 1}},
        evaluation={"agreement": False, "knn": {"train": "digits", "validation": "digits"}},
    )
    found = dkd.train(values).evaluation
    assert (found.top1, found.agreement, found.score) == (None, None, None)
    assert found.knn.samples == 449


@pytest.mark.parametrize("stop_at", [0, 8])
def test_a_measurement_ends_where_it_is_asked_to(stop_at):
    sources = [open_source("digits", training=training) for training in (True, False)]
    bank, queries = (EvaluationLoader(source, lambda image: image, 100) for source in sources)
    read = []

    def features(batch):
        read.append(batch.valid)
        return batch.images.flatten(1).float()

    cpu, asked = torch.device("cpu"), []
    assert (
        measure_knn(features, bank, queries, 10, KnnSection(), cpu, False, lambda n: asked.append(n) or n >= stop_at)
        is None
    )
    assert len(read) == stop_at
    found = measure_knn(features, bank, queries, 10, KnnSection(), cpu, False, lambda n: asked.append(n))
    assert found.top1 > 0.95  # pixels are features of digits
    assert asked[stop_at + 1 :] == list(range(len(bank) + len(queries) + 1))  # and one turn


def test_teachers_state_their_number_of_classes():
    assert stated_class_count(ModelSpec("torchvision/resnet18", 2), "IMAGENET1K_V1") == 1000
    assert stated_class_count(ModelSpec("torchvision/resnet18", 2), "random") is None
    pytest.importorskip("timm")
    assert stated_class_count(ModelSpec("timm/vit_tiny_patch16_224", 2), "pretrained") == 1000
    assert (
        stated_class_count(ModelSpec("timm/vit_small_patch14_dinov2.lvd142m", 2), "pretrained") is None
    )  # it has no head
    with pytest.raises(TapError, match="no single module is the head of 'timm/deit_tiny_distilled"):
        find_head(ModelSpec("timm/deit_tiny_distilled_patch16_224", 10))
