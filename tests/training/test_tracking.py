"""Trackers: which there are, what is refused before a run, and what one of them is told of a run."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from align.errors import UserError
from align.recipe.trackers import PACKAGES, checked_trackers
from align.training.tracking import NAME_VARIABLES, PROJECT_VARIABLES, flat, run_name, set_names
from align.training.train import train

FAKE_WANDB = '''
"""Notes every call in order, as W&B's client would be called."""
import sys, types
calls = []
run = None

class Config(dict):
    def update(self, values, allow_val_change=False):
        dict.update(self, values)

class Run:
    def __init__(self, project, name):
        self.project, self.name, self.id, self.url, self.summary = project, name, "1", "", {}
    def _label(self, code): pass
    def log_artifact(self, own): calls.append(("artifact", own.files))

class Artifact:
    def __init__(self, name, type): self.name, self.files = name, []
    def add_file(self, path): self.files.append(path)

class Html:
    def __init__(self, text, inject): self.text = text

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

def init(project, name=None):
    global run
    run = Run(project, name)
    calls.append(("init", project, name))

def log(values): calls.append(("log", values))
def define_metric(*_, **__): pass
def watch(*_, **__): pass

def finish():
    global run
    calls.append(("finish", dict(run.summary)))
    run = None

config = Config()
for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["wandb.sdk.lib.config_util"].ConfigError = ValueError
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of W&B's name that notes what it is told."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in PROJECT_VARIABLES:  # what a run sets is gone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    import wandb

    yield wandb
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        del sys.modules[name]


def test_the_names_are_those_of_transformers():
    assert set(PACKAGES) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("wand", "did you mean `wandb`"),
        (["nothing_like_it"], "take azure_ml"),
        (["all", "wandb"], "stand alone"),
        (["clearml"], "pip install clearml"),
        ("azure_ml", "pip install azureml-sdk"),
        (3, "report_to"),
    ],
)
def test_what_cannot_work_is_refused_with_the_recipe(make_recipe, given, message, monkeypatch):
    monkeypatch.setattr("align.recipe.trackers._is_there", lambda module: False)
    with pytest.raises(UserError, match=message) as refused:
        make_recipe(train={"report_to": given})
    assert "train.report_to" in str(refused.value)


def test_what_stands_for_trackers(make_recipe):
    assert checked_trackers(["none"]) == () and checked_trackers(["all"]) == ("all",)
    assert make_recipe(train={"report_to": "none"}).train.report_to == ()
    assert make_recipe(train={"report_to": None}).train.report_to == ()
    assert make_recipe(train={"report_to": "all"}).train.report_to == ("all",)


def test_a_recipe_as_flat_keys():
    tree = {"task": "sft", "data": {"sources": [{"path": "a"}, {"path": "b"}], "limit": None}, "stop": ["x", "y"]}
    assert flat(tree, "recipe") == {
        "recipe.task": "sft",
        "recipe.data.sources.0.path": "a",
        "recipe.data.sources.1.path": "b",
        "recipe.data.limit": None,
        "recipe.stop": ["x", "y"],
    }


@pytest.mark.parametrize(
    ("path", "name"), [("runs/mine", "mine"), ("/a/b/online/iterations/002/train", "online-002"), ("train", "train")]
)
def test_the_name_of_a_run(path, name):
    assert run_name(Path(path)) == name


def tracked_recipe(make_recipe, **train_section):
    sampling = {"prompts": 2, "max_tokens": 4, "reward": {"name": "length", "max": 9}}
    return make_recipe("mine", train={"steps": 4, "eval_steps": 2, "epochs": 1} | train_section, sampling=sampling)


