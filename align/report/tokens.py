"""Lists with every completion's tokens, and how strongly each is coloured."""

from collections.abc import Sequence
from dataclasses import dataclass

from align.report.reading import TokenCompletion, TokenList, TokenNumbers

VISIBLE = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t", "": "▫"}
"""Characters that have no shape of their own, and a token without text (the first part of a character, mostly)."""


@dataclass(frozen=True)
class Mode:
    """A quantity that the tokens are coloured by."""

    key: str
    label: str
    meaning: str
    scale: float
    """The value of the strongest colour; larger ones are not told apart."""


@dataclass(frozen=True)
class Token:
    text: str
    style: str
    """Colour strengths in [-1, 1], a CSS variable per mode."""
    values: str
    """Token reward, implicit reward before and after, log-probability before and after."""
    learnt: bool
    """Or only read: a tool's or a user's, inside the completion."""


@dataclass(frozen=True)
class Completion:
    grade: float
    place: int
    """Its rank by implicit reward after training; 1 is the highest."""
    implicit: float
    change: float
    """Log-probability after less before, in nats."""
    best: bool
    tokens: list[Token]


@dataclass(frozen=True)
class ShownList:
    id: str
    prompt: str
    completions: list[Completion]
    """The best-graded first."""
    best_change: float


@dataclass(frozen=True)
class TokenView:
    modes: list[Mode]
    lists: list[ShownList]
    holes: bool
    """Whether any token is read only."""


def token_view(lists: Sequence[TokenList]) -> TokenView:
    """The lists, ready to be shown."""
    completions = [completion for one in lists for completion in one.completions]
    rewards = [value for c in completions for value in _known(c.token_rewards or [])]
    implicit = _scale([value for c in completions for value in _known(c.implicit_before + c.implicit_after)])
    modes = [
        Mode("before", "implicit reward before", "A token's share of the implicit reward before training.", implicit),
        Mode("after", "implicit reward after", "A token's share of the implicit reward after training.", implicit),
    ]
    if rewards:
        meaning = "What the token regularizer pulls by: above 0 where the better of two contexts prefers the token."
        modes.insert(0, Mode("reward", "token reward", meaning, _scale(rewards)))
    holes = not all(learnt for completion in completions for learnt in completion.learnt)
    return TokenView(modes, [_shown_list(one, modes) for one in lists], holes)


def visible(text: str) -> str:
    """A token's text with a shape for what has none."""
    return VISIBLE.get(text) or text.replace("\n", VISIBLE["\n"])


def _scale(values: Sequence[float]) -> float:
    """What 98 of 100 values do not exceed, to two digits: a few outliers would bleach all others."""
    sizes = sorted(abs(value) for value in values)
    return float(f"{sizes[int(0.98 * (len(sizes) - 1))]:.2g}") or 1.0


def _known(values: TokenNumbers) -> list[float]:
    return [value for value in values if value is not None]


def _shown_list(one: TokenList, modes: Sequence[Mode]) -> ShownList:
    totals = [sum(_known(c.implicit_after)) for c in one.completions]
    best = max(one.grades)
    completions = [
        Completion(
            grade=grade,
            place=1 + sum(other > total for other in totals),
            implicit=total,
            change=sum(_known(c.logprob_after)) - sum(_known(c.logprob_before)),
            best=grade == best,
            tokens=_tokens(c, modes),
        )
        for grade, total, c in zip(one.grades, totals, one.completions, strict=True)
    ]
    completions.sort(key=lambda c: -c.grade)
    return ShownList(str(one.id), one.prompt, completions, best_change=completions[0].change)


def _tokens(completion: TokenCompletion, modes: Sequence[Mode]) -> list[Token]:
    values = {
        "reward": completion.token_rewards,
        "before": completion.implicit_before,
        "after": completion.implicit_after,
    }
    coloured = {mode.key: [_strength(v, mode.scale) for v in values[mode.key] or []] for mode in modes}
    columns = [*values.values(), completion.logprob_before, completion.logprob_after]
    return [
        Token(
            text=visible(text),
            style=";".join(f"--{key}:{own[i]}" for key, own in coloured.items() if own and learnt),
            values=" ".join(f"{column[i]:.5g}" if column and learnt else "" for column in columns),
            learnt=learnt,
        )
        for i, (text, learnt) in enumerate(zip(completion.tokens, completion.learnt, strict=True))
    ]


def _strength(value: float | None, scale: float) -> str:
    return "" if value is None else f"{max(-1.0, min(1.0, value / scale)):.2f}".rstrip("0").rstrip(".")
