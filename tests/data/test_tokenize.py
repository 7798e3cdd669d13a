"""Boundaries, start and end tokens, lengths and the cache, over tokenizers of different habits."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from align.data.boundary import common_prefix, special_tokens
from align.data.schema import Row
from align.data.texts import prompt_text, read_chat_template
from align.data.tokenize import Reading, encode_prompt, tokenize_rows
from align.errors import UserError

PLAIN = Path(__file__).parents[2] / "recipes" / "templates" / "plain.jinja"
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
BARE = "{% for m in messages %}[{{ m.content }}{% endfor %}{% if add_generation_prompt %}[{% endif %}"
OPTIONS = {
    "chat_template": None,
    "max_length": 10_000,
    "max_prompt_length": None,
    "overlong": "truncate",
    "append_eos": True,
}
# pairs of prompt and completions whose tokens merge, or not, at the seam
SEAMS = [
    ("once upon a tim", ("e there was a cat", "id dog sat")),
    ("the cat", (" sat on the mat", "s", " sat")),
    ("the time is t", ("en", "he cat", "")),
    ("a cat and ", ("a dog sat", "the mat")),
    ("a dog\n\n", (" sat", "\n", "the")),
]


def rows_of(*texts, grades=None):
    return [
        Row(str(n), prompt, completions, tuple(float(k) for k in range(len(completions))), None, {}, "rows.jsonl", n)
        for n, (prompt, completions) in enumerate(texts, start=1)
    ]


def tokenize(rows, tokenizer, **options):
    extra = {name: options.pop(name) for name in ("workers", "token_weights") if name in options}
    return list(tokenize_rows(rows, tokenizer=tokenizer, reading=Reading(**OPTIONS | options), **extra))


def together(text, tokenizer):
    """The ids of a text as the tokenizer gives them, less the end token that some add."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def chat(prompt, *answers):
    messages = [{"role": role, "content": content} for role, content in prompt]
    return messages, tuple([{"role": "assistant", "content": answer}] for answer in answers)


@pytest.mark.parametrize("seam", range(len(SEAMS)))
def test_boundary_is_the_longest_common_prefix_of_the_texts_tokenised_whole(seam, any_tokenizer):
    prompt, completions = SEAMS[seam]
    entry = tokenize(rows_of(SEAMS[seam]), any_tokenizer)[0]
    alone = together(prompt, any_tokenizer)
    whole = [together(prompt + completion, any_tokenizer) for completion in completions]
    boundary = 0
    while all(len(ids) > boundary and ids[boundary] == alone[boundary] for ids in whole) and boundary < len(alone) - 1:
        boundary += 1
    boundary += all(ids[: boundary + 1] == alone[: boundary + 1] for ids in whole)
    if boundary == 0:
        assert (entry["refused"], entry["completion_ids"]) == ("no prompt token before the completions", [])
        return
    eos = any_tokenizer.eos_token_id
    assert entry["prompt_ids"] == alone[:boundary]
    assert [entry["prompt_ids"] + ids for ids in entry["completion_ids"]] == [[*ids, eos] for ids in whole]
    assert entry["moved_tokens"] == len(alone) - boundary


def test_some_seams_merge_unless_every_byte_is_a_token(any_tokenizer):
    entries = tokenize(rows_of(*SEAMS), any_tokenizer)
    merges = any(entry["moved_tokens"] for entry in entries)
    one_token_per_byte = len(any_tokenizer) == 260
    assert merges != one_token_per_byte


@pytest.mark.parametrize(
    ("sequences", "length"), [([[1, 2, 3], [1, 2], [1, 2, 4]], 2), ([[5], [6]], 0), ([[1, 2]], 2), ([[], [1]], 0)]
)
def test_common_prefix(sequences, length):
    assert common_prefix(sequences) == length


