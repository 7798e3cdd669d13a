"""Verdicts, ties and several turns in the formats of votes, and real lists as the trees that they were taken from."""

import gzip
import json

import pytest

from align.data import read_source
from align.data.formats import read_row
from align.data.schema import BadRow, UnusableRow


def chat(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, texts, strict=False)]


def read(raw, **options):
    return read_row(raw, "rows.jsonl", 1, **options)


ARENA = {"conversation_a": chat("q", "a"), "conversation_b": chat("q", "b")}
TABLE = {"prompt": "q", "response_a": "a", "response_b": "b"}
TWO = {"prompt": "q", "response_0": "a", "response_1": "b"}
STEER3 = {"context": chat("q"), "response1": "a", "response2": "b"}
STEER2 = {"prompt": "q", "response_1": "a", "response_2": "b"}
SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b"}
GPT = {"question": {"full_text": "q", "id": "1"}, "answer_0": "a", "answer_1": "b"}
POST = {"subreddit": "s", "title": "t", "post": "p"}
SUMMARY = {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}]}


def votes(*of):
    return {**TABLE, **dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), of, strict=True))}


FIRST, SECOND, TIE, BAD = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)
VERDICTS = [
    *[({**ARENA, "winner": said}, grades) for said, grades in (("model_a", FIRST), ("model_b", SECOND), ("tie", TIE))],
    *[({**ARENA, "winner": said}, BAD) for said in ("tie (bothbad)", "both_bad", "Tie (bothbad)")],
    *[({**TABLE, "winner": said}, grades) for said, grades in (("model_a", FIRST), ("model_b", SECOND), ("tie", TIE))],
    *[(votes(1, 0, 0), FIRST), (votes(0, 1, 0), SECOND), (votes(0, 0, 1), TIE)],
    *[({**TWO, "better_response_id": k, "safer_response_id": 1 - k}, (FIRST, SECOND)[k]) for k in (0, 1)],
    *[({**TWO, "safer_response_id": k}, (FIRST, SECOND)[k]) for k in (0, 1)],
    *[({**STEER3, "overall_preference": k}, FIRST if k < 0 else SECOND if k else TIE) for k in range(-3, 4)],
    *[({**STEER2, "preference_strength": k}, FIRST if k < 0 else SECOND if k else TIE) for k in range(-3, 4)],
    *[({**SHP, "labels": k}, (SECOND, FIRST)[k]) for k in (0, 1)],
    *[({**SUMMARY, "choice": k}, (FIRST, SECOND)[k]) for k in (0, 1)],
]


@pytest.mark.parametrize(("raw", "grades"), VERDICTS)
def test_a_verdict_is_who_won(raw, grades):
    row = read(raw)
    texts = [own if isinstance(own, str) else own[-1]["content"] for own in row.completions]
    assert (texts, row.grades) == (["a", "b"], grades)


@pytest.mark.parametrize("value", range(-3, 4))
def test_a_signed_preference_keeps_its_strength(value):
    assert read({**STEER3, "overall_preference": value}).meta["strength"] == abs(value)
    assert read({**STEER2, "preference_strength": value}).meta["strength"] == abs(value)


@pytest.mark.parametrize("scores", [(0.5, -0.5), (-1.0, 1.0), (0.0, 0.0)])
def test_scores_of_two_answers_are_rewards(scores):
    assert read({**GPT, "score_0": scores[0], "score_1": scores[1]}).rewards == scores


WRONG = [
    ({**ARENA, "winner": "model_c"}, "winner"),
    ({**ARENA, "winner": {}}, "winner"),
    ({**ARENA, "winner": "tie", "turn": 2}, "turn"),
    ({**ARENA, "winner": "tie", "conversation_b": "b"}, "conversation_b"),
    (votes(1, 1, 0), "winner_model_a"),
    (votes(0, 0, 0), "winner_model_a"),
    (votes(0.4, 0.3, 0.3), "winner_model_a"),
    ({**votes(1, 0, 0), "response_b": '["b", "c"]'}, "response_b"),
    ({**TWO, "better_response_id": 2}, "better_response_id"),
    ({**TWO, "better_response_id": "0"}, "better_response_id"),
    ({**STEER3, "overall_preference": 4}, "overall_preference"),
    ({**STEER3, "overall_preference": "2"}, "overall_preference"),
    ({**STEER3, "overall_preference": -1, "response1": 3}, "response1"),
    ({**SHP, "labels": 0.5}, "labels"),
    ({**SHP, "labels": 1, "score_A": "x", "score_B": 1}, "score_A"),
    ({**SUMMARY, "choice": None, "summaries": []}, None),
    ({**SUMMARY, "choice": 0, "summaries": [{"text": "a"}]}, "summaries"),
    ({**SUMMARY, "choice": 0, "info": {"post": "p"}}, "info.subreddit"),
    ({**GPT, "score_0": 1, "score_1": None}, None),
    ({**GPT, "question": {}, "score_0": 1, "score_1": 0}, "question.full_text"),
]


