"""What a run was given is what a second call on it must be given: rows, their order, how they are read, the base."""

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.evaluate.rows import evaluate_rows
from align.export.export import export
from align.model.config import PolicySection
from align.model.policy import load_policy
from align.runs.record import record_lists
from align.training.train import train
from rewards import ScorerError, load_scorer


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CHANGES = {
    "a completion": lambda rows: rows[0]["completions"].__setitem__(0, " w30 w31"),
    "a prompt": lambda rows: rows[1].__setitem__("prompt", "w33 w34"),
    "a grade": lambda rows: rows[2]["grades"].__setitem__(0, 7.5),
    "one row more": lambda rows: rows.append({**rows[0], "prompt": "w38 w39"}),
    "one row less": lambda rows: rows.pop(),
    "the order": lambda rows: rows.reverse(),
}


@pytest.fixture
def rows(tmp_path, rows_file) -> Path:
    return shutil.copy(rows_file, tmp_path / "data.jsonl")


@pytest.fixture
def begun(make_recipe, rows, tmp_path):
    """Folders of a finished run, and of the same as a kill leaves it."""
    recipe = make_recipe(data={"sources": [str(rows)]}, train={"steps": 2, "save_steps": 1})
    run = train(recipe).path
    return recipe, run


@pytest.mark.parametrize("finished", [True, False])
def test_changed_rows_are_refused_with_the_difference(begun, rows, finished, capsys):
    recipe, run = begun
    if not finished:
        (run / "summary.json").unlink()
    original = lines_of(rows)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for name, change in CHANGES.items():
        changed = json.loads(json.dumps(original))
        change(changed)
        write(rows, changed)
        found = "same lists in another order" if name == "the order" else r"data.jsonl: \d+ of \d+ lists are gone, \d+"
        with pytest.raises(UserError, match=f"the rows are not those .*{found}.* `output` a new folder"):
            train(recipe)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    write(rows, [{**row, "note": "of no use"} for row in original])
    capsys.readouterr()
    train(recipe)
    out = capsys.readouterr().out
    assert ("finished before; nothing was done" in out) == finished
    assert ("steps in" in out) != finished, "figures of a run that was not trained now"


def test_the_difference_counts_lists_and_names_files(begun, rows):
    recipe, run = begun
    changed = lines_of(rows)
    for row in changed[:3]:
        row["completions"][0] += " w39"
    write(rows, changed)
    with pytest.raises(UserError, match=r"data.jsonl: 3 of 30 lists are gone, 3 are new"):
        train(recipe)


