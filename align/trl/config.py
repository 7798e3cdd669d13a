"""The configurations: transformers' TrainingArguments with the fields, names and defaults of TRL 1.16."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from align.trl.answers import answer_arguments

log = logging.getLogger("align")

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
"""Losses of the difference of two scores, where an f-divergence's log Z cancels."""


def told(text: str, default: Any = None, **more: Any) -> Any:
    """A field with its help."""
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AlignConfig(TrainingArguments):
    """What all of the trainers take besides TrainingArguments, with TRL's defaults where they differ from those."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "align",
    ]

    _trainer: ClassVar[str] = ""
    """The trainer's name without `Trainer`."""

    logging_steps: float = told("Steps between two logs; below 1 a share of all steps.", 10)
    gradient_checkpointing: bool = told("Compute activations again in the backward pass instead of keeping them.", True)
    bf16: bool | None = told(  # type: ignore[assignment]
        "Mixed precision in bfloat16; by default where fp16 is not asked for."
    )
    model_init_kwargs: dict[str, Any] | str | None = told("Keywords of from_pretrained, for a model given by its name.")
    trust_remote_code: bool = told("Run code that a model or a tokenizer comes with.", False)
    disable_dropout: bool = told("Set every dropout of the model and of the reference to 0, an adapter's too.", True)
    dataset_num_proc: int | None = told("Processes that prepare the data.")
    max_length: int | None = told("Tokens of a sequence at most.", 1024)
    pad_to_multiple_of: int | str | None = told("Collate to a multiple of this; rows are packed afterwards.", "auto")
    activation_offloading: bool = told("Without effect yet: gradient checkpointing saves the memory.", False)
    pad_token: str | None = told("Deprecated: set it on the tokenizer.")
    align: dict[str, Any] | str | None = told(
        "What only Align has: tokens_per_batch, the tokens of a packed pass at most; and objectives of lists (DPO)."
    )

    padding_free: bool = told("Without effect: rows are always packed.", False)
    max_prompt_length: int | None = told("Of older releases: prompts keep their last tokens.")
    max_completion_length: int | None = told("Of older releases: completions keep their first tokens.")
    generate_during_eval: bool = told("Of older releases, without effect.", False)
    use_logits_to_keep: bool | None = told("Of older releases, without effect.")
    use_liger_loss: bool | None = told("Of older releases, without effect.")
    label_pad_token_id: int | None = told("Of older releases, without effect.")
    padding_value: int | None = told("Of older releases, without effect.")
    is_encoder_decoder: bool | None = told("Of older releases: refused.")

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if getattr(self, "activation_checkpointing", "") is None:  # what transformers 5.24 calls it
            setattr(self, "activation_checkpointing", self.gradient_checkpointing)  # noqa: B010
        super().__post_init__()
        if self.pad_to_multiple_of in ("auto", "none", "None", "null"):
            self.pad_to_multiple_of = None
        elif self.pad_to_multiple_of is not None:
            self.pad_to_multiple_of = int(self.pad_to_multiple_of)
        answer_arguments(self, self._trainer)


@dataclass
class _WithReference(AlignConfig):
    """Of the trainers that compare with a reference."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *AlignConfig._VALID_DICT_FIELDS,
        "ref_model_init_kwargs",
    ]

    learning_rate: float = told("AdamW's initial learning rate.", 1e-6)
    router_aux_loss_coef: float | None = told("Weight of a mixture of experts' load-balancing loss.")
    precompute_ref_log_probs: bool = told("Compute the reference's log-probabilities before training.", False)
    precompute_ref_batch_size: int | None = told("Pairs at a time while the reference is computed beforehand.")
    beta: float = told("How strongly the policy is held to its reference.", 0.1)
    sync_ref_model: bool = told("Let the reference follow the policy (TR-DPO); full fine-tuning only.", False)
    ref_model_mixup_alpha: float = told("The policy's share in the reference when it is moved.", 0.6)
    ref_model_sync_steps: int = told("Steps between two moves of the reference.", 512)
    ref_model_init_kwargs: dict[str, Any] | str | None = told("Of older releases: for a reference given by its name.")
    model_adapter_name: str | None = told("Of older releases: refused.")
    ref_adapter_name: str | None = told("Of older releases: refused.")
    force_use_ref_model: bool = told("Of older releases, without effect.", False)
    base_model_attribute_name: str | None = told("Of older releases, without effect.")


@dataclass
class DPOConfig(_WithReference):
    """Settings of DPOTrainer, by TRL's names."""

    _trainer = "DPO"

    truncation_mode: str = told(
        "Which end of a long sequence stays: keep_start, or keep_end (deprecated).", "keep_start"
    )
    loss_type: list[str] = told(f"One loss or several: {', '.join(LOSS_TYPES)}.", ["sigmoid"])
    loss_weights: list[float] | None = told("A weight for each loss; 1 by default.")
    ld_alpha: float | None = told("Weight of the tokens beyond the pair's shorter length (LD-DPO), 0 to 1.")
    f_divergence_type: str = told("reverse_kl, forward_kl, js_divergence or alpha_divergence.", "reverse_kl")
    f_alpha_divergence_coef: float = told("Alpha of alpha_divergence.", 0.5)
    label_smoothing: float = told("Read by robust, exo_pair, aot and aot_unpaired.", 0.0)
    use_weighting: bool = told("Weigh pairs by how likely the policy finds them (WPO).", False)
    discopop_tau: float = told("Temperature of discopop's blend.", 0.05)
    rpo_alpha: float | None = told("Of older releases: adds the loss sft with this weight.")
    reference_free: bool = told("Of older releases: a reference that finds everything equally likely.", False)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                "`loss_weights` must have the same length as `loss_type` when combining multiple losses: there are "
                f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses"
            )
        if self.rpo_alpha is not None:
            self.loss_weights = [*(self.loss_weights or [1.0] * len(self.loss_type)), self.rpo_alpha]
            self.loss_type = [*self.loss_type, "sft"]
            log.info("rpo_alpha=%s: the losses are %s, weighted %s", self.rpo_alpha, self.loss_type, self.loss_weights)
            self.rpo_alpha = None
        super().__post_init__()


