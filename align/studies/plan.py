"""A study before it begins: its arms, and the recipe of every run, each of which is read here and refused if it cannot
work."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from align.bounds import load_yaml
from align.errors import UserError
from align.files import is_there
from align.recipe import Recipe, dump_recipe, offline, read_recipe, with_consent
from align.recipe.mistakes import explain
from align.runs.trees import differing_keys
from align.shipped import names, recipe_file, shipped
from align.studies.settings import Study

OWN_KEYS = ("output", "train.seed")
"""Of a recipe, those that the study itself sets."""
OF_THE_LOSS = (
    *("task", "data", "score", "reward", "objective"),
    *("regularizer", "token_weights", "wpo", "dpop", "z_penalty"),
)
"""Sections in which arms may differ so that their losses are of different things."""


class Arm(NamedTuple):
    """One of the settings that are compared."""

    name: str
    overrides: dict[str, Any]
    """Dotted recipe key -> value."""

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w.=+-]+", "-", self.name).strip("-.") or "arm"


class Consent(NamedTuple):
    """What the command line itself allows."""

    files: tuple[Path, ...]
    """Which say what is run, and are no consent."""
    typed: tuple[str, ...]
    """Recipe keys of the command line."""
    trust_remote_code: bool
    allow_code: bool


class Plan(NamedTuple):
    """A study and its arms."""

    study: Study
    arms: tuple[Arm, ...]
    consent: Consent

    @property
    def path(self) -> Path:
        return Path(self.study.output)

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.study.baseline or self.arms[0].name

    @property
    def shares(self) -> list[float]:
        """Of the steps, rung by rung: 1 alone or, with halving, eta^-r, ..., 1/eta, 1 as far as there are arms."""
        eta, rungs = (self.study.halving.eta if self.study.halving else len(self.arms) + 1), 0
        while eta ** (rungs + 1) <= len(self.arms):
            rungs += 1
        return [float(eta) ** -rung for rung in range(rungs, -1, -1)]

    def folder(self, arm: Arm, seed: int, share: float) -> Path:
        """Where one run is."""
        rung = "runs" if share == 1 else f"rung-{round(1 / share)}"
        return self.path / rung / arm.folder / f"seed-{seed}"

    def recipe(self, arm: Arm, seed: int, share: float = 1.0) -> Recipe:
        """The recipe of one run.

        Args:
            share: of the recipe's steps or epochs, on a rung of the halving.

        Raises:
            UserError: a key or value that a recipe cannot hold, or code that nobody has consented to.
        """
        output = str(self.folder(arm, seed, share))
        keys = {**self.study.set, **arm.overrides, "train.seed": seed, "output": output}
        try:
            recipe = read_recipe(self.study.recipe, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None
        if share < 1:
            steps = recipe.train.steps and max(1, round(recipe.train.steps * share))
            train = recipe.train.model_copy(update={"steps": steps, "epochs": recipe.train.epochs * share})
            recipe = recipe.model_copy(update={"train": train})
        allowed = {"trust_remote_code": self.consent.trust_remote_code, "allow_code": self.consent.allow_code}
        for file in self.consent.files:
            recipe = with_consent(recipe, file, self.consent.typed, **allowed)
        return recipe


def plan_study(
    file: str,
    output: str | None = None,
    settings: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> Plan:
    """The study of a file.

    Args:
        file: a YAML file, or the name of a study that ships, such as `lipo`.
        output: its folder, in place of the file's.
        settings: `key=value` of recipe keys for all runs.

    Raises:
        UserError: no such file, a key or value that a study or the recipe of one of its runs cannot hold, or code that
            nobody has consented to.
    """
    path = _study_file(file)
    typed = _settings(settings)
    tree = _tree(path)
    tree["set"] = {**_mapping(tree.get("set"), path), **typed}
    study = _parsed(tree | ({"output": output} if output else {}), origin=str(path))
    consent = Consent((recipe_file(study.recipe), path), tuple(typed), trust_remote_code, allow_code)
    return _checked(Plan(study, _arms(study.vary), consent))


def plan_sweep(
    base: str,
    settings: Sequence[str],
    *,
    vary: Sequence[str],
    seeds: int = 1,
    baseline: str | None = None,
    halving: int | None = None,
    by: str | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
) -> Plan:
    """The grid of a command line as a study.

    Args:
        base: a recipe's file, or the name of one that ships.
        settings: `key=value` for all runs; `output` is the sweep's folder.
        vary: `key=value1,value2`, YAML between the commas.
        seeds: how many.
        halving: keep one in so many arms, and train it so many times as long, by the figure `by`.

    Raises:
        UserError: see `plan_study`; or one of `halving` and `by` without the other.
    """
    if (halving is None) != (by is None):
        raise UserError("--halving and --by go together: `--halving 3 --by pair_accuracy`")
    typed = _settings(settings)
    output = typed.pop("output", None) or f"{read_recipe(base).output.rstrip('/')}-sweep"
    tree = {
        "recipe": base,
        "output": output,
        "set": typed,
        "vary": dict(_values(one) for one in vary),
        "seeds": seeds,
        "baseline": baseline,
        "halving": halving and {"eta": halving, "by": by},
    }
    study = _parsed(tree, origin="align sweep")
    consent = Consent((recipe_file(base),), (*typed, *study.vary), trust_remote_code, allow_code)
    return _checked(Plan(study, _arms(study.vary), consent))


def _study_file(name: str) -> Path:
    """The user's own file, or by its path or name one that ships."""
    own = Path(name)
    if is_there(own, Path.is_file):
        return own
    return shipped(name) or shipped(f"recipes/studies/{name}.yaml") or own


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(names("recipes/studies", ".yaml"))
        raise UserError(
            f"{path}: cannot read the study ({error.strerror}); give a YAML file, or one that ships: {known}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or "policy" in tree:
        what = "a recipe; `align train` runs it" if isinstance(tree, dict) else "no mapping"
        raise UserError(f"{path}: {what}, and a study is a mapping of `recipe`, `vary` and `seeds`")
    return tree


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{path}: `set`: give recipe keys with their values, such as `{{train.epochs: 2}}`")
    return value or {}


def _settings(settings: Sequence[str]) -> dict[str, Any]:
    """`key=value`, each value YAML."""
    found = {}
    for given in settings:
        key, equals, text = given.partition("=")
        if not equals or not key:
            raise UserError(f"`{given}`: a setting is key=value, such as train.epochs=2")
        found[key] = _yaml(text, given)
    return found


def _values(given: str) -> tuple[str, list[Any]]:
    """The key of `key=value1,value2`, and its values; commas within brackets belong to a value."""
    key, equals, text = given.partition("=")
    values = _yaml(f"[{text}]", given) if equals else None
    if not key or not values:
        raise UserError(f"--vary {given}: give a key and its values, such as train.learning_rate=1e-4,1e-3")
    return key, values


def _yaml(text: str, given: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"`{given}`: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _parsed(tree: dict[str, Any], *, origin: str) -> Study:
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(explain(e, Study) for e in error.errors())) from None


def _arms(vary: dict[str, Any]) -> tuple[Arm, ...]:
    """The arms that have names, crossed with the grid of keys that have values."""
    named = [Arm(name, own) for name, own in vary.items() if isinstance(own, dict)]
    grid = [[(key, value) for value in own] for key, own in vary.items() if isinstance(own, list)]
    return tuple(
        Arm(
            ", ".join(filter(None, [arm.name, *(f"{key}={_in_line(value)}" for key, value in point)])),
            {**arm.overrides, **dict(point)},
        )
        for arm in named or [Arm("", {})]
        for point in itertools.product(*grid)
    )


def _in_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _checked(plan: Plan) -> Plan:
    """The plan, when every recipe of it has been read.

    Raises:
        UserError: names the arm.
    """
    study, known = plan.study, [arm.name for arm in plan.arms]
    for arm in plan.arms:
        if own := [key for key in (*study.set, *arm.overrides) if key in OWN_KEYS]:
            raise UserError(f"arm {arm.name}: `{own[0]}` is the study's own to set; give `output` and `seeds` there")
    if len({arm.folder for arm in plan.arms}) < len(known):
        raise UserError(f"vary: two arms have the same name or folder ({', '.join(known)}); name them apart")
    if plan.baseline not in known:
        raise UserError(f"baseline: there is no arm `{plan.baseline}`; take one of {', '.join(known)}")
    recipes = {arm.name: plan.recipe(arm, study.seeds[0]) for arm in plan.arms}
    for recipe in recipes.values():
        offline.check_recipe({"recipe": recipe})
    if study.halving and study.halving.by == "loss":
        _check_one_loss(recipes)
    return plan


def _check_one_loss(recipes: dict[str, Recipe]) -> None:
    """Refuse to choose between losses of different things."""
    for key in _differing(list(recipes.values())):
        if key.partition(".")[0] in OF_THE_LOSS:
            raise UserError(
                f"halving by loss: the arms differ in {key}, so that their losses are of different things; take a "
                "figure such as pair_accuracy"
            )


def _differing(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Dotted keys in which recipes differ from the first."""
    first, *others = [yaml.safe_load(dump_recipe(recipe)) for recipe in recipes]
    yield from sorted({key for other in others for key in differing_keys(first, other)} - set(OWN_KEYS))
