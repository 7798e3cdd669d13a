"""What is verified on the model itself before the first step."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.data.collate import Example
from align.errors import UserError
from align.model.forward import TokenScorer, evaluating, score_tokens
from align.types import ListBatch

if TYPE_CHECKING:
    from align.model.policy import Policy

TOLERANCE = 1e-3
HALF_TOLERANCE = 0.25
"""Nats; bfloat16 logits around 20 are 0.125 apart."""


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two computations of one token's log-probability may differ, in nats, where these dtypes are involved."""
    return TOLERANCE if all(dtype.itemsize > 2 for dtype in dtypes) else HALF_TOLERANCE


def check_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, parts: Sequence[Dataset]) -> None:
    """Refuse rows with tokens that the tokenizer has and the model's embeddings lack.

    Args:
        parts: tokenised lists; they are read only where the tokenizer is the larger one, as Gemma's harmlessly is.

    Raises:
        UserError: names the row.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= size:
        return
    for part in parts:
        columns = (part[name][:] for name in ("source", "row", "prompt_ids", "completion_ids"))
        for source, row, prompt, completions in zip(*columns, strict=True):
            if (largest := max(chain(prompt, *completions))) >= size:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UserError(
                    f"{source}, row {row}: token {token!r} ({largest}) is not among the model's {size}; save the model "
                    "with resized embeddings (resize_token_embeddings), or take its own tokenizer"
                )


@torch.no_grad()
def check_forward(base: PreTrainedModel, *, name: str) -> None:
    """Compare our log-probabilities on a padded batch with the model's own logits on one row alone.

    Raises:
        UserError: they differ, so the model's head is not a plain one or padding is not inert in it.
    """
    ids = torch.arange(1, 9, device=base.device) % base.config.get_text_config().vocab_size
    with evaluating(base):
        logits = base(input_ids=ids[None], use_cache=False).logits[0, 2:-1].float()
        ours = score_tokens(base, _padded(ids, first=3)).logprobs
    expected = logits.log_softmax(-1).gather(1, ids[3:, None]).T
    difference = (ours - expected).abs().max().item()
    if not difference <= tolerance(base.dtype):
        raise UserError(
            f"{name} ({base.config.model_type}) computes logits in a way that is not supported: its own "
            f"log-probabilities and ours differ by {difference:.2g}; another architecture is needed"
        )


@torch.no_grad()
def check_reference_identity(policy: "Policy", batch: ListBatch) -> None:
    """Before the first step, policy and reference must give the same log-probabilities, dropout aside.

    Raises:
        RuntimeError: they do not.
    """
    scorer = TokenScorer(policy)
    with evaluating(scorer):
        own = scorer(batch).logprobs
        with policy.reference():
            reference = scorer(batch).logprobs
    difference = (own - reference).abs().max().item()
    if not difference <= tolerance(policy.model.dtype):
        raise RuntimeError(
            f"before the first step policy and reference differ by {difference:.2g} nats on a token, with adapter "
            f"{policy.adapter}: the implicit rewards would not start at zero"
        )


def probe_lists(base: PreTrainedModel) -> list[Example]:
    """Two small lists for comparing a model with itself."""
    vocabulary = base.config.get_text_config().vocab_size
    ids = [(7 * i + 1) % vocabulary for i in range(24)]
    shapes = ((ids[:3], [ids[3:5], ids[5:10], ids[10:12]]), (ids[12:14], [ids[14:18], ids[18:24]]))
    return [{"prompt_ids": prompt, "completion_ids": own, "grades": [0.0] * len(own)} for prompt, own in shapes]


def _padded(ids: Tensor, *, first: int) -> ListBatch:
    """One row whose tokens from `first` on are a completion, beside a longer one, so that it is padded."""
    size = len(ids)
    rows = torch.stack([torch.cat([ids, ids[:3]]), torch.cat([ids[:3], ids])])
    mask = torch.ones(1, 1, dtype=torch.bool, device=ids.device)
    zero = torch.zeros(1, dtype=torch.long, device=ids.device)
    return ListBatch(
        input_ids=rows,
        targets=ids[None, first:],
        predict_at=torch.arange(first - 1, size - 1, device=ids.device)[None],
        list_index=zero,
        slot=zero,
        grades=mask.float(),
        list_mask=mask,
    )
