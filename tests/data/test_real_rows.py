"""Real conversations and pairs of `../shared/data`, in the words of each publisher, are read as what they are."""

import gzip
import json

import pytest
from spellings import bedrock, gemini, in_messages_of_their_own

from align.data import read_source
from align.data.formats import read_row

sharegpt = in_messages_of_their_own(("from", "value"), {"user": "human", "assistant": "gpt"}, "function_call")


def lines(file):
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as rows:
        return [json.loads(line) for line in rows]


@pytest.fixture
def chats(shared_data):
    """Prompt, better and worse answer of 300 conversations, some of several turns, some with a system text."""
    rows = lines(shared_data / "chat_pairs_demo" / "pairs.jsonl.gz")
    return [(row["messages"], row["chosen"], row["rejected"]) for row in rows]


@pytest.fixture
def pairs(shared_data):
    """The same of 1100 plain instructions."""
    rows = lines(shared_data / "quickstart_politeness" / "pairs.jsonl")
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def without_system(messages):
    texts = [own["content"] for own in messages if own["role"] == "system"]
    return texts[0] if texts else None, [own for own in messages if own["role"] != "system"]


def as_gemini(prompt, good, bad):
    system, rest = without_system(prompt)
    items = [{"score": int(own is good), "completion": gemini([own])[0]} for own in (bad, good)]
    beside = {} if system is None else {"system_instruction": {"parts": [{"text": system}]}}
    return {**beside, "contents": gemini(rest), "completions": items[::-1]}


def as_nova(prompt, good, bad):
    system, rest = without_system(prompt)
    labels = {"preferred": good, "non-preferred": bad}
    candidates = [{"content": [{"text": own["content"]}], "preferenceLabel": label} for label, own in labels.items()]
    beside = {} if system is None else {"system": [{"text": system}]}
    return {**beside, "messages": [*bedrock(rest), {"role": "assistant", "candidates": candidates}]}


def as_alpaca(prompt, good, bad):
    system, rest = without_system(prompt)
    texts = [own["content"] for own in rest]
    history = [[texts[k], texts[k + 1]] for k in range(0, len(texts) - 1, 2)]
    sides = {"chosen": good["content"], "rejected": bad["content"]}
    turns = {"instruction": texts[-1], "input": "", "history": history}
    return {"system": system, **turns, **sides} if history else None


def as_argilla(prompt, good, bad):
    fields = {"context": prompt, "response-1": good["content"], "response-2": bad["content"]}
    return {"fields": fields, "responses": {"better": [{"value": "response-1"}]}, "suggestions": {}}


CHATS = {
    "openai": lambda p, c, r: {"input": {"messages": p}, "preferred_output": [c], "non_preferred_output": [r]},
    "gemini": as_gemini,
    "nova": as_nova,
    "sharegpt": lambda p, c, r: {
        "conversations": sharegpt(p),
        "chosen": sharegpt([c])[0],
        "rejected": sharegpt([r])[0],
    },
    "sharegpt, whole": lambda p, c, r: {"chosen": sharegpt([*p, c]), "rejected": sharegpt([*p, r])},
    "ms-swift": lambda p, c, r: {"messages": [*p, c], "rejected_response": r["content"]},
    "ms-swift, whole": lambda p, c, r: {"messages": [*p, c], "rejected_messages": [*p, r]},
    "alpaca": as_alpaca,
    "chosen_response": lambda p, c, r: {"chosen_response": [*p, c], "rejected_response": [*p, r]},
    "capybara": lambda p, c, r: {"chosen": [*p, c], "rejected": [*p, r], "new_generations": ["another"]},
    "argilla": as_argilla,
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_in_every_spelling(chats, name):
    read = 0
    for prompt, good, bad in chats:
        raw = CHATS[name](prompt, good, bad)
        if raw is None:
            continue
        row = read_row(json.loads(json.dumps(raw)), "rows.jsonl", 1)
        assert (row.prompt, row.completions) == (prompt, ([good], [bad]))
        assert (row.grades or row.rewards) == (1.0, 0.0)
        read += 1
    assert read >= (100 if name == "alpaca" else 300)


PAIRS = {
    "orca": lambda p, c, r: {"system": "", "question": p, "chosen": c, "rejected": r},
    "alpaca": lambda p, c, r: {"instruction": p, "input": "", "output": [c, r]},
    "distilabel": lambda p, c, r: {"instruction": p, "generations": [c, r], "ratings": [1, 0], "chosen": c},
    "prometheus": lambda p, c, r: {
        "orig_instruction": p,
        "instruction": f"###Task {p}",
        "orig_response_A": c,
        "orig_response_B": r,
        "orig_preference": "A",
    },
    "ms-swift": lambda p, c, r: {"query": p, "response": c, "rejected_response": r},
    "response_j": lambda p, c, r: {"question": p, "response_j": c, "response_k": r},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_in_every_shape(pairs, name):
    for prompt, good, bad in pairs:
        row = read_row(PAIRS[name](prompt, good, bad), "rows.jsonl", 1)
        assert (row.prompt, row.completions, row.grades or row.rewards) == (prompt, (good, bad), (1.0, 0.0))
    assert len(pairs) == 1100


def test_dialogues_with_roles(shared_data):
    """The dialogues of HH as conversations with the roles `human` and `assistant`, as copies of it have them."""
    file = shared_data / "hh_harmless" / "pairs.jsonl.gz"
    read = read_source(str(file)).rows
    texts = lines(file)
    for row in read:
        raw = {side: turns(texts[row.number - 1][side]) for side in ("chosen", "rejected")}
        chat = read_row(raw, "rows.jsonl", row.number)
        assert chat.completions[0][-1]["content"] == row.completions[0]
        assert chat.completions[1][-1]["content"] == row.completions[1]
        said = [*chat.prompt, *chat.completions[0]]
        assert [own["content"] for own in said] == [own["content"] for own in raw["chosen"]]
        assert {own["role"] for own in said} == {"user", "assistant"}
    assert len(read) == 1798


def turns(dialogue):
    marks = {"\n\nHuman:": "human", "\n\nAssistant:": "assistant"}
    found = sorted((at, mark) for mark in marks for at in places(dialogue, mark))
    ends = [at for at, _ in found[1:]] + [len(dialogue)]
    return [
        {"role": marks[mark], "content": dialogue[at + len(mark) : end]}
        for (at, mark), end in zip(found, ends, strict=True)
    ]


def places(text, mark):
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + 1)
