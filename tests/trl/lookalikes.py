"""Stand-ins for the models and data sets that TRL's own tests and scripts load from the hub, built without a network.

TRL's checkout has the scripts that made the originals. They run here with two things replaced: what they load is a
tokenizer of ours with the same special tokens and TRL's chat template, and what they would upload is saved in the
layout of the hub's cache, where `from_pretrained` finds it by the original's name.
"""

import importlib
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

COMMIT = "0" * 40
CHATML = ("<|im_end|>", "<|endoftext|>", None, ["<|im_start|>"])
LLAMA = ("<|eot_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"])
FAMILIES: dict[str, tuple[str | None, tuple[str, str | None, str | None, list[str]]]] = {
    "Qwen/Qwen2.5": ("qwen2_5", CHATML),
    "Qwen/Qwen3": ("qwen3", CHATML),
    "Qwen/Qwen2-": ("qwen2_5", CHATML),
    "meta-llama": ("llama3", LLAMA),
    "openai/gpt-oss": (
        "gptoss",
        ("<|return|>", "<|endoftext|>", "<|startoftext|>", ["<|start|>", "<|message|>", "<|end|>", "<|channel|>"]),
    ),
    "zai-org": ("glm4moe", ("<|endoftext|>", "<|endoftext|>", None, ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])),
    "CohereLabs": ("cohere2", ("<|END_OF_TURN_TOKEN|>", "<PAD>", "<BOS_TOKEN>", ["<|START_OF_TURN_TOKEN|>"])),
    "nvidia": ("nemotron_3_nano", ("<|im_end|>", "<unk>", "<s>", ["<|im_start|>"])),
    "allenai": ("qwen2_5", CHATML),
    "LiquidAI": ("lfm2", ("<|im_end|>", "<|pad|>", "<|startoftext|>", ["<|im_start|>"])),
    "EleutherAI": (None, ("<|endoftext|>", None, "<|endoftext|>", [])),
}
"""By the beginning of a model's name: TRL's template, and the tokens that end, pad and begin, and others."""
SETS = ("zen", "harmony", "toolcall", "zen_image", "zen_multi_image")


def build(checkout: Path, home: Path, names: set[str]) -> dict[str, str]:
    """Every model of `names` into the hub's cache under `home`, every data set into `home/sets`.

    Returns:
        What could not be built, with why.
    """
    if all((hub_folder(home, name) / "config.json").exists() for name in names):
        return {}
    failed = _models(checkout, home, names)
    for name in SETS:
        try:
            _data_sets(checkout / "scripts" / f"generate_{name}_dataset.py", home / "sets")
        except Exception as error:
            failed[f"{name.replace('_', '-')} (data set)"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return failed


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes joined to few tokens, with the special tokens and the chat template of a model's family."""
    template, (end, pad, begin, others) = next(v for k, v in FAMILIES.items() if name.startswith(k))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [token for token in dict.fromkeys([end, pad, begin, *others]) if token]
    trl = Path(importlib.import_module("trl").__file__ or "").parent
    texts = [file.read_text(encoding="utf-8") for file in sorted(trl.glob("*.py"))]  # some English and some JSON
    sizes = {"vocab_size": 3000, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=special, **sizes))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=pad, bos_token=begin)
    if name.startswith("allenai"):  # whose script takes the number of tokens from here
        made.add_tokens([f"<unused {n}>" for n in range(100278 - len(made))])
    if template:
        made.chat_template = (trl / "chat_templates" / f"{template}.jinja").read_text()
    return made


