"""The command line: what it prints, and that a user's mistake is one sentence and exit code 2."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from align.cli import main
from align.recipe import dump_recipe
from align.training.train import train


@pytest.fixture
def recipe_file(make_recipe, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(make_recipe(train={"steps": 2})))
    return path


def fails(capsys, *arguments: str) -> str:
    """The one sentence of a user's mistake."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("align: ")]
    return line


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["annotate"],
        ["inspect"],
        ["export"],
        ["evaluate", "rows"],
        ["evaluate", "winrate"],
        ["report"],
        ["chat"],
        ["doctor"],
    ],
)
def test_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: align" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapter", "to"),
    [
        ({"name": "lora", "rank": 2}, "transformers"),
        ({"name": "full"}, "transformers"),
        ({"name": "peft", "type": "IA3"}, "transformers"),
        ({"name": "peft", "type": "BEFT"}, "peft"),
    ],
)
def test_what_is_said_next_works(make_recipe, tmp_path, capsys, adapter, to):
    """This base has no biases, which is where an offset of outputs would go."""
    recipe = make_recipe(policy={"adapter": adapter}, train={"steps": 1}, sampling={"prompts": 0})
    train(recipe)
    said = re.findall(r"`(align export [^`]+)`", capsys.readouterr().out.splitlines()[-1])
    assert said == [f"align export {recipe.output} FOLDER --to {to}"]
    main(["export", *said[0].replace("FOLDER", str(tmp_path / "made")).split()[2:]])
    assert (tmp_path / "made").is_dir()


def test_train_then_evaluate_then_export(recipe_file, make_recipe, rows_file, tmp_path, capsys):
    main(["train", str(recipe_file)])
    run = make_recipe().output
    out = capsys.readouterr().out
    assert f"run directory: {run}" in out.replace("\n", "")
    assert out.splitlines()[-1].startswith(f"next: `align chat {run}`")
    assert f"report: {run}/report.html" in out and Path(run, "report.html").exists()
    main(["report", run, "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text() == Path(run, "report.html").read_text()
    summary = json.loads((Path(run) / "summary.json").read_text())
    heldout = tmp_path / "figures.json"
    main(["evaluate", "rows", str(rows_file), "--model", run, "--grades", "raw", "--json", str(heldout)])
    figures = json.loads(heldout.read_text())["metrics"]
    assert figures["ndcg"] > 0.5 and figures["best_logprob_change"] != 0
    main(["export", run, str(tmp_path / "merged"), "--merge"])
    model = ["--model", str(tmp_path / "merged")]
    main(["evaluate", "rows", str(rows_file), *model, "--grades", "raw", "--json", str(heldout)])
    merged = json.loads(heldout.read_text())["metrics"]
    assert merged["likelihood_ndcg"] == pytest.approx(figures["likelihood_ndcg"], abs=1e-4)
    assert "ndcg" not in merged, "a plain model has no implicit reward"
    assert summary["steps"] == 2


def test_a_run_measured_again_on_its_heldout_rows_gives_its_summary(make_recipe, rows_file, tmp_path, capsys):
    """The rows are read as the run read them, not with the defaults of a recipe."""
    lines = rows_file.read_text().splitlines(keepends=True)
    for name, part in (("train", lines[6:]), ("heldout", lines[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    data = {"sources": [f"{tmp_path}/train.jsonl"], "eval_sources": [f"{tmp_path}/heldout.jsonl"]}
    recipe = make_recipe(train={"steps": 2}, data=data | {"append_eos": False, "max_length": 9, "grades": "raw"})
    after = train(recipe).summary["eval_after"]
    out = tmp_path / "new folder" / "figures.json"
    main(["evaluate", "rows", f"{tmp_path}/heldout.jsonl", "--model", recipe.output, "--json", str(out)])
    assert json.loads(out.read_text())["metrics"] == {
        key: pytest.approx(value, abs=1e-5) for key, value in after.items()
    }
    main(
        ["evaluate", "rows", f"{tmp_path}/heldout.jsonl", "--model", recipe.output, "--append-eos", "--json", str(out)]
    )
    assert json.loads(out.read_text())["metrics"]["loss"] != pytest.approx(after["loss"], abs=1e-5)


def test_inspect_shows_recipe_audit_and_masks_and_trains_nothing(recipe_file, make_recipe, capsys):
    main(["inspect", str(recipe_file), "--rows", "1", "train.lists_per_step=3"])
    out = capsys.readouterr().out
    assert "lists_per_step: 3" in out and "tokens_per_batch" not in out and "rollout:" not in out
    assert out.index("training / held-out lists") < out.index("lists_per_step: 3"), "the audit comes first"
    assert "read but not trained on" in out and "</s>" in out
    assert not Path(make_recipe().output).exists()
    main(["inspect", str(recipe_file), "--rows", "0", "--recipe"])
    out = capsys.readouterr().out
    assert out.count("tokens_per_batch: ") >= 1 and "rollout:" in out
    assert out.index("training / held-out lists") < out.index("rollout:")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.model=nowhere/at/all", "nowhere/at/all"),
        ("data.sources=nowhere.jsonl", "nowhere.jsonl"),
        ("objective.name=lamda", "did you mean `lambda`?"),
        ("train.lerning_rate=1", "did you mean `train.learning_rate`?"),
        ("sampling.reward=nowhere/scorer", "nowhere/scorer"),
        ("policy.chat_template=nowhere.jinja", "nowhere.jinja"),
        ("objective.name=apo_down", "it is a key of another `name`"),
        ("objective={name: apo_down}", "set `data.select: best_worst`"),
        ("objective={name: pointwise_sigmoid}", "data.grades: win_probability"),
        ("policy.adapter={name: lora}|policy.start_adapter=nowhere/adapter", "nowhere/adapter"),
        ("policy.quantization=4bit", "bitsandbytes"),
        ("data.max_length=1", "no training row is left"),
        ("policy.adapter={name: lora, targets: [nothing_here]}", "nothing_here"),
    ],
)
def test_a_mistake_is_one_sentence_before_training(recipe_file, capsys, override, message):
    assert message in fails(capsys, "train", str(recipe_file), *override.split("|"))


def test_an_output_that_cannot_be_written(recipe_file, tmp_path, capsys):
    below_a_file = f"{recipe_file}/below"
    message = f"align: {below_a_file}: Not a directory; give a path that can be written"
    assert fails(capsys, "train", str(recipe_file), f"output={below_a_file}") == message


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "r.yaml", "--rows", "-1"],
        ["evaluate", "rewards", "rows.jsonl", "--bins", "0"],
        ["score", "a.jsonl", "b.jsonl", "--reward", "r", "--window", "many"],
    ],
)
def test_a_count_that_is_none(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"{arguments[-2]}: {arguments[-1]} is no whole number" in capsys.readouterr().err


def test_export_of_nothing(capsys, tmp_path):
    assert str(tmp_path / "absent") in fails(capsys, "export", str(tmp_path / "absent"), str(tmp_path / "out"))


def test_report_of_nothing(capsys, tmp_path):
    assert str(tmp_path / "absent") in fails(capsys, "report", str(tmp_path / "absent"))


def test_doctor_reports(capsys):
    main(["doctor"])
    assert "torch" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"align {importlib.metadata.version('align-lm')}\n"
