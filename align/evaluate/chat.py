"""`align chat`: the same prompt to a run's policy and to what it was before training, beside each other."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.live import Live
from rich.text import Text

from align.data.schema import Row
from align.data.tokenize import encode_prompt
from align.errors import UserError
from align.evaluate.in_options import in_options
from align.evaluate.rows import load_any
from align.evaluate.sampling import sample_completions
from align.model.policy import Policy
from align.progress import stage
from align.runs.run_directory import RunDirectory
from align.tables import Table

Show = Callable[[str], None]
"""Told the text so far."""
OPTIONS = ("max_tokens", "temperature", "top_k", "top_p")
DEFAULTS = {"max_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""How a model that is no run samples."""
COMMANDS = "/reset forgets the conversation, /quit ends"


@dataclass
class Side:
    """One of the models, and its own conversation: each goes on from its own answers."""

    name: str
    model: Callable[[], Any]
    """A context that gives the model in the state that this side speaks from."""
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """Who is asked, and how."""

    policy: Policy
    sides: list[Side]
    chat_template: bool
    """Whether prompts are messages under the tokenizer's template; otherwise texts that are continued."""
    system: str | None
    sampling: dict[str, Any]
    """Options of `sample_completions`."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """What the run's rows gave the chat template."""

    def reset(self) -> None:
        """Forget what was said."""
        for side in self.sides:
            side.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, side: Side, prompt: str, show: Show = lambda text: None) -> str:
        """A side's answer, which joins its conversation.

        Raises:
            UserError: the conversation is too long for the model, or its template refuses it.
        """
        messages = [*side.messages, {"role": "user", "content": prompt}]
        ids = self._encode(messages if self.chat_template else prompt)
        with side.model() as model:
            ((answer,),) = sample_completions(
                model, self.policy.tokenizer, [ids], **self.sampling, watch=lambda text: show(text[0])
            )
        side.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _encode(self, prompt: Any) -> list[int]:
        row = Row("chat", prompt, (), None, None, {}, "chat", 1, template_options=self.template_options)
        try:
            ids = encode_prompt(row, self.policy.tokenizer)
        except ValueError as error:
            raise UserError(str(error)) from None
        limit = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) + self.sampling["max_tokens"] > limit:
            raise UserError(
                f"{len(ids)} tokens and an answer of {self.sampling['max_tokens']} are more than the model's {limit}; "
                "/reset, a shorter prompt or a smaller --max-tokens leaves room"
            )
        return ids


def chat(
    model: str,
    *,
    prompts: Sequence[str] = (),
    system: str | None = None,
    plain: bool = False,
    chat_template: str | None = None,
    seed: int | None = None,
    as_json: bool = False,
    trust_remote_code: bool = False,
    console: Console | None = None,
    **sampling: Any,
) -> list[dict[str, str]]:
    """Answer prompts by a run's policy and its reference, with the same seed; of a plain model by that alone.

    Prompts that are given, or piped to the standard input, one a line, are answered each by itself. Typed ones go on
    with the conversation, in which each side remembers its own answers.

    Args:
        model: a run directory, an adapter's folder, a model's folder or a hub name.
        system: a system message before every conversation.
        plain: continue the prompt's text, although the tokenizer has a chat template.
        chat_template: a Jinja file in place of the run's.
        seed: of the sampling; by default the run's.
        as_json: a JSON object per prompt, with `prompt` and an answer under each side's name.
        trust_remote_code: run the code that the model comes with.
        sampling: `max_tokens`, `temperature`, `top_k`, `top_p`; what is None is as in the run's `sampling`.

    Returns:
        The prompts with their answers.

    Raises:
        UserError: the model cannot be loaded, or a prompt does not fit it.
    """
    console = console or Console()
    options: dict[str, Any] = {"chat_template": chat_template, "seed": seed, "sampling": sampling}
    opened = open_chat(model, system=system, plain=plain, trust_remote_code=trust_remote_code, **options)
    if not prompts and sys.stdin.isatty():
        return list(_typed(opened, model, console))
    given = prompts or (line.strip() for line in sys.stdin)
    answered = []
    for prompt in filter(None, given):
        opened.reset()
        answered.append(_answer(opened, prompt, None if as_json else console))
        if as_json:
            print(json.dumps(answered[-1], ensure_ascii=False), flush=True)
    if not answered:
        raise UserError("no prompt: there is no text in it; give --prompt TEXT, pipe some in, or type in a terminal")
    return answered


