"""Small inputs that once were misread: each as it lies beside the checkout, through the command that a user gives."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align.cli import main
from align.recipe import load_recipe
from align.runs.build import prepare

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"
POLICY = ROOT / "data" / "story-policy"
RECIPE = ROOT / "recipes" / "dpo.yaml"
PLAIN = ROOT / "recipes" / "templates" / "plain.jinja"


@pytest.fixture
def case() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not (CASES / name).exists():
            pytest.skip(f"{CASES / name} is not on this machine")
        return CASES / name

    return find


@pytest.fixture
def align(capsys, tmp_path):
    """Runs a command: its exit code, and what it printed on either stream without line breaks."""

    def run(*words: object) -> tuple[int, str]:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, " ".join((printed.out + " " + printed.err).split())

    return run


def on_rows(rows: Path, *, template: Path = PLAIN, turns: bool = False) -> list[str]:
    """Of a source; with `turns` its texts are turns, as those beside conversations have to be."""
    source = f"{{path: '{rows}', turns: {str(turns).lower()}}}"
    own = [f"data.sources={source}", "data.eval_sources=[]", "data.eval_fraction=0", f"policy.chat_template={template}"]
    return [f"policy.model={POLICY}", "sampling.prompts=0", *own]


def prepared(rows: Path, **options):
    return prepare(load_recipe(RECIPE, on_rows(rows, **options)))


def prompt_and_answers(data, place: int = 0) -> tuple[str, list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    entry = data.train[place]
    return tokenizer.decode(entry["prompt_ids"]), [tokenizer.decode(ids) for ids in entry["completion_ids"]]


def test_orca_question_column(case):
    prompt, answers = prompt_and_answers(prepared(case("orca_question_column") / "rows.jsonl"))
    assert "You are terse." in prompt and prompt.endswith("Name colour number 0.")
    assert answers[0].startswith("The colour number 0 is red.")


def test_context_beside_question(case, align):
    code, said = align("inspect", RECIPE, *on_rows(case("context_beside_question") / "rows.jsonl"))
    assert code == 2 and "row 1, field question" in said and "data.ignore=[question]" in said


def test_system_column_dropped(case):
    data = prepared(case("system_column_dropped") / "rows.jsonl", turns=True)
    for place in range(5):
        assert "Answer in French." in prompt_and_answers(data, place)[0]


def test_prompt_repeated_in_answers(case):
    data = prepared(case("prompt_repeated_in_answers") / "rows.jsonl")
    assert prompt_and_answers(data)[1] == [" good<|endoftext|>", " bad<|endoftext|>"]
    assert data.audit.prompts_repeated == 4


def test_kto_without_label(case, align, tmp_path):
    rows = case("kto_without_label") / "rows.jsonl"
    data = prepare_kto(rows)
    assert [grades for (grades,) in data.train["grades"]] == [0.0, 1.0, 0.0, 1.0, 0.0]
    unlabelled = tmp_path / "rows.jsonl"
    unlabelled.write_text(rows.read_text().replace("kto_tag", "mood").replace("is_desirable", "mood"))
    code, said = align(
        "train", ROOT / "recipes" / "kto.yaml", *on_rows(unlabelled, turns=True), f"output={tmp_path / 'run'}"
    )
    assert code == 2 and "row 1, field label: missing (columns not read: mood)" in said


def prepare_kto(rows: Path):
    return prepare(load_recipe(ROOT / "recipes" / "kto.yaml", on_rows(rows, turns=True)))


def test_folder_of_prefs_splits(case, align):
    folder = case("folder_of_prefs_splits") / "data"
    code, said = align("inspect", RECIPE, *on_rows(folder))
    assert code == 2 and "test_prefs" in said and "train_prefs" in said and "split" in said


def test_lone_surrogate(case, align):
    code, said = align("inspect", RECIPE, *on_rows(case("lone_surrogate") / "rows.jsonl"))
    assert code == 2 and "row 1" in said and "surrogate" in said


THINKING = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
CUTTING = (
    """{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1].lstrip() }}<|endoftext|>{% endfor %}"""
)
CUTTING += """{% if add_generation_prompt %}<assistant><think>
{% endif %}"""


def test_reasoning_content_dropped(case, tmp_path):
    template = tmp_path / "thinking.jinja"
    template.write_text(THINKING)
    rows = case("reasoning_content_dropped") / "rows.jsonl"
    _, answers = prompt_and_answers(prepared(rows, template=template))
    said = json.loads(rows.read_text().splitlines()[0])
    assert said["chosen"][-1]["reasoning_content"] in answers[0]


def test_r1_reasoning_in_content(case, align, tmp_path):
    template = tmp_path / "cutting.jinja"
    template.write_text(CUTTING)
    code, said = align("inspect", RECIPE, *on_rows(case("r1_reasoning_in_content") / "rows.jsonl", template=template))
    assert code == 2 and "row 1" in said and "drops a part of the content" in said and "policy.chat_template" in said


def test_resume_data_changed(case, align, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copy(case("resume_data_changed") / "rows.jsonl", data)
    words = ["train", RECIPE, *on_rows(data), f"output={tmp_path / 'run'}", "train.steps=2", "train.lists_per_step=2"]
    assert align(*words)[0] == 0
    code, said = align(*words)
    assert code == 0 and "finished before; nothing was done" in said
    shutil.copy(case("resume_data_changed") / "rows_later.jsonl", data)
    code, said = align(*words)
    assert code == 2 and "rows" in said


def test_positions_exceeded(case, align, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    learned, rotary = tmp_path / "gpt2", tmp_path / "llama"
    small = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    gpt2 = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=128, **small)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(max_position_embeddings=128, **sizes, **small)
    for folder, config in ((learned, gpt2), (rotary, llama)):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = on_rows(case("positions_exceeded") / "rows.jsonl")[1:]
    options = [*rows, "data.max_length=1024", "train.steps=1", f"output={tmp_path / 'run'}"]
    code, said = align("train", RECIPE, f"policy.model={learned}", *options)
    assert code == 2 and "data.max_length" in said and "128 positions" in said
    code, said = align("train", RECIPE, f"policy.model={rotary}", *options)
    assert code == 0 and "128 positions" in said


@pytest.mark.parametrize("name", ["mpt_logit_scale", "roberta_positions"])
def test_models_that_the_case_makes(case, align, tmp_path, name):
    folder = tmp_path / "model"
    make = [sys.executable, case(name) / "make.py", POLICY, folder]
    subprocess.run(make, check=True, capture_output=True)
    if name == "mpt_logit_scale":
        rows = ["data.limit=20", "train.steps=1", "sampling.prompts=0", f"output={tmp_path / 'run'}"]
        code, said = align("train", RECIPE, f"policy.model={folder}", *rows)
        assert code == 0 and "run directory" in said
    else:
        code, said = align("score", "--reward", folder, case(name) / "rows.jsonl", tmp_path / "out.jsonl", "--no-cache")
        assert code == 0 and "truncated" in said


def test_rewardbench_text_rows(case, align, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    texts = case("rewardbench_text_rows") / "rows.jsonl"
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(as_conversation(json.loads(line)) for line in texts.read_text().splitlines()))
    figures = []
    for rows in (texts, chats):
        out = tmp_path / "figures.json"
        words = ["--reward", tmp_path / "reward", "--benchmark", "rewardbench", "--json", out]
        assert align("evaluate", "rewards", rows, *words)[0] == 0
        figures.append(json.loads(out.read_text())["overall"])
    assert figures[0] == figures[1]


def as_conversation(row: dict) -> str:
    said = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return json.dumps({**row, "prompt": [{"role": "user", "content": row["prompt"]}], **said}) + "\n"


def test_bf16_tail_nan(case):
    """Without AMX torch's own product is finite too, and this shows nothing: the kernels' tests look at the layout."""
    probe = case("bf16_tail_nan") / "probe.py"
    said = subprocess.run([sys.executable, probe], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "linear_logprobs gradient finite: True" in said


def test_every_case_has_a_test():
    if not CASES.exists():
        pytest.skip(f"{CASES} is not on this machine")
    text = Path(__file__).read_text()
    assert [folder.name for folder in CASES.iterdir() if folder.is_dir() and folder.name not in text] == []
