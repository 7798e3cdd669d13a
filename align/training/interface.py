"""`align.Trainer`: a run of a recipe in which Python objects may take the place of what the recipe names."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import yaml
from transformers import TrainerCallback

from align.errors import UserError
from align.model.sharding import sharding_asked
from align.own_code import give, object_digest
from align.recipe import Recipe, load_recipe, parse_recipe
from align.recipe.recipe import dump_set
from align.runs.run_directory import RunDirectory
from align.training.given import Given, takes
from align.training.hooks import Hooks, ListsSeen, StepDone
from align.training.objects import GivenModel, Write, rows_file
from align.training.result import RunResult
from align.training.train import train
from align.training.zero import zero_asked
from rewards.rules import scorer_of

log = logging.getLogger("align")

FUNCTIONS = ("objective", "score")
"""Sections that a function can stand for."""


class Trainer:
    """Trains what `align train` trains, to the same numbers; what is given as an object takes the recipe's place.

    What the run needs to go on and to be read by the commands (rows, and a model that no folder has) is written into
    its directory, so that a Trainer of the same arguments goes on where a killed one stopped.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        objective: Any = None,
        score: Any = None,
        scorer: Any = None,
        adapter: Any = None,
        optimizer: Any = None,
        schedule: Callable[..., Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        on_lists: Callable[[ListsSeen], Any] | None = None,
        on_step: Callable[[StepDone], Any] | None = None,
        **sections: Any,
    ) -> None:
        """Args:
        recipe: a file or the name of one that ships, its sections as a dict, or what `load_recipe` returned.
        model: a transformers.PreTrainedModel, which is trained in place, or a PeftModel, whose adapter goes on and
            is then the reference too.
        tokenizer: by default that of the folder that the model came from.
        train_dataset, eval_dataset: dicts as the rows of a file are, a datasets.Dataset, or a path.
        objective: a function (scores [B, K], grades [B, K], list_mask [B, K], **options) -> losses [B], a name, a
            section, or several of them.
        score: a function (policy_logprobs [N, C], reference_logprobs [N, C], completion_mask [N, C], list_index [N],
            **options) -> scores [N], a name, or a section.
        scorer: of the samples, with `score(prompts, completions)`, or a function (prompt, completion) -> number.
        adapter: a peft.PeftConfig, a name, or a section.
        optimizer: a function of the parameters that train that makes a torch.optim.Optimizer.
        schedule: a function (optimizer, steps) that makes a torch.optim.lr_scheduler.LRScheduler.
        callbacks: transformers' callbacks.
        on_lists: is told of each micro-batch's lists, scores and losses; see ListsSeen.
        on_step: is told of each optimizer step's figures; see StepDone.
        sections: keys of the recipe, such as `output="runs/mine"` or `train={"steps": 100}`, laid over it.

        Raises:
            UserError: something cannot work; names the argument.
        """
        tree = _tree(recipe)
        _lay(tree, sections)
        _check_functions(optimizer=(optimizer, 1), schedule=(schedule, 2), on_lists=(on_lists, 1), on_step=(on_step, 1))
        _check_callbacks(callbacks)
        output = tree.get("output")
        if not isinstance(output, str | Path):
            raise UserError('output: missing; give the run\'s folder, such as `output="runs/mine"`')
        tree["output"] = str(output)
        for name, value in zip(FUNCTIONS, (objective, score), strict=True):
            if value is not None:
                tree[name] = value
            if name in tree:
                tree[name] = _named(tree[name])
        writes = [_lay_rows(tree, train_dataset, "train_dataset"), _lay_rows(tree, eval_dataset, "eval_dataset")]
        own = self._lay_model(tree, model, tokenizer)
        if adapter is not None:
            _section(tree, "policy")["adapter"] = _adapter(adapter)
        self.recipe = parse_recipe(tree, origin="align.Trainer")
        whole = not (sharding_asked() or zero_asked())  # else each process reads its part of the files
        code = {"optimizer": optimizer, "schedule": schedule}
        self._given = Given(
            hooks=Hooks(on_lists, on_step),
            callbacks=tuple(callbacks),
            optimizer=optimizer,
            schedule=schedule,
            scorer=scorer_of(scorer),
            model=own.model if own and whole else None,
            folder=own.folder if own else None,
            write=_all([*writes, own.write if own else None]),
            digests={name: object_digest(value) for name, value in code.items() if value is not None},
        )

    def _lay_model(self, tree: dict[str, Any], model: Any, tokenizer: Any) -> GivenModel | None:
        if model is None and tokenizer is None:
            return None
        policy = _section(tree, "policy")
        if model is not None and policy.get("start_adapter"):
            raise UserError("policy.start_adapter: the model is an object; give the PeftModel, or name both by folder")
        if model is None and not isinstance(policy.get("model"), str):
            raise UserError("tokenizer: there is no model; give `model`, or its folder as policy.model")
        own = GivenModel(model, tokenizer, output=tree["output"], origin=policy.get("model"))
        policy.update(own.sections() if model is not None else {"model": str(own.folder), "revision": None})
        return own

    def train(self) -> RunResult:
        """Train to the end; a run that is already in `output` goes on where it stopped.

        Raises:
            UserError: the recipe, its data or its model cannot work; said before the first step.
        """
        return train(self.recipe, self._given if self._given != Given() else None)