def test_start_token_is_there_once_however_the_prompt_brings_it(any_tokenizer):
    bos = any_tokenizer.bos_token
    if bos is None:
        assert special_tokens(any_tokenizer).prefix == ()
        pytest.skip("no start token")
    plain, started = tokenize(
        rows_of(("the cat", (" sat", " ate")), (bos + "the cat", (" sat", " ate"))), any_tokenizer
    )
    for entry in (plain, started):
        assert entry["prompt_ids"].count(any_tokenizer.bos_token_id) == 1
        assert entry["prompt_ids"][0] == any_tokenizer.bos_token_id
    assert (plain["bos_stripped"], started["bos_stripped"]) == (False, True)


def test_templated_prompt_gets_no_second_start_token(byte_level):
    twice = "<s><s>{% for m in messages %}{{ m.content }}{% endfor %}"
    once = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = rows_of(chat([("user", "hi")], "a", "b"))
    entries = [tokenize(rows, byte_level, chat_template=template)[0] for template in (once, twice)]
    expected = byte_level("hi")["input_ids"]
    assert [entry["prompt_ids"] for entry in entries] == [expected, expected]
    assert [entry["bos_stripped"] for entry in entries] == [False, True]


def test_end_token_is_learnt_once(any_tokenizer):
    eos = any_tokenizer.eos_token_id
    entry = tokenize(rows_of(("once more the cat", (" sat", " ate" + any_tokenizer.eos_token))), any_tokenizer)[0]
    assert [ids[-1] for ids in entry["completion_ids"]] == [eos, eos]
    assert [ids.count(eos) for ids in entry["completion_ids"]] == [1, 1]
    assert (entry["missing_eos"], entry["eos_added"]) == (0, 0)  # eos_added is for chat templates that lack one


def test_no_end_token_where_none_is_wanted(any_tokenizer):
    entry = tokenize(rows_of(("once more the cat", (" sat", " ate"))), any_tokenizer, append_eos=False)[0]
    assert all(any_tokenizer.eos_token_id not in ids for ids in entry["completion_ids"])
    assert entry["missing_eos"] == 2


def test_the_templates_own_end_counts_and_what_follows_it_is_left_out(byte_level):
    entry = tokenize(rows_of(chat([("user", "hi")], "yes", "no")), byte_level, chat_template=CHATML)[0]
    text = [byte_level.decode(ids) for ids in (entry["prompt_ids"], *entry["completion_ids"])]
    assert text == ["<s>user:hi<|end|>\n<s>assistant:", "yes<|end|>", "no<|end|>"]
    assert (entry["eos_added"], entry["missing_eos"]) == (0, 0)


def test_a_template_without_an_end_gets_the_end_token(byte_level):
    rows = rows_of(chat([("user", "hi")], "yes", "no "))
    entry = tokenize(rows, byte_level, chat_template=BARE)[0]
    text = [byte_level.decode(ids) for ids in (entry["prompt_ids"], *entry["completion_ids"])]
    assert text == ["[hi[", "yes</s>", "no </s>"]
    assert entry["eos_added"] == 2
    entry = tokenize(rows, byte_level, chat_template=BARE, append_eos=False)[0]
    assert (entry["eos_added"], entry["missing_eos"]) == (0, 2)


def test_plain_template_over_several_turns(byte_level):
    turns = [("system", "Be kind."), ("user", "hi"), ("assistant", "Hello."), ("user", "Who?")]
    entry = tokenize(rows_of(chat(turns, "Me.", "You.")), byte_level, chat_template=read_chat_template(str(PLAIN)))[0]
    text = [byte_level.decode(ids) for ids in (entry["prompt_ids"], *entry["completion_ids"])]
    assert text == [
        "<s>Be kind.\n\nUser: hi\n\nAssistant: Hello.</s>\n\nUser: Who?\n\nAssistant:",
        " Me.</s>",
        " You.</s>",
    ]
    assert (entry["moved_tokens"], entry["eos_added"]) == (0, 0)


