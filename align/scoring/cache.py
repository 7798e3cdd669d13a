"""Rewards on disk under the digest of scorer, prompt and completion."""

import hashlib
import logging
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from align.errors import UserError

FILE = "rewards.sqlite"
LOOKUPS = 500
"""Keys of one query; SQLite takes 999 or more."""
ADDED = 10_000
"""Rewards of one transaction, for which every other job waits: a million take half a minute."""
TABLE = "CREATE TABLE IF NOT EXISTS rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE, reward REAL)"
DIGEST = "ALTER TABLE rewards ADD COLUMN digest BLOB"
"""Of a key and its reward; a row that an older version has added has none."""

log = logging.getLogger("align")


class RewardCache:
    """A table that rewards are added to and never changed in, so that its state at some time is a number."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: is made here, so that one that cannot be written is refused before anything is scored.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot hold the cache of rewards ({error.strerror}); give another folder with --cache, or "
                "go without it (--no-cache)"
            ) from None
        self.path = folder / FILE

    def state(self) -> int:
        """How far the table reaches now; a later `read` up to here finds the same rewards again."""
        if not self.path.exists():
            return 0
        with self._open() as table:
            _make(table)  # a kill may have left a file without it
            return int(table.execute("SELECT COALESCE(MAX(id), 0) FROM rewards").fetchone()[0])

    def read(self, keys: Sequence[bytes], state: int) -> dict[bytes, float]:
        """The rewards that were there at a state; damaged ones are said, removed and not among them."""
        if not state or not self.path.exists():
            return {}
        found: dict[bytes, float] = {}
        with self._open() as table:
            _make(table)
            for part in (keys[i : i + LOOKUPS] for i in range(0, len(keys), LOOKUPS)):
                marks = ",".join("?" * len(part))
                query = f"SELECT key, reward, digest FROM rewards WHERE key IN ({marks}) AND id <= ?"
                rows = table.execute(query, (*part, state)).fetchall()
                damaged = [(key,) for key, reward, digest in rows if not _is_whole(key, reward, digest)]
                if damaged:
                    log.warning("%s: %d damaged rewards are computed again", self.path, len(damaged))
                    table.executemany("DELETE FROM rewards WHERE key = ?", damaged)
                found.update((key, reward) for key, reward, _ in rows if (key,) not in damaged)
        return found

    def add(self, rewards: Iterable[tuple[bytes, float]]) -> None:
        """Keep rewards; a key that is there stays as it is. Between two parts other jobs have their turn."""
        left = iter(rewards)
        while part := list(islice(left, ADDED)):
            with self._open() as table:
                _make(table)
                rows = [(key, reward, _digest(key, reward)) for key, reward in part]
                table.executemany("INSERT OR IGNORE INTO rewards (key, reward, digest) VALUES (?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            table = sqlite3.connect(self.path, timeout=120)
            try:
                with table:
                    yield table
            finally:
                table.close()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: the cache of rewards cannot be used ({error}); remove the file, give another folder "
                "with --cache, or go without it (--no-cache)"
            ) from None


def _make(table: sqlite3.Connection) -> None:
    table.execute(TABLE)
    if "digest" not in {column[1] for column in table.execute("PRAGMA table_info(rewards)")}:
        table.execute(DIGEST)


def _digest(key: bytes, reward: float) -> bytes:
    return hashlib.blake2b(key + struct.pack("<d", reward), digest_size=8).digest()


def _is_whole(key: bytes, reward: Any, digest: Any) -> bool:
    return isinstance(reward, float) and digest in (None, _digest(key, reward))


def default_cache_dir() -> Path:
    """Where the cache is unless the user says."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "align" / "rewards"


def reward_key(digest: str, texts: Sequence[str]) -> bytes:
    """The key of a reward: of its scorer's digest and of all texts that it depends on, each told from the next."""
    key = hashlib.sha256(digest.encode())
    for text in texts:
        data = text.encode()
        key.update(len(data).to_bytes(8, "big") + data)
    return key.digest()[:16]
