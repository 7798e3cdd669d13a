"""How probable a model finds a completion (soft self-consistency)."""

import math
from collections.abc import Callable, Sequence
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from rewards.language_model import LanguageModel
from rewards.types import RowError, RunningOptions, Tally, Text

OF: dict[str, Callable[[Float[Tensor, " T"]], Tensor]] = {
    "product": lambda logprobs: logprobs.sum(),
    "mean": lambda logprobs: logprobs.logsumexp(0) - math.log(len(logprobs)),
    "min": lambda logprobs: logprobs.min(),
}
"""What is taken of a completion's token probabilities, as its log."""


class LikelihoodScorer:
    """Rewards by a model's own likelihood; see `TokenLikelihood` for the arguments."""

    def __init__(
        self, *, model: str, adapter: str | None, of: str, append_eos: bool, **running: Unpack[RunningOptions]
    ) -> None:
        self.of, self.adapter, self.append_eos = OF[of], "own" if adapter else None, append_eos
        self.tally = Tally()
        self.model = LanguageModel(model, adapters={"own": adapter} if adapter else None, tally=self.tally, **running)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """log of the product, the mean or the least of the tokens' probabilities p(y_t | x, y_<t); see Scorer.score.

        Raises:
            RowError: a completion has no token.

        Source: soft self-consistency, arXiv:2402.13212; the log is ours and leaves the order as it is
        """
        self.tally.completions += len(prompts)
        found = self.model.token_logprobs(prompts, completions, append_eos=self.append_eos, adapter=self.adapter)
        if not all(map(len, found)):
            raise RowError("a completion without tokens has no likelihood; remove it")
        return [self.of(own).item() for own in found]