@dataclass
class KTOConfig(_WithReference):
    """Settings of KTOTrainer, by TRL's names."""

    _trainer = "KTO"

    train_sampling_strategy: str = told(
        "sequential, as the baseline pairs a row with its neighbour when the rows are prepared.", "sequential"
    )
    loss_type: str = told("kto or apo_zero_unpaired.", "kto")
    desirable_weight: float = told("Factor of the losses of desirable completions.", 1.0)
    undesirable_weight: float = told("Factor of the losses of undesirable completions.", 1.0)


@dataclass
class RewardConfig(AlignConfig):
    """Settings of RewardTrainer, by TRL's names."""

    _trainer = "Reward"

    learning_rate: float = told("AdamW's initial learning rate.", 1e-4)
    chat_template_path: str | None = told("A Jinja file, or a tokenizer whose chat template is taken.")
    eos_token: str | None = told("The token that ends a text; by default the tokenizer's.")
    center_rewards_coefficient: float | None = told("Weight of the squared sum of a pair's rewards.")


@dataclass
class CPOConfig(AlignConfig):
    """Settings of CPOTrainer, by TRL's names; SimPO and AlphaPO are losses of it."""

    _trainer = "CPO"

    learning_rate: float = told("AdamW's initial learning rate.", 1e-6)
    beta: float = told("Scale of the difference of log-probabilities.", 0.1)
    label_smoothing: float = told("How often a pair is the wrong way round; read by sigmoid and simpo.", 0.0)
    loss_type: str = told("sigmoid, hinge, ipo, simpo, or alphapo: simpo with cpo_alpha=0.", "sigmoid")
    cpo_alpha: float = told("Weight of the mean loss of a chosen token.", 1.0)
    simpo_gamma: float = told("Margin that simpo asks for.", 0.5)
    alpha: float = told("Shape of AlphaPO's reward, of any loss; 0 for log-probabilities.", 0.0)

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        super().__post_init__()


@dataclass
class ORPOConfig(AlignConfig):
    """Settings of ORPOTrainer, by TRL's names."""

    _trainer = "ORPO"

    learning_rate: float = told("AdamW's initial learning rate.", 1e-6)
    beta: float = told("Weight of the odds ratio's loss beside the mean loss of a token.", 0.1)


def check_losses(args: Any) -> None:
    """Refuse combinations that have no meaning, as TRL does.

    Raises:
        ValueError, NotImplementedError: as there.
    """
    types = args.loss_type
    if unknown := [name for name in types if name not in LOSS_TYPES]:
        raise ValueError(f"Unknown loss type: {unknown[0]}. Should be one of {list(LOSS_TYPES)}")
    if args.f_divergence_type != "reverse_kl" and not set(types) <= OF_DIFFERENCES:
        raise ValueError(
            f"`f_divergence_type='{args.f_divergence_type}'` is only supported for the following loss types: "
            f"{sorted(OF_DIFFERENCES)}. You provided {types}; use `reverse_kl` with these losses"
        )
    if args.use_weighting and {"aot", "aot_unpaired"} & set(types):
        raise NotImplementedError("use_weighting has no meaning for aot and aot_unpaired, which sort the pairs")
    if "exo_pair" in types and args.label_smoothing == 0.0:
        raise ValueError("Label smoothing must be greater than 0.0 when using 'exo_pair' loss; the paper takes 1e-3")
    if "robust" in types and not 0.0 <= args.label_smoothing < 0.5:
        log.warning("label_smoothing=%s: the loss robust needs 0 to 0.5 (excluded)", args.label_smoothing)
