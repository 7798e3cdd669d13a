"""A study: its arms, what its runs share, what a kill and a failure leave, and what is written of it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

import align.data.prepare
import align.model.reference
import align.studies.run
from align.cli import main
from align.errors import UserError
from align.recipe import load_recipe
from align.recipe.recipe import dump_set
from align.report import write_report
from align.report.study_page import in_interval
from align.shipped import shipped
from align.studies.plan import plan_study, plan_sweep
from align.studies.run import execute
from align.training.train import train

TRAIN = {"lists_per_step": 6, "learning_rate": 1e-2, "threads": 1, "steps": 2, "save_steps": 1}
ARMS = {"lambda": {}, "softmax": {"objective": "softmax"}}


@pytest.fixture
def write(make_recipe, tmp_path, rows_file):
    """Writes a recipe with rows of its own to hold out, and a study of it."""

    def written(name: str = "study", **keys) -> str:
        held_out = " or ".join(f"id == '{i}'" for i in range(5))
        data = {"sources": [str(rows_file)], "eval_sources": [{"path": str(rows_file), "where": held_out}]}
        recipe = make_recipe("unused", data=data, train=TRAIN, sampling={"prompts": 0, "token_lists": 0})
        (tmp_path / "recipe.yaml").write_text(dump_set(recipe))
        tree = {"recipe": str(tmp_path / "recipe.yaml"), "output": str(tmp_path / name), "vary": ARMS, "seeds": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree | keys, sort_keys=False))
        return str(tmp_path / f"{name}.yaml")

    return written


@pytest.fixture
def fake_train(monkeypatch):
    """Puts a function in training's place, and leaves out what its memory needs."""

    def put(function) -> None:
        monkeypatch.setattr(align.studies.run, "train", function)
        monkeypatch.setattr(align.studies.run, "gc", SimpleNamespace(collect=lambda: None))

    return put


def figures(result: dict) -> dict:
    """What a table says, without how long it took."""
    return {name: [arm["figures"], arm["difference"], arm["failures"]] for name, arm in result["arms"].items()}


def test_arms_are_names_and_a_grid():
    vary = {"a": {"objective": "lambda"}, "b": {}, "score.beta": [0.1, 0.2], "train.epochs": [1]}
    arms = align.studies.plan._arms(vary)
    assert [(arm.name, arm.overrides) for arm in arms] == [
        ("a, score.beta=0.1, train.epochs=1", {"objective": "lambda", "score.beta": 0.1, "train.epochs": 1}),
        ("a, score.beta=0.2, train.epochs=1", {"objective": "lambda", "score.beta": 0.2, "train.epochs": 1}),
        ("b, score.beta=0.1, train.epochs=1", {"score.beta": 0.1, "train.epochs": 1}),
        ("b, score.beta=0.2, train.epochs=1", {"score.beta": 0.2, "train.epochs": 1}),
    ]


def test_a_runs_recipe_is_the_base_with_set_arm_and_seed_over_it(write, tmp_path):
    study = write(set={"score.beta": 0.3, "objective": "hinge"}, seeds=[4])
    plan = plan_study(study, str(tmp_path / "there"), ["train.learning_rate=1e-3"])
    base, softmax = tmp_path / "recipe.yaml", plan.arms[1]
    expected = ["score.beta=0.3", "objective=softmax", "train.learning_rate=0.001", "train.seed=4"]
    output = tmp_path / "there/runs/softmax/seed-4"
    assert plan.recipe(softmax, 4) == load_recipe(base, [*expected, f"output={output}"])


