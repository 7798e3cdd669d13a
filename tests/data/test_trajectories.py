"""Of a completion of several messages the assistant's tokens are learnt, as generation would have written them."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import merging_tokenizer
from datasets import IterableDataset
from turn_templates import ASKED, CONVERSATIONS, STRUCTURES, call, result, said, with_its_tokens

from align.data.schema import Row
from align.data.tokenize import Reading, tokenize_rows
from align.errors import UserError
from rewards.texts import joint_ids

CASES = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda own: f"{own.name}-{own.conversation}")


def row(prompt, *completions, options=None):
    grades = tuple(float(-k) for k in range(len(completions)))
    return Row("1", prompt, completions, grades, None, {}, "r", 1, template_options=options or {})


def tokenize(rows, tokenizer, template, **options):
    reading = Reading(**{"chat_template": template, "max_length": 100_000, **options})
    return list(tokenize_rows(rows, tokenizer=tokenizer, reading=reading))


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generated(structure, prompt, completion, tokenizer, **options):
    """Turn by turn, what a policy reads before each of its messages and what it then writes, as token ids.

    It is asked with the template's generation prompt, writes the message and the end of its turn, and stops.
    """

    def render(messages, **flags):
        return tokenizer.apply_chat_template(
            messages, chat_template=structure.template, tokenize=False, **flags, **options
        )

    whole = render([*prompt, *completion])
    turns = {}
    for k, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        before = render([*prompt, *completion[:k]], add_generation_prompt=True)
        alone = render([*prompt, *completion[: k + 1]])
        if not alone.startswith(before):
            turns[k + 1] = ids_of(before, tokenizer), None
            continue
        written = alone.removeprefix(before)
        if structure.end:
            ends = re.findall(r"<[^<>]+>", structure.end)
            written = written[: min(written.index(own) + len(own) for own in ends if own in written)]
        else:  # it stops at the token that opens the next turn
            opened = whole[len(before + written) :]
            written += opened[: opened.find(">") + 1]
        context = ids_of(before, tokenizer)
        turns[k + 1] = (context, ids_of(before + written, tokenizer)[len(context) :])
    return turns


def learnt(entry, k):
    """(all tokens before it, the token) of every learnt token of a completion."""
    ids = entry["completion_ids"][k]
    return [(entry["prompt_ids"] + ids[:place], ids[place]) for place in entry["learn_at"][k]]


def in_context(turns):
    return [(context + written[:t], token) for context, written in turns for t, token in enumerate(written)]


def last_of(structure, turn, tokenizer, whole):
    """The last message's tokens, to the end of the whole; where nothing ends it, to the end token that is added.

    A generation prompt that the whole does not go on with (`<think>`) is cut where the two part.
    """
    context = turn[0]
    shared = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
    return context[:shared], [*whole[shared:], *([] if structure.end else [tokenizer.eos_token_id])]


def whole_of(structure, prompt, completion, tokenizer, **options):
    text = tokenizer.apply_chat_template(
        [*prompt, *completion], chat_template=structure.template, tokenize=False, **options
    )
    return ids_of(text.rstrip(), tokenizer)


def is_exact(turn, whole):
    return turn[1] is not None and whole[: len(turn[0]) + len(turn[1])] == [*turn[0], *turn[1]]


@CASES
def test_learnt_are_the_tokens_that_generation_would_have_written(structure, byte_level):
    tokenizer = with_its_tokens(byte_level, structure)
    completion = CONVERSATIONS[structure.conversation]
    turns = generated(structure, ASKED, completion, tokenizer)
    whole = whole_of(structure, ASKED, completion, tokenizer)
    last = max(turns)
    wrong = tuple(place for place, turn in turns.items() if place != last and not is_exact(turn, whole))
    assert wrong == structure.rewritten  # what is known of the template, by brute force
    other = [said("assistant", "No idea.")]
    rows = [row(ASKED, completion, other)]
    if wrong:
        begin = re.escape(repr(completion[wrong[0] - 1]["content"]))
        place = rf"^r, row 1: message {wrong[0]} of a completion \(assistant, {begin} ...\): the chat template writes"
        with pytest.raises(UserError, match=place):
            tokenize(rows, tokenizer, structure.template)
        completion = [{**own, "weight": 0} if k in wrong else own for k, own in enumerate(completion, start=1)]
        rows = [row(ASKED, completion, other)]
    [entry] = tokenize(rows, tokenizer, structure.template)
    expected = [turn for place, turn in turns.items() if place not in wrong and place != last]
    expected.append(last_of(structure, turns[last], tokenizer, whole))
    assert learnt(entry, 0) == in_context(expected)
    assert whole == (entry["prompt_ids"] + entry["completion_ids"][0])[: len(whole)]
    assert learnt(entry, 1)[-1][1] == entry["completion_ids"][1][-1]
    assert len(entry["learn_at"][0]) < len(entry["completion_ids"][0])
    assert entry["marks_differ"] == (2 if structure.name == "marks_too_much" else 0)


CHAT = next(own for own in STRUCTURES if own.name == "chatml" and own.conversation == "tools")
TURNS = CONVERSATIONS["turns"]
NO = [said("assistant", "No.")]


@pytest.fixture(scope="module")
def chat(byte_level):
    return with_its_tokens(byte_level, CHAT)


def pieces(entry, k, tokenizer):
    """The runs of learnt tokens as text."""
    runs, ids = [], entry["completion_ids"][k]
    for place in entry["learn_at"][k]:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return [tokenizer.decode([ids[place] for place in run]) for run in runs]


@CASES
def test_last_learns_the_last_message_as_a_completion_of_its_own(structure, byte_level):
    """Whatever the template makes of earlier turns: as when they are the prompt."""
    tokenizer = with_its_tokens(byte_level, structure)
    completion = CONVERSATIONS[structure.conversation]
    [entry] = tokenize([row(ASKED, completion, NO)], tokenizer, structure.template, learn="last")
    [alone] = tokenize([row([*ASKED, *completion[:-1]], completion[-1:])], tokenizer, structure.template)
    [own] = alone["completion_ids"]
    ids, at = entry["completion_ids"][0], entry["learn_at"][0]
    assert at == list(range(len(ids) - len(own), len(ids))) and ids[at[0] :] == own
    assert entry["prompt_ids"] + ids == alone["prompt_ids"] + own


def test_completion_learns_every_token_and_single_messages_have_no_mask(chat):
    rows = [row(ASKED, CONVERSATIONS["tools"], NO)]
    [entry] = tokenize(rows, chat, CHAT.template, learn="completion")
    assert "learn_at" not in entry and "token_weights" not in entry
    single = row(ASKED, NO, [said("assistant", "Yes.", weight=1)])
    for learn in ("assistant", "last"):
        [entry] = tokenize([single], chat, CHAT.template, learn=learn)
        assert "learn_at" not in entry and "token_weights" not in entry


def trl_ids(tokenizer, structure, rows, monkeypatch):
    """What TRL's DPOTrainer makes of the rows before it trains."""
    from trl import DPOTrainer

    monkeypatch.setattr(tokenizer, "chat_template", structure.template)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    found = []
    for own in rows:
        sides = {"prompt": own.prompt, "chosen": own.completions[0], "rejected": own.completions[1]}
        example = {**sides, "chat_template_kwargs": own.template_options}
        data = IterableDataset.from_generator(lambda example=example: iter([example]))  # Arrow gives objects all keys
        own_trainer = SimpleNamespace(_tokenizer=tokenizer)
        found += list(DPOTrainer._prepare_dataset(own_trainer, data, tokenizer, arguments, "train"))
    return found


