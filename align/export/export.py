"""`align export`: a run's adapter, or base and adapter merged into one checkpoint, with tokenizer and model card."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.bounds import check_folder
from align.errors import UserError
from align.export.exported import describe
from align.export.model_card import model_card
from align.export.options import check_places
from align.files import read_json, replaced_folder, write_json
from align.locks import alone_on
from align.model.attach import TRAINED, adapter_tensors, check_loaded
from align.model.checkpoint import export_tokenizer
from align.model.classifier import is_classifier, load_classifier, output_names
from align.model.load import (
    HUB_ERRORS,
    first_line,
    load_model,
    load_tokenizer,
    loading,
    model_folder,
    model_name,
    read_tokenizer,
)
from align.progress import stage
from align.runs.digests import check_of_run
from align.runs.run_directory import RunDirectory
from rewards.files import base_of, is_of_other_weights
from rewards.loading import without_bars

log = logging.getLogger("align")

ADAPTER_FILE = "adapter_model.safetensors"
MERGE_TOLERANCE = 1e-3
"""Nats of a token's log-probability by which a float32 merge may differ; rounding gives about 1e-5."""
PROBE = (
    "Once upon a time there was a small bird. It asked: how much is 17 + 25? Nobody in the wood knew, so it wrote "
    '`def add(a, b): return a + b` into the sand and said: "Forty-two."'
)


@dataclass(frozen=True)
class Trained:
    """What a run left, or a folder in the same layout."""

    folder: Path
    """Holds a PEFT adapter or a whole model."""
    base: str | None
    """Folder or hub name of the model that the adapter is for; None for a whole model."""
    revision: str | None
    trust_remote_code: bool
    outputs: list[str]
    """Names of a reward model's outputs; none for a language model."""
    run: dict[str, Any]
    """`recipe`, `summary` and `environment` of the run, as far as they exist."""


def export(
    run_or_adapter: str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    push: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write what was trained as a folder that transformers, PEFT and vLLM load, with a model card.

    A merge adds the adapter to a fresh float32 copy of the base, compares the log-probabilities (a reward model's
    rewards) of a probe text before and after, and then casts.

    Args:
        run_or_adapter: A run directory, or a folder with a PEFT adapter or a whole model.
        output: A new or empty folder; it appears whole or not at all.
        merge: Write base and adapter as one checkpoint; a whole model is written as it is.
        dtype: "float32", "bfloat16" or "float16"; by default that of the run's policy, else the base's own, for models,
            and unchanged for adapters.
        push: Hub name to upload the folder to, too.
        trust_remote_code: Run the code that the model comes with; what the run's recipe says of it is no consent.

    Returns:
        The output folder.

    Raises:
        UserError: Nothing trained is there, the output is taken, the base is missing or does not fit the adapter.

    Source: ours
    """
    check_places({"run_or_adapter": run_or_adapter, "output": output})
    trained = find_trained(Path(run_or_adapter), trust_remote_code=trust_remote_code)
    output = Path(output)
    with alone_on(output, instead="give another output folder"), replaced_folder(output) as partial:
        differences = write_files(trained, partial, merge=merge, dtype=dtype)
        card = model_card(
            name=output.name,
            base=trained.base,
            merged=trained.base is not None and merge,
            differences=differences,
            outputs=trained.outputs,
            **trained.run,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    print(describe(output, base=None if merge else trained.base, outputs=trained.outputs, differences=differences))
    if push:
        _push(output, push)
    return output


def write_files(trained: Trained, output: Path, *, merge: bool, dtype: str | None) -> dict[str, float]:
    """`export` without the card, into a folder that is there.

    Returns:
        By how many nats a probe's log-probabilities moved: `merge` in float32, and what is stored from the unmerged
        policy at most (`stored`) and on average (`stored_mean`); {} for an adapter.

    Source: ours
    """
    tokenizer = _tokenizer(trained)
    differences: dict[str, float] = {}
    if trained.base is not None and not merge:
        _copy_adapter(trained, output, dtype)
    else:
        differences = _write_model(trained, tokenizer, output, dtype)
    export_tokenizer(tokenizer, output, source=None if differences == {} else _source(trained))
    return differences


def find_trained(path: Path, *, trust_remote_code: bool = False) -> Trained:
    """What there is to export in a run directory, or in a folder with an adapter or a whole model.

    Args:
        trust_remote_code: whether this call consents to the code that a model comes with.

    Raises:
        UserError: The path does not exist, or nothing trained is in it yet.

    Source: ours
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run directory or an adapter's folder")
    is_run = (path / "recipe.yaml").is_file()
    folder = path / "adapter" if is_run else path
    recipe = RunDirectory(path).recipe_tree() if is_run else {}
    if is_run:
        RunDirectory(path).check("adapter", "summary.json", "environment.json")
    check_of_run(path)
    policy = recipe.get("policy") or {}
    if not isinstance(policy, dict):
        raise UserError(f"{path / 'recipe.yaml'}: damaged, `policy` is no section; restore the file")
    check_folder(folder)
    run = {
        "recipe": recipe,
        "summary": _read_json(path / "summary.json"),
        "environment": _read_json(path / "environment.json"),
    }
    if policy.get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"{path / 'recipe.yaml'}: the run ran the code that {policy.get('model')} comes with, and a file is no "
            "consent; read that code, then give --trust-remote-code"
        )
    remote = trust_remote_code
    outputs = _reward_outputs(folder, remote)
    if (folder / "adapter_config.json").is_file():
        read_json(folder / "adapter_config.json")  # PEFT would not say which file is damaged
        weights = folder / ADAPTER_FILE
        if not weights.is_file():
            raise UserError(
                f"{folder} holds no {ADAPTER_FILE}; an adapter in a pickle (adapter_model.bin) is not read, since "
                "reading it can run code: convert it once, where you trust it, with PEFT's save_pretrained"
            )
        config = PeftConfig.from_pretrained(str(folder))
        commit = base_of(weights).get("commit")
        revision = commit or policy.get("revision", config.revision)
        base = config.base_model_name_or_path
        if base and Path(base).expanduser().is_dir():
            revision = None
        return Trained(folder, base and model_name(base), revision, remote, outputs, run)
    if (folder / "config.json").is_file():
        return Trained(folder, None, None, remote, outputs, run)
    if is_run:
        raise UserError(f"{path} has no adapter yet; run `align train {path / 'recipe.yaml'}` to its end")
    raise UserError(f"{path} is neither a run directory (no recipe.yaml) nor an adapter (no adapter_config.json)")


