"""`dkd report` on runs that were made here, opened in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from few_images import encoded
from launched import accelerate_command, run

from dkd.cli import main
from dkd.config import load_recipe, recipe_to_yaml
from dkd.models import ModelSpec, build_model, save_student

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["run.trackers=[]", "train.epochs=2", "train.max_steps=30", "data.image_size=16", "evaluation.every_epochs=1"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a student taught on 2 processes, and the student alone; the second epoch is not finished."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = ["student.name=wrn_16_1", f"run.dir={folder}/teacher", "train.global_batch=64"]
    assert main(["train", "configs/quickstart_teacher.yaml", *SMALL, *teacher]) == 0
    taught = ["configs/quickstart.yaml", *SMALL, f"run.dir={folder}/taught", "teacher.name=wrn_16_1"]
    taught += [f"teacher.weights={folder}/teacher/student.safetensors", "losses.kd.alpha={start: 0.9, end: 0.1}"]
    run(accelerate_command(2, "-m", "dkd", "train", *taught))
    alone = [f"run.dir={folder}/alone", "teacher=null", "losses.at=null", "losses.sp=null", "losses.kd=null"]
    assert main(["train", "configs/quickstart.yaml", *SMALL, *alone]) == 0
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "compared.html"
    assert main(["report", str(runs / "taught"), str(runs / "alone"), "--output", str(output), "--images", "200"]) == 0
    return output


def test_the_page_holds_every_picture_and_loads_nothing(page):
    html = page.read_text()
    pictures = sorted(path.stem for path in (page.parent / "compared_pictures").glob("*.png"))
    assert html.count('<img src="data:image/png;base64,') == len(pictures) == html.count("<img")
    for wanted in (
        "accuracy",
        "accuracy_by_class",
        "throughput",
        "taught_loss_terms",
        "taught_schedules",
        "taught_attention_maps",
    ):
        assert wanted in pictures
    for pair in ("layer1_block1", "layer2_block2", "layer3_block3"):
        assert f"taught_Gram_matrices_{pair}" in pictures
        assert f"alone_channel_activations_{pair}" in pictures
    # Nothing that a browser would fetch: no scripts, style sheets, or addresses.
    assert not re.search(r"<script|<link rel=.stylesheet|https?://|url\(", html)


def test_pictures_of_two_pairs_of_one_tap_and_of_names_alike_do_not_collide(runs, tmp_path):
    twice = tmp_path / "é a"
    shutil.copytree(runs / "taught", twice)
    recipe = (twice / "recipe.yaml").read_text()
    at = "    - - layer1\n      - block1\n    - - layer2\n      - block2\n"
    assert at in recipe
    (twice / "recipe.yaml").write_text(recipe.replace(at, at + "    - - layer2\n      - block3\n"))
    assert (
        main(["report", str(twice), str(runs / "taught"), "--output", str(tmp_path / "x.html"), "--images", "50"]) == 0
    )
    pictures = {path.stem for path in (tmp_path / "x_pictures").iterdir()}
    assert {"é_a_Gram_matrices_layer2_block2", "é_a_Gram_matrices_layer2_block3"} <= pictures
    assert main(["report", str(twice), str(twice)]) == 2


def test_the_table_compares_runs_of_any_number_of_ranks(page):
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page.read_text().partition("</table>")[0])
    (taught, alone) = (row.split("</td><td>") for row in rows)
    assert (taught[0], taught[1], taught[2], alone[2]) == ("taught", "resnet8", "wrn_16_1", "none")
    assert "AT β 1000" in taught[3]
    assert "SP γ 3000 at 128" in taught[3]
    assert "KD α 0.9 → 0.1, T 4" in taught[3]
    assert alone[3] == "CE 1"
    assert [row[9] for row in (taught, alone)] == ["2", "1"]


def test_numbers_of_the_page_are_those_of_the_runs(page, runs):
    described = json.loads((runs / "taught" / "student.json").read_text())
    assert f"{100 * described['evaluation']['top1']:.2f}\N{NO-BREAK SPACE}%" in page.read_text()


def test_a_student_without_taps_is_looked_at_with_those_of_another_run(page):
    assert "this run taps no features; those of taught are shown, with its teacher" in page.read_text()


def test_accuracies_of_classes_and_gram_matrices_are_the_students(runs):
    """Against the definitions, computed here from the exported student."""
    import numpy as np
    import torch

    from dkd import load_student
    from dkd.data import build_pipeline, open_source
    from dkd.report.figures import accuracy_by_class
    from dkd.report.observations import observe
    from dkd.report.run_files import read_run

    seen = observe(read_run(runs / "taught", "taught"), [], 449)
    source, pipeline = open_source("digits", training=False), build_pipeline("digits", image_size=16)
    student = load_student(runs / "taught")
    images = pipeline.normalize(pipeline.validation(torch.stack([source.image(i) for i in range(449)])))
    with torch.no_grad():
        predicted = student(images).argmax(1).numpy()
    wanted = [100 * np.mean(predicted[source.labels == label] == label) for label in range(10)]
    assert accuracy_by_class(seen, seen.student) == pytest.approx(wanted)
    shown = np.concatenate([np.flatnonzero(source.labels == label)[:20] for label in range(10)])
    features = {}
    hook = student.layer2.register_forward_hook(lambda module, inputs, output: features.update(layer2=output))
    with torch.no_grad():
        student(images[shown])
    hook.remove()
    rows = features["layer2"].flatten(1).double().numpy()
    gram = rows @ rows.T
    assert seen.student.gram["layer2"] == pytest.approx(gram / np.linalg.norm(gram, axis=1, keepdims=True), abs=1e-4)
    assert seen.student.attention["layer2"] == pytest.approx(
        features["layer2"].square().sum(1).numpy(), rel=1e-4, abs=1e-5
    )
    assert seen.student.channels["layer2"] == pytest.approx(features["layer2"].mean((2, 3)).numpy(), rel=1e-4, abs=1e-5)


def test_runs_that_lack_something_are_reported_with_a_note(runs, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(runs / "taught", broken)
    (broken / "student.safetensors").unlink()
    assert main(["report", str(broken)]) == 0
    assert "there is no finished student yet" in (broken / "report.html").read_text()
    recipe = (broken / "recipe.yaml").read_text().replace("teacher/student.safetensors", "gone.safetensors")
    (broken / "recipe.yaml").write_text(recipe)
    shutil.copy(runs / "taught" / "student.safetensors", broken)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # being written
    assert main(["report", str(broken), "--output", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "pictures are missing: no such file" in html
    assert "student layer1" not in capsys.readouterr().err


HOSTILE = ("$\\frac{1$", "_hidden", "a$b$c", "red\x1b[31m\nline")


def student_of(folder, classes=("0", "1"), name="resnet8"):
    """A run directory as a finished student leaves it, which validates on images in folders of those names."""
    data, run = folder / "data", folder / "run"
    for number, label in enumerate(classes):
        (data / label).mkdir(parents=True)
        (data / label / "0.png").write_bytes(encoded(np.full((16, 16, 3), 40 * number, dtype=np.uint8)))
    alone = [
        "teacher=null",
        "losses={}",
        f"student.name={name}",
        f"data.classes={len(classes)}",
        f"run.dir={run}",
        "train.precision=fp32",
    ]
    recipe = load_recipe(
        ROOT / "configs/quickstart.yaml", [*alone, f"data.validation=folder:{data}", "data.image_size=16"]
    )
    spec = ModelSpec("resnet8", len(classes))
    save_student(run, spec, build_model(spec).state_dict(), {"image_size": 16})
    (run / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    lines = [
        {"step": s, "loss": 1.0 / s, "ce": 1.0 / s, "weight/ce": 1.0, "lr": 0.1, "images_per_second": 10.0}
        for s in (1, 2, 3)
    ]
    lines.append({"evaluation": {"steps": 3, "epoch": 1.0, "top1": 0.5}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_names_are_no_mathematics_and_stay_in_legends(tmp_path, capsys, monkeypatch):
    from dkd.report import figures

    legends, ticks = [], []
    hidden = figures.add_legend
    monkeypatch.setattr(
        figures,
        "add_legend",
        lambda axis, drawn, **place: (hidden(axis, drawn, **place), legends.append(axis.get_legend())),
    )
    grid = figures.new_grid
    monkeypatch.setattr(figures, "new_grid", lambda *a, **k: (made := grid(*a, **k), ticks.extend(made[1]))[0])
    run = student_of(tmp_path / "one", HOSTILE)
    copies = []
    for name in ("_a", "$x^$"):
        copies.append(tmp_path / name)
        shutil.copytree(run, copies[-1])
    assert main(["report", *map(str, copies), "--output", str(tmp_path / "r.html")]) == 0
    shown = {text.get_text() for legend in legends for text in legend.get_texts()}
    assert {"_a", "$x^$", "cross-entropy"} <= shown
    labels = {label.get_text() for axis in ticks for label in axis.get_xticklabels()}
    assert {"$\\frac{1$", "_hidden", "a$b$c"} <= labels
    assert any(label.startswith("red\\x1b[31m") for label in labels)
    # An axis of powers of ten is labelled without mathematics.
    powers = {label.get_text() for axis in ticks if axis.get_yscale() == "log" for label in axis.get_yticklabels()}
    assert powers
    assert not any("$" in label for label in powers)
    assert "\x1b" not in capsys.readouterr().out


def test_only_pictures_of_a_report_make_room_for_the_next(tmp_path, capsys):
    run = student_of(tmp_path)
    pictures = run / "report_pictures"
    assert main(["report", str(run)]) == 0
    (pictures / "accuracy.png").rename(pictures / "of_an_earlier_report.png")
    (pictures / "mine.png").write_bytes(b"\x89PNG of somebody else")
    (pictures / "mine.txt").write_text("notes")
    assert main(["report", str(run)]) == 0
    names = {path.name for path in pictures.iterdir()}
    assert {"mine.png", "mine.txt", "accuracy.png", "schedules.png"} <= names
    assert "of_an_earlier_report.png" not in names
    (pictures / "schedules.png").write_bytes(b"\x89PNG of somebody else")
    before = {path.name: path.read_bytes() for path in pictures.iterdir()}
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "schedules.png' exists, and no report wrote it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before


def test_a_report_follows_no_links(tmp_path, capsys):
    run = student_of(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (run / "report.html").symlink_to(precious)
    assert main(["report", str(run)]) == 0
    assert "<!DOCTYPE html>" in (run / "report.html").read_text()
    assert not (run / "report.html").is_symlink()
    assert precious.read_text() == "precious"
    assert (run / "report.html").stat().st_mode & 0o777 == (run / "metrics.jsonl").stat().st_mode & 0o777
    shutil.rmtree(run / "report_pictures")
    (run / "report_pictures").symlink_to(tmp_path)
    assert main(["report", str(run)]) == 2
    assert "is a link" in capsys.readouterr().err


def test_a_student_that_fails_leaves_a_note(tmp_path, monkeypatch):
    """And code of the user's own is named in it."""
    run = student_of(tmp_path)
    (tmp_path / "broken_code.py").write_text(
        "from dkd.models import ModelSpec, build_model\n"
        "def net(num_classes):\n"
        "    model = build_model(ModelSpec('resnet8', num_classes))\n"
        "    model.register_forward_pre_hook(lambda *_: {}['missing'])\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    description = json.loads((run / "student.json").read_text())
    description["architecture"]["name"] = "broken_code:net"
    (run / "student.json").write_text(json.dumps(description))
    assert main(["report", str(run), "--trust-code"]) == 0
    html = (run / "report.html").read_text()
    assert "pictures are missing: &#x27;broken_code:net&#x27; fails: KeyError: &#x27;missing&#x27;" in html
    assert "broken_code.py:4" in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "is no run directory"), (["nowhere", "--output", "page.pdf"], "must end in .html")],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium): the page is not opened in a browser"
)
def test_a_browser_loads_every_picture_and_asks_for_nothing_else(page, tmp_path):
    """The page with one script added, that says what the browser has loaded."""
    script = """<script>addEventListener("load", () => {
      const images = [...document.images];
      const found = {
        images: images.length,
        broken: images.filter(i => !i.complete || i.naturalWidth < 200).map(i => i.alt),
        untitled: images.filter(i => !i.alt).length,
        fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
        wide: document.documentElement.scrollWidth > innerWidth,
      };
      document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
    });</script>"""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", script + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=1240,900",
    ]
    result = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = re.findall(r'<pre id="found">(.*?)</pre>', result.stdout)[-1]  # the script's own text comes before it
    pictures = len(list((page.parent / "compared_pictures").glob("*.png")))
    assert json.loads(found) == {"images": pictures, "broken": [], "untitled": 0, "fetched": [], "wide": False}
