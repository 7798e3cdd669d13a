"""The recipe's `train` and `reward` sections."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_serializer, field_validator

from align.objectives import PROPERTIES, Objective
from align.own_code import names_a_class
from align.recipe.optimizers import AVERAGING, OptimizerConfig, OptimizerSection, Rates
from align.recipe.schedules import BY_FIGURE, ScheduleConfig, ScheduleSection
from align.recipe.trackers import checked_trackers
from align.section import Duration, Fraction, Free, Grows, Strict
from rewards.head_config import Attributes, BradleyTerry

Figure = Literal["loss", "pair_accuracy", "ndcg", "kendall_tau", "top1_agreement"]
"""Held-out figures that say which of two policies is better: `loss` by being smaller, the others by being larger."""


class EarlyStopping(Strict):
    """When training ends before its last step."""

    patience: PositiveInt
    """Evaluations in a row that bring no better figure, after which training ends."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """By how much more than this a figure must be better to count as better."""
    figure: Figure | None = None
    """The held-out figure that is looked at; by default that of `keep_best`, or else `loss`."""


class TrainSection(Strict):
    """How long, how fast, and what is kept."""

    learning_rate: PositiveFloat = 5e-5
    """After the warm-up, from where `schedule` takes it."""
    schedule: ScheduleConfig = ScheduleSection()
    """Course of the learning rate after the warm-up: a name of transformers' `lr_scheduler_type`, or with its options
    `{name: warmup_stable_decay, decay_ratio: 0.2}`; `{name: refined, path: ...}` follows what
    `align report RUN --refine` made of another run."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises."""
    optimizer: OptimizerConfig = OptimizerSection()
    """What takes the steps: a name of this project's, transformers', torch's or pytorch-optimizer's (adamw_torch,
    adafactor, lamb, muon, adan, galore, schedulefreeadamw, ...), or with options `{name: galore, rank: 64}`;
    docs/optimizers.md lists them."""
    groups: Rates = {}
    """Learning rates of parts: `{lora_B: 16x}` is LoRA+; a key is `embeddings`, `head`, a part of a parameter's name
    between dots, or a regular expression, a value a multiple of `learning_rate` or a rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the optimizer; of transformers' names `adam_beta1` and `adam_beta2` too, others take `betas` as an option."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    orthogonal_gradient: bool = False
    """Take from every tensor's gradient what goes along the tensor, and keep its length (perpGrad): logits do not grow
    where nothing else lowers the loss; `saturated_share` in metrics.jsonl says whether they have."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns that off."""
    epochs: Annotated[PositiveFloat, Grows()] = 1.0
    """Passes over the training lists."""
    steps: Annotated[PositiveInt | None, Grows()] = None
    """Optimizer steps; takes the place of `epochs`."""
    lists_per_step: PositiveInt = 32
    """Lists of one optimizer step, over all processes: the statistical batch size."""
    tokens_per_batch: Annotated[PositiveInt | Literal["auto"], Free()] = 8192
    """Tokens of one forward pass at most, as the model reads them; changes memory and speed, not the result. `auto`
    begins with 8192 and halves them, and says so, whenever memory runs out."""
    packing: Annotated[bool, Free()] = True
    """Run lists as one row, what sequences begin with once, where the model allows; off: each in a padded row."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast of the forward pass; bfloat16 with float32 weights is mixed precision."""
    gradient_checkpointing: Annotated[bool | Literal["auto"], Free()] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; auto: of as few layers as
    `activation_memory_gb` asks for."""
    activation_offload: Annotated[bool, Free()] = False
    """Let what the layers keep (with `gradient_checkpointing` their inputs) wait in the host's memory: less on a GPU,
    the same numbers, more time; it brings nothing on a CPU, where it is refused."""
    activation_memory_gb: Annotated[PositiveFloat | None, Free()] = None
    """Memory for what the layers keep for the backward pass; by default most of what is free on the device."""
    dropout: bool = False
    """Keep the model's own dropout while training. An adapter's dropout is honoured either way."""
    logging_steps: Annotated[PositiveInt, Free()] = 1
    """Steps between lines on the terminal; metrics.jsonl gets every step."""
    eval_steps: Annotated[PositiveInt | None, Free(unless=("keep_best", "early_stopping"))] = None
    """Steps between evaluations on the held-out lists; they always run before and after training."""
    save_steps: Annotated[PositiveInt | None, Free()] = None
    """Steps between checkpoints; by default about ten in a run."""
    keep_checkpoints: Annotated[PositiveInt, Free()] = 2
    """Checkpoints kept; older ones are removed."""
    on_bad_step: Annotated[Literal["stop", "skip"], Free()] = "stop"
    """What a step does whose loss or gradient is no finite number: stop and name the first layer that breaks, or go on
    without it, weights and optimizer untouched; its rows are in `bad_step.jsonl` of the run."""
    time_limit: Annotated[Duration | None, Free()] = None
    """Time after which the command ends by itself, behind a checkpoint, with exit code 75: `3h50m`, `90m`, `1d`, or as
    Slurm writes it, `1-03:50:00`. It counts from the command's start; the same command goes on."""
    keep_best: Figure | None = None
    """Export the checkpoint that was best by this held-out figure, not the last; needs `eval_steps`."""
    early_stopping: EarlyStopping | None = None
    """End training where the held-out figure no longer becomes better: `{patience: 3}`, or 3 alone; needs
    `eval_steps`. What is exported is the last step's, or with `keep_best` the best."""
    callbacks: tuple[Annotated[str, AfterValidator(names_a_class)], ...] = ()
    """transformers callbacks of your own, `file.py:Class` or `module:Class`, made without arguments; training runs
    that code."""
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

    def check_measured(self) -> None:
        """Refuse what looks at held-out figures in the middle of training where there are none.

        Raises:
            ValueError: names the key.
        """
        for key in ("keep_best", "early_stopping"):
            if getattr(self, key) and not self.eval_steps:
                raise ValueError(f"train.{key} needs train.eval_steps, the interval at which candidates are measured")

    def check_schedule(self) -> None:
        """Refuse a course of the learning rate that the other keys leave without effect.

        Raises:
            ValueError: names the key.
        """
        schedule, optimizer = self.schedule.name, self.optimizer.name
        if schedule in BY_FIGURE and not self.eval_steps:
            raise ValueError(f"train.schedule: `{schedule}` acts by held-out figures; set train.eval_steps")
        if optimizer in AVERAGING and schedule not in ("constant", "constant_with_warmup"):
            raise ValueError(
                f"train.schedule: `{optimizer}` averages its weights in place of a falling rate; set "
                "train.schedule=constant_with_warmup, or constant"
            )

    @field_serializer("optimizer", "schedule")
    def _as_written(self, value: OptimizerSection | ScheduleSection) -> Any:
        return value.plain()

    @field_validator("early_stopping", mode="before", json_schema_input_type=EarlyStopping | PositiveInt | None)
    @classmethod
    def _patience_alone(cls, value: Any) -> Any:
        return {"patience": value} if type(value) is int else value

    @field_validator("report_to", "callbacks", mode="before")
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
        if not of_rewards or objective.score != type(objective).model_fields["score"].default:
            what = f"`score` of `{name}`" if of_rewards else f"`{name}`"
            listwise = ", ".join(sorted(own for own, holds in PROPERTIES.items() if holds.of_rewards))
            raise ValueError(
                f"objective: {what} is about a policy's log-probabilities; a reward model takes bradley_terry, "
                f"attributes or one of {listwise}, without a score"
            )
