"""What a frozen model says about whole data sets: computed once, kept on disk under what it depends on."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset

from align.data.steps import micro_batches
from align.disk import check_fits
from align.errors import UserError
from align.model.forward import evaluating
from align.model.policy import Policy
from align.model.probe import tolerance
from align.model.sharding import agreed
from align.model.value_cache import Found, Kind, ValueCache, Values, list_key
from align.progress import progress
from align.types import ListBatch, TokenStats

KEYED = ("prompt_ids", "completion_ids", "learn_at")
BLOCK = 512
"""Lists read into memory at a time."""
SHARD_VALUES = 2**21
OF_A_LIST = 24
"""Bytes of a list's key and length beside its values."""
SHARD_SECONDS = 30.0
"""A part is written after so many values or seconds, whichever comes first: no more than that is lost to a kill."""
CHECKED = 3
"""Lists computed again when cached values are used."""

Block = tuple[list[dict[str, Any]], Sequence[Kind]]
"""Lists of one block, and what is asked of them."""
Spread = Callable[[Iterator[Block]], Iterator[tuple[Block, list[Found]]]]
"""Blocks -> each with its batches' values, as they are finished, in any order."""

log = logging.getLogger(__name__)


def read_lists(
    lists: Dataset,
    policy: Policy,
    *,
    kinds: Sequence[Kind] = ("logprobs",),
    tokens_per_batch: int,
    cache_dir: Path | str | None = None,
    precision: str = "float32",
    label: str = "reference",
    spread: Spread | None = None,
) -> dict[Kind, Values]:
    """What the policy's reference says about lists, by a list's key; one forward pass of a list gives every kind.

    Values are kept in `cache_dir`, by list, under the digest of its token ids and of all else that they depend on: the
    base, the adapter of the reference, dtype, precision, attention, and versions. Whatever else changes reuses them.
    Finished parts survive a kill, and the values after one are bit for bit those of an undisturbed run. Some values
    found there are computed again; if they differ, all are.

    Args:
        lists: with columns prompt_ids, completion_ids, grades and perhaps learn_at; the same on every process, which
            computes its share.
        policy: at its start; under full training without a copy of its initial weights, before the first step.
        kinds: "logprobs": of the completions' learnt tokens, in nats, float32, one completion after the other; "gram":
            inner products of the completions' mean hidden states (CHES is made of them), float64, row by row.
        tokens_per_batch: tokens of a forward pass at most, as the model reads them.
        cache_dir: by default below the user's cache folder.
        precision: autocast of the forward pass: float32, bfloat16 or float16.
        label: beside the progress bar.
        spread: what computes blocks elsewhere, each whole, with `ListReader`; by default they are computed here.

    Source: ours
    """
    cache = ValueCache(cache_dir, kinds, policy.reference_identity() | {"precision": precision})
    work = _Lists(lists, policy, ListReader(policy, tokens_per_batch, precision), spread)
    state = PartialState()
    with cache.alone() if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        return _completed(cache, work, label, state)


def _completed(cache: ValueCache, work: "_Lists", label: str, state: PartialState) -> Found:
    """What the cache holds of these lists, after this group of processes has filled its gaps."""
    stored = cache.read(work.keys)
    if not work.agrees(stored):
        log.warning("%s: cached values differ from the reference's; computing all of them", cache)
        state.wait_for_everyone()
        if state.is_main_process:
            cache.remove()
        stored = {kind: {} for kind in stored}
    state.wait_for_everyone()
    work.check_room(cache, stored)
    cache.create(describe=state.is_main_process)
    _fill(cache, work, stored, label, share=(state.process_index, state.num_processes))
    state.wait_for_everyone()
    stored = cache.read(work.keys)
    _fill(cache, work, stored, "", share=(0, 1))  # what another machine computed onto a disk of its own
    return cache.read(work.keys)


def flat_values(lists: Dataset, stored: Values) -> np.ndarray:
    """Values of all lists, one after the other."""
    values = [stored[_key(row)] for row in _keyed(lists)]
    return np.concatenate(values) if values else np.zeros(0, np.float32)


def _keyed(lists: Dataset) -> Dataset:
    """The columns that a list's key depends on."""
    return lists.select_columns([name for name in KEYED if name in lists.column_names])