def test_a_grid_of_the_command_line_is_split_at_its_outer_commas(write, tmp_path):
    write()
    vary = ["objective=[{name: lambda}, {name: sft, weight: 0.1}],hinge", "train.learning_rate=1e-3,1e-2"]
    plan = plan_sweep(str(tmp_path / "recipe.yaml"), [f"output={tmp_path / 'x'}"], vary=vary, seeds=2)
    names = [[term.name for term in plan.recipe(arm, 0).objective] for arm in plan.arms]
    assert names == [["lambda", "sft"]] * 2 + [["hinge"]] * 2
    assert [plan.recipe(arm, 0).train.learning_rate for arm in plan.arms] == [1e-3, 1e-2] * 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"vary": {"a": {"train.learning_rat": 1}}}, "arm a: .*unknown key `train.learning_rat`"),
        ({"vary": {"a": {"train.seed": 1}}}, "arm a: `train.seed` is the study's own"),
        ({"set": {"output": "x"}}, "`output` is the study's own"),
        ({"vary": {"a b": {}, "a-b": {}}}, "two arms have the same name or folder"),
        ({"baseline": "lamda"}, "there is no arm `lamda`; take one of lambda, softmax"),
        ({"seeds": [1, 1]}, "one seed or more, each once"),
        ({"seed": 3}, "unknown key `seed`"),
        ({"vary": {}}, "`vary`"),
        ({"halving": {"by": "loss"}}, "the arms differ in objective"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: cannot read the recipe"),
        ({"policy": {}}, "a recipe; `align train` runs it"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(write, keys, said):
    with pytest.raises(UserError, match=said):
        plan_study(write(**keys))


@pytest.mark.parametrize("settings", [["policy.trust_remote_code=true"], ["train.callbacks=os:popen"]])
def test_a_studys_file_is_no_consent_and_the_command_line_is(write, settings):
    keys = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in settings)}
    with pytest.raises(UserError, match=r"--trust-remote-code|--allow-code"):
        plan_study(write(set=keys))
    assert plan_study(write(), None, settings)


