"""Experiment trackers: transformers' integrations, told the recipe, the held-out figures and the samples as well."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.training.last_words import LAST_WORDS, LastWords

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger("align")

PROJECT_VARIABLES = (
    "WANDB_PROJECT",
    "COMET_PROJECT_NAME",
    "MLFLOW_EXPERIMENT_NAME",
    "CLEARML_PROJECT",
)
"""Where transformers' integrations read a project's name; what a user has set there stays."""
NAME_VARIABLES = ("CLEARML_TASK",)
"""Where those read the run's name that are not told it otherwise."""
_set_here: dict[str, str] = {}


def run_name(path: Path) -> str:
    """What a run is called: its folder, and of an online run's training also the iteration."""
    path = path.resolve()
    return f"{path.parents[2].name}-{path.parent.name}" if path.parent.parent.name == "iterations" else path.name


SWANLAB_PROJECT = "SWANLAB_PROJECT"


@contextmanager
def clear_environment_of(variable: str) -> Iterator[None]:
    """Inside, a variable is not in the environment."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def set_names(project: str, run: str) -> None:
    """Let every tracker put the run into this project under this name, unless the environment names others."""
    for name, variables in ((project, PROJECT_VARIABLES), (run, NAME_VARIABLES)):
        for variable in variables:
            if os.environ.get(variable) == _set_here.get(variable):  # not there, or of a run before this one
                os.environ[variable] = _set_here[variable] = name


def flat(tree: Any, path: str) -> dict[str, Any]:
    """A recipe's values under dotted keys: every tracker takes them, and lists of sections are numbered."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if _has_sections(tree) else None
    if items is None:
        return {path: tree}
    return {key: value for name, below in items for key, value in flat(below, f"{path}.{name}").items()}


def _has_sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(own, Mapping) for own in value)


class Tracking:
    """The trackers of a training, open until its last figures are known: transformers ends them with the last step."""

    def __init__(self, callbacks: Sequence["TrainerCallback"], project: str) -> None:
        """Args:
        callbacks: a Trainer's; those of trackers are kept from ending.
        project: what the run is filed under.
        """
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        kinds = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
        self.trackers = {kinds[type(own)]: own for own in callbacks if type(own) in kinds}
        if "swanlab" in self.trackers:
            swanlab: Any = self.trackers["swanlab"]
            swanlab._swanlab = _SwanLab(swanlab._swanlab, project)
        self.ends: list[Callable[..., None]] = [own.on_train_end for own in self.trackers.values()]
        self.theirs = {name for name, own in self.trackers.items() if name in RUNNING and RUNNING[name](own)}
        """Those whose run was open before this one, which goes on in it and leaves it open."""
        for own in self.trackers.values():
            own.on_train_end = lambda *_, **__: None  # type: ignore[method-assign]

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Tell trackers the recipe whose integration reads fields of the arguments alone, once they are open.

        Args:
            recipe: as `flat` gives it.
        """
        clearml: Any = self.trackers.get("clearml")
        if clearml is not None and clearml._clearml_task is not None:
            clearml._clearml_task.update_parameters(
                {f"Recipe/{key.removeprefix('recipe.')}": str(value) for key, value in recipe.items()}
            )

    def end(self, last: LastWords, *event: Any) -> None:
        """The last words, and what transformers does at the end. A tracker that fails is told of: the run is done.

        Args:
            event: the arguments, state and control that callbacks get.
        """
        for name, tracker in self.trackers.items():
            if name in LAST_WORDS:
                self._try(name, LAST_WORDS[name], tracker, last)
        for name, end in zip(self.trackers, self.ends, strict=True):
            self._try(name, end, *event)
        for name, tracker in self.trackers.items():
            if name in CLOSE and name not in self.theirs:
                self._try(name, CLOSE[name], tracker)

    @staticmethod
    def _try(name: str, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            log.warning("%s was not told all of the run's end (%s: %s)", name, type(error).__name__, error)


class _SwanLab:
    """The module as transformers knows it.

    Newer releases raise where there is no run and used to return None, and refuse the variable that transformers reads
    the project's name from.
    """

    def __init__(self, module: Any, project: str) -> None:
        self._module, self._project = module, os.environ.get(SWANLAB_PROJECT, project)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **options: Any) -> Any:
        with clear_environment_of(SWANLAB_PROJECT):
            return self._module.init(**options | {"project": self._project})

    def get_run(self) -> Any:
        has_run = getattr(self._module, "has_run", None)
        return None if has_run is not None and not has_run() else self._module.get_run()


RUNNING: dict[str, Callable[[Any], Any]] = {
    "wandb": lambda tracker: tracker._wandb.run,
    "swanlab": lambda tracker: tracker._swanlab.get_run(),
    "comet_ml": lambda tracker: importlib.import_module("comet_ml").get_running_experiment(),
}
CLOSE: dict[str, Callable[[Any], Any]] = {
    "wandb": lambda tracker: tracker._wandb.finish(),
    "swanlab": lambda tracker: tracker._swanlab.get_run() and tracker._swanlab.finish(),
    "comet_ml": lambda tracker: tracker._experiment and tracker._experiment.end(),
}
"""What transformers leaves to the end of the process, where an online run's next iteration would go on in it."""
