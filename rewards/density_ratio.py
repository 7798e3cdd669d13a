"""How much likelier a strong model finds a completion than a weak one does (CDR)."""

from collections.abc import Sequence
from typing import Unpack

from rewards.language_model import LanguageModel
from rewards.texts import as_messages, given_of
from rewards.types import Asked, RunningOptions, Tally, Text


class DensityRatioScorer:
    """Rewards by the log-ratio of two models; see `DensityRatio` for the arguments."""

    def __init__(
        self,
        *,
        strong: str,
        weak: str,
        instruction: str | None,
        per_token: bool,
        append_eos: bool,
        **running: Unpack[RunningOptions],
    ) -> None:
        self.instruction, self.per_token, self.append_eos = instruction, per_token, append_eos
        self.tally = Tally()
        self.strong = LanguageModel(strong, tally=self.tally, **running)
        self.weak = LanguageModel(weak, tally=self.tally, **running)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """log strong(y | instruction, x) - log weak(y | instruction, x) in nats; see Scorer.score.

        Source: CDR, arXiv:2411.02481
        """
        self.tally.completions += len(prompts)
        asked = [Asked.of(self._instructed(prompt), given_of(prompt)) for prompt in prompts]
        strong = self.strong.logprobs(asked, completions, append_eos=self.append_eos)
        weak = self.weak.logprobs(asked, completions, append_eos=self.append_eos)
        return [
            (own - other) / (max(size, 1) if self.per_token else 1)
            for (own, size), (other, _) in zip(strong, weak, strict=True)
        ]

    def _instructed(self, prompt: Text) -> Text:
        if self.instruction is None:
            return prompt
        if isinstance(prompt, str):
            return f"{self.instruction}\n\n{prompt}"
        first, *rest = as_messages(prompt, "user")
        if first["role"] != "system":
            return [{"role": "system", "content": self.instruction}, first, *rest]
        return [{**first, "content": f"{self.instruction}\n\n{first['content']}"}, *rest]
