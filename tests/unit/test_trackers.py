"""Where trackers write: into the run directory, and never into the current folder."""

import sys
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import ProjectConfiguration

from dkd.config import load_recipe
from dkd.engines.trackers import Trackers, log_with, tracker_arguments
from dkd.library_internals.accelerate import fresh_settings


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    found = load_recipe("configs/quickstart.yaml", [f"run.dir={tmp_path / 'run'}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return found


def with_mlflow(monkeypatch, is_set):
    uris = []
    module = SimpleNamespace(is_tracking_uri_set=lambda: is_set, set_tracking_uri=uris.append)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return uris


def with_swanlab(monkeypatch, init):
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(init=init))


def arguments(run_dir, name, again=False):
    return tracker_arguments([name], run_dir, "identity", again, 7).get(name, {})


def test_tensorboard_writes_into_the_run_directory(recipe, tmp_path):
    run = tmp_path / "run"
    with fresh_settings():
        accelerator = Accelerator(
            cpu=True,
            log_with=log_with(["tensorboard"], "quickstart", run),
            project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")),
        )
        trackers = Trackers(accelerator)
        trackers.start(recipe, "identity", False, 0)
        assert trackers.log({"loss": 1.0}, 1) is None
        assert trackers.finish() == []
    assert list((run / "tensorboard" / "quickstart").glob("events.out.tfevents.*"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_resumed_run_continues_in_its_trackers(tmp_path):
    assert arguments(tmp_path, "tensorboard") == {}
    assert arguments(tmp_path, "tensorboard", again=True) == {"purge_step": 8}
    assert arguments(tmp_path, "wandb") == {"id": "identity", "resume": "allow", "dir": str(tmp_path)}
    assert [arguments(tmp_path, "dvclive", again)["resume"] for again in (False, True)] == [False, True]


@pytest.mark.parametrize("name", ["wandb", "dvclive", "mlflow", "swanlab"])
def test_each_tracker_of_accelerate_takes_its_arguments(tmp_path, monkeypatch, name):
    with_mlflow(monkeypatch, is_set=False)
    with_swanlab(monkeypatch, lambda *, log_dir=None, project=None: None)
    given = arguments(tmp_path, name)
    paths = [value for value in given.values() if isinstance(value, str) and "/" in value]
    assert paths
    assert all(str(tmp_path) in path for path in paths), given
    LOGGER_TYPE_TO_CLASS[name]("run", **given)


def test_aim_has_a_folder_of_its_own(tmp_path):
    first, second = log_with(["tensorboard", "aim"], "run", tmp_path)
    assert first == "tensorboard"
    assert (second.name, second.aim_repo_path) == ("aim", str(tmp_path / "aim"))


def test_swanlab_is_given_its_folder_by_the_name_that_it_has_in_its_release(tmp_path, monkeypatch):
    with_swanlab(monkeypatch, lambda project=None, logdir=None: None)
    assert arguments(tmp_path, "swanlab") == {"logdir": str(tmp_path / "swanlab")}


@pytest.mark.parametrize("is_set", [False, True])
def test_mlflow_writes_where_the_user_has_said_or_into_the_run_directory(recipe, tmp_path, monkeypatch, is_set):
    uris, run = with_mlflow(monkeypatch, is_set), tmp_path / "run"
    started = {}

    class Recording:
        is_main_process, trackers = True, ()

        def init_trackers(self, name, config, init_kwargs):
            started.update(init_kwargs)

    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update={"trackers": ["mlflow"]})})
    Trackers(Recording()).start(changed, "identity", False, 0)
    if is_set:
        assert (uris, started) == ([], {})
    else:
        assert uris == [f"sqlite:///{run}/mlflow/mlflow.db"]
        assert started == {"mlflow": {"logging_dir": f"file://{run}/mlflow/artifacts"}}
        assert (run / "mlflow").is_dir()


@pytest.mark.parametrize("name", ["comet_ml", "clearml", "trackio"])
def test_trackers_that_write_into_no_folder_here_get_no_argument(tmp_path, name):
    assert arguments(tmp_path, name) == {}
