"""Checks of preference data on rows with a known answer, and the stop that a recipe may ask for."""

import json
import math
import random
import tracemalloc
from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize

from align.errors import UserError
from align.lint import CHEAP, CHECK, TextRow, look
from align.lint.base import ROWS
from align.lint.marks import marks_of
from align.lint.pairs import Sparse, logistic, pairs_of, reached
from align.lint.prompts import ALIKE
from align.lint.scripts import script_of
from align.recipe.recipe import Recipe
from align.runs.build import prepare
from align.training.inspect import inspect_recipe

WORDS = [a + b + c for a, b, c in product("bdfgklmnprst", "aeiou", "bdgklmnrst")]


def row(prompt="Name a colour.", *completions, grades=None, number=1, heldout=False, chat=False):
    grades = grades if grades is not None else tuple(-float(k) for k in range(len(completions)))
    return TextRow(prompt, completions, tuple(grades), f"r.jsonl, row {number}", heldout, chat)


def find(name, rows):
    found = look(rows, [name], lambda own: own)
    return found[0] if found else None


def some_words(generator, count):
    return " ".join(generator.choice(WORDS) for _ in range(count))


def pairs(count, make, *, seed=0, prompts=None):
    """Pairs of (better, worse), each of a prompt of its own unless there are fewer."""
    generator = random.Random(seed)
    return [row(f"prompt {k % (prompts or count)}", *make(generator, k), number=k + 1) for k in range(count)]


def in_random_order(generator, texts):
    return generator.sample(texts, len(texts))


def longer_first(generator, k):
    return some_words(generator, generator.randint(30, 40)), some_words(generator, generator.randint(5, 29))


def test_a_judge_of_length_is_always_right_where_the_longer_one_is_better():
    own = find("length", pairs(200, longer_first))
    assert own.figures["accuracy"] == own.figures["longer_is_better"] == 1.0 and own.figures["error"] == 0
    assert own.figures["lists"] == 200 and own.bad and "100.0 %" in own.words
    turned = find("length", pairs(200, lambda *given: longer_first(*given)[::-1]))
    assert turned.figures["accuracy"] == 1.0 and turned.figures["longer_is_better"] == 0.0 and turned.bad


