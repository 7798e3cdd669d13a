"""Rows become token ids: exact boundaries, one start and one end token, bounded lengths, everything counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Overlong, Tokens, fit, special_tokens, split_tokens, started
from align.data.contrast import CONTEXTS, Templates, contrast_contexts
from align.data.encoding import Encode, encoder
from align.data.in_order import in_order
from align.data.learnt import (
    LEARN_AT,
    TOKEN_WEIGHTS,
    ended_by_context,
    learnt_tokens,
    weighed_by_message,
    without_idle_mask,
)
from align.data.rendering import RENDERED, render, untouched
from align.data.row_store import IDS, MESSAGES, UNWEIGHTED, WEIGHED, StoredRows, as_read, stored
from align.data.schema import Row, is_messages, is_token_ids
from align.data.texts import check_open, prompt_text, refusal
from align.data.turns import Learn
from align.disk import check_fits
from align.errors import UserError
from align.progress import progress

COLUMNS = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(List(Value("int32"))),
        "grades": List(Value("float64")),
        "kept": List(Value("int64")),
        "weight": Value("float64"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)
COUNTS = Features(
    {
        "refused": Value("string"),
        "prompt_tokens": Value("int64"),
        "completion_tokens": List(Value("int64")),
        "moved_tokens": Value("int64"),
        "dropped_tokens": Value("int64"),
        "eos_added": Value("int64"),
        "prompt_cut": Value("bool"),
        "truncated": Value("int64"),
        "dropped": Value("int64"),
        "missing_eos": Value("int64"),
        "identical": Value("bool"),
        "identical_uncut": Value("bool"),
        **RENDERED,
    }
)
"""What is counted per row; gone from the data that the trainer gets."""
NUMBERS = Features({"loss_weight": Value("float64"), "margin": Value("float64")})
"""The rows' own; gone where no row has any."""
WINDOW = 256
"""Rows that are tokenised and written together."""


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[int]:
    """A row's prompt as token ids with its start token once, for sampling.

    Args:
        row: of any kind; token ids stay as they are.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.

    Returns:
        Token ids.

    Raises:
        UserError: the chat template refuses the row, or its last message is the assistant's and over.

    Source: ours
    """
    if is_token_ids(row.prompt):
        return list(row.prompt)  # type: ignore[arg-type]
    try:
        check_open(row, tokenizer, chat_template)
        text = prompt_text(row, tokenizer, chat_template)
    except ValueError as error:
        raise refusal(row.place, error) from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return started(ids, special_tokens(tokenizer), templated=not isinstance(row.prompt, str))[0]


@dataclass(frozen=True)
class Reading:
    """How rows become token ids; what was computed is kept under a digest of it."""

    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's own."""
    max_length: int = 1024
    """Tokens of prompt plus completion at most."""
    max_prompt_length: int | None = None
    """Tokens of the prompt at most; a longer one loses its beginning, but not its start token."""
    overlong: Overlong = "truncate"
    """What happens to a completion beyond max_length."""
    append_eos: bool | None = True
    """Whether each completion ends with an end token; None: as a scorer reads a text, which ends as the tokenizer or
    the chat template ends it."""
    contrast: Templates | None = None
    """Templates of the two contexts for token rewards, where those are wanted."""
    learn: Learn = "assistant"
    """Which messages of a completion of several are learnt; see `DataSection`."""

    @property
    def learns_messages(self) -> bool:
        """Whether a token is learnt if a message is: not where a text is scored, or every token learnt."""
        return self.append_eos is not None and self.learn != "completion"


