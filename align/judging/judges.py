"""Judges: any scorer, which gives each completion a reward, or one that is shown two completions in both orders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.schema import Row
from align.errors import UserError
from align.evaluate.rewards import RewardScorer
from align.judging.cases import Case, Pair
from align.progress import progress
from align.rollout.journal import Journal
from align.runs.memory import scoring_in_words
from align.scoring.cache import RewardCache, reward_key
from rewards import Reward, read_reward
from rewards.digest import scorer_digest
from rewards.texts import text_key
from rewards.types import Asked

AT_ONCE = 16
"""Prompts that a judge gets at a time; a kill costs no more."""


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of two completions."""

    label: float
    """P(the first one is better): the mean over both orders; of a scorer 1, 1/2 or 0."""
    outcome: int
    """1 a win, 0 a tie, -1 a loss of the first one; of a judge of pairs a win or a loss in both orders."""
    chance: float
    """As the label, or of a scorer sigmoid(the difference of the rewards): how sure it is."""
    position: float | None
    """P(the one shown first is better) - 1/2; None for a scorer, and for two equal texts."""


@dataclass(frozen=True)
class Opinion:
    """What a judge says of one prompt's completions."""

    rewards: list[float] | None
    """Of a scorer, in the order of the row's completions."""
    orders: dict[Pair, tuple[float | None, float | None]]
    """Of a judge of pairs: P(the first one is better), shown first and shown second; None without a verdict."""

    def of(self, pair: Pair) -> Verdict | None:
        """Of two completions; None where the judge gave no verdict."""
        a, b = pair
        if a == b:
            return Verdict(0.5, 0, 0.5, None)
        if self.rewards is not None:
            gap = self.rewards[a] - self.rewards[b]
            label = 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
            return Verdict(label, int(math.copysign(1, gap)) if gap else 0, 0.5 * (1 + math.tanh(gap / 2)), None)
        first, second = self.orders[pair]
        if first is None or second is None:
            return None
        label = (first + second) / 2
        outcome = 1 if min(first, second) > 0.5 else -1 if max(first, second) < 0.5 else 0
        return Verdict(label, outcome, label, (first - second) / 2)