def test_plain_template_works_with_every_tokenizer(any_tokenizer):
    template = read_chat_template(str(PLAIN))
    entry = tokenize(rows_of(chat([("user", "the cat")], "sat", "the mat")), any_tokenizer, chat_template=template)[0]
    bos, eos = any_tokenizer.bos_token or "", any_tokenizer.eos_token
    whole = [f"{bos}User: the cat\n\nAssistant: {answer}{eos}" for answer in ("sat", "the mat")]
    expected = any_tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [entry["prompt_ids"] + ids for ids in entry["completion_ids"]] == expected
    assert [ids[-1] for ids in entry["completion_ids"]] == [any_tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("template", [CHATML, "plain"])
def test_a_prompt_that_ends_with_the_assistant_is_continued(template, byte_level):
    template = read_chat_template(str(PLAIN)) if template == "plain" else template
    turns = [("user", "hi"), ("assistant", "I am")]
    entry = tokenize(rows_of(chat(turns, " well.", " ill.")), byte_level, chat_template=template)[0]
    text = [byte_level.decode(ids) for ids in (entry["prompt_ids"], *entry["completion_ids"])]
    head, end = {
        CHATML: ("<s>user:hi<|end|>\n<s>assistant:I am", "<|end|>"),
        read_chat_template(str(PLAIN)): ("<s>User: hi\n\nAssistant: I am", "</s>"),
    }[template]
    assert text == [head, f" well.{end}", f" ill.{end}"]
    assert entry["moved_tokens"] == 0
    assert prompt_text(rows_of(chat(turns, "x"))[0], byte_level, template) == head


def test_a_template_whose_prompt_is_no_prefix_is_cut_where_they_part(byte_level):
    thinking = "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    entry = tokenize(rows_of(chat([("user", "hi")], "yes", "no")), byte_level, chat_template=thinking)[0]
    assert byte_level.decode(entry["prompt_ids"]) == "hi|"
    assert (entry["moved_tokens"], entry["dropped_tokens"]) == (0, len("<think>"))


def test_the_tokenizers_own_template_is_used_unless_another_is_given(byte_level):
    tokenizer = deepcopy(byte_level)
    tokenizer.chat_template = BARE
    rows = rows_of(chat([("user", "hi")], "a", "b"))
    assert tokenizer.decode(tokenize(rows, tokenizer)[0]["prompt_ids"]) == "[hi["
    prompt = tokenize(rows, tokenizer, chat_template=CHATML)[0]["prompt_ids"]
    assert tokenizer.decode(prompt) == "<s>user:hi<|end|>\n<s>assistant:"


def test_token_ids_pass_unchanged_beside_text(byte_level):
    rows = rows_of(([1, 7, 8], ([9, 9], [10])), ("the cat", (" sat", " ate")))
    entries = tokenize(rows, byte_level)
    assert (entries[0]["prompt_ids"], entries[0]["completion_ids"]) == ([1, 7, 8], [[9, 9], [10]])
    assert entries[0]["missing_eos"] == 2
    assert byte_level.decode(entries[1]["prompt_ids"]) == "<s>the cat"


def test_lengths_within_bounds_change_nothing(byte_level):
    rows = rows_of(("abc", ("de", "fgh")))  # start token + 3, and at most 3 + end token
    assert tokenize(rows, byte_level, max_length=8) == tokenize(rows, byte_level)


@pytest.mark.parametrize(
    ("overlong", "texts", "grades", "refused", "truncated", "dropped", "missing_eos"),
    [
        ("truncate", ["de</s>", "fgh", "ijk"], [0.0, 1.0, 2.0], "", 2, 0, 2),
        ("drop_completion", ["de</s>"], [0.0], "", 0, 2, 0),
        ("drop_list", [], [], "a completion beyond max_length", 0, 0, 0),
    ],
)
def test_overlong_completions(overlong, texts, grades, refused, truncated, dropped, missing_eos, byte_level):
    rows = rows_of(("abc", ("de", "fgh", "ijklm")))
    entry = tokenize(rows, byte_level, max_length=7, overlong=overlong)[0]
    assert [byte_level.decode(ids) for ids in entry["completion_ids"]] == texts
    assert (entry["grades"], entry["refused"]) == (grades, refused)
    assert (entry["truncated"], entry["dropped"], entry["missing_eos"]) == (truncated, dropped, missing_eos)
    assert entry["completion_tokens"] == [3, 4, 6]  # as they were


def test_completions_that_truncation_makes_equal_are_noticed(byte_level):
    entry = tokenize(rows_of(("abc", ("dex", "dey"))), byte_level, max_length=6)[0]
    assert entry["identical"] is True
    assert tokenize(rows_of(("abc", ("dex", "dey"))), byte_level, max_length=7)[0]["identical"] is False


@pytest.mark.parametrize("max_length", [4, 3])
def test_a_prompt_that_fills_the_length_leaves_nothing(max_length, byte_level):
    entry = tokenize(rows_of(("abc", ("d", "e"))), byte_level, max_length=max_length)[0]
    assert (entry["refused"], entry["completion_ids"], entry["grades"]) == ("prompt fills max_length", [], [])


@pytest.mark.parametrize(("length", "text", "cut"), [(4, "<s>abc", False), (3, "<s>bc", True), (1, "c", True)])
def test_an_overlong_prompt_loses_its_beginning_but_not_its_start_token(length, text, cut, byte_level):
    entry = tokenize(rows_of(("abc", ("d", "e"))), byte_level, max_prompt_length=length)[0]
    assert (byte_level.decode(entry["prompt_ids"]), entry["prompt_cut"]) == (text, cut)
    assert entry["prompt_tokens"] == 4


def test_an_empty_completion_is_its_end_token_and_without_one_is_left_out(byte_level):
    rows = rows_of(("abc", ("", "d")))
    entry = tokenize(rows, byte_level)[0]
    assert entry["completion_ids"][0] == [byte_level.eos_token_id]
    entry = tokenize(rows, byte_level, append_eos=False)[0]
    assert (entry["dropped"], entry["grades"]) == (1, [1.0])


def test_encode_prompt_is_the_prompt_that_is_trained_on(any_tokenizer):
    template = read_chat_template(str(PLAIN))
    rows = rows_of(("the cat", (" sat", " ate")), chat([("user", "the cat")], "sat", "ate"), ([5, 6], ([7], [8])))
    rows[0] = replace(rows[0], prompt=(any_tokenizer.bos_token or "") + "the cat")
    for row, entry in zip(rows, tokenize(rows, any_tokenizer, chat_template=template), strict=True):
        assert encode_prompt(row, any_tokenizer, template)[: len(entry["prompt_ids"])] == entry["prompt_ids"]
        assert len(encode_prompt(row, any_tokenizer, template)) == len(entry["prompt_ids"]) + entry["moved_tokens"]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"content": "sat"}, None),
        ({"content": "sat on <b>"}, None),
        ({"content": "sat<|end|>"}, "has the token that ends its turn"),
        ({"content": "sat<|end|>\n"}, "has the token that ends its turn"),
        ({"content": "sat</s>"}, "has the token that ends its turn"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "calls a tool"),
    ],
)
def test_nothing_is_sampled_behind_a_message_of_the_assistants_that_is_over(byte_level, last, said):
    prompt = [{"role": "user", "content": "the cat"}, {"role": "assistant", **last}]
    row = replace(rows_of(("", ("a", "b")))[0], prompt=prompt)
    if said is None:
        assert byte_level.decode(encode_prompt(row, byte_level, CHATML)).endswith(f"assistant:{last['content']}")
        return
    with pytest.raises(UserError) as refusal:
        encode_prompt(row, byte_level, CHATML)
    assert str(refusal.value).startswith(f"{row.place}: the prompt ends with a message of the assistant's that is over")
    assert f"since it {said}; end it" in str(refusal.value)


