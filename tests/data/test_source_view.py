"""Which rows of a source are read, and under which names: the mapping and the condition of `data.sources`."""

import itertools
import json

import datasets
import pytest
from pydantic import ValidationError

from align.data import read_source
from align.data.config import SourceSection
from align.data.formats.lists import LISTS
from align.data.paths import NOTHING, path_of, value_at, without_paths
from align.data.where import parse_where
from align.errors import UserError

RAW = {
    "question": "q",
    "answers": {"good": "a", "bad": "b", "note": "n"},
    "turns": [{"text": "x", "score": 1}, {"text": "y", "score": 2}],
    "odd.name": "o",
    "as_json": '{"good": "a"}',
}


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("question", "q"),
        ("answers.good", "a"),
        ("turns.0.text", "x"),
        ("turns[0].text", "x"),
        ("turns[-1].score", 2),
        ("turns[].text", ["x", "y"]),
        ("turns[5].text", None),
        ("turns.text", None),
        ("question.more", None),
        ("nowhere", None),
        ("as_json.good", "a"),
    ],
)
def test_a_place_in_a_row(place, expected):
    assert value_at(RAW, path_of(place)) == expected


@pytest.mark.parametrize("place", ["", ".", "a..b", "a.", ".a", "[0]", "a[x]", "a[0", "a]b", "a b["])
def test_what_is_no_place_is_refused_in_the_recipe(place):
    with pytest.raises(ValidationError, match="is no column; write `column`"):
        SourceSection(path="p", columns={"prompt": place})


def test_what_a_mapping_leaves_is_all_but_what_it_reads():
    paths = [path_of(place) for place in ("question", "answers.good", "turns[].text", "as_json")]
    left = {"answers": {"bad": "b", "note": "n"}, "turns": [{"score": 1}, {"score": 2}], "odd.name": "o"}
    assert without_paths(RAW, paths) == left
    assert without_paths(RAW, [(name,) for name in RAW]) is NOTHING


def test_a_mapped_row_is_the_row_under_our_names(tmp_path):
    raw = {"q": "Say hi.", "answers": {"good": "Hi.", "bad": "No."}, "judge": "me", "odd.name": "Be kind."}
    columns = {"prompt": "q", "chosen": "answers.good", "rejected": "answers.bad", "system": "odd.name"}
    (row,) = read_source(write(tmp_path, raw), columns=columns).rows
    assert (row.prompt, row.completions, row.grades) == ("Be kind.\n\nSay hi.", ("Hi.", "No."), (1.0, 0.0))
    assert (row.meta, row.unread) == ({"judge": "me"}, ("judge",))


def test_lists_are_mapped_and_so_is_one_name_of_a_format_to_another(tmp_path):
    raw = {"q": "Say hi.", "turns": [{"t": "Hi.", "s": 2}, {"t": "No.", "s": 1}]}
    (row,) = read_source(
        write(tmp_path, raw), columns={"prompt": "q", "completions": "turns[].t", "rewards": "turns[].s"}
    ).rows
    assert (row.completions, row.rewards) == (("Hi.", "No."), (2.0, 1.0))
    safe = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    mapping = {"better_response_id": "safer_response_id"}
    (safer,) = read_source(write(tmp_path, safe), columns=mapping).rows
    (ignoring,) = read_source(write(tmp_path, safe), ignore=["better_response_id"]).rows
    (better,) = read_source(write(tmp_path, safe)).rows
    assert (safer.grades, ignoring.grades, better.grades) == ((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))


@pytest.mark.parametrize("name", [*LISTS, "candidates", "votes"])
@pytest.mark.parametrize("as_text", [False, True])
def test_what_a_mapping_leaves_of_the_answers_is_no_list_of_them(tmp_path, name, as_text):
    """What is left keeps the name of its place, so that no format takes it for the row's own answers."""
    pair = {"good": "Hi.", "others": [{"text": "No.", "votes": 1}], "date": "May"}
    path = write(tmp_path, {"q": "Say hi.", name: json.dumps(pair) if as_text else pair})
    places = {"prompt": "q", "chosen": f"{name}.good", "rejected": f"{name}.others[0].text"}
    (row,) = read_source(path, columns=places).rows
    assert (row.completions, row.grades, set(row.unread)) == (
        ("Hi.", "No."),
        (1, 0),
        {f"{name}.others", f"{name}.date"},
    )
    several = [{"t": "Hi.", "stars": 2, "model": "m"}, {"t": "No.", "stars": 1}]
    path = write(tmp_path, {"q": "Say hi.", name: json.dumps(several) if as_text else several}, name="lists.jsonl")
    places = {"prompt": "q", "completions": f"{name}[].t", "scores": f"{name}[].stars"}
    (row,) = read_source(path, columns=places).rows
    assert (row.completions, row.rewards, row.unread) == (("Hi.", "No."), (2, 1), (f"{name}[].model",))
    without = read_source(path, columns=places, ignore=[f"{name}[].model"])
    assert (without.rows[0].unread, without.ignored) == ((), {f"{name}[].model": 1})


