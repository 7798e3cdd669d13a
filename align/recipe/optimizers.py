"""Which of transformers' optimizer names train here; every other is refused with what it lacks."""

import importlib.util

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", ("_bnb", "paged_", "ademamix", "lion_", "adamw_8bit")),
    "torchao": ("torchao", ("adamw_torch_4bit", "adamw_torch_8bit")),
    "grokadamw": ("grokadamw", ("grokadamw",)),
    "optimi": ("torch-optimi", ("stable_adamw",)),
}
"""Module -> the package that has it, and parts of the names that need it."""

IMPOSSIBLE = {
    "galore_": "it must be told which weight matrices to project, and a recipe has no key for that",
    "apollo_": "it must be told which weight matrices to project, and a recipe has no key for that",
    "lomo": "it changes weights within the backward pass, and a step here has several of them",
    "schedule_free_": "its weights must be switched over for every measurement, and it takes no learning-rate schedule",
    "_xla": "it is for TPUs",
    "_npu_": "it is for Ascend's NPUs",
    "anyprecision": "it needs torchdistx, which is no longer published",
}
"""Part of a name -> why it does not train."""


def why_not(optimizer: str) -> str:
    """Why a name of transformers' OptimizerNames cannot train here and what to do; empty where it can.

    Source: transformers' trainer_optimizer.py, for what each name needs.
    """
    for part, reason in IMPOSSIBLE.items():
        if part in optimizer:
            return f"`{optimizer}` cannot train here: {reason}; take `adamw_torch`, or `adafactor` for less memory"
    for module, (package, parts) in PACKAGES.items():
        if any(part in optimizer for part in parts) and importlib.util.find_spec(module) is None:
            return f"`{optimizer}` needs a package: pip install {package}; or take `adamw_torch` or `adafactor`"
    return ""