def test_prompt_text(byte_level):
    row = rows_of(chat([("user", "hi")], "a", "b"))[0]
    assert prompt_text(row, byte_level, CHATML) == "<s>user:hi<|end|>\n<s>assistant:"
    assert prompt_text(rows_of(("hi", ("a",)))[0], byte_level) == "hi"
    assert prompt_text(rows_of(([1, *byte_level("hi")["input_ids"][1:]], ([7],)))[0], byte_level) == "<s>hi"


def test_files_that_are_no_template(tmp_path):
    with pytest.raises(UserError, match="policy.chat_template: .*none.jinja: no such file; `plain` suits"):
        read_chat_template(str(tmp_path / "none.jinja"))
    (tmp_path / "a.jinja").write_text("plain text")
    with pytest.raises(UserError, match="a.jinja: not a Jinja template; `plain` is one"):
        read_chat_template(str(tmp_path / "a.jinja"))
    assert read_chat_template(None) is None
    (tmp_path / "b.jinja").write_bytes(b"{{ 1 }} caf\xe9")
    with pytest.raises(UserError, match=r"b.jinja: not UTF-8 \(byte 11\); save the file as UTF-8"):
        read_chat_template(str(tmp_path / "b.jinja"))


def test_workers_and_batches_give_the_same_tokens(byte_level, own_cache):
    rows = rows_of(*SEAMS * 60)
    one = tokenize(rows, byte_level)
    for file in own_cache.rglob("*.arrow"):
        file.unlink()
    assert tokenize(rows, byte_level, workers=2) == one


