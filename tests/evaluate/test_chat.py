"""`align chat`: who answers what, from which weights, under which template and with which memory."""

import builtins
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from align.cli import main
from align.data.source_view import SourceView
from align.errors import UserError
from align.evaluate.chat import chat, open_chat
from align.evaluate.rows import _section
from align.evaluate.sampling import sample_completions
from align.model.adapters import Full
from align.model.config import PolicySection
from align.model.policy import load_policy
from align.training.train import train

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}w9 "
"""Roles by their first letter, which is no word of the vocabulary, and w9 before an answer."""
QUESTION = "w4 w5 w3"


@pytest.fixture
def run(make_recipe):
    """Trains a policy far from its start; returns its recipe."""

    def trained(**sections):
        settings = {"steps": 4, "learning_rate": 0.3, "warmup_ratio": 0.0}
        recipe = make_recipe(train=settings, sampling={"prompts": 0, "max_tokens": 6, "temperature": 0.7}, **sections)
        train(recipe)
        return recipe

    return trained


def by_hand(folder: str | Path, prompt: str, **sampling) -> str:
    """What a whole model writes after a text."""
    policy = load_policy(PolicySection(model=str(folder), adapter=Full()), keep_reference=False)
    ((text,),) = sample_completions(policy.model, policy.tokenizer, [policy.tokenizer(prompt)["input_ids"]], **sampling)
    return text


@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "lora", "rank": 4, "alpha": 8},
        {"name": "full"},
        {"name": "pissa", "rank": 4},
        {"name": "eva", "rank": 4},
    ],
)
def test_before_is_the_start_and_after_is_what_an_export_says(run, tmp_path, tiny_policy, adapter):
    recipe = run(policy={"model": str(tiny_policy), "adapter": adapter})
    (answer,) = chat(recipe.output, prompts=[QUESTION], as_json=True)
    main(["export", recipe.output, str(tmp_path / "merged"), "--merge"])
    options = {"max_tokens": 6, "temperature": 0.7, "seed": recipe.train.seed}
    assert answer["before"] == by_hand(tiny_policy, QUESTION, **options)
    assert answer["after"] == by_hand(tmp_path / "merged", QUESTION, **options)
    assert answer["before"] != answer["after"]


def test_an_adapters_folder_has_its_base_before_it_and_a_merged_one_answers_alone(run, tmp_path):
    recipe = run()
    (answer,) = chat(recipe.output, prompts=[QUESTION], as_json=True)
    main(["export", recipe.output, str(tmp_path / "adapter")])
    main(["export", recipe.output, str(tmp_path / "merged"), "--merge"])
    given = {"max_tokens": 6, "temperature": 0.7}
    assert chat(str(tmp_path / "adapter"), prompts=[QUESTION], as_json=True, **given) == [answer]
    (alone,) = chat(str(tmp_path / "merged"), prompts=[QUESTION], as_json=True, **given)
    assert alone == {"prompt": QUESTION, "answer": answer["after"]}


def test_each_side_remembers_its_own_answers_under_the_runs_template(run, tmp_path, tiny_policy):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    recipe = run(policy={"model": str(tiny_policy), "chat_template": str(template)})
    none = dict.fromkeys(("max_tokens", "temperature", "top_k", "top_p"))
    opened = open_chat(recipe.output, system="w7", plain=False, chat_template=None, seed=None, sampling=none)
    answers: dict[str, list[str]] = {}
    for side in opened.sides:
        answers[side.name] = [opened.ask(side, "w4"), opened.ask(side, "w5")]
        first, second = answers[side.name]
        roles = [(m["role"], m["content"]) for m in side.messages]
        assert roles == [("system", "w7"), ("user", "w4"), ("assistant", first), ("user", "w5"), ("assistant", second)]
        history = f"s w7 u w4 a {first} u w5 w9 "
        ids = opened.policy.tokenizer(history, add_special_tokens=False)["input_ids"]
        assert opened._encode(side.messages[:-1])[-len(ids) :] == ids
    assert answers["before"] != answers["after"]
    opened.reset()
    assert [side.messages for side in opened.sides] == [[{"role": "system", "content": "w7"}]] * 2
    plain = open_chat(recipe.output, system=None, plain=True, chat_template=None, seed=None, sampling=none)
    assert plain._encode("w4")[-1] == plain.policy.tokenizer.convert_tokens_to_ids("w4")


