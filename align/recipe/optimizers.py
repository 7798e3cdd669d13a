"""Which optimizers there are, by source; every name trains here or is refused with what it lacks.

Names stand here because a recipe is checked before torch, transformers or pytorch-optimizer are loaded; a test compares
them with what those have.
"""

import difflib
import importlib.util
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, model_validator

from align.section import Named, Strict

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
)
"""Of transformers.TrainingArguments."""
OWN = ("lamb", "dct_adamw")
"""Of this project, where no library's is right: pytorch-optimizer's LAMB takes first steps ten times too long, and
none projects to cosines."""
_TORCH = "adadelta adafactor adagrad adam adamax adamw asgd lbfgs muon nadam radam rmsprop rprop sgd sparseadam"
TORCH = tuple(_TORCH.split())
"""Classes of torch.optim in small letters."""
_PYTORCH_OPTIMIZER = """
    a2grad accsgd adabelief adabound adadelta adafactor adagc adago adahessian adai adalite adalomo adam adamax
    adamc adamg adammini adamod adamp adams adamuon adamw adamwsn adan adanorm adapnm adashift adasmooth adatam
    ademamix adopt aggmo aida alice alig amos ano apollo apollodqn asgd avagrad bcos bsam came conda dadaptadagrad
    dadaptadam dadaptadan dadaptlion dadaptsgd dash demo diffgrad distributedmuon dualadam emofact emolynx emonavi
    exadam fadam fira flashadamw focus fromage ftrl galore grams gravity grokfastadamw kate kron lamb laprop lars
    lbfgs lion lomo lorarite madgrad magma mars msvag muon muonclip nadam nero normuon novograd padam pid pnm
    prodigy qhadam qhm racs radam ranger ranger21 rmsprop rose sara scalableshampoo schedulefreeadamw
    schedulefreeradam schedulefreesgd scion scionlight sgd sgdp sgdsai sgdw shampoo signsgd simplifiedademamix sm3
    soap sophiah spam spectralsphere splus srmm stableadamw stablespam swats tam tiger vsgd yogi
"""
PYTORCH_OPTIMIZER = tuple(_PYTORCH_OPTIMIZER.split())
"""Of pytorch_optimizer.load_optimizer, in version 4.1."""

SOURCES: dict[str, tuple[str, ...]] = {
    "align": OWN,
    "transformers": OPTIMIZERS,
    "torch": TORCH,
    "pytorch_optimizer": PYTORCH_OPTIMIZER,
}
"""Where a name is looked up, in this order."""
Source = Literal["align", "transformers", "torch", "pytorch_optimizer"]

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", ("_bnb", "paged_", "ademamix", "lion_", "adamw_8bit", "galore_")),
    "torchao": ("torchao", ("adamw_torch_4bit", "adamw_torch_8bit")),
    "optimi": ("torch-optimi", ("stable_adamw",)),
    "galore_torch": ("galore-torch", ("galore_",)),
    "apollo_torch": ("apollo-torch", ("apollo_",)),
    "schedulefree": ("schedulefree", ("schedule_free_",)),
}
"""Module -> the package that has it, and parts of transformers' names that need it."""
EXTRA = "'align-lm[optimizers]'"
"""What installs pytorch-optimizer."""

FUSED = "it changes weights within the backward pass, and a step here has several of them"
CLOSURE = "it computes the loss anew within its step, and a step here has many passes"
READS_LOSS = "it reads the loss within its step, which has none here, and without one it is another optimizer"
CURVATURE = "it differentiates gradients, and those of a step's passes are summed and gone"
PROCESSES = "it exchanges momenta between processes itself, and here the gradients are put together"
IMPOSSIBLE: dict[str, dict[str, str]] = {
    "align": {},
    "transformers": {
        **dict.fromkeys((name for name in OPTIMIZERS if name.endswith("_layerwise")), FUSED),
        **dict.fromkeys(("lomo", "adalomo"), FUSED),
        "grokadamw": "it loses its moments in a checkpoint (pytorch-optimizer's grokfastadamw keeps them)",
        "adamw_torch_xla": "it is for TPUs",
        "adamw_torch_npu_fused": "it is for Ascend's NPUs",
        "adamw_anyprecision": "it needs torchdistx, which is no longer published",
    },
    "torch": {"lbfgs": CLOSURE, "sparseadam": "it is for sparse gradients, and none is here"},
    "pytorch_optimizer": {
        **dict.fromkeys(("lomo", "adalomo"), FUSED),
        **dict.fromkeys(("bsam", "lbfgs"), CLOSURE),
        **dict.fromkeys(("alig", "emofact", "emolynx", "emonavi"), READS_LOSS),
        **dict.fromkeys(("adahessian", "sophiah"), CURVATURE),
        **dict.fromkeys(("demo", "distributedmuon"), PROCESSES),
        "a2grad": "its step takes no learning rate, so that neither `learning_rate` nor `schedule` would act",
        "adashift": "it keeps queues of gradients, which no checkpoint gives back",
        "adammini": "it cuts a whole model by the names of its layers, which adapters change",
        "lamb": "its first steps are 1/(1-beta1) times too long; `lamb` without a source is the paper's",
    },
}
"""Source -> name -> why it does not train."""

