"""Reward models: a transformers sequence classifier whose outputs are read at each completion's last token."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError
from align.model.adapters import Full
from align.model.attach import adapter_config, attach_adapter
from align.model.checkpoint import export_adapter, export_model
from align.model.classifier import is_classifier, load_classifier, reads_last_token
from align.model.config import PolicySection
from align.model.forward import base_model, evaluating, last_hidden
from align.model.fusing import enable_fusing
from align.model.identity import base_identity
from align.model.load import LoadOptions, load_tokenizer, model_folder
from align.model.packing import enable_packing
from align.model.policy import Policy
from align.model.probe import tolerance
from align.model.sharding import at_rest
from align.packing import Tree, packed_collate
from align.packing.batch import Example, collate
from align.packing.rope import fix_frequencies
from align.packing.unpadded import enable_unpadding
from align.progress import stage
from align.types import ListBatch
from rewards.broken import why_not_finite

MOMENTUM_FILE = "set_gradients.safetensors"

log = logging.getLogger("align")


@dataclass(frozen=True)
class RewardBatch(ListBatch):
    """Lists with what else their completions are rated by."""

    attributes: Float[Tensor, "N A"] | None = None
    """Rating of each completion under the name of each output; NaN where there is none."""
    deviations: Float[Tensor, "N A"] | None = None
    """How far raters differ about each of these; NaN where the row does not say."""
    strengths: Float[Tensor, " B"] | None = None
    """How strong a list's preferences are stated to be; NaN where its row does not say."""
    sets: Int[Tensor, " B"] | None = None
    """Which of the sources a list comes from."""


class RewardModel(Policy):
    """A sequence classifier that trains: its outputs are named, and there is no reference."""

    has_reference = False
    set_gradients: Tensor | None = None
    """MORE's running mean of every preference set's gradient, [T, P]."""

    def _new_scorer(self) -> nn.Module:
        return RewardScorer(self.model)

    def collate(self, examples: Sequence[Example]) -> RewardBatch:
        """Tokenised lists and their ratings, on the model's device."""
        batch = packed_collate(examples) if self.packing else collate(examples, pad_id=self.pad_id)
        ratings: dict[str, Any] = {}
        if "attributes" in examples[0]:
            ratings = {
                "attributes": _by_completion(examples, "attributes"),
                "deviations": _by_completion(examples, "deviations") if "deviations" in examples[0] else None,
                "strengths": torch.tensor([e["strength"] for e in examples], dtype=torch.float32),
                "sets": torch.tensor([e["set"] for e in examples]),
            }
        return RewardBatch(**vars(batch), **ratings).to(self.model.device)  # type: ignore[return-value]

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable weights of the head."""
        base: Any = base_model(self.model)
        head = [child for name, child in base.named_children() if name != base.base_model_prefix]
        return [p for child in head for p in child.parameters() if p.requires_grad]

    def save_adapter(self, folder: Path) -> None:
        """A whole sequence classifier, or an adapter with its head in PEFT's format and the classifier's config."""
        at_rest(self._scorer)
        if not isinstance(self.model, PeftModel):
            export_model(self.model, folder, dropout=self.dropout)
            return
        config = adapter_config(self.model)
        config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT appends its own names to ours
        export_adapter(self.model, folder, base=self.base)
        if PartialState().is_main_process:
            base_model(self.model).config.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        """See Policy; with the gradients of the preference sets."""
        super().save_state(folder)
        if self.set_gradients is not None:
            save_file({"set_gradients": self.set_gradients}, folder / MOMENTUM_FILE)

    def load_state(self, folder: Path, *, keep_reference: bool = False) -> None:
        """See Policy."""
        super().load_state(folder, keep_reference=keep_reference)
        if (folder / MOMENTUM_FILE).is_file():
            self.set_gradients = load_file(folder / MOMENTUM_FILE)["set_gradients"].to(self.model.device)


def _by_completion(examples: Sequence[Example], name: str) -> Float[Tensor, "N A"]:
    return torch.tensor([row for example in examples for row in example[name]], dtype=torch.float32)


class RewardScorer(nn.Module):
    """A reward model as one module from lists to rewards, so that DDP and FSDP can wrap it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ListBatch, outputs: tuple[str, ...] = ()) -> Float[Tensor, "N A"]:
        """Every output for every completion, float32; `outputs` is for the trainer's sake."""
        return read_rewards(self.model, batch)


