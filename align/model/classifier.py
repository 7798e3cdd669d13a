"""Sequence classifiers: reading one from its files, with a new head or some of the outputs that it has."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from align.errors import UserError
from align.model.load import loading, model_folder, read_config, read_weights, refuse_incomplete, turn_dropout_off

PROBLEM = "cannot be loaded as a sequence classifier"


def reads_last_token(base: PreTrainedModel) -> bool:
    """Whether a classifier has a decoder's head, which transformers calls `score`."""
    return "score" in dict(base.named_children())


def is_read_at_last_token(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> bool:
    """`reads_last_token` of a model's classifier, known from its config; no weight is read.

    Raises:
        UserError: no such model, or none that can be a sequence classifier.
    """
    folder = model_folder(model, revision, trust_remote_code=trust_remote_code)
    with loading(folder, PROBLEM), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        base = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return reads_last_token(base)


def load_classifier(
    folder: Path,
    outputs: Sequence[str],
    *,
    dropout: bool,
    trust_remote_code: bool,
    **options: Any,
) -> tuple[PreTrainedModel, list[str], dict[str, float]]:
    """A sequence classifier with outputs of these names from safetensors.

    Args:
        dropout, trust_remote_code, options: as for `load_model`, but that quantised ones are not to be had.

    Returns:
        The model; the names of its head's modules, new ones of the body among them; the dropout that was turned off.

    Raises:
        UserError: files are missing, damaged or of another kind, or hold a head with other outputs.
    """
    with loading(folder, PROBLEM), _without_load_report():
        config = read_config(folder, trust_remote_code=trust_remote_code)
        stored = output_names(config) if is_classifier(config) else []
        kept = kept_outputs(folder, stored, outputs)
        name_outputs(config, stored if stored else outputs)
        turned_off = {} if dropout else turn_dropout_off(config)
        options |= {"config": config, "trust_remote_code": trust_remote_code}
        model, missing = read_weights(AutoModelForSequenceClassification, folder, **options)
    head = _head_modules(model, missing)
    refuse_incomplete(folder, [key for key in missing if stored or not _belongs(key, head)])
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


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of a new head; what is missing is looked at here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def kept_outputs(folder: Path, stored: list[str], outputs: Sequence[str]) -> list[int]:
    """Which of the outputs that a classifier's folder has stored are wanted, in the wanted order.

    A lone one is kept under any name.

    Raises:
        UserError: one is wanted that is not stored.
    """
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