def test_many_rows_have_the_ids_of_each_alone_whatever_an_earlier_call_left_set(any_tokenizer):
    texts = [*SEAMS, ("a</s>b", ("</s>", " c"))]
    alone = [tokenize(rows_of(text), any_tokenizer)[0] for text in texts]
    used = deepcopy(any_tokenizer)
    used(["a", "the cat"], padding=True, truncation=True, max_length=1, split_special_tokens=True)
    many = tokenize(rows_of(*texts * 40), used)
    for field in ("prompt_ids", "completion_ids"):
        assert [entry[field] for entry in many] == [entry[field] for entry in alone] * 40


def test_a_worker_that_refuses_a_row_says_so_like_a_single_process(byte_level):
    rows = rows_of(*[chat([("user", "hi")], "a", "b")] * 3)
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: the chat template refuses the conversation \(no\)"):
        tokenize(rows, byte_level, chat_template="{{ raise_exception('no') }}", workers=2)


def test_a_reward_model_reads_what_a_scorer_reads(any_tokenizer, byte_level):
    """A text with the tokenizer's own start and end, a conversation with all that the template writes."""
    entry = tokenize(rows_of(("once more the cat", (" sat", " ate"))), any_tokenizer, append_eos=None)[0]
    for completion, ids in zip((" sat", " ate"), entry["completion_ids"], strict=True):
        assert entry["prompt_ids"] + ids == any_tokenizer("once more the cat" + completion)["input_ids"]
    asked, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    rows = rows_of(([asked], ([answer], [answer])))
    entry = tokenize(rows, byte_level, chat_template=CHATML, append_eos=None)[0]
    text = byte_level.apply_chat_template([asked, answer], chat_template=CHATML, tokenize=False)
    whole = byte_level(text, add_special_tokens=False)["input_ids"]
    assert entry["prompt_ids"] + entry["completion_ids"][0] == whole and text.endswith("\n")


def test_sampled_ids_are_taken_as_they_are(byte_level):
    ids = ([9, 9, 2], [7])  # no tokenizer would make these of the texts
    rows = [replace(row, prompt_ids=[1, 5], completion_ids=ids) for row in rows_of(("the cat", (" sat", " ran")))]
    [found] = tokenize(rows, byte_level, append_eos=True)
    assert (found["prompt_ids"], found["completion_ids"]) == ([1, 5], [[9, 9, 2], [7]])
    with pytest.raises(UserError, match="beyond the vocabulary"):
        tokenize([replace(rows[0], completion_ids=([len(byte_level)], [7]))], byte_level)