LOW_RANK = {
    "galore_adamw": "proj_type",
    "galore_adamw_8bit": "proj_type",
    "galore_adafactor": "proj_type",
    "apollo_adamw": "proj_type",
    "galore": "projection_type",
    "fira": "projection_type",
    "apollo": "projection_type",
    "conda": "",
    "dct_adamw": "",
}
"""Optimizers that project the gradient of each matrix -> what their libraries call the kind of projection; Conda
projects all of them, by options of its own, and DCT has one kind."""
AVERAGING = (
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
    *("schedulefreeadamw", "schedulefreeradam", "schedulefreesgd"),
)
"""Optimizers whose weights are an average, which stands in place of a falling learning rate."""


class OptimizerSection(Strict):
    """What takes the steps: a name, or a name and options as its library calls them."""

    model_config = ConfigDict(extra="allow")

    name: str = "adamw_torch"
    """Of this project's, transformers', torch's or pytorch-optimizer's; docs/optimizers.md lists all."""
    source: Source | None = None
    """Whose, where several have the name; by default the first of the four."""

    @model_validator(mode="after")
    def _can_train(self) -> "OptimizerSection":
        if self.source is None and not any(self.name in names for names in SOURCES.values()):
            known = [name for names in SOURCES.values() for name in names]
            near = difflib.get_close_matches(self.name, known, n=1) or ["adamw_torch"]
            raise ValueError(f"there is no optimizer `{self.name}`; did you mean `{near[0]}`?")
        if self.name not in SOURCES[self.of]:
            where = ", ".join(source for source, names in SOURCES.items() if self.name in names) or "nobody"
            raise ValueError(f"{self.of} has no optimizer `{self.name}`; {where} has")
        if problem := why_not(self.name, self.of):
            raise ValueError(problem)
        return self

    @property
    def of(self) -> str:
        """The source that has it."""
        return self.source or next(source for source, names in SOURCES.items() if self.name in names)

    @property
    def options(self) -> dict[str, Any]:
        """What its class is told besides."""
        return dict(self.model_extra or {})

    def plain(self) -> Any:
        """As one writes it: the name alone where it is all that is said."""
        told = {"source": self.source} if self.source else {}
        return {"name": self.name} | told | self.options if told or self.options else self.name


OptimizerConfig = Annotated[OptimizerSection, Named("adamw_torch")]


def why_not(optimizer: str, source: str = "transformers") -> str:
    """Why a source's optimizer cannot train here and what to do; empty where it can.

    Source: transformers' trainer_optimizer.py and the classes of pytorch_optimizer 4.1, for what each needs.
    """
    if reason := IMPOSSIBLE[source].get(optimizer):
        return f"`{optimizer}` cannot train here: {reason}; take `adamw_torch`, or `adafactor` for less memory"
    if source == "pytorch_optimizer" and importlib.util.find_spec(source) is None:
        return f"`{optimizer}` needs a package: pip install {EXTRA}; or take `adamw_torch` or `adafactor`"
    for module, (package, parts) in PACKAGES.items() if source == "transformers" else ():
        if any(part in optimizer for part in parts) and importlib.util.find_spec(module) is None:
            return f"`{optimizer}` needs a package: pip install {package}; or take `adamw_torch` or `adafactor`"
    return ""


def _rate(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\d*\.?\d+(e-?\d+)?x", value):
        raise ValueError(f"`{value}` is no learning rate; write 16x for 16 times train.learning_rate, or a number")
    if isinstance(value, str) and not float(value[:-1]):
        raise ValueError("a rate of 0 trains nothing; leave the layers out of `policy.adapter.targets`")
    return value


Rate = Annotated[PositiveFloat | str, AfterValidator(_rate)]
"""A learning rate, or `16x`: as many times the others'."""
Rates = dict[Annotated[str, Field(min_length=1)], Rate]


def rate_of(value: float | str, learning_rate: float) -> float:
    """A learning rate as a number."""
    return float(value[:-1]) * learning_rate if isinstance(value, str) else float(value)
