"""Reward models: a transformers sequence classifier whose outputs are read at each completion's last token."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.data.collate import Example, collate
from align.errors import UserError
from align.model.adapters import AdapterConfig, Full
from align.model.attach import adapter_config, attach_adapter
from align.model.checkpoint import export_adapter, export_model
from align.model.checks import tolerance
from align.model.forward import base_model, last_hidden
from align.model.fusing import enable_fusing
from align.model.identity import base_identity
from align.model.load import (
    LOAD_ERRORS,
    check_kind,
    check_weight_files,
    first_line,
    load_tokenizer,
    model_folder,
    turn_dropout_off,
)
from align.model.packing import enable_packing
from align.model.policy import Policy
from align.packing import Tree, packed_collate
from align.types import ListBatch

MOMENTUM_FILE = "set_gradients.safetensors"

log = logging.getLogger("align")


@dataclass(frozen=True)
class RewardBatch(ListBatch):
    """Lists with what else their completions are rated by."""

    attributes: Float[Tensor, "N A"] | None = None
    """Rating of each completion under the name of each output; NaN where there is none."""
    strengths: Float[Tensor, " B"] | None = None
    """How strong a list's preferences are stated to be; NaN where its row does not say."""
    sets: Int[Tensor, " B"] | None = None
    """Which of the sources a list comes from."""


class RewardModel(Policy):
    """A sequence classifier that trains: its outputs are named, and there is no reference."""

    has_reference = False
    set_gradients: Tensor | None = None
    """MORE's running mean of every preference set's gradient, [T, P]."""

    def scorer(self) -> nn.Module:
        """The model as one module from lists to rewards."""
        return RewardScorer(self.model)

    def collate(self, examples: Sequence[Example]) -> RewardBatch:
        """Tokenised lists and their ratings, on the model's device."""
        batch = packed_collate(examples) if self.packing else collate(examples, pad_id=self.pad_id)
        ratings: dict[str, Any] = {}
        if "attributes" in examples[0]:
            ratings = {
                "attributes": torch.tensor([row for e in examples for row in e["attributes"]], dtype=torch.float32),
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
        if not isinstance(self.model, PeftModel):
            export_model(self.model, folder, dropout=self.dropout)
            return
        config = adapter_config(self.model)
        config.modules_to_save = sorted(set(config.modules_to_save))  # PEFT appends its own names to ours
        export_adapter(self.model, folder)
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


def reads_last_token(base: PreTrainedModel) -> bool:
    """Whether a classifier has a decoder's head, which transformers calls `score`."""
    return "score" in dict(base.named_children())


def is_read_at_last_token(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> bool:
    """`reads_last_token` of a model's classifier, known from its config; no weight is read.

    Raises:
        UserError: no such model, or none that can be a sequence classifier.
    """
    folder = model_folder(model, revision, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            base = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} cannot be loaded as a sequence classifier: {first_line(error)}") from error
    return reads_last_token(base)


def load_reward_model(
    model: str,
    *,
    outputs: Sequence[str],
    adapter: AdapterConfig,
    revision: str | None = None,
    dtype: str = "float32",
    start_adapter: str | None = None,
    quantization: str | None = None,
    attention: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    dropout: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    total_steps: int | None = None,
    init_batches: Iterable[ListBatch] | None = None,
    packing: bool = True,
) -> RewardModel:
    """The reward model of a recipe, at its start: a language model or encoder with a new head, or a classifier.

    Args:
        model: a local folder, or a hub name; the other keys of the `policy` section follow under their names.
        outputs: the names of the head's outputs. A classifier that has outputs of these names keeps their weights.
        seed: of the new head and the adapter.

    Raises:
        UserError: something named does not exist, does not fit, or nothing would train.
    """
    _refuse_unsuited(start_adapter, quantization, adapter)
    device = torch.device(device)
    code = {"trust_remote_code": trust_remote_code}
    folder = model_folder(model, revision, **code)
    tokenizer = load_tokenizer(model, revision=revision, chat_template=chat_template, **code)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        base, head, own_dropout = load_classifier(
            folder, outputs, dtype=dtype, attention=attention, dropout=dropout, device=device, **code
        )
        if not is_classifier(AutoConfig.from_pretrained(folder, **code)):
            log.info("%s has no reward head; a new one with the outputs %s is trained", model, ", ".join(outputs))
        base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        check_rewards(base, name=model)
        packing = packing and reads_last_token(base) and enable_packing(base, name=model, read=read_rewards)
        trained: Any = base
        if not isinstance(adapter, Full):
            needs: dict[str, Any] = {"total_steps": total_steps, "init_batches": init_batches, "head": head}
            trained = attach_adapter(base, adapter, model=model, revision=revision, folder=folder, **needs)
    if reads_last_token(base):
        enable_fusing(trained, name=model, read=read_rewards)
    _set_padding(base, tokenizer)
    identity = {**base_identity(model, folder), "outputs": " ".join(outputs)}
    return RewardModel(trained, tokenizer, adapter=adapter.name, base=identity, dropout=own_dropout, packing=packing)


def load_classifier(
    folder: Path,
    outputs: Sequence[str],
    *,
    dtype: str,
    attention: str | None,
    dropout: bool,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, list[str], dict[str, float]]:
    """A sequence classifier with outputs of these names from safetensors.

    Returns:
        The model; the names of its head's modules, new ones of the body among them; the dropout that was turned off.

    Raises:
        UserError: files are missing, damaged or of another kind, or hold a head with other outputs.
    """
    check_weight_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_kind(folder, config)
        stored = _stored_outputs(config)
        kept = _kept_outputs(folder, stored, outputs)
        name_outputs(config, stored if stored else outputs)
        turned_off = {} if dropout else turn_dropout_off(config)
        with _without_load_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} cannot be loaded as a sequence classifier: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    head = _head_modules(model, missing)
    if odd := [key for key in missing if stored or not _belongs(key, head)]:
        raise UserError(f"{folder} is incomplete: its safetensors files lack {len(odd)} weights, first {odd[0]}")
    if stored:
        _select_outputs(model, kept, outputs)
    model.config.architectures = [type(model).__name__]
    return model, head, turned_off


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config is a sequence classifier's."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def output_names(config: PretrainedConfig) -> list[str]:
    """The names of a classifier's outputs."""
    labels: Any = config.id2label
    return [str(labels[i]) for i in range(len(labels))]


def name_outputs(config: PretrainedConfig, outputs: Sequence[str]) -> None:
    """Write the outputs' names into a classifier's config."""
    config.num_labels = len(outputs)
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: i for i, name in enumerate(outputs)}


