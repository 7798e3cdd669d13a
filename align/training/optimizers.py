"""What a recipe's `train.optimizer` and `train.groups` become: a class, its options, and groups of parameters."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from align.errors import UserError
from align.model.forward import base_model
from align.recipe.optimizers import LOW_RANK, OptimizerSection, rate_of
from align.recipe.settings import TrainSection
from align.training.dct import DctAdamW
from align.training.lamb import Beside, Lamb

MUON_GROUPS = ("muon", "muonclip", "adamuon", "adago", "normuon")
"""Of pytorch_optimizer: they are told which of their groups are matrices to orthogonalise."""
MATRICES_ONLY = (("torch", "muon"), ("pytorch_optimizer", "spectralsphere"))
"""Defined on matrices alone, so that AdamW takes the rest."""
LIKE_ADAMW = {"torch": {"muon": {"adjust_lr_fn": "match_rms_adamw"}}}
"""Defaults of ours: Muon's steps as long as AdamW's, so that one learning rate suits both."""
RANKS = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
"""Options of a projected group, and the defaults that transformers gives them."""
APOLLO = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
LOW_RANK_CLASSES = {
    "galore_adamw": "galore_torch:GaLoreAdamW",
    "galore_adamw_8bit": "galore_torch:GaLoreAdamW8bit",
    "galore_adafactor": "galore_torch:GaLoreAdafactor",
    "apollo_adamw": "apollo_torch:APOLLOAdamW",
}
"""transformers makes the groups of these itself, without weight decay by name and without other rates."""
KEPT = (
    "galore_torch.galore_projector:GaLoreProjector",
    "apollo_torch.random_projector:GradientProjector",
    "apollo_torch.svd_projector:GaLoreProjector",
    "pytorch_optimizer.optimizer.utils.galore:GaLoreProjector",
    "pytorch_optimizer.optimizer.utils.preconditioner:PreConditioner",
    "pytorch_optimizer.optimizer.utils.preconditioner:PreConditionerType",
    "pytorch_optimizer.optimizer.utils.graft:Graft",
    "pytorch_optimizer.optimizer.utils.graft:SGDGraft",
    "pytorch_optimizer.optimizer.utils.graft:SQRTNGraft",
    "pytorch_optimizer.optimizer.utils.graft:AdaGradGraft",
    "pytorch_optimizer.optimizer.utils.graft:RMSPropGraft",
    "pytorch_optimizer.optimizer.scion:LMONorm",
)
"""Plain objects in the states of optimizers: torch reads them from a checkpoint where it is told that they are no
harm."""
TRIED = (320, 320)
"""Of a matrix whose step is tried before a run: bitsandbytes has other states for 100,000 numbers and more."""
RECIPES_OWN = {
    "lr": "train.learning_rate",
    "max_lr": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "maximize": "objective",
    "num_iterations": "train.steps",
}
"""Options that are keys of a recipe."""


def class_and_options(train: TrainSection, arguments: TrainingArguments, *, steps: int) -> tuple[Any, dict[str, Any]]:
    """The class of the recipe's optimizer and what it is made with, besides its parameters.

    Raises:
        UserError: its package cannot be loaded, or it has no such option; names the key.
    """
    own = train.optimizer
    try:
        kind, options = _found(own, arguments)
    except ImportError as error:
        raise UserError(f"train.optimizer: `{own.name}` cannot be loaded ({' '.join(str(error).split())})") from error
    takes, given = _takes(kind, own), own.options
    for option in given:
        if option in RECIPES_OWN:
            raise UserError(f"train.optimizer: `{option}` of `{own.name}` is {RECIPES_OWN[option]}")
        if option not in takes:
            near = difflib.get_close_matches(option, takes, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(takes) or 'none'}"
            raise UserError(f"train.optimizer: `{option}` is no option of `{own.name}`; {hint}")
    if train.weight_decay and "weight_decay" not in _parameters(kind):
        raise UserError(f"train.weight_decay: `{own.name}` has none; leave it out")
    if own.name == "ranger21":
        options["num_iterations"] = steps
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return kind, options | {name: value for name, value in told.items() if name not in group_options(own)}


def _found(own: OptimizerSection, arguments: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    rate = {"lr": arguments.learning_rate}
    match own.of:
        case "align":
            return {"lamb": Lamb, "dct_adamw": DctAdamW}[own.name], rate
        case "transformers" if own.name in LOW_RANK_CLASSES:
            kind = _loaded(LOW_RANK_CLASSES[own.name])
            factored = {"scale_parameter": False, "relative_step": False}
            return kind, rate | (factored if "adafactor" in own.name else {"betas": _betas(arguments)})
        case "transformers":
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
            return kind, dict(options)
        case "torch":
            classes = {name.lower(): getattr(torch.optim, name) for name in torch.optim.__all__}
            return classes[own.name], rate | LIKE_ADAMW["torch"].get(own.name, {})
        case _:
            from pytorch_optimizer import load_optimizer  # takes seconds

            return load_optimizer(own.name), rate


def _betas(arguments: TrainingArguments) -> tuple[float, float]:
    return (arguments.adam_beta1, arguments.adam_beta2)


def _loaded(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def _takes(kind: Any, own: OptimizerSection) -> list[str]:
    """The options that a recipe can give: functions cannot be written in one."""
    left_out = {"params", "model", "optimizer", "kwargs", "optim_bits", "is_paged", *RECIPES_OWN}
    named = [n for n, p in _parameters(kind).items() if n not in left_out and not callable(p.default)]
    return list(dict.fromkeys([*group_options(own), *named]))


def group_options(own: OptimizerSection) -> dict[str, Any]:
    """What a projected group of an optimizer says of its projection; empty where it projects nothing."""
    kind_of = LOW_RANK.get(own.name)
    if kind_of is None or own.of == "torch" or own.name == "conda":
        return {}
    kind = {kind_of: "std"} if kind_of else {}
    defaults = RANKS | kind | (APOLLO if own.name == "apollo_adamw" else {})
    return {name: own.options.get(name, value) for name, value in defaults.items()}


def parameter_groups(
    train: TrainSection, model: nn.Module, decayed: Collection[str], hidden: Callable[[str, Any], bool] | None = None
) -> list[dict[str, Any]]:
    """The parameters that train, by rate and by weight decay, the first group at the recipe's own rate.

    Args:
        decayed: names of the parameters that decay.
        hidden: whether a parameter is a matrix between embedding and head; by default what the model says.

    Raises:
        UserError: a key of `train.groups` is of no parameter, or two are of the same.
    """
    rates, own = rates_of(train, model), train.optimizer
    hidden = hidden or _inside(model)
    splits = _splits(own)
    found: dict[tuple[float | None, bool, bool], list[nn.Parameter]] = {}
    for rate in (None, *dict.fromkeys(rates.values())):
        for decays in (True, False):
            for matrix in (True, False) if splits else (True,):
                found[rate, decays, matrix] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = hidden(name, parameter) if splits else True
            found[rates.get(name), name in decayed, matrix].append(parameter)
    groups = []
    for (rate, decays, matrix), parameters in found.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": train.weight_decay if decays else 0.0}
        group |= {} if rate is None else {"lr": rate}
        group |= splits(matrix) if splits else {}
        # transformers makes two groups, one of them empty for LoRA; a checkpoint of before has both.
        if parameters or (own.of == "transformers" and rate is None and not splits):
            groups.append(group)
    return groups


def _splits(own: OptimizerSection) -> Callable[[bool], dict[str, Any]] | None:
    """What the optimizer is told of a group of hidden matrices, or of another; None where it makes no difference."""
    if projected := group_options(own):
        return lambda matrix: dict(projected) if matrix else {}
    if own.of == "pytorch_optimizer" and own.name in MUON_GROUPS:
        return lambda matrix: {"use_muon": matrix}
    if (own.of, own.name) in MATRICES_ONLY:
        return lambda matrix: {"matrices": matrix}
    return None


def _inside(model: nn.Module) -> Callable[[str, Any], bool]:
    outside = {id(p) for part in ("embeddings", "head") for p in _part(model, part)}
    return lambda name, parameter: parameter.ndim == 2 and id(parameter) not in outside


def _part(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters of the embedding or of the head."""
    base: Any = base_model(model.model)  # type: ignore[arg-type]
    found = base.get_input_embeddings() if name == "embeddings" else base.get_output_embeddings()
    for module in (found, getattr(base, "score", None) if name == "head" else None):  # of a reward model
        if isinstance(module, nn.Module):
            yield from module.parameters()