@pytest.mark.parametrize(("raw", "field"), WRONG)
def test_what_is_no_verdict_is_refused_by_its_field(raw, field):
    with pytest.raises(BadRow) as refusal:
        read(raw)
    assert (refusal.value.field or "").split("[")[0] == (field or refusal.value.field or "").split("[")[0]
    assert refusal.value.remedy


def test_neither_answer_valid_is_counted():
    with pytest.raises(UnusableRow, match="neither answer is valid"):
        read({**STEER2, "preference_strength": -100})


@pytest.mark.parametrize("of", ["arena", "table"])
def test_several_turns_share_their_beginning_and_the_rest_is_each_sides_own(of):
    one, other = ("q", "a", "more?", "b"), ("q", "c", "more?", "d")
    raw = {"winner": "model_a", "conversation_a": chat(*one), "conversation_b": chat(*other)}
    if of == "table":
        turns = {"prompt": one[::2], "response_a": one[1::2], "response_b": other[1::2]}
        raw = {**{name: json.dumps(own) for name, own in turns.items()}, "winner": "model_a"}
    row = read(raw)
    assert (row.prompt, row.completions) == (chat("q"), (chat(*one)[1:], chat(*other)[1:]))


@pytest.mark.parametrize(("turn", "messages"), [(1, 2), (2, 4)])
def test_a_vote_on_a_turn_leaves_later_ones_out(turn, messages):
    one, other = chat("q", "a", "more?", "b"), chat("q", "a2", "more?", "b2")
    row = read({"winner": "model_a", "conversation_a": one, "conversation_b": other, "turn": turn})
    assert row.completions == (one[1:messages], other[1:messages])


def test_a_turn_without_a_response_is_counted():
    with pytest.raises(UnusableRow, match="a turn without a response"):
        read({**votes(1, 0, 0), "response_a": "[null]", "prompt": '["q"]'})


def test_what_is_beside_the_safer_response_stays_unless_it_is_ignored():
    safety = {f"is_response_{k}_safe": bool(k) for k in (0, 1)} | {"response_0_severity_level": 2}
    raw = {**TWO, **safety, "better_response_id": 0, "safer_response_id": 1}
    assert read(raw).meta == {**safety, "safer_response_id": 1}
    assert read(raw, ignore=["better_response_id"]).grades == SECOND


def test_an_article_is_asked_about_as_an_article():
    row = read({"info": {"id": "1", "title": "t", "article": "Long."}, "summaries": SUMMARY["summaries"], "choice": 0})
    assert row.prompt == "Article:\n\nLong.\n\nTL;DR:"


def test_nectars_seven_ranks_are_all_kept():
    answers = [{"answer": f"a{k}", "model": f"m{k}", "rank": float(k + 1)} for k in range(7)]
    raw = {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers, "turns": 1, "num_responses": 7, "source": ["s"]}
    row = read(raw)
    assert row.completions == tuple(f"a{k}" for k in range(7))
    assert row.rewards == tuple(-float(k + 1) for k in range(7))


def as_tree(own):
    """A ranked list as the branch of the tree that it was taken from."""
    answers = [
        {
            "message_id": f"{own['id']}/{k}",
            "role": "assistant",
            "text": item["text"],
            "rank": item["rank"],
            "replies": [],
        }
        for k, item in enumerate(own["items"])
    ]
    *before, last = own["messages"]
    node = {"message_id": own["id"], "role": "prompter", "text": last["content"], "replies": answers}
    for k, message in reversed([*enumerate(before)]):
        role = {"user": "prompter"}.get(message["role"], message["role"])
        node = {"message_id": f"{own['id']}-{k}", "role": role, "text": message["content"], "replies": [node]}
    return {"message_tree_id": own["id"], "prompt": node}


def test_real_lists_are_the_same_from_the_trees_that_they_stand_in(shared_data, tmp_path):
    file = shared_data / "oasst_ranked" / "lists.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        lists = [json.loads(line) for line in lines]
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(as_tree(own)) + "\n" for own in lists))
    found = {row.id: row for row in read_source(str(path)).rows}
    expected = {row.id: row for row in read_source(str(file)).rows}
    assert len(expected) == 158
    for identity, row in expected.items():
        own = found[identity]
        assert (own.prompt, own.completions, own.rewards) == (row.prompt, row.completions, row.rewards)
