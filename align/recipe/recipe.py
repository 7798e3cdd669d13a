"""The recipe: what a run does, as frozen models; and `load_recipe`, from YAML and dotted overrides."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from align.bounds import Loader, load_yaml
from align.data.config import DataSection, SourceSection
from align.errors import UserError
from align.model.adapter import ADAPTER
from align.model.config import ContrastSection, PolicySection, ReferenceSection, TokenRewards
from align.objectives import Objective, ObjectiveConfig, ScoreConfig
from align.objectives.divergence import ReverseKL
from align.objectives.objective import OwnObjective
from align.objectives.scores import LengthDesensitised, LikelihoodMean, LogRatio, OwnScore
from align.objectives.token_reg import Tgdpo, TokenReg, TokenWeights
from align.own_code import is_of_a_file
from align.recipe.consent import with_consent
from align.recipe.mistakes import explain
from align.recipe.other_tools import foreign_recipe
from align.recipe.settings import RewardSection, TrainSection, check_reward_objectives
from align.rollout.config import OnlineSection, RolloutSection
from align.section import Free, Strict, known_keys
from align.shipped import names, recipe_file, with_shipped_paths
from rewards.config import ScorerConfig
from rewards.head_config import Attributes, BradleyTerry, RewardObjective

log = logging.getLogger("align")

__all__ = ["Recipe", "SourceSection", "dump_recipe", "load_recipe", "parse_recipe", "read_recipe", "with_consent"]


class SamplingSection(Strict):
    """Completions that the policy writes before and after training, for the table at the end."""

    prompts: Annotated[int, Field(ge=0)] = 16
    """Held-out prompts to complete; 0 turns sampling off."""
    max_tokens: PositiveInt = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    show: Annotated[int, Field(ge=0), Free()] = 2
    """Completions printed before and after."""
    token_lists: Annotated[int, Field(ge=0)] = 6
    """Held-out lists written token by token, before and after, to token_view.jsonl; 0 for none."""
    reward: ScorerConfig | None = None
    """Scorer whose mean reward of the sampled completions goes into the table."""

    @field_validator("reward")
    @classmethod
    def _scores_a_completion_alone(cls, value: ScorerConfig | None) -> ScorerConfig | None:
        if getattr(value, "answer_column", None) or getattr(value, "listwise", False):
            raise ValueError("needs a reference answer or other completions, which a sample lacks; take another scorer")
        return value


class Recipe(Strict):
    """A whole run."""

    task: Literal["preference", "sft", "reward"] = "preference"
    """`sft` trains on the best completion of each row by plain next-token loss: a warm-up before `preference`. `reward`
    trains a reward model: a head on the model of `policy`."""
    output: Annotated[str, Free(unless=("online",))]
    """The run directory; a run that is already there goes on."""
    policy: PolicySection
    reference: ReferenceSection = ReferenceSection()
    data: DataSection
    score: ScoreConfig = LogRatio()
    """The policy's implicit reward of a completion."""
    reward: RewardSection = RewardSection()
    """The head, where `task` is `reward`."""
    objective: tuple[Annotated[ObjectiveConfig | RewardObjective, Field(discriminator="name")], ...] = ()
    """One objective, or several with weights; their sum is the loss of a list."""
    regularizer: TokenReg | None = None
    """T-REG: `{name: token_reg, alpha: 0.25}` adds a token-level term to the first objective."""
    token_weights: TokenWeights | None = None
    """How much single tokens count in the score: `{name: tgdpo}`, or the rows' own with `{name: column}`."""
    token_rewards: TokenRewards = ContrastSection()
    """Where the token rewards of `token_reg` and `tgdpo` come from."""
    wpo: Literal["clamped", "unclamped"] | None = None
    """Weight a list by how likely the policy finds its completions (WPO)."""
    dpop: Annotated[float, Field(ge=0)] | None = None
    """DPOP floor: lambda of the penalty on a best completion that falls below its reference log-probability."""
    z_penalty: PositiveFloat | None = None
    """Factor of the mean over tokens of (log Z)^2, added to each list's loss: holds the logits' scale, 1e-4 in PaLM."""
    train: TrainSection = TrainSection()
    sampling: SamplingSection = SamplingSection()
    rollout: RolloutSection = RolloutSection()
    online: OnlineSection | None = None
    """Train in iterations, each on completions that the policy has just written; needs `rollout.reward`."""

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = [value] if isinstance(value, dict | str) else value
        return tuple({"name": one} if isinstance(one, str) else one for one in many) if isinstance(many, list) else many

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        if self.task == "preference" and not self.objective:
            raise ValueError("objective: missing; for example `objective: {name: lambda}`")
        if self.task == "reward":
            self._check_reward()
        elif self.reward != RewardSection():
            raise ValueError("reward: only `task: reward` trains a head; set it, or remove the section")
        elif named := [term.name for term in self.objective if isinstance(term, BradleyTerry | Attributes)]:
            raise ValueError(f"objective: `{named[0]}` trains a reward model; set `task: reward`, or use `logistic`")
        if self.task == "sft" and self.objective:
            raise ValueError("objective: `task: sft` has its own loss; remove it or set `task: preference`")
        if self.task == "sft" and (self.regularizer or self.token_weights):
            raise ValueError("task: sft takes no `regularizer` and no `token_weights`; remove them")
        self.train.check_measured()
        self.train.check_schedule()
        if self.regularizer:
            self._check_regularizer()
        if self.data.ches and self.policy.adapter.needs_steps and not self.train.steps:
            raise ValueError(
                f"policy.adapter: {self.policy.adapter.name} must know the number of steps before `data.ches` chooses "
                "the lists; set train.steps"
            )
        return self

    @model_validator(mode="after")
    def _settings_reach_the_loss(self) -> "Recipe":
        """A setting that the loss would not read is a mistake."""
        if self.task == "reward":
            return self
        if self.task == "sft":
            scores: list[Any] = [LikelihoodMean(beta=1.0)]
        else:
            scores = [getattr(term, "score", None) or self.score for term in self.objective]
        if self.score != LogRatio() and self.score not in scores:
            raise ValueError(
                "score: no objective reads it, since each has a score of its own; give it to the objective "
                "(`objective.score`), or remove it"
            )
        if self.dpop is not None and not any(score.needs_reference for score in scores):
            raise ValueError("dpop: there is no reference to fall below; use a score such as `log_ratio`, or remove it")
        if self.task == "sft" and self.wpo:
            raise ValueError("wpo: `task: sft` weighs every list the same; remove it")
        if self.token_rewards != ContrastSection() and not self.needs_token_rewards:
            raise ValueError("token_rewards: set `regularizer` or `token_weights: {name: tgdpo}`, or remove it")
        return self

    @model_validator(mode="after")
    def _reference_can_move(self) -> "Recipe":
        if self.reference.name != "moving":
            return self
        if self.online:
            raise ValueError("reference: `moving` is within one run; online takes `online.reference: moving`")
        scores = [getattr(term, "score", None) or self.score for term in self.objective]
        if self.task != "preference" or not any(score.needs_reference for score in scores):
            raise ValueError("reference: no objective compares with one that moves; use a score such as `log_ratio`")
        if not self.policy.adapter.averages:
            exact = ", ".join(name for name, own in ADAPTER.classes.items() if own.averages)
            raise ValueError(
                f"reference: `moving` averages weights exactly, and {self.policy.adapter.name} is no sum of the base's "
                f"and a product of two factors; take one of {exact}, or {{name: initial}}"
            )
        return self

    @model_validator(mode="after")
    def _online_can_rank(self) -> "Recipe":
        if self.online and not (self.rollout.reward and self.rollout.completions > 1):
            raise ValueError("online: needs `rollout.reward`, and `rollout.completions` of 2 or more to rank")
        if self.online and self.task != "preference":
            raise ValueError("online: only `task: preference` trains on lists that the policy wrote")
        return self

    def _check_reward(self) -> None:
        if not self.objective:
            raise ValueError("objective: missing; for example `objective: {name: bradley_terry}`")
        of_policy = (self.wpo, self.dpop, self.z_penalty, self.regularizer, self.token_weights, self.data.ches)
        if any(section is not None for section in of_policy) or self.score != LogRatio():
            raise ValueError(
                "score, wpo, dpop, z_penalty, regularizer, token_weights and data.ches are about a policy's "
                "log-probabilities; a reward model has none"
            )
        if self.data.append_eos is not None:
            raise ValueError("data.append_eos: a reward model reads a text as it will be scored; leave it out")
        if self.data.learn != "assistant":
            raise ValueError("data.learn: a reward model learns no token; leave it out")
        if self.reward.balance == "more" and len(self.data.sources) < 2:
            raise ValueError("reward.balance: `more` weighs several data.sources; give two or more, or remove it")
        check_reward_objectives(self.reward, self.objective)

    def _check_regularizer(self) -> None:
        first = self.objective[0] if self.objective else None
        if not isinstance(first, Objective) or first.holds.min_list_size < 2:
            raise ValueError("regularizer: token_reg weighs pairs of completions; put `logistic` or `lambda` first")
        score = first.score or self.score
        if isinstance(score, LengthDesensitised | OwnScore) or getattr(score, "divergence", ReverseKL()) != ReverseKL():
            raise ValueError(
                "regularizer: token_reg is defined for `log_ratio`, `log_ratio_mean`, `likelihood` and "
                "`likelihood_mean` without a divergence; set `score` to one of them"
            )

    @property
    def own_functions(self) -> list[str]:
        """The `file.py:function` of the user's own that training calls, classes of callbacks among them."""
        scores = [getattr(term, "score", None) for term in self.objective]
        sections = [*self.objective, self.score, *scores]
        functions = {own.function for own in sections if isinstance(own, OwnObjective | OwnScore)}
        return sorted(functions | {place for place in self.train.callbacks if is_of_a_file(place)})

    @property
    def needs_token_rewards(self) -> bool:
        """Whether some token-level member looks at token rewards."""
        return self.regularizer is not None or isinstance(self.token_weights, Tgdpo)


