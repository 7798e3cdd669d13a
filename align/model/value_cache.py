"""What a frozen model has said about lists, on disk: by list, under all that it depends on."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load, save

from align.files import replaced, write_json
from align.locks import in_turn
from align.model.identity import Identity, short_digest

Kind = Literal["logprobs", "gram"]
Values = dict[bytes, np.ndarray]
"""A list's key -> its values of one kind."""
Found = dict[Kind, Values]

log = logging.getLogger(__name__)


class ValueCache:
    """A folder for each kind of value, of parts that are whole or absent."""

    def __init__(self, root: Path | str | None, kinds: Sequence[Kind], identity: Identity) -> None:
        """Args:
        root: by default below the user's cache folder.
        identity: all that the values depend on besides token ids.
        """
        self.identities = {kind: identity if kind == "logprobs" else identity | {"values": kind} for kind in kinds}
        place = Path(root or default_cache_dir()).expanduser()
        self.folders = {kind: place / short_digest(own) for kind, own in self.identities.items()}

    def __str__(self) -> str:
        return ", ".join(map(str, self.folders.values()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait while another process fills or removes the same folders; the locks stand beside them."""
        with ExitStack() as held:
            for folder in sorted(self.folders.values()):
                held.enter_context(in_turn(folder.with_suffix(".lock"), work=f"computes values into {folder}"))
            yield

    def read(self, keys: Sequence[bytes]) -> Found:
        """What is stored for these keys."""
        return {kind: _read(folder, keys) for kind, folder in self.folders.items()}

    def write(self, part: Found) -> None:
        """Keep some lists' values."""
        for kind, values in part.items():
            if values:
                _write(self.folders[kind], values)

    def create(self, *, describe: bool) -> None:
        """Make the folders; one process describes what their values depend on."""
        for kind, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            if describe:
                write_json(folder / "identity.json", self.identities[kind], indent=1)

    def remove(self) -> None:
        """Forget all values."""
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def default_cache_dir() -> Path:
    """Where the cache is unless the recipe says."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "align" / "reference"


def list_key(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[Sequence[int]],
    learn_at: Sequence[Sequence[int]] | None = None,
) -> bytes:
    """16 bytes that stand for a list's token ids and for which of them are learnt, where that is not all."""
    holes = learn_at is not None and [*map(len, learn_at)] != [*map(len, completion_ids)]
    digest = hashlib.blake2b(digest_size=16, person=b"learn_at" if holes else b"")
    for ids in (prompt_ids, *completion_ids, *(learn_at or () if holes else ())):
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(np.asarray(ids, dtype=np.int32).tobytes())
    return digest.digest()


def _write(folder: Path, part: Values) -> None:
    tensors = {
        "keys": np.frombuffer(b"".join(part), dtype=np.uint8).reshape(len(part), -1),
        "sizes": np.array([len(values) for values in part.values()]),
        "values": np.concatenate(list(part.values())),
    }
    content = save(tensors)
    with replaced(folder / f"{_digest(content)}.safetensors") as temporary:
        temporary.write_bytes(content)


def _read(folder: Path, keys: Sequence[bytes]) -> Values:
    wanted = set(keys)
    found: Values = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # another process has found it damaged
            continue
        if _digest(content) != file.stem:
            log.warning("%s is damaged (its name is not its digest); it is removed, and computed again", file)
            file.unlink(missing_ok=True)
            continue
        tensors = load(content)
        parts = np.split(tensors["values"], np.cumsum(tensors["sizes"])[:-1])
        found |= {k: v for key, v in zip(tensors["keys"], parts, strict=True) if (k := key.tobytes()) in wanted}
    return found


def _digest(content: bytes) -> str:
    """What a part is called, so that damage shows."""
    return hashlib.sha256(content).hexdigest()
