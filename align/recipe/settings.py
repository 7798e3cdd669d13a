"""The recipe's `train` and `reward` sections."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from align.objectives import PROPERTIES, Objective
from align.recipe.optimizers import why_not
from align.recipe.trackers import checked_trackers
from align.section import Fraction, Free, Grows, Strict
from rewards.head_config import Attributes, BradleyTerry

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


class TrainSection(Strict):
    """How long, how fast, and what is kept."""

    learning_rate: PositiveFloat = 5e-5
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    optimizer: str = "adamw_torch"
    """A name of transformers.TrainingArguments: adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop; with
    packages of their own those of bitsandbytes (paged_adamw_8bit), torchao, grokadamw and torch-optimi."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    epochs: Annotated[PositiveFloat, Grows()] = 1.0
    steps: Annotated[PositiveInt | None, Grows()] = None
    """Optimizer steps; takes the place of `epochs`."""
    lists_per_step: PositiveInt = 32
    """Lists of one optimizer step, over all processes: the statistical batch size."""
    tokens_per_batch: Annotated[PositiveInt | Literal["auto"], Free()] = 8192
    """Tokens of one forward pass at most, as the model reads them; changes memory and speed, not the result. `auto`
    begins with 8192 and halves them, and says so, whenever memory runs out."""
    packing: Annotated[bool, Free()] = True
    """Run a list as one row, its prompt once, where the model allows; off: every completion in a padded row."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast of the forward pass; bfloat16 with float32 weights is mixed precision."""
    gradient_checkpointing: Annotated[bool | Literal["auto"], Free()] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; auto: of as few layers as
    `activation_memory_gb` asks for."""
    activation_memory_gb: Annotated[PositiveFloat | None, Free()] = None
    """Memory for what the layers keep for the backward pass; by default most of what is free on the device."""
    dropout: bool = False
    """Keep the model's own dropout while training. An adapter's dropout is honoured either way."""
    logging_steps: Annotated[PositiveInt, Free()] = 1
    """Steps between lines on the terminal; metrics.jsonl gets every step."""
    eval_steps: Annotated[PositiveInt | None, Free(unless="keep_best")] = None
    """Steps between evaluations on the held-out lists; they always run before and after training."""
    save_steps: Annotated[PositiveInt | None, Free()] = None
    """Steps between checkpoints; by default about ten in a run."""
    keep_checkpoints: Annotated[PositiveInt, Free()] = 2
    """Checkpoints kept; older ones are removed."""
    keep_best: Literal["loss", "pair_accuracy", "ndcg", "kendall_tau", "top1_agreement"] | None = None
    """Export the checkpoint that was best by this held-out figure, not the last; needs `eval_steps`."""
    report_to: Annotated[tuple[str, ...], Free()] = ()
    """Where metrics go besides the run directory: transformers' names of trackers, `all` installed ones, or `none`."""
    project: Annotated[str, Field(min_length=1), Free()] = "align"
    """What trackers file the run under; its name there is the folder of `output`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run follows from it."""
    threads: Annotated[PositiveInt | None, Free()] = None
    """Torch threads on a CPU; by default torch's choice. Models of a few million parameters are fastest with 1."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass at most, to begin with."""
        own = self.tokens_per_batch
        return int(type(self).model_fields["tokens_per_batch"].default) if own == "auto" else own

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            near = difflib.get_close_matches(value, OPTIMIZERS, n=1) or ["adamw_torch"]
            raise ValueError(f"transformers has no optimizer `{value}`; did you mean `{near[0]}`?")
        if problem := why_not(value):
            raise ValueError(problem)
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return checked_trackers(value)


class RewardSection(Strict):
    """The head of a reward model."""

    outputs: Annotated[tuple[str, ...], Field(min_length=1)] = ("reward",)
    """Names of the head's outputs: `[reward]`, or attributes such as `[helpfulness, depth]`; the first ranks lists."""
    balance: Literal["mean", "more"] = "mean"
    """Several sources: the plain mean over lists, or MORE's weights, under which the sets' gradients on the head agree
    best."""


def check_reward_objectives(
    section: RewardSection, objectives: Sequence[Objective | BradleyTerry | Attributes]
) -> None:
    """Refuse what a reward model cannot be trained by.

    Raises:
        ValueError: an objective that is not defined on rewards, or an output that the head does not have.
    """
    for objective in objectives:
        if isinstance(objective, Attributes):
            continue
        if isinstance(objective, BradleyTerry):
            if objective.output is not None and objective.output not in section.outputs:
                raise ValueError(
                    f"objective.output: the head has no output {objective.output}; it has {', '.join(section.outputs)}"
                )
            continue
        name, of_rewards = objective.name, objective.holds.of_rewards
        if not of_rewards or objective.score is not None:
            what = f"`score` of `{name}`" if of_rewards else f"`{name}`"
            listwise = ", ".join(sorted(own for own, holds in PROPERTIES.items() if holds.of_rewards))
            raise ValueError(
                f"objective: {what} is about a policy's log-probabilities; a reward model takes bradley_terry, "
                f"attributes or one of {listwise}, without a score"
            )
