"""Hidden states of many token sequences from a decoder, each the same alone or in any batch."""

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from align.packing import ATTENTION, Tree
from align.packing.attention import unread_layers
from align.packing.rope import fix_frequencies, regimes, sequence_length
from align.packing.states import leave_trees, take_trees, telling, with_state
from align.packing.trie import grow
from rewards.texts import common_prefix

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far packed and separate hidden states may differ, relative to the largest; coarser for other dtypes."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads, which sequences are in it, and where it has their tokens."""

    inputs: dict[str, Any]
    members: list[int]
    rows: list[Int[Tensor, " L"]]
    """Of every member, flat indices of its tokens."""


class Backbone:
    """A decoder without its head, run over sequences that may share their beginnings."""

    def __init__(self, decoder: PreTrainedModel, *, name: str, tokens_per_batch: int, exact: bool) -> None:
        self.decoder = decoder
        self.tokens_per_batch = tokens_per_batch
        self.exact = exact
        fix_frequencies(decoder, name=name)
        self.packs = not exact and _takes_packed_rows(decoder, name)

    def states(
        self, sequences: Sequence[list[int]], groups: Sequence[Hashable], places: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "P H"]]]:
        """Hidden states at chosen positions, batch by batch.

        Args:
            sequences: token ids, each with at least one token.
            groups: sequences with the same key are run as one list: what they share at their beginning, once.
            places: of each sequence, the positions wanted.

        Yields:
            Which sequences the batch held, and the states at their places one after another. Every sequence comes
            once; the order follows from the sequences alone.
        """
        for batch in self._batches(sequences, groups):
            lengths = torch.tensor([len(sequences[member]) for member in batch.members])
            for length, numbers in regimes(self.decoder, lengths) or [(0, torch.arange(len(lengths)))]:
                with sequence_length(length):
                    hidden = _hidden(self.decoder, batch)
                members = [batch.members[n] for n in numbers.tolist()]
                wanted = [batch.rows[n][list(places[batch.members[n]])] for n in numbers.tolist()]
                yield members, hidden.flatten(0, 1)[torch.cat(wanted)]

    def _batches(self, sequences: Sequence[list[int]], groups: Sequence[Hashable]) -> Iterator[Batch]:
        if self.packs:
            yield from _packed_batches(sequences, groups, self.tokens_per_batch)
        else:
            parts = batches_by_length(sequences, self.tokens_per_batch, exact=self.exact)
            yield from (_padded(sequences, part) for part in parts)


def batches_by_length(rows: Sequence[list[int]], tokens_per_batch: int, *, exact: bool) -> Iterator[list[int]]:
    """Indices in batches of similar length whose rows times longest row stay within the budget; longest first.

    Args:
        exact: every row is a batch alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch and (exact or (len(batch) + 1) * len(rows[batch[0]]) > tokens_per_batch):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def right_padded(
    rows: Sequence[list[int]], pad_id: int, device: torch.device | None = None
) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Rows filled up to the longest, and the mask that says where they are filled with 0."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)


def _padded(sequences: Sequence[list[int]], members: list[int]) -> Batch:
    """Right-padded rows; attention is causal, so nothing that counts can see the padding."""
    ids, _ = right_padded([sequences[i] for i in members], 0)
    width = ids.shape[1]
    rows = [torch.arange(r * width, r * width + len(sequences[i])) for r, i in enumerate(members)]
    return Batch({"input_ids": ids}, members, rows)


Bunch = tuple[int, list[int]]
"""How many tokens some sequences share, and which they are, the longest first."""


def _packed_batches(
    sequences: Sequence[list[int]], groups: Sequence[Hashable], tokens_per_batch: int
) -> Iterator[Batch]:
    batch: list[Bunch] = []
    used = 0
    for bunch in _bunches(sequences, groups, tokens_per_batch):
        size = _size(bunch, sequences)
        if batch and used + size > tokens_per_batch:
            yield _packed(sequences, batch)
            batch, used = [], 0
        batch.append(bunch)
        used += size
    if batch:
        yield _packed(sequences, batch)


def _bunches(sequences: Sequence[list[int]], groups: Sequence[Hashable], tokens_per_batch: int) -> Iterator[Bunch]:
    """Groups by their shared beginning, cut where one would leave the budget."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    for own in members.values():
        shortest = min(len(sequences[i]) for i in own)
        shared = min(common_prefix([sequences[i] for i in own]), shortest - 1)
        if not shared:  # also a lone sequence of one token
            yield from ((0, [i]) for i in own)
            continue
        part: list[int] = []
        for i in sorted(own, key=lambda i: -len(sequences[i])):
            if part and _size((shared, [*part, i]), sequences) > tokens_per_batch:
                yield shared, part
                part = []
            part.append(i)
        yield shared, part


def _size(bunch: Bunch, sequences: Sequence[list[int]]) -> int:
    shared, own = bunch
    return shared + sum(len(sequences[i]) - shared for i in own)


def _packed(sequences: Sequence[list[int]], bunches: Sequence[Bunch]) -> Batch:
    """One row in which what sequences begin with stands once; positions restart where they part."""
    members = [i for _, own in bunches for i in own]
    trie = grow([sequences[i] for i in members], [number for number, (_, own) in enumerate(bunches) for _ in own])
    inputs = {
        "input_ids": torch.tensor([trie.tokens]),
        "position_ids": trie.positions[None],
        # A mask of four dimensions is passed on as it is, so no mask over the whole row is built; ours reads `tree`.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "tree": Tree(trie.branches),
    }
    return Batch(inputs, members, trie.rows)


def _hidden(decoder: PreTrainedModel, batch: Batch) -> Float[Tensor, "R T H"]:
    inputs = {n: value.to(decoder.device) if isinstance(value, Tensor) else value for n, value in batch.inputs.items()}
    with telling(decoder, batch.inputs.get("tree")):
        return decoder(**inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def _takes_packed_rows(decoder: PreTrainedModel, name: str) -> bool:
    """Switch to attention that knows packed rows; if hidden states change, switch back and say why."""
    attention = decoder.config.get_text_config()._attn_implementation
    problem = f"there is no packed form of attention {attention}"
    if attention in ATTENTION:
        problem = _problem(decoder, attention)
    if problem:
        logger.warning("%s: completions of one prompt run as separate rows, since %s", name, problem)
    return not problem


def _problem(decoder: PreTrainedModel, attention: str) -> str:
    vocabulary = decoder.config.get_text_config().vocab_size
    ids = [(7 * i + 1) % vocabulary for i in range(24)]
    sequences = [ids[:3] + ids[3:5], ids[:3] + ids[5:10], ids[10:12] + ids[12:16]]

    def states(batch: Batch) -> Tensor:
        return _hidden(decoder, batch).flatten(0, 1)[torch.cat(batch.rows)]

    expected = torch.cat([states(_padded(sequences, [i])) for i in (1, 0, 2)])
    batch = _packed(sequences, [(3, [1, 0]), (2, [2])])
    take_trees(decoder)
    try:
        decoder.set_attn_implementation(ATTENTION[attention])
        found = states(batch)
        limit = TOLERANCE.get(expected.dtype, 0.05) * expected.abs().max().item()
        difference = (found - expected).abs().max().item()
        problem = unread_layers(batch.inputs["tree"], decoder, with_state(decoder))
        if not difference <= limit:
            problem = f"packed, its hidden states differ by {difference:.2g}"
    except Exception as error:  # whatever a model's own code makes of arguments that it does not know
        problem = f"its code does not take packed rows ({type(error).__name__})"
    if problem:
        leave_trees(decoder)
        decoder.set_attn_implementation(attention)
    return problem