def check_parameters(train: TrainSection, model: nn.Module) -> None:
    """Refuse what does not go with the parameters that train, before anything is measured.

    Raises:
        UserError: names the key.
    """
    rates_of(train, model)
    if train.optimizer.name != "lorarite":
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    pairs = [name.replace("lora_A", "lora_B") for name in names[::2]] == names[1::2]
    if train.groups or not pairs or not any("lora_A" in name for name in names):
        raise UserError(
            "train.optimizer: `lorarite` steps LoRA's A and B together; take policy.adapter=lora, without train.groups "
            "and without other parameters"
        )


def rates_of(train: TrainSection, model: nn.Module) -> dict[str, float]:
    """The learning rate of every parameter that a key of `train.groups` is about.

    Raises:
        UserError: a key is of no parameter that trains, or two are of the same.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by: dict[str, str] = {}
    for key in train.groups:
        names = _matched(key, trained, model)
        if not names:
            parts = sorted({part for name in trained for part in name.split(".") if not part.isdigit()})
            raise UserError(f"train.groups: no parameter that trains is of `{key}`; there are {', '.join(parts)}")
        for name in names:
            if name in by:
                raise UserError(f"train.groups: {name} is of `{by[name]}` and of `{key}`; give keys that do not meet")
            by[name] = key
    return {name: rate_of(train.groups[key], train.learning_rate) for name, key in by.items()}


def _matched(key: str, trained: dict[str, nn.Parameter], model: nn.Module) -> list[str]:
    if key in ("embeddings", "head"):
        wanted = {id(p) for p in _part(model, key)}
        return [name for name, parameter in trained.items() if id(parameter) in wanted]
    exact = [name for name in trained if key in name.split(".")]
    return exact or [name for name in trained if re.search(key, name)]


def make_optimizer(kind: Any, options: dict[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of groups.

    Raises:
        UserError: it does not take what it is told.
    """
    try:
        return kind(groups, **options)
    except Exception as error:
        raise UserError(f"train.optimizer: {' '.join(str(error).split())}") from error


