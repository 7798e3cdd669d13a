"""Rows become token ids: exact boundaries, one start and one end token, bounded lengths, everything counted."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from align.data.schema import Row, is_messages, is_token_ids
from align.data.texts import PLAIN_TEMPLATE, prompt_text, render
from align.errors import UserError

Overlong = Literal["truncate", "drop_completion", "drop_list"]

COLUMNS = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(List(Value("int32"))),
        "grades": List(Value("float64")),
        "weight": Value("float64"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)
COUNTS = Features(
    {
        "position": Value("int64"),
        "refused": Value("string"),
        "prompt_tokens": Value("int64"),
        "completion_tokens": List(Value("int64")),
        "moved_tokens": Value("int64"),
        "bos_stripped": Value("bool"),
        "eos_added": Value("int64"),
        "prompt_cut": Value("bool"),
        "truncated": Value("int64"),
        "dropped": Value("int64"),
        "missing_eos": Value("int64"),
        "identical": Value("bool"),
    }
)
"""What is counted per row; gone from the data that the trainer gets."""


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer puts around a text."""

    prefix: tuple[int, ...]
    """The tokens before a plain text."""
    bos: int | None
    eos: int | None
    ends: frozenset[int]
    """Tokens that end a completion."""
    specials: tuple[str, ...]
    """Special tokens as text."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """What this tokenizer puts before a text, and which tokens can end one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items() if text.special}
    no_end = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    ends = frozenset({*added, *tokenizer.all_special_ids} - no_end)
    return Tokens(tuple(full[:start]), tokenizer.bos_token_id, tokenizer.eos_token_id, ends, tuple(added.values()))


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[int]:
    """A row's prompt as token ids with its start token once, for sampling.

    Args:
        row: of any kind; token ids stay as they are.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.

    Returns:
        Token ids.

    Source: ours
    """
    if is_token_ids(row.prompt):
        return list(row.prompt)  # type: ignore[arg-type]
    ids = tokenizer(prompt_text(row, tokenizer, chat_template), add_special_tokens=False)["input_ids"]
    return _started(ids, special_tokens(tokenizer), templated=not isinstance(row.prompt, str))[0]


def tokenize_rows(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    append_eos: bool,
    workers: int,
) -> Dataset:
    """The rows as token ids, with what was counted on the way; computed once and kept in datasets' cache.

    Args:
        rows: with grades.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.
        max_length: tokens of prompt plus completion at most.
        max_prompt_length: tokens of the prompt at most; a longer one loses its beginning, but not its start token.
        overlong: what happens to a completion beyond max_length.
        append_eos: whether each completion ends with an end token.
        workers: processes.

    Returns:
        One entry per row, in order, with COLUMNS and COUNTS; `refused` says why a row cannot be used, else it is "".

    Raises:
        UserError: no chat template for a conversation, one that refuses it, no end token, or token ids beyond the
            vocabulary.

    Source: ours
    """
    features = Features({**COLUMNS, **COUNTS})
    if not rows:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    _check(rows, tokenizer, chat_template, append_eos)
    options = {
        "chat_template": chat_template,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "overlong": overlong,
        "append_eos": append_eos,
    }
    content = {
        "id": [row.id for row in rows],
        "texts": [json.dumps([row.prompt, row.completions]) for row in rows],
        "grades": [list(row.grades or ()) for row in rows],
        "weight": [row.weight for row in rows],
        "source": [row.source for row in rows],
        "row": [row.number for row in rows],
        "position": list(range(len(rows))),
    }
    key = _fingerprint(content, tokenizer, options)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "align"
    folder.mkdir(parents=True, exist_ok=True)
    return Dataset.from_dict(content).map(
        tokenize_batch,
        batched=True,
        batch_size=256,
        num_proc=workers if workers > 1 else None,
        remove_columns=["texts"],
        features=features,
        fn_kwargs={"tokenizer": tokenizer, **options},
        new_fingerprint=key,
        cache_file_name=str(folder / f"tokens-{key}.arrow"),
        load_from_cache_file=True,
        desc="tokenising",
    )


def tokenize_batch(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    append_eos: bool,
) -> dict[str, list[Any]]:
    """Columns of a batch of rows, from one call of the tokenizer; arguments as in `tokenize_rows`."""
    special = special_tokens(tokenizer)
    rows = [json.loads(texts) for texts in batch["texts"]]
    encoded = iter(_encode_texts(rows, batch, tokenizer, chat_template, special))
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *COUNTS) if name not in batch}
    columns["grades"] = []
    for (prompt, completions), grades in zip(rows, batch["grades"], strict=True):
        if is_token_ids(prompt):
            split: dict[str, Any] = {"prompt_ids": prompt, "completion_ids": completions}
            split |= {"moved_tokens": 0, "bos_stripped": False, "eos_added": 0}
        else:
            texts = [next(encoded) for _ in range(1 + len(completions))]
            split = split_tokens(texts, special, templated=is_messages(prompt), append_eos=append_eos)
        fitted = fit(
            split.pop("prompt_ids"),
            split.pop("completion_ids"),
            grades,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            overlong=overlong,
            special=special,
        )
        for name, value in {**split, **fitted}.items():
            columns[name].append(value)
    return columns