def test_what_a_mapping_leaves_of_the_answers_may_be_no_preference(tmp_path):
    path = write(tmp_path, {"q": "Say hi.", "answers": {"good": "Hi.", "bad": "No.", "best_response": "Hello."}})
    with pytest.raises(UserError, match=r"field answers\.best_response: it looks like a completion"):
        read_source(path, columns={"prompt": "q", "chosen": "answers.good", "rejected": "answers.bad"})


def test_a_mapping_that_names_no_answer_leaves_the_rest_to_the_format(tmp_path):
    hosted = {"input": {"messages": [{"role": "user", "content": "Hi."}], "votes": 3}}
    hosted |= {side: [{"role": "assistant", "content": side}] for side in ("preferred_output", "non_preferred_output")}
    (row,) = read_source(write(tmp_path, hosted), columns={"weight": "input.votes"}).rows
    assert (row.loss_weight, [own[0]["content"] for own in row.completions]) == (3, [*hosted][1:])


PAIR = {"q": "Say hi.", "good": "Hi.", "bad": "No."}
MAPPING = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("raw", "columns", "said"),
    [
        (PAIR | {"bad": 3}, MAPPING, ", row 1, field bad: a number, not text, messages or token ids; give text"),
        (
            PAIR | {"bad": None},
            MAPPING,
            ": no row has `bad`, which the source's `columns` reads as `rejected`; mend it",
        ),
        (PAIR, MAPPING | {"system": "sytem"}, ": no row has `sytem`, which the source's `columns` reads as `system`"),
        (PAIR | {"prompt": "Other words."}, MAPPING, ", row 1, field file.prompt: it looks like the prompt"),
        (PAIR | {"third": {"response": "Hm, yes."}}, MAPPING | {"system": "third.no"}, ": no row has `third.no`"),
        (PAIR | {"best_response": "Hm, yes."}, MAPPING, ", row 1, field best_response: it looks like a completion"),
    ],
)
def test_a_slip_in_a_mapping_or_a_bad_row_is_told_in_the_files_own_names(tmp_path, raw, columns, said):
    path = write(tmp_path, raw)
    with pytest.raises(UserError) as refusal:
        read_source(path, columns=columns)
    assert str(refusal.value).startswith(path + said)


def test_a_column_that_one_row_lacks_is_told_by_its_own_name(tmp_path):
    path = write(tmp_path, PAIR, {**PAIR, "bad": None})
    with pytest.raises(UserError) as refusal:
        read_source(path, columns=MAPPING)
    said = "missing, and the source's `columns` has `rejected` there (columns: prompt, chosen)"
    assert str(refusal.value) == f"{path}, row 2, field bad: {said}; mend `columns`, or the row"


def test_what_the_mapping_replaces_is_left_out_by_request(tmp_path):
    path = write(tmp_path, PAIR | {"prompt": "Other words."})
    (row,) = read_source(path, columns=MAPPING, ignore=["file.prompt"]).rows
    assert row.prompt == "Say hi."


