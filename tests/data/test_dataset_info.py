"""A folder with LLaMA-Factory's `dataset_info.json`: its columns, tags and formatting say what is what."""

import json

import pytest

from align.data import read_source
from align.errors import UserError

PAIR = {"frage": "q", "dazu": "r", "gut": "yes", "schlecht": "no", "vorher": [["a", "b"]], "rolle": "Be brief."}
CHAT = {
    "talk": [{"who": "boss", "what": "Be brief."}, {"who": "me", "what": "q"}],
    "gut": {"who": "you", "what": "yes"},
    "schlecht": {"who": "you", "what": "no"},
}
AGENT = {
    "talk": [{"who": "me", "what": "q"}, {"who": "calls", "what": '{"name": "add", "arguments": {}}'}]
    + [{"who": "sees", "what": "2"}, {"who": "you", "what": "no"}],
    "mag": False,
}
TAGS = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you", "system_tag": "boss"}
TAGS |= {"observation_tag": "sees", "function_tag": "calls"}
SIDES = {"chosen": "gut", "rejected": "schlecht"}
INFO = {
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "frage", "query": "dazu", "history": "vorher", "system": "rolle", **SIDES},
    },
    "chat": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "talk", **SIDES},
        "tags": TAGS,
    },
    "agent": {
        "file_name": "agent.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "kto_tag": "mag"},
        "tags": TAGS,
    },
    "plain": {"file_name": "plain.json", "ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}},
    "far": {"hf_hub_url": "someone/data", "ranking": True},
}
ASKED = [{"role": "user", "content": "q"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR]))
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "agent.json").write_text(json.dumps([AGENT]))
    (tmp_path / "plain.json").write_text(json.dumps([{"instruction": "q", "chosen": "yes", "rejected": "no"}]))
    return tmp_path


EXPECTED = {
    "pairs": (
        [*SYSTEM, {"role": "user", "content": "a"}, *said("b"), {"role": "user", "content": "q\nr"}],
        (said("yes"), said("no")),
        (1.0, 0.0),
    ),
    "chat": ([*SYSTEM, *ASKED], (said("yes"), said("no")), (1.0, 0.0)),
    "plain": ("q", ("yes", "no"), (1.0, 0.0)),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("by", ["the folder", "the file"])
def test_a_data_set_is_read_as_it_is_described(folder, name, by):
    place = (folder, name) if by == "the folder" else (folder / INFO[name]["file_name"], None)
    (row,) = read_source(str(place[0]), split=place[1]).rows
    assert (row.prompt, row.completions, row.grades) == EXPECTED[name]
    assert row.unread == () and row.source == str(folder / INFO[name]["file_name"])


def test_tools_in_messages_of_their_own(folder):
    (row,) = read_source(str(folder), split="agent").rows
    everything = [*row.prompt, *row.completions[0]]
    assert everything[1]["tool_calls"] == [CALL] and everything[2]["role"] == "tool" and everything[3:] == said("no")
    assert row.grades == (0.0,)


def test_the_only_file_needs_no_name(folder):
    for name in ("pairs.json", "agent.json", "plain.json"):
        (folder / name).unlink()
    assert read_source(str(folder)).rows[0].completions == (said("yes"), said("no"))


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (None, r"describes 5 data sets, and `split` names none; name one of pairs, chat, agent, plain with `split`"),
        ("other", "`split` is 'other'; name one of pairs"),
        ("far", "has `far` at `hf_hub_url: someone/data`"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused(folder, split, said):
    with pytest.raises(UserError, match=said):
        read_source(str(folder), split=split)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_samples": 5}, "`num_samples` of `pairs` is not read"),
        ({"columns": "frage"}, "`columns` or `tags` of `pairs` is no object"),
        ({"file_name": "gone.json"}, "has `pairs` at `file_name: gone.json`"),
    ],
)
def test_what_a_description_asks_for_and_is_not_done_is_refused(folder, change, said):
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": {**INFO["pairs"], **change}}))
    with pytest.raises(UserError, match=said):
        read_source(str(folder), split="pairs")


def test_a_column_that_has_another_ones_name_is_refused(folder):
    (folder / "pairs.json").write_text(json.dumps([{**PAIR, "instruction": "p"}]))
    with pytest.raises(UserError, match=r"pairs.json, row 1, field instruction: .* the name that `frage` has"):
        read_source(str(folder), split="pairs")


@pytest.mark.parametrize(
    ("split", "row", "field"),
    [
        ("pairs", {**PAIR, "gut": 5}, "gut"),
        ("pairs", {name: PAIR[name] for name in PAIR if name != "schlecht"}, "schlecht|rejected"),
        ("chat", {**CHAT, "talk": [{"who": "chief", "what": "q"}]}, r"talk\[0\].role"),
        ("chat", {**CHAT, "gut": [{"who": "you"}]}, r"gut\[0\]"),
    ],
)
def test_a_malformed_row_is_refused_by_the_column_that_the_file_has(folder, split, row, field):
    (folder / INFO[split]["file_name"]).write_text(json.dumps([row]))
    with pytest.raises(UserError, match=f"row 1, field ({field}): "):
        read_source(str(folder), split=split)


def test_a_file_that_is_described_in_two_ways_is_refused(folder):
    other = {"file_name": "pairs.json", "columns": {"prompt": "dazu", **SIDES}}
    (folder / "dataset_info.json").write_text(json.dumps({**INFO, "other": other}))
    with pytest.raises(UserError, match="describes it as pairs, other; give the folder"):
        read_source(str(folder / "pairs.json"))
    assert read_source(str(folder), split="pairs").rows[0].grades == (1.0, 0.0)


def test_what_datasets_writes_under_that_name_describes_nothing(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"builder_name": "json", "features": {}}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}))
    assert len(read_source(str(tmp_path)).rows) == 1


def test_a_description_that_is_no_json_is_refused(folder):
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="dataset_info.json: not valid JSON"):
        read_source(str(folder))
