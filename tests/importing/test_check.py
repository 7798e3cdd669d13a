"""`--check`: the token ids of the first rows beside those that the tool would build."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tokenizers import processors
from transformers import AutoTokenizer

from align.data.sources import read_source
from align.importing.check import builder
from align.importing.run import import_file

MODEL = str(Path(__file__).parents[2] / "data/story-policy")
ROWS = [
    {"instruction": "Tell a story", "input": "of a cat", "chosen": "A cat.", "rejected": "No.", "system": "Be kind."},
    {"instruction": "Tell one more", "input": "", "chosen": "A dog ran.", "rejected": "Never."},
]
BASE = {"model_name_or_path": MODEL, "stage": "dpo", "dataset": "mine", "output_dir": "out"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/p.json").write_text(json.dumps(ROWS))
    columns = {"prompt": "instruction", "query": "input", "system": "system"}
    columns |= {"chosen": "chosen", "rejected": "rejected"}
    info = {"mine": {"file_name": "p.json", "ranking": True, "columns": columns}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    return tmp_path


@pytest.mark.parametrize("template", ["llama3", "gemma", "mistral", "alpaca"])
def test_a_written_template_gives_llama_factorys_ids(folder, capsys, template):
    (folder / "old.yaml").write_text(yaml.safe_dump({**BASE, "template": template}))
    import_file("old.yaml", "new.yaml", check=True)
    assert "check: 2 of 2 rows have the token ids" in capsys.readouterr().out


def test_a_difference_is_told_with_its_row(folder, capsys):
    (folder / "old.yaml").write_text(yaml.safe_dump({**BASE, "template": "vicuna"}))
    import_file("old.yaml", "new.yaml", check=True)
    told = capsys.readouterr().out
    assert "check: 0 of 2 rows" in told and "p.json, row 1" in told


def test_trl_itself_is_asked(folder, capsys):
    pytest.importorskip("trl")
    pairs = [{"prompt": row["instruction"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    old = {"method": "dpo", "model_name_or_path": MODEL, "dataset_name": "rows.jsonl", "output_dir": "out"}
    (folder / "old.yaml").write_text(yaml.safe_dump(old))
    plan = import_file("old.yaml", "new.yaml", check=True)
    told = capsys.readouterr()
    assert "check: 2 of 2 rows have the token ids that TRL would build" in told.out
    assert "Tokenizing" not in told.err  # TRL's bars, two for each row

    (source,) = plan.tree["data.sources"]
    (row, *_), tokenizer = read_source(**source).rows, AutoTokenizer.from_pretrained(MODEL)
    turned = replace(row, completions=row.completions[::-1], grades=row.grades[::-1])
    prompt, sides = builder(plan)(row, tokenizer)
    assert builder(plan)(turned, tokenizer) == (prompt, sides[::-1]) and sides[0] != sides[1]


PAIRS = [
    {"question": "Tell a story", "chosen": "A cat sat.", "rejected": "No.", "system": "Be kind."},
    {"question": "Tell one more", "chosen": "A dog ran.", "rejected": "Never."},
]
AXOLOTL = {"base_model": MODEL, "rl": "dpo", "output_dir": "out", "learning_rate": 1e-5}
SWIFT = {"rlhf_type": "dpo", "model": MODEL, "output_dir": "out"}


def axolotls_texts(row: dict, kind: str) -> tuple[str, list[str]]:
    """Prompt and sides as axolotl's functions of these names write them, which TRL ends with the end token."""
    system, user = row.get("system"), row["question"]
    if kind == "chatml":
        before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        prompt = f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        return prompt, [f"{row[side]}<|im_end|>" for side in ("chosen", "rejected")]
    before = f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>" if system else ""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompt = f"{before}{header.format('user')}{user}<|eot_id|>{header.format('assistant')}"
    return prompt, [f"{row[side]}<|eot_id|>" for side in ("chosen", "rejected")]