def _reward_outputs(folder: Path, trust_remote_code: bool) -> list[str]:
    if not (folder / "config.json").is_file():
        return []
    with loading(folder, "has a config that cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return output_names(config) if is_classifier(config) else []


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, which has the chat template it was trained with; otherwise the base's."""
    if trained.base is not None and not (trained.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(trained.base, revision=trained.revision, trust_remote_code=trained.trust_remote_code)
    return read_tokenizer(trained.folder, trust_remote_code=trained.trust_remote_code)


def _copy_adapter(trained: Trained, output: Path, dtype: str | None) -> None:
    try:
        tensors = load_file(trained.folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{trained.folder / ADAPTER_FILE} cannot be read: {first_line(error)}") from error
    if dtype is not None:
        tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    with safe_open(trained.folder / ADAPTER_FILE, "pt") as stored:
        save_file(tensors, output / ADAPTER_FILE, metadata=stored.metadata() or {"format": "pt"})
    config = _read_json(trained.folder / "adapter_config.json")
    write_json(output / "adapter_config.json", config | {"base_model_name_or_path": trained.base})
    if trained.outputs:
        shutil.copy(trained.folder / "config.json", output)


@stage("writing the model")
def _write_model(
    trained: Trained, tokenizer: PreTrainedTokenizerBase, output: Path, dtype: str | None
) -> dict[str, float]:
    """Write the whole model; returns what `write_files` does."""
    source = _source(trained)
    if trained.base is not None and is_of_other_weights(trained.folder / ADAPTER_FILE, source):
        raise UserError(
            f"{trained.folder} was trained on other weights than {trained.base} holds now; put the old ones back there "
            "before it is merged"
        )
    model = _load_float32(source, trained)
    probe = torch.tensor([tokenizer(PROBE)["input_ids"]])
    differences = {}
    if trained.base is not None:
        wrapped = _with_adapter(model, trained)
        before = _read(wrapped, probe, trained)
        model = wrapped.merge_and_unload()
        differences["merge"] = _largest_difference(before, _read(model, probe, trained))
        if not differences["merge"] <= MERGE_TOLERANCE:
            raise UserError(
                f"{trained.folder}: merging moves {'rewards' if trained.outputs else 'log-probabilities'} by "
                f"{differences['merge']:.2g}, so the merged model would not be what was trained; "
                "export the adapter without --merge"
            )
    exact = before if trained.base is not None else _read(model, probe, trained)
    code = {"trust_remote_code": trained.trust_remote_code}
    own = str(AutoConfig.from_pretrained(source, **code).dtype or torch.float32).removeprefix("torch.")
    if trained.base is not None:
        own = trained.run["recipe"].get("policy", {}).get("dtype") or own
    model = model.to(getattr(torch, dtype or own))
    if trained.outputs:
        read_with = AutoConfig.from_pretrained(trained.folder, **code)
        model.config.get_text_config().pad_token_id = read_with.get_text_config().pad_token_id
    else:
        _tie_if_equal(model, AutoConfig.from_pretrained(source, **code))
    if model.can_generate() and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        log.info("the base names no token that ends a text; the export names its tokenizer's, %s", tokenizer.eos_token)
    with without_bars():
        model.save_pretrained(output)
    del model
    moved = (exact - _read(_load_float32(output, trained), probe, trained)).abs()
    return differences | {"stored": moved.max().item(), "stored_mean": moved.mean().item()}


def _source(trained: Trained) -> Path:
    """The folder that the model's own files are in."""
    if trained.base is None:
        return trained.folder
    return model_folder(trained.base, trained.revision, trust_remote_code=trained.trust_remote_code)


def _load_float32(folder: Path, trained: Trained) -> PreTrainedModel:
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


def _with_adapter(base: PreTrainedModel, trained: Trained) -> PeftModel:
    if not trained.outputs:
        _untie(base)
    try:
        wrapped = PeftModel.from_pretrained(base, trained.folder, adapter_name=TRAINED)
        stored = set(load_file(trained.folder / ADAPTER_FILE))
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
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


def _tie_if_equal(model: PreTrainedModel, source: PreTrainedConfig) -> None:
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
def _read(model: PreTrainedModel | PeftModel, ids: Tensor, trained: Trained) -> Tensor:
    """A probe's rewards, or the log-probabilities of all tokens at each of its places."""
    logits = model(input_ids=ids).logits.float()
    return logits if trained.outputs else logits.log_softmax(-1)


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@stage("uploading")
def _push(folder: Path, name: str) -> None:
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except HUB_ERRORS as error:
        raise UserError(f"{folder} is written, but {name} cannot be pushed: {first_line(error)}") from error