@torch.no_grad()
def check_rewards(base: PreTrainedModel, *, name: str) -> None:
    """Compare our reading of a padded batch with the model's own of one row alone.

    Raises:
        UserError: they differ, so the head reads another place, or padding is not inert.
    """
    pad = base.config.get_text_config().pad_token_id
    usable = [i for i in range(base.config.get_text_config().vocab_size) if i != pad][:9]
    lists = [{"prompt_ids": usable[:2], "completion_ids": [usable[2:5], usable[2:9]], "grades": [0.0, 1.0]}]
    training = base.training
    base.eval()
    expected = base(input_ids=torch.tensor([usable[:5]], device=base.device)).logits.float()
    ours = read_rewards(base, collate(lists, pad_id=pad or 0).to(base.device))[:1]
    base.train(training)
    difference = (ours - expected).abs().max().item()
    if not difference <= tolerance(base.dtype):
        raise UserError(
            f"{name} ({base.config.model_type}) reads its outputs in a way that is not supported: its own and ours "
            f"differ by {difference:.2g}; another architecture is needed"
        )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of a new head; what is missing is looked at here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _refuse_unsuited(start_adapter: str | None, quantization: str | None, adapter: AdapterConfig) -> None:
    if start_adapter is not None:
        raise UserError(
            "policy.start_adapter: a reward model starts from a whole model; merge the adapter first "
            "(`align export RUN OUTPUT --merge`) and name the result as `policy.model`"
        )
    if quantization is not None or adapter.name == "loftq":
        raise UserError("policy: a reward model is not trained on quantised weights; use lora without `quantization`")


def _stored_outputs(config: PretrainedConfig) -> list[str]:
    """The names of a classifier's outputs; none for any other model."""
    return output_names(config) if is_classifier(config) else []


def _kept_outputs(folder: Path, stored: list[str], outputs: Sequence[str]) -> list[int]:
    """Which of the stored outputs are wanted, in the wanted order; a lone one is kept under any name."""
    if not stored:
        return []
    if len(stored) == len(outputs) == 1:
        return [0]
    if unknown := [name for name in outputs if name not in stored]:
        raise UserError(
            f"reward.outputs: {folder} is a classifier with the outputs {', '.join(stored)} and has no "
            f"{', '.join(unknown)}; name some of them, or start from a model without a head"
        )
    return [stored.index(name) for name in outputs]


def _select_outputs(model: PreTrainedModel, kept: list[int], outputs: Sequence[str]) -> None:
    """Keep these of a head's outputs, under these names."""
    name_outputs(model.config, outputs)
    classifier: Any = model
    if kept == list(range(classifier.num_labels)):
        return
    head = classifier.score if reads_last_token(model) else classifier.classifier
    last = head if isinstance(head, nn.Linear) else head.out_proj
    last.weight = nn.Parameter(last.weight.detach()[kept].clone())
    if last.bias is not None:
        last.bias = nn.Parameter(last.bias.detach()[kept].clone())
    last.out_features = classifier.num_labels = len(kept)


def _head_modules(model: PreTrainedModel, missing: Sequence[str]) -> list[str]:
    """The modules beside the body that have weights, and those of the body that the files lack (a BERT's pooler)."""
    prefix = model.base_model_prefix
    own = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    body = {key.split(".")[1] for key in missing if key.startswith(f"{prefix}.") and ".pooler." in key}
    return [*own, *sorted(body)]


def _belongs(key: str, head: Sequence[str]) -> bool:
    return any(part in head for part in key.split(".")[:2])


def _set_padding(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers reads the last token that is no padding, so a token that ends texts must not be called padding."""
    config = base.config.get_text_config()
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