def hub_folder(home: Path, name: str) -> Path:
    """Where the hub's cache keeps the files of a repository."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def _models(checkout: Path, home: Path, names: set[str]) -> dict[str, str]:
    def keep(model: Any, made: Any, generation: Any, prefix: str = "", suffix: str | None = None) -> None:
        name = f"trl-internal-testing/{prefix}-{type(model).__name__}" + (f"-{suffix}" if suffix else "")
        for part in (model, made):
            part.save_pretrained(hub_folder(home, name))
        built.add(name)

    built: set[str] = set()
    failed = {}
    package = checkout / "scripts" / "generate_tiny_models"
    with _as_package(package, keep):
        for script in [
            *(package / "for_causal_lm").glob("*.py"),
            *(package / "for_sequence_classification").glob("*.py"),
        ]:
            if script.stem.startswith(("_", "peft", "small")):
                continue
            torch.manual_seed(0)
            try:
                importlib.import_module(f"generate_tiny_models.{script.parent.name}.{script.stem}")
            except Exception as error:
                failed[script.stem] = f"{type(error).__name__}: {error}".splitlines()[0]
    _encoder_decoder(hub_folder(home, "trl-internal-testing/tiny-T5ForConditionalGeneration"))
    unbuilt = {name: "no script of the checkout makes it here" for name in names - built}
    return {name: why for name, why in failed.items() if any(name[:5] in n.lower() for n in unbuilt)} | unbuilt


def _encoder_decoder(folder: Path) -> None:
    """What tests of CPO and ORPO load before each of them, whether they read it or not."""
    made = tokenizer("EleutherAI/pythia-14m")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": len(made)}
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).save_pretrained(folder)
    made.save_pretrained(folder)


@contextmanager
def _as_package(package: Path, keep: Callable[..., None]) -> Iterator[None]:
    """The scripts importable, their common functions ours, their downloads tokenizers and configurations of ours."""
    common = types.ModuleType("generate_tiny_models._common")
    for name in ("check_dtype_pattern", "check_transformers_version", "print_config_diff", "smoke_test"):
        setattr(common, name, lambda *_, **__: None)
    common.push_to_hub = keep
    common.init_weights_tiny_model = _spread
    sys.path.insert(0, str(package.parent))
    sys.modules[common.__name__] = common
    try:
        with (
            patch.object(AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer(name)),
            patch.object(GenerationConfig, "from_pretrained", lambda *_, **__: GenerationConfig()),
            patch.object(AutoConfig, "from_pretrained", _small_config),
        ):
            yield
    finally:
        sys.path.remove(str(package.parent))


def _small_config(name: str, **sizes: Any) -> Any:
    kinds = {"EleutherAI": "gpt_neox", "meta-llama": "llama", "Qwen/Qwen3-30B": "qwen3_moe", "Qwen/Qwen3": "qwen3"}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), "qwen2")
    made = tokenizer(name)
    config = AutoConfig.for_model(kind, vocab_size=len(made), pad_token_id=made.pad_token_id, **sizes)
    return config if hasattr(config, "layer_types") else _with_layer_types(config)


def _with_layer_types(config: Any) -> Any:
    config.layer_types = Qwen2Config(num_hidden_layers=config.num_hidden_layers).layer_types
    return config


def _spread(model: torch.nn.Module) -> None:
    """Weights as TRL's tiny models have them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)


def _data_sets(script: Path, folder: Path) -> None:
    def keep(made: datasets.DatasetDict, repo_id: str, config_name: str) -> None:
        for split, rows in made.items():
            (folder / repo_id / config_name).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(folder / repo_id / config_name / f"{split}.parquet")

    functions = runpy.run_path(str(script))
    name = functions["ScriptArguments"]().repo_id
    with patch.object(datasets.DatasetDict, "push_to_hub", keep), patch.object(datasets.Dataset, "push_to_hub", keep):
        functions["main"](0.1, True, name)


def load_dataset_from(folder: Path) -> Callable[..., Any]:
    """`datasets.load_dataset` that takes the data sets of a folder first, by their names on the hub."""
    plain = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *args: Any, **options: Any) -> Any:
        here = folder / path / (name or "default")
        if not here.is_dir():
            return plain(path, name, *args, **options)
        files = {file.stem: str(file) for file in here.glob("*.parquet")}
        return plain("parquet", *args, data_files=files, **options)

    return load_dataset