def made_with(own: OptimizerSection, kind: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class, beside AdamW where it is defined on matrices alone."""
    return (Beside, {**options, "kind": kind}) if (own.of, own.name) in MATRICES_ONLY else (kind, options)


def read_back() -> None:
    """Let a checkpoint be read that holds what the optimizers loaded so far keep beside tensors."""
    known = [place for place in KEPT if place.partition(":")[0] in sys.modules]
    torch.serialization.add_safe_globals([_loaded(place) for place in known])


def check_optimizer(train: TrainSection, arguments: TrainingArguments) -> None:
    """Refuse, before there is a run, an optimizer that cannot be made as the recipe says, or whose step fails.

    Raises:
        UserError: says why.
    """
    own = train.optimizer
    if own.plain() == OptimizerSection().name:
        return
    kind, options = made_with(own, *class_and_options(train, arguments, steps=train.steps or 100))
    splits = _splits(own)
    matrices = [nn.Parameter(torch.ones(TRIED)) for _ in range(2)]
    optimizer = make_optimizer(kind, options, [{"params": matrices, **(splits(True) if splits else {})}])
    if "torchao" in kind.__module__:  # which compiles its step, for minutes on a CPU
        return
    for parameter in matrices:
        parameter.grad = torch.full_like(parameter, 0.1)
    averaging(optimizer, train=True)
    try:
        optimizer.step()
    except Exception as error:
        raise UserError(f"train.optimizer: `{own.name}` fails ({' '.join(str(error).split())})") from error


def averaging(optimizer: Any, *, train: bool) -> None:
    """Let an optimizer that averages put the weights into place that gradients are taken at, or the average."""
    turn = getattr(optimizer, "train" if train else "eval", None)
    if callable(turn):
        turn()
