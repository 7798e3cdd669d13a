"""Rewards on disk under the digest of scorer, prompt and completion."""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align.errors import UserError

FILE = "rewards.sqlite"
LOOKUPS = 500
"""Keys of one query; SQLite takes 999 or more."""
TABLE = "CREATE TABLE IF NOT EXISTS rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE, reward REAL)"


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
            table.execute(TABLE)  # a kill may have left a file without it
            return int(table.execute("SELECT COALESCE(MAX(id), 0) FROM rewards").fetchone()[0])

    def read(self, keys: Sequence[bytes], state: int) -> dict[bytes, float]:
        """The rewards that were there at a state."""
        if not state or not self.path.exists():
            return {}
        found: dict[bytes, float] = {}
        with self._open() as table:
            for part in (keys[i : i + LOOKUPS] for i in range(0, len(keys), LOOKUPS)):
                marks = ",".join("?" * len(part))
                query = f"SELECT key, reward FROM rewards WHERE key IN ({marks}) AND id <= ?"
                found.update(table.execute(query, (*part, state)).fetchall())
        return found

    def add(self, rewards: Iterable[tuple[bytes, float]]) -> None:
        """Keep rewards; a key that is there stays as it is."""
        with self._open() as table:
            table.execute(TABLE)
            table.executemany("INSERT OR IGNORE INTO rewards (key, reward) VALUES (?, ?)", rewards)

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