def open_chat(
    model: str,
    *,
    system: str | None,
    plain: bool,
    chat_template: str | None,
    seed: int | None,
    sampling: dict[str, Any],
    trust_remote_code: bool = False,
) -> Chat:
    """Load what answers; arguments as for `chat`."""
    with in_options():
        policy, _ = load_any(model, chat_template, trust_remote_code=trust_remote_code)
    own, own_seed = _sampling_of(Path(model))
    options = own | {name: value for name, value in sampling.items() if value is not None}
    templated = not plain and bool(policy.tokenizer.chat_template)
    if system and not templated:
        raise UserError("--system: without a chat template a prompt is a text that is continued; leave it out")
    options |= {"seed": own_seed if seed is None else seed}
    is_run = (Path(model) / "recipe.yaml").exists()
    given = RunDirectory(Path(model)).read_recipe().data.template_options if is_run else {}
    opened = Chat(policy, sides(policy, is_run=is_run), templated, system, options, given)
    opened.reset()
    return opened


def _sampling_of(folder: Path) -> tuple[dict[str, Any], int]:
    """How a run samples its held-out prompts, and its seed."""
    if not (folder / "recipe.yaml").exists():
        return DEFAULTS, 0
    recipe = RunDirectory(folder).read_recipe()
    return recipe.sampling.model_dump(include=set(OPTIONS)), recipe.train.seed


def sides(policy: Policy, *, is_run: bool) -> list[Side]:
    """What answers: a run's or an adapter's policy with what it was before, or a model alone."""
    after = Side("after", lambda: _as_it_is(policy))
    if is_run:
        return [Side("before", lambda: _reference(policy)), after]
    if isinstance(policy.model, PeftModel):  # an adapter alone: before it, there was its base
        return [Side("before", lambda: _without_adapter(policy)), after]
    return [Side("answer", after.model)]


@contextmanager
def _as_it_is(policy: Policy) -> Iterator[Any]:
    yield policy.model


@contextmanager
def _reference(policy: Policy) -> Iterator[Any]:
    with policy.reference():
        yield policy.frozen if policy.frozen is not None else policy.model


@contextmanager
def _without_adapter(policy: Policy) -> Iterator[Any]:
    with policy.model.disable_adapter():  # type: ignore[operator]  # a PeftModel
        yield policy.model


def _answer(opened: Chat, prompt: str, console: Console | None) -> dict[str, str]:
    """Every side's answer, shown as they come on a terminal, in lines elsewhere, or not at all."""
    answers = {side.name: "" for side in opened.sides}
    if console is None or not console.is_terminal:
        for side in opened.sides:
            with stage(f"answering ({side.name})", show=console is not None):
                answers[side.name] = opened.ask(side, prompt)
        if console is not None:
            for name, text in ({"prompt": prompt} | answers).items():
                console.print(Text(f"{name:7} {text.strip()}"), soft_wrap=True)
            console.print()
        return {"prompt": prompt} | answers
    with Live(_columns(answers), console=console, refresh_per_second=8) as live:
        for side in opened.sides:

            def show(text: str, name: str = side.name) -> None:
                live.update(_columns(answers | {name: text}))

            answers[side.name] = opened.ask(side, prompt, show)
            live.update(_columns(answers))
    return {"prompt": prompt} | answers


def _columns(answers: dict[str, str]) -> Table:
    table = Table(expand=True, padding=(0, 1))
    for name in answers:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(text.strip()) for text in answers.values()))
    return table


def _typed(opened: Chat, model: str, console: Console) -> Iterator[dict[str, str]]:
    """A conversation in the terminal."""
    what = "a conversation" if opened.chat_template else "each text is continued by itself"
    console.print(
        Text(f"{model}: {' and '.join(side.name for side in opened.sides)}; {what}; {COMMANDS}"), soft_wrap=True
    )
    while True:
        try:
            prompt = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if prompt in ("/quit", "/exit"):
            return
        if prompt == "/reset":
            opened.reset()
        elif prompt.startswith("/"):
            console.print(COMMANDS)
        elif prompt:
            try:
                yield _answer(opened, prompt, console)
            except KeyboardInterrupt:
                console.print("stopped; neither side remembers it")
            except UserError as error:
                console.print(Text(str(error), style="yellow"), soft_wrap=True)