def test_another_tokenizer_or_template_reads_other_rows(make_recipe, tiny_policy, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = [
        {"prompt": [{"role": "user", "content": f"w{i}"}], "chosen": [{"role": "assistant", "content": f" w{i} w3"}]}
        | {"rejected": [{"role": "assistant", "content": " w4"}]}
        for i in range(10, 20)
    ]
    write(tmp_path / "said.jsonl", said)
    sections = {"data": {"sources": [str(tmp_path / "said.jsonl")]}, "policy": {"chat_template": str(template)}}
    recipe = make_recipe(**sections, train={"steps": 1})
    train(recipe)
    template.write_text("w5 {% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="said.jsonl: 10 of 10 lists are gone, 10 are new"):
        train(recipe)


def test_held_out_rows_count_too(make_recipe, rows, tmp_path):
    heldout = shutil.copy(rows, tmp_path / "heldout.jsonl")
    write(heldout, [{**row, "prompt": "w20 " + row["prompt"]} for row in lines_of(heldout)[:4]])
    recipe = make_recipe(data={"sources": [str(rows)], "eval_sources": [str(heldout)]}, train={"steps": 1})
    train(recipe)
    write(heldout, lines_of(heldout)[:3])
    with pytest.raises(UserError, match="heldout.jsonl: 1 of 4 lists are gone, 0 are new"):
        train(recipe)


def test_a_reward_models_ratings_count_too(make_recipe, tmp_path):
    path = tmp_path / "rated.jsonl"
    rated = [{"prompt": f"w{i}", "response": f" w{i + 1}", "scores": {"kind": i % 5}} for i in range(10, 20)]
    write(path, rated)
    sections = {"data": {"sources": [str(path)]}, "objective": {"name": "attributes"}, "reward": {"outputs": ["kind"]}}
    recipe = make_recipe(task="reward", **sections, train={"steps": 1})
    train(recipe)
    rated[0]["scores"]["kind"] = 9
    write(path, rated)
    with pytest.raises(UserError, match="rated.jsonl: 1 of 10 lists are gone, 1 are new"):
        train(recipe)


def test_another_base_in_the_same_folder(make_recipe, save_llama, tmp_path):
    base = save_llama(tmp_path / "base")
    recipe = make_recipe(policy={"model": str(base)}, train={"steps": 1})
    run = train(recipe).path
    save_llama(base, seed=5)
    for _ in range(2):
        with pytest.raises(UserError, match="was trained from another base model than `policy.model` gives"):
            train(recipe)
        (run / "summary.json").unlink(missing_ok=True)  # as a kill leaves it


def test_a_lost_record_is_written_again_and_checkpoints_of_other_rows_are_refused(begun, rows):
    recipe, run = begun
    (run / "summary.json").unlink()
    (run / "given.json").unlink()
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    train(recipe)
    assert "given.json is missing; it is written again" in (run / "events.log").read_text()
    assert (run / "given.json").exists(), "from here on it is kept"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    write(rows, lines_of(rows)[::-1])
    (run / "summary.json").unlink()
    (run / "given.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2: a checkpoint of another run \(of other rows\)"):
        train(recipe)


def test_rows_may_be_mended_before_any_work(make_recipe, tmp_path):
    write(tmp_path / "data.jsonl", [{"prompt": f"w{i}", "chosen": " w4 w39", "rejected": " w5"} for i in range(9)])
    recipe = make_recipe(data={"sources": [str(tmp_path / "data.jsonl")]}, train={"steps": 1}, sampling={"prompts": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.training.parts._load", lambda *_, **__: 1 / 0)  # as a model that does not load
        with pytest.raises(ZeroDivisionError):
            train(recipe)
    write(tmp_path / "data.jsonl", [{"prompt": f"w{i}", "chosen": " w4", "rejected": " w5"} for i in range(9)])
    assert train(recipe).summary["steps"] == 1


def test_a_digest_is_of_a_lists_content_alone():
    rows = [{"a": [1, 2], "b": [[3], []], "w": 0.5}, {"a": [1], "b": [[2, 3], []], "w": 0.5}]
    rows += [{"a": [1, 2], "b": [[], [3]], "w": 0.5}, {"a": [1, 2], "b": [[3], []], "w": 0.25}]
    lists = Dataset.from_list([{**row, "source": "file", "row": i, "id": str(i)} for i, row in enumerate(rows)])
    digests = record_lists(lists)["digests"]
    assert len(set(digests)) == len(rows), "all four differ, though their numbers in a row are the same"
    assert record_lists(lists.select([2, 1, 3]))["digests"] == [digests[i] for i in (2, 1, 3)]
    assert record_lists(lists.select(range(1, 3)))["digests"] == digests[1:3]
    again = Dataset.from_list([{**rows[0], "source": "other", "row": 5, "id": "x"}])
    assert record_lists(again)["digests"] == digests[:1]
    assert record_lists(lists.select([])) == {"files": [], "of": [], "digests": []}


def test_an_adapter_is_not_put_onto_weights_that_replaced_its_own(make_recipe, save_llama, rows, tmp_path, capsys):
    base = save_llama(tmp_path / "base")
    run = train(make_recipe(policy={"model": str(base)}, train={"steps": 1})).path
    export(run, tmp_path / "copy")
    save_llama(base, seed=5)  # as a second export into the same folder does
    other = save_llama(tmp_path / "other", seed=5)
    adapters = (run / "adapter", tmp_path / "copy")
    for adapter in (run, *adapters):
        with pytest.raises(UserError, match="was trained on other weights than .*base holds now; put the old ones"):
            export(adapter, tmp_path / "merged", merge=True)
    for adapter in adapters:
        with pytest.raises(UserError, match="was trained on other weights than .*base holds now"):
            evaluate_rows([str(rows)], model=str(adapter))
        with pytest.raises(ScorerError, match="was trained on other weights than .*base holds now"):
            load_scorer({"name": "implicit", "model": str(base), "adapter": str(adapter)})
    with pytest.raises(UserError, match="another base model"):
        evaluate_rows([str(rows)], model=str(run))
    load_policy(PolicySection(model=str(other), start_adapter=str(adapters[0])))
    assert f"was trained on {base}, whose weights are not those of {other}" in capsys.readouterr().err
    save_llama(base)
    export(run, tmp_path / "merged", merge=True)
    (adapters[1] / "digests.json").unlink()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    save_file(tensors, adapters[1] / "adapter_model.safetensors")  # as others write it, without a word on the base
    save_llama(base, seed=5)
    export(adapters[1], tmp_path / "unknown", merge=True)
