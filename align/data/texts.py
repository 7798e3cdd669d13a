"""Prompts and completions as the exact text that is tokenised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.schema import TEMPLATE_OPTIONS, BadRow, Message, Row, is_messages, template_options
from align.errors import UserError
from align.files import is_there
from align.shipped import template_file
from rewards.dropped import refuse_lost, refuse_lost_tools
from rewards.rendering import Unrendered, bounded, rendered
from rewards.spelling import spelled
from rewards.templates import left_out, mended_prompt, start_text, without_second_ends

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_chat_template(path: str | None) -> str | None:
    """The text of a Jinja file; None where there is no path.

    Raises:
        UserError: no such file, not UTF-8, or nothing in it is Jinja.
    """
    if path is None:
        return None
    file = template_file(path)
    if not is_there(file, Path.is_file):
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


def check_options(
    options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> None:
    """Refuse what a recipe's `data.template_options` cannot set.

    Args:
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own.

    Raises:
        UserError: an argument of `apply_chat_template` itself, or a name that no part of the template has.

    Source: ours
    """
    if not options:
        return
    try:
        template_options(dict(options))
    except BadRow as error:
        name, remedy = str(error.field).removeprefix(TEMPLATE_OPTIONS), error.remedy.replace(" from the rows", "")
        raise UserError(f"data.template_options{name}: {error.problem}; {remedy}") from None
    if chat_template is None and tokenizer.chat_template is None:
        raise UserError("data.template_options: there is no chat template; set `policy.chat_template`, or leave it out")
    unread = Template(tokenizer, chat_template, options).unread()
    if unread:
        raise UserError(
            f"data.template_options.{unread[0]}: nothing in the chat template reads it; mend the name, or leave it out"
        )


def refusal(place: str, error: ValueError) -> UserError:
    """What the user is told of a row that the chat template does not take, with the error's own remedy or ours."""
    return UserError(f"{place}: {error}; {getattr(error, 'remedy', 'mend the row or `policy.chat_template`')}")


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
        return render_prompt(row.prompt, tokenizer, chat_template, row.template_arguments)  # type: ignore[arg-type]
    return str(tokenizer.decode(row.prompt))  # type: ignore[arg-type]


def prompt_left_out(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> list[str]:
    """What of a row's prompt the chat template leaves out, as `system content`; nothing of a text or of token ids.

    Raises:
        Dropped: the template drops what it must not.
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if not is_messages(row.prompt):
        return []
    template = Template(tokenizer, chat_template, row.template_arguments)
    prompt = template.mended(row.prompt)[0]  # type: ignore[arg-type]
    lost = left_out(prompt, template.before_answer(prompt), template.before_answer)
    refuse_lost(prompt, lost, ())
    refuse_lost_tools(template.options, lambda own: replace(template, options=own).before_answer(prompt))
    return sorted({f"{prompt[place]['role']} {key}" for place, key in lost})


def check_open(row: Row, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
    """Refuse a prompt that ends with a message of the assistant's which is over, so that no completion goes on in it.

    Raises:
        Finished: it calls a tool, or brings the token that ends its turn.
        ValueError: the template refuses the conversation.

    Source: ours
    """
    if not is_messages(row.prompt) or row.prompt[-1]["role"] != "assistant":  # type: ignore[index]
        return
    prompt: list[Message] = row.prompt  # type: ignore[assignment]
    if prompt[-1].get("tool_calls"):
        raise Finished("calls a tool", "end it with the tool's result")
    template = Template(tokenizer, chat_template, row.template_arguments)
    of_text = str(tokenizer.eos_token or "")
    if without_second_ends(prompt, [len(prompt) - 1], template.apply)[1] or (
        of_text and prompt[-1]["content"].rstrip().endswith(of_text)
    ):
        raise Finished("has the token that ends its turn", "end it with the user's message, or remove that token")


class Finished(ValueError):
    """Why the last message of a prompt is over; `remedy` says what to do about it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"the prompt ends with a message of the assistant's that is over, since it {why}")
        self.remedy = remedy


def render_prompt(
    prompt: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    options: Mapping[str, Any] | None = None,
    *,
    finished: bool = False,
) -> str:
    """A conversation up to where the completion begins: the assistant's turn, or the middle of it.

    Args:
        prompt: messages; where the last is the assistant's, a completion continues it.
        tokenizer: the policy's.
        chat_template: Jinja text that replaces the tokenizer's own template.
        options: what the row gives the template besides.
        finished: whether the last message is over, as a user's or a tool's follows.

    Returns:
        Text with its start token.

    Raises:
        ValueError: the template refuses the conversation.

    Source: ours
    """
    template = Template(tokenizer, chat_template, options or {})
    prompt = template.mended(prompt, finished=finished)[0]
    return template.apply(prompt) if finished else template.before_answer(prompt)


@dataclass(frozen=True)
class Template:
    """A chat template with what one row gives it."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    """Jinja text that replaces the tokenizer's own."""
    options: Mapping[str, Any]
    """The row's own, with its `tools`."""
    written: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What was written so far: conversations of a list begin alike, and each is rendered up to several places."""

    def apply(self, messages: list[Message], **flags: bool) -> str:
        """The messages as text.

        Raises:
            ValueError: the template refuses them, or writes what is no text.
        """
        key = repr((messages, flags))
        if key not in self.written:
            self.written[key] = self._apply(messages, **flags)
        return self.written[key]

    def _apply(self, messages: list[Message], **flags: bool) -> str:
        options: Any = {**self.options, **flags, "chat_template": self.chat_template}
        try:
            messages = spelled(messages, self.tokenizer, self.chat_template, self.options.get("tools"))
            text = rendered(self.tokenizer, messages, **options)
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the chat template writes half a character (a lone surrogate)") from None
        except Unrendered as error:
            raise ValueError(f"the chat template refuses the conversation ({error})") from None
        return text

    def before_answer(self, prompt: list[Message], *, joined: bool = True) -> str:
        """The prompt with the beginning of the assistant's turn, or, if `joined`, with its own last message open."""
        if joined and prompt[-1]["role"] == "assistant":
            return self.apply(prompt, continue_final_message=True)
        return self.apply(prompt, add_generation_prompt=True)

    def mended(self, prompt: list[Message], *, finished: bool = False) -> tuple[list[Message], bool, int]:
        """The prompt without what it brings and the template writes too.

        Args:
            finished: whether a last message of the assistant's is over, as a user's or a tool's follows.

        Returns:
            The messages, whether one start token was taken away, and from how many messages an end-of-turn token.
        """
        return mended_prompt(prompt, start_text(self.tokenizer), self.before_answer, self.apply, finished=finished)

    def marks(self, messages: list[Message]) -> list[tuple[int, int]] | None:
        """The characters that the template marks as generated; None where it has no `{% generation %}`."""
        template = self.tokenizer.get_chat_template(self.chat_template, self.options.get("tools"))
        if not GENERATION.search(template):
            return None
        options: Any = {**self.tokenizer.special_tokens_map, **self.options, "return_assistant_tokens_mask": True}
        with bounded():
            marks: Any = render_jinja_template([messages], chat_template=template, **options)[1]
        return list(marks[0])

    def unread(self) -> list[str]:
        """The options that no part of the template names."""
        if not self.options:
            return []
        text = str(self.tokenizer.get_chat_template(self.chat_template, self.options.get("tools")))
        return [name for name in self.options if name != "tools" and not re.search(rf"\b{re.escape(name)}\b", text)]
