"""The gate: what a name means, what holds, and the exit codes that a release script sees."""

import json
import math
import operator
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from align.errors import UserError
from align.evaluate.gate import figures_of, gate, read_requirement

SUMMARY = {
    "steps": 25,
    "eval_before": {"pair_accuracy": 0.5, "best_logprob_change": 0.0},
    "eval_after": {"pair_accuracy": 0.66, "best_logprob_change": -6.3, "odd": None},
    "eval_change": {"pair_accuracy": {"difference": 0.16, "lists": 100}},
    "samples": [{"reward_after": 1.5, "after": "text"}],
}
EVALUATE = {"win_rate": {"mean": 0.61, "low": 0.53, "high": 0.69}, "win_rate_lc": None, "wins": 0.6}
EXPORT = {"format": "gguf", "agrees": True, "comparison": {"largest": 0.002}}


@pytest.fixture
def run(tmp_path):
    """A run with everything that is read of one."""
    folder = tmp_path / "run"
    (folder / "evaluate").mkdir(parents=True)
    for name, value in (("summary", SUMMARY), ("evaluate/evaluate", EVALUATE), ("export", EXPORT)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def verdicts(run, tmp_path, *require):
    """What the gate's JSON says of each requirement, and its exit code."""
    out, code = tmp_path / "out.json", 0
    try:
        gate([str(run)], require=require, json_path=str(out))
    except SystemExit as end:
        code = end.code
    told = json.loads(out.read_text())
    assert told["holds"] == all(one["holds"] for one in told["requirements"]) == (code == 0)
    return told["requirements"], code


@pytest.mark.parametrize(
    ("name", "figure", "value"),
    [
        ("steps", "steps", 25),
        ("pair_accuracy", "eval_after.pair_accuracy", 0.66),
        ("eval_before.pair_accuracy", "eval_before.pair_accuracy", 0.5),
        ("pair_accuracy.difference", "eval_change.pair_accuracy.difference", 0.16),
        ("samples.0.reward_after", "samples.0.reward_after", 1.5),
        ("win_rate.low", "win_rate.low", 0.53),
        ("win_rate", "win_rate.mean", 0.61),
        ("largest", "comparison.largest", 0.002),
        ("agrees", "agrees", 1),
    ],
)
def test_a_name_means_one_figure(run, tmp_path, name, figure, value):
    (told,), code = verdicts(run, tmp_path, f"{name} == {value}")
    assert (told["figure"], told["value"], code) == (figure, value, 0)


@pytest.mark.parametrize("name", ["odd", "win_rate_lc.low", "win_rate_lc"])
@pytest.mark.parametrize("sign", [">", "<", "!=", "=="])
def test_what_was_not_measured_holds_for_nothing(run, tmp_path, name, sign):
    (told,), code = verdicts(run, tmp_path, f"{name} {sign} 0")
    assert (told["value"], told["holds"], code) == (None, False, 3)


@pytest.mark.parametrize(
    ("sign", "function"),
    {
        ">": operator.gt,
        ">=": operator.ge,
        "<": operator.lt,
        "<=": operator.le,
        "==": operator.eq,
        "!=": operator.ne,
    }.items(),
)
def test_each_operator_below_at_and_above_the_bound(sign, function):
    for text in (f"a.b/c{sign}-1e-1", f" a.b/c  {sign}  -0.1 "):
        one = read_requirement(text)
        assert (one.name, one.bound) == ("a.b/c", -0.1)
        assert [one.holds(value) for value in (-0.2, -0.1, 0.3)] == [
            function(value, -0.1) for value in (-0.2, -0.1, 0.3)
        ]
        assert not one.holds(math.nan)


def test_all_must_hold_in_every_file_that_has_the_figure(run, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"eval_after": {"pair_accuracy": 0.4}}))
    with pytest.raises(SystemExit) as end:
        gate([str(run), str(other)], require=["pair_accuracy > 0.5"], json_path=str(tmp_path / "out.json"))
    told = json.loads((tmp_path / "out.json").read_text())["requirements"]
    assert end.value.code == 3 and [(one["value"], one["holds"]) for one in told] == [(0.66, True), (0.4, False)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pair_acuracy > 0.5", "no figure is called `pair_acuracy`; there are eval_after.pair_accuracy"),
        ("__import__('os').getcwd() > 0", "no figure is called"),
        ("pair_accuracy > steps", "and a number"),
        ("pair_accuracy > nan", "and a number"),
        ("pair_accuracy = 0.5", "one of >=, <=, ==, !=, >, <"),
        ("pair_accuracy", "one of >="),
        ("1 > 0.5 > 0", "and a number"),
    ],
)
def test_what_is_no_requirement_is_refused(run, text, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        gate([str(run)], require=[text])


def test_a_name_of_several_figures_is_refused(run):
    (run / "study.json").write_text(json.dumps({"a": {"n": 1}, "b": {"n": 2}}))
    with pytest.raises(UserError, match="`n` is more than one figure of .*study.json: give a.n, b.n"):
        gate([str(run)], require=["n > 0"])


@pytest.mark.parametrize(
    ("make", "said"), [(None, "no such file"), ("recipe.yaml", "let `align train` finish the run")]
)
def test_a_folder_without_results_is_refused(tmp_path, make, said):
    place = tmp_path / "run"
    if make:
        place.mkdir()
        (place / make).touch()
    with pytest.raises(UserError, match=said):
        gate([str(place)], require=["a > 0"])


def test_a_long_name_is_shown_whole(tmp_path, capsys):
    name = "arms.of_a_long_name.difference.sample_reward.low"
    (tmp_path / "f.json").write_text(json.dumps({name: 1}))
    gate([str(tmp_path / "f.json")], require=[f"{name} > 0"], console=Console(width=60))
    assert "".join(re.findall(r"^│ [^│]* │ ([^│]*?) *│", capsys.readouterr().out, re.M)) == name


def test_figures_are_the_numbers_of_a_tree():
    tree = {"a": {"b": 1, "c": [2.5, {"d": False}]}, "e": "text", "f": None}
    found = figures_of(tree)
    assert math.isnan(found.pop("f")) and found == {"a.b": 1, "a.c.0": 2.5, "a.c.1.d": 0}


def test_a_release_script_goes_on_by_the_exit_code(run, tmp_path):
    script = tmp_path / "release.sh"
    script.write_text(
        """
        gate() { "$PYTHON" -m align.cli gate run "$@" >> said 2>&1; echo "$?"; }
        gate --require 'win_rate.low > 0.5' --require 'best_logprob_change > -10' && echo shipped
        gate --require 'win_rate.low > 0.5' --require 'best_logprob_change > -5'
        gate --require 'win_rat.low > 0.5'
        """
    )
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = (tmp_path / "said").read_text()
    assert done.stdout.split() == ["0", "shipped", "3", "2"], said
    assert "the gate is open: 2 requirements met" in said and "the gate is shut: 1 of 2 requirements not met" in said


def test_a_damaged_summary_is_not_trusted(make_recipe, tmp_path):
    from align.runs.run_directory import RunDirectory

    folder = RunDirectory(tmp_path / "made")
    folder.open(make_recipe("made"))
    folder.write_json(folder.summary, SUMMARY)
    gate([str(folder.path)], require=["steps == 25"])
    folder.summary.write_text(json.dumps(SUMMARY | {"steps": 26}))
    with pytest.raises(UserError, match="summary.json: damaged"):
        gate([str(folder.path)], require=["steps > 0"])
