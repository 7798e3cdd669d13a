"""Our preference step against TRL's DPOTrainer: same model, adapter, dtype, pairs and batches, equal losses.

Off CUDA, TRL's head scores every position, prompt and padding too; here it gets completion positions only everywhere.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

from align.bench.measure import Task, alternate, machine, peak_bytes
from align.data.collate import Example
from align.data.steps import packed_size
from align.loss import build_loss
from align.metrics import list_metrics
from align.model.adapters import Lora
from align.model.checkpointing import checkpoint_layers
from align.model.forward import TokenScorer
from align.model.policy import Policy, load_policy
from align.model.precision import hold_frozen
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio

ROUNDS = 3
BETA, RANK, RATE = 0.1, 16, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, Any]] = {
    "256x4 V=32k": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 32000, "intermediate_size": 688}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
    "512x8 V=152k": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 151936, "intermediate_size": 1376}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "576x30 V=49k": {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "intermediate_size": 1536}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
PAIRS = {"256x4 V=32k": 4, "512x8 V=152k": 2, "576x30 V=49k": 2}
"""Pairs of a batch at K = 2."""
LENGTHS = {"4:1": (512, 128), "1:1": (256, 256), "1:4": (64, 256)}
"""Prompt and completion tokens of lists."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Largest difference of losses; bfloat16 rounds on either side."""


def run() -> dict[str, object]:
    """K = 2 at the shapes, then lists at the smallest; prints a line per implementation. One thread on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    trl_utils._use_triton = _on_completions
    cases = [_pairs(shape, device) for shape in SHAPES]
    smallest = next(iter(SHAPES))
    cases += [_lists(smallest, k, *lengths, device) for k in (4, 8) for lengths in LENGTHS.items()]
    return {"machine": machine(device), "cases": cases}


def _on_completions(device: torch.device) -> bool:
    """TRL's test for a device whose head takes completion positions only."""
    return True


def _pairs(shape: str, device: torch.device) -> dict[str, object]:
    """K = 2, prompts of 128-512 and completions of 32-256 tokens, log-uniform."""
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder), shape)
        batches = [list(_random_lists(shape, PAIRS[shape], seed)) for seed in range(2)]
        exact = {
            "ours": Ours(folder, batches, device),
            "ours, checkpointing": Ours(folder, batches, device, checkpointing=True),
            "ours, padded rows": Ours(folder, batches, device, packing=False),
            "trl best": Theirs(folder, batches, device),
        }
        half = {
            "ours, bf16": Ours(folder, batches, device, dtype=torch.bfloat16),
            "trl default": Theirs(folder, batches, device, checkpointing=True, cached=False, dtype=torch.bfloat16),
        }
        return _measure(f"{shape}, K = 2", [exact, half], batches, device)


def _lists(shape: str, k: int, ratio: str, lengths: tuple[int, int], device: torch.device) -> dict[str, object]:
    """One list a step; TRL gets all of its pairs."""
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder), shape)
        batches = [[_list(shape, lengths[0], [lengths[1]] * k, seed)] for seed in range(2)]
        sides: dict[str, Side] = {
            "ours": Ours(folder, batches, device),
            "ours, padded rows": Ours(folder, batches, device, packing=False),
        }
        if ratio == "4:1":
            sides["trl best"] = Theirs(folder, batches, device)
        return _measure(f"{shape}, K = {k}, prompt:completion {ratio}", [sides], batches, device)


class Side:
    """One implementation with its own copy of the adapter: a step, and the reference's pass over the same batch."""

    def __init__(self, model: nn.Module, batches: Sequence[list[Example]], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:  # both sides name them alike; a policy that differs from its reference from the start
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.device)
        self.model, self.batches, self.dtype = model, batches, dtype
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)
        self.losses: list[float] = []

    def step(self) -> None:
        """One optimizer step on the next batch."""
        loss = self.backward(len(self.losses) % len(self.batches))
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def autocast(self) -> torch.autocast:
        """The forward pass's precision."""
        kind = self.trained[0].device.type
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, number: int) -> Tensor:
        """Loss and gradients of a batch."""
        raise NotImplementedError

    def reference_pass(self) -> None:
        """The reference's log-probabilities of the first batch."""
        raise NotImplementedError


