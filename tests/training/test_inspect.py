"""What `align inspect` shows of a row is what training does with each of its tokens, in the terminal and on a page."""

import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from align.errors import UserError
from align.report.rows_page import ShownCompletion, ShownRow, ShownToken, render_rows
from align.runs.build import prepare
from align.training.inspect import inspect_recipe
from align.training.token_rows import shown_row

ROLES = {"user": "w3", "assistant": "w4", "tool": "w5"}
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w3', 'assistant': 'w4', 'tool': 'w5'}[m.role] }} {{ m.content }} </s>"
    "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)
GOOD = [("assistant", "w10 w11", 1), ("tool", "w20", 1), ("assistant", "w12", 1), ("user", "w21 w22", 1)]
GOOD += [("assistant", "w13 w14 w15", 0.5), ("user", "w23", 1), ("assistant", "w16", 0), ("user", "w24", 1)]
GOOD += [("assistant", "w17", 1)]
BAD = [("assistant", "w18", 1)]


def messages(turns):
    return [{"role": role, "content": text, **({"weight": own} if own != 1 else {})} for role, text, own in turns]


@pytest.fixture
def trajectories(make_recipe, tmp_path):
    """A recipe on lists of a trajectory and a single answer."""
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    row = {"chosen": messages(GOOD), "rejected": messages(BAD)}
    rows = [row | {"prompt": [{"role": "user", "content": f"w{30 + k}"}]} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    data = {"sources": [str(tmp_path / "rows.jsonl")], "eval_fraction": 0.0, "append_eos": False}
    return make_recipe(policy={"chat_template": str(tmp_path / "t.jinja")}, data=data, objective="logistic")


def expected(turns):
    """(word, its weight or None) of a completion, written out from the messages."""
    found = []
    for place, (role, text, weight) in enumerate(turns):
        head = [] if place == 0 else [(ROLES[role], None)]
        own = weight if role == "assistant" and weight else None
        found += head + [(word, own) for word in (*text.split(), "</s>")]
    return found


def shown(recipe, console=None, **options):
    console = console or Console(width=500, file=io.StringIO())
    inspect_recipe(recipe, rows=1, console=console, **options)
    return console.file.getvalue()


def stretches(lines):
    """(name, words) of the lines that show tokens."""
    names = ("prompt ", "learnt ", "context ", "x0.5 ")
    return [
        (name, words.split("|"))
        for name, _, words in (line[2:].partition(" ") for line in lines if line.startswith("  "))
        if any(name + " " == own for own in names)
    ]


def test_every_token_stands_behind_its_role_and_needs_no_colour(trajectories):
    out = shown(trajectories)
    assert "\x1b" not in out
    found = stretches([line for line in out.splitlines()])
    weights = {"learnt": 1, "context": None, "x0.5": 0.5}
    completions = [(word.strip(), weights[name]) for name, words in found if name != "prompt" for word in words]
    assert completions == expected(GOOD) + expected(BAD)
    learnt = sum(weight is not None for _, weight in expected(GOOD))
    assert f"grade 1.000, {len(expected(GOOD))} tokens, {learnt} trained on, " in out
    assert f"grade 0.000, {len(expected(BAD))} tokens, trained on\n" in out


def test_the_audit_counts_tokens_by_what_is_learnt_and_whose_they_are(trajectories):
    counts = prepare(trajectories).audit.to_dict()["tokens_by_role"]
    turns = [len(text.split()) + 1 for role, text, weight in GOOD if role == "assistant" and weight]
    first = turns[0] + len(expected(BAD))
    assert list(counts["learnt"].values()) == [3 * first, 3 * sum(turns[1:])]
    read = {
        "of prompts": len(["w3", "w30", "</s>", "w4"]),
        "of tool messages": len(["w5", "w20", "</s>", "w4"]),
        "of user messages": len(["w3", "w21", "w22", "</s>", "w4"]),
        "of user and assistant messages": len(["w3", "w23", "</s>", "w4", "w16", "</s>", "w3", "w24", "</s>", "w4"]),
    }
    assert counts["read"] == {whose: 3 * count for whose, count in read.items()}
    out = shown(trajectories)
    assert f"{3 * first} of the assistant's first turn in a completion; {3 * sum(turns[1:])} of its later turns" in out


def test_counts_hold_where_a_trajectory_is_cut(trajectories):
    lengths = [len(expected(GOOD)[:at]) for at in (5, 9, 17)]
    for length in lengths:
        data = trajectories.data.model_copy(update={"max_length": length + 4})
        audit = prepare(trajectories.model_copy(update={"data": data})).audit
        kept = expected(GOOD)[:length] + expected(BAD)
        assert sum(audit.tokens_by_role["learnt"].values()) == 3 * sum(own is not None for _, own in kept)
        assert sum(audit.tokens_by_role["read"].values()) == 3 * (4 + sum(own is None for _, own in kept))
        assert "of other context" not in audit.tokens_by_role["read"]


def test_all_tokens_of_text_and_of_scored_completions(make_recipe):
    parts = prepare(make_recipe())
    lists = [*parts.train, *parts.heldout]
    tokens = sum(len(ids) for own in lists for ids in own["completion_ids"])
    prompts = sum(len(own["prompt_ids"]) for own in lists)
    assert parts.audit.tokens_by_role == {
        "learnt": {"of the assistant's first turn in a completion": tokens},
        "read": {"of prompts": prompts},
    }
    scored = prepare(make_recipe(task="reward", objective="bradley_terry")).audit.tokens_by_role
    assert scored["learnt"] == {} and set(scored["read"]) == {"of prompts", "of completions"}


class Tokens(HTMLParser):
    """What a page says of its tokens, and whatever it would load."""

    def __init__(self):
        super().__init__()
        self.tokens, self.loads, self.inside = [], [], None

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.loads += [value for name, value in attributes if name in ("src", "href") or "url(" in (value or "")]
        if tag == "span" and "data-id" in known:
            self.inside = known
            self.tokens.append([int(known["data-id"]), known["class"], known.get("data-weight"), ""])

    def handle_endtag(self, tag):
        self.inside = None if tag == "span" else self.inside

    def handle_data(self, text):
        if self.inside:
            self.tokens[-1][3] += text


def test_the_page_shows_every_token_with_its_id_role_and_weight(trajectories, tmp_path):
    file = tmp_path / "new" / "page.html"
    out = shown(trajectories, html=str(file))
    assert f"page: {file}" in out
    page = Tokens()
    page.feed(file.read_text())
    example = prepare(trajectories).train[0]
    assert [own[0] for own in page.tokens] == example["prompt_ids"] + sum(example["completion_ids"], [])
    roles = {None: ("context", None), 1: ("learnt", None), 0.5: ("weighed", "0.5")}
    known = [("prompt", None)] * len(example["prompt_ids"])
    known += [roles[weight] for _, weight in expected(GOOD) + expected(BAD)]
    assert [(role, weight) for _, role, weight, _ in page.tokens] == known
    assert page.loads == []
    assert "prefers-color-scheme: dark" in file.read_text() and "of its later turns" in file.read_text()


def test_what_a_page_shows_is_text_and_no_markup():
    evil = "<script>alert('x')</script>&\"'"
    token = ShownToken(evil, 7, "learnt", 1.0)
    text = render_rows(evil, [ShownRow(evil, evil, [], [ShownCompletion(1.0, [token])])], {evil: evil})
    page = Tokens()
    page.feed(text)
    assert page.tokens == [[7, "learnt", None, evil]] and text.count("<script") == 1


def test_a_page_that_cannot_be_written_is_one_sentence(trajectories, tmp_path):
    with pytest.raises(UserError, match="cannot be written .*; give --html another file"):
        shown(trajectories, html=str(tmp_path))


@pytest.mark.parametrize("text", ["äöü 日本語 😀 " * 12, "the cat sat " * 40, "\n\n\t a"])
@pytest.mark.parametrize("model", ["stories3m", "stories260k"])
def test_texts_of_tokens_joined_are_the_text(shared_data, model, text):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    example = {"id": "1", "source": "r", "row": 1, "prompt_ids": ids[:1], "completion_ids": [ids[1:]], "grades": [1.0]}
    row = shown_row(example, tokenizer, learns=True)
    joined = "".join(token.text for token in (*row.prompt, *row.completions[0].tokens))
    assert joined.strip() == tokenizer.decode(ids).strip()
