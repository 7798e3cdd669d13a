"""AlignTrainer: a step's lists -> token log-probs -> scores -> one mean of the objective -> one optimizer step."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from align.data.collate import Example, collate
from align.data.steps import StepLists, cut_further, micro_batches
from align.evaluate.lists import forward_lists
from align.loss import ListLoss
from align.metrics import LOG_NAMES, Sums, list_metrics
from align.model.forward import TokenScorer
from align.model.policy import Policy

class AlignTrainer(Trainer):
    """transformers' Trainer, where one item of the data loader is one optimizer step's lists.

    The step is cut into micro-batches by tokens, so neither the cut nor the number of processes changes the loss: it is
    the sum over lists divided by the step's global number of lists.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        loss: ListLoss,
        lists: Sequence[Example],
        plan: Sequence[Sequence[int]],
        tokens_per_batch: int,
        keep_checkpoints: int,
        evaluate_lists: Callable[[], dict[str, float]],
        write_metrics: Callable[[dict[str, float]], None],
        args: TrainingArguments,
        callbacks: list | None = None,
    ) -> None:
        super().__init__(model=TokenScorer(policy), args=args, train_dataset=lists, callbacks=callbacks)
        self.policy = policy
        self.loss = loss
        self.plan = plan
        self.tokens_per_batch = tokens_per_batch
        self.keep_checkpoints = keep_checkpoints
        self.evaluate_lists = evaluate_lists
        self.write_metrics = write_metrics
        self.step_sums = Sums()

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step; each process reads its own share, so accelerate must not cut it again."""
        world = {"rank": self.args.process_index, "world_size": self.args.world_size}
        return DataLoader(StepLists(self.train_dataset, self.plan, **world), batch_size=1, collate_fn=_only_item)

    def training_step(self, model: nn.Module, inputs: list[Example], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all of a step's micro-batches; returns the step's loss."""
        model.train()
        batches = self._cut(inputs)
        baseline = self._baseline(batches) if self.loss.needs_baseline else None
        total = torch.zeros((), device=self.args.device)
        for examples in batches[:-1]:
            with self.accelerator.no_sync(model):
                total += self._backward(self._step_loss(model, examples, baseline))
        return total + self._backward(self._step_loss(model, batches[-1], baseline) + self.policy.penalty())

    def _cut(self, lists: list[Example]) -> list[list[Example]]:
        """Micro-batches; every process gets the same number, since sharded models communicate in each forward."""
        batches = micro_batches(lists, tokens_per_batch=self.tokens_per_batch)
        if self.args.world_size > 1:
            count = torch.tensor([len(batches)], device=self.args.device)
            wanted = int(self.accelerator.gather(count).max())
            batches = cut_further(batches, wanted)
            batches += [[] for _ in range(wanted - len(batches))]
        return batches

    def _step_loss(self, model: nn.Module, examples: list[Example], baseline: Tensor | None) -> Tensor:
        """The lists' share of the step's loss: their sum over the step's global number of lists."""
        batch = self._collate(examples or [self.train_dataset[0]])
        with self.compute_loss_context_manager():
            stats = model(batch, self.outputs)
        if not examples:  # a process that has no list left still takes part in the communication
            return 0.0 * stats.logprobs.sum()
        reference = reference_logprobs(self.model, self.policy, batch) if self.loss.needs_reference else None
        scores = self.loss.scores(stats, reference, batch)
        losses = self.loss(stats, reference, batch, baseline)
        self.sums.add({"loss": losses.detach(), **list_metrics(batch, stats, reference, scores.detach())})
        # Gradients are averaged over processes, so each process's sum counts world_size times.
        return losses.sum() * self.args.world_size / len(self.plan[self.state.global_step])

    def _backward(self, loss: Tensor) -> Tensor:
        self.accelerator.backward(loss)
        return loss.detach()

    def _collate(self, examples: list[Example]) -> ListBatch:
        return collate(examples, pad_id=self.policy.pad_id).to(self.args.device)

    def _baseline(self, batches: list[list[Example]]) -> Tensor:
        """KTO's estimate of the policy's divergence from the reference: every prompt of the whole step with the next
        row's completion, so that it does not depend on how the step is cut (TRL takes it per micro-batch)."""
        rows = self.plan[self.state.global_step]
        total = torch.zeros(2, device=self.args.device)
        for place in range(self.args.process_index, len(rows), self.args.world_size):
            own, other = self.train_dataset[rows[place]], self.train_dataset[rows[(place + 1) % len(rows)]]
            total += self._log_ratio({**own, "completion_ids": other["completion_ids"][:1], "grades": [0.0]})
        ratio, count = self.accelerator.reduce(total, reduction="sum")
        return (ratio / count).clamp(min=0)

    @torch.no_grad()
    def _log_ratio(self, example: Example) -> Tensor:
        example.pop("reference_logprobs", None)  # it belongs to the row's own completion
        batch = self._collate([example])
        with self.compute_loss_context_manager():
            policy = self.model(batch).logprobs
        ratio = policy - reference_logprobs(self.model, self.policy, batch)
        return torch.stack([ratio.where(batch.completion_mask, 0.0).sum(), ratio.new_ones(())])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line per optimizer step: the Trainer's loss, gradient norm and learning rate, and the lists' means."""
        means = self.sums.means(self.accelerator)
        self.sums = Sums()
        del logs["loss"]  # the same figure, less exact
        super().log({LOG_NAMES.get(name, name): value for name, value in means.items()} | logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Metrics on the held-out lists."""
        metrics = {f"eval_{name}": value for name, value in self.evaluate_policy(self.state.global_step).items()}
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Mark the checkpoint as whole once it is; only then drop older ones, so that a kill leaves one to go on from."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            (folder / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            for old in complete_checkpoints(folder)[: -self.keep_checkpoints]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.policy.save_state(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_state(Path(resume_from_checkpoint))


def _only_item(items: list) -> Any:
    return items[0]