def test_a_runs_template_options_hold_in_chat_and_in_its_rows_too(run, tmp_path, tiny_policy):
    template = tmp_path / "template.jinja"
    template.write_text("{% if loud %}w8 {% endif %}" + TEMPLATE)
    chats = [{"prompt": [{"role": "user", "content": "w4"}], "chosen": "w5", "rejected": f"w{k}"} for k in (6, 7)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    data = {"sources": [str(tmp_path / "chats.jsonl")], "eval_fraction": 0, "template_options": {"loud": True}}
    recipe = run(policy={"model": str(tiny_policy), "chat_template": str(template)}, data=data)
    none = dict.fromkeys(("max_tokens", "temperature", "top_k", "top_p"))
    opened = open_chat(recipe.output, system=None, plain=False, chat_template=None, seed=None, sampling=none)
    loud = opened.policy.tokenizer.convert_tokens_to_ids("w8")
    assert loud in opened._encode([{"role": "user", "content": "w4"}])
    assert _section(Path(recipe.output), "rows.jsonl", None, SourceView()).template_options == {"loud": True}


def test_piped_prompts_are_answered_each_by_itself(run, capsys, monkeypatch):
    recipe = run()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\nw6 w6\n{QUESTION}\n"))
    capsys.readouterr()
    main(["chat", recipe.output, "--json", "--temperature", "0"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [QUESTION, "w6 w6", QUESTION]
    assert lines[0] == lines[2] and set(lines[0]) == {"prompt", "before", "after"}
    main(["chat", recipe.output, "--prompt", QUESTION, "--temperature", "0"])
    out = capsys.readouterr().out
    assert f"before  {lines[0]['before'].strip()}\nafter   {lines[0]['after'].strip()}\n" in out
    assert not any(character < " " and character != "\n" for character in out)


def test_the_sampling_can_be_laid_over(run):
    recipe = run()

    def ask(**options) -> dict[str, str]:
        return chat(recipe.output, prompts=[QUESTION], as_json=True, **options)[0]

    assert ask(seed=1) != ask() and ask(seed=0) == ask()
    assert len(ask(max_tokens=2, temperature=0)["after"].split()) <= 2
    state = torch.random.get_rng_state()
    ask(top_k=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_typed_prompts_and_commands(run, monkeypatch, tiny_policy, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    recipe = run(policy={"model": str(tiny_policy), "chat_template": str(template)})
    typed = iter(["w4", "/what", "", "w4 " * 3000, "w5", "/reset", "w4", "/quit", "w6"])
    monkeypatch.setattr(builtins, "input", lambda *_: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    screen = io.StringIO()
    answers = chat(recipe.output, console=Console(file=screen, force_terminal=True, width=80), max_tokens=4)
    assert [answer["prompt"] for answer in answers] == ["w4", "w5", "w4"]
    assert answers[0] == answers[2], "/reset forgets"
    assert next(typed) == "w6", "/quit ends"
    shown = screen.getvalue()
    assert "/reset, a shorter prompt" in shown and "/quit ends" in shown
    assert "before" in shown and "after" in shown


def test_mistakes_are_one_sentence(run, make_recipe, tmp_path, monkeypatch):
    recipe = run()
    with pytest.raises(UserError, match="without a chat template"):
        chat(recipe.output, prompts=["w4"], system="w5")
    with pytest.raises(UserError, match="more than the model's"):
        chat(recipe.output, prompts=["w4"], max_tokens=10**6)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="--prompt"):
        chat(recipe.output)
    with pytest.raises(UserError, match=str(tmp_path / "absent")):
        chat(str(tmp_path / "absent"), prompts=["w4"])
