"""The reference's log-probabilities of whole data sets: computed once, kept on disk under what they depend on."""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, List, Value
from datasets.fingerprint import Hasher
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from align.data.steps import micro_batches
from align.model.checks import tolerance
from align.model.forward import TokenScorer
from align.model.identity import short_digest
from align.model.policy import Policy
from align.progress import progress

Values = dict[bytes, np.ndarray]
"""A list's key -> the log-probabilities of its completions' tokens, one completion after the other."""

COLUMN = "reference_logprobs"
BLOCK = 512
"""Lists read into memory at a time."""
SHARD_VALUES = 2**21
SHARD_SECONDS = 60.0
"""A part is written after so many values or seconds, whichever comes first: no more than that is lost to a kill."""
CHECKED = 3
"""Lists computed again when cached values are used."""

log = logging.getLogger(__name__)


def attach_reference(
    lists: Dataset,
    policy: Policy,
    *,
    tokens_per_batch: int,
    cache_dir: Path | str | None = None,
    precision: str = "float32",
) -> Dataset:
    """The lists with a column `reference_logprobs`: log p_reference of every completion's tokens, in nats, float32.

    Values are kept in `cache_dir`, by list, under the digest of its token ids and of all else that they depend on: the
    base, the adapter of the reference, dtype, precision, attention, and versions. Whatever else changes reuses them.
    Finished parts survive a kill. Some values found there are computed again; if they differ, all are.

    Args:
        lists: with columns prompt_ids, completion_ids, grades; the same on every process, which computes its share.
        policy: at its start; under full training without a copy of its initial weights, before the first step.
        tokens_per_batch: tokens of a forward pass at most, as the model reads them.
        cache_dir: by default below the user's cache folder.
        precision: autocast of the forward pass: float32, bfloat16 or float16.

    Source: ours
    """
    identity = policy.reference_identity() | {"precision": precision}
    folder = Path(cache_dir or default_cache_dir()).expanduser() / short_digest(identity)
    work = _Lists(lists, policy, tokens_per_batch, precision)
    state = PartialState()
    stored = _read(folder, work.keys)
    if stored and not work.agrees(stored):
        log.warning("%s: cached reference log-probabilities differ from the reference; computing all of them", folder)
        stored = {}
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folder)
    state.wait_for_everyone()
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        (folder / "identity.json").write_text(json.dumps(identity, indent=1))
    missing = work.missing(stored)
    _fill(folder, work, missing[state.process_index :: state.num_processes], show=state.is_main_process)
    state.wait_for_everyone()
    stored = _read(folder, work.keys)
    _fill(folder, work, work.missing(stored), show=False)  # what another machine computed onto a disk of its own
    return work.with_column(stored | _read(folder, work.keys))


def default_cache_dir() -> Path:
    """Where the cache is unless the recipe says."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "align" / "reference"


def list_key(prompt_ids: Sequence[int], completion_ids: Sequence[Sequence[int]]) -> bytes:
    """16 bytes that stand for a list's token ids."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt_ids, *completion_ids):
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(np.asarray(ids, dtype=np.int32).tobytes())
    return digest.digest()


