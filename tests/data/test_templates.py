"""Of what a conversation holds nothing is lost unsaid, whatever the chat template does with it."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from chat_templates import END, TEMPLATES, with_their_tokens
from datasets import Dataset
from read_rows import read_rows

from align.data import in_one_line
from align.data.config import SourceSection
from align.data.schema import Row
from align.data.tokenize import Reading, encode_prompt, tokenize_rows
from align.errors import UserError

OPTIONS = {"max_length": 100_000, "max_prompt_length": None, "overlong": "truncate", "append_eos": True}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge")


@pytest.fixture(scope="module")
def tokenizer(byte_level):
    return with_their_tokens(byte_level)


def row(prompt, *completions, options=None, number=1):
    answers = [[own if isinstance(own, dict) else {"role": "assistant", "content": own}] for own in completions]
    messages = [{"role": role, "content": content} for role, content in prompt] if isinstance(prompt, tuple) else prompt
    grades = tuple(float(-k) for k in range(len(answers)))
    return Row(str(number), messages, tuple(answers), grades, None, {}, "r", number, template_options=options or {})


def tokenize(rows, tokenizer, name, **options):
    reading = Reading(**{**OPTIONS, "chat_template": TEMPLATES.get(name), **options})
    return list(tokenize_rows(rows, tokenizer=tokenizer, reading=reading))


def text_of(draw, used):
    """A text that no other one of the conversation is."""
    while True:
        words = [draw.choice(WORDS) + str(draw.randrange(100, 1000)) for _ in range(draw.choice((1, 2, 6)))]
        text = draw.choice((" ", "\n", "  ")).join(words)
        if words[0] not in used:
            used.update(words)
            return draw.choice(("", " ", "\n")) + text + draw.choice(("", " ", "\n\n"))


def message_of(draw, role, used):
    content = text_of(draw, used)
    if role == "assistant" and draw.random() < 0.3:
        content = f"<think>{text_of(draw, used)}</think>{content}"
    keys = [key for key in ("reasoning_content", "thinking", "name", "notes") if draw.random() < 0.25]
    extra = {key: [text_of(draw, used)] if key == "notes" else text_of(draw, used) for key in keys}
    return {"role": role, "content": content, **extra}


def conversation_of(draw):
    used = set()
    roles = ["system"] * draw.randrange(2) + ["user", "assistant"] * draw.randrange(3) + ["user"]
    prompt = [message_of(draw, role, used) for role in roles]
    return row(prompt, *(message_of(draw, "assistant", used) for _ in range(draw.randrange(1, 4))))


def texts_of(message):
    """(key, text) of a message, written again and differently."""
    flat = {key: value[0] if isinstance(value, list) else value for key, value in message.items() if key != "role"}
    return flat.items()


def bare(text):
    return re.sub(r"\s", "", text)


@pytest.fixture
def refused(monkeypatch):
    """What would be refused, place and key, in the place of a refusal."""
    import align.data.rendering as rendering
    from rewards.dropped import Dropped, refuse_lost

    found = []

    def note(conversation, lost, answers):
        for own in lost:
            try:
                refuse_lost(conversation, [own], answers)
            except Dropped as error:
                found.append((conversation[own[0]]["role"], own[1], own[0] in answers, str(error)))

    monkeypatch.setattr(rendering, "refuse_lost", note)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_text_of_every_message_is_in_the_tokens_or_counted_and_not_both(name, tokenizer, refused):
    draw = random.Random(name)
    rows = [conversation_of(draw) for _ in range(60)]
    said, present = 0, 0
    for own, entry in zip(rows, tokenize(rows, tokenizer, name), strict=True):
        whole = [bare(tokenizer.decode(entry["prompt_ids"] + ids)) for ids in entry["completion_ids"]]
        lost = {
            f"{message['role']} {key}"
            for message in own.prompt
            for key, text in texts_of(message)
            if not all(bare(text) in seen for seen in whole)
        }
        assert set(entry["prompt_left_out"]) == lost
        lost_of_answers = [
            key
            for (message,), seen in zip(own.completions, whole, strict=True)
            for key, text in texts_of(message)
            if bare(text) not in seen
        ]
        assert sorted(entry["completion_left_out"]) == sorted(lost_of_answers)
        said += len(lost) + len(lost_of_answers)
        present += sum(bare(text) in whole[0] for message in own.prompt for _, text in texts_of(message))
    assert said and present


@pytest.mark.parametrize(
    ("name", "key", "text"),
    [
        ("chatml", "notes", "user"),  # a word of the template's own
        ("chatml", "notes", "yes"),  # the content again
        ("llama3", "thinking", "e"),
        ("glm", "notes", "the same long note and content"),
        ("harmony", "notes", "You are a machine."),
    ],
)
def test_a_text_that_also_stands_elsewhere_is_not_taken_for_its_other(name, key, text, tokenizer):
    content = text if text.startswith("the same") else "yes, yes"
    answer = {"role": "assistant", "content": content, key: text}
    entry = tokenize([row((("user", "hi"),), answer, "no")], tokenizer, name)[0]
    assert entry["completion_left_out"] == [key]


def test_a_long_text_that_is_part_of_another_is_not_taken_for_it(tokenizer):
    thought_of = "a thought that is much longer than what one finds by chance"
    answer = {"role": "assistant", "content": f"He had {thought_of}, he said.", "thinking": thought_of}
    entry = tokenize([row((("user", "hi"),), answer, "no")], tokenizer, "chatml")[0]
    assert entry["completion_left_out"] == ["thinking"]


def test_short_texts_that_are_there_are_not_said_to_be_missing(tokenizer):
    for name in TEMPLATES:
        entry = tokenize([row((("user", "a"), ("assistant", "b"), ("user", "user")), "a", "b", "4")], tokenizer, name)[
            0
        ]
        assert (entry["prompt_left_out"], entry["completion_left_out"]) == ([], []), name


def write(path, *rows):
    path.write_text("".join(json.dumps(own) + "\n" for own in rows))
    return SourceSection(path=str(path))


def pair(chosen, rejected, **columns):
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: [own if isinstance(own, dict) else {"content": own}] for side, own in sides.items()}
    for (message,) in answers.values():
        message["role"] = "assistant"
    return {"prompt": [{"role": "user", "content": "Hi"}], **answers, **columns}


def thought(content, reasoning):
    return {"content": content, "reasoning_content": reasoning}


def noted(content, notes):
    return {"content": content, "notes": notes}


def prepared(tmp_path, tokenizer, name, *rows):
    source = write(tmp_path / "r.jsonl", *rows)
    return read_rows(source, eval_fraction=0, tokenizer=tokenizer, chat_template=TEMPLATES[name])


def test_the_audit_names_what_is_left_out_by_key_everywhere_a_count_is_shown(tmp_path, tokenizer):
    rows = [pair(noted("a", "good"), noted("b", "bad")), pair("a", "b")]
    audit = prepared(tmp_path, tokenizer, "chatml", *rows).audit
    assert audit.to_dict()["completions_left_out"] == {"notes": 2}
    assert "2 completions of which the chat template left text out (notes)" in in_one_line(audit)
    rows = [pair(thought("a", "good"), thought("b", "bad")), pair("a", "b")]
    assert prepared(tmp_path, tokenizer, "qwen3", *rows).audit.completions_left_out == {}


def test_lists_that_differ_only_in_what_is_left_out_are_refused_for_that(tmp_path, tokenizer):
    rows = [pair(noted("same", "good"), noted("same", "bad")), pair("a", "b")]
    reason = (
        "completions that differ only in text that the chat template leaves out (notes; give "
        "`policy.chat_template` one that writes it)"
    )
    assert prepared(tmp_path, tokenizer, "chatml", *rows).audit.refused == {reason: 1}
    rows = [pair(thought("same", "good"), thought("same", "bad")), pair("a", "b")]
    assert prepared(tmp_path, tokenizer, "qwen3", *rows).audit.refused == {}


def test_lists_that_max_length_alone_makes_equal_are_not_said_to_differ_in_what_is_left_out(tmp_path, tokenizer):
    source = write(tmp_path / "r.jsonl", pair(noted("the same a", "x"), noted("the same b", "y")), pair("a", "b"))
    options = {"eval_fraction": 0, "tokenizer": tokenizer, "chat_template": TEMPLATES["chatml"]}
    audit = read_rows(source, max_length=30, **options).audit
    assert audit.refused == {"all completions identical within max_length": 1}


def test_the_end_of_a_prompt_that_is_in_no_completion_is_dropped_and_not_moved(tmp_path, tokenizer):
    audit = prepared(tmp_path, tokenizer, "r1", pair("a", "b")).audit
    assert (audit.boundary_rows, audit.boundary_tokens) == (0, 0)
    assert (audit.dropped_rows, audit.dropped_tokens) == (1, len(["<think>", "\n"]))


@pytest.mark.parametrize("name", END)
@pytest.mark.parametrize("behind", ["", "\n", " {end}", "{end}\n", "</s>"])
def test_an_end_token_that_a_message_brings_is_there_once(name, behind, tokenizer):
    end = END[name]
    behind = behind.format(end=end)
    if behind == "</s>" and end == "</s>":
        behind = ""
    brought, plain = (row((("user", "hi"),), f"fine{tail}", f"bad{tail}") for tail in (end + behind, ""))
    with_end, without = tokenize([brought, plain], tokenizer, name)
    assert with_end["completion_ids"] == without["completion_ids"]
    assert (with_end["repeated_ends"], without["repeated_ends"]) == (2, 0)
    assert with_end["completion_left_out"] == []


def test_ends_that_a_template_does_not_write_stay(tokenizer):
    """Of another model, or a tag of the text; and where a template has no end, the text's own is the end."""
    for name, tail in (("chatml", "<|eot_id|>"), ("chatml", "</div>"), ("glm", "<|user|>")):
        entry = tokenize([row((("user", "hi"),), "fine" + tail, "b")], tokenizer, name)[0]
        assert tail in tokenizer.decode(entry["completion_ids"][0]), name
        assert entry["repeated_ends"] == 0


