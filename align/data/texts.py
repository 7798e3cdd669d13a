"""Prompts and completions as the exact text that is tokenised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.data.schema import Message, Row, is_messages
from align.errors import UserError
from align.shipped import template_file
from rewards.templates import left_out, mended_prompt, start_text


def read_chat_template(path: str | None) -> str | None:
    """The text of a Jinja file; None where there is no path.

    Raises:
        UserError: no such file, not UTF-8, or nothing in it is Jinja.
    """
    if path is None:
        return None
    file = template_file(path)
    if not file.is_file():
        raise UserError(f"policy.chat_template: {path}: no such file; `plain` suits base models")
    try:
        template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"policy.chat_template: {path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    if "{" not in template:
        raise UserError(f"policy.chat_template: {path}: not a Jinja template; `plain` is one")
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
        return render_prompt(row.prompt, tokenizer, chat_template, row.template_options)  # type: ignore[arg-type]
    return str(tokenizer.decode(row.prompt))  # type: ignore[arg-type]


def prompt_left_out(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """What of a row's prompt the chat template leaves out, as `system content`; nothing of a text or of token ids.

    Raises:
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if not is_messages(row.prompt):
        return []
    template = Template(tokenizer, chat_template, row.template_options)
    prompt = template.mended(row.prompt)[0]  # type: ignore[arg-type]
    lost = left_out(prompt, template.before_answer(prompt), template.before_answer)
    return sorted({f"{prompt[place]['role']} {key}" for place, key in lost})


def render_prompt(
    prompt: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """A conversation up to where the completion begins: the assistant's turn, or the middle of it.

    Args:
        prompt: messages; where the last is the assistant's, a completion continues it.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.
        options: what the row gives the template besides.

    Returns:
        Text with its start token.

    Raises:
        ValueError: the template refuses the conversation.

    Source: ours
    """
    template = Template(tokenizer, chat_template, options or {})
    return template.before_answer(template.mended(prompt)[0])


@dataclass(frozen=True)
class Template:
    """A chat template with what one row gives it."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    """Jinja text that replaces the tokenizer's own."""
    options: Mapping[str, Any]

    def apply(self, messages: list[Message], **flags: bool) -> str:
        """The messages as text.

        Raises:
            ValueError: the template refuses them, or writes what is no text.
        """
        options: Any = {**self.options, **flags, "chat_template": self.chat_template, "tokenize": False}
        try:
            text = str(self.tokenizer.apply_chat_template(messages, **options))
            text.encode()
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation ({error})") from None
        except UnicodeEncodeError:
            raise ValueError("the chat template writes half a character (a lone surrogate)") from None
        return text

    def before_answer(self, prompt: list[Message]) -> str:
        """The prompt with the beginning of the assistant's turn, or with its last message open."""
        if prompt[-1]["role"] == "assistant":
            return self.apply(prompt, continue_final_message=True)
        return self.apply(prompt, add_generation_prompt=True)

    def mended(self, prompt: list[Message]) -> tuple[list[Message], bool, int]:
        """The prompt without what it brings and the template writes too.

        Returns:
            The messages, whether one start token was taken away, and from how many messages an end-of-turn token.
        """
        return mended_prompt(prompt, start_text(self.tokenizer), self.before_answer, self.apply)

    def unread(self) -> list[str]:
        """The options that no part of the template names."""
        if not self.options:
            return []
        text = str(self.tokenizer.get_chat_template(self.chat_template))
        return [name for name in self.options if not re.search(rf"\b{re.escape(name)}\b", text)]