def _tree(recipe: Any) -> dict[str, Any]:
    """A recipe's sections as a dict of our own."""
    if recipe is None:
        return {}
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    if isinstance(recipe, Recipe):
        return yaml.safe_load(dump_set(recipe))
    if not isinstance(recipe, Mapping):
        raise UserError(
            f"recipe: {type(recipe).__name__}; give a file, a dict of sections, or what load_recipe returns"
        )
    return _copy(recipe)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(own) for name, own in value.items()}
    return [_copy(own) for own in value] if isinstance(value, list | tuple) else value


def _lay(tree: dict[str, Any], sections: Mapping[str, Any]) -> None:
    """Lay sections over a recipe: below a mapping only the keys that are given change."""
    for name, value in sections.items():
        below = tree.get(name)
        if isinstance(below, dict) and isinstance(value, Mapping) and name not in FUNCTIONS:
            _lay(below, value)
        else:
            tree[name] = _copy(value)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.setdefault(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{name}: {type(found).__name__}; give a dict of the section's keys")
    return found


def _named(value: Any) -> Any:
    """A section in which functions are named."""
    if isinstance(value, list | tuple):
        return [_named(own) for own in value]
    if callable(value):
        return {"name": "python", "function": give(value)}
    if isinstance(value, Mapping) and callable(value.get("function")):
        return {"name": "python", **value, "function": give(value["function"])}
    return value


def _adapter(adapter: Any) -> Any:
    if isinstance(adapter, peft.PeftConfig):
        keys = plain_keys(adapter)
        kind = keys.pop("peft_type")
        chosen = {"target_modules": None} if hasattr(adapter, "target_modules") else {}  # PEFT's choice, not ours
        return {"name": "peft", "type": kind, "options": chosen | keys}
    if isinstance(adapter, str | Mapping):
        return adapter
    raise UserError(f"adapter: {type(adapter).__name__}; give a peft.PeftConfig, an adapter's name, or its section")


def plain_keys(config: peft.PeftConfig) -> dict[str, Any]:
    """What a PEFT config sets, as YAML can say it."""
    default = type(config)()
    keys = {k: _plain(v) for k, v in config.to_dict().items() if v != getattr(default, k, None)}
    return {"peft_type": str(getattr(config.peft_type, "value", config.peft_type)), **keys}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return getattr(value, "value", value)


def _lay_rows(tree: dict[str, Any], rows: Any, part: str) -> Write | None:
    """Put rows into `data` as a source."""
    if rows is None:
        return None
    data = _section(tree, "data")
    path, write = rows_file(rows, tree["output"], part)
    if part == "train_dataset":
        data.pop("eval_sources", None)
        data["sources"] = [{"path": path}]
    else:
        data["eval_sources"] = [{"path": path}]
    return write


def _all(writes: Sequence[Write | None]) -> Write | None:
    asked = [write for write in writes if write is not None]

    def write(run: RunDirectory) -> None:
        for one in asked:
            one(run)

    return write if asked else None


def _check_functions(**given: tuple[Any, int]) -> None:
    for name, (function, count) in given.items():
        if function is None or (name == "optimizer" and not callable(function)):
            continue  # an optimizer that is made is looked at beside the model
        if not takes(function, count):
            words = {1: "one argument", 2: "two arguments"}[count]
            raise UserError(f"{name}: {function!r} is no function of {words}")


def _check_callbacks(callbacks: Any) -> None:
    if not isinstance(callbacks, list | tuple):
        raise UserError(f"callbacks: {type(callbacks).__name__}; give a list of transformers.TrainerCallback objects")
    for own in callbacks:
        if not isinstance(own, TrainerCallback):
            made = "; make an object of the class" if isinstance(own, type) else ""
            raise UserError(f"callbacks: {own!r} is no transformers.TrainerCallback{made}")
