"""The configuration of every scorer that has a model, and of any; the scorers are in the modules beside.

Those without a model have their configuration there too: see `rewards.rules`.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from align.section import Named, Strict
from rewards.types import SCORER, Running


@SCORER.add
class SequenceClassifier(Running):
    """A reward model in one of the usual layouts: a linear head on a decoder or encoder, weights in safetensors."""

    scorer: ClassVar = "sequence_classifier:SequenceClassifierScorer"
    name: Literal["sequence_classifier"] = "sequence_classifier"
    model: str
    """A local folder, or a hub name: a whole model, or a PEFT adapter with its head."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    label: Annotated[int, Field(ge=0)] | str | None = None
    """Which output is the reward, by number or name; needed where the model has several, unless `weights` is given."""
    weights: dict[str, float] | None = None
    """Output name or number -> weight; the reward is then the weighted sum of these outputs."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "SequenceClassifier":
        if self.weights is not None and (self.label is not None or not self.weights):
            raise ValueError("`weights` names one output or more and takes the place of `label`; give one of the two")
        return self


@SCORER.add
class Implicit(Running):
    """beta * (log policy - log reference) of a completion; the two are models, or one model with different adapters."""

    scorer: ClassVar = "implicit:ImplicitScorer"
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


@SCORER.add
class DensityRatio(Running):
    """log strong - log weak of a completion, both told an instruction; each model has its own tokenizer."""

    scorer: ClassVar = "density_ratio:DensityRatioScorer"
    name: Literal["density_ratio"] = "density_ratio"
    strong: str
    """The better model, such as one trained on preferences: a local folder, or a hub name."""
    weak: str
    """The other, such as the model it was trained from."""
    instruction: str | None = None
    """What is asked of a good answer, before every prompt: a system message, or a paragraph before plain text."""
    per_token: bool = False
    """Divide by the number of the completion's tokens under the strong model's tokenizer."""
    append_eos: bool = True
    """A plain-text completion includes the end token."""


@SCORER.add
class Judge(Running):
    """A generative judge: asked about each completion, or about each two of a prompt's completions in both orders."""

    scorer: ClassVar = "judge:JudgeScorer"
    name: Literal["judge"] = "judge"
    model: str
    """A local folder, or a hub name; a conversation goes through its chat template where it has one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    mode: Literal["yes_no", "pairwise"] = "yes_no"
    """What is asked. Pairwise rewards compare the completions of one prompt, so they depend on the list."""
    question: str | None = None
    """What the judge reads; {prompt} and {completion}, or {first} and {second}, stand for the texts."""
    verdicts: tuple[str, str] | None = None
    """The favourable verdict (or the first answer's name), then the other; by default Yes and No, or A and B."""
    log_odds: bool = False
    """Give the log-odds of the favourable verdict in place of its probability; not for pairwise."""

    @property
    def listwise(self) -> bool:
        """Whether a reward depends on the other completions of its list."""
        return self.mode == "pairwise"

    @model_validator(mode="after")
    def _question_names_the_texts(self) -> "Judge":
        names = ("{prompt}", "{completion}") if self.mode == "yes_no" else ("{prompt}", "{first}", "{second}")
        missing = [name for name in names if self.question is not None and name not in self.question]
        if missing:
            raise ValueError(f"question: does not hold {', '.join(missing)}; the judge would not see that text")
        if self.mode == "pairwise" and self.log_odds:
            raise ValueError("log_odds: pairwise rewards are mean probabilities of winning; remove it")
        return self


@SCORER.add
class Relevance(Running):
    """Dot product of mean-pooled encoder states, times length and freedom from repetition."""

    scorer: ClassVar = "relevance:RelevanceScorer"
    name: Literal["relevance"] = "relevance"
    model: str
    """An encoder such as Contriever: a local folder, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    answer_column: str | None = None
    """The column that holds a reference answer to compare with; by default the prompt is compared with."""
    max_words: PositiveInt | None = None
    """Words of the longest answer that is wanted; needed with a reference answer."""
    words_per_unit: PositiveFloat = 100.0
    """A completion of so many words has length incentive 1."""

    @model_validator(mode="after")
    def _length_with_answer(self) -> "Relevance":
        if (self.answer_column is None) != (self.max_words is None):
            raise ValueError("relevance: `answer_column` and `max_words` go together; give both or none")
        return self


@SCORER.add
class Served(Strict):
    """A model of `vllm serve MODEL --runner pooling`, or any server with the same endpoints."""

    scorer: ClassVar = "served:ServedScorer"
    name: Literal["served"] = "served"
    url: Annotated[str, Field(pattern=r"^https?://")]
    """The server's address, such as http://localhost:8000."""
    model: str
    """The name that the server knows the model by."""
    endpoint: Literal["classify", "score"] = "classify"
    """classify: an output of a sequence classifier; score: the server's own relevance of completion to prompt."""
    label: Annotated[int, Field(ge=0)] = 0
    """Which output of a classifier is the reward."""
    activation: bool = False
    """Let the server apply its sigmoid or softmax; off: logits, as the model gives them here."""
    texts_per_request: PositiveInt = 64
    requests_at_once: PositiveInt = 4
    timeout: PositiveFloat = 300.0
    """Seconds to wait for one request."""


import rewards.rules  # noqa: E402, F401, whose classes come last where they are told in a row

if TYPE_CHECKING:

    class ScorerConfig(Strict):
        name: str

else:
    ScorerConfig = Annotated[SCORER.union(), Named("sequence_classifier", text_is="model")]
    """Any scorer's configuration, for use as a pydantic field; a string names a sequence classifier's folder."""