class Ours(Side):
    """A policy's scorer, the loss and the metrics that AlignTrainer logs; reference cached."""

    def __init__(
        self,
        folder: str,
        batches: Sequence[list[Example]],
        device: torch.device,
        *,
        packing: bool = True,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        adapter = Lora(rank=RANK, alpha=2 * RANK, targets=TARGETS)
        self.policy: Policy = load_policy(folder, adapter=adapter, packing=packing, device=device)
        self.scorer = TokenScorer(self.policy).train()
        pairs = math.comb(len(batches[0][0]["grades"]), 2)  # our loss is their sum, TRL's their mean
        self.loss = build_loss(LogRatio(beta=BETA), [Logistic(weight=1 / pairs)])
        super().__init__(self.policy.model, batches, dtype)
        if dtype != torch.float32:
            hold_frozen(self.policy.model, dtype)
        self.batches = [self._with_reference(examples) for examples in batches]
        if checkpointing:
            checkpoint_layers(self.policy.model)

    def _with_reference(self, examples: list[Example]) -> list[Example]:
        with self.policy.reference(), self.autocast():
            values = iter(self.scorer(self.policy.collate(examples)).logprobs.float().tolist())
        return [
            {**e, "reference_logprobs": [next(values)[: len(ids)] for ids in e["completion_ids"]]} for e in examples
        ]

    def backward(self, number: int) -> Tensor:
        batch = self.policy.collate(self.batches[number])
        with self.autocast():
            stats = self.scorer(batch, ("logprob", "entropy"))
        losses = self.loss(stats, batch.reference_logprobs, batch)
        scores = self.loss.scores(stats, batch.reference_logprobs, batch).detach()
        list_metrics(batch, stats, batch.reference_logprobs, scores)
        losses.mean().backward()
        return losses.detach().mean()

    def reference_pass(self) -> None:
        self._with_reference(self.batches[0])


class Theirs(Side):
    """TRL's DPOTrainer on all pairs of every list, at most eight pairs a pass."""

    def __init__(
        self,
        folder: str,
        batches: Sequence[list[Example]],
        device: torch.device,
        *,
        cached: bool = True,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}])
        self.trainer: Any = DPOTrainer(
            model=base.to(device),
            args=DPOConfig(
                output_dir=self.folder.name,
                beta=BETA,
                bf16=False,
                gradient_checkpointing=checkpointing,
                max_length=None,
                report_to="none",
                use_cpu=device.type == "cpu",
            ),
            train_dataset=tokens,
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)),
        )
        model: Any = self.trainer.model
        super().__init__(model, batches, dtype)
        self.model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.cached = [list(self._with_reference(batch)) if cached else None for batch in batches]
        self.trainer.precompute_ref_logps = cached

    def _inputs(self, examples: list[Example]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Passes of up to eight pairs, each with its share of the mean over lists."""
        rows = [(pair, len(examples) * math.comb(len(e["grades"]), 2)) for e in examples for pair in _pairs_of(e)]
        for start in range(0, len(rows), 8):
            part = rows[start : start + 8]
            yield len(part) / part[0][1], self.trainer.data_collator([pair for pair, _ in part])

    def _with_reference(self, examples: list[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        for _, inputs in self._inputs(examples):
            with torch.no_grad(), self.autocast():
                yield self.trainer.compute_ref_log_probs(self.model, self._moved(inputs))

    def _moved(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.trained[0].device) for name, value in inputs.items()}

    def backward(self, number: int) -> Tensor:
        total = torch.zeros((), device=self.trained[0].device)
        cached: Any = self.cached[number]
        for place, (share, inputs) in enumerate(self._inputs(self.batches[number])):
            if cached:
                inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = cached[place]
            with self.autocast():
                loss = self.trainer.compute_loss(self.model, self._moved(inputs)) * share
            loss.backward()
            total += loss.detach()
        return total

    def reference_pass(self) -> None:
        list(self._with_reference(self.batches[0]))


def _measure(
    name: str, groups: list[dict[str, Side]], batches: Sequence[list[Example]], device: torch.device
) -> dict[str, object]:
    """Time every side in turn, then memory; refuses losses that differ within a group."""
    sides = {label: side for group in groups for label, side in group.items()}
    tasks: dict[str, Task] = {label: side.step for label, side in sides.items()}
    results = alternate(tasks, ROUNDS, device)
    references = alternate({label: side.reference_pass for label, side in sides.items()}, 1, device)
    clock = "cpu_median_ms" if device.type == "cpu" else "median_ms"
    tokens = sum(packed_size(e) for batch in batches for e in batch) / len(batches)
    print(name)
    for group in groups:
        first = next(iter(group))
        for label, side in group.items():
            figures = results[label]
            figures["peak_bytes"] = peak_bytes(tasks[label], device)
            figures["reference_ms"] = references[label][clock]
            figures["tokens_per_second"] = tokens / figures[clock] * 1e3
            figures["times_ours"] = figures[clock] / results[first][clock]
            one_epoch = [results[of][clock] + references[of][clock] for of in (label, first)]
            figures["times_ours_with_reference"] = one_epoch[0] / one_epoch[1]
            figures["loss_difference"] = _loss_difference(side, group[first])
            print("  " + label.ljust(20) + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return {"name": name, "tokens": tokens, "implementations": results}


def _loss_difference(side: Side, ours: Side) -> float:
    steps = min(len(side.losses), len(ours.losses))
    difference = max(abs(a - b) for a, b in zip(side.losses[:steps], ours.losses[:steps], strict=True))
    if not difference <= TOLERANCE[side.dtype]:
        raise RuntimeError(f"losses differ by {difference:.2g}: {side.losses[:steps]} and {ours.losses[:steps]}")
    return difference


def _pairs_of(example: Example) -> Iterator[dict[str, list[int]]]:
    """All pairs of a list whose completions come with falling grades."""
    for better, worse in combinations(example["completion_ids"], 2):
        yield {"prompt_ids": example["prompt_ids"], "chosen_ids": better, "rejected_ids": worse}


def _random_lists(shape: str, count: int, seed: int) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(100 + seed)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** torch.rand((), generator=generator).item())

    for place in range(count):
        yield _list(shape, length(128, 512), [length(32, 256), length(32, 256)], 1000 * seed + place)


def _list(shape: str, prompt: int, completions: list[int], seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = SHAPES[shape]["vocab_size"]
    sizes = [prompt, *completions]
    prompt_ids, *ids = (torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in sizes)
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "grades": [float(-place) for place in range(len(ids))]}


def _save(folder: Path, shape: str) -> None:
    """A model of random weights and a tokenizer of a few words, in a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2))
    model.bfloat16().float().save_pretrained(folder)  # weights that bfloat16 holds, as those of published models
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