def test_a_tracker_is_told_recipe_curves_samples_and_final_figures(make_recipe, wandb):
    recipe = tracked_recipe(make_recipe, report_to="wandb", project="birds")
    summary = train(recipe).summary
    assert wandb.calls[0] == ("init", "birds", "mine")
    assert wandb.config["recipe.objective.0.name"] == "lambda"
    assert wandb.config["recipe.train.lists_per_step"] == recipe.train.lists_per_step
    json.dumps({key: value for key, value in wandb.config.items() if key.startswith("recipe.")})
    logs = [call[1] for call in wandb.calls if call[0] == "log"]
    heldout = [(values["train/global_step"], values["eval/ndcg"]) for values in logs if "eval/ndcg" in values]
    assert [step for step, _ in heldout] == [0, 2, 4, 4]
    assert heldout[0][1] == summary["eval_before"]["ndcg"] and heldout[-1][1] == summary["eval_after"]["ndcg"]
    assert logs[-3]["eval/sample_reward"] == summary["eval_after"]["sample_reward"]
    steps = [values["train/global_step"] for values in logs if "train/loss" in values]
    assert steps == [1, 2, 3, 4]
    (files,) = [call[1] for call in wandb.calls if call[0] == "artifact"]
    assert [Path(file).name for file in files] == ["report.html", "recipe.yaml", "summary.json", "metrics.jsonl"]
    assert logs[-1]["report"].text.startswith("<!doctype html>") and "NDCG" in logs[-1]["report"].text
    table = logs[-2]["samples"]
    assert table.columns == ["prompt", "before", "after", "reward_before", "reward_after"]
    assert table.data == [[sample[name] for name in table.columns] for sample in summary["samples"]]
    what, figures = wandb.calls[-1]
    assert what == "finish", "after the last figures, not with the last step"
    assert figures["summary/after/ndcg"] == summary["eval_after"]["ndcg"]
    assert figures["summary/train_seconds"] == summary["train_seconds"]


def test_trackers_change_no_figure(make_recipe, wandb):
    plain = train(tracked_recipe(make_recipe)).summary["eval_after"]
    again = train(make_recipe("other", **_sections(tracked_recipe(make_recipe, report_to=["wandb"])))).summary
    assert again["eval_after"] == plain


def _sections(recipe) -> dict:
    tree = recipe.model_dump(mode="json")
    return {name: tree[name] for name in ("train", "sampling")}


def test_the_users_own_project_stays(make_recipe, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "given")
    train(tracked_recipe(make_recipe, report_to="wandb"))
    assert wandb.calls[0] == ("init", "given", "mine")