@pytest.mark.parametrize("name", ["length", "words"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shuffled_pairs_give_one_half_within_their_error(name, seed):
    own = find(name, pairs(400, lambda g, k: in_random_order(g, list(longer_first(g, k))), seed=seed))
    assert abs(own.figures["accuracy"] - 0.5) < 3.5 * own.figures["error"] and not own.bad
    assert 0.5 <= own.figures["error"] * math.sqrt(400) / 0.5 < 1.05  # less where a fold's judge calls ties


def test_a_judge_of_words_finds_the_word_and_names_it():
    def polite(generator, k):
        same = [some_words(generator, 12) for _ in range(2)]
        return f"{same[0]} kindly", f"{same[1]} obviously"

    own = find("words", pairs(120, polite))
    assert own.figures["accuracy"] == 1.0 and own.bad
    assert own.words.index("likes 'kindly'") < own.words.index("dislikes 'obviously'")
    of_length = find("length", pairs(120, lambda g, k: (some_words(g, 9), some_words(g, 9))))
    assert not of_length.bad


def test_rows_of_one_prompt_are_not_learnt_from_and_judged():
    """Each prompt has its own two words and its own random order: learnt by heart it is 1, else one half."""
    generator = random.Random(3)
    orders = [in_random_order(generator, [f"a{k}", f"b{k}"]) for k in range(150)]
    own = find("words", [row(f"prompt {k % 150}", *orders[k % 150], number=k) for k in range(1500)])
    assert abs(own.figures["accuracy"] - 0.5) < 0.13


def test_every_list_counts_once_and_a_tie_of_the_judge_one_half():
    lists = [row(f"p {k}", "aaaa", "aaa", "aa", "a", number=k) for k in range(30)]
    lists += [row(f"q {k}", "a", "aa", number=k) for k in range(30)]
    found = pairs_of(lists)
    assert found.lists == 60 and found.weight.sum() == pytest.approx(60)
    own = find("length", lists)
    assert own.figures["longer_is_better"] == pytest.approx(0.5)
    ties = find("length", [row(f"p {k}", "ab", "cd") for k in range(40)])
    assert ties.figures["accuracy"] == 0.5


def test_the_error_is_that_of_the_mean_over_prompts():
    rows = pairs(300, lambda g, k: in_random_order(g, [some_words(g, 3), some_words(g, 9)]), prompts=60)
    found = pairs_of(rows)
    right = np.array([len(b) > len(w) for b, w in zip(found.better, found.worse, strict=True)], float)
    own = reached(found, lambda learn_from: lambda at: right[at] - 0.5)
    assert own.accuracy == pytest.approx(right.mean())
    by_prompt = [sum(right[k] - right.mean() for k in range(p, 300, 60)) for p in range(60)]
    assert own.error == pytest.approx(math.sqrt(sum(value**2 for value in by_prompt)) / 300)


def test_the_judge_is_the_minimum_of_its_loss():
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(60, 7)) * (generator.random((60, 7)) < 0.4) + 0.1
    weight = generator.random(60) + 0.5
    at = np.nonzero(dense)
    own = logistic(Sparse(*at, dense[at], dense.shape), weight)
    loss = minimize(lambda w: (weight * np.logaddexp(0, -dense @ w)).sum() + (w**2).sum() / 2, np.zeros(7), tol=1e-12)
    np.testing.assert_allclose(own, loss.x, atol=1e-5)


@pytest.mark.parametrize("name", ["length", "words"])
def test_too_few_pairs_say_nothing(name):
    assert find(name, pairs(19, longer_first)) is None
    assert find(name, pairs(100, longer_first, prompts=19)) is None
    assert find(name, [row("p", "only one", grades=(1.0,)) for _ in range(100)]) is None
    assert find(name, [row(f"p {k}", "a", "b", grades=(1.0, 1.0)) for k in range(100)]) is None


def sides(train, heldout):
    rows = [row(text, "a", "b", number=k + 1) for k, text in enumerate(train)]
    return rows + [row(text, "a", "b", number=900 + k, heldout=True) for k, text in enumerate(heldout)]


@pytest.mark.parametrize(
    "change",
    [
        str,
        str.upper,
        lambda text: text.replace(" ", "\n\n ") + "?!",
        lambda text: text.replace(text.split()[20], "otherwise"),
        lambda text: text + " please",
        lambda text: " ".join(text.split()[1:]),
    ],
)
def test_a_planted_leak_is_found_and_named(change):
    generator = random.Random(0)
    train, heldout = ([some_words(generator, 40) for _ in range(size)] for size in (300, 50))
    planted = [*heldout[:10], change(train[123]), *heldout[10:]]
    own = find("leak", sides(train, planted))
    assert own.figures == {"share": pytest.approx(1 / 51), "heldout": 51, "train": 300} and own.bad
    assert own.places == ("r.jsonl, row 910 and r.jsonl, row 124",)
    clean = find("leak", sides(train, heldout))
    assert clean.figures["share"] == 0 and not clean.bad and clean.places == ()


def test_prompts_are_alike_exactly_where_their_runs_of_three_words_are():
    """Against every pair compared: runs are those of the words, of which 0.8 or more must be shared."""
    generator = random.Random(5)
    train = [some_words(generator, generator.randint(3, 25)).split() for _ in range(150)]
    heldout = []
    for words in train[:120]:
        changed = list(words)
        for _ in range(generator.randint(0, 2)):
            changed[generator.randrange(len(changed))] = generator.choice(WORDS)
        heldout.append(changed[: generator.randint(len(words) - 2, len(words))] if len(words) > 5 else changed)

    def runs(words):
        return {tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2))}

    def alike(one, other):
        return len(runs(one) & runs(other)) / len(runs(one) | runs(other)) >= ALIKE

    expected = [any(alike(own, other) for other in train) for own in heldout]
    assert 10 < sum(expected) < 110
    own = find("leak", sides([" ".join(words) for words in train], [" ".join(words) for words in heldout]))
    assert own.figures["share"] == sum(expected) / 120


