"""POSIX written out in float64, from plain logits of every wording with every completion."""

import json
from itertools import permutations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import UserError
from align.evaluate.rows import evaluate_rows
from align.evaluate.variants import sensitivity

ROWS = [
    {"prompt": "w3 w4", "wordings": ["w4 w5 w3", "w9"], "completions": [" w5 w6 w7", " w6"], "grades": [1, 0]},
    {"prompt": "w8", "wordings": ["w7 w7"], "completions": [" w3", " w4 w4", " w5"], "grades": [0, 2, 1]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_formula():
    sums = torch.tensor([[-1.0, -4.0], [-3.0, -5.0], [-2.0, -9.0]], dtype=torch.float64)
    lengths = torch.tensor([[2, 4], [2, 4], [2, 4]])
    pairs = [abs(a - b) / 2 for a, b in permutations((-1, -3, -2), 2)]
    pairs += [abs(a - b) / 4 for a, b in permutations((-4, -5, -9), 2)]
    assert sensitivity(sums, lengths) == pytest.approx(sum(pairs) / len(pairs))
    assert sensitivity(sums.flip(0), lengths) == pytest.approx(sensitivity(sums, lengths))
    assert sensitivity(sums[:1].expand(3, 2), lengths) == 0


def test_it_is_that_of_the_models_own_logits(tmp_path, tiny_policy):
    words = AutoTokenizer.from_pretrained(tiny_policy)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float64).eval()

    def logprob(prompt, completion):
        ids = words(prompt + completion)["input_ids"] + [words.eos_token_id]
        start = len(words(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        own = torch.tensor(ids[start:])
        return logits.gather(1, own[:, None]).sum().item(), len(own)

    psis = []
    for row in ROWS:
        values = []
        for completion in row["completions"]:
            under = [logprob(prompt, completion) for prompt in (row["prompt"], *row["wordings"])]
            values += [abs(a - b) / length for (a, _), (b, length) in permutations(under, 2)]
        psis.append(sum(values) / len(values))
    found = evaluate_rows(write(tmp_path / "rows.jsonl", ROWS), model=str(tiny_policy), variants="wordings")
    assert found["prompt_sensitivity"] == pytest.approx(sum(psis) / 2, rel=1e-5) and found["prompt_sensitivity"] > 1e-3
    assert found["prompt_sensitivity_rows"] == 2
    plain = evaluate_rows(str(tmp_path / "rows.jsonl"), model=str(tiny_policy))
    assert plain.items() <= found.items(), "other figures are what they were"


def test_the_same_words_make_no_difference(tmp_path, tiny_policy):
    rows = [{**row, "wordings": [row["prompt"]]} for row in ROWS]
    found = evaluate_rows(write(tmp_path / "rows.jsonl", rows), model=str(tiny_policy), variants="wordings")
    assert found["prompt_sensitivity"] == pytest.approx(0, abs=1e-6)


def test_a_wording_too_long_leaves_its_row_out(tmp_path, tiny_policy):
    rows = [{**ROWS[0], "wordings": ["w3 " * 30]}, ROWS[1]]
    path = write(tmp_path / "rows.jsonl", rows)
    found = evaluate_rows(path, model=str(tiny_policy), variants="wordings", max_length=16)
    assert found["prompt_sensitivity_rows"] == 1
    with pytest.raises(UserError, match="in no row do all wordings fit"):
        evaluate_rows(
            write(tmp_path / "rows.jsonl", rows[:1]), model=str(tiny_policy), variants="wordings", max_length=16
        )


@pytest.mark.parametrize(
    ("wordings", "message"),
    [
        (None, "row 1, field wordings: not a list of other prompts for --variants"),
        ([], "not a list of other prompts"),
        ("w4", "not a list of other prompts"),
        ([[{"role": "user", "content": "w4"}]], "not all are text or all messages, as the prompt is"),
    ],
)
def test_rows_without_other_wordings_are_refused(wordings, message, tmp_path, tiny_policy):
    row = {**ROWS[0], "wordings": wordings}
    with pytest.raises(UserError, match=message):
        evaluate_rows(write(tmp_path / "rows.jsonl", [row]), model=str(tiny_policy), variants="wordings")


def test_hidden_diversity_is_the_mean_over_completions(tmp_path, tiny_policy):
    words = AutoTokenizer.from_pretrained(tiny_policy)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    values = []
    for row in ROWS:
        start = len(words(row["prompt"])["input_ids"])
        for completion in row["completions"]:
            ids = words(row["prompt"] + completion)["input_ids"] + [words.eos_token_id]
            with torch.no_grad():
                states = model.model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1].double()
            singular = torch.linalg.svdvals(states / states.norm(dim=1, keepdim=True))
            values.append(singular.sum().item() / len(states))
    found = evaluate_rows(write(tmp_path / "rows.jsonl", ROWS), model=str(tiny_policy))
    assert found["hidden_diversity"] == pytest.approx(sum(values) / len(values), rel=1e-5)
