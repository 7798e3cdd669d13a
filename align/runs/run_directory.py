"""The files of a run: what is written when, and what a second call on the same folder goes on from."""

import json
import logging
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from align.errors import UserError
from align.files import read_json, write_json, write_text
from align.recipe import Recipe, dump_recipe, load_recipe
from align.section import Free, Grows, keys_marked

log = logging.getLogger("align")

OF_EVERY_START = {"recipe.yaml", "environment.json", "events.log", "given.json"}
"""What a run holds before any work is done."""
COMPLETE = "complete"
"""File whose presence says that a checkpoint was written to its end."""


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
        self.grows_from: Recipe | None = None
        """The recipe of a shorter run that is there; `grow` puts the new one in its place."""

    def open(self, recipe: Recipe) -> None:
        """Start the run, or make sure that the run that is there is of the same recipe.

        A recipe that was refused before any work was done may be mended: the new one takes its place. Afterwards keys
        may change that do not change the result, and those of a run's length may grow.

        Raises:
            UserError: the folder holds another recipe's run, or other files, or is none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: a file; give `output` a folder")
        found = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if self.recipe.exists():
            changed = self._changed(recipe)
            if not changed:
                return
            if self.has_work():
                self._let_be(changed, recipe)
                return
        elif found:
            raise UserError(f"{self.path}: holds files that are no run; give `output` another folder or empty this one")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment())
        write_text(self.recipe, dump_recipe(recipe))

    def has_work(self) -> bool:
        """Whether anything was done here that belongs to the recipe and the rows that it began with."""
        return not {entry.name for entry in self.path.iterdir()} <= OF_EVERY_START

    def grow(self, recipe: Recipe, checkpoint: Path | None) -> None:
        """Turn a shorter run, finished or not, into the beginning of a longer one, from one of its checkpoints on."""
        newer = [one for one in complete_checkpoints(self.checkpoints) if checkpoint and _step(one) > _step(checkpoint)]
        for one in newer:
            (one / COMPLETE).unlink()
        self.summary.unlink(missing_ok=True)
        write_text(self.recipe, dump_recipe(recipe))

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
            write_text(self.recipe, dump_recipe(recipe))

    def _changed(self, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
        """The keys in which the recipe that is there differs, with its value and the new one."""
        old, new = yaml.safe_load(self.recipe.read_text()), yaml.safe_load(dump_recipe(recipe))
        if not isinstance(old, dict):
            raise UserError(f"{self.recipe}: damaged, no recipe; restore the file, or give `output` a new folder")
        return {key: (_value(old, key), _value(new, key)) for key in sorted(differing_keys(old, new))}

    def read_recipe(self) -> Recipe:
        """The recipe that the run is of.

        Raises:
            UserError: it is damaged, or of another version of Align, which is then named.
        """
        try:
            return load_recipe(self.recipe)
        except UserError as error:
            file, own = self.path / "environment.json", version("align-lm")
            wrote = read_json(file).get("packages", {}).get("align-lm", own) if file.exists() else own
            raise UserError(
                f"{error}; align {wrote} wrote this run, and this is {own}" if wrote != own else str(error)
            ) from None

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = complete_checkpoints(self.checkpoints)
        return whole[-1] if whole else None

    def goes_on(self) -> str:
        """Where the run goes on if it is called again, in words."""
        last = self.last_checkpoint()
        return f"goes on from step {_step(last)}" if last else "begins again"

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
        states = [run.best if run.best.exists() else run.last_checkpoint() for run in runs]
        found = [state for state in states if state]
        if not found:
            raise UserError(f"{self.path}: the run has no checkpoint yet; let `align train` write one")
        return found[-1]

    def rewind_metrics(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which will be trained again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last one that a kill has cut short is left out."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines() if line.endswith("}")]

    def seconds(self) -> float:
        """Seconds of training until the last line of metrics.jsonl, interruptions left out."""
        return max((line["seconds"] for line in self.read_metrics()), default=0.0)

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first."""
    whole = [marker.parent for marker in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(whole, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def differing_keys(old: Any, new: Any, path: str = "") -> set[str]:
    """Dotted keys at which two trees of dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        below = [differing_keys(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in old.keys() | new.keys()]
        return set().union(*below)
    return set() if old == new else {path}


def environment() -> dict[str, Any]:
    """What the run's figures depend on besides the recipe."""
    packages = ("align-lm", "torch", "transformers", "peft", "datasets", "accelerate")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "command": sys.argv,
    }


class _Terminal(logging.StreamHandler):
    """Writes to sys.stderr as it is at the time, so that a live bar, which takes its place, stays below the message."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_log(run: RunDirectory, *, main: bool) -> None:
    """Messages go to the terminal and, with the time, to events.log; debug messages to the latter alone."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if main else logging.ERROR)
    console = _Terminal()
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if main:
        file = logging.FileHandler(run.events)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)
