"""Relevance of a completion to its prompt or to a reference answer, regularised by length and repetition (R3)."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel

from align.packing.unpadded import enable_unpadding
from rewards.backbone import batches_by_length, right_padded
from rewards.loading import context, folder_of, load_model, load_tokenizer
from rewards.texts import plain
from rewards.types import RowError, RunningOptions, Tally, Text

RELEVANCE_RANGE = 3.5
"""Relevance to a reference answer that counts as full; the authors' figure for Contriever."""


class RelevanceScorer:
    """Rewards by relevance; see `Relevance` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        answer_column: str | None,
        max_words: int | None,
        words_per_unit: float,
        **running: Unpack[RunningOptions],
    ) -> None:
        folder = folder_of(model, revision)
        self.model, _ = load_model(AutoModel, folder, dtype=running["dtype"], device=running["device"])
        self.tokenizer = load_tokenizer(folder)
        self.max_length = context(self.model, self.tokenizer, running["max_length"])
        self.tokens_per_batch, self.exact = running["tokens_per_batch"], running["exact"]
        if not self.exact:
            enable_unpadding(self.model, name=model)
        self.max_words, self.words_per_unit = max_words, words_per_unit
        self.tally = Tally()

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], answers: Sequence[Any] | None = None
    ) -> list[float]:
        """Relevance times length incentive times repetition penalty; see Scorer.score.

        open-ended:       rel(prompt, y) * words(y) / words_per_unit * distinct trigrams / trigrams
        with an answer:   F(rel(answer, y)) * distinct trigrams / trigrams,  F linear from [0, 3.5] to
                          [0, max_words / words_per_unit]

        Args:
            prompts: The prompt of each completion.
            completions: As many as prompts.
            answers: The reference answer of each, where the scorer was made with `max_words`.

        Raises:
            RowError: a text has no tokens.

        Source: R3, the authors' repository; words are what white space separates
        """
        self.tally.completions += len(prompts)
        texts = [plain(own) for own in completions]
        wanted = [plain(prompt) for prompt in prompts] if answers is None else [str(answer) for answer in answers]
        place = {text: i for i, text in enumerate(dict.fromkeys([*wanted, *texts]))}
        vectors = self._encode(list(place))
        a, b = ([place[text] for text in side] for side in (wanted, texts))
        relevance = (vectors[a] * vectors[b]).sum(-1).double().tolist()
        return [
            self._scaled(value, text) * distinct_trigrams(text) for value, text in zip(relevance, texts, strict=True)
        ]

    def _scaled(self, relevance: float, text: str) -> float:
        if self.max_words is not None:
            return relevance / RELEVANCE_RANGE * self.max_words / self.words_per_unit
        return relevance * len(text.split()) / self.words_per_unit

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Float[Tensor, "N H"]:
        """Mean of the last hidden states over each text's own tokens, float32."""
        whole = self.tokenizer(list(texts))["input_ids"] if texts else []
        rows = [ids[: self.max_length] for ids in whole]
        if not all(rows):
            raise RowError("a text without tokens has no meaning to compare; remove the row")
        self.tally.read(whole, rows)
        vectors = torch.zeros(len(rows), self.model.config.get_text_config().hidden_size)
        for batch in batches_by_length(rows, self.tokens_per_batch, exact=self.exact):
            ids, mask = right_padded([rows[i] for i in batch], 0, self.model.device)
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors[batch] = ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu()
        return vectors


def distinct_trigrams(text: str) -> float:
    """Share of a text's word trigrams that are distinct; 1 where there are none."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
