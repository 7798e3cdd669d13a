"""What is compared: our step, TRL's, and the layers alone without a head."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from align.bench.step.shapes import pairs_of
from align.losses.list_loss import build_loss
from align.losses.metrics import list_metrics
from align.model.adapters import Lora
from align.model.checkpointing import checkpoint_layers
from align.model.config import PolicySection
from align.model.forward import TokenScorer, last_hidden
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.model.precision import hold_frozen
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.packing.batch import Example
from align.types import ListBatch

BETA, RANK, RATE = 0.1, 16, 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        section = PolicySection(model=folder, adapter=Lora(rank=RANK, alpha=2 * RANK, targets=TARGETS))
        self.policy: Policy = load_policy(section, LoadOptions(packing=packing, device=device))
        self.scorer = TokenScorer(self.policy).train()
        pairs = math.comb(len(batches[0][0]["grades"]), 2)  # our loss is their sum, TRL's their mean
        self.loss = build_loss(LogRatio(beta=BETA), [Logistic(weight=1 / pairs)])
        super().__init__(self.policy.model, batches, dtype)
        if dtype != torch.float32:
            hold_frozen(self.policy.model, dtype)
        self.batches = [self._with_reference(examples) for examples in batches]
        if checkpointing:
            checkpoint_layers(self.policy.model)

    def collate(self, examples: list[Example]) -> ListBatch:
        """What a step reads."""
        return self.policy.collate(examples)

    def _with_reference(self, examples: list[Example]) -> list[Example]:
        with self.policy.reference(), self.autocast():
            values = iter(self.scorer(self.collate(examples)).logprobs.float().tolist())
        return [
            {**e, "reference_logprobs": [next(values)[: len(ids)] for ids in e["completion_ids"]]} for e in examples
        ]

    def backward(self, number: int) -> Tensor:
        batch = self.collate(self.batches[number])
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
        rows = [(pair, len(examples) * math.comb(len(e["grades"]), 2)) for e in examples for pair in pairs_of(e)]
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


class Layers(Ours):
    """The decoder without the head: the mean of what comes out at the positions that predict."""

    def backward(self, number: int) -> Tensor:
        batch = self.policy.collate(self.batches[number])
        with self.autocast():
            loss = last_hidden(self.policy.model, batch).float().pow(2).mean()
        loss.backward()
        return loss.detach()