WITH_SOURCES = "with_sources"
"""Key of a recipe file: the keys that suit its own rows, and are left out where the command line replaces these."""


class _OnceLoader(Loader):
    """Plain YAML, in which no key stands twice: the last would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for twice in (key for key in keys if keys.count(key) > 1):
            raise yaml.constructor.ConstructorError(None, None, f"`{twice}` is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, trust_remote_code: bool = False, allow_code: bool | None = False
) -> Recipe:
    """Read a recipe file to run it, with dotted overrides laid over it.

    Args:
        path: a YAML file, or the name of a recipe that ships, such as `lipo_lambda`.
        overrides: `key=value` strings such as `train.learning_rate=1e-4` or `data.sources.0.path=rows.jsonl`; the
            values are YAML.
        trust_remote_code: consent to code that a model comes with; the file's own `policy.trust_remote_code` is none.
        allow_code: consent to functions that the file names although it need not be of the user's own writing; None
            where none of them will be called.

    Raises:
        UserError: no such file, broken YAML, a key or value that a recipe cannot hold, with the nearest known key, or
            code that nobody has consented to.
    """
    recipe = read_recipe(path, overrides)
    given = [override.partition("=")[0] for override in overrides]
    consented: Recipe = with_consent(
        recipe, recipe_file(path), given, trust_remote_code=trust_remote_code, allow_code=allow_code
    )
    return consented


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe to look at, as `load_recipe` reads it; with no consent to run anything.

    Raises:
        UserError: see `load_recipe`.
    """
    try:
        tree = load_yaml(recipe_file(path).read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); {_what_to_give(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections such as `policy:` and `data:`")
    if not any(isinstance(tree.get(section), dict) for section in ("policy", "data")):
        _refuse_foreign(tree, path)
    marked, before = tree.pop(WITH_SOURCES, []), _paths(tree)
    for override in overrides:
        _lay_over(tree, override)
    if _paths(tree) != before:
        _leave_out(tree, ["data.eval_sources", *marked], given=[override.partition("=")[0] for override in overrides])
    return parse_recipe(with_shipped_paths(tree), origin=str(path))


def _what_to_give(path: str | Path) -> str:
    if Path(path).suffix:
        return "give the path of a YAML file"
    return f"give the path of a YAML file, or the name of a recipe that ships: {', '.join(names('recipes', '.yaml'))}"


def _paths(tree: dict[str, Any]) -> list[Any]:
    """The paths of the sources, in whichever form they are given."""
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else data
    entries = sources if isinstance(sources, list) else [sources]
    return [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]


def _leave_out(tree: dict[str, Any], keys: list[str], *, given: list[str]) -> None:
    """Take out what a recipe sets for its own rows, which an override has replaced; what overrides set too stays."""
    left_out = []
    for key in keys:
        parents, _, last = key.rpartition(".")
        node: Any = tree
        for parent in filter(None, parents.split(".")):
            node = node.get(parent) if isinstance(node, dict) else None
        set_too = any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in given)
        if isinstance(node, dict) and last in node and not set_too:
            del node[last]
            left_out.append(key)
    if left_out:
        log.warning(
            "data.sources is another than the recipe's, so what suits its own rows is left out: %s; give it too to "
            "keep it (held out is now data.eval_fraction of your rows, unless you give data.eval_sources)",
            ", ".join(left_out),
        )


def _refuse_foreign(tree: dict[str, Any], path: str | Path) -> None:
    if sentence := foreign_recipe(tree, recipe_keys()):
        raise UserError(f"{path}: {sentence}")


def recipe_keys() -> frozenset[str]:
    """Every dotted key that a recipe can hold; places in lists are left out."""
    return frozenset(".".join(path) for path in known_keys(Recipe))


def parse_recipe(tree: dict[str, Any], *, origin: str) -> Recipe:
    """A recipe from its nested dictionaries; `origin` names it in messages."""
    broken = _half_character(tree)
    if broken is not None:
        raise UserError(f"{origin}: `{broken}` holds half a character (a lone surrogate); mend the text")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]  # else of faulty entries
        raise UserError(f"{origin}: " + "; ".join(explain(e, Recipe) for e in errors)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    tree = recipe.model_dump(mode="json")
    if len(recipe.objective) == 1:  # as one writes it
        (tree["objective"],) = tree["objective"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def dump_set(recipe: Recipe) -> str:
    """What a recipe sets, as YAML that `load_recipe` reads back: keys at their defaults are left out."""
    return yaml.safe_dump(_set_keys(recipe), sort_keys=False, allow_unicode=True, width=120)


def _set_keys(section: BaseModel) -> dict[str, Any]:
    """The keys of a section that are not at their defaults, and the name that chooses it."""
    dumped, found = section.model_dump(mode="json"), {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key != "name" and value == field.get_default(call_default_factory=True):
            continue
        many = isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
        below = [_set_keys(one) for one in value] if many else None
        found[key] = _set_keys(value) if isinstance(value, BaseModel) else below or dumped[key]
    return found | (section.model_extra or {})


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"`{override}`: an override is key=value, such as train.learning_rate=1e-4")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = _child(node, parent, key)
    try:
        value = load_yaml(text, _OnceLoader)
    except yaml.YAMLError as error:
        raise UserError(f"`{override}`: the value is not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, name: str, key: str) -> dict | list:
    """The mapping or list below a key, made where there is none."""
    if isinstance(node, list):
        child = node[_index(node, name, key)]
    else:
        child = node[name] = {} if node.get(name) is None else node[name]
    if not isinstance(child, dict | list):
        raise UserError(f"`{key}`: `{name}` is {child!r} and has nothing below it; set it whole")
    return child


def _index(node: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UserError(f"`{key}`: `{name}` is no place in a list of {len(node)}; count from 0, or set the list whole")
    return int(name)


def _half_character(node: Any, key: str = "") -> str | None:
    """The dotted key of the first text that is no valid Unicode, without the text itself."""
    if isinstance(node, str):
        return key if any("\ud800" <= letter <= "\udfff" for letter in node) else None
    if isinstance(node, dict):
        below = [(str(name), own) for name, own in node.items()]
        if any(_half_character(name, name) is not None for name, _ in below):
            return f"{key} (a key)".strip()
    else:
        below = [(str(k), own) for k, own in enumerate(node)] if isinstance(node, list | tuple) else []
    found = (_half_character(own, f"{key}.{name}".lstrip(".")) for name, own in below)
    return next((own for own in found if own is not None), None)
