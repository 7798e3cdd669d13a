"""The implicit reward of a policy against its reference, as DPO and its relatives define it."""

from collections.abc import Sequence
from typing import Unpack

from rewards.language_model import LanguageModel
from rewards.types import RunningOptions, Tally, Text


class ImplicitScorer:
    """Rewards by the log-ratio of two models; see `Implicit` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        adapter: str | None,
        reference: str | None,
        reference_adapter: str | None,
        beta: float,
        per_token: bool,
        append_eos: bool,
        **running: Unpack[RunningOptions],
    ) -> None:
        self.beta, self.per_token, self.append_eos = beta, per_token, append_eos
        self.tally = Tally()
        adapters = {"policy": adapter, "reference": reference_adapter}
        given = {name: place for name, place in adapters.items() if place is not None}
        if reference in (None, model):  # one copy of the weights
            self.policy = self.reference = LanguageModel(model, adapters=given, tally=self.tally, **running)
        else:
            own = [{name: place} if (place := given.get(name)) else None for name in adapters]
            self.policy = LanguageModel(model, adapters=own[0], tally=self.tally, **running)
            self.reference = LanguageModel(str(reference), adapters=own[1], tally=self.tally, **running)
        self.names = {name: name if name in given else None for name in adapters}

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """beta * sum_t (log policy(y_t) - log reference(y_t)) in nats, or its mean; see Scorer.score.

        Source: DPO, arXiv:2305.18290, eq. 5 without the term of the prompt alone
        """
        self.tally.completions += len(prompts)
        policy = self.policy.logprobs(prompts, completions, append_eos=self.append_eos, adapter=self.names["policy"])
        reference = self.reference.logprobs(
            prompts, completions, append_eos=self.append_eos, adapter=self.names["reference"]
        )
        return [
            self.beta * (own / max(size, 1) - other / max(other_size, 1) if self.per_token else own - other)
            for (own, size), (other, other_size) in zip(policy, reference, strict=True)
        ]
