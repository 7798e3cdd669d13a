"""Neighbouring rows become lists, and trees a list for each message that was answered; nothing is lost uncounted."""

import json
from pathlib import Path

import pytest

from align.data import read_source
from align.errors import UserError

FOLDER = Path(__file__).parents[2] / "data" / "formats"
NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(rows):
    """What each answer of each row says."""
    return [tuple(own[0]["content"] for own in row.completions) for row in rows]


def steered(prompt, response, helpfulness, **others):
    return {"prompt": prompt, "response": response, **dict.fromkeys(NAMES, 1), "helpfulness": helpfulness, **others}


@pytest.mark.parametrize("sizes", [(1,), (2, 2), (1, 3, 1, 2), (4, 1)])
def test_neighbours_of_one_prompt_are_one_list(tmp_path, sizes):
    rows = [steered(f"q{i}", f"{i}.{k}", k) for i, size in enumerate(sizes) for k in range(size)]
    found = read_source(write(tmp_path, *rows))
    assert texts(found.rows) == [tuple(f"{i}.{k}" for k in range(size)) for i, size in enumerate(sizes)]
    assert [row.rewards for row in found.rows] == [tuple(map(float, range(size))) for size in sizes]
    assert [row.number for row in found.rows] == [1 + sum(sizes[:i]) for i in range(len(sizes))]
    assert (found.read, found.joined) == (len(sizes), len(rows) - len(sizes))


def test_rows_apart_and_rows_of_general_formats_stay_rows(tmp_path):
    rows = [steered("q", "a", 1), steered("r", "b", 1), steered("q", "c", 2)]
    assert texts(read_source(write(tmp_path, *rows)).rows) == [("a",), ("b",), ("c",)]
    lone = [{"prompt": "q", "completion": text, "label": True} for text in "ab"]
    assert [row.completions for row in read_source(write(tmp_path, *lone)).rows] == [("a",), ("b",)]


def test_the_row_at_fault_of_several_is_named(tmp_path):
    path = write(tmp_path, steered("p", "z", 0), steered("q", "a", 1), steered("q", "b", "much"))
    with pytest.raises(UserError) as refusal:
        read_source(path)
    remedy = "give a number, larger for a better completion"
    assert str(refusal.value) == f"{path}, row 3, field helpfulness: text, not a number; {remedy}"


@pytest.mark.parametrize("name", ["weight", "margin"])
def test_a_list_has_the_weight_and_the_margin_that_its_rows_share(tmp_path, name):
    rows = [steered("q", "a", 1, **{name: 2}), steered("q", "b", 0, **{name: 2}), steered("r", "c", 1)]
    found = read_source(write(tmp_path, *rows))
    field = {"weight": "loss_weight", "margin": "margin"}[name]
    assert [getattr(row, field) for row in found.rows] == [2.0, {"weight": 1.0, "margin": None}[name]]
    for other in ({name: 3}, {}):
        path = write(tmp_path, steered("p", "z", 0), rows[0], steered("q", "b", 0, **other))
        with pytest.raises(UserError) as refusal:
            read_source(path)
        assert str(refusal.value) == (
            f"{path}, row 3, field {name}: another than the first row of its list has ({other.get(name)!r}, and not 2);"
            " the rows of a list share it: give them all the same"
        )


def test_an_answer_of_weight_0_is_absent_from_its_list(tmp_path):
    rows = [steered("q", "a", 2, weight=0), steered("q", "b", 1), steered("q", "c", 0, weight=0), steered("q", "d", 0)]
    found = read_source(write(tmp_path, *rows))
    assert texts(found.rows) == [("b", "d")]
    assert (found.read, found.refused, found.joined) == (3, {"weight 0": 2}, 1)


def test_a_system_text_and_options_of_a_list_are_read_once(tmp_path):
    more = {"system": "Be brief.", "chat_template_kwargs": {"date": "today"}}
    rows = [steered("q", "a", 1, **more), steered("q", "b", 0, **more)]
    (row,) = read_source(write(tmp_path, *rows)).rows
    assert row.prompt[0] == {"role": "system", "content": "Be brief."}
    assert row.template_options == {"date": "today"}


def test_what_the_rows_of_a_tree_weigh_is_what_its_lists_weigh(tmp_path):
    found = read_source(write(tmp_path, *({**row, "weight": 3} for row in flat(TREE))))
    assert {row.loss_weight for row in found.rows} == {3.0}


