"""A DPOConfig whose `align` has an objective -> the recipe that says the same."""

from dataclasses import MISSING, fields
from typing import Any

from align.errors import UserError
from align.objectives.scores import LogRatio
from align.recipe import Recipe, parse_recipe
from align.trl.config import DPOConfig
from align.trl.extra import OF_LISTS, extra

OF_PAIRS = (
    *("loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting"),
    *("precompute_ref_log_probs", "sync_ref_model", "reference_free", "truncation_mode", "max_completion_length"),
)
"""Settings of DPOTrainer's own losses and rows; `align` has others for lists."""
UNBOUNDED = 1 << 24


def recipe_of(args: Any) -> Recipe:
    """The recipe of a configuration; its data section's source is put there for each data set.

    Raises:
        UserError: a key or value that a recipe cannot hold, or a setting that lists do not read.
    """
    _refuse_settings_of_pairs(args)
    own = extra(args)
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    data = {"max_length": args.max_length or UNBOUNDED, **(own.get("data") or {})}
    if getattr(args, "max_prompt_length", None):
        data["max_prompt_length"] = args.max_prompt_length
    if refused := sorted({"sources", "eval_sources", "eval_fraction", "ches"} & (own.get("data") or {}).keys()):
        raise UserError(f"align.data.{refused[0]}: rows come as train_dataset and eval_dataset; leave it out")
    tree: dict[str, Any] = {
        "output": args.output_dir,
        "policy": {"model": "model"} | ({"adapter": own["adapter"]} if "adapter" in own else {}),
        "data": data | {"sources": [{"path": "train_dataset"}], "eval_fraction": 0.0},
        "train": {"precision": half, "seed": args.seed},
        **{key: own[key] for key in OF_LISTS if key in own and key not in ("data", "adapter")},
    }
    if "score" not in own and args.beta != LogRatio().beta:
        tree["score"] = {"name": "log_ratio", "beta": args.beta}
    return parse_recipe(tree, origin="align")


def _refuse_settings_of_pairs(args: Any) -> None:
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(DPOConfig)
        if f.name in OF_PAIRS
    }
    for name, default in defaults.items():
        if getattr(args, name, default) != default:
            raise UserError(f"{name}: pairs read it, and `align` has an objective of lists; leave one of them out")