def _key(row: Mapping[str, Any]) -> bytes:
    return list_key(row["prompt_ids"], row["completion_ids"], row.get("learn_at"))


class ListReader:
    """A policy's reference, to read blocks of tokenised lists with: in this process, or in one of a cluster."""

    def __init__(self, policy: Policy, tokens_per_batch: int, precision: str) -> None:
        self.policy, self.scorer = policy, policy.scorer()
        self.tokens_per_batch, self.precision = tokens_per_batch, getattr(torch, precision)

    def __call__(self, block: Block) -> list[Found]:
        """All of a block."""
        return list(self.batches(*block))

    @torch.no_grad()
    def batches(
        self, examples: list[dict[str, Any]], kinds: Sequence[Kind], spare: dict[str, Any] | None = None
    ) -> Iterator[Found]:
        """Values of these lists, batch by batch, in another order.

        Args:
            spare: a list for the passes that a process of a sharded model takes for others' sake.
        """
        device = self.policy.model.device
        half = torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
        outputs = ("logprob", "hidden_sum") if "gram" in kinds else ("logprob",)
        parts = micro_batches(examples, tokens_per_batch=self.tokens_per_batch, packed=self.policy.packing)
        parts += [[] for _ in range(agreed(len(parts), self.scorer) - len(parts))]
        for part in parts:
            batch = self.policy.collate(part or [spare])  # type: ignore[list-item]
            with self.policy.reference(), half:
                stats = self.scorer(batch, outputs)
            if not part:
                continue
            keys = [_key(example) for example in part]
            yield {kind: dict(zip(keys, VALUES[kind](stats, batch), strict=True)) for kind in kinds}


class _Lists:
    """Tokenised lists and the policy whose reference reads them."""

    def __init__(self, lists: Dataset, policy: Policy, reader: ListReader, spread: Spread | None) -> None:
        self.lists, self.policy, self.reader, self.spread = lists, policy, reader, spread
        self.keys: list[bytes] = []
        self.widths: list[int] = []
        self.sizes: list[dict[Kind, int]] = []
        """Bytes that a list's values take."""
        for row in _keyed(lists):
            self.keys.append(_key(row))
            lengths = [len(own) for own in row["completion_ids"]]
            self.widths.append(len(row["prompt_ids"]) + max(lengths))
            self.sizes.append({"logprobs": OF_A_LIST + 4 * sum(lengths), "gram": OF_A_LIST + 8 * len(lengths) ** 2})

    def check_room(self, cache: ValueCache, stored: Found) -> None:
        """Refuse to compute what the cache's disk cannot hold.

        Raises:
            UserError: says how much is needed, and how much is free.
        """
        rows = {key: row for row, key in enumerate(self.keys)}
        missing = [self.sizes[row][kind] for kind in stored for key, row in rows.items() if key not in stored[kind]]
        for folder in cache.folders.values():
            check_fits(folder, sum(missing), "the reference's values", "give `reference.cache_dir` another folder")

    def missing(self, stored: Found, share: tuple[int, int]) -> list[list[int]]:
        """Rows to compute, one of each key, in blocks; the longest first, so that a lack of memory shows at once.

        A row's block follows from all lists, not from what is stored, and a block's batches are written whole and in
        order: so those that a kill has left are cut as they would have been without it.

        Args:
            share: a process's number, and how many there are.
        """
        rows = sorted({key: row for row, key in enumerate(self.keys)}.values(), key=lambda row: -self.widths[row])
        number, count = share
        blocks = (rows[start : start + BLOCK * count][number::count] for start in range(0, len(rows), BLOCK * count))
        wanted = ([row for row in block if self._is_missing(row, stored)] for block in blocks)
        return [block for block in wanted if block]

    def _is_missing(self, row: int, stored: Found) -> bool:
        return any(self.keys[row] not in values for values in stored.values())

    def agrees(self, stored: Found) -> bool:
        """Whether a few of the stored values, taken by their keys' order, are what the reference says now."""
        rows = {key: row for row, key in enumerate(self.keys) if any(key in values for values in stored.values())}
        chosen = [rows[key] for key in sorted(rows)[:CHECKED]]
        allowed = tolerance(self.policy.model.dtype, self.reader.precision)
        for batch in list(self.read(chosen, tuple(stored))):  # all, as other processes do
            for kind, values in batch.items():
                for key, own in values.items():
                    if key in stored[kind] and not _close(stored[kind][key], own, kind, allowed):
                        return False
        return True

    def read(self, rows: Sequence[int], kinds: Sequence[Kind]) -> Iterator[Found]:
        """Values of these rows, batch by batch."""
        yield from self.reader.batches(self.lists.select(rows).to_list(), kinds, spare=self.lists[0])

    def compute(self, blocks: Sequence[Sequence[int]], kinds: Sequence[Kind]) -> Iterator[Found]:
        """Values of blocks of rows, batch by batch, here or elsewhere."""
        if self.spread is None:
            for block in blocks:
                yield from self.read(block, kinds)
        else:
            for _, found in self.spread((self.lists.select(block).to_list(), kinds) for block in blocks):
                yield from found