def test_earlier_turns_and_the_start_token_are_mended_in_sampling_too(tokenizer):
    clean = (("user", "hi"), ("assistant", "Hello."), ("user", "Who?"))
    brought = (("user", "<s>hi"), ("assistant", "Hello.<|eot_id|>"), ("user", "Who?"))
    rows = [row(clean, "a", "b"), row(brought, "<s>a", "b")]
    expected, entry = tokenize(rows, tokenizer, "llama3")
    assert (entry["prompt_ids"], entry["completion_ids"]) == (expected["prompt_ids"], expected["completion_ids"])
    assert (entry["prompt_ends"], entry["bos_stripped"], entry["repeated_heads"]) == (1, True, 1)
    assert encode_prompt(rows[1], tokenizer, TEMPLATES["llama3"]) == expected["prompt_ids"]


def test_a_start_token_stays_where_the_template_writes_none(tokenizer):
    entry = tokenize([row((("user", "<s>hi"),), "a", "b")], tokenizer, "chatml")[0]
    assert entry["prompt_ids"].count(tokenizer.bos_token_id) == 1 and not entry["bos_stripped"]


@pytest.mark.parametrize(
    ("name", "head"),
    [("chatml", "<|im_start|>assistant\n"), ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n")],
)
def test_an_answer_that_repeats_the_generation_prompt_has_it_once(name, head, tokenizer):
    rows = [row((("user", "hi"),), own + "fine", own + "bad") for own in (head, "\n" + head, "")]
    *brought, clean = tokenize(rows, tokenizer, name)
    for entry in brought:
        assert entry["completion_ids"] == clean["completion_ids"]
        assert (entry["repeated_heads"], clean["repeated_heads"]) == (2, 0)


def test_a_plain_answer_repeats_neither_the_prompts_end_nor_its_own(tokenizer):
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    texts = [("fine", "bad"), ("<think>\nfine</s>\n", "<|im_start|>assistant\n<think>\nbad</s></s>")]
    rows = [Row("1", prompt, own, (1.0, 0.0), None, {}, "r", 1) for own in texts]
    clean, brought = tokenize(rows, tokenizer, None)
    assert brought["completion_ids"] == clean["completion_ids"]
    assert (brought["repeated_heads"], brought["repeated_ends"]) == (2, 2)
    # HTML is no token
    html = tokenize([Row("1", "<div>", ("<div>a", "b"), (1.0, 0.0), None, {}, "r", 1)], tokenizer, None)[0]
    assert tokenizer.decode(html["completion_ids"][0]) == "<div>a</s>" and html["repeated_heads"] == 0


def trl_ids(tokenizer, template, rows, monkeypatch):
    """What TRL's DPOTrainer makes of the rows before it trains, what was thought under the key that harmony reads."""
    from trl import DPOTrainer

    def spell(messages):
        if template != TEMPLATES["harmony"]:
            return messages
        return [{"thinking": own.get("reasoning_content"), **own} for own in messages]

    monkeypatch.setattr(tokenizer, "chat_template", template)
    data = [
        {
            "prompt": spell(own.prompt),
            "chosen": spell(own.completions[0]),
            "rejected": spell(own.completions[1]),
            "chat_template_kwargs": own.template_options,
        }
        for own in rows
    ]
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    sets = [Dataset.from_list([own]) for own in data]  # together their options would get each other's keys
    return [DPOTrainer._prepare_dataset(trainer, own, tokenizer, arguments, "train")[0] for own in sets]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_trls_but_for_white_space_behind_the_end(name, tokenizer, monkeypatch, refused):
    draw = random.Random(name)
    used = set()
    rows = []
    for options in [{"enable_thinking": False}, {"enable_thinking": True}, {"other": "x"}] * 4:
        prompt = [message_of(draw, role, used) for role in ("user", "assistant", "user")]
        rows.append(row(prompt, *(message_of(draw, "assistant", used) for _ in range(2)), options=options))
    theirs = trl_ids(tokenizer, TEMPLATES[name], rows, monkeypatch)
    white = 0
    for own, entry in zip(theirs, tokenize(rows, tokenizer, name, append_eos=name != "glm"), strict=True):
        assert entry["prompt_ids"] == own["prompt_ids"]
        for ours, whole in zip(entry["completion_ids"], (own["chosen_ids"], own["rejected_ids"]), strict=True):
            assert whole[: len(ours)] == ours
            assert tokenizer.decode(whole[len(ours) :]).strip() == ""
        white += entry["white_behind_end"]
    assert white == (2 * len(rows) if name in ("chatml", "qwen3", "gemma") else 0)
    other = (
        tokenize(rows, tokenizer, name)[0]["unread_options"],
        tokenize(rows[2:], tokenizer, name)[0]["unread_options"],
    )
    assert other == ([] if name == "qwen3" else ["enable_thinking"], ["other"])


def test_template_options_are_a_rows_own_and_change_its_tokens(tmp_path, tokenizer):
    rows = [pair("a", "b", chat_template_kwargs={"enable_thinking": on, "null": None}) for on in (False, True)]
    found = prepared(tmp_path, tokenizer, "qwen3", *rows)
    off, on = (tokenizer.decode(entry["prompt_ids"]) for entry in found.train)
    assert off.removeprefix(on) == "<think>\n\n</think>\n\n" and found.audit.unread_options == {}
    assert encode_prompt(found.train_rows[0], tokenizer, TEMPLATES["qwen3"]) == found.train[0]["prompt_ids"]
    assert found.audit.duplicate_rows == 0
    text = {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}}
    audit = prepared(tmp_path, tokenizer, "qwen3", text).audit
    assert "1 row whose chat_template_kwargs.enable_thinking no chat template reads" in in_one_line(audit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("x", "field chat_template_kwargs: text, not an object; give an object of the template's own options"),
        (
            {"tools": []},
            "field chat_template_kwargs.tools: not an option of the template's own; remove it from the rows",
        ),
        (
            {"chat_template": "{{ 1 }}"},
            "field chat_template_kwargs.chat_template: .* set `policy.chat_template` in the",
        ),
        ({"add_generation_prompt": True}, "field chat_template_kwargs.add_generation_prompt: not an option"),
    ],
)
def test_template_options_that_are_none(options, message, tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"row 1, {message}"):
        prepared(tmp_path, tokenizer, "qwen3", pair("a", "b", chat_template_kwargs=options))


