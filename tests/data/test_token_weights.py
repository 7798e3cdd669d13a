"""Weights of single tokens from the rows: they stay with their tokens, and change the score as they say."""

import json

import pytest
import torch
from read_rows import read_rows
from transformers import AutoTokenizer

from align.errors import UserError
from align.losses.list_loss import build_loss
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.objectives.token_reg import Column
from align.packing.batch import collate
from align.training.train import train
from align.types import TokenStats

ROW = {
    "prompt_ids": [5, 6],
    "completion_ids": [[7, 8, 9], [10, 11], [12, 13, 14, 15]],
    "grades": [1.0, 0.5, 0.0],
    "token_weights": [[0.5, 1, 2], [0, 1], [1, 2, 3, 4]],
}


@pytest.fixture
def prepared(tmp_path, tiny_policy):
    def prepare(*rows: dict, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        options = {"token_weights": True, "append_eos": False} | options
        return read_rows(str(path), eval_fraction=0.0, tokenizer=tokenizer, **options).train

    return prepare


def test_they_stay_with_their_tokens_when_lists_are_cut(prepared):
    (row,) = prepared(ROW)
    assert row["token_weights"] == ROW["token_weights"]
    (row,) = prepared(ROW, max_length=5)
    assert row["completion_ids"][2] == [12, 13, 14] and row["token_weights"] == [[0.5, 1, 2], [0, 1], [1, 2, 3]]
    (row,) = prepared(ROW, max_length=5, overlong="drop_completion")
    assert row["completion_ids"] == ROW["completion_ids"][:2] and row["token_weights"] == ROW["token_weights"][:2]
    (row,) = prepared(ROW, select="best_worst")
    assert row["completion_ids"] == ROW["completion_ids"][::2] and row["token_weights"] == ROW["token_weights"][::2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_weights": [[1, 1, 1], [1, 1]]}, r"row 1, field token_weights: not one list per completion"),
        ({"token_weights": [[1, 1], [1, 1], [1] * 4]}, r"row 1, field token_weights\[0\]: 2 entries for 3 tokens"),
        ({"token_weights": [[1, 1, "a"], [1, 1], [1] * 4]}, r"field token_weights\[0\]\[2\]: text, not a number"),
        ({"token_weights": None}, r"rows.jsonl, row 1, field token_weights: missing"),
    ],
)
def test_a_row_whose_weights_do_not_fit_is_refused(prepared, change, message):
    with pytest.raises(UserError, match=message):
        prepared(ROW | change)


def test_beside_text_they_are_refused(prepared):
    with pytest.raises(UserError, match="field token_weights: beside text; give the row as `prompt_ids`"):
        prepared({"prompt": "w3", "chosen": " w4", "rejected": " w5", "token_weights": [[1], [1]]})


def test_a_score_is_the_weighted_sum_of_log_ratios():
    example = {"prompt_ids": [1], "completion_ids": [[3, 4], [5]], "grades": [1.0, 0.0], "token_weights": [[2, 0], [3]]}
    batch = collate([example], pad_id=0)
    policy, reference = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[-1.5, -1.0], [-0.25, 0.0]])
    loss = build_loss(LogRatio(beta=0.3), [Logistic()], token_weights=Column())
    a, b = 0.3 * (2 * (-1.0 - -1.5) + 0 * (-2.0 - -1.0)), 0.3 * 3 * (-0.5 - -0.25)
    expected = torch.log1p(torch.tensor(b - a).exp())
    torch.testing.assert_close(loss(TokenStats(policy), reference, batch), expected[None])


def test_a_run_of_weights_one_is_the_run_without(make_recipe, tmp_path):
    generator = torch.Generator().manual_seed(2)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 20, (n,), generator=generator).tolist()

    path, runs = tmp_path / "ids.jsonl", []
    rows = [{"prompt_ids": ids(3), "completion_ids": [ids(4), ids(2)], "grades": [1.0, 0.0]} for _ in range(12)]
    for name, weights in (("one", [[1.0] * 4, [1.0] * 2]), ("half", [[0.5] * 4, [0.5] * 2])):
        path.write_text("".join(json.dumps(row | {"token_weights": weights}) + "\n" for row in rows))
        data = {"sources": [str(path)]}
        run = make_recipe(name, data=data, token_weights={"name": "column"}, train={"steps": 2})
        runs.append(train(run).path / "adapter" / "adapter_model.safetensors")
    plain = train(make_recipe("plain", data={"sources": [str(path)]}, train={"steps": 2}))
    base = (plain.path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert runs[0].read_bytes() == base
    assert runs[1].read_bytes() != base
