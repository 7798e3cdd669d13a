"""A language model as judge: the probability of its verdict, never a sampled text."""

import re
from collections.abc import Sequence
from itertools import permutations
from math import exp
from typing import Unpack

from rewards.language_model import LanguageModel
from rewards.rendering import Unrendered, rendered
from rewards.texts import plain, text_key
from rewards.types import RowError, RunningOptions, Tally, Text

QUESTIONS = {
    "yes_no": "Question:\n{prompt}\n\nAnswer:\n{completion}\n\nIs this a good answer to the question? Reply Yes or No.",
    "pairwise": (
        "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich answer is better? Reply A or B."
    ),
}
VERDICTS = {"yes_no": ("Yes", "No"), "pairwise": ("A", "B")}


class JudgeScorer:
    """Rewards by a judge's verdict; see `Judge` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        mode: str,
        question: str | None,
        verdicts: tuple[str, str] | None,
        log_odds: bool,
        **running: Unpack[RunningOptions],
    ) -> None:
        self.tally = Tally()
        self.model = LanguageModel(model, revision=revision, tally=self.tally, **running)
        self.chat = self.model.tokenizer.chat_template is not None
        self.mode, self.log_odds = mode, log_odds
        self.question = question or QUESTIONS[mode]
        # Behind a generation prompt a verdict stands alone; behind "Verdict:" it follows a space.
        self.verdicts = [word if self.chat else f" {word.strip()}" for word in verdicts or VERDICTS[mode]]

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """How the judge likes each completion; see Scorer.score.

        yes_no: p(Yes) / (p(Yes) + p(No)), or its log-odds
        pairwise: mean over the prompt's other completions j and both orders of P(this one is better than j); 1/2 for a
            completion without others

        A verdict's probability is that of all its tokens.

        Source: ours; both orders as in MT-bench, arXiv:2306.05685
        """
        self.tally.completions += len(prompts)
        if self.mode == "pairwise":
            return self._pairwise(prompts, completions)
        texts = [
            self._asked({"prompt": plain(prompt), "completion": plain(own)})
            for prompt, own in zip(prompts, completions, strict=True)
        ]
        odds = self._log_odds(texts)
        return odds if self.log_odds else [_sigmoid(value) for value in odds]

    def _pairwise(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        lists: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            lists.setdefault(text_key(prompt), []).append(index)
        pairs = [pair for members in lists.values() for pair in permutations(members, 2)]
        texts = [
            self._asked({"prompt": plain(prompts[a]), "first": plain(completions[a]), "second": plain(completions[b])})
            for a, b in pairs
        ]
        won: list[list[float]] = [[] for _ in prompts]
        for (a, b), value in zip(pairs, self._log_odds(texts), strict=True):
            first = _sigmoid(value)
            won[a].append(first)
            won[b].append(1 - first)
        return [sum(own) / len(own) if own else 0.5 for own in won]

    def _asked(self, texts: dict[str, str]) -> str:
        """What the judge reads up to its verdict."""
        question = re.sub(r"\{(\w+)\}", lambda m: texts.get(m[1], m[0]), self.question)
        if not self.chat:
            return f"{question}\nVerdict:"
        messages = [{"role": "user", "content": question}]
        tokenizer = self.model.tokenizer
        try:
            return rendered(tokenizer, messages, add_generation_prompt=True)
        except Unrendered as error:
            raise RowError(f"{tokenizer.name_or_path}: the chat template refuses the question ({error})") from None

    def _log_odds(self, texts: Sequence[str]) -> list[float]:
        """log p(first verdict) - log p(second verdict) behind each text, in nats."""
        twice = [text for text in texts for _ in self.verdicts]
        found = self.model.logprobs(twice, self.verdicts * len(texts), append_eos=False, templated=self.chat)
        sums = [value for value, _ in found]
        return [yes - no for yes, no in zip(sums[::2], sums[1::2], strict=True)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -700 else 0.0
