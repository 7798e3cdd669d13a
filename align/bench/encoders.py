"""An encoder's classifier over rows of mixed length: the texts alone against padded rows, equal rewards."""

import random
from datetime import date
from functools import partial
from typing import Any

import torch
import transformers as t
from torch.testing import assert_close

from align.bench.measure import Task, allocated_bytes, alternate, machine
from align.packing.unpadded import enable_unpadding

ROUNDS = 3
ROWS, LONGEST = 16, 512
SHAPE: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4} | {
    "intermediate_size": 688,
    "max_position_embeddings": LONGEST + 2,
    "num_labels": 1,
    "pad_token_id": 0,
}
MODELS = {
    "ModernBERT": lambda: t.ModernBertConfig(**SHAPE),
    "BERT": lambda: t.BertConfig(**SHAPE, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    "XLM-RoBERTa": lambda: t.XLMRobertaConfig(**SHAPE, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
}


def run() -> dict[str, object]:
    """One thread on a CPU, float32: a forward pass, and one with the gradients of all weights."""
    torch.set_num_threads(1)
    about = {"machine": machine(torch.device("cpu")) | {"transformers": t.__version__}, "date": str(date.today())}
    sizes = _sizes()
    tokens = {"texts": sum(sizes), "padded rows": max(sizes) * len(sizes)}
    cases = [_case(name, config(), sizes) for name, config in MODELS.items()]
    return about | {"rounds": ROUNDS, "model": SHAPE, "tokens": tokens, "cases": cases}


def _sizes() -> list[int]:
    """Of log-normal length, 16 to LONGEST tokens, as chat data have it, in the order that they come in."""
    draw = random.Random(0)
    return [min(max(int(draw.lognormvariate(4.6, 0.8)), 16), LONGEST) for _ in range(ROWS)]


def _case(name: str, config: Any, sizes: list[int]) -> dict[str, object]:
    def made(unpadded: bool) -> Any:
        torch.manual_seed(0)
        model = t.AutoModelForSequenceClassification.from_config(config).train()
        if unpadded and not enable_unpadding(model.base_model, name=name):
            raise RuntimeError(f"{name}: it does not run its texts alone")
        return model

    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    ids = torch.randint(1, config.vocab_size, mask.shape).masked_fill(~mask, 0)
    models = {"texts alone": made(True), "padded rows": made(False)}
    rewards: dict[str, torch.Tensor] = {}

    def score(way: str) -> None:
        with torch.inference_mode():
            rewards[way] = models[way](input_ids=ids, attention_mask=mask.long()).logits

    def step(way: str) -> None:
        models[way].zero_grad()
        models[way](input_ids=ids, attention_mask=mask.long()).logits.sum().backward()

    tasks: dict[str, Task] = {}
    for way in models:
        tasks[f"scoring, {way}"] = partial(score, way)
        tasks[f"step, {way}"] = partial(step, way)
    results = alternate(tasks, ROUNDS, torch.device("cpu"))
    assert_close(rewards["texts alone"], rewards["padded rows"], atol=1e-5, rtol=1e-5)
    print(name, flush=True)
    for label, figures in results.items():
        figures["allocated_bytes"] = allocated_bytes(tasks[label], torch.device("cpu"))
        print("  " + label.ljust(24) + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return {"name": name, "implementations": results}
