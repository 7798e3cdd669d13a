"""Prompts and completions as the exact text that is tokenised."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.data.schema import Message, Row, Text, is_messages
from align.errors import UserError

PLAIN_TEMPLATE = "recipes/templates/plain.jinja"


def read_chat_template(path: str | None) -> str | None:
    """The text of a Jinja file; None where there is no path.

    Raises:
        UserError: no such file, not UTF-8, or nothing in it is Jinja.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"policy.chat_template: {path}: no such file; {PLAIN_TEMPLATE} suits base models")
    try:
        template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"policy.chat_template: {path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    if "{" not in template:
        raise UserError(f"policy.chat_template: {path}: not a Jinja template; {PLAIN_TEMPLATE} shows one")
    return template


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str:
    """A row's prompt as the policy reads it, up to where the completion begins.

    Args:
        row: of any kind; token ids are decoded.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template; plain text prompts need none.

    Returns:
        Text; a templated one holds its start token already, so tokenise it with `encode_prompt`.

    Source: ours
    """
    if isinstance(row.prompt, str):
        return row.prompt
    if is_messages(row.prompt):
        return render_prompt(row.prompt, tokenizer, chat_template)  # type: ignore[arg-type]
    return str(tokenizer.decode(row.prompt))  # type: ignore[arg-type]


def render(
    prompt: str | list[Message],
    completions: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    special_tokens: Sequence[str],
) -> list[str]:
    """The prompt, then the prompt with each completion.

    Args:
        prompt: text, or messages; where the last message is the assistant's, completions continue it.
        completions: texts, or lists of one assistant message, like the prompt.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.
        special_tokens: white space after one of these at a conversation's end is left out, so that the
            completion ends with its end-of-turn token.

    Returns:
        1 + K texts.

    Raises:
        ValueError: the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return [prompt, *(prompt + str(completion) for completion in completions)]
    texts = [render_prompt(prompt, tokenizer, chat_template)]
    for completion in completions:
        text = _apply(_with_answer(prompt, completion[0]["content"]), tokenizer, chat_template)  # type: ignore[index]
        stripped = text.rstrip()
        texts.append(stripped if stripped.endswith(tuple(special_tokens)) else text)
    return texts


def render_prompt(prompt: list[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """A conversation up to where the completion begins: the assistant's turn, or the middle of it.

    Args:
        prompt: messages; where the last is the assistant's, a completion continues it.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Returns:
        Text with its start token.

    Raises:
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if prompt[-1]["role"] == "assistant":
        return _apply(prompt, tokenizer, chat_template, continue_final_message=True)
    return _apply(prompt, tokenizer, chat_template, add_generation_prompt=True)


def _with_answer(prompt: list[Message], answer: str) -> list[Message]:
    if prompt[-1]["role"] != "assistant":
        return [*prompt, {"role": "assistant", "content": answer}]
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + answer}]


def _apply(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, **options: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **options)  # type: ignore[arg-type]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from None
    return str(text)