@CASES
def test_completion_has_trls_token_ids(structure, byte_level, monkeypatch):
    """Of one message and of several, white space behind the end and all; where nothing ends a turn ours adds an end."""
    tokenizer = with_its_tokens(byte_level, structure)
    completion = CONVERSATIONS[structure.conversation]
    thought = structure.conversation in ("thinking", "steps")
    options = {"enable_thinking": False} if thought else {}
    rows = [row(ASKED, completion, NO, options=own) for own in (options, {})]
    rows.append(row(ASKED, NO, [said("assistant", "Yes. ")], options=options))
    theirs = trl_ids(tokenizer, structure, rows, monkeypatch)
    ours = tokenize(rows, tokenizer, structure.template, learn="completion", append_eos=bool(structure.end))
    for entry, own in zip(ours, theirs, strict=True):
        assert (entry["prompt_ids"], *entry["completion_ids"]) == (
            own["prompt_ids"],
            own["chosen_ids"],
            own["rejected_ids"],
        )
        assert entry["missing_eos"] == (0 if structure.end else 2)


def test_weights_of_messages_are_their_tokens_and_zero_is_context(chat):
    completion = [dict(own) for own in TURNS]
    completion[0]["weight"], completion[2]["weight"], completion[4]["weight"] = 0.5, 0, 2
    rows = [row(ASKED, completion, NO), row(ASKED, [said("assistant", "Yes.")], NO)]
    entry, plain = tokenize(rows, chat, CHAT.template)
    assert pieces(entry, 0, chat) == ["It is four.<|im_end|>", "Yes, quite.<|im_end|>"]
    first, last = (len(chat(text)["input_ids"]) - 1 for text in ("It is four.<|im_end|>", "Yes, quite.<|im_end|>"))
    assert entry["token_weights"] == [[0.5] * first + [2.0] * last, [1.0] * len(entry["completion_ids"][1])]
    assert plain["token_weights"] == [[1.0] * len(ids) for ids in plain["completion_ids"]]
    assert plain["learn_at"] == [list(range(len(ids))) for ids in plain["completion_ids"]]
    [whole] = tokenize([row(ASKED, TURNS, NO)], chat, CHAT.template)
    assert (entry["prompt_ids"], entry["completion_ids"]) == (whole["prompt_ids"], whole["completion_ids"])
    assert "token_weights" not in whole