def test_a_prefilled_answer_keeps_the_keys_of_its_completion(tokenizer):
    prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
    answer = {"role": "assistant", "content": " well.", "reasoning_content": "to be polite"}
    entry = tokenize([row(prompt, answer, " ill.")], tokenizer, "qwen3")[0]
    assert "to be polite" in tokenizer.decode(entry["completion_ids"][0])


def test_a_template_that_fails_on_a_row_is_one_sentence(tokenizer):
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].content + none }}", "{{ '\\ud83d' }}"):
        with pytest.raises(UserError, match=r"^r, row 1: the chat template (refuses|writes half a character)"):
            tokenize([row((("user", "hi"),), "a", "b")], tokenizer, None, chat_template=template)
        with pytest.raises(UserError, match="^r, row 1: the chat template"):
            encode_prompt(row((("user", "hi"),), "a", "b"), tokenizer, template)


def test_what_was_rendered_is_in_the_caches_key(tokenizer, monkeypatch):
    """A template with a date: tokens of yesterday are not today's, and those of today are read again."""
    import transformers.utils.chat_template_utils as module

    class Clock(module.datetime):
        day = "2026-11-28"

        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(cls.day)

    monkeypatch.setattr(module, "datetime", Clock)
    template = "{{ strftime_now('%d %B') }}" + TEMPLATES["chatml"]
    rows = [row((("user", "hi"),), "a", "b")]
    first = tokenize(rows, tokenizer, None, chat_template=template)[0]
    Clock.day = "2026-11-29"
    second = tokenize(rows, tokenizer, None, chat_template=template)[0]
    assert tokenizer.decode(first["prompt_ids"]).startswith("28 November")
    assert tokenizer.decode(second["prompt_ids"]).startswith("29 November")


