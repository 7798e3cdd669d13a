"""Every scorer's configuration; the scorers are in the modules beside."""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from align.registry import Registry
from align.section import Strict
from rewards.types import Running

SCORER: Registry[Strict] = Registry("scorer")
"""Every class names its `scorer`: module and name, which takes the fields as keywords. Most need torch, so a scorer is
imported when it is used."""


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


@SCORER.add
class Length(Strict):
    """1 for a completion whose length is within bounds, else 0."""

    scorer: ClassVar = "rules:length_scorer"
    name: Literal["length"] = "length"
    unit: Literal["words", "characters"] = "words"
    min: NonNegativeInt = 0
    max: PositiveInt | None = None

    @model_validator(mode="after")
    def _bounds(self) -> "Length":
        if not self.min and self.max is None or self.max is not None and self.max < self.min:
            raise ValueError(
                f"length: from {self.min} to {self.max} bounds nothing; give `min`, a larger `max` or both"
            )
        return self


@SCORER.add
class Format(Strict):
    """1 for a completion of the given form, else 0."""

    scorer: ClassVar = "rules:format_scorer"
    name: Literal["format"] = "format"
    json_object: bool = False
    """The whole completion is one JSON object."""
    tags: tuple[str, ...] = ()
    """The whole completion is these tags in this order, each opened and closed once: <think>...</think> for `think`."""

    @model_validator(mode="after")
    def _one_form(self) -> "Format":
        if self.json_object == bool(self.tags):
            raise ValueError("format: give one of `json_object: true` and `tags`")
        return self


@SCORER.add
class Pattern(Strict):
    """1 for a completion that a regular expression matches, else 0."""

    scorer: ClassVar = "rules:pattern_scorer"
    name: Literal["regex"] = "regex"
    pattern: str
    """Python's syntax; `.` does not match line ends unless the pattern says (?s)."""
    whole: bool = False
    """It must match the whole completion, white space around it aside; by default a part is enough."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        return value


@SCORER.add
class Answer(Strict):
    """1 for a completion that gives the row's reference answer, else 0."""

    scorer: ClassVar = "rules:answer_scorer"
    name: Literal["answer"] = "answer"
    answer_column: str = "answer"
    """The column that holds the reference answer."""
    kind: Literal["exact", "numeric"] = "exact"
    """exact: the same text but for case, white space and a final point; numeric: the same number."""
    pattern: str | None = None
    """A regular expression whose first group is the completion's answer; by default the last \\boxed{...}, `#### ...`
    or "answer is ...", else the whole text (exact) or its last number (numeric)."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """By how much two numbers may differ, relative to the reference answer."""

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from None
        if not groups:
            raise ValueError(f"{value!r} has no group; put the answer's part in brackets")
        return value


@SCORER.add
class Function(Strict):
    """A function of yours: module:function, called with a prompt and a completion."""

    scorer: ClassVar = "rules:function_scorer"
    name: Literal["python"] = "python"
    function: str
    """Such as `my_rewards:politeness`, found from the current folder or among installed packages; gives a number."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError(f"{value!r} is not of the form module:function")
        return value


def _named(value: Any) -> Any:
    """A string names a sequence classifier, and so does a mapping without a name."""
    value = {"model": value} if isinstance(value, str) else value
    return {"name": "sequence_classifier", **value} if isinstance(value, dict) else value


if TYPE_CHECKING:

    class ScorerConfig(Strict):
        name: str

else:
    ScorerConfig = Annotated[SCORER.union(), BeforeValidator(_named)]
    """Any scorer's configuration, for use as a pydantic field; a string names a sequence classifier's folder."""
