"""The files of a run: what is written when, and what a second call on the same folder goes on from."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from align.bounds import load_yaml
from align.errors import UserError
from align.files import forget_removed, read_object, remove_folder, replaced, replaced_folder, write_text
from align.locks import LOCK_FILES, alone
from align.manifest import Damaged, check, file_digest, json_digest
from align.recipe import Recipe, dump_recipe, read_recipe
from align.runs.checkpoints import METRICS, Checkpoints, numbered, step_of
from align.runs.digests import FILE as DIGESTS
from align.runs.digests import Digests
from align.runs.environment import environment
from align.runs.metrics import any_heldout, as_line, read_lines
from align.runs.trees import differing_keys, value_at
from align.section import Free, Grows, keys_marked

log = logging.getLogger("align")

OWN = ("rows", "base", "base.tmp", "start_adapter", "start_adapter.tmp")
"""Folders of what Python code gave a run as objects, whole or cut short by a kill."""
OF_EVERY_START = LOCK_FILES | {DIGESTS, "recipe.yaml", "environment.json", "events.log", "given.json", *OWN}
"""What a run holds before any work is done."""


class RunDirectory:
    """`recipe.yaml environment.json given.json before.json metrics.jsonl events.log checkpoints/ best/ adapter/
    token_view.jsonl summary.json`"""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.log"
        self.given = self.path / "given.json"
        self.before = self.path / "before.json"
        self.after = self.path / "after.json"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.adapter = self.path / "adapter"
        self.token_view = self.path / "token_view.jsonl"
        self.summary = self.path / "summary.json"
        self.changes: list[str] = []
        """What `open` found changed, and let be, in words."""
        self.digests = Digests(self.path)
        self.saved = Checkpoints(self.checkpoints, self.metrics, self.identity)
        self.grows_from: Recipe | None = None
        """The recipe of a shorter run that is there; `grow` puts the new one in its place."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other processes that would write the same files.

        Raises:
            UserError: another process holds it, it holds other files, or is none.
        """
        self._check_place()
        with alone(self.path, instead="give `output` another folder"):
            yield

    def open(self, recipe: Recipe) -> None:
        """Start the run, or make sure that the run that is there is of the same recipe.

        A recipe that was refused before any work was done may be mended: the new one takes its place. Afterwards keys
        may change that do not change the result, and those of a run's length may grow.

        Raises:
            UserError: the folder holds another recipe's run, or other files, or is none.
        """
        self._check_place()
        for folder in (self.path, self.checkpoints):
            forget_removed(folder)
        if self.recipe.exists():
            changed = self._changed(recipe)
            if not changed:
                return
            if self.has_work():
                self._let_be(changed, recipe)
                return
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json(self.path / "environment.json", environment())
        self.write_text(self.recipe, dump_recipe(recipe))

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file; give `output` a folder")
        if self.path.exists() and self.has_work() and not self.recipe.exists():
            raise UserError(
                f"{self.path}: holds files that are no run; give `output` another folder or empty this one (a run "
                "has a recipe.yaml)"
            )

    def has_work(self) -> bool:
        """Whether anything was done here that belongs to the recipe and the rows that it began with."""
        return not {entry.name.removesuffix(".tmp") for entry in self.path.iterdir()} <= OF_EVERY_START

    def write_json(self, path: Path, value: Any, *, indent: int | None = 2) -> None:
        """Write a file of the run that stays as it is."""
        self.write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of the run that stays as it is."""
        with self.replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def replaced(self, path: Path) -> Iterator[Path]:
        """A file to write that becomes `path`, of the run, and whose digest is kept."""
        with replaced(path) as temporary:
            yield temporary
            self.digests.note({path: temporary})

    @contextmanager
    def replaced_folder(self, path: Path) -> Iterator[Path]:
        """A folder to fill that becomes `path`, of the run, and whose files' digests are kept."""
        with replaced_folder(path) as temporary:
            yield temporary
            files = (file for file in temporary.rglob("*") if file.is_file())
            self.digests.note({path / file.relative_to(temporary): file for file in files})

    def check(self, *names: str) -> None:
        """Make sure that files of the run are as they were written.

        Args:
            names: of files or folders; by default all.

        Raises:
            UserError: names the first that is not.
        """
        if problem := self.digests.problem(names):
            raise UserError(f"{problem}; restore it, or call `align train` again where it can make it anew")

    def grow(self, recipe: Recipe, checkpoint: Path | None) -> None:
        """Turn a shorter run, finished or not, into the beginning of a longer one, from one of its checkpoints on."""
        for one in numbered(self.checkpoints):
            if checkpoint and step_of(one) > step_of(checkpoint):
                remove_folder(one)
        self.reopen()
        self.write_text(self.recipe, dump_recipe(recipe))

    def reopen(self) -> None:
        """Let a finished run be ended anew."""
        self.summary.unlink(missing_ok=True)
        self.digests.forget(self.summary, self.metrics)

    def _let_be(self, changed: dict[str, tuple[Any, Any]], recipe: Recipe) -> None:
        """Take over a begun run's changed keys, where they may change.

        Raises:
            UserError: names those that may not.
        """
        free, growing = keys_marked(recipe, Free), keys_marked(recipe, Grows)
        if recipe.online:
            growing -= {"train.steps", "train.epochs"}  # of every iteration, the finished ones too
        grown = {key for key, (old, new) in changed.items() if key in growing and old and new and new > old}
        if odd := sorted(changed.keys() - free - grown):
            shrunk = [key for key in odd if key in growing]
            hint = f"{', '.join(shrunk)} may only grow; " if shrunk else ""
            raise UserError(
                f"{self.path}: holds a run of another recipe (it differs in {', '.join(odd)}); {hint}"
                "set `output` to a new folder, or remove this one"
            )
        self.changes = [f"{key} is {new} from here on ({old} before)" for key, (old, new) in sorted(changed.items())]
        if grown:
            self.grows_from = self.read_recipe()
        else:
            self.write_text(self.recipe, dump_recipe(recipe))

    def _changed(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """The keys in which the recipe that is there differs, with its value and the new one."""
        old, new = self.recipe_tree(), yaml.safe_load(dump_recipe(recipe))
        return {key: (value_at(old, key), value_at(new, key)) for key in sorted(differing_keys(old, new))}

    def recipe_tree(self) -> dict[str, Any]:
        """The keys of the run's recipe, as they stand in its file.

        Raises:
            UserError: it is damaged.
        """
        remedy = "restore the file, or give `output` a new folder"
        try:
            tree = load_yaml(self.recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{self.recipe}: damaged ({' '.join(str(error).split())}); {remedy}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{self.recipe}: damaged, no recipe; {remedy}")
        if problem := self.digests.problem([self.recipe.name]):
            raise UserError(f"{problem}; {remedy}, or remove {self.digests.file} if it was changed on purpose")
        return tree

    def read_recipe(self) -> Recipe:
        """The recipe that the run is of, to look at; it consents to nothing.

        Raises:
            UserError: it is damaged, or of another version of Align, which is then named.
        """
        try:
            recipe = read_recipe(self.recipe)
            self.recipe_tree()
            return recipe
        except UserError as error:
            file, own = self.path / "environment.json", version("align-lm")
            wrote = read_object(file).get("packages", {}).get("align-lm", own) if file.exists() else own
            raise UserError(
                f"{error}; align {wrote} wrote this run, and this is {own}" if wrote != own else str(error)
            ) from None

    def identity(self) -> dict[str, str]:
        """Digests of what the run's checkpoints belong to: its recipe, less the keys that may change, and its rows."""
        tree, recipe = self.recipe_tree(), self.read_recipe()
        for key in keys_marked(recipe, Free) | keys_marked(recipe, Grows):
            section, _, name = key.rpartition(".")
            (value_at(tree, section) if section else tree).pop(name, None)
        return {"recipe": json_digest(tree), **({"rows": file_digest(self.given)} if self.given.exists() else {})}

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; says which it passes over, and why.

        Raises:
            UserError: one is of another run.
        """
        while found := self.saved.newest():
            problem = self._best_is_lost(found)
            if not problem:
                return found
            self.saved.pass_over(found, f"{problem}, which was the best policy by then")
        return None

    def best_state(self) -> Path | None:
        """The policy that was the best so far; None where the run keeps none, or has not measured any.

        Raises:
            UserError: it is not as it was written.
        """
        if not self.read_recipe().train.keep_best or not (self.best.exists() or any_heldout(self.read_metrics())):
            return None
        try:
            check(self.best)
        except Damaged as problem:
            raise UserError(f"{problem}; remove the checkpoints after it, and `align train` makes it again") from None
        return self.best

    def _best_is_lost(self, checkpoint: Path) -> str:
        """What is wrong with the best policy that a checkpoint goes on with; empty where nothing is."""
        if not self.read_recipe().train.keep_best or not any_heldout(read_lines(checkpoint / METRICS)):
            return ""
        try:
            check(self.best)
        except Damaged as problem:
            return str(problem)
        return ""

    def goes_on(self) -> str:
        """Where the run goes on if it is called again, in words."""
        last = self.last_checkpoint()
        return f"goes on from step {step_of(last)}" if last else "begins again"

    def final_state(self) -> Path:
        """The state of the policy that the run gave, or has come to: its best, if it keeps that, or its last.

        Raises:
            UserError: there is none yet, or this is no run.
        """
        if not self.recipe.exists():
            raise UserError(
                f"{self.path}: holds no run (there is no recipe.yaml); give a folder that `align train` wrote"
            )
        runs = [self, *(RunDirectory(folder / "train") for folder in sorted(self.path.glob("iterations/*")))]
        states = [run.best_state() or run.last_state() for run in runs if run.recipe.exists()]
        found = [state for state in states if state]
        if not found:
            raise UserError(f"{self.path}: the run has no checkpoint yet; let `align train` write one")
        return found[-1]

    def last_state(self) -> Path | None:
        """The newest checkpoint that is whole: of a finished run its last.

        Raises:
            UserError: that is damaged, or all are.
        """
        found = self.last_checkpoint()
        steps = read_object(self.summary, "steps")["steps"] if self.summary.exists() else 0
        if found and step_of(found) >= steps:
            return found
        if problem := self.saved.problem():
            raise UserError(f"{problem}; remove {self.summary}, and `align train` goes on from an older checkpoint")
        return found

    def rewind_metrics(self, checkpoint: Path | None) -> None:
        """The metrics as they were at a checkpoint, or none: the steps after it will be trained again."""
        self.digests.forget(self.metrics)
        write_text(self.metrics, (checkpoint / METRICS).read_text(encoding="utf-8") if checkpoint else "")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, less damaged ones."""
        return read_lines(self.metrics)

    def seconds(self) -> float:
        """Seconds of training until the last line of metrics.jsonl, interruptions left out."""
        return max((line["seconds"] for line in self.read_metrics()), default=0.0)

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(as_line(line))
