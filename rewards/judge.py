"""A language model as judge: the probability of its verdict, never a sampled text."""

from collections.abc import Sequence
from itertools import permutations
from math import exp, inf
from typing import Any, Unpack

from rewards.anchors import read_anchors, thurstone
from rewards.asking import MARK, QUESTIONS, REASON, VERDICTS, Checklists, Voice, filled, shares, unread
from rewards.language_model import LanguageModel
from rewards.rendering import Unrendered, rendered
from rewards.texts import plain, text_key
from rewards.types import AskingOptions, RowError, Tally, Text


class JudgeScorer:
    """Rewards by a judge's verdict; see `Judge` for the arguments."""

    def __init__(self, voice: Voice, *, name: str, tally: Tally, **asking: Unpack[AskingOptions]) -> None:
        """Args:
        name: of the judge, for messages.
        tally: counts what is done.
        """
        mode = asking["mode"]
        self.voice, self.name, self.tally = voice, name, tally
        self.mode, self.log_odds, self.reasoning = mode, asking["log_odds"], asking["reasoning"]
        self.question = asking["question"] or QUESTIONS[mode]
        self.words = [word.strip() for word in asking["verdicts"] or VERDICTS[mode]]
        self.checklists = Checklists(voice, asking["checks"], asking["checklists"]) if mode == "checklist" else None
        self.file, self.anchors = asking["anchors"], read_anchors(asking["anchors"]) if asking["anchors"] else {}

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """How the judge likes each completion; see Scorer.score.

        yes_no: p(Yes) / (p(Yes) + p(No)), or its log-odds
        scale: sum_k k p(k) over the scale's words, from 1 for the first
        checklist: mean over the prompt's questions of p(Yes) / (p(Yes) + p(No))
        pairwise: mean over the prompt's other completions j and both orders of P(this one is better than j); 1/2 for a
            completion without others
        anchors: `thurstone` of the mean of both orders of P(this one is better), for each anchor of the prompt

        A verdict's probability is that of all its tokens.

        Source: both orders as in MT-bench, arXiv:2306.05685; scale: Prometheus, arXiv:2310.08491, with G-Eval's
        expectation, arXiv:2303.16634; checklist: TICK, arXiv:2410.03608; anchors: Compare2Score, arXiv:2405.19298
        """
        self.tally.completions += len(prompts)
        if self.mode == "pairwise":
            return self._pairwise(prompts, completions)
        if self.mode == "anchors":
            return self._anchored(prompts, completions)
        texts = [
            {"prompt": plain(prompt), "completion": plain(own)}
            for prompt, own in zip(prompts, completions, strict=True)
        ]
        if self.checklists is not None:
            return self._checked(texts, self.checklists.of(prompts))
        found = self._found(texts)
        if self.log_odds:
            return [_odds(yes, no) for yes, no in found]
        if self.mode == "scale":
            return [sum(k * share for k, share in enumerate(shares(own), start=1)) for own in found]
        return [shares(own)[0] for own in found]

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[float | None]:
        """P(the answer shown first is better), of each prompt's two answers in this order alone; None without a
        verdict."""
        texts = [
            {"prompt": plain(prompt), "first": plain(a), "second": plain(b)}
            for prompt, a, b in zip(prompts, firsts, seconds, strict=True)
        ]
        return [None if own is None else _sigmoid(_odds(*own)) for own in self._asked(texts)]

    def _pairwise(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        lists: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            lists.setdefault(text_key(prompt), []).append(index)
        pairs = [pair for members in lists.values() for pair in permutations(members, 2)]
        sides = [[completions[i] for i in side] for side in zip(*pairs, strict=True)] if pairs else [[], []]
        won: list[list[float]] = [[] for _ in prompts]
        for (a, b), first in zip(pairs, self.compare([prompts[a] for a, _ in pairs], *sides), strict=True):
            won[a].append(self._first(first))
            won[b].append(1 - self._first(first))
        return [sum(own) / len(own) if own else 0.5 for own in won]

    def _anchored(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        anchors = [self.anchors.get(plain(prompt)) for prompt in prompts]
        known = [own for own in anchors if own]
        if len(known) < len(prompts):
            raise RowError(f"{self.file}: no anchors of this prompt; add a row of it, or leave the prompt out")
        shown = [prompt for prompt, own in zip(prompts, known, strict=True) for _ in own]
        texts = [completion for completion, own in zip(completions, known, strict=True) for _ in own]
        others: list[Text] = [text for own in known for text, _ in own]
        found = list(map(self._first, self.compare(shown * 2, texts + others, others + texts)))
        both = zip(found[: len(shown)], found[len(shown) :], strict=True)
        won = iter([(first + 1 - second) / 2 for first, second in both])
        return [thurstone([worth for _, worth in own], [next(won) for _ in own]) for own in known]

    def _first(self, found: float | None) -> float:
        if found is None:
            raise unread(self.name)
        return found

    def _checked(self, texts: Sequence[dict[str, str]], checks: Sequence[list[str]]) -> list[float]:
        asked = [own | {"check": check} for own, all_ in zip(texts, checks, strict=True) for check in all_]
        found = iter(self._found(asked))
        return [sum(shares(next(found))[0] for _ in all_) / len(all_) for all_ in checks]

    def _found(self, texts: Sequence[dict[str, str]]) -> list[list[float]]:
        found = []
        for own in self._asked(texts):
            if own is None:
                raise unread(self.name)
            found.append(own)
        return found

    def _asked(self, texts: Sequence[dict[str, str]]) -> list[list[float] | None]:
        questions = [filled(self.question, own) + REASON * bool(self.reasoning) for own in texts]
        return self.voice.verdicts(questions, self.words, reasoning=self.reasoning)


class LocalVoice:
    """A model that runs here."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.chat = model.tokenizer.chat_template is not None

    def verdicts(self, questions: Sequence[str], words: Sequence[str], *, reasoning: int) -> list[list[float] | None]:
        """As every voice. What it has reasoned, the likeliest text, stands before the verdict."""
        texts = [self._before(question) for question in questions]
        if reasoning:
            thoughts = self.model.write(texts, tokens=reasoning, templated=self.chat, stop=MARK)
            texts = [
                f"{text}{own.partition(MARK)[0].rstrip()}\n{MARK}" for text, own in zip(texts, thoughts, strict=True)
            ]
        elif not self.chat:
            texts = [f"{text}\n{MARK}" for text in texts]
        # Behind a generation prompt a verdict stands alone; behind the mark it follows a space.
        spoken = list(words) if self.chat and not reasoning else [f" {word}" for word in words]
        twice = [text for text in texts for _ in spoken]
        found = self.model.logprobs(twice, spoken * len(texts), append_eos=False, templated=self.chat)
        sums = [value for value, _ in found]
        return [sums[i : i + len(spoken)] for i in range(0, len(sums), len(spoken))]

    def write(self, questions: Sequence[str], tokens: int) -> list[str]:
        """As every voice."""
        texts = [self._before(question) + ("" if self.chat else "\n") for question in questions]
        return self.model.write(texts, tokens=tokens, templated=self.chat)

    def _before(self, question: str) -> str:
        """What the judge reads."""
        if not self.chat:
            return question
        tokenizer = self.model.tokenizer
        try:
            return rendered(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        except Unrendered as error:
            raise RowError(f"{tokenizer.name_or_path}: the chat template refuses the question ({error})") from None


def local_judge(*, model: str, revision: str | None, **options: Any) -> JudgeScorer:
    """A judge that runs here; see `Judge` for the arguments."""
    asking: Any = {name: options.pop(name) for name in AskingOptions.__annotations__}
    tally = Tally()
    voice = LocalVoice(LanguageModel(model, revision=revision, tally=tally, **options))
    return JudgeScorer(voice, name=model, tally=tally, **asking)


def _odds(yes: float, no: float) -> float:
    """log p(yes) - log p(no), also where a server gives one of them no probability."""
    return yes - no if max(yes, no) > -inf else 0.0


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -700 else 0.0
