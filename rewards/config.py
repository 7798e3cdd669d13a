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
class TokenLikelihood(Running):
    """How probable a model finds a completion's tokens, which picks among its own samples without a vote."""

    scorer: ClassVar = "likelihood:LikelihoodScorer"
    name: Literal["likelihood"] = "likelihood"
    model: str
    """A local folder, or a hub name."""
    adapter: str | None = None
    """PEFT adapter of the model."""
    of: Literal["product", "mean", "min"] = "product"
    """Of the tokens' probabilities; the reward is its log, in nats, which no long completion takes to 0."""
    append_eos: bool = True
    """A plain-text completion includes the end token."""


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


class Asking(Strict):
    """What a generative judge is asked; the base of every judge's configuration."""

    mode: Literal["yes_no", "pairwise", "anchors", "scale", "checklist"] = "yes_no"
    """What is asked: whether an answer is good; which of two is better, in both orders; the same of an
    answer and each of its prompt's anchors, the reward being what the answer is worth beside them; where it stands from
    1 to 5, of which the reward is the expectation; or yes and no of every question of a checklist that the judge
    writes once for each prompt. Pairwise rewards compare the completions of one prompt, so they depend on the list."""
    question: str | None = None
    """What the judge reads; {prompt} and {completion}, or {first} and {second}, stand for the texts, and {check} for a
    question of the checklist. A rubric goes here."""
    verdicts: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """The favourable verdict (or the first answer's name), then the other; by default Yes and No, or A and B. Of a
    scale its words from the worst to the best, by default 1 to 5."""
    log_odds: bool = False
    """Give the log-odds of the favourable verdict in place of its probability; only for yes_no."""
    reasoning: Annotated[int, Field(ge=0)] = 0
    """Tokens that the judge may reason in before its verdict, whose probability is read behind that; 0 for none."""
    checklists: str | None = None
    """A file that keeps the checklists, a JSON object a line, for other jobs and for mending by hand."""
    checks: PositiveInt = 6
    """Questions of a checklist, at most."""
    anchors: str | None = None
    """A file of answers of known worth: for each prompt a line of JSON with `prompt`, `completions` and `rewards`. One
    that is worth 1 more than another is found better with probability 0.84 (Thurstone's case V)."""

    @property
    def listwise(self) -> bool:
        """Whether a reward depends on the other completions of its list."""
        return self.mode == "pairwise"

    @model_validator(mode="after")
    def _question_names_the_texts(self) -> "Asking":
        names = ["{prompt}", *(["{first}", "{second}"] if self.mode in ("pairwise", "anchors") else ["{completion}"])]
        names += ["{check}"] if self.mode == "checklist" else []
        missing = [name for name in names if self.question is not None and name not in self.question]
        if missing:
            raise ValueError(f"question: does not hold {', '.join(missing)}; the judge would not see that text")
        if self.mode != "yes_no" and self.log_odds:
            raise ValueError(f"log_odds: {self.mode} rewards are no probability of yes; remove it")
        if (self.mode == "anchors") != (self.anchors is not None):
            raise ValueError("anchors: `mode: anchors` and the file `anchors` go together; give both or none")
        if self.mode != "scale" and self.verdicts is not None and len(self.verdicts) != 2:
            raise ValueError(f"verdicts: {self.mode} has two, and these are {len(self.verdicts)}")
        return self


@SCORER.add
class Judge(Running, Asking):
    """A generative judge that runs here: a language model whose verdict's probability is the reward."""

    scorer: ClassVar = "judge:local_judge"
    name: Literal["judge"] = "judge"
    model: str
    """A local folder, or a hub name; a conversation goes through its chat template where it has one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@SCORER.add
class ServedJudge(Asking):
    """A generative judge behind an endpoint that speaks OpenAI's chat completions, as vLLM and others do.

    The verdict's probability is read from the reply's `top_logprobs`; an endpoint without them counts as certain.
    """

    scorer: ClassVar = "served_judge:served_judge"
    name: Literal["served_judge"] = "served_judge"
    url: Annotated[str, Field(pattern=r"^https?://")]
    """The server's address up to its version, such as http://localhost:8000/v1."""
    model: str
    """The name that the server knows the model by."""
    api_key: str | None = None
    """Name of the environment variable that holds the key; none is sent otherwise."""
    requests_at_once: PositiveInt = 8
    timeout: PositiveFloat = 300.0
    """Seconds to wait for one request."""


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
