"""Which prompts are sampled, and what is counted of the others."""

import io
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console

from align.errors import UserError
from align.evaluate.sampling import Sampled
from align.rollout.config import TransferQ
from align.rollout.engine import Sampling
from align.rollout.prompts import decoding_context, read_prompts
from align.rollout.sample import rewards_of, sampled_line
from align.training.inspect import inspect_recipe
from align.training.online import chosen_prompts


def test_each_prompt_once_and_the_rest_counted(online_recipe):
    prompts = read_prompts(online_recipe())
    assert [row.id for row in prompts.rows] == [f"p{i}" for i in range(12)]
    assert prompts.left_out == {"prompt seen before": 1, "prompt of more than 24 tokens": 1}
    assert prompts.ids[1] == [8, 9] and prompts.rows[1].meta == {"answer": 1}
    assert prompts.ends == (2,)


def test_a_prompts_weight_goes_with_its_samples_and_0_leaves_it_out(online_recipe, tmp_path):
    file = tmp_path / "prompts.jsonl"
    stated = ({"weight": 2}, {}, {"weight": 0}, {"margin": "x"})
    lines = [{"prompt": f"w{5 + i}", **own} for i, own in enumerate(stated)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(online_recipe(data={"sources": [str(file)]}))
    assert [row.loss_weight for row in prompts.rows] == [2.0, 1.0, 1.0]
    assert prompts.left_out == {"weight 0": 1}
    assert prompts.rows[2].meta == {"margin": "x"}, "a margin is between completions, which are not read"
    sampling = Sampling(completions=1, max_tokens=1, seed=0)
    lines = [sampled_line(row, prompts, [5], [], sampling, 0) for row in prompts.rows]
    assert [line.get("weight") for line in lines] == [2.0, None, None]


def test_rows_that_share_an_id_keep_apart(online_recipe, tmp_path):
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file, word in zip(files, ("w5", "w6"), strict=True):
        file.write_text(json.dumps({"id": 7, "prompt": word}) + "\n")
    prompts = read_prompts(online_recipe(data={"sources": [str(file) for file in files]}))
    assert [row.id for row in prompts.rows] == ["7", f"{files[1]}:1"]


def test_a_longest_prompt_is_honoured(online_recipe):
    prompts = read_prompts(online_recipe(data={"max_prompt_length": 2}))
    assert max(map(len, prompts.ids)) == 2
    assert prompts.left_out["prompt of more than 2 tokens"] == 8
    with pytest.raises(UserError, match="rollout.max_tokens: 8 leaves no room in data.max_length 8"):
        read_prompts(online_recipe(data={"max_length": 8}))


def test_where_no_prompt_is_left_the_reasons_are_said(online_recipe, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w5 w6 w7"}) + "\n")
    with pytest.raises(UserError, match=r"no prompt is left \(1 prompt of more than 2 tokens\)"):
        read_prompts(online_recipe(data={"sources": [str(tmp_path / "long.jsonl")], "max_length": 10}))


def test_iterations_take_all_prompts_in_turn(online_recipe):
    prompts = read_prompts(online_recipe())
    taken = [[row.id for row in chosen_prompts(prompts, 4, i, seed=3).rows] for i in range(1, 7)]
    orders = [[name for names in taken[i : i + 3] for name in names] for i in (0, 3)]
    assert [sorted(order) for order in orders] == [sorted(f"p{i}" for i in range(12))] * 2
    assert orders[0] != orders[1]  # each turn in an order of its own
    across = chosen_prompts(prompts, 7, 2, seed=3).rows  # takes from two turns, and no prompt twice
    assert len({row.id for row in across}) == len(across) >= 5
    assert chosen_prompts(prompts, 12, 4, seed=3) == prompts == chosen_prompts(prompts, None, 4, seed=3)


@pytest.mark.parametrize(("wanted", "iterations"), [(None, 3), (1, 24)])
def test_a_source_of_a_third_of_the_weight_is_sampled_a_third_as_often(wanted, iterations, online_recipe, tmp_path):
    """Three turns are 3 * 6 prompts of one source and 6 of the other, as whole turns or prompt by prompt."""
    sources = []
    for name, weight, words in (("often", 3, range(10, 16)), ("seldom", 1, range(20, 26))):
        lines = [json.dumps({"id": f"{name}{word}", "prompt": f"w{word}"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        sources.append({"path": str(tmp_path / f"{name}.jsonl"), "weight": weight})
    prompts = read_prompts(online_recipe(data={"sources": sources}))
    chosen = [chosen_prompts(prompts, wanted, i, seed=5).rows for i in range(1, iterations + 1)]
    taken = Counter(row.id for rows in chosen for row in rows)
    assert taken == {f"often{i}": 3 for i in range(10, 16)} | {f"seldom{i}": 1 for i in range(20, 26)}


def test_inspect_shows_the_prompts_of_an_online_recipe(online_recipe):
    console = Console(width=200, record=True, file=io.StringIO())
    inspect_recipe(online_recipe(), rows=2, console=console)
    shown = console.export_text()
    assert "12 prompts; left out: 1 prompt seen before, 1 prompt of more than 24 tokens" in shown
    assert "p1 (" in shown and "w8|w9" in shown and "p2 (" not in shown


def test_text_that_the_chat_template_leaves_out_of_prompts_is_said(online_recipe, tmp_path):
    template = "{% for m in messages if m.role != 'system' %}{{ m.content + ' ' }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    chats = [
        [{"role": "system", "content": "w9"}] * (i > 0) + [{"role": "user", "content": f"w{i + 5}"}] for i in range(3)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    policy = {"chat_template": str(tmp_path / "t.jinja")}
    recipe = online_recipe(data={"sources": [str(file)]}, policy=policy)
    assert read_prompts(recipe).text_left_out == {"system content": 2}
    console = Console(file=io.StringIO(), width=300)
    inspect_recipe(recipe, rows=1, console=console)
    assert "3 prompts; 2 prompts of which the chat template left text out (system content)" in console.file.getvalue()


def asked_with_tools(tmp_path):
    template = "{{ 'w7 ' if loud }}{% for t in tools or [] %}{{ t.function.name + ' ' }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template + "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    row = {"prompt": [{"role": "user", "content": "w5"}], "tools": [{"name": "w9"}, {"name": "w8"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "chat_template_kwargs": {"loud": True}}) + "\n")
    return {"data": {"sources": [str(tmp_path / "rows.jsonl")]}, "policy": {"chat_template": str(tmp_path / "t.jinja")}}


def test_tools_and_options_are_in_the_prompt_and_in_what_is_written(online_recipe, tmp_path):
    prompts = read_prompts(online_recipe(**asked_with_tools(tmp_path)))
    assert prompts.tokenizer.decode(prompts.ids[0]).split()[-4:] == ["w7", "w9", "w8", "w5"]
    drawn = [Sampled([5], [0.0], True)]
    line = sampled_line(prompts.rows[0], prompts, prompts.ids[0], drawn, Sampling(1, 4, seed=0), 0)
    schemas = [{"type": "function", "function": {"name": name}} for name in ("w9", "w8")]
    assert (line["tools"], line["chat_template_kwargs"]) == (schemas, {"loud": True})
    seen = []
    scorer = SimpleNamespace(score=lambda prompts, texts: seen.extend(prompts) or [0.0] * len(texts))
    assert rewards_of(scorer, None, [json.loads(json.dumps(line))]) == [0.0]
    assert seen[0].given == {"loud": True, "tools": schemas} and seen[0] == line["prompt"]


def test_a_template_that_drops_a_prompts_tools_is_refused(online_recipe, tmp_path):
    sections = asked_with_tools(tmp_path)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    with pytest.raises(UserError, match="rows.jsonl, row 1: the chat template drops the row's tools; set"):
        read_prompts(online_recipe(**sections))
    sections["data"]["template_options"] = {"quiet": True}
    with pytest.raises(UserError, match="^data.template_options.quiet: nothing in the chat template reads it"):
        read_prompts(online_recipe(**sections))


def test_tools_that_the_reward_of_transfer_q_would_not_see_are_refused(online_recipe, tmp_path):
    prompts = read_prompts(online_recipe(**asked_with_tools(tmp_path)))
    decoding = TransferQ(reward={"name": "length", "max": 4}, baseline=str(tmp_path))
    with pytest.raises(UserError, match="rows.jsonl, row 1, field tools: the reward of `rollout.decoding: transfer_q`"):
        decoding_context(decoding, prompts.rows[0], prompts.ids[0], prompts.tokenizer, None)