def test_a_weight_of_a_lone_message_counts_too(chat):
    [entry] = tokenize([row(ASKED, [said("assistant", "Yes.", weight=0.25)], NO)], chat, CHAT.template)
    assert entry["token_weights"] == [[0.25] * len(entry["completion_ids"][0]), [1.0] * len(entry["completion_ids"][1])]
    assert "learn_at" not in entry


@pytest.mark.parametrize(
    ("learn", "weight", "message"),
    [
        ("last", 0, "the last assistant message has the weight 0, and `data.learn: last` learns nothing else"),
        ("completion", 0.5, "a message has a `weight`, and `data.learn: completion` learns every token alike"),
    ],
)
def test_a_weight_that_the_recipe_leaves_no_place_for_is_refused(learn, weight, message, chat):
    completion = [*TURNS[:-1], {**TURNS[-1], "weight": weight}]
    remedy = "set `data.learn: assistant`, which counts the messages' weights, or mend the row"
    with pytest.raises(UserError, match=f"^r, row 1: {message}; {remedy}$"):
        tokenize([row(ASKED, completion, NO)], chat, CHAT.template, learn=learn)


def test_a_finished_answer_is_context_and_an_open_one_goes_on(chat):
    prompt = [*ASKED, said("assistant", "It is")]
    more = [said("user", "Go on."), said("assistant", "Four.")]
    [entry] = tokenize([row(prompt, more, [said("user", "And?"), *NO])], chat, CHAT.template)
    assert chat.decode(entry["prompt_ids"]).endswith("assistant\nIt is<|im_end|>\n")
    assert [pieces(entry, k, chat) for k in (0, 1)] == [["Four.<|im_end|>"], ["No.<|im_end|>"]]
    [entry] = tokenize(
        [row(prompt, [said("assistant", " four."), *more], [said("assistant", " five.")])], chat, CHAT.template
    )
    assert chat.decode(entry["prompt_ids"]).endswith("assistant\nIt is")
    assert pieces(entry, 0, chat) == [" four.<|im_end|>", "Four.<|im_end|>"]
    assert chat.decode(entry["completion_ids"][0]).startswith(" four.<|im_end|>\n<|im_start|>user\nGo on.")
    [entry] = tokenize([row(prompt, [said("assistant", " four.")], more)], chat, CHAT.template)
    assert chat.decode(entry["prompt_ids"]).endswith("assistant\nIt is")
    assert [pieces(entry, k, chat) for k in (0, 1)] == [[" four.<|im_end|>"], ["Four.<|im_end|>"]]


def test_a_second_start_token_of_the_template_is_gone_and_moves_no_place(chat):
    once, twice = (tokenize([row(ASKED, TURNS, NO)], chat, "<s>" * n + CHAT.template)[0] for n in (1, 2))
    assert twice["bos_stripped"] and not once["bos_stripped"]
    for name in ("prompt_ids", "completion_ids", "learn_at"):
        assert twice[name] == once[name]