ROW = {"lang": "en", "score": 3, "tags": ["a", "b"], "meta": {"ok": True, "n": "7"}, "none": None, "odd-name": 1}
NAMES = dict(ROW, nowhere=None)
PLAIN = [
    "lang == 'en'", "lang != 'en'", "score > 3", "score >= 3", "2 < score <= 3", "lang in ['en', 'de']",
    "lang not in ('de',)", "'a' in tags", "not ('c' in tags)", "score == -3", "none is None", "none is not None",
    "score == 3 and lang == 'de' or 'b' in tags", "score", "not lang", "(score > 1) == True", "score in {1, 2}",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_a_condition_is_what_python_makes_of_it(text):
    assert parse_where(text).holds(ROW) is bool(eval(text, {}, dict(NAMES)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nowhere == 'x'", False),
        ("nowhere != 'x'", True),
        ("nowhere > 1", False),
        ("nowhere < 1", False),
        ("not nowhere", True),
        ("'x' in nowhere", False),
        ("'x' not in nowhere", True),
        ("nowhere == null", True),
        ("meta.ok == true", True),
        ("meta.ok", True),
        ("meta['ok']", True),
        ("tags[0] == 'a'", True),
        ("tags[-1] == 'a'", False),
        ("meta.n > 6", True),
        ("meta.n == 7", True),
        ("meta.n in [6, 7]", True),
        ("meta.n == '7'", True),
        ("`odd-name` == 1 and lang == '`en`'", False),
        ("`odd-name` == 1", True),
        ("meta.nowhere.more == null", True),
    ],
)
def test_a_condition_on_what_is_absent_below_or_text(text, expected):
    assert parse_where(text).holds(ROW) is expected


REFUSED = [
    "", "lang ==", "lang = 'en'", "f(lang)", "lang.lower()", "__import__('os').system('x')", "(lambda: lang)()",
    "[x for x in tags]", "score + 1 > 3", "score * 10 ** 10 > 1", "f'{lang}'", "lang if score else score",
    "(y := score)", "tags[score]", "tags[0:1]", "b'x' == lang", "1 == 1", "True", "[lang] == ['en']", "{'a': lang}",
    "*tags", "await lang", "lang; score", "lang == 1j", "... == lang", "'x'.y == lang", "-score > 3",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_nothing_else_is_a_condition(text):
    with pytest.raises(ValidationError, match="is no condition|is not allowed there|names no column"):
        SourceSection(path="p", where=text)


def test_rows_that_do_not_hold_are_counted_and_the_columns_are_the_files_own(tmp_path):
    rows = [{**PAIR, "lang": lang, "n": n} for n, lang in enumerate(("en", "de", "en", None))]
    found = read_source(write(tmp_path, *rows), columns=MAPPING, where="lang == 'en' and q != null")
    assert [row.number for row in found.rows] == [1, 3]
    assert (found.read, found.refused) == (4, {"where": 2})


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("lnag == 'en'", ": no row has `lnag`, which the source's `where` reads; mend it"),
        ("good > 3", ", row 1: `good > 3` compares text with a number; mend the source's `where`, or the row"),
    ],
)
def test_a_slip_in_a_condition(tmp_path, where, said):
    path = write(tmp_path, PAIR)
    with pytest.raises(UserError) as refusal:
        read_source(path, columns=MAPPING, where=where)
    assert str(refusal.value) == path + said


def test_cells_of_a_table_of_text_are_compared_as_what_they_say(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,good,bad,n,ok\np,a,b,10,true\nr,a,b,9,False\n")
    for where in ("n > 9", "n == 10", "ok == true", "ok != false", "n in [10, 11]"):
        (row,) = read_source(str(path), columns=MAPPING, where=where).rows
        assert row.prompt == "p"


def test_a_hub_data_sets_configuration(monkeypatch):
    calls = []

    def load(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr("align.data.sources.load_dataset", load)
    section = SourceSection(path="owner/name", config="preference", columns=MAPPING)
    (row,) = read_source(section.path, **section.reading).rows
    assert calls == [("owner/name", {"split": "train", "revision": None, "name": "preference"})]
    assert row.source == "owner/name (preference)"


def test_a_configuration_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is on this machine, and `config` is of a hub data set; leave it out"):
        read_source(write(tmp_path, PAIR), config="preference")


def test_the_order_of_mapping_condition_and_joining(tmp_path):
    """Neighbours are joined under our names, and only those that are asked for."""
    ratings = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
    rows = [
        {"q": q, "response": f"{q}{k}", "useful": k, "lang": lang, **ratings}
        for q, (k, lang) in itertools.product("xy", enumerate(("en", "de", "en")))
    ]
    mapping = {"prompt": "q", "helpfulness": "useful"}
    found = read_source(write(tmp_path, *rows), columns=mapping, where="lang == 'en'")
    said = [(row.prompt[0]["content"], [own[0]["content"] for own in row.completions]) for row in found.rows]
    assert said == [("x", ["x0", "x2"]), ("y", ["y0", "y2"])]
    assert [row.number for row in found.rows] == [1, 4]


def test_plain_texts_are_turns_where_the_source_says_so(tmp_path):
    raw = {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4", "system": "Be exact."}
    (row,) = read_source(write(tmp_path, raw), turns=True).rows
    assert row.prompt == [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Add\n1 2"}]
    assert [one[0]["content"] for one in row.completions] == ["3", "4"]
    assert {one[0]["role"] for one in row.completions} == {"assistant"}
