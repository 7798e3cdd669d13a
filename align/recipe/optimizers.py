"""Which of transformers' optimizer names train here; every other is refused with what it lacks."""

import importlib.util

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
"""transformers.TrainingArguments knows these; a test compares. Here because importing transformers takes seconds."""

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
