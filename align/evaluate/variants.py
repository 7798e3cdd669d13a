"""How much log-probabilities depend on the wording of a prompt: the rows' completions under other wordings of it."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from align.data.schema import TEMPLATE_OPTIONS, Row
from align.data.steps import micro_batches
from align.errors import UserError
from align.model.forward import TokenScorer, evaluating
from align.model.policy import Policy
from align.progress import progress


def sensitivity(sums: Float[Tensor, "V C"], lengths: Int[Tensor, "V C"]) -> float:
    """POSIX's psi: mean over completions y and ordered pairs of prompts of |log p(y | x_i) - log p(y | x_j)| / tokens.

    Args:
        sums: log-probability of every completion under every prompt, in nats.
        lengths: its tokens there; those of x_j count.

    Returns:
        Nats per token; 0 where the prompts make no difference.

    Source: arXiv:2410.02185, equation 1, with the row's completions for y where the paper has what the model answers to
        x_j
    """
    prompts, completions = sums.shape
    apart = (sums[:, None] - sums[None]).abs() / lengths[None]
    return (apart.sum() / (prompts * (prompts - 1) * completions)).item()


def prompt_sensitivity(
    policy: Policy,
    rows: Sequence[Row],
    column: str,
    prepare: Callable[[Path], Dataset],
    *,
    tokens_per_batch: int,
) -> dict[str, float]:
    """The mean of `sensitivity` over rows, and of how many.

    Args:
        column: of the rows, as `check_wordings` wants it.
        prepare: reads rows of a file into lists of token ids, with their `id`.

    Returns:
        `prompt_sensitivity` and `prompt_sensitivity_rows`; a row of which a wording does not fit with all completions
        is left out.

    Raises:
        UserError: no row is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "variants.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for number, row in enumerate(rows):
                for place, prompt in enumerate([row.prompt, *row.meta[column]]):
                    out.write(json.dumps(_reworded(row, prompt, f"{number} {place}")) + "\n")
        found = _logprobs(policy, prepare(file), tokens_per_batch)
    values = []
    for number, row in enumerate(rows):
        own = found.get(str(number), [])
        if len(own) == 1 + len(row.meta[column]) and all(len(sums) == len(row.completions) for sums, _ in own):
            values.append(sensitivity(*(torch.stack(part) for part in zip(*own, strict=True))))
    if not values:
        raise UserError(
            f"--variants {column}: in no row do all wordings fit beside all completions; raise --max-length"
        )
    return {"prompt_sensitivity": sum(values) / len(values), "prompt_sensitivity_rows": len(values)}


def check_wordings(rows: Sequence[Row], column: str) -> None:
    """Refuse rows whose column is not a list of other wordings of the prompt.

    Raises:
        UserError: names the first.
    """
    for row in rows:
        given = row.meta.get(column)
        if not isinstance(given, list) or not given or row.prompt_ids is not None:
            raise UserError(
                f"{row.place}, field {column}: not a list of other prompts for --variants; give it one or more, as "
                '["wording", ...], beside a prompt of text or messages'
            )
        if any(type(one) is not type(row.prompt) for one in given):
            raise UserError(
                f"{row.place}, field {column}: not all are text or all messages, as the prompt is; mend them"
            )


def _reworded(row: Row, prompt: Any, name: str) -> dict[str, Any]:
    judged = {"grades": row.grades} if row.grades is not None else {"rewards": row.rewards}
    options = {TEMPLATE_OPTIONS: row.template_options, "tools": row.tools}
    given = {key: value for key, value in {**judged, **options}.items() if value}
    return {"id": name, "prompt": prompt, "completions": list(row.completions), **given}


@torch.no_grad()
def _logprobs(policy: Policy, lists: Dataset, tokens_per_batch: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By the number of the row, of every wording the completions' log-probabilities and tokens, in its order."""
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    scorer = TokenScorer(policy)
    batches = micro_batches(list(lists), tokens_per_batch=tokens_per_batch, packed=policy.packing)
    with evaluating(scorer), progress("reading other wordings", len(lists), unit="lists") as advance:
        for examples in batches:
            batch = policy.collate(examples)
            mask = batch.completion_mask
            sums = scorer(batch).logprobs.where(mask, 0.0).double().sum(dim=1).cpu()
            sizes = [len(example["completion_ids"]) for example in examples]
            parts = zip(examples, sums.split(sizes), mask.sum(dim=1).cpu().split(sizes), strict=True)
            for example, own, lengths in parts:
                number, place = str(example["id"]).split()
                found[number][int(place)] = own, lengths
            advance(len(examples))
    return {number: [own[place] for place in sorted(own)] for number, own in found.items()}