def test_tensorboard_holds_recipe_curves_and_samples(make_recipe):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tracked_recipe(make_recipe, report_to="tensorboard")
    summary = train(recipe).summary
    (folder,) = {file.parent for file in Path(recipe.output).rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    heldout = [(event.step, event.value) for event in events.Scalars("eval/ndcg")]
    assert heldout[0] == (0, pytest.approx(summary["eval_before"]["ndcg"]))
    assert heldout[-1] == (4, pytest.approx(summary["eval_after"]["ndcg"]))
    (samples,) = events.Tensors("samples/text_summary")
    assert summary["samples"][0]["after"].split()[0] in samples.tensor_proto.string_val[0].decode()
    (told,) = events.Tensors("args/text_summary")
    assert json.loads(told.tensor_proto.string_val[0])["recipe.objective.0.name"] == "lambda"
    assert events.Scalars("summary/after/ndcg")[0].value == pytest.approx(summary["eval_after"]["ndcg"])


def test_a_tracker_that_fails_at_the_end_leaves_the_run_finished(make_recipe, wandb, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("no such host")

    monkeypatch.setattr(wandb, "Artifact", fail)
    result = train(tracked_recipe(make_recipe, report_to="wandb"))
    assert result.summary["steps"] == 4 and (result.path / "report.html").exists()
    assert "wandb was not told all of the run's end (ConnectionError: no such host)" in capsys.readouterr().err
    assert wandb.calls[-1][0] == "finish"


def test_names_are_each_runs_own_and_a_users_stay(monkeypatch):
    monkeypatch.setattr("align.training.tracking._set_here", {})
    for name in (*PROJECT_VARIABLES, *NAME_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("COMET_PROJECT_NAME", "theirs")
    for project, run in (("one", "first"), ("two", "second")):
        set_names(project, run)
        assert os.environ["MLFLOW_EXPERIMENT_NAME"] == project and os.environ["CLEARML_TASK"] == run
    assert os.environ["COMET_PROJECT_NAME"] == "theirs"


@pytest.fixture
def tracked(make_recipe, tmp_path, monkeypatch):
    """Runs with a tracker that is really installed, which writes below the folder that it works in."""

    def run(name: str, module: str):
        pytest.importorskip(module, reason=f"{name} is not installed")
        monkeypatch.chdir(tmp_path)
        return train(tracked_recipe(make_recipe, report_to=name, project="birds"))

    monkeypatch.setattr("align.training.tracking._set_here", {})
    for name in (*PROJECT_VARIABLES, *NAME_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return run


def test_mlflow_holds_recipe_curves_samples_and_files(tracked, tmp_path, monkeypatch):
    place = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = tracked("mlflow", "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(place)
    (run,) = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["recipe.objective.0.name"] == "lambda"
    assert run.data.metrics["summary/after/ndcg"] == result.summary["eval_after"]["ndcg"]
    history = client.get_metric_history(run.info.run_id, "eval_ndcg")
    assert (history[0].step, history[0].value) == (0, result.summary["eval_before"]["ndcg"])
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert names == {"report.html", "recipe.yaml", "summary.json", "metrics.jsonl", "samples.json"}


def test_comet_holds_curves_and_files(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    monkeypatch.setenv("COMET_API_KEY", "none")
    tracked("comet_ml", "comet_ml")
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        told = files.read("messages.json").decode()
    for word in ("report.html", "samples.csv", "summary/after/ndcg", "recipe.objective.0.name", "eval/ndcg"):
        assert word in told, word


def test_wandb_itself_holds_the_report_and_the_samples(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracked("wandb", "wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list((folder / "files" / "media" / "html").glob("report*.html"))
    assert list((folder / "files" / "media" / "table").glob("samples*.json"))


def test_swanlab_holds_the_run(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path / "swanlog"))
    tracked("swanlab", "swanlab")
    import swanlab

    assert not swanlab.has_run()
    written = b"".join(file.read_bytes() for file in (tmp_path / "swanlog").rglob("*") if file.is_file())
    for word in (b"recipe.objective.0.name", b"summary/after/ndcg", b"eval/ndcg", b"report", b"samples"):
        assert word in written, word


def test_clearml_holds_the_run(tracked, tmp_path, monkeypatch):
    clearml = pytest.importorskip("clearml", reason="clearml is not installed")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml"))
    monkeypatch.setenv("CLEARML_LOG_MODEL", "false")
    clearml.Task.set_offline(True)
    tracked("clearml", "clearml")
    assert clearml.Task.current_task() is None
    (archive,) = (tmp_path / "clearml").rglob("*.zip")
    with zipfile.ZipFile(archive) as files:
        told = b"".join(files.read(name) for name in files.namelist()).decode(errors="ignore")
    for word in ("objective.0.name", "summary/after/ndcg", "samples", "report.html", "birds", "mine"):
        assert word in told, word


def test_dvclive_holds_the_run(tracked, tmp_path):
    pytest.importorskip("dvclive", reason="dvclive is not installed")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    result = tracked("dvclive", "dvclive")
    told = json.loads((tmp_path / "dvclive" / "metrics.json").read_text())
    assert told["summary/after/ndcg"] == result.summary["eval_after"]["ndcg"]
    assert (tmp_path / "dvclive" / "artifacts" / "report.html").exists()
    assert "recipe.objective.0.name" in (tmp_path / "dvclive" / "params.yaml").read_text()


def test_trackio_holds_the_run(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracked("trackio", "trackio")
    names = {file.name for file in (tmp_path / "trackio").rglob("*") if file.is_file()}
    assert any(name.endswith(".db") for name in names)