@pytest.mark.parametrize("change", ["template_options", "reasoning_content", "split_special_tokens"])
def test_the_caches_key_follows_all_that_is_read(change, tokenizer):
    from copy import deepcopy
    from dataclasses import replace

    own = row((("user", "hi"),), {"role": "assistant", "content": "a", "reasoning_content": "x"}, "b<think>")
    other, its = own, deepcopy(tokenizer)
    if change == "template_options":
        other = replace(own, template_options={"enable_thinking": False})
    elif change == "reasoning_content":
        other = row(own.prompt, {"role": "assistant", "content": "a", "reasoning_content": "y"}, "b<think>")
    else:
        its.split_special_tokens = True
    before = tokenize([own], tokenizer, "qwen3")[0]
    after = tokenize([other], its, "qwen3")[0]
    assert (before["prompt_ids"], before["completion_ids"]) != (after["prompt_ids"], after["completion_ids"])


def test_a_date_in_a_message_is_read_as_text(tokenizer):
    """Parquet keeps times as such, as WildChat's messages have them."""
    from datetime import datetime

    asked = [{"role": "user", "content": "hi", "timestamp": datetime(2024, 4, 1)}]
    assert tokenize([row(asked, "a", "b")], tokenizer, "chatml")[0]["prompt_left_out"] in ([], ["user timestamp"])


