"""R3's reward written out, on vectors of the encoder run one text at a time."""

import pytest
import torch
from tiny_models import bert, saved
from transformers import BertModel, PreTrainedTokenizerFast

from rewards import ScorerError, load_scorer


@torch.no_grad()
def vector(path: str, text: str) -> torch.Tensor:
    words = PreTrainedTokenizerFast.from_pretrained(path)
    ids = torch.tensor([words(text)["input_ids"]])
    return BertModel.from_pretrained(path).double().eval()(ids).last_hidden_state[0].mean(0)


def test_relevance_times_length_times_distinct_trigrams(tmp_path):
    path = saved(tmp_path / "encoder", bert())
    prompts = ["a b c", "a b c", "k z", "k z"]
    completions = ["a b c d", "a b a b a b", "z", " ".join("abcdefgh" * 6)]
    shares = [2 / 2, 2 / 4, 1, 8 / 46]
    relevance = [(vector(path, p) @ vector(path, c)).item() for p, c in zip(prompts, completions, strict=True)]
    lengths = [4 / 100, 6 / 100, 1 / 100, 48 / 100]
    expected = [r * n * s for r, n, s in zip(relevance, lengths, shares, strict=True)]
    spec = {"name": "relevance", "model": path}
    assert load_scorer(spec).score(prompts, completions) == pytest.approx(expected, rel=1e-4)
    answers = ["b a", "b a", "c", "d e"]
    relevance = [(vector(path, a) @ vector(path, c)).item() for a, c in zip(answers, completions, strict=True)]
    expected = [r / 3.5 * 200 / 100 * s for r, s in zip(relevance, shares, strict=True)]
    with_answer = load_scorer({**spec, "answer_column": "answer", "max_words": 200})
    assert with_answer.score(prompts, completions, answers) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ScorerError, match="give both or none"):
        load_scorer({**spec, "answer_column": "answer"})