FRAME = f"{some_words(random.Random(9), 90)} Instruction: {{}} Answer:"
"""Long: as a share of all runs of words two such prompts have nine tenths in common."""


def test_what_all_prompts_share_makes_none_alike():
    generator = random.Random(1)
    asked = [some_words(generator, 5) for _ in range(400)]
    framed = [FRAME.format(text) for text in asked]
    assert find("leak", sides(framed[:300], framed[300:])).figures["share"] == 0
    assert find("leak", sides(framed[:300], [*framed[300:], framed[7].lower()])).figures["share"] == 1 / 101
    assert find("near_duplicates", sides(framed, [])) is None


def test_near_duplicates_count_rows_that_are_the_same_and_prompts_that_are_nearly():
    generator = random.Random(2)
    train = [some_words(generator, 30) for _ in range(60)]
    again = [train[3], train[3].title(), " ".join(train[9].split()[:-1])]
    own = find("near_duplicates", sides([*train, *again], [train[5]]))
    assert own.figures == {"share": 3 / 63, "rows": 63, "same": 2, "nearly": 1} and not own.bad
    assert own.places == ("r.jsonl, row 63 and r.jsonl, row 10",)
    assert find("near_duplicates", sides(train * 2, [])).bad
    assert find("near_duplicates", sides(train, train)) is None, "held-out rows are the leak's matter"


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("  I’m really sorry, I cannot.", True),
        ("Sorry, no.", True),
        ("I cannot assist with this request.", True),
        ("I can’t do that", True),
        ("As an AI language model, I do not have feelings", True),
        ("I am unable to", True),
        ("I won't write that.", True),
        ("My apologies, but no", True),
        ("I must respectfully decline", True),
        ("I can help with that.", False),
        ("Sorrel is a herb.", False),
        ("The reply was: I'm sorry, but no.", False),
        ("I cannoli", False),
        ("", False),
    ],
)
def test_refusals_among_the_best(text, refuses):
    own = find("refusals", [row("p", text, "Yes."), row("p", "Yes.", "Fine.", "I cannot.")])
    assert own.figures == {"best": refuses / 2, "worst": 0.5, "rows": 2} and own.bad is refuses
    assert own.places == (("r.jsonl, row 1",) if refuses else ())