class Judge:
    """One judge, its opinions in a file, and its rewards and verdicts in the cache."""

    def __init__(self, spec: str, output: Path, store: RewardCache | None, *, allow_code: bool) -> None:
        """Args:
        spec: what `rewards.read_reward` reads.
        output: the evaluation's folder; checklists and opinions go there.
        store: None to go without.

        Raises:
            UserError: the specification names something that is not there.
        """
        self.spec, self.output, self.store = spec, output, store
        self.given = read_reward(spec, allow_code=allow_code)
        self.reward = _with_checklists(self.given, output)
        self.of_pairs = bool(getattr(self.reward.scorer, "listwise", False))
        if self.of_pairs and self.reward.transforms:
            raise UserError(f"--judge {spec}: a judge of pairs has no rewards to transform; remove `transforms`")
        self.digest = scorer_digest(self.given.scorer)
        self.scorer: CachedScorer | None = None

    def opinions(self, cases: Sequence[Case]) -> list[Opinion]:
        """Of every case; those on disk already are not asked for again.

        A block of cases is judged whole, whatever is there of it: what is scored beside them moves last digits.
        """
        journal = Journal(self._file(cases))
        if not journal.whole:
            self.output.joinpath("opinions").mkdir(parents=True, exist_ok=True)
            blocks = [cases[first : first + AT_ONCE] for first in range(0, len(cases), AT_ONCE)]
            done = sum(case.row.id in journal.lines for case in cases)
            with progress("judging", len(cases), unit="prompts", start=done) as advance:
                for block in blocks:
                    left = [case.row.id not in journal.lines for case in block]
                    if any(left):
                        lines = self._judged(block)
                        journal.append([line for line, new in zip(lines, left, strict=True) if new])
                        advance(sum(left))
            journal.finish([case.row.id for case in cases])
        return [self._opinion(journal.lines[case.row.id], case) for case in cases]

    @property
    def name(self) -> str:
        """A few words for tables: what scores, with the last part of its model's name, and what is asked."""
        scorer: Any = self.given.scorer
        model = Path(getattr(scorer, "model", "")).name
        said = [] if scorer.name == "sequence_classifier" else [scorer.name]
        asked = [getattr(scorer, "mode", ""), "reasoning" * bool(getattr(scorer, "reasoning", 0))]
        return " ".join(filter(None, [*said, model, *asked]))

    def close(self) -> None:
        """Free the judge's model."""
        self.scorer = None

    def _file(self, cases: Sequence[Case]) -> Path:
        """Named by all that decides what it holds."""
        texts = [text_key(text) for case in cases for text in (case.row.prompt, *case.row.completions)]  # type: ignore[arg-type]
        pairs = [f"{case.row.id} {case.compared}" for case in cases]
        whole = [self.given.model_dump_json(), *texts, *pairs]
        return self.output / "opinions" / f"{reward_key(self.digest, whole).hex()[:16]}.jsonl"

    def _judged(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        if self.scorer is None:
            self.scorer = CachedScorer(self.reward, self.digest, self.store)
        if not self.of_pairs:
            rewards = self.scorer.of_lists([case.row for case in cases])
            bad = next(
                (case for case, own in zip(cases, rewards, strict=True) if not all(map(math.isfinite, own))), None
            )
            if bad is not None:
                raise UserError(f"{bad.row.place}: --judge {self.spec} gives a completion no finite reward")
            return [{"id": case.row.id, "rewards": own} for case, own in zip(cases, rewards, strict=True)]
        asked = [(case.row, a, b) for case in cases for pair in case.compared for a, b in (pair, pair[::-1])]
        found = iter(self.scorer.compare(asked))
        lines = []
        for case in cases:
            both = [(next(found), next(found)) for _ in case.compared]
            orders = [[first, None if other is None else 1 - other] for first, other in both]
            lines.append({"id": case.row.id, "orders": orders})
        return lines

    def _opinion(self, line: dict[str, Any], case: Case) -> Opinion:
        if not self.of_pairs:
            return Opinion(line["rewards"], {})
        return Opinion(None, {pair: tuple(own) for pair, own in zip(case.compared, line["orders"], strict=True)})


class CachedScorer(RewardScorer):
    """A scorer that computes no reward, and no verdict, which the cache has."""

    def __init__(self, reward: Reward, digest: str, store: RewardCache | None) -> None:
        super().__init__(reward)
        self.digest, self.store = digest, store

    def score(self, rows: Sequence[Row], completions: Sequence[Any]) -> list[float]:
        """As every reward scorer, under the keys that `align score` has."""
        column = getattr(self.reward.scorer, "answer_column", None)
        more = [[str(row.meta.get(column))] if column else [] for row in rows]
        texts = zip(rows, completions, more, strict=True)
        keys = [reward_key(self.digest, [_prompt(row), text_key(own), *answer]) for row, own, answer in texts]
        known = self._known(keys)
        left = [i for i, key in enumerate(keys) if key not in known]
        if left:
            found = super().score([rows[i] for i in left], [completions[i] for i in left])
            known |= self._kept({keys[i]: value for i, value in zip(left, found, strict=True)})
        return [known[key] for key in keys]

    def compare(self, asked: Sequence[tuple[Row, int, int]]) -> list[float | None]:
        """P(the one shown first is better) of two of a row's completions; None without a verdict, which is no answer
        to keep."""
        shown = [(row, row.completions[a], row.completions[b]) for row, a, b in asked]
        texts = [["first or second", _prompt(row), text_key(a), text_key(b)] for row, a, b in shown]  # type: ignore[arg-type]
        keys = [reward_key(self.digest, own) for own in texts]
        known = self._known(keys)
        left = [i for i, key in enumerate(keys) if key not in known]
        setting = "`tokens_per_batch: {}` among the keys of --judge"
        with scoring_in_words(self.reward.scorer, setting, goes_on="it does not change the figures"):
            prompts = [Asked.of(shown[i][0].prompt, shown[i][0].template_arguments) for i in left]  # type: ignore[arg-type]
            sides = [[shown[i][side] for i in left] for side in (1, 2)]
            found = self.scorer.compare(prompts, *sides) if left else []
        verdicts = dict(zip([keys[i] for i in left], found, strict=True))
        self._kept({key: value for key, value in verdicts.items() if value is not None})
        return [known[key] if key in known else verdicts[key] for key in keys]

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        return self.store.read(keys, self.store.state()) if self.store else {}

    def _kept(self, found: dict[bytes, float]) -> dict[bytes, float]:
        if self.store:
            self.store.add(found.items())
        return found


def _prompt(row: Row) -> str:
    return text_key(Asked.of(row.prompt, row.template_arguments))  # type: ignore[arg-type]


def _with_checklists(reward: Reward, output: Path) -> Reward:
    """The judge's checklists kept in the evaluation's folder, unless it says where."""
    scorer: Any = reward.scorer
    if getattr(scorer, "mode", None) != "checklist" or scorer.checklists:
        return reward
    own = scorer.model_copy(update={"checklists": str(output / "checklists.jsonl")})
    return reward.model_copy(update={"scorer": own})
