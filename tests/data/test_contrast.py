"""Contexts for token rewards: what stands before the completions, whose tokens stay the same."""

import json

import pytest
from read_rows import read_rows
from transformers import AutoTokenizer

from align.data.boundary import special_tokens
from align.data.contrast import contrast_contexts, default_template


@pytest.fixture
def tokenizer(tiny_policy):
    return AutoTokenizer.from_pretrained(tiny_policy)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    def prepare(rows: list[dict], **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(str(path), eval_fraction=0.0, tokenizer=tokenizer, **options).train

    return prepare


def words(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_plain_prompt_within_the_template(prepared, tokenizer):
    templates = {"better": "w30 w31 {prompt}", "worse": "w32 {prompt} w33"}
    (row,) = prepared([{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}], contrast=templates)
    assert row["better_ids"] == [words(tokenizer, "w30 w31 w3 w4")]
    assert row["worse_ids"] == [words(tokenizer, "w32 w3 w4 w33")]
    (plain,) = prepared([{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}])
    assert row["completion_ids"] == plain["completion_ids"] and row["prompt_ids"] == plain["prompt_ids"]


def test_the_start_token_stands_before_the_template_once(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    special = special_tokens(tokenizer)
    prompt = tokenizer("Once upon a time")["input_ids"]
    assert prompt[: len(special.prefix)] == list(special.prefix) != []
    contexts = contrast_contexts(
        "Once upon a time",
        prompt,
        [[300], [301]],
        moved_tokens=0,
        templates={"better": "A happy day. {prompt}", "worse": "A sad day. {prompt}"},
        tokenizer=tokenizer,
        chat_template=None,
        special=special,
    )
    for name, text in (("better_ids", "A happy day. "), ("worse_ids", "A sad day. ")):
        (ids,) = contexts[name]
        assert ids == [*special.prefix, *words(tokenizer, text + "Once upon a time")]


SEAMS = (
    "A sad day. {prompt}",
    "The following answer is bad.\n\n{prompt}",
    "{prompt} Now badly:",
    "x{prompt}",
    "{prompt}\n",
)


@pytest.mark.parametrize("template", SEAMS)
def test_a_context_is_its_text_tokenised_whole(shared_data, template):
    """Whatever the tokenizer does where template and prompt meet: merges, or a space of its own before a text."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    special, texts = special_tokens(tokenizer), ["Once upon", " once", "\nA dog", "'s ball", "day the", "a"]
    kept = 0
    for text in texts:
        prompt = tokenizer(text)["input_ids"]
        (ids,) = contexts_of(text, prompt, template, tokenizer, special)["worse_ids"]
        assert ids == tokenizer(template.replace("{prompt}", text))["input_ids"]
        kept += ids == contexts_of(prompt, prompt, template, tokenizer, special)["worse_ids"][0]
    assert kept < len(texts)  # a prompt's own tokens behind the template's would be others


def test_last_tokens_that_moved_to_the_completions_are_not_in_the_context(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    special, text = special_tokens(tokenizer), "Once upon a time there was"
    prompt, template = tokenizer(text)["input_ids"], "A sad day.\n\n{prompt}"
    whole = tokenizer(template.replace("{prompt}", text))["input_ids"]
    for moved in (1, 2):
        found = contexts_of(text, prompt[:-moved], template, tokenizer, special, moved)
        assert found["worse_ids"] == [whole[:-moved]]
    cut = contexts_of(text, prompt[3:], template, tokenizer, special)["worse_ids"][0]  # to fit max_prompt_length
    assert cut == [*special.prefix, *words(tokenizer, "A sad day.\n\n"), *prompt[3:]]


def contexts_of(prompt, ids, template, tokenizer, special, moved=0):
    return contrast_contexts(
        prompt,
        ids,
        [[300]],
        moved_tokens=moved,
        templates={"worse": template},
        tokenizer=tokenizer,
        chat_template=None,
        special=special,
    )


def test_a_template_with_a_response_gives_every_completion_its_own_context(prepared, tokenizer):
    """Revision prompts: the context holds the answer without its end token."""
    templates = {"better": "w30 {response} w31 {prompt}", "worse": "w32 {prompt}"}
    (row,) = prepared([{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}], contrast=templates)
    assert row["better_ids"] == [words(tokenizer, "w30 w5 w31 w3 w4"), words(tokenizer, "w30 w6 w7 w31 w3 w4")]
    assert len(row["worse_ids"]) == 1


def test_in_a_conversation_the_last_user_message_changes(prepared, tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}w9 {% else %}w8 {% endif %}{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}w8{% endif %}"
    row = {
        "prompt": [
            {"role": "user", "content": "w3"},
            {"role": "assistant", "content": "w4"},
            {"role": "user", "content": "w5 w6"},
        ],
        "chosen": [{"role": "assistant", "content": "w10"}],
        "rejected": [{"role": "assistant", "content": "w11"}],
    }
    templates = {"better": "w30 {prompt} w31", "worse": "w32 {response} {prompt}"}
    (found,) = prepared([row], contrast=templates, chat_template=template)
    assert found["better_ids"] == [words(tokenizer, "w9 w3 w8 w4 w9 w30 w5 w6 w31 w8")]
    assert found["worse_ids"] == [words(tokenizer, f"w9 w3 w8 w4 w9 w32 {r} w5 w6 w8") for r in ("w10", "w11")]
    sides = {side: [{"role": "assistant", "content": f" {row[side][0]['content']}"}] for side in ("chosen", "rejected")}
    begun = row | sides | {"prompt": row["prompt"][:2]}
    (found,) = prepared([begun], contrast=templates, chat_template=template)
    assert found["better_ids"] == [words(tokenizer, "w9 w30 w3 w31 w8 w4")], "the assistant's beginning stays"


def test_a_refused_row_has_no_contexts_and_does_no_harm(prepared):
    sides = {"chosen": " w5", "rejected": " w6"}
    rows = [{"prompt": "w3 " * 50 + "w4", **sides}, {"prompt": "w3", **sides}]
    found = prepared(rows, contrast={"better": "w30 {prompt}", "worse": "w31 {prompt}"}, max_length=20)
    assert len(found) == 1 and len(found[0]["better_ids"]) == 1


def test_the_default_templates_differ_by_kind_of_prompt_and_hold_it():
    texts = [default_template(side, chat=chat) for side in ("better", "worse") for chat in (True, False)]
    assert len(set(texts)) == 4 and all(text.count("{prompt}") == 1 for text in texts)


def test_before_what_is_not_the_assistants_its_last_message_is_over(prepared, tokenizer):
    """Whole conversations that part after an answer: the context ends where the prompt does, behind the end of turn."""
    template = "{% for m in messages %}{{ 'w9' if m.role == 'user' else 'w8' }} {{ m.content }} w39 {% endfor %}"
    said = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    more = [[{"role": "user", "content": own}, {"role": "assistant", "content": "w7"}] for own in ("w5", "w6")]
    templates = {"better": "w30 {prompt}", "worse": "w31 {prompt}"}
    rows = [{"prompt": said, "completions": more, "grades": [1.0, 0.0]}]
    (row,) = prepared(rows, chat_template=template, contrast=templates, append_eos=False)
    assert row["prompt_ids"] == words(tokenizer, "w9 w3 w39 w8 w4 w39")
    assert row["better_ids"] == [words(tokenizer, "w9 w30 w3 w39 w8 w4 w39")]
    assert row["worse_ids"] == [words(tokenizer, "w9 w31 w3 w39 w8 w4 w39")]
