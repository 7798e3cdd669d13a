"""The implicit reward of a policy against its reference, as DPO and its relatives define it."""

from collections.abc import Sequence
from typing import Literal, Unpack

from pydantic import PositiveFloat, model_validator

from rewards.language_model import LanguageModel
from rewards.types import Running, RunningOptions, Tally, Text


class Implicit(Running):
    """beta * (log policy - log reference) of a completion; the two are models, or one model with different adapters."""

    name: Literal["implicit"] = "implicit"
    model: str
    """The policy: a local folder, or a hub name."""
    adapter: str | None = None
    """PEFT adapter of the policy."""
    reference: str | None = None
    """The reference; by default the same model."""
    reference_adapter: str | None = None
    """PEFT adapter of the reference, such as the SFT adapter that the policy's started from."""
    beta: PositiveFloat = 1.0
    per_token: bool = False
    """Divide the log-ratio by the number of the completion's tokens."""
    append_eos: bool = True
    """A plain-text completion includes the end token, as in training."""

    @model_validator(mode="after")
    def _two_models(self) -> "Implicit":
        if self.reference in (None, self.model) and self.adapter == self.reference_adapter:
            raise ValueError("policy and reference are the same; give an `adapter`, or another `reference`")
        return self


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
