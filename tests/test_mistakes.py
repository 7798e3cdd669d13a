"""A user's mistakes over all commands: each is one sentence that names the place, exit code 2, and no traceback."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from align.cli import main

SCORER = "{name: length, max: 9}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_policy, rows_file) -> Path:
    """A folder with a recipe, a finished run, and copies of both that are damaged in one way each."""
    folder = tmp_path_factory.mktemp("mistakes")
    tree = {
        "output": str(folder / "run"),
        "policy": {"model": str(tiny_policy), "adapter": {"name": "lora", "rank": 4}},
        "reference": {"cache_dir": str(folder / "cache")},
        "data": {"sources": [str(rows_file)], "limit": 8, "grades": "raw"},
        "objective": "lambda",
        "train": {"steps": 1, "lists_per_step": 2, "threads": 1},
        "sampling": {"prompts": 0, "token_lists": 0},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    main(["train", str(folder / "r.yaml")])
    shutil.copy(rows_file, folder / "rows.jsonl")
    for name, text in {
        "empty.yaml": "",
        "list.yaml": "- a\n",
        "open.yaml": "a: [1\n",
        "empty.jsonl": "",
        "half.jsonl": '{"prompt": "a"\n',
        "numbers.jsonl": "1\n2\n",
        "rows.txt": "hello",
        "no.parquet": "hello",
        "annotations.json": "{}",
    }.items():
        (folder / name).write_text(text)
    (folder / "folder").mkdir()
    for name in ("no-adapter", "bad-adapter", "bad-config", "bad-summary", "no-recipe", "newer", "bad-checkpoint"):
        shutil.copytree(folder / "run", folder / name)
    shutil.rmtree(folder / "no-adapter" / "adapter")
    (folder / "bad-adapter" / "adapter" / "adapter_model.safetensors").write_text("xx")
    (folder / "bad-config" / "adapter" / "adapter_config.json").write_text("{")
    (folder / "bad-summary" / "summary.json").write_text("{")
    (folder / "no-recipe" / "recipe.yaml").write_text("")
    with (folder / "newer" / "recipe.yaml").open("a") as file:
        file.write("key_of_tomorrow: 1\n")
    environment = folder / "newer" / "environment.json"
    environment.write_text(environment.read_text().replace('"align-lm": "0', '"align-lm": "9'))
    for file in folder.glob("bad-checkpoint/**/policy.safetensors"):
        file.write_text("zz")
    shutil.copytree(tiny_policy, folder / "bad-model")
    (folder / "bad-model" / "model.safetensors").write_text("zz")
    return folder


MISTAKES = (
    ("train nowhere.yaml", "nowhere.yaml: cannot read the recipe"),
    ("train folder", "folder: cannot read the recipe"),
    ("train empty.yaml", "empty.yaml: a recipe is a mapping"),
    ("train list.yaml", "list.yaml: a recipe is a mapping"),
    ("train open.yaml", "open.yaml: not valid YAML"),
    ("train r.yaml output=rows.jsonl", "rows.jsonl: a file"),
    ("train r.yaml output=rows.jsonl/below", "rows.jsonl"),
    ("train r.yaml output=/proc/nothing/here", "/proc/nothing"),
    ("train r.yaml output=run/../rows.jsonl/x", "rows.jsonl"),
    ("train r.yaml output=new data=3", "`data`"),
    ("train r.yaml output=new data.sources=folder", "folder: no file"),
    ("train r.yaml output=new data.sources=empty.jsonl", "empty.jsonl: no rows"),
    ("train r.yaml output=new data.sources=half.jsonl", "half.jsonl"),
    ("train r.yaml output=new data.sources=numbers.jsonl", "numbers.jsonl, row 1"),
    ("train r.yaml output=new data.sources=rows.txt", "rows.txt"),
    ("train r.yaml output=new data.sources=no.parquet", "no.parquet"),
    ("train r.yaml output=new policy.model=rows.jsonl", "rows.jsonl is a file"),
    ("train r.yaml output=new policy.model=/nowhere/model", "/nowhere/model: there is no such folder"),
    ("train r.yaml output=new policy.model=folder", "folder is no model folder"),
    ("train r.yaml output=new policy.model=bad-model", "bad-model"),
    ("train r.yaml output=new policy.start_run=folder", "folder"),
    ("train r.yaml output=other policy.start_run=bad-checkpoint", "policy.safetensors: damaged"),
    ("train r.yaml output=more reference.cache_dir=/proc/nothing", "/proc/nothing"),
    ("train r.yaml output=new sampling.reward=rows.jsonl", "rows.jsonl is a file; give the folder of a model"),
    ("train r.yaml train.lists_per_step=3", "train.lists_per_step"),
    ("train r.yaml output=no-recipe", "recipe.yaml: damaged"),
    ("inspect nowhere.yaml", "nowhere.yaml"),
    ("inspect r.yaml data.sources=half.jsonl", "half.jsonl"),
    ("annotate r.yaml policy.model=bad-model", "bad-model"),
    ("rollout r.yaml output=rows.jsonl rollout.engine=transformers", "rows.jsonl: a file"),
    ("export nowhere out", "nowhere does not exist"),
    ("export rows.jsonl out", "rows.jsonl is no folder"),
    ("export folder out", "folder is neither a run directory"),
    ("export run rows.jsonl", "rows.jsonl exists"),
    ("export run /proc/nothing/here", "/proc/nothing"),
    ("export no-adapter out", "no-adapter/adapter/"),
    ("export bad-adapter out", "adapter_model.safetensors: damaged"),
    ("export bad-config out", "adapter_config.json: damaged"),
    ("export bad-summary out", "summary.json: damaged"),
    ("export no-recipe out", "recipe.yaml: damaged"),
    ("evaluate rows nowhere.jsonl --model run", "nowhere.jsonl: no such file"),
    ("evaluate rows rows.jsonl --model folder", "folder is no model folder"),
    ("evaluate rows rows.jsonl --model newer", "key_of_tomorrow`; align 9."),
    ("evaluate rows rows.jsonl --model bad-checkpoint", "policy.safetensors: damaged"),
    ("evaluate rows rows.jsonl --model bad-config/adapter", "adapter_config.json: damaged"),
    ("evaluate rewards rows.jsonl --reward folder", "folder: cannot be loaded"),
    ("evaluate rewards rows.jsonl --reward bad-model", "model.safetensors: damaged"),
    (f"evaluate rewards rows.jsonl --reward [{SCORER}] --json /proc/nothing/here", "/proc/nothing"),
    (f"evaluate policy run --prompts nowhere.jsonl --judge [{SCORER}]", "nowhere.jsonl: no such file"),
    (f"evaluate policy folder --against run --prompts rows.jsonl --judge [{SCORER}] --output o", "folder is no model"),
    ("evaluate policy run --prompts rows.jsonl --judge folder", "folder: cannot be loaded"),
    ("evaluate winrate annotations.json", "annotations.json, row 1"),
    ("evaluate winrate folder", "folder: no file"),
    ("report rows.jsonl", "rows.jsonl: holds no run"),
    ("report run --output folder", "folder: cannot be written"),
    ("report bad-summary", "bad-summary/summary.json"),
    (f"score rows.jsonl /proc/nothing/s.jsonl --reward [{SCORER}]", "/proc/nothing"),
    (f"score rows.jsonl rows.jsonl --reward [{SCORER}]", "rows.jsonl: is there already"),
    (f"score rows.jsonl s.jsonl --reward [{SCORER}] --cache rows.jsonl", "rows.jsonl: cannot hold the cache"),
    (f"score half.jsonl s.jsonl --reward [{SCORER}]", "half.jsonl, row 1"),
    ("score rows.jsonl s.jsonl --reward folder", "folder: cannot be loaded"),
    ("chat folder --prompt w3", "folder is no model folder"),
    ("chat bad-checkpoint --prompt w3", "policy.safetensors: damaged"),
    ("chat run --prompt w3 --chat-template nowhere.jinja", "nowhere.jinja"),
)


@pytest.mark.parametrize(("command", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(place, monkeypatch, capsys, command, sentence):
    monkeypatch.chdir(place)
    before, bracket, after = command.partition(f"[{SCORER}]")
    arguments = [*before.split(), *([SCORER] if bracket else []), *after.split()]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
    assert sentence in line
    assert not (place / "new").exists() or not (place / "new" / "checkpoints").exists(), "nothing was trained"


def test_an_interrupt_is_one_line(place, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("align.report.write.write_report", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(place / "run")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 130 and said.startswith("align: stopped by SIGINT; ")


def test_a_full_disk_is_one_line(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("align.report.write.write_report", full)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(place / "run")])
    assert stopped.value.code == 2 and "no space is left" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(place, monkeypatch):
    monkeypatch.setattr("align.report.write.write_report", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["report", str(place / "run")])
