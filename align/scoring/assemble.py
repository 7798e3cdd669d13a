"""Raw rewards -> the output's rows: transforms, combination and grades, which cost nothing to do again."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from align.scoring.job import Job
from align.scoring.references import References
from rewards.combine import Combination, Reward, combine, transforms_for
from rewards.grading import GradeMethod, grades_from_rewards
from rewards.transforms import Statistics, Transform, dataset_statistics, transform

Entry = dict[str, Any]
Known = list[list[Statistics | None]]
"""By scorer and transform: statistics of the data set, where a transform needs them."""


def assembled(
    job: Job, rewards: Sequence[Reward], references: References, method: Combination, grades: GradeMethod
) -> Callable[[], Iterator]:
    """A function that gives the output's rows from their beginning."""
    steps = transforms_for(rewards, method)
    known = _statistics(job, steps, references)
    names = part_names(rewards)

    def rows() -> Iterator[dict[str, Any]]:
        for entry in job.scored():
            parts = _transformed(entry, steps, known, references)
            total = combine(parts, [reward.weight for reward in rewards])
            own: dict[str, Any] = {"rewards": total, "grades": grades_from_rewards(total, grades)}
            if len(rewards) > 1 or any(steps):
                own["reward_parts"] = dict(zip(names, entry["rewards"], strict=True))
            yield {**entry["row"], **own}

    return rows


def part_names(rewards: Sequence[Reward]) -> list[str]:
    """A name for each reward: the one it was given, else its scorer's; a second one of a name gets a number."""
    names: list[str] = []
    for reward in rewards:
        name = reward.part or reward.scorer.name
        same = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{same + 1}" if same else name)
    return names


def _transformed(
    entry: Entry, steps: Sequence[Sequence[Transform]], known: Known, references: References
) -> list[list[float]]:
    completions, held_against = entry["row"]["completions"], references.of(entry["row"])
    return [
        transform(raw, completions, own, statistics, given)
        for raw, own, statistics, given in zip(entry["rewards"], steps, known, held_against, strict=True)
    ]


def _statistics(job: Job, steps: Sequence[Sequence[Transform]], references: References) -> Known:
    """By scorer and transform: what is to be known of the whole data set."""

    def lists(k: int) -> Iterator[tuple[list[float], list[Any], Sequence[Sequence[float] | None]]]:
        rows = ((entry["rewards"][k], entry["row"]) for entry in job.scored())
        return ((rewards, row["completions"], references.of(row)[k]) for rewards, row in rows)

    return [dataset_statistics(partial(lists, k), own) for k, own in enumerate(steps)]
