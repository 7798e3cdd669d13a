"""Benchmarks before and after: what is called forgotten, whose task files run, and the harness itself beside us."""

import json
import math
import statistics
import sys
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from align.errors import UserError
from align.evaluate import benchmarks
from align.evaluate.benchmarks import _compared, _forgotten, evaluate_benchmarks
from align.export.export import export
from align.training.train import train

DOCUMENTS = 60


def answers(values: dict, *, loss: float = 3.0, error: float | str = "N/A", higher: bool = True) -> dict:
    """What the harness says of a task with a metric by document, and one that is no mean over documents."""
    samples = [{"doc_id": key, "filter": "none", "acc": value} for key, value in values.items()]
    figures = {"acc,none": statistics.fmean(values.values()), "acc_stderr,none": "N/A", "alias": "t"}
    figures |= {"perplexity,none": loss, "perplexity_stderr,none": error}
    return {
        "results": {"t": figures},
        "samples": {"t": samples},
        "higher_is_better": {"t": {"acc": higher, "perplexity": False}},
    }


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("higher", [True, False])
def test_a_change_has_the_standard_error_of_its_paired_differences(share, higher):
    generator = np.random.default_rng(1)
    was = {f"d{i}": float(value) for i, value in enumerate(generator.random(DOCUMENTS) < 0.6)}
    flips = generator.random(DOCUMENTS) < share
    now = {key: 0.0 if flip else value for (key, value), flip in zip(was.items(), flips, strict=True)}
    found = dict(_compared(answers(was, higher=higher), answers(dict(reversed(now.items())), higher=higher)))["acc"]
    differences = [now[key] - was[key] for key in was]
    assert found["change"] == pytest.approx(np.mean(differences)) and found["documents"] == DOCUMENTS
    assert found["standard_error"] == pytest.approx(stats.sem(differences))
    assert found["forgot"] == (higher and np.mean(differences) < -2 * stats.sem(differences))


@pytest.mark.parametrize(
    ("now", "error", "forgot"), [(3.4, 0.1, True), (3.2, 0.1, False), (2.0, 0.1, False), (9.0, "N/A", False)]
)
def test_a_figure_that_is_no_mean_is_judged_by_both_bootstraps(now, error, forgot):
    values = {"a": 1.0, "b": 0.0}
    both = answers(values, loss=3.0, error=error), answers(values, loss=now, error=error)
    found = dict(_compared(*both))
    assert found["perplexity"]["standard_error"] == (None if error == "N/A" else pytest.approx(math.sqrt(0.02)))
    assert found["perplexity"]["forgot"] == forgot
    assert _forgotten({"t": found}) == {"forgot": ["t.perplexity"] * forgot, "forgotten": int(forgot)}


def test_a_model_alone_has_no_before():
    found = dict(_compared(None, answers({"a": 1.0, "b": 0.0})))["acc"]
    assert (found["before"], found["after"], found["change"], found["forgot"]) == (None, 0.5, None, False)


def test_a_group_has_its_parts_and_a_filter_its_name():
    own = answers({"a": 1.0})
    own["results"]["u"] = {"exact_match,strict": 0.25}
    assert set(dict(_compared(own, own))) == {"t.acc", "t.perplexity", "u.exact_match,strict"}


def test_without_the_harness_the_extra_is_named(monkeypatch, tiny_policy):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'align-lm\[lm-eval\]'"):
        evaluate_benchmarks(str(tiny_policy), tasks=["x"])


def test_task_files_of_another_hand_need_consent(monkeypatch, tmp_path, tiny_policy):
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setattr(benchmarks, "version", lambda name: "0")
    with pytest.raises(UserError, match="holds no task file"):
        evaluate_benchmarks(str(tiny_policy), tasks=["x"], include_path=str(tmp_path))
    for name in ("recipe.yaml", "metrics.jsonl", "task.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="a task file is code, and .* is a run directory.*--allow-code"):
        evaluate_benchmarks(str(tiny_policy), tasks=["x"], include_path=str(tmp_path))


@pytest.fixture
def tasks(tmp_path, rows_file):
    """A folder with a task whose data is here: the better of two completions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    lines = [{"prompt": row["prompt"], "choices": row["completions"][:2]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "task.yaml").write_text(
        "task: better\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "doc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 1\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


def test_figures_are_the_harnesss_of_base_and_export(make_recipe, tiny_policy, tasks, tmp_path, capsys):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    run = train(make_recipe(train={"learning_rate": 0.1}), show=False).path
    found = evaluate_benchmarks(str(run), tasks=["better"], include_path=str(tasks))["tasks"]["better"]
    merged = export(run, tmp_path / "merged", merge=True)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for when, folder in (("before", tiny_policy), ("after", merged)):
        own = lm_eval.simple_evaluate(
            HFLM(pretrained=str(folder), device="cpu"), tasks=["better"], task_manager=manager, bootstrap_iters=0
        )
        for metric in ("acc", "acc_norm"):
            assert found[metric][when] == own["results"]["better"][f"{metric},none"]
    assert found["acc"]["documents"] == 30 and found["acc"]["change"] != 0
    written = (run / "benchmarks.json").read_text()
    capsys.readouterr()
    evaluate_benchmarks(str(run), tasks=["better"], include_path=str(tasks))
    assert (run / "benchmarks.json").read_text() == written and "better: before" not in capsys.readouterr().err
    with pytest.raises(UserError, match="has no task `bettr`; did you mean better"):
        evaluate_benchmarks(str(run), tasks=["bettr"], include_path=str(tasks))
