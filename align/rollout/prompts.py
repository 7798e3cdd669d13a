"""The prompts that are sampled, as rows and as token ids."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from align.data import Row, encode_prompt, read_chat_template, read_source
from align.data.boundary import special_tokens
from align.data.contrast import contrast_contexts
from align.data.formats import read_prompt
from align.data.one_form import one_form
from align.data.row_numbers import ABSENT
from align.data.schema import is_messages
from align.data.select import prompt_key
from align.data.texts import check_options, prompt_left_out, refusal
from align.errors import UserError
from align.model.load import load_tokenizer, model_folder, positions
from align.progress import counted, stage
from align.recipe import Recipe
from align.rollout.config import Contrast, DecodingConfig, TransferQ


@dataclass(frozen=True)
class PromptSet:
    """Different prompts, and what turns completions of them into text."""

    rows: list[Row]
    """Without completions, with their source's weight; no two have the same id."""
    ids: list[list[int]]
    """Token ids of each row's prompt, start token included."""
    left_out: dict[str, int]
    """Rows that are not among them, by reason."""
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    """Tokens that end a completion."""
    text_left_out: dict[str, int] = field(default_factory=dict)
    """Prompts of which the chat template left text out, by the message's role and key."""
    contexts: list[Any] | None = None
    """What `rollout.decoding` needs to know of each prompt."""

    def choose(self, places: list[int]) -> "PromptSet":
        """Some of the prompts."""
        contexts = None if self.contexts is None else [self.contexts[i] for i in places]
        return replace(self, rows=[self.rows[i] for i in places], ids=[self.ids[i] for i in places], contexts=contexts)


@stage("reading the prompts")
def read_prompts(recipe: Recipe) -> PromptSet:
    """The prompts of `data.sources`, each once, as many as leave room for a completion.

    Raises:
        UserError: a source cannot be read, or no prompt is left.
    """
    policy, data = recipe.policy, recipe.data
    code = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    tokenizer = load_tokenizer(policy.model, chat_template=policy.chat_template, **code)  # type: ignore[arg-type]
    template = read_chat_template(policy.chat_template)
    check_options(data.template_options, tokenizer, template)
    table, _ = positions(policy.model, **code)  # type: ignore[arg-type]
    if table is not None and data.max_length > table:
        raise UserError(
            f"data.max_length {data.max_length} is beyond the {table} positions of {policy.model}; lower it"
        )
    longest = min(data.max_prompt_length or data.max_length, data.max_length - recipe.rollout.max_tokens)
    if longest < 1:
        raise UserError(
            f"rollout.max_tokens: {recipe.rollout.max_tokens} leaves no room in data.max_length {data.max_length}"
        )
    left_out: Counter[str] = Counter()
    without: Counter[str] = Counter()
    chosen: dict[str, tuple[Row, list[int], Any]] = {}
    for source in data.sources:
        found = read_source(
            source.path,
            **source.reading,
            limit=data.limit,
            ignore=data.ignore,
            read_one=read_prompt,
        )
        left_out.update(found.refused)
        for row in one_form(found.rows, turns=source.turns):
            if row.loss_weight == 0:
                left_out[ABSENT] += 1
                continue
            ids = encode_prompt(row, tokenizer, template)
            if prompt_key(ids) in chosen:
                left_out["prompt seen before"] += 1
                continue
            if len(ids) > longest:
                left_out[f"prompt of more than {longest} tokens"] += 1
                continue
            context = decoding_context(recipe.rollout.decoding, row, ids, tokenizer, template)
            if isinstance(recipe.rollout.decoding, Contrast) and len(context) > longest:
                left_out[f"prompt that rollout.decoding makes longer than {longest} tokens"] += 1
                continue
            without.update(_left_out(row, tokenizer, template))
            chosen[prompt_key(ids)] = replace(row, weight=source.weight), ids, context
    if not chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"data.sources: no prompt is left ({reasons}); raise data.max_length or give other prompts")
    ends = end_tokens(model_folder(policy.model, **code), tokenizer)  # type: ignore[arg-type]
    return PromptSet(
        rows=_own_ids([row for row, _, _ in chosen.values()]),
        ids=[ids for _, ids, _ in chosen.values()],
        left_out=dict(left_out),
        text_left_out=dict(without),
        tokenizer=tokenizer,
        ends=ends,
        contexts=[context for _, _, context in chosen.values()] if recipe.rollout.decoding else None,
    )


def _left_out(row: Row, tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    try:
        return prompt_left_out(row, tokenizer, template)
    except ValueError as error:
        raise refusal(row.place, error) from None


def decoding_context(
    decoding: DecodingConfig | None,
    row: Row,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
) -> Any:
    """What the engine's decoding needs to know of a prompt: for a contrast the tokens that it is held against, for
    rewards the prompt as scorers read it."""
    if decoding is None:
        return None
    if isinstance(decoding, TransferQ):
        if row.tools:
            raise UserError(
                f"{row.place}, field tools: the reward of `rollout.decoding: transfer_q` does not see them; decode "
                "otherwise, or leave them out with data.ignore=[tools]"
            )
        return row.prompt if is_messages(row.prompt) or isinstance(row.prompt, str) else str(tokenizer.decode(ids))
    if decoding.against != "prompt":
        return ids
    contexts = contrast_contexts(
        row.prompt,
        ids,
        [[]],
        moved_tokens=0,
        templates={"worse": decoding.worse},
        tokenizer=tokenizer,
        chat_template=chat_template,
        special=special_tokens(tokenizer),
        options=row.template_arguments,
    )
    return contexts["worse_ids"][0]


def describe_prompts(prompts: PromptSet) -> str:
    """How many prompts there are, why others are left out, and what the chat template leaves out of them."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in prompts.left_out.items())
    texts = [
        f"; {counted(count, 'prompt')} of which the chat template left text out ({name})"
        for name, count in prompts.text_left_out.items()
    ]
    return counted(len(prompts.rows), "prompt") + (f"; left out: {reasons}" if reasons else "") + "".join(texts)


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation configuration."""
    configured = None
    if (folder / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
    many = configured if isinstance(configured, list) else [configured]
    return tuple(end for end in dict.fromkeys([tokenizer.eos_token_id, *many]) if end is not None)


def _own_ids(rows: list[Row]) -> list[Row]:
    """Rows of several sources may share an id; then it is made of source and number."""
    seen: set[str] = set()
    own = []
    for row in rows:
        name = row.id if row.id not in seen else f"{row.source}:{row.number}"
        seen.add(name)
        own.append(replace(row, id=name))
    return own