def test_rows_without_refusals_say_nothing_of_them():
    assert find("refusals", [row("p", "Yes.", "No.")]) is None


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "Latin"),
        ("“Déjà vu” – encore…", "Latin"),
        ("Привет, мир", "Cyrillic"),
        ("東京都庁舎展望室の夜景", "Japanese"),
        ("中文测试", "Han"),
        ("한국어", "Hangul"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("print(x) # Вывести значение переменной на экран", "Cyrillic"),
        ("123 + 4 = ?", ""),
        ("", ""),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_completions_in_another_script_than_their_prompt():
    assert find("scripts", [row("Hello", "Hi", "Yes", number=1)]) is None
    rows = [row("Hello", "Привет", "Hi", number=1), row("Привет", "Привет", "42", number=2)]
    own = find("scripts", rows)
    assert own.figures == {"other_script": 0.25, "rows": 2} and own.bad and own.places == ("r.jsonl, row 1",)


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("<|im_start|>user\nHi<|im_end|>", {"<|im_start|>", "<|im_end|>"}),
        ("<s>[INST] Hi [/INST]", {"<s>", "[INST]", "[/INST]"}),
        ("<<SYS>>x<</SYS>>", {"<<SYS>>", "<</SYS>>"}),
        ("### Instruction:\nHi\n\n### Response:", {"### Instruction:", "### Response:"}),
        ("<|start_header_id|>user<|end_header_id|>", {"<|start_header_id|>", "<|end_header_id|>"}),
        ("<start_of_turn>model", {"<start_of_turn>"}),
        ("<｜User｜>Hi<｜Assistant｜>", {"<｜User｜>", "<｜Assistant｜>"}),
        ("a <| b |> c, x[INSTANCE], ### Results:, <span>, 3 < 4 ###", set()),
    ],
)
def test_marks_of_templates(text, marks):
    assert marks_of(text) == marks
    found = [find("template_marks", [row(text, "a", "b")]), find("template_marks", [row("p", "a", text)])]
    for own in found:
        assert (own is not None) == bool(marks) and (own is None or own.bad)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Blue.\n\nHuman: And red?", 1),
        ("Assistant: Blue.", 1),
        ("**User:** hi", 1),
        ("Q: why?\nA: so", 1),
        ("The user: a person. Say A: first", 0),
        ("Users: many\nQuality: good", 0),
    ],
)
def test_lines_that_begin_as_another_speaker_does(text, count):
    own = find("role_marks", [row("Human: p", text, "b")])
    assert (own is None) if not count else own.figures == {"completions": 2, "share": 0.5}


def test_a_check_looks_at_a_bounded_sample_and_says_its_size():
    rows = pairs(ROWS + 500, longer_first)
    own = find("length", rows)
    assert own.figures["lists"] == ROWS and f"{ROWS} lists" in own.words
    assert find("length", rows) == own
    leak = find("leak", sides([f"{some_words(random.Random(k), 9)}" for k in range(ROWS + 500)], ["w x y z"]))
    assert leak.figures["train"] == ROWS + 500