def test_two_messages_of_the_assistant_in_a_row_are_two_turns(chat):
    [entry] = tokenize([row(ASKED, [said("assistant", "One."), said("assistant", "Two.")], NO)], chat, CHAT.template)
    assert pieces(entry, 0, chat) == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_a_trajectory_may_end_with_what_others_wrote_and_gets_no_end_token_there(chat, byte_level):
    [entry] = tokenize([row(ASKED, [call("add", a=2, b=2), result("4")], NO)], chat, CHAT.template)
    assert chat.decode(entry["completion_ids"][0]).endswith("4\n</tool_response><|im_end|>")
    assert len(pieces(entry, 0, chat)) == 1 and (entry["missing_eos"], entry["eos_added"]) == (0, 0)
    glm = next(own for own in STRUCTURES if own.name == "glm")
    tokenizer = with_its_tokens(byte_level, glm)
    [entry] = tokenize([row(ASKED, [call("add", a=2, b=2), result("4")], NO)], tokenizer, glm.template)
    assert pieces(entry, 0, tokenizer)[0].endswith("</tool_call><|observation|>")
    assert tokenizer.decode(entry["completion_ids"][0]).endswith("<|observation|>\n4")
    assert (entry["eos_added"], entry["missing_eos"]) == (1, 0)  # of the other completion


BROUGHT = [
    "{}<|im_end|>",
    "{}<|im_end|>\n",
    "<|im_start|>assistant\n{}",
    "<s>{}",
    "<s><|im_start|>assistant\n{}<|im_end|>",
]


@pytest.mark.parametrize("brought", BROUGHT)
def test_what_a_message_brings_and_the_template_writes_too_is_there_once_in_every_turn(brought, chat):
    clean = [row(ASKED, TURNS, NO)]
    given = [{**own, "content": brought.format(own["content"])} if own["role"] == "assistant" else own for own in TURNS]
    given[1] = said("user", given[1]["content"] + "<|im_end|>")
    [expected] = tokenize(clean, chat, CHAT.template)
    [entry] = tokenize([row(ASKED, given, NO)], chat, CHAT.template)
    for name in ("prompt_ids", "completion_ids", "learn_at"):
        assert entry[name] == expected[name]
    heads, ends = 3 * brought.startswith("<"), 3 * ("<|im_end|>" in brought)
    assert (entry["repeated_heads"], entry["repeated_ends"]) == (heads, ends + 1)


def test_a_reward_model_reads_every_structure_and_as_a_scorer_does(byte_level, monkeypatch):
    for structure in STRUCTURES:
        tokenizer = with_its_tokens(byte_level, structure)
        monkeypatch.setattr(tokenizer, "chat_template", structure.template)
        completion = CONVERSATIONS[structure.conversation]
        whole = tokenizer.apply_chat_template([*ASKED, *completion], tokenize=False)
        last = {**completion[-1], "content": completion[-1]["content"] + structure.end}
        brings = [[*completion[:-1], last]] if last["content"] in whole else []
        for own in (completion, *brings):
            [entry] = tokenize([row(ASKED, own, NO)], tokenizer, structure.template, append_eos=None)
            assert "learn_at" not in entry
            assert entry["prompt_ids"] + entry["completion_ids"][0] == ids_of(whole, tokenizer)
            scored = joint_ids([ASKED] * 2, [own, NO], tokenizer)
            assert [entry["prompt_ids"] + ids for ids in entry["completion_ids"]] == scored


def test_a_template_that_writes_behind_every_conversation_is_refused_with_the_only_remedy_left(chat):
    """As one for tools that ends with an instruction: what the last message answers is never a prefix either."""
    behind = CHAT.template.replace("{% if add", "{{ '<|im_start|>system\nAnswer.<|im_end|>\n' }}{% if add", 1)
    text = (
        r"^r, row 1: message 5 of a completion \(assistant, 'Yes, quite.' ...\): the chat template writes what it was "
        "generated from otherwise beside it; set `policy.chat_template` to one that leaves earlier turns as they were"
    )
    with pytest.raises(UserError, match=text):
        tokenize([row(ASKED, TURNS, NO)], chat, behind, learn="last")


