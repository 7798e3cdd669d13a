"""Encoders over the texts of padded rows alone: padding goes before the first layer and comes back behind the last."""

import logging
from collections.abc import Sequence
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

log = logging.getLogger(__name__)

NAME = "texts_sdpa"
"""transformers' sdpa, which is told a row's texts."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far packed and separate states may differ, relative to the largest; coarser for other dtypes."""
PROBE = (5, 12, 5, 2)
"""Tokens of the texts that a model is compared with itself on."""


class Texts:
    """Which texts follow one another in a row, told to every layer's attention by the keyword `texts`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Args:
        sizes: tokens of each text.
        """
        self.runs = [(size, len(list(own))) for size, own in groupby(sizes)]
        """Texts of one size that are neighbours: their size, and how many."""
        self.told: list[int | None] = []
        """The sliding window of every attention call so far."""


def texts_sdpa(
    module: nn.Module,
    query: Float[Tensor, "R H T D"],
    key: Float[Tensor, "R H T D"],
    value: Float[Tensor, "R H T D"],
    attention_mask: Tensor | None,
    texts: Texts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, or over a row of texts the same within each: one call for all neighbours of one size."""
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    texts.told.append(window)
    found, start = [], 0
    for size, count in texts.runs:
        stop = start + size * count
        q, k, v = (x[0, :, start:stop].unflatten(1, (count, size)).transpose(0, 1) for x in (query, key, value))
        seen = None if window is None or window >= size else _near(size, window, query.device)
        found.append(sdpa_attention_forward(module, q, k, v, seen, **options)[0].flatten(0, 1))
        start = stop
    return torch.cat(found)[None], None


def _near(size: int, window: int, device: torch.device) -> Bool[Tensor, "1 1 L L"]:
    """Whether two places are less than a window apart, to either side."""
    place = torch.arange(size, device=device)
    return ((place[:, None] - place).abs() < window)[None, None]


AttentionInterface.register(NAME, texts_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_unpadding(encoder: PreTrainedModel, *, name: str) -> bool:
    """Let an encoder compute the tokens alone of rows that it is given padded, if its results are then the same.

    Its inputs and outputs stay what they were, but that states of padding are 0, so whatever reads them (poolers,
    heads) needs not know.

    Args:
        encoder: a model without its head, whose attention is transformers' sdpa.
        name: what a message calls it.

    Returns:
        Whether they are; if not, the model is left as it was, and one line says why.

    Source: ours; the idea is ModernBERT's (arXiv:2412.13663, section 2.1.2)
    """
    attention = encoder.config._attn_implementation
    problem = f"there is no packed form of attention {attention}"
    if attention == "sdpa":
        problem = _problem(encoder)
    if problem:
        log.warning("%s (%s): texts run as padded rows, since %s", name, encoder.config.model_type, problem)
    return not problem


@torch.no_grad()
def _problem(encoder: PreTrainedModel) -> str:
    """Switch to packed texts; if results change, switch back and say how."""
    training = encoder.training
    encoder.eval()
    ids, mask = _probe(encoder)
    flat, texts = _laid(mask)
    try:
        alone = [
            encoder(row[own][None], attention_mask=own[own][None].long()) for row, own in zip(ids, mask, strict=True)
        ]
        expected = torch.cat([*(output.last_hidden_state[0] for output in alone), *map(_pooled, alone)])
        encoder.set_attn_implementation(NAME)
        output = _read(encoder, ids, flat, texts, {})
        found = torch.cat([output.last_hidden_state[mask], _pooled(output)])
        problem = _unread(encoder, texts)
        difference = (found - expected).abs().max().item()
        if not difference <= TOLERANCE.get(expected.dtype, 0.05) * expected.abs().max().item():
            problem = f"packed, its states differ by {difference:.2g}"
    except Exception as error:  # whatever a model's own code makes of arguments that it does not know
        problem = f"its code does not take packed rows ({type(error).__name__})"
    if problem:
        encoder.set_attn_implementation("sdpa")
    else:
        encoder.forward = MethodType(_over_texts, encoder)  # type: ignore[method-assign]
    encoder.train(training)
    return problem


def _probe(encoder: PreTrainedModel) -> tuple[Int[Tensor, "R T"], Bool[Tensor, "R T"]]:
    """Texts of few tokens, none of which is the padding token's, in padded rows."""
    pad = encoder.config.pad_token_id
    usable = torch.tensor([i for i in range(encoder.config.vocab_size) if i != pad][: len(PROBE) * max(PROBE)])
    ids = usable[torch.arange(len(PROBE) * max(PROBE)) * 7 % len(usable)].view(len(PROBE), -1)
    mask = torch.arange(max(PROBE)) < torch.tensor(PROBE)[:, None]
    return ids.to(encoder.device), mask.to(encoder.device)


def _pooled(output: Any) -> Float[Tensor, "R H"]:
    """What an encoder's own pooler makes of its rows' states; no rows where it has none."""
    pooled = output.get("pooler_output")
    return output.last_hidden_state[:0, 0] if pooled is None else pooled


def _unread(encoder: PreTrainedModel, texts: Texts) -> str:
    """What a pass has shown of layers that it did not reach, or whose window it was not told; empty where none."""
    config: Any = encoder.config
    if len(texts.told) != config.num_hidden_layers:
        return "not all of its layers use transformers' attention interface"
    sliding = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    if sum(window is not None for window in texts.told) != sliding:
        return "its layers do not tell attention their window"
    return ""


def _over_texts(self: Any, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
    """The class's own forward over the texts of padded rows alone; rows without padding it reads as they are."""
    if input_ids is None or attention_mask is None or bool(attention_mask.all()):
        return type(self).forward(self, input_ids, attention_mask=attention_mask, **given)
    return _read(self, input_ids, *_laid(attention_mask.bool()), given)


def _laid(mask: Bool[Tensor, "R T"]) -> tuple[Int[Tensor, " N"], Texts]:
    """Which of the flattened rows' tokens count, text by text, and those of one size as neighbours."""
    sizes = mask.sum(1)
    order = sizes.argsort(stable=True)
    places = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return places[order][mask[order]], Texts(sizes[order].tolist())


def _read(
    encoder: Any, input_ids: Int[Tensor, "R T"], flat: Int[Tensor, " N"], texts: Texts, given: dict[str, Any]
) -> Any:
    """What the class's own forward makes of one row of texts, put back into the rows that they come from."""
    inputs = {"input_ids": input_ids, "position_ids": _positions(encoder, input_ids)}
    inputs |= {name: value for name, value in given.items() if value is not None}
    own = {
        name: value.flatten(0, 1)[flat][None] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }  # fmt: skip
    # A mask of four dimensions is passed on as it is, so no mask over the whole row is built; ours reads `texts`.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    output = type(encoder).forward(encoder, **own, attention_mask=unread, texts=texts)
    hidden = output.last_hidden_state[0]
    # Not a masked copy: its backward pass cannot be made deterministic on a GPU.
    rows = hidden.new_zeros(input_ids.numel(), hidden.shape[1]).index_put((flat,), hidden).view(*input_ids.shape, -1)
    output.last_hidden_state = rows
    if output.get("pooler_output") is not None:
        output.pooler_output = encoder.pooler(rows)
    return output


def _positions(encoder: nn.Module, input_ids: Int[Tensor, "R T"]) -> Int[Tensor, "R T"]:
    """Places as the model itself counts them in padded rows: RoBERTa's begin behind the padding token's id."""
    count = "create_position_ids_from_input_ids"
    of_table: Any = next((module for module in encoder.modules() if hasattr(module, count)), None)
    if of_table is not None:
        return of_table.create_position_ids_from_input_ids(input_ids, of_table.padding_idx)
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