def test_runs_share_one_preparation_and_one_reference_pass_and_are_what_train_gives(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    prepared, read = [], []
    prepare, fill = align.data.prepare._prepare, align.model.reference._fill

    def counted_fill(cache, work, stored, *rest, **options):
        read.extend(row for block in work.missing(stored, (0, 1)) for row in block)
        return fill(cache, work, stored, *rest, **options)

    monkeypatch.setattr(align.data.prepare, "_prepare", lambda *given: (prepared.append(1), prepare(*given)))
    monkeypatch.setattr(align.model.reference, "_fill", counted_fill)
    plan = plan_study(write())
    result = execute(plan)
    lists = json.loads((tmp_path / "study/runs/lambda/seed-0/summary.json").read_text())["data"]
    assert len(prepared) == 1 and len(read) == lists["train_lists"] + lists["heldout_lists"]

    alone = train(
        load_recipe(tmp_path / "recipe.yaml", ["objective=softmax", "train.seed=1", f"output={tmp_path / 'a'}"])
    )
    of_study = result["arms"]["softmax"]["runs"][1]
    assert of_study["figures"] == {k: v for k, v in alone.summary["eval_after"].items() if math.isfinite(v)}
    for key, difference in result["arms"]["softmax"]["difference"].items():
        own, base = ([run["figures"][key] for run in result["arms"][name]["runs"]] for name in ("softmax", "lambda"))
        assert difference["mean"] == pytest.approx(sum(own) / 2 - sum(base) / 2, abs=1e-9)


def test_a_kill_between_runs_leaves_the_same_table(write, tmp_path, monkeypatch):
    whole = execute(plan_study(write("whole", seeds=[3])))
    plan = plan_study(write("cut", seeds=[3]))
    calls = 0

    def interrupted(*given, **options):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(*given, **options)

    monkeypatch.setattr(align.studies.run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(plan)
    left = json.loads((tmp_path / "cut/study.json").read_text())
    assert left["runs"] == {"planned": 2, "done": 1, "failed": 0}
    assert "not finished" in (tmp_path / "cut/report.html").read_text()
    before = (tmp_path / "cut/runs/lambda/seed-3/summary.json").stat().st_mtime_ns
    assert figures(execute(plan)) == figures(whole)
    assert (tmp_path / "cut/runs/lambda/seed-3/summary.json").stat().st_mtime_ns == before


def test_killed_within_its_third_run_it_resumes_to_the_same_table(write, tmp_path):
    whole, study = execute(plan_study(write("whole"))), write("cut")
    command = [sys.executable, "-m", "align.cli", "study", study]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    third = tmp_path / "cut/runs/lambda/seed-1/checkpoints"
    while not any(third.glob("*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert figures(json.loads((tmp_path / "cut/study.json").read_text())) == figures(whole)


def summary_of(figure: float, steps: int) -> SimpleNamespace:
    summary = {"eval_after": {"pair_accuracy": figure, "loss": -figure}, "steps": steps, "train_seconds": 2.0}
    return SimpleNamespace(summary=summary | {"tokens_per_second": 50.0})


def test_a_failed_run_is_said_and_its_arm_is_of_the_others(write, tmp_path, fake_train, capsys):
    def failing(recipe, **options):
        if recipe.objective[0].name == "softmax" and recipe.train.seed == 1:
            raise RuntimeError("of a <library>")
        return summary_of(0.5 + recipe.train.seed / 10, 2)

    fake_train(failing)
    with pytest.raises(SystemExit) as end:
        main(["study", write(seeds=3)])
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "FAILED softmax, seed 1: RuntimeError: of a <library>" in said and "2 of 3" in said
    arm = json.loads((tmp_path / "study/study.json").read_text())["arms"]["softmax"]
    assert arm["failures"] == 1 and arm["figures"]["pair_accuracy"]["mean"] == pytest.approx((0.5 + 0.7) / 2)
    assert "of a &lt;library&gt;" in (tmp_path / "study/report.html").read_text()


def test_a_figure_that_is_not_finite_is_said_and_left_out(write, tmp_path, fake_train, capsys):
    fake_train(lambda r, **_: summary_of(math.nan if r.objective[0].name == "softmax" and r.train.seed else 0.5, 2))
    main(["study", write(figures=["pair_accuracy"])])
    assert "NOT FINITE, left out of means: softmax, seed 1: pair_accuracy, loss" in capsys.readouterr().out
    arm = json.loads((tmp_path / "study/study.json").read_text())["arms"]["softmax"]
    assert arm["figures"]["pair_accuracy"] == {"mean": 0.5, "low": None, "high": None, "sd": None, "n": 1}
    assert "left out of the means: pair_accuracy, loss" in (tmp_path / "study/report.html").read_text()


def test_a_figure_that_no_run_has_is_refused_after_the_first_seed(write, fake_train):
    fake_train(lambda recipe, **_: summary_of(0.5, 2))
    with pytest.raises(UserError, match="no run has `pair_acuracy`; there are loss, pair_accuracy"):
        execute(plan_study(write(figures=["pair_acuracy"])))


def test_a_study_of_another_recipe_is_refused_before_any_run(write, tmp_path, fake_train):
    execute(plan_study(write(seeds=[0], vary={"lambda": {}})))
    fake_train(lambda recipe, **_: summary_of(0.5, 2))
    with pytest.raises(UserError, match="holds a run of another recipe .it differs in score.beta"):
        execute(plan_study(write(seeds=[0, 1], vary={"new": {}, "lambda": {"score.beta": 0.4}})))
    assert not (tmp_path / "study/runs/new").exists()
    grown = execute(plan_study(write(seeds=[0, 1], vary={"new": {}, "lambda": {}})))
    assert grown["runs"] == {"planned": 4, "done": 4, "failed": 0}


@pytest.mark.parametrize("by", ["pair_accuracy", "loss"])
def test_halving_trains_the_best_longer(write, tmp_path, fake_train, monkeypatch, by):
    write()
    best = 8
    trained = []

    def fake(recipe, **options):
        rate = recipe.train.learning_rate
        trained.append((rate, recipe.train.steps, recipe.train.seed))
        return summary_of(-abs(rate - best) + 0.01 * recipe.train.seed, recipe.train.steps)

    fake_train(fake)
    monkeypatch.setattr(align.studies.run, "write_study", lambda *_: None)
    vary = [f"train.learning_rate={','.join(map(str, range(1, 11)))}"]
    options = {"vary": vary, "seeds": 2 if by == "loss" else 1, "halving": 3, "by": by}
    plan = plan_sweep(str(tmp_path / "recipe.yaml"), [f"output={tmp_path / 'x'}", "train.steps=27"], **options)
    result = execute(plan)
    ranked = sorted(range(1, 11), key=lambda rate: abs(rate - best))
    expected = [(3, range(1, 11)), (9, sorted(ranked[:4])), (27, sorted(ranked[:2]))]  # of ten arms, then of four
    assert trained == [
        (rate, steps, seed) for steps, rates in expected for seed in range(options["seeds"]) for rate in rates
    ]
    assert result["runs"] == {"planned": len(trained), "done": len(trained), "failed": 0}
    assert result["compute"]["steps"] == sum(steps for _, steps, _ in trained)
    shares = {name.partition("=")[2]: arm["share"] for name, arm in result["arms"].items()}
    assert shares == {str(r): 1 if r in ranked[:2] else 1 / 3 if r in ranked[:4] else 1 / 9 for r in range(1, 11)}


def test_halving_by_a_figure_that_is_none(write, tmp_path, fake_train):
    write()
    fake_train(lambda recipe, **_: summary_of(0.5, 1))
    options = {"vary": ["train.learning_rate=1,2,3"], "halving": 3, "by": "pair_acuracy"}
    plan = plan_sweep(str(tmp_path / "recipe.yaml"), [f"output={tmp_path / 'x'}"], **options)
    with pytest.raises(UserError, match="no run has that figure; there are loss, pair_accuracy"):
        execute(plan)


def test_the_page_and_the_plot_say_what_the_figures_are(write, tmp_path, fake_train):
    fake_train(lambda r, **_: summary_of(0.1 * r.train.seed + (r.objective[0].name == "softmax"), 2))
    result = execute(plan_study(write(seeds=3, vary=ARMS | {"<b>&": {}}, figures=["pair_accuracy"])))
    root = ElementTree.fromstring((tmp_path / "study/study.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    arms = [g for g in root.iter(f"{space}g") if g.get("class") == "arm"]
    assert [g.find(f"{space}text").text for g in arms] == ["lambda", "softmax", "<b>&"]
    grid = next(g for g in root.iter(f"{space}g") if g.get("class") == "grid")
    ticks = [(float(t.get("x")), float(t.text.replace("−", "-"))) for t in grid.iter(f"{space}text")]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    for g, (name, arm) in zip(arms, result["arms"].items(), strict=True):
        at = {c.get("class"): v0 + (float(c.get("cx")) - x0) * (v1 - v0) / (x1 - x0) for c in g.iter(f"{space}circle")}
        ends = g.find(f"{space}line")
        low, high = (v0 + (float(ends.get(x)) - x0) * (v1 - v0) / (x1 - x0) for x in ("x1", "x2"))
        own = arm["figures"]["pair_accuracy"]
        assert [at["mean"], low, high] == pytest.approx([own["mean"], own["low"], own["high"]], abs=0.01), name
        assert at["seed"] == pytest.approx(arm["runs"][-1]["figures"]["pair_accuracy"], abs=0.01)
    page = write_report([tmp_path / "study"]).read_text()
    assert page == (tmp_path / "study/report.html").read_text()
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page
    told = re.sub(r"<[^>]+>", " ", page)
    assert "1.10 ± 0.25" in told and "+1.0000 ± 0.0000" in told  # t(2) = 4.303; 4.303 * 0.1 / sqrt(3) = 0.248


@pytest.mark.parametrize(
    ("mean", "half", "signed", "told"),
    [
        (-0.001, 0.22, False, "0.00 ± 0.22"),
        (0.3049, 0.0123, True, "+0.305 ± 0.012"),
        (-125.32, 14.2, False, "-125 ± 14"),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_leaves(mean, half, signed, told):
    value = {"mean": mean, "low": mean - half, "high": mean + half}
    assert in_interval(value, signed=signed) == told
    assert in_interval({"mean": 0.25, "low": None, "high": None}) == "0.25" and in_interval(None) == ""


def test_a_page_of_a_study_and_a_run_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.json").write_text("{}")
    with pytest.raises(UserError, match="name it alone"):
        write_report([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="no figures of a study"):
        write_report([tmp_path / "a"])


@pytest.mark.parametrize("file", sorted(Path(shipped("recipes/studies")).glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_that_ships_can_be_begun(file):
    plan = plan_study(file.stem)
    assert len(plan.arms) > 1 and len(plan.study.seeds) == 5
