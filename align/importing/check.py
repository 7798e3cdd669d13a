"""`align import --check`: the token ids of the first rows as the tool would build them, beside ours."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from align.data.prepare import Wanted, prepare_data
from align.data.schema import Row
from align.data.texts import read_chat_template
from align.importing.plan import Plan
from align.importing.templates import TEMPLATES, Pieces, elements
from align.model.load import load_tokenizer
from align.recipe import Recipe

ROWS = 64
Ids = tuple[list[int], list[list[int]]]
"""A prompt's ids, and each completion's."""
Build = Callable[[Row, Any], Ids | None]


def check_tokens(plan: Plan, recipe: Recipe, *, trust_remote_code: bool) -> Iterator[str]:
    """What differs between the tool's token ids and ours, in the first rows.

    Args:
        plan: of the import.
        recipe: what came of it; its model's tokenizer and its rows are read.
        trust_remote_code: whether this call consents to code that the tokenizer comes with.

    Yields:
        The result, and of each kind of difference an example.

    Raises:
        UserError: no tokenizer, or rows that cannot be read.
    """
    policy = recipe.policy
    tokenizer = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=trust_remote_code)
    datasets.disable_progress_bars()  # TRL is asked for one row at a time
    build = builder(plan)
    if build is None:
        yield f"check: nothing to compare with: {why_none(plan)}"
        return
    section = recipe.data.model_copy(update={"limit": ROWS, "eval_sources": (), "eval_fraction": 0.0, "workers": 1})
    least = 1 if any(term.name in ("kto", "apo_zero_unpaired") for term in recipe.objective) else 2
    wanted = Wanted(min_completions=least, as_scored=recipe.task == "reward")
    template = read_chat_template(recipe.policy.chat_template)
    prepared = prepare_data(section, tokenizer, chat_template=template, wanted=wanted)
    same, differences = 0, dict[str, str]()
    for row, ids in zip(prepared.train_rows, prepared.train, strict=True):
        theirs = build(row, tokenizer)
        ours = (list(ids["prompt_ids"]), [list(own) for own in ids["completion_ids"]])
        what = difference(theirs, ours, tokenizer) if theirs else ("not built there", "")
        same += what is None
        if what is not None:
            differences.setdefault(what[0], f"{row.place}: {what[1]}")
    read = len(prepared.train_rows)
    yield f"check: {same} of {read} rows have the token ids that {plan.tool} would build"
    for kind, example in differences.items():
        yield f"  {kind}, for example {example}"


def difference(theirs: Ids, ours: Ids, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """In which part a row differs, with both texts from there on; None where it is the same."""
    pairs = [("the prompt", theirs[0], ours[0])]
    pairs += [("a completion", one, other) for one, other in zip(theirs[1], ours[1], strict=True)]
    for what, one, other in pairs:
        if one != other:
            start = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(one), len(other)) if start is None else start
            texts = [tokenizer.decode(ids[max(0, place - 2) : place + 8]) for ids in (one, other)]
            return f"{what} differs from token {place} on" if place == 0 else f"{what} differs", " / ".join(
                map(repr, texts)
            )
    return None


def why_none(plan: Plan) -> str:
    """Why a tool's ids cannot be built."""
    if plan.tool in ("TRL", "Unsloth"):
        return "TRL is not installed"
    return f"the rules of its template `{plan.template}` are not written here; the tokenizer's own is used"


def builder(plan: Plan) -> Build | None:
    """How a tool would build a row's ids; None where its rules are not here."""
    if plan.tool in ("TRL", "Unsloth"):
        return _by_trl if importlib.util.find_spec("trl") is not None else None
    pieces = TEMPLATES.get(str(plan.template))
    if pieces is None:
        return None
    by_text = plan.tool == "axolotl"
    return lambda row, tokenizer: (_of_texts if by_text else _of_elements)(row, tokenizer, pieces)


def _conversations(row: Row) -> list[list[dict[str, Any]]]:
    """Each completion's whole conversation, a plain text as a user's turn."""
    prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    sides = [[{"role": "assistant", "content": one}] if isinstance(one, str) else list(one) for one in row.completions]
    return [[*prompt, *side] for side in sides]  # type: ignore[list-item]


def _of_elements(row: Row, tokenizer: Any, pieces: Pieces) -> Ids:
    """LLaMA-Factory and ms-swift encode each element by itself."""
    built = []
    for conversation in _conversations(row):
        ids: list[list[int]] = []
        for element in elements(pieces, conversation):
            if element is None:
                ids.append([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [])
            else:
                ids.append(tokenizer.encode(element, add_special_tokens=False))
        ids[-1] = [*ids[-1], *([tokenizer.eos_token_id] if pieces.eos else [])]
        built.append(ids)
    return [one for part in built[0][:-1] for one in part], [ids[-1] for ids in built]


def _of_texts(row: Row, tokenizer: Any, pieces: Pieces) -> Ids:
    """axolotl gives TRL a prompt and its sides as texts, which ends them and tokenises prompt and side together."""
    prompt, sides = "", []
    for conversation in _conversations(row):
        *before, last = elements(pieces, conversation)
        prompt = "".join(one for one in before if one is not None)  # the start token is the tokenizer's to add
        side = str(last).rstrip()
        sides.append(side if side.endswith(tokenizer.eos_token) else side + tokenizer.eos_token)
    prompt_ids = tokenizer(prompt)["input_ids"]
    whole = [tokenizer(prompt + side)["input_ids"] for side in sides]
    return _split(prompt_ids, whole)


def _split(prompt_ids: list[int], whole: Sequence[list[int]]) -> Ids:
    common = len(prompt_ids)
    for ids in whole:
        common = min(
            common,
            next((at for at, (one, other) in enumerate(zip(prompt_ids, ids, strict=False)) if one != other), common),
        )
    return prompt_ids[:common], [ids[common:] for ids in whole]


def _by_trl(row: Row, tokenizer: Any) -> Ids | None:
    """TRL's own preparation of a pair."""
    from datasets import Dataset
    from trl import DPOTrainer

    if len(row.completions) != 2 or row.grades is None:
        return None
    best = int(row.grades[1] > row.grades[0])
    sides = {"chosen": row.completions[best], "rejected": row.completions[1 - best]}
    arguments: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)
    rows = Dataset.from_list([{"prompt": row.prompt, **sides}])
    own: Any = SimpleNamespace(_tokenizer=tokenizer)
    done = DPOTrainer._prepare_dataset(own, rows, tokenizer, arguments, "check")[0]
    order = ["chosen_ids", "rejected_ids"] if best == 0 else ["rejected_ids", "chosen_ids"]
    return list(done["prompt_ids"]), [list(done[name]) for name in order]
