"""Digests of the files that a run or an export writes once, beside them: damage is found before a figure or a weight is
read."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from align.errors import UserError
from align.files import write_json
from align.manifest import file_digest, json_digest

FILE = "digests.json"
KEPT = 2
"""Digests of a file that count: of the last one, and of the one before, which a kill between the two leaves."""


class Digests:
    """`digests.json` of a run directory or an export; a file that it does not name is taken as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / FILE

    def note(self, contents: Mapping[Path, Path]) -> None:
        """Say what files are about to become.

        Args:
            contents: where they will be -> where their content stands now.
        """
        known = self._read()
        for path, content in contents.items():
            name = str(path.relative_to(self.folder))
            known[name] = [*known.get(name, []), file_digest(content)][-KEPT:]
        self._write(known)

    def note_all(self) -> None:
        """Say what every file of the folder is."""
        self.note({file: file for file in self.folder.rglob("*") if file.is_file() and file != self.file})

    def forget(self, *paths: Path) -> None:
        """Take files as they are from now on: they will be written bit by bit, or anew."""
        known, names = self._read(), {str(path.relative_to(self.folder)) for path in paths}
        if known.keys() & names:
            self._write({name: own for name, own in known.items() if name not in names})

    def problem(self, names: Iterable[str] = ()) -> str:
        """What is wrong with a run's files, naming the first; empty where nothing is.

        Args:
            names: of files or folders that matter; by default all.

        Raises:
            UserError: the digests themselves are damaged, or a file cannot be read.
        """
        wanted = tuple(names)
        for name, digests in self._read().items():
            file = self.folder / name
            if wanted and name.partition("/")[0] not in wanted:
                continue
            if not file.is_file():
                return f"{file} is {'no file' if file.exists() else 'missing'}"
            if file_digest(file) not in digests:
                return f"{file}: damaged, it is not as it was written"
        return ""

    def _read(self) -> dict[str, list[str]]:
        try:
            value = json.loads(self.file.read_text(encoding="utf-8"))
            if value["digest"] != json_digest(value["files"]):
                raise ValueError("its own digest is another one")
            return value["files"]
        except (FileNotFoundError, NotADirectoryError):  # who reads a file as a folder says so
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file}: damaged ({error}); remove it, and the files beside it are taken as they are"
            ) from None

    def _write(self, known: dict[str, list[str]]) -> None:
        write_json(self.file, {"files": known, "digest": json_digest(known)}, indent=1)


def check_written(folder: str | Path | None) -> None:
    """Make sure that a folder which a run has written, such as its `adapter`, or an export is as it was written; others
    are taken as they are.

    Raises:
        UserError: names the file.
    """
    place = Path(folder).expanduser() if folder else None
    if place is None:
        return
    if (place.parent / "recipe.yaml").is_file():
        if problem := Digests(place.parent).problem([place.name]):
            raise UserError(f"{problem}; `align train` on {place.parent} makes it anew")
    elif not (place / "recipe.yaml").is_file() and (problem := Digests(place).problem()):
        raise UserError(f"{problem}; export it again, or remove {place / FILE} if it was changed on purpose")