def _logprobs(stats: TokenStats, batch: ListBatch) -> list[np.ndarray]:
    values = stats.logprobs.float()[batch.completion_mask].cpu().numpy()
    sizes = torch.bincount(batch.list_index, weights=batch.completion_mask.sum(dim=1)).long().tolist()
    return np.split(values, np.cumsum(sizes)[:-1])


def _gram(stats: TokenStats, batch: ListBatch) -> list[np.ndarray]:
    assert stats.hidden_sum is not None, "it was asked for"
    means = (stats.hidden_sum / batch.completion_mask.sum(dim=1)[:, None]).cpu()
    sizes = torch.bincount(batch.list_index).tolist()
    return [(own @ own.T).flatten().numpy() for own in means.split(sizes)]


VALUES: dict[Kind, Callable[[TokenStats, ListBatch], list[np.ndarray]]] = {"logprobs": _logprobs, "gram": _gram}
"""Kind -> one array per list of a batch."""


def _close(stored: np.ndarray, own: np.ndarray, kind: Kind, allowed: float) -> bool:
    if stored.shape != own.shape:
        return False
    scale = np.abs(own).max(initial=0) if kind == "gram" else 1.0  # not in nats, but as large as the model makes it
    return bool(np.abs(stored - own).max(initial=0) <= allowed * scale)


def _fill(cache: ValueCache, work: _Lists, stored: Found, label: str, *, share: tuple[int, int]) -> None:
    """Compute a process's share of what is missing, and write it in parts of whole batches."""
    blocks = work.missing(stored, share)
    blocks += [[] for _ in range(agreed(len(blocks), work.reader.scorer) - len(blocks))]
    kinds = tuple(stored)
    part: Found = {kind: {} for kind in kinds}
    size, written = 0, time.monotonic()
    show = bool(label and blocks and share[0] == 0)
    with progress(label, sum(map(len, blocks)), unit="lists", show=show) as advance:
        for batch in work.compute(blocks, kinds):
            for kind in kinds:
                part[kind] |= {key: own for key, own in batch[kind].items() if key not in stored[kind]}
                size += sum(map(len, batch[kind].values()))
            if size >= SHARD_VALUES or time.monotonic() - written > SHARD_SECONDS:
                cache.write(part)
                part, size, written = {kind: {} for kind in kinds}, 0, time.monotonic()
            advance(len(batch[kinds[0]]))
    cache.write(part)


@torch.no_grad()
def check_reference_identity(policy: Policy, batch: ListBatch) -> None:
    """Before the first step, policy and reference must give the same log-probabilities, dropout aside.

    Raises:
        RuntimeError: they do not.
        UserError: they do not, with an adapter by PEFT's own keys.
    """
    scorer = policy.scorer()
    with evaluating(scorer):
        own = scorer(batch).logprobs
        with policy.reference():
            reference = scorer(batch).logprobs
    difference = (own - reference).abs().max().item()
    if not difference <= tolerance(policy.model.dtype):
        if policy.adapter == "peft":
            raise UserError(
                f"policy.adapter: it does not start as the base does (tokens differ by {difference:.2g} nats): set its "
                "type's key for that, such as `init_weights: true`, or take another type"
            )
        raise RuntimeError(
            f"before the first step policy and reference differ by {difference:.2g} nats on a token, with adapter "
            f"{policy.adapter}: the implicit rewards would not start at zero"
        )