def split_tokens(texts: list[list[int]], special: Tokens, *, templated: bool, append_eos: bool) -> dict[str, Any]:
    """A row's prompt and completions, cut where all of its token sequences still agree.

    Args:
        texts: token ids of the prompt, then of the prompt with each completion.
        special: the tokenizer's.
        templated: whether a chat template made the texts and so placed start and end tokens.
        append_eos: whether each completion ends with an end token.

    Returns:
        prompt_ids, completion_ids, and moved_tokens (of the prompt, now in the completions), bos_stripped, eos_added
        (end tokens that the template lacks).

    Source: ours
    """
    started = [_started(ids, special, templated) for ids in texts]
    prompt, *joint = [ids for ids, _ in started]
    ends = special.ends if templated else {special.eos}
    eos_added = 0
    boundary = common_prefix([prompt, *joint])
    completions = []
    for ids in joint:
        completion = ids[boundary:]
        if append_eos and (not completion or completion[-1] not in ends):
            completion = [*completion, special.eos]
            eos_added += templated
        completions.append(completion)
    return {
        "prompt_ids": prompt[:boundary],
        "completion_ids": completions,
        "moved_tokens": len(prompt) - boundary,
        "bos_stripped": any(stripped for _, stripped in started),
        "eos_added": eos_added,
    }


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading tokens all sequences share."""
    low, high = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def fit(
    prompt: list[int],
    completions: list[list[int]],
    grades: list[float],
    *,
    max_length: int,
    max_prompt_length: int | None,
    overlong: Overlong,
    special: Tokens,
) -> dict[str, Any]:
    """A row within its lengths, and what that cost.

    Args:
        prompt: token ids.
        completions: token ids, end token included.
        grades: one per completion.
        max_length: tokens of prompt plus completion at most.
        max_prompt_length: tokens of the prompt at most.
        overlong: truncate (the end token goes too), drop_completion or drop_list.
        special: the tokenizer's.

    Returns:
        prompt_ids, completion_ids, grades and the counts; `refused` is a reason where nothing is left.

    Source: ours
    """
    full_prompt = prompt
    if max_prompt_length is not None and len(prompt) > max_prompt_length:
        keep_bos = prompt[0] == special.bos and max_prompt_length > 1
        prompt = prompt[:keep_bos] + prompt[len(prompt) - max_prompt_length + keep_bos :]
    room = max_length - len(prompt)
    refused = ""
    if not prompt:
        refused = "no prompt token before the completions"
    elif room <= 0:
        refused = "prompt fills max_length"
    elif overlong == "drop_list" and any(len(ids) > room for ids in completions):
        refused = "a completion beyond max_length"
    long = [len(ids) > room for ids in completions]
    kept = [k for k, ids in enumerate(completions) if ids and not (long[k] and overlong == "drop_completion")]
    kept_ids = [] if refused else [completions[k][:room] for k in kept]
    return {
        "prompt_ids": prompt,
        "completion_ids": kept_ids,
        "grades": [] if refused else [grades[k] for k in kept],
        "refused": refused,
        "prompt_tokens": len(full_prompt),
        "completion_tokens": [len(ids) for ids in completions],
        "prompt_cut": len(prompt) < len(full_prompt),
        "truncated": 0 if refused else sum(long[k] for k in kept),
        "dropped": 0 if refused else len(completions) - len(kept),
        "missing_eos": sum(ids[-1] not in special.ends for ids in kept_ids),
        "identical": len(kept_ids) > 1 and all(ids == kept_ids[0] for ids in kept_ids),
    }


def _started(ids: list[int], special: Tokens, templated: bool) -> tuple[list[int], bool]:
    """The ids with their start token once, and whether the text had brought a second one."""
    if templated:
        doubled = special.bos is not None and ids[:2] == [special.bos, special.bos]
        return ids[doubled:], doubled
    if special.prefix and tuple(ids[: len(special.prefix)]) == special.prefix:
        return ids, True
    return [*special.prefix, *ids], False


def _encode_texts(
    rows: list[Any],
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    special: Tokens,
) -> list[list[int]]:
    texts = []
    for (prompt, completions), source, number in zip(rows, batch["source"], batch["row"], strict=True):
        if is_token_ids(prompt):
            continue
        try:
            texts += render(prompt, completions, tokenizer, chat_template, special.specials)
        except ValueError as error:
            raise UserError(f"{source}, row {number}: {error}; mend the row or `policy.chat_template`") from None
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _check(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, append_eos: bool
) -> None:
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("data.append_eos: the tokenizer has no end-of-text token; set `data.append_eos: false`")
    vocabulary = len(tokenizer)
    for row in rows:
        if is_messages(row.prompt) and chat_template is None and tokenizer.chat_template is None:
            raise UserError(
                f"{row.place}, field prompt: a conversation, and the tokenizer has no chat template; "
                f"set `policy.chat_template: {PLAIN_TEMPLATE}`"
            )
        if is_token_ids(row.prompt):
            largest = max(max(ids) for ids in (row.prompt, *row.completions))  # type: ignore[type-var]
            if largest >= vocabulary:  # type: ignore[operator]
                raise UserError(
                    f"{row.place}, field prompt_ids: token id {largest} is beyond the vocabulary of {vocabulary}; "
                    f"use the policy's own tokenizer"
                )


def _fingerprint(content: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """A digest of all that the token ids depend on, this module included."""
    code = [Path(module).read_text(encoding="utf-8") for module in (__file__, render.__code__.co_filename)]
    versions = [transformers.__version__, tokenizers.__version__]
    digest = hashlib.sha256()
    for part in (content, _tokenizer_state(tokenizer), options, code, versions):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:32]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    if not tokenizer.is_fast:
        return [Hasher.hash(tokenizer)]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # settings of the last call, not of the tokenizer
    return [state, tokenizer.special_tokens_map, tokenizer.chat_template]
