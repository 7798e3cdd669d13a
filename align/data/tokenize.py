"""Rows become token ids: exact boundaries, one start and one end token, bounded lengths, everything counted."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from align.data.boundary import Overlong, fit, special_tokens, split_tokens, started
from align.data.contrast import CONTEXTS, Templates, contrast_contexts
from align.data.rendering import RENDERED, render, untouched
from align.data.schema import Row, is_messages, is_token_ids
from align.data.texts import prompt_text
from align.data.tokens_key import is_volatile, tokens_key
from align.errors import UserError
from align.progress import Advance, progress, stage

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
TOKEN_WEIGHTS = Features({"token_weights": List(List(Value("float32")))})
COUNTS = Features(
    {
        "position": Value("int64"),
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
CHUNK = 64
"""Texts per call of the tokenizer, whose own objects hold many times the memory of the ids."""


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[int]:
    """A row's prompt as token ids with its start token once, for sampling.

    Args:
        row: of any kind; token ids stay as they are.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.

    Returns:
        Token ids.

    Raises:
        UserError: the chat template refuses the row.

    Source: ours
    """
    if is_token_ids(row.prompt):
        return list(row.prompt)  # type: ignore[arg-type]
    try:
        text = prompt_text(row, tokenizer, chat_template)
    except ValueError as error:
        raise UserError(f"{row.place}: {error}; mend the row or `policy.chat_template`") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return started(ids, special_tokens(tokenizer), templated=not isinstance(row.prompt, str))[0]


def tokenize_rows(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    append_eos: bool | None,
    workers: int,
    contrast: Templates | None = None,
    token_weights: bool = False,
) -> Dataset:
    """The rows as token ids, with what was counted on the way; computed once and kept in datasets' cache.

    Args:
        rows: with grades.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.
        max_length: tokens of prompt plus completion at most.
        max_prompt_length: tokens of the prompt at most; a longer one loses its beginning, but not its start token.
        overlong: what happens to a completion beyond max_length.
        append_eos: whether each completion ends with an end token; None: as a scorer reads a text, which ends as the
            tokenizer or the chat template ends it.
        workers: processes.
        contrast: templates of the two contexts for token rewards, where those are wanted.
        token_weights: whether the rows' own weights of tokens are wanted; then every row must have them.

    Returns:
        One entry per row, in order, with COLUMNS, COUNTS and, where wanted, CONTEXTS and TOKEN_WEIGHTS; `refused` says
        why a row cannot be used, else it is "".

    Raises:
        UserError: no chat template for a conversation, one that refuses it, no end token, or token ids beyond the
            vocabulary.

    Source: ours
    """
    extra = {**(CONTEXTS if contrast else {}), **(TOKEN_WEIGHTS if token_weights else {})}
    features = Features({**COLUMNS, **COUNTS, **extra})
    if not rows:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    options = {
        "chat_template": chat_template,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "overlong": overlong,
        "append_eos": append_eos,
        "contrast": contrast,
    }
    with stage(f"checking {len(rows)} rows"):
        _check(rows, tokenizer, chat_template, append_eos)
        content = _content(rows)
        if token_weights:
            content["token_weights"] = [_weights_of(row) for row in rows]
    if is_volatile(tokenizer, chat_template):
        with stage(f"rendering {len(rows)} rows, as the chat template has a date in it"):
            content["rendered"] = [json.dumps(own) for own in _rendered(content, tokenizer, chat_template, append_eos)]
    key = tokens_key(content, tokenizer, options)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "align"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"tokens-{key}.arrow"
    if file.exists():  # `map` would find it too, but with all texts in memory
        return Dataset.from_file(str(file))
    alone = workers == 1  # several processes have datasets' own bar
    with progress("tokenising", len(rows), unit="rows", show=alone) as advance, _own_bars(off=alone):
        return Dataset.from_dict(content).map(
            _counted(advance) if alone else tokenize_batch,
            batched=True,
            batch_size=256,
            num_proc=None if alone else workers,
            remove_columns=["texts", "rendered"] if "rendered" in content else ["texts"],
            features=features,
            fn_kwargs={"tokenizer": tokenizer, **options},
            new_fingerprint=key,
            cache_file_name=str(file),
            load_from_cache_file=True,
            desc="tokenising",
        )


@contextmanager
def _own_bars(*, off: bool) -> Iterator[None]:
    """Datasets' bars, off inside if asked; afterwards as they were."""
    on = off and not datasets.are_progress_bars_disabled()
    if on:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if on:
            datasets.enable_progress_bars()


