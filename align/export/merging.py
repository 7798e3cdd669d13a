"""Base and adapter as one model in float32, checked to be what was trained, and written as transformers has it."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError
from align.export.made import Made
from align.export.trained import ADAPTER_FILE, Trained, source_of
from align.model.attach import TRAINED, adapter_tensors, check_loaded
from align.model.checkpoint import export_tokenizer
from align.model.classifier import load_classifier
from align.model.load import LOAD_ERRORS, first_line, load_model
from align.progress import stage
from rewards.files import is_of_other_weights
from rewards.loading import without_bars

log = logging.getLogger("align")

MERGE_TOLERANCE = 1e-3
"""Nats of a token's log-probability by which a float32 merge may differ; rounding gives about 1e-5."""
SHARD_SIZE = "5GB"
PROBE = (
    "Once upon a time there was a small bird. It asked: how much is 17 + 25? Nobody in the wood knew, so it wrote "
    '`def add(a, b): return a + b` into the sand and said: "Forty-two."'
)


@stage("merging")
def merged_model(
    trained: Trained, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, dict[str, float], Tensor]:
    """The whole model in float32.

    Returns:
        The model; by how many nats merging moved a probe's log-probabilities (`merge`), {} for a whole model; and these
        as the unmerged policy gives them.

    Raises:
        UserError: the base is not the one that was trained on, or merging would change the policy.
    """
    source = source_of(trained)
    if trained.base is not None and is_of_other_weights(trained.folder / ADAPTER_FILE, source):
        raise UserError(
            f"{trained.folder} was trained on other weights than {trained.base} holds now; put the old ones back there "
            "before it is merged"
        )
    model = load_float32(source, trained)
    probe = probe_ids(tokenizer)
    if trained.base is None:
        return model, {}, read_probe(model, probe, trained)
    wrapped = with_adapter(model, trained)
    before = read_probe(wrapped, probe, trained)
    try:
        model = wrapped.merge_and_unload()
    except ValueError as error:  # an offset of outputs, for which a layer without a bias has no place
        raise UserError(
            f"{trained.folder}: the base has no place for it ({first_line(error)}); export the adapter: --to peft"
        ) from error
    moved = (before - read_probe(model, probe, trained)).abs().max().item()
    if not moved <= MERGE_TOLERANCE:
        raise UserError(
            f"{trained.folder}: merging moves {'rewards' if trained.outputs else 'log-probabilities'} by "
            f"{moved:.2g}, so the merged model would not be what was trained; export the adapter: --to peft"
        )
    return model, {"merge": moved}, before


def stored_dtype(trained: Trained, asked: str | None) -> str:
    """What weights are stored in: as asked, else as the policy was trained, else as the base's files are."""
    if asked is not None:
        return asked
    code = {"trust_remote_code": trained.trust_remote_code}
    own = str(AutoConfig.from_pretrained(source_of(trained), **code).dtype or torch.float32).removeprefix("torch.")
    return own if trained.base is None else trained.run["recipe"].get("policy", {}).get("dtype") or own


def write(made: Made) -> None:
    """A merged model as a folder that transformers loads, in shards; the model is rounded in place."""
    trained, model = made.trained, made.model
    code = {"trust_remote_code": trained.trust_remote_code}
    model = model.to(getattr(torch, stored_dtype(trained, made.dtype)))
    if trained.outputs:
        read_with = AutoConfig.from_pretrained(trained.folder, **code)
        model.config.get_text_config().pad_token_id = read_with.get_text_config().pad_token_id
    else:
        tie_if_equal(model, AutoConfig.from_pretrained(source_of(trained), **code))
    finish(made)
    with without_bars():
        model.save_pretrained(made.folder, max_shard_size=SHARD_SIZE)


def finish(made: Made) -> None:
    """What every whole model has beside its weights: a token that ends texts, the tokenizer, processors."""
    model, tokenizer = made.model, made.tokenizer
    if model.can_generate() and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        log.info("the base names no token that ends a text; the export names its tokenizer's, %s", tokenizer.eos_token)
    export_tokenizer(tokenizer, made.folder, source=source_of(made.trained))


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor([tokenizer(PROBE)["input_ids"]])


def load_float32(folder: Path, trained: Trained) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": "float32",
        "attention": None,
        "trust_remote_code": trained.trust_remote_code,
        "dropout": True,
        "device": torch.device("cpu"),
    }
    if trained.outputs:
        return load_classifier(folder, trained.outputs, **options)[0].eval()
    return load_model(folder, quantization=None, **options)[0].eval()


def with_adapter(base: PreTrainedModel, trained: Trained) -> PeftModel:
    if not trained.outputs:
        _untie(base)
    try:
        wrapped = PeftModel.from_pretrained(base, trained.folder, adapter_name=TRAINED)
        stored = set(load_file(trained.folder / ADAPTER_FILE))
    except LOAD_ERRORS as error:
        raise UserError(f"{trained.folder} does not fit its base {trained.base}: {first_line(error)}") from error
    # PEFT itself may store the base's embeddings beside an adapter on them.
    known = set(get_peft_model_state_dict(wrapped, adapter_name=TRAINED, save_embedding_layers=True))
    if odd := (set(adapter_tensors(wrapped, TRAINED)) - stored) | (stored - known):
        raise UserError(
            f"{trained.folder} was made for another base than {trained.base}: {len(odd)} weights have no counterpart, "
            f"first {min(odd)}"
        )
    check_loaded(wrapped, trained.folder / ADAPTER_FILE)
    return wrapped.eval()


def _untie(model: PreTrainedModel) -> None:
    """Give the LM head a weight of its own, so that an adapter merged into it does not move the embeddings too."""
    head: Any = model.get_output_embeddings()
    for config in _tying(model.config):
        config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def tie_if_equal(model: PreTrainedModel, source: PreTrainedConfig) -> None:
    """Store one matrix, as the base does, where LM head and embeddings are still the same."""
    head: Any = model.get_output_embeddings().weight
    embeddings: Any = model.get_input_embeddings().weight
    if not _tying(source) or head.shape != embeddings.shape or not torch.equal(head, embeddings):
        return
    for own, its in ((model.config, source), (model.config.get_text_config(), source.get_text_config())):
        if hasattr(its, "tie_word_embeddings"):
            own.tie_word_embeddings = its.tie_word_embeddings
    model.tie_weights()


def _tying(config: PreTrainedConfig) -> list[Any]:
    """Which of a config and its text part say that LM head and embeddings are one."""
    parts = [config] if config.get_text_config() is config else [config, config.get_text_config()]
    return [part for part in parts if getattr(part, "tie_word_embeddings", False)]


@torch.no_grad()
def read_probe(model: PreTrainedModel | PeftModel, ids: Tensor, trained: Trained) -> Tensor:
    """A probe's rewards, or the log-probabilities of all tokens at each of its places."""
    logits = model(input_ids=ids).logits.float()
    return logits if trained.outputs else logits.log_softmax(-1)