def read_rewards(model: nn.Module, batch: ListBatch, tree: Tree | None = None) -> Float[Tensor, "N A"]:
    """A classifier's outputs for every completion of a batch, float32.

    A decoder's head reads the hidden state at a completion's last token, in padded or packed rows. An encoder reads a
    padded row as it does by itself.
    """
    assert batch.ends_at is not None, "the collators give it"
    base = base_model(model)
    if reads_last_token(base):
        head: Any = base.score
        return head(last_hidden(model, batch, tree, batch.ends_at)).float()
    width = batch.input_ids.shape[1]
    places = torch.arange(width, device=batch.input_ids.device)
    mask = places <= (batch.ends_at % width)[:, None]
    return base(input_ids=batch.input_ids, attention_mask=mask.long()).logits.float()


@stage("loading the model")
def load_reward_model(
    section: PolicySection,
    options: LoadOptions = LoadOptions(),  # noqa: B008, frozen
    *,
    outputs: Sequence[str],
) -> RewardModel:
    """The reward model of a recipe, at its start: a language model or encoder with a new head, or a classifier.

    Args:
        section: the recipe's `policy`.
        outputs: the names of the head's outputs. A classifier that has outputs of these names keeps their weights.

    Raises:
        UserError: something named does not exist, does not fit, or nothing would train.
    """
    _refuse_unsuited(section)
    model, device = section.model, torch.device(options.device)
    code = {"trust_remote_code": section.trust_remote_code}
    folder = model_folder(model, section.revision, **code)
    tokenizer = load_tokenizer(model, revision=section.revision, chat_template=section.chat_template, **code)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        held: dict[str, Any] = {"dtype": section.dtype, "attention": section.attention, "device": device}
        base, head, own_dropout = load_classifier(folder, outputs, dropout=options.dropout, **held, **code)
        if not is_classifier(AutoConfig.from_pretrained(folder, **code)):
            log.info("%s has no reward head; a new one with the outputs %s is trained", model, ", ".join(outputs))
        base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        fix_frequencies(base, name=model)
        check_rewards(base, name=model)
        packing = options.packing and reads_last_token(base) and enable_packing(base, name=model, read=read_rewards)
        if options.packing and not reads_last_token(base):
            enable_unpadding(cast(PreTrainedModel, base.base_model), name=model)
        trained: Any = base
        if not isinstance(section.adapter, Full):
            trained = attach_adapter(base, section.adapter, section, options, folder=folder, head=head)
    if reads_last_token(base):
        enable_fusing(trained, name=model, read=read_rewards)
    _set_padding(base, tokenizer)
    known: dict[str, Any] = {"dropout": own_dropout, "packing": packing}
    identity = {**base_identity(model, folder), "outputs": " ".join(outputs)}
    return RewardModel(trained, tokenizer, adapter=section.adapter.name, base=identity, **known)


@torch.no_grad()
def check_rewards(base: PreTrainedModel, *, name: str) -> None:
    """Compare our reading of a padded batch with the model's own of one row alone.

    Raises:
        UserError: they differ, so the head reads another place, or padding is not inert.
    """
    pad = base.config.get_text_config().pad_token_id
    usable = [i for i in range(base.config.get_text_config().vocab_size) if i != pad][:9]
    lists = [{"prompt_ids": usable[:2], "completion_ids": [usable[2:5], usable[2:9]], "grades": [0.0, 1.0]}]
    with evaluating(base):
        expected = base(input_ids=torch.tensor([usable[:5]], device=base.device)).logits.float()
        ours = read_rewards(base, collate(lists, pad_id=pad or 0).to(base.device))[:1]
    difference = (ours - expected).abs().max().item()
    if broken := why_not_finite(base, difference):
        raise UserError(f"{name}: {broken}")
    if not difference <= tolerance(base.dtype):
        raise UserError(
            f"{name} ({base.config.model_type}) reads its outputs in a way that is not supported: its own and ours "
            f"differ by {difference:.2g}; another architecture is needed"
        )


def _refuse_unsuited(section: PolicySection) -> None:
    if section.start_adapter is not None:
        raise UserError(
            "policy.start_adapter: a reward model starts from a whole model; merge the adapter first "
            "(`align export RUN OUTPUT --to transformers`) and name the result as `policy.model`"
        )
    if section.quantization is not None or section.adapter.needs_quantization:
        raise UserError("policy: a reward model is not trained on quantised weights; use lora without `quantization`")


def _set_padding(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers reads the last token that is no padding, so a token that ends texts must not be called padding."""
    config = base.config.get_text_config()
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
