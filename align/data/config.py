"""The recipe's `data` section."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from align.data.paths import path_of
from align.data.where import parse_where
from align.lint import CheckName
from align.section import Fraction, Free, Strict


class SourceSection(Strict):
    """One set of rows."""

    path: str
    """A JSONL, JSON, CSV, TSV (.gz), Parquet or Arrow file, a folder of them (`save_to_disk`'s too), or the name of a
    hub data set."""
    split: str | None = None
    """Split of a hub data set, or of a folder or JSON file that holds several: a name there without shard number."""
    weight: PositiveFloat = 1.0
    """How often an epoch sees each row, on average: 2 sees all of them twice, 0.5 half of them."""
    revision: str | None = None
    """Revision of a hub data set."""
    config: str | None = None
    """Configuration of a hub data set that has several."""
    columns: dict[str, str] = {}
    """Our name of a column -> its place in the rows: `{prompt: question, chosen: answers.good}`, `answers[0].text`,
    `answers[].text`."""
    where: str | None = None
    """Read only rows for which this holds: `lang == 'en' and score > 3`; the others are counted as refused."""

    turns: bool = False
    """Read plain texts as turns: the prompt as a user's message, an answer as the assistant's, rendered by the chat
    template; without, they are texts that nothing is put around."""

    @field_validator("columns")
    @classmethod
    def _places(cls, value: dict[str, str]) -> dict[str, str]:
        for place in value.values():
            path_of(place)
        return value

    @field_validator("where")
    @classmethod
    def _condition(cls, value: str | None) -> str | None:
        if value is not None:
            parse_where(value)
        return value

    @property
    def reading(self) -> dict[str, Any]:
        """What `read_source` is told of it besides its path."""
        return {name: getattr(self, name) for name in ("split", "revision", "config", "columns", "where", "turns")}


class ChesSection(Strict):
    """Which lists are likely to lower the probability of their best completion, by CHES, and what happens to them."""

    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the training lists, those of the lowest length-normalised CHES; the paper keeps 0.05."""
    threshold: float | None = None
    """Or keep those whose score is at most this."""
    other_weight: Fraction = 0.0
    """What becomes of the others: 0 leaves them out, more is their share of the mixture against a kept list's 1."""

    @model_validator(mode="after")
    def _one_rule(self) -> "ChesSection":
        if (self.keep_fraction is None) == (self.threshold is None):
            raise ValueError("give `keep_fraction` or `threshold`, one of the two")
        return self


class DataSection(Strict):
    """What is trained on, and how it becomes tokens."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    """Training rows; a single `{path: ...}` in brackets is the usual case."""
    eval_sources: tuple[SourceSection, ...] = ()
    """Held-out rows; by default a share of the sources."""
    eval_fraction: Fraction = 0.1
    """Share of the prompts held out where there are no `eval_sources`."""
    grades: Literal["win_probability", "rank", "quantile", "raw"] = "win_probability"
    """How rewards, scores or ranks become grades."""
    select: Literal["all", "best_worst"] = "all"
    """Train on whole lists, or on each list's best and worst completion as a pair."""
    list_size: Annotated[int, Field(ge=2)] | None = None
    """At most this many completions of a list: the best, the worst and a random choice of the others."""
    max_length: PositiveInt = 1024
    """Tokens of prompt plus completion at most."""
    max_prompt_length: PositiveInt | None = None
    """Tokens of the prompt at most; a longer one loses its beginning."""
    overlong: Literal["truncate", "drop_completion", "drop_list"] = "truncate"
    """What happens to a completion beyond `max_length`; each case is counted."""
    append_eos: bool | None = None
    """End every completion with the end-of-text token so that the policy learns to stop; on by default. A reward model
    reads a text as it will be scored, without."""
    learn: Literal["assistant", "completion", "last"] = "assistant"
    """Of a completion of several messages, what is learnt: all that the assistant wrote in it, every token (as TRL
    does; then white space behind the last end token too), or the assistant's last message."""
    template_options: dict[str, Any] = {}
    """What every row gives the chat template, such as `{enable_thinking: false}`; a row's own `chat_template_kwargs`
    win. A key that the template does not read is refused."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out; a column that looks like a part of the preference and that no reader uses is refused."""
    stop_on: Annotated[tuple[CheckName, ...], Free()] = ()
    """Checks of the rows that stop the run, before training, where they find what they look for; see
    [Look at your data](look.md)."""
    limit: PositiveInt | None = None
    """Read only this many rows of each source."""
    ches: ChesSection | None = None
    """Leave out, or take less often, lists that are likely to lower the probability of their best completion."""
    workers: Annotated[PositiveInt, Free()] = 1
    """Processes that tokenise."""
    cache: Annotated[bool, Free()] = True
    """Keep what was read, counted and tokenised for the next start; off: it is gone when the command ends."""

    @field_validator("sources", "eval_sources", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)