@pytest.fixture
def without_start(tmp_path) -> str:
    """The story policy with a tokenizer that puts no start token before a text."""
    folder = shutil.copytree(MODEL, tmp_path / "without_start")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.save_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)("a")["input_ids"]) < len(
        AutoTokenizer.from_pretrained(MODEL)("a")["input_ids"]
    )
    return str(folder)


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_axolotls_ids_are_those_of_its_texts(folder, without_start, capsys, kind):
    """Its llama3 texts leave the start token to the tokenizer, which our template writes; its chatml ones have none."""
    model = MODEL if kind == "llama3" else without_start
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    old = (
        AXOLOTL
        | {"base_model": model}
        | {"datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": f"{kind}.intel"}]}
    )
    (folder / "old.yaml").write_text(yaml.safe_dump(old))
    plan = import_file("old.yaml", "new.yaml", check=True)
    assert "check: 2 of 2 rows have the token ids that axolotl would build" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(model)
    (source,) = plan.tree["data.sources"]
    for row, pair in zip(read_source(**source).rows, PAIRS, strict=True):
        prompt, sides = builder(plan)(row, tokenizer)
        text, ends = axolotls_texts(pair, kind)
        for ids, end in zip(sides, ends, strict=True):
            assert [*prompt, *ids] == tokenizer(text + end + tokenizer.eos_token)["input_ids"]


def test_a_side_that_axolotl_ends_with_the_end_token_gets_no_second_one(folder, without_start):
    (folder / "rows.jsonl").write_text(json.dumps(PAIRS[1]))
    source = {"path": "rows.jsonl", "ds_type": "json", "type": "chatml.intel"}
    (folder / "old.yaml").write_text(yaml.safe_dump(AXOLOTL | {"base_model": without_start, "datasets": [source]}))
    plan = import_file("old.yaml", "new.yaml")
    tokenizer = AutoTokenizer.from_pretrained(without_start)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    (source,) = plan.tree["data.sources"]
    (row,) = read_source(**source).rows
    for ids in builder(plan)(row, tokenizer)[1]:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template", ["chatml", "qwen2_5", "llama3"])
def test_ms_swifts_ids_are_its_templates_pieces_each_encoded_alone(folder, capsys, template):
    rows = [
        {
            "messages": [
                *([{"role": "system", "content": pair["system"]}] if "system" in pair else []),
                {"role": "user", "content": pair["question"]},
                {"role": "assistant", "content": pair["chosen"]},
            ],
            "rejected_response": pair["rejected"],
        }
        for pair in PAIRS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "old.yaml").write_text(yaml.safe_dump(SWIFT | {"dataset": "rows.jsonl", "template": template}))
    plan = import_file("old.yaml", "new.yaml", check=True)
    assert "check: 2 of 2 rows have the token ids that ms-swift would build" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def encoded(*texts: str) -> list[int]:
        return [one for text in texts for one in tokenizer.encode(text, add_special_tokens=False)]

    said = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." if template == "qwen2_5" else ""
    for row, pair in zip(read_source("rows.jsonl").rows, PAIRS, strict=True):
        prompt, sides = builder(plan)(row, tokenizer)
        system, user = pair.get("system", said), pair["question"]
        if template == "llama3":
            head = "<|start_header_id|>{}<|end_header_id|>\n\n"
            first = [head.format("system") + system + "<|eot_id|>"] if system else []
            expected = encoded(*first, head.format("user") + user + "<|eot_id|>" + head.format("assistant"))
            expected, end = (
                [*([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []), *expected],
                "<|eot_id|>",
            )
        else:
            first = [f"<|im_start|>system\n{system}<|im_end|>\n"] if system else []
            expected = encoded(*first, f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
            end = "<|im_end|>\n"
        assert prompt == expected
        assert sides == [encoded(pair[side] + end) for side in ("chosen", "rejected")]
