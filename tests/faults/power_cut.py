"""What a power cut may leave: a file system that forgets what was not synced, watched while a command runs.

A file's content is safe once the file was synced, a name once its folder was. Before every sync, rename, removal and
new folder of this process the states that a cut could leave now are built and shown to a check; what libraries write
between two of them shows up as content and names that were never synced.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir")
Entries = dict[str, tuple[int, bool]]
"""Name -> inode, and whether it is a folder."""
LOST: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "written": lambda content: content,
}
"""What becomes of content that was not synced."""


class PowerCut:
    """Watches a folder; `look` is called with the name of a state and a folder that holds it."""

    def __init__(self, root: Path, scratch: Path, look: Callable[[str, Path], None], *, every: int = 1) -> None:
        """Args:
        every: of the moments, this many are passed by for each that is looked at.
        """
        self.root, self.scratch, self.look, self.every = root, scratch, look, every
        self.content: dict[int, bytes] = {}
        self.entries: dict[int, Entries] = {}
        self.held: dict[int, int] = {}
        """Open files, so that no inode is used again."""
        self.moments = 0
        self.building = False

    def __enter__(self) -> "PowerCut":
        self._stack = ExitStack()
        for name in CALLS:
            self._stack.enter_context(patch.object(os, name, self._watched(name, getattr(os, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for descriptor in self.held.values():
            os.close(descriptor)

    def _watched(self, name: str, call: Any) -> Any:
        @wraps(call)
        def watched(*given: Any, **keywords: Any) -> Any:
            self._moment()
            if name == "fsync" and not self.building:
                return self._synced(given[0])
            return call(*given, **keywords)

        return watched

    def _synced(self, descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not place.is_relative_to(self.root):
            return
        inode = self._hold(place)
        if place.is_dir():
            self.entries[inode] = _entries(place)
            for name in self.entries[inode]:
                self._hold(place / name)
        else:
            self.content[inode] = place.read_bytes()

    def _hold(self, place: Path) -> int:
        inode = place.stat().st_ino
        if inode not in self.held:
            self.held[inode] = os.open(place, os.O_RDONLY)
        return inode

    def _moment(self) -> None:
        if self.building:
            return
        self.moments += 1
        if self.moments % self.every:
            return
        self.building = True
        for name, names, lost in self._states():
            self.scratch.mkdir()
            self._build(self.root.stat().st_ino, self.scratch, names, lost)
            self.look(f"moment {self.moments}, {name}", self.scratch)
            shutil.rmtree(self.scratch)
        self.building = False

    def _states(self) -> Iterator[tuple[str, dict[int, Entries], Callable[[bytes], bytes]]]:
        """Every name as it was synced, as it is, or as it is in one folder alone; and what content is lost."""
        now, safe = _tree(self.root), dict(self.entries)
        top = self.root.stat().st_ino
        safe[top] = safe.get(top, now[top])
        yield "no name", safe, LOST["empty"]
        for kind, lost in LOST.items():
            yield f"every name, {kind}", safe | now, lost
        for inode, own in now.items():
            if own != safe.get(inode, {}):
                yield "names of one folder", safe | {inode: own}, LOST["zeroed"]

    def _build(self, inode: int, place: Path, names: dict[int, Entries], lost: Callable[[bytes], bytes]) -> None:
        current = {own: path for path in self.root.rglob("*") if (own := path.stat().st_ino)}
        pending = [(inode, place)]
        while pending:
            folder, target = pending.pop()
            for name, (own, is_folder) in names.get(folder, {}).items():
                if is_folder:
                    (target / name).mkdir()
                    pending.append((own, target / name))
                else:
                    (target / name).write_bytes(self._content(own, current.get(own), lost))

    def _content(self, inode: int, place: Path | None, lost: Callable[[bytes], bytes]) -> bytes:
        safe = self.content.get(inode, b"")
        present = place.read_bytes() if place and place.is_file() else safe
        if present.startswith(safe):  # what was synced stays; a line may have been appended
            return safe + lost(present[len(safe) :])
        return lost(present)


def _entries(folder: Path) -> Entries:
    with os.scandir(folder) as found:
        return {one.name: (one.inode(), one.is_dir()) for one in found}


def _tree(root: Path) -> dict[int, Entries]:
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    return {folder.stat().st_ino: _entries(folder) for folder in folders}
