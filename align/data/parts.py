"""What the readers share: prompt, grades and rewards are taken out of a row's columns by any of their names."""

from typing import Any

from align.data.columns import Columns, how_to_ignore
from align.data.schema import BadRow, is_finite

PROMPTS = ("prompt", "messages", "context", "instruction", "question", "query", "input")
REWARDS = ("rewards", "scores", "all_rm_scores", "ratings")
ITEM_REWARDS = ("reward", "score", "rating", "overall_score", "fine-grained_score")
SIDE_REWARDS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
ITEM_ATTRIBUTES = ("attributes", "scores")
LABELS = ("label", "kto_tag", "is_desirable", "desirable")


def parts_of(
    prompt: object,
    completions: object,
    called: str | tuple[str, ...],
    *,
    grades: object = None,
    rewards: object = None,
    rewards_called: str | tuple[str, ...] = "rewards[{}]",
    grades_called: str | tuple[str, ...] = "grades[{}]",
    prompt_called: str | None = None,
) -> Columns:
    """What a reader gives `make_row`, and how the file calls it; {} stands for the place in the list.

    `prompt_called` is for a prompt that does not stand in one of the usual columns.
    """
    names: dict[str, str | tuple[str, ...]] = {
        "completions": called,
        "rewards": rewards_called,
        "grades": grades_called,
    }
    if prompt_called is not None:
        names["prompt"] = prompt_called
    return {"prompt": prompt, "completions": completions, "grades": grades, "rewards": rewards, "names": names}


def take(columns: Columns, name: str, where: str = "") -> Any:
    """Take a column out of a row, or look up a key of an object at `where`.

    Raises:
        BadRow: missing.
    """
    field = f"{where}.{name}" if where else name
    if columns.get(name) is None:
        raise BadRow(field, f"missing (found: {', '.join(columns) or 'nothing'})", f"give `{name}`, or remove the row")
    return columns[name] if where else columns.pop(name)


def prompt_name(columns: Columns) -> str | None:
    """The column of the prompt: `prompt` wherever there is one, else the first that is not empty."""
    if "prompt" in columns:  # asked several times of every row
        return "prompt"
    named = [name for name in PROMPTS if name in columns]
    return next((name for name in named if columns[name]), named[0] if named else None)


def take_prompt(columns: Columns) -> Any:
    """Take the prompt out of a row.

    Raises:
        BadRow: there is none.
    """
    name = prompt_name(columns)
    if name is None:
        found = ", ".join(columns) or "none"
        raise BadRow("prompt", f"missing (other columns: {found})", "give a `prompt` or `messages` column")
    return columns.pop(name)


def has_prompt(columns: Columns) -> bool:
    """Whether a column holds the prompt."""
    name = prompt_name(columns)
    return name is not None and (name == "prompt" or bool(columns[name]))


def side_rewards(columns: Columns) -> Columns:
    """What a rater gave either side, beside the order that the sides have."""
    if "rewards" in columns:
        return {"rewards": columns.pop("rewards")}
    given = (names for names in SIDE_REWARDS if names[0] in columns)
    names = next((names for names in given if all(_is_number(columns.get(name)) for name in names)), None)
    return {"rewards": [columns.pop(name) for name in names]} if names else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def list_grades(columns: Columns) -> Columns:
    """Take grades, and one of rewards or ranks, out of the row of a list.

    Raises:
        BadRow: two of them order the completions differently.
    """
    grades: Columns = {"grades": columns.pop("grades")} if "grades" in columns else {}
    given = [name for name in (*REWARDS, "ranks") if name in columns]
    if not given:
        return grades
    name, *others = given
    first = as_grades("rank" if name == "ranks" else "reward", columns.pop(name), f"{name}[{{}}]")
    for other in others:
        second = as_grades("rank" if other == "ranks" else "reward", columns[other], other)
        if _disagree(first["rewards"], second["rewards"]):
            remedy = f"keep one of the two, or {how_to_ignore(other)}"
            raise BadRow(other, f"it orders the completions unlike `{name}`, which is read", remedy)
    return {**grades, **first}


def _disagree(first: object, second: object) -> bool:
    """Whether two lists of numbers put some completions into opposite order."""
    both = (first, second)
    if not all(isinstance(values, list) and all(map(_is_number, values)) for values in both):
        return False
    pairs = list(zip(first, second, strict=False))  # type: ignore[call-overload]
    return any((a - c) * (b - d) < 0 for a, b in pairs for c, d in pairs)


def as_grades(key: str, values: Any, called: str) -> Columns:
    """Grades as they are, ranks turned round (1 is the best) and everything else as rewards."""
    if key == "grade":
        return {"grades": values, "grades_called": called}
    if key == "rank" and isinstance(values, list):
        values = [
            -value if isinstance(value, int | float) and not isinstance(value, bool) else value for value in values
        ]
    return {"rewards": values, "rewards_called": called}


def single_grade(columns: Columns) -> Columns:
    """Take the label, the grade or the reward of a lone completion out of its row.

    Raises:
        BadRow: a label that is neither true nor false.
    """
    labelled = next((name for name in LABELS if name in columns), None)
    if labelled is not None:
        label = columns.pop(labelled)
        if label not in (0, 1):
            problem = f"{label!r} is neither true nor false"
            raise BadRow(labelled, problem, "give true for a good completion, else false")
        other = next((name for name in LABELS if columns.get(name) in (0, 1) and columns[name] != label), None)
        if other is not None:
            raise BadRow(other, f"it contradicts `{labelled}`", f"keep one of the two, or {how_to_ignore(other)}")
        return {"grades": [float(label)]}
    if "grade" in columns:
        return {"grades": [columns.pop("grade")], "grades_called": ("grade",)}
    name = next((name for name in ITEM_REWARDS if name in columns), None)
    return {} if name is None else {"rewards": [columns.pop(name)], "rewards_called": (name,)}