BROUGHT = ("fine", "<s>fine</s>", "fine<|im_end|>", "fine<|eot_id|>\n", "<|im_start|>assistant\nfine", "fine</s></s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_scorer_and_a_reward_models_training_read_a_row_alike(name, tokenizer, monkeypatch):
    from rewards.texts import joint_ids

    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    earlier = (("user", "<s>hi"), ("assistant", "Hello.<|im_end|>"), ("user", "Who?"))
    rows = [row(prompt, own, "b") for own in BROUGHT for prompt in (earlier, (("user", "hi"), ("assistant", "I am ")))]
    rows += [Row("1", "hi<|im_start|>assistant\n", (own, "b"), (1.0, 0.0), None, {}, "r", 1) for own in BROUGHT]
    for own, entry in zip(rows, tokenize(rows, tokenizer, name, append_eos=None), strict=True):
        scored = joint_ids([own.prompt] * 2, own.completions, tokenizer)
        assert [entry["prompt_ids"] + ids for ids in entry["completion_ids"]] == scored


def test_a_framed_text_that_brings_its_end_has_one_for_scorers_and_training(byte_level):
    from tokenizers import processors

    from rewards.texts import joint_ids

    framing = with_their_tokens(byte_level)
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    own = Row("1", "the cat", (" sat", " sat</s>"), (1.0, 0.0), None, {}, "r", 1)
    entry = tokenize([own], framing, None, append_eos=None)[0]
    assert entry["completion_ids"][0] == entry["completion_ids"][1]
    whole = [entry["prompt_ids"] + ids for ids in entry["completion_ids"]]
    assert joint_ids([own.prompt] * 2, own.completions, framing) == whole == [framing("the cat sat")["input_ids"]] * 2