def test_turns_of_a_prompt_are_messages(tmp_path):
    prompt = "One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?"
    (row,) = read_source(write(tmp_path, steered(prompt, "a", 1), steered(prompt, "b", 0))).rows
    assert [(own["role"], own["content"]) for own in row.prompt] == [
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
    ]


def node(name, role, rank=None, replies=(), **others):
    return {"message_id": name, "text": f"text of {name}", "role": role, "rank": rank, "replies": [*replies], **others}


TREE = node(
    "p",
    "prompter",
    replies=[
        node("a", "assistant", 1),
        node("b", "assistant", 0, [
            node("bp", "prompter", 0, [node("bpa", "assistant", 0), node("bpb", "assistant", 1)]),
            node("bq", "prompter", 1, [node("bqa", "assistant")]),
            node("br", "prompter", 2, [node("bra", "assistant"), node("brb", "assistant")]),
            node("bs", "prompter", 3),
        ]),
        node("c", "assistant", None),
        node("d", "assistant", 2, deleted=True),
    ],
)  # fmt: skip


def flat(tree, parent=None):
    own = {name: value for name, value in tree.items() if name != "replies"}
    yield {**own, "parent_id": parent, "message_tree_id": "p"}
    for reply in tree["replies"]:
        yield from flat(reply, tree["message_id"])


def lists_of(found):
    return {
        row.id: (
            [(own["role"], own["content"].removeprefix("text of ")) for own in row.prompt],
            [own[0]["content"].removeprefix("text of ") for own in row.completions],
            row.rewards,
        )
        for row in found.rows
    }


SPELT = {"tree": [{"message_tree_id": "p", "prompt": TREE}], "messages": [*flat(TREE)], "bare": [TREE]}


@pytest.mark.parametrize("spelt", SPELT)
def test_each_answered_message_of_a_tree_is_a_list(tmp_path, spelt):
    rows = SPELT[spelt]
    found = read_source(write(tmp_path, *rows))
    asked = [("user", "p"), ("assistant", "b")]
    assert lists_of(found) == {
        "p": ([("user", "p")], ["a", "b"], (-1.0, 0.0)),
        "bp": ([*asked, ("user", "bp")], ["bpa", "bpb"], (0.0, -1.0)),
        "bq": ([*asked, ("user", "bq")], ["bqa"], None),
    }
    assert found.refused == {"answers without ranks": 1}
    assert (found.read, found.joined) == (4, len(rows) - 1)
    assert [row.meta.get("left_out") for row in found.rows] == [2, None, None]


def test_two_trees_beside_each_other_and_messages_without_a_parent(tmp_path):
    first = [*flat(TREE)]
    second = [
        {**row, "message_tree_id": "other"} for row in flat(node("o", "prompter", replies=[node("oa", "assistant")]))
    ]
    lost = {**second[1], "message_id": "x", "parent_id": "nowhere"}
    found = read_source(write(tmp_path, *first, *second, lost, {**lost, "message_tree_id": "third"}))
    assert {"p", "bp", "bq", "o"} == set(lists_of(found))
    assert found.rows[-1].meta == {"message_tree_id": "other", "messages_without_parent": 1}
    assert found.refused == {
        "answers without ranks": 1,
        "a tree with 0 first messages among its neighbouring rows": 1,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": "first"}, "field prompt.replies[0].rank: text, not a number; give 0 for the best answer"),
        ({"text": None}, "field prompt.replies[0].text: None; give `text`, and `prompter` or `assistant` as `role`"),
        ({"role": "bot"}, "field prompt.replies[0].role: 'bot'; give `text`, and `prompter` or `assistant` as `role`"),
        ({"replies": 3}, "field prompt.replies[0].replies: a number, not a list; give the replies to the message"),
    ],
)
def test_what_is_wrong_in_a_tree_is_told_by_its_place(tmp_path, change, said):
    tree = node("p", "prompter", replies=[{**node("a", "assistant", 0), **change}])
    path = write(tmp_path, {"message_tree_id": "p", "prompt": tree})
    with pytest.raises(UserError) as refusal:
        read_source(path)
    assert str(refusal.value) == f"{path}, row 1, {said}"
