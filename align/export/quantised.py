"""Whole models in fewer bits: bitsandbytes' NF4, and what llm-compressor writes as compressed-tensors."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from align.errors import UserError
from align.export.made import Made
from align.export.merging import SHARD_SIZE, finish, stored_dtype, tie_if_equal
from align.export.merging import write as write_model
from align.export.trained import source_of
from align.model.load import LOAD_ERRORS, first_line
from rewards.loading import without_bars

HEAD = "lm_head"
"""Stays whole, as every one of these methods leaves it."""
LONGEST = 512
"""Tokens of a row that a quantiser looks at."""


def nf4(made: Made) -> None:
    """4-bit NormalFloat, of which the merged model is read from disk again.

    Source: arXiv:2305.14314.
    """
    whole = made.folder / ".whole"
    write_model(Made(made.trained, made.tokenizer, whole, made.name, None, made.model))
    computed = getattr(torch, stored_dtype(made.trained, None))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            whole,
            dtype=computed,
            quantization_config=how,
            device_map={"": "cpu"},
            trust_remote_code=made.trained.trust_remote_code,
        )
        model.save_pretrained(made.folder, max_shard_size=SHARD_SIZE)
    shutil.rmtree(whole)
    finish(Made(made.trained, made.tokenizer, made.folder, made.name, None, model))


def fp8(made: Made) -> None:
    """Weights and, as the model runs, activations in 8-bit floats; no rows are looked at."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    _compress(made, QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=[HEAD]))


def gptq(made: Made) -> None:
    """Weights in 4 bits, groups of 128, each column's error put onto the next.

    Source: arXiv:2210.17323.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    _compress(made, GPTQModifier(targets="Linear", scheme="W4A16", ignore=[HEAD]), rows=_rows(made))


def awq(made: Made) -> None:
    """Weights in 4 bits, groups of 128, scaled by what the inputs of a layer weigh.

    Source: arXiv:2306.00978.
    """
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    scheme = QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=[HEAD])
    with _without_pinning():
        _compress(made, [AWQModifier(), scheme], rows=_rows(made))


@contextmanager
def _without_pinning() -> Iterator[None]:
    """Where there is no GPU: AWQ's inputs stay in plain memory. Pinning is for faster copies there, and fails here."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


def _rows(made: Made) -> Dataset:
    rows = [list(own[:LONGEST]) for own in made.calibration]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(own) for own in rows]})


def _compress(made: Made, recipe: Any, rows: Dataset | None = None) -> None:
    """Quantise the merged model in place and write it.

    Raises:
        UserError: llm-compressor cannot, with its own words.
    """
    from llmcompressor import oneshot

    code = {"trust_remote_code": made.trained.trust_remote_code}
    tie_if_equal(made.model, AutoConfig.from_pretrained(source_of(made.trained), **code))
    given = {} if rows is None else {"dataset": rows, "num_calibration_samples": len(rows), "max_seq_length": LONGEST}
    try:
        oneshot(model=made.model, recipe=recipe, output_dir=None, **given)
    except LOAD_ERRORS as error:
        raise UserError(f"--to {made.dtype}: llm-compressor cannot quantise this model: {first_line(error)}") from error
    finish(made)
    with without_bars():
        made.model.save_pretrained(made.folder, save_compressed=True, max_shard_size=SHARD_SIZE)
    (made.folder / "recipe.yaml").rename(made.folder / "llm-compressor.yaml")  # a recipe.yaml means a run directory
