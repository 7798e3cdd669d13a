"""A command without a recipe answers with what its user can type, and with no key of a recipe."""

import json

import pytest

from align.errors import UserError
from align.evaluate.rows import evaluate_rows

TALK = {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
LONE = {"prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([LONE], {}, "give two or more answers to each prompt"),
        ([TALK], {}, "give --chat-template plain"),
        ([TALK, TEXT], {"chat_template": "plain"}, "give the two kinds of rows in two files"),
        ([TEXT], {"chat_template": "nowhere"}, "--chat-template: there is no file nowhere"),
        ([TEXT], {"ignore": ["other"]}, "--ignore: no row has a column `other`"),
        ([{**TEXT, "system_note": "Be brief, please."}], {}, "leave it out with --ignore system_note"),
        ([{"ask": "q", "good": "a", "bad": "b"}], {}, "or say which is which with --column prompt=ask"),
        ([TEXT], {"columns": ["prompt=ask"]}, "which `--column` reads as `prompt`"),
        ([TEXT], {"where": "lang == 'en'"}, "which `--where` reads"),
        ([TEXT], {"max_length": 1}, "no row is left of 1 (1 prompt fills max_length); mend them, or give others"),
    ],
)
def test_a_refusal_names_what_the_command_has(tmp_path, tiny_policy, rows, options, said):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as refusal:
        evaluate_rows(str(file), model=str(tiny_policy), **options)
    assert said in str(refusal.value)
    for key in ("data.", "policy.", "objective:", "task:", "turns:", "a recipe", "source's"):
        assert key not in str(refusal.value)