def test_long_prompts_are_compared_in_little_memory():
    """Of 400 words, whose runs as texts alone take 40,000 bytes."""
    generator = random.Random(0)
    rows = sides([some_words(generator, 400) for _ in range(200)], [])
    find("near_duplicates", rows[:20])
    tracemalloc.start()
    find("near_duplicates", rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25_000 * len(rows)


# What a recipe asks for.


LEAKY = [f"w{10 + k} w3 w4 w5 w6 w7 w8 w{11 + k} w{12 + k} w{13 + k}" for k in range(9)]


@pytest.fixture
def lint_recipe(make_recipe, tmp_path):
    """A recipe on rows whose first held-out prompt is a training one with a space more."""

    def make(**data):
        def lines(prompts):
            return "".join(json.dumps({"prompt": p, "chosen": " w3", "rejected": " w4"}) + "\n" for p in prompts)

        (tmp_path / "train.jsonl").write_text(lines(LEAKY))
        (tmp_path / "heldout.jsonl").write_text(lines([LEAKY[2].replace(" ", "  "), "w30 w31 w32 w33"]))
        files = {"sources": [str(tmp_path / "train.jsonl")], "eval_sources": [str(tmp_path / "heldout.jsonl")]}
        return make_recipe(data=files | data, objective="logistic")

    return make


def test_a_recipe_stops_on_what_it_names_and_on_nothing_else(lint_recipe):
    with pytest.raises(UserError, match=r"^data.stop_on: leak: 1 of 2 .*heldout.jsonl, row 1 and .*train.jsonl, row 3"):
        prepare(lint_recipe(stop_on=["leak"]))
    for names in ([], [name for name in CHECK.classes if name != "leak"]):
        prepare(lint_recipe(stop_on=names), every_check=True)


def test_a_run_does_the_cheap_checks_and_those_that_it_names_and_inspect_does_all(lint_recipe, monkeypatch, capsys):
    done = []
    for own in CHECK.classes.values():
        monkeypatch.setattr(own, "find", classmethod(lambda cls, rows: done.append(cls.name)))
    prepare(lint_recipe())
    assert done == list(CHEAP) and "words" not in done
    done.clear()
    prepare(lint_recipe(stop_on=["words"]))
    assert done == ["words"]  # what the others said is kept
    done.clear()
    inspect_recipe(lint_recipe(), rows=0)
    assert sorted([*done, *CHEAP, "words"]) == sorted(CHECK.classes)


def test_inspect_and_the_run_s_record_show_what_the_checks_say(lint_recipe, tmp_path, capsys):
    inspect_recipe(lint_recipe(), rows=0, html=str(tmp_path / "page.html"))
    assert "1 of 2 (50.0 %)" in capsys.readouterr().out.replace("\n", " ")
    assert "1 of 2 (50.0 %) held-out rows" in (tmp_path / "page.html").read_text()
    prepared = prepare(lint_recipe(stop_on=["near_duplicates"]), every_check=True)
    found = json.loads(json.dumps(prepared.audit.to_dict()))["lint"]
    assert [own["check"] for own in found] == ["leak"] and found[0]["figures"]["share"] == 0.5


def test_names_of_checks_come_from_the_registry(lint_recipe):
    schema = Recipe.model_json_schema()["$defs"]["DataSection"]["properties"]["stop_on"]
    assert schema["items"]["enum"] == list(CHECK.classes)
    with pytest.raises(UserError, match="stop_on"):
        lint_recipe(stop_on=["leaks"])


def test_rows_are_read_as_texts(make_recipe, tmp_path, monkeypatch):
    """Messages without the system's, of a trajectory what the assistant says, and token ids decoded."""
    seen = []
    monkeypatch.setattr(CHECK.classes["refusals"], "find", classmethod(lambda cls, rows: seen.extend(rows)))

    def said(role, text):
        return {"role": role, "content": text}

    turns = [said("assistant", "w10"), said("tool", "w11"), said("assistant", "w12")]
    asked = [said("system", "w5"), said("user", "w6")]
    talk = {"prompt": asked, "chosen": turns, "rejected": [said("assistant", "w13")]}
    rows = [
        {"prompt_ids": [6, 7], "completions_ids": [[8, 9], [9]], "grades": [1.0, 0.0]},
        {"prompt": "w6 w8", "chosen": " w9", "rejected": " w7"},
    ]
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<s> {% endif %}"
    )
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk) + "\n")
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    data = {"sources": [str(tmp_path / "talk.jsonl"), str(tmp_path / "r.jsonl")], "eval_fraction": 0.0}
    policy = {"chat_template": str(tmp_path / "t.jinja")}
    prepare(make_recipe(data=data, policy=policy, objective="logistic"))
    texts = [(own.prompt, own.completions, own.chat) for own in seen]
    assert texts == [
        ("w6", ("w10\nw12", "w13"), True),
        ("w6 w7", ("w8 w9", "w9"), False),
        ("w6 w8", (" w9", " w7"), False),
    ]


@pytest.mark.parametrize(
    ("file", "check", "low", "high"),
    [
        ("quickstart_politeness/pairs.jsonl", "words", 0.85, 1.0),  # made by wording politely and impolitely
        ("quickstart_politeness/pairs.jsonl", "length", 0.42, 0.58),
        ("oasst_ranked/lists.jsonl.gz", "length", 0.65, 0.8),  # longer answers are known to be ranked higher
        ("hh_harmless/pairs.jsonl.gz", "length", 0.5, 0.6),
    ],
)
def test_public_data_says_what_is_known_of_it(shared_data, make_recipe, file, check, low, high):
    data = {"sources": [str(shared_data / file)], "grades": "win_probability", "max_length": 4096}
    template = {"chat_template": "plain"}
    found = prepare(make_recipe(data=data | {"limit": 400}, policy=template), every_check=True).audit.lint
    (own,) = [one for one in found if one.check == check]
    assert low <= own.figures["accuracy"] <= high
