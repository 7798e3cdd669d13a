"""What is verified on the model itself before the first step."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.data.windows import in_rows, windows
from align.errors import UserError
from align.model.forward import base_model, evaluating, score_tokens
from align.model.load import first_line
from align.model.probe import probe_lists, tolerance
from align.packing.batch import collate
from align.packing.rope import sequence_length
from align.types import ListBatch
from rewards.broken import why_not_finite
from rewards.logits import decoder_of
from rewards.positions import table_size

log = logging.getLogger("align")

PROMISE = 1e-5
"""Nats of a token's log-probability, in float32, by which ours may differ from a model's own."""
LARGE_LOGIT = 60.0
HEAD_ROWS = 64


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
    for window in _token_windows(parts):
        for source, row, prompt, completions in in_rows(window):
            if (largest := max(chain(prompt, *completions))) >= size:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UserError(
                    f"{source}, row {row}: token {token!r} ({largest}) is not among the model's {size}; save the model "
                    "with resized embeddings (resize_token_embeddings), or take its own tokenizer"
                )


def check_fits(model: nn.Module, parts: Sequence[Dataset]) -> None:
    """Refuse rows that are longer than a model's table of positions.

    Raises:
        UserError: names the row.
    """
    table = table_size(base_model(model))
    if table is None:
        return
    for window in _token_windows(parts):
        for source, row, prompt, completions in in_rows(window):
            if (longest := len(prompt) + max(map(len, completions))) > table:
                raise UserError(
                    f"{source}, row {row}: {longest} tokens are beyond the {table} positions of the model; set "
                    f"`max_length` to {table} or less"
                )


def _token_windows(parts: Sequence[Dataset]) -> Iterator[pa.Table]:
    return chain.from_iterable(windows(part, "source", "row", "prompt_ids", "completion_ids") for part in parts)


@torch.no_grad()
def check_forward(base: PreTrainedModel, *, name: str) -> None:
    """Compare our log-probabilities on a padded batch with the model's own logits.

    Once on a row alone, in the model's dtype; and once on the same batch with the LM head in float32 and hidden states
    so large that a scale or soft-cap of the logits, which small ones hardly show, is seen.

    Raises:
        UserError: they differ, so the model's head is not a plain one or what follows a text is not inert in it.
    """
    ids = torch.arange(1, 9, device=base.device) % base.config.get_text_config().vocab_size
    batch = _padded(ids, first=3)
    try:
        with evaluating(base):
            alone = base(input_ids=ids[None], use_cache=False).logits[0, 2:-1].float()
            body = _difference(score_tokens(base, batch).logprobs, alone, ids[3:])
            with _large_logits(base), sequence_length(len(ids)):
                own = base(input_ids=batch.input_ids, use_cache=False).logits[0, 2 : len(ids) - 1].float()
                head = _difference(score_tokens(base, batch).logprobs, own, ids[3:])
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        raise UserError(
            f"{name} ({base.config.model_type}) is not built as a decoder with a linear LM head on it, so it cannot be "
            f"trained here ({type(error).__name__}: {first_line(error)}); another architecture is needed"
        ) from error
    if broken := why_not_finite(base, head + body):
        raise UserError(f"{name}: {broken}")
    if not head <= PROMISE * max(1.0, own.abs().max().item() / 10):
        raise UserError(
            f"{name} ({base.config.model_type}) computes logits in a way that is not supported: its own "
            f"log-probabilities and ours differ by {head:.2g}; another architecture is needed"
        )
    if not body <= tolerance(base.dtype):
        raise UserError(
            f"{name} ({base.config.model_type}) is not supported: its log-probabilities of a text move by {body:.2g} "
            "with what follows it or is beside it; a causal language model is needed"
        )


@torch.no_grad()
def check_training_mode(base: PreTrainedModel, *, name: str) -> None:
    """Warn of a model that computes otherwise while it trains, although its dropout is off."""
    batch = collate(probe_lists(base), pad_id=0).to(base.device)
    with evaluating(base), torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        expected = score_tokens(base, batch).logprobs
        base.train()
        difference = (score_tokens(base, batch).logprobs - expected).abs().max().item()
    if not difference <= tolerance(base.dtype):
        log.warning(
            "%s (%s) computes otherwise in training mode, by %.2g nats a token (PhiMoE, for one, draws its experts): "
            "what is trained differs by so much from what is measured",
            name,
            base.config.model_type,
            difference,
        )


def _difference(ours: Tensor, logits: Float[Tensor, "T V"], targets: Int[Tensor, " T"]) -> float:
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).T
    return (ours - expected).abs().max().item()


@contextmanager
def _large_logits(base: PreTrainedModel) -> Iterator[None]:
    """The first rows of the LM head in float32, on hidden states scaled so that logits reach LARGE_LOGIT."""
    head: Any = base.get_output_embeddings()
    few: Any = nn.Linear(1, 1, device="meta")
    few.weight = nn.Parameter(head.weight[:HEAD_ROWS].float(), requires_grad=False)
    few.bias = None if head.bias is None else nn.Parameter(head.bias[:HEAD_ROWS].float(), requires_grad=False)
    factors: list[float] = []

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state.float()
        factors.append(LARGE_LOGIT / max((hidden @ few.weight.T).abs().max().item(), 1e-9))
        output.last_hidden_state = hidden * factors[0]
        return output

    hook = decoder_of(base).register_forward_hook(enlarge)
    try:
        base.set_output_embeddings(few)
        yield
    finally:
        base.set_output_embeddings(head)
        hook.remove()


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
        ends_at=zero + size - 1,
        list_index=zero,
        slot=zero,
        grades=mask.float(),
        list_mask=mask,
    )