def test_tokens_that_merge_where_a_later_answer_begins_are_its_own_and_counted():
    """Without tokens between the turns: `time is t` and `en` are other tokens together."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = merging_tokenizer()
    parts = ["mmm", "sat", "mmmthe time is t", "en"]
    roles = ("user", "assistant") * 2
    prompt, *completion = (said(role, text) for role, text in zip(roles, parts, strict=True))
    [entry] = tokenize([row([prompt], completion)], tokenizer, template, append_eos=False)
    whole, before = ids_of("".join(parts), tokenizer), ids_of("".join(parts[:3]), tokenizer)
    shared = next(i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
    ids, at = entry["completion_ids"][0], entry["learn_at"][0]
    assert entry["prompt_ids"] + ids == whole
    start = len(entry["prompt_ids"])
    assert [start + place for place in at if start + place >= shared] == list(range(shared, len(whole)))
    assert shared - start - 1 not in at and entry["moved_tokens"] == len(before) - shared > 0
    # the prompt's own are counted as ever, and once
    prompt, *completion = (
        said(role, text) for role, text in zip(roles, ["mmmtime is t", "en", "mmm", "sat"], strict=True)
    )
    [entry] = tokenize([row([prompt], completion)], tokenizer, template, append_eos=False)
    alone = ids_of(prompt["content"], tokenizer)
    assert entry["moved_tokens"] == len(alone) - len(entry["prompt_ids"]) > 0


def test_a_row_that_is_refused_for_its_length_has_no_mask_and_a_cut_one_a_shorter(chat):
    rows = [row([said("user", "x" * 200)], TURNS, NO), row(ASKED, TURNS, NO)]
    whole = tokenize(rows, chat, CHAT.template)[1]
    room = 20
    length = len(whole["prompt_ids"]) + room
    refused, cut = tokenize(rows, chat, CHAT.template, max_length=length)
    assert (refused["refused"], refused["completion_ids"], refused["learn_at"]) == ("prompt fills max_length", [], [])
    for entry in tokenize(rows, chat, CHAT.template, max_length=length, overlong="drop_list"):
        assert (bool(entry["refused"]), entry["completion_ids"], entry.get("learn_at", [])) == (True, [], [])
    assert cut["completion_ids"] == [ids[:room] for ids in whole["completion_ids"]]
    assert cut["learn_at"] == [[place for place in at if place < room] for at in whole["learn_at"]]
    assert cut["missing_eos"] == 1 and len(cut["learn_at"][0]) == len("It is four.") + 1


def test_masks_are_the_same_in_several_processes_with_a_date_and_from_the_cache(chat):
    rows = [row(ASKED, CONVERSATIONS["tools"], NO), row(ASKED, NO, TURNS)] * 2
    expected = tokenize(rows, chat, CHAT.template)
    reading = Reading(chat_template=CHAT.template, max_length=100_000)
    assert list(tokenize_rows(rows, tokenizer=chat, reading=reading)) == expected
    assert list(tokenize_rows(rows, tokenizer=chat, reading=replace(reading, learn="last"))) != expected
    dated = "{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHAT.template
    assert tokenize(rows, chat, dated) == expected
    more = [*rows, row(ASKED, TURNS, [*NO, *TURNS[1:]])]
    alone = tokenize(more, chat, CHAT.template)
    reading = Reading(chat_template=CHAT.template + "{# another key #}", max_length=100_000)
    assert list(tokenize_rows(more, tokenizer=chat, reading=reading, workers=2)) == alone


def test_tools_and_options_of_a_row_reach_every_rendering(chat):
    """The prompt that each message was generated from has them too, so nothing parts."""
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}" + CHAT.template
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    own = replace(row(ASKED, CONVERSATIONS["tools"], NO, options={"mood": "glad"}), tools=tools)
    [entry] = tokenize([own], chat, template)
    [plain] = tokenize([row(ASKED, CONVERSATIONS["tools"], NO)], chat, CHAT.template)
    assert (entry["completion_ids"], entry["learn_at"]) == (plain["completion_ids"], plain["learn_at"])
    assert chat.decode(entry["prompt_ids"]).startswith('[{"type": "function"') and "glad" in chat.decode(
        entry["prompt_ids"]
    )