def _counted(advance: Advance) -> Callable[..., dict[str, list[Any]]]:
    """`tokenize_batch` that says how far it has come."""

    def tokenize(batch: dict[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
        columns = tokenize_batch(batch, **options)
        advance(len(batch["texts"]))
        return columns

    return tokenize


def tokenize_batch(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    append_eos: bool | None,
    contrast: Templates | None,
) -> dict[str, list[Any]]:
    """Columns of a batch of rows, from one call of the tokenizer; arguments as in `tokenize_rows`."""
    special = special_tokens(tokenizer)
    rows = [json.loads(texts) for texts in batch["texts"]]
    known = batch.get("rendered")
    rendered = [json.loads(own) for own in known] if known else _rendered(batch, tokenizer, chat_template, append_eos)
    encoded = iter(_encode_texts(rendered, tokenizer))
    names = (*COLUMNS, *COUNTS, *(CONTEXTS if contrast else ()))
    columns: dict[str, list[Any]] = {name: [] for name in names if name not in batch}
    columns |= {name: [] for name in ("grades", *TOKEN_WEIGHTS) if name in batch}
    weights = batch.get("token_weights") or [None] * len(rows)
    for (shown, prompt, completions, given), made, grades, own in zip(
        rows, rendered, batch["grades"], weights, strict=True
    ):
        if is_token_ids(prompt):
            split: dict[str, Any] = {"prompt_ids": prompt, "completion_ids": completions}
            split |= {"moved_tokens": 0, "dropped_tokens": 0, "eos_added": 0}
        else:
            split = split_tokens(
                [next(encoded) for _ in made["texts"]],
                special,
                templated=is_messages(prompt),
                append_eos=append_eos,
                continued=all(text.startswith(made["texts"][0]) for text in made["texts"]),
            )
        counts = {name: made[name] for name in RENDERED}
        counts["bos_stripped"] |= split.pop("bos_stripped", False)
        fitted = fit(
            split.pop("prompt_ids"),
            split.pop("completion_ids"),
            grades,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            overlong=overlong,
            special=special,
            token_weights=own,
        )
        if contrast:
            fitted |= contrast_contexts(
                shown,
                fitted["prompt_ids"],
                fitted["completion_ids"],
                moved_tokens=split["moved_tokens"] + split["dropped_tokens"],
                templates=contrast,
                tokenizer=tokenizer,
                chat_template=chat_template,
                special=special,
                options=given,
            )
        for name, value in {**split, **counts, **fitted}.items():
            columns[name].append(value)
    return columns


def _content(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {
        "id": [row.id for row in rows],
        "texts": [json.dumps([row.prompt, *_as_read(row), row.template_options], default=str) for row in rows],
        "grades": [list(row.grades or ()) for row in rows],
        "weight": [row.weight for row in rows],
        "source": [row.source for row in rows],
        "row": [row.number for row in rows],
        "position": list(range(len(rows))),
    }


def _weights_of(row: Row) -> tuple[tuple[float, ...], ...]:
    if row.token_weights is None:
        raise UserError(
            f"{row.place}, field token_weights: missing; `token_weights: {{name: column}}` needs one number per "
            "completion token in every row, and rows of token ids (`prompt_ids`, `completion_ids`)"
        )
    return row.token_weights


def _as_read(row: Row) -> tuple[Any, Any]:
    """Prompt and completions, as the token ids that were sampled where the row has them."""
    return (row.prompt, row.completions) if row.completion_ids is None else (row.prompt_ids, row.completion_ids)


def _rendered(
    content: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    append_eos: bool | None,
) -> list[dict[str, Any]]:
    """Of every row the texts to tokenise, with what is counted of them; none for a row of token ids."""
    special = special_tokens(tokenizer)
    rendered = []
    for row, source, number in zip(content["texts"], content["source"], content["row"], strict=True):
        _, prompt, completions, options = json.loads(row)
        if is_token_ids(prompt):
            rendered.append({"texts": [], **untouched()})
            continue
        own = {"options": options, "special": special, "append_eos": append_eos}
        try:
            rendered.append(render(prompt, completions, tokenizer, chat_template, **own))
        except ValueError as error:
            raise UserError(f"{source}, row {number}: {error}; mend the row or `policy.chat_template`") from None
    return rendered


def _encode_texts(rendered: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [text for own in rendered for text in own["texts"]]
    return [ids for start in range(0, len(texts), CHUNK) for ids in _token_ids(texts[start : start + CHUNK], tokenizer)]


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """As the tokenizer gives them, without the offsets that it finds too.

    Settings that another call left behind (truncation, padding, splitting of special tokens) are gone: `special_tokens`
    has called the tokenizer since.
    """
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [text.ids for text in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _check(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, append_eos: bool | None
) -> None:
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("data.append_eos: the tokenizer has no end-of-text token; set `data.append_eos: false`")
    vocabulary = len(tokenizer)
    for row in rows:
        prompt, completions = _as_read(row)
        if is_messages(prompt) and chat_template is None and tokenizer.chat_template is None:
            raise UserError(
                f"{row.place}, field prompt: a conversation, and the tokenizer has no chat template; "
                f"set `policy.chat_template: plain`"
            )
        if is_token_ids(prompt):
            largest = max(max(ids) for ids in (prompt, *completions))
            if largest >= vocabulary:
                raise UserError(
                    f"{row.place}, field prompt_ids: token id {largest} is beyond the vocabulary of {vocabulary}; "
                    f"use the policy's own tokenizer"
                )