class _Lists:
    """Tokenised lists and the policy whose reference reads them."""

    def __init__(self, lists: Dataset, policy: Policy, tokens_per_batch: int, precision: str) -> None:
        self.lists = lists
        self.policy = policy
        self.scorer = TokenScorer(policy)
        self.tokens_per_batch = tokens_per_batch
        self.precision = getattr(torch, precision)
        self.keys: list[bytes] = []
        self.widths: list[int] = []
        for row in lists.select_columns(["prompt_ids", "completion_ids"]):
            self.keys.append(list_key(row["prompt_ids"], row["completion_ids"]))
            self.widths.append(len(row["prompt_ids"]) + max(map(len, row["completion_ids"])))

    def missing(self, stored: Values) -> list[int]:
        """Rows to compute, one of each key; the longest first, so that a lack of memory shows at once."""
        rows = {key: row for row, key in enumerate(self.keys) if key not in stored}
        return sorted(rows.values(), key=lambda row: -self.widths[row])

    def agrees(self, stored: Values) -> bool:
        """Whether a few of the stored values, taken by their keys' order, are what the reference says now."""
        rows = {key: row for row, key in enumerate(self.keys) if key in stored}
        chosen = [rows[key] for key in sorted(rows)[:CHECKED]]
        allowed = tolerance(self.policy.model.dtype, self.precision)
        return all(
            stored[key].shape == values.shape and np.abs(stored[key] - values).max(initial=0) <= allowed
            for key, values in self.compute(chosen)
        )

    @torch.no_grad()
    def compute(self, rows: Sequence[int]) -> Iterator[tuple[bytes, np.ndarray]]:
        """Key and values of each of these rows, in another order."""
        device = self.policy.model.device
        half = torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
        for start in range(0, len(rows), BLOCK):
            examples = self.lists.select(rows[start : start + BLOCK]).to_list()
            packed = self.policy.packing
            for part in micro_batches(examples, tokens_per_batch=self.tokens_per_batch, packed=packed):
                batch = self.policy.collate(part)
                with self.policy.reference(), half:
                    logprobs = self.scorer(batch).logprobs.float()
                values = logprobs[batch.completion_mask].cpu().numpy()
                sizes = [sum(map(len, example["completion_ids"])) for example in part]
                for example, own in zip(part, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
                    yield list_key(example["prompt_ids"], example["completion_ids"]), own

    def with_column(self, stored: Values) -> Dataset:
        """The lists with their values, as lists of completions' lists."""
        completions = self.lists.select_columns(["completion_ids"])
        lengths = [[len(ids) for ids in row["completion_ids"]] for row in completions]
        flat = np.concatenate([stored[key] for key in self.keys]) if self.keys else np.zeros(0, np.float32)
        inner = pa.ListArray.from_arrays(_offsets([n for row in lengths for n in row]), pa.array(flat))
        outer = pa.ListArray.from_arrays(_offsets([len(row) for row in lengths]), inner)
        fingerprint = Hasher.hash([self.lists._fingerprint, hashlib.sha256(flat.tobytes()).hexdigest()])
        return self.lists.add_column(COLUMN, outer, new_fingerprint=fingerprint, feature=List(List(Value("float32"))))


def _fill(folder: Path, work: _Lists, rows: Sequence[int], *, show: bool) -> None:
    """Compute rows and write them in parts."""
    part: Values = {}
    size, written = 0, time.monotonic()
    with progress("reference", len(rows), unit="lists", show=show and bool(rows)) as advance:
        for key, values in work.compute(rows):
            part[key] = values
            size += len(values)
            if size >= SHARD_VALUES or time.monotonic() - written > SHARD_SECONDS:
                _write(folder, part)
                part, size, written = {}, 0, time.monotonic()
            advance()
    _write(folder, part)


def _write(folder: Path, part: Values) -> None:
    if not part:
        return
    name = uuid.uuid4().hex
    tensors = {
        "keys": np.frombuffer(b"".join(part), dtype=np.uint8).reshape(len(part), -1),
        "sizes": np.array([len(values) for values in part.values()]),
        "values": np.concatenate(list(part.values())),
    }
    save_file(tensors, folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / f"{name}.safetensors")


def _read(folder: Path, keys: Sequence[bytes]) -> Values:
    """What is stored for these keys."""
    wanted = set(keys)
    found: Values = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(file)
        except SafetensorError:
            log.warning("%s is damaged; it is removed, and what it held is computed again", file)
            file.unlink(missing_ok=True)
            continue
        parts = np.split(tensors["values"], np.cumsum(tensors["sizes"])[:-1])
        found |= {k: v for key, v in zip(tensors["keys"], parts, strict=True) if (k := key.tobytes()) in wanted}
    return found


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