def tokenize_rows(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    workers: int = 1,
    token_weights: bool = False,
    file: Path | None = None,
) -> Dataset:
    """The rows as token ids, with what was counted on the way, window after window into a file that is memory-mapped.

    Args:
        rows: with grades; those that are not on disk are put there.
        tokenizer: the policy's.
        workers: processes.
        token_weights: whether the rows' own weights of tokens are wanted; then every row must have them.
        file: to write; without one it is of this process alone.

    Returns:
        One entry per row, in order, with COLUMNS, COUNTS and, where wanted, CONTEXTS and TOKEN_WEIGHTS; `refused` says
        why a row cannot be used, else it is "". LEARN_AT is there where some token of a completion is not learnt, and
        TOKEN_WEIGHTS, one number per learnt token, where some message weighs neither 0 nor 1.

    Raises:
        UserError: no chat template for a conversation, one that refuses it, no end token, or token ids beyond the
            vocabulary.

    Source: ours
    """
    if not isinstance(rows, StoredRows) or file is None:
        with TemporaryDirectory() as folder:
            own = rows if isinstance(rows, StoredRows) else stored(rows, Path(folder))
            options: dict[str, Any] = {"tokenizer": tokenizer, "reading": reading, "token_weights": token_weights}
            return tokenize_rows(own, **options, workers=workers, file=file or Path(folder, "tokens.arrow"))
    weighed = rows.with_traits(WEIGHED) if reading.learns_messages else ()
    masked, weighted = weighed_by_message(weighed)
    extra = {
        **(CONTEXTS if reading.contrast else {}),
        **(TOKEN_WEIGHTS if token_weights or weighted else {}),
        **(LEARN_AT if masked else {}),
    }
    schema = Features({**COLUMNS, **COUNTS, **extra, **NUMBERS}).arrow_schema
    if len(rows):
        _check(rows, tokenizer, reading.chat_template, reading.append_eos)
    for row in rows.with_traits(UNWEIGHTED) if token_weights else ():
        _weights_of(row)
    given: dict[str, Any] = {"tokenizer": tokenizer, "encode": encoder(tokenizer), "reading": reading}
    tokenize = partial(tokenize_batch, **given, masked=masked, weighted=weighted, own_weights=token_weights)
    windows = (rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW))
    with (
        progress("tokenising", len(rows), unit="rows", show=len(rows) > 0) as advance,
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for number, columns in enumerate(in_order(tokenize, map(list, windows), workers)):
            writer.write_batch(_batch(columns, schema))
            if number == 0:
                _check_room(file, sink.tell(), len(columns["id"]) / len(rows))
            advance(len(columns["id"]))
    return without_idle_mask(Dataset.from_file(str(file)))


def _batch(columns: dict[str, list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(columns[own.name], own.type) for own in schema], schema=schema)


def _check_room(file: Path, written: int, share: float) -> None:
    """Refuse token ids that a disk cannot hold, when a share of the rows is written."""
    remedy = "set HF_DATASETS_CACHE to a folder of another disk"
    check_fits(file, written / share, "the token ids", remedy, held=written)


def tokenize_batch(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode,
    reading: Reading,
    masked: bool = False,
    weighted: bool = False,
    own_weights: bool = False,
) -> dict[str, list[Any]]:
    """Columns of a window of rows.

    Args:
        encode: the tokenizer's `encoder`.
        masked: whether they say which tokens are learnt.
        weighted: and by how much.
        own_weights: whether the rows' own weights of tokens are wanted.
    """
    special = special_tokens(tokenizer)
    rendered = [_rendered(row, tokenizer, special, reading) for row in rows]
    encoded = iter(encode([text for own in rendered for text in own["texts"]]))
    columns: dict[str, list[Any]] = {name: [] for name in (*COUNTS, *COLUMNS)}
    columns |= {name: [] for name in (CONTEXTS if reading.contrast else ())} | _content(rows)
    columns |= {name: [] for name in ("grades", *(TOKEN_WEIGHTS if own_weights else ()))}
    columns |= {name: [] for name in (*LEARN_AT, *(TOKEN_WEIGHTS if weighted else ())) if masked}
    for row, made in zip(rows, rendered, strict=True):
        prompt, completions = as_read(row)
        ids = [next(encoded) for _ in made["texts"]]
        split = _split(prompt, list(completions), made, ids, special, reading)
        counts = {name: made[name] for name in RENDERED}
        counts["bos_stripped"] |= split.pop("bos_stripped", False)
        by_token: dict[str, Any] = {"token_weights": _weights_of(row) if own_weights else None}
        merged = 0
        if masked:
            masks, merged = learnt_tokens(made, ids, split, special, encode, weighted=weighted)
            by_token |= masks
        fitted = fit(
            split.pop("prompt_ids"),
            split.pop("completion_ids"),
            list(row.grades or ()),
            max_length=reading.max_length,
            max_prompt_length=reading.max_prompt_length,
            overlong=reading.overlong,
            special=special,
            **by_token,
        )
        fitted["missing_eos"] -= ended_by_context(made["closed"], fitted, special)
        if reading.contrast:
            fitted |= contrast_contexts(
                row.prompt,
                fitted["prompt_ids"],
                fitted["completion_ids"],
                moved_tokens=split["moved_tokens"] + split["dropped_tokens"],
                templates=reading.contrast,
                tokenizer=tokenizer,
                chat_template=reading.chat_template,
                special=special,
                options=row.template_arguments,
                finished=is_messages(prompt) and all(own[0]["role"] != "assistant" for own in completions),
            )
        split["moved_tokens"] += merged
        for name, value in {**split, **counts, **fitted}.items():
            columns[name].append(value)
    return columns


def _split(
    prompt: Any, completions: Any, made: dict[str, Any], ids: list[list[int]], special: Tokens, reading: Reading
) -> dict[str, Any]:
    """Prompt and completions as token ids: as they were given, or cut where the tokens of the texts part."""
    if is_token_ids(prompt):
        nothing = {"moved_tokens": 0, "dropped_tokens": 0, "eos_added": 0}
        return {"prompt_ids": prompt, "completion_ids": completions, **nothing}
    before, *texts = made["texts"]
    return split_tokens(
        ids,
        special,
        templated=is_messages(prompt),
        append_eos=reading.append_eos,
        continued=all(text.startswith(before) for text in texts),
        closed=made["closed"],
    )


def _content(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {
        "id": [row.id for row in rows],
        "weight": [row.weight for row in rows],
        "source": [row.source for row in rows],
        "row": [row.number for row in rows],
        "loss_weight": [row.loss_weight for row in rows],
        "margin": [row.margin or 0.0 for row in rows],
    }


def _weights_of(row: Row) -> list[list[float]]:
    if row.token_weights is None:
        raise UserError(
            f"{row.place}, field token_weights: missing; `token_weights: {{name: column}}` needs one number per "
            "completion token in every row, and rows of token ids (`prompt_ids`, `completion_ids`)"
        )
    return [*map(list, row.token_weights)]


def _rendered(row: Row, tokenizer: PreTrainedTokenizerBase, special: Tokens, reading: Reading) -> dict[str, Any]:
    """The texts to tokenise, with what is counted of them; none for a row of token ids."""
    prompt, completions = as_read(row)
    if is_token_ids(prompt):
        return {"texts": [], "closed": [False] * len(completions), "spans": None, **untouched()}
    own: dict[str, Any] = {"special": special, "append_eos": reading.append_eos, "learn": reading.learn}
    try:
        return render(
            prompt, list(completions), tokenizer, reading.chat_template, options=row.template_arguments, **own
        )
    except ValueError as error:
        raise refusal(row.place, error) from None


def _check(
    rows: StoredRows, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, append_eos: bool | None
) -> None:
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("data.append_eos: the tokenizer has no end-of-text token; set `data.append_eos: false`")
    no_template = chat_template is None and tokenizer.chat_template is None
    vocabulary = len(tokenizer)
    for row in rows.with_traits(IDS | (MESSAGES if no_template else 0)):
        prompt, completions = as_read(row)
        if is_messages(prompt):
            raise UserError(
                f"{row.place}, field prompt: a conversation, and the tokenizer has no chat template; "
                f"set `policy.chat_template: plain` (without a recipe --chat-template plain)"
            )
        largest = max(max(ids) for ids in (prompt, *completions))
        if largest >= vocabulary:
            raise UserError(
                f"{row.place}, field prompt_ids: token id {largest} is beyond the vocabulary of {vocabulary}; "
                f"use the policy's own tokenizer"
            )
