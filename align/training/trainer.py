"""AlignTrainer: a step's lists -> token log-probs -> scores -> one mean of the objective -> one optimizer step."""

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from align.data.steps import StepLists, agreed_micro_batches, list_parts, part_of_list
from align.errors import UserError
from align.evaluate.lists import evaluate_lists, reference_logprobs
from align.losses.list_loss import ListLoss
from align.losses.metrics import LOG_NAMES, Sums
from align.model.policy import Policy
from align.packing.batch import Example
from align.progress import progress
from align.runs.run_directory import COMPLETE, RunDirectory, complete_checkpoints
from align.training.tracking import Tracking
from align.types import ListBatch, TokenStats

log = logging.getLogger("align")

OUTPUTS = ("logprob", "entropy")
Stats = TokenStats | Tensor
"""What a model says: a policy of every token, a reward model its rewards [N, A]."""


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
        lists: Dataset,
        plan: Sequence[Sequence[int]],
        heldout: Dataset,
        run: RunDirectory,
        tokens_per_batch: int,
        keep_checkpoints: int,
        keep_best: str | None,
        args: TrainingArguments,
    ) -> None:
        """Args:
        lists: tokenised training lists, with `reference_logprobs` or not.
        plan: the rows of `lists` of every optimizer step.
        heldout: tokenised lists that are measured.
        keep_best: the held-out figure by which run.best is kept.
        """
        self.scorer: Any = policy.scorer()
        super().__init__(model=self.scorer, args=args, train_dataset=lists, eval_dataset=heldout)
        self.remove_callback(PrinterCallback)
        self.add_callback(_AfterStep(policy))
        self.add_callback(_AtTheStart(self))
        self.tracking = Tracking(self.callback_handler.callbacks)
        self.policy = policy
        self.loss = loss
        self.lists = lists
        self.heldout = heldout
        self.plan = plan
        self.run = run
        self.tokens_per_batch = tokens_per_batch
        self.keep_checkpoints = keep_checkpoints
        self.keep_best = keep_best
        self.outputs = tuple(dict.fromkeys([*OUTPUTS, *loss.outputs]))
        self.sums = Sums()
        self.completion_tokens = [sum(map(len, ids)) for ids in lists["completion_ids"][:]]

    @property
    def planned_tokens(self) -> int:
        """Completion tokens of the whole run."""
        return sum(self.completion_tokens[row] for rows in self.plan for row in rows)

    def train_from(
        self, checkpoint: Path | None, *, logging_steps: int, before: Mapping[str, float] | None = None
    ) -> None:
        """Train to the end of the plan, with a progress bar; from a checkpoint if there is one.

        Args:
            before: held-out figures of the policy at its start, for the trackers.
        """
        self.before = before or {}
        start = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        if self.is_world_process_zero():
            self.run.rewind_metrics(start)
        self.logging_steps = logging_steps
        self.seconds_before, self.began = self.run.seconds(), time.monotonic()
        show = self.is_world_process_zero()
        if start and show:
            log.info("goes on from step %d of %d", start, len(self.plan))
        with progress("training", len(self.plan), unit="steps", start=start, show=show) as self.advance:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def track_heldout(self, metrics: Mapping[str, float]) -> None:
        """Tell the trackers held-out figures of this step, under the names that they have in the middle of training."""
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self.callback_handler.on_log(self.args, self.state, self.control, named)

    def end_tracking(self, summary: Mapping[str, Any]) -> None:
        """Tell the trackers what the run came to, and end them.

        Args:
            summary: as in summary.json.
        """
        self.track_heldout(summary["eval_after"])
        figures = {name: summary[name] for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes")}
        for when in ("before", "after"):
            figures |= {f"{when}/{name}": value for name, value in summary[f"eval_{when}"].items()}
        event = (self.args, self.state, self.control)
        self.tracking.end(summary["samples"], figures, self.state.global_step, *event)

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step; each process reads its own share, so accelerate must not cut it again."""
        world = {"rank": self.args.process_index, "world_size": self.args.world_size}
        return DataLoader(StepLists(self.lists, self.plan, **world), batch_size=1, collate_fn=itemgetter(0))

    def training_step(  # type: ignore[override]  # an item is a step's lists, not tensors
        self, model: nn.Module, inputs: list[Example], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all of a step's micro-batches; returns the step's loss."""
        self.step_began = time.monotonic()
        model.train()
        batches = self._micro_batches(inputs)
        self.loss.begin_step(self.policy, batches, self.accelerator)
        self.baseline = self._baseline() if self.loss.needs_baseline else None
        total = torch.zeros((), device=self.args.device)
        for examples in batches[:-1]:
            with self.accelerator.no_sync(model):
                total += self._run(model, examples)
        return total + self._run(model, batches[-1], self.policy.penalty())

    def _run(self, model: nn.Module, examples: list[Example], penalty: Tensor | float = 0.0) -> Tensor:
        """Forward and backward of one micro-batch; its share of the step's loss."""
        if len(examples) == 1 and self.args.world_size == 1:  # sharded models need as many passes on every process
            parts = list_parts(examples[0], self.tokens_per_batch)
            if len(parts) > 1:
                return self._run_in_parts(model, examples[0], parts, penalty)
        batch = self.policy.collate(
            examples or [self.lists[0] | {"key": 0}]
        )  # a process without a list still takes part
        with self.compute_loss_context_manager():
            stats = model(batch, self.outputs)
        return self._backward(self._loss_of(batch, stats, counts=bool(examples)) + penalty)

    def _run_in_parts(
        self, model: nn.Module, example: Example, parts: list[list[int]], penalty: Tensor | float
    ) -> Tensor:
        """A list larger than a forward pass may be: its loss is taken over all of it, its backward pass by parts.

        A first pass without activations gives every token's log-probability (a reward model's rewards) and so the loss
        and its gradient there; a second one carries that gradient through the model, one part at a time.
        """
        whole = self.policy.collate([example])
        batches = [self.policy.collate([part_of_list(example, places)]) for places in parts]
        with torch.no_grad(), self.compute_loss_context_manager():
            found = [model(batch, self.outputs) for batch in batches]
        stats = _joined(whole, parts, found)
        if self.loss.needs_reference:  # in the same parts, so that before the first step it is the policy bit for bit
            whole = replace(whole, reference_logprobs=self._reference_in_parts(whole, parts, batches))
        leaf = _trained_on(stats).requires_grad_()
        loss = self._loss_of(whole, stats)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for batch, places in zip(batches, parts, strict=True):
            with self.compute_loss_context_manager():
                values = _trained_on(model(batch))
            self._backward((values * gradient[places, : values.shape[1]]).sum() + penalty)
            penalty = 0.0
        return loss.detach()

    def _reference_in_parts(self, whole: ListBatch, parts: list[list[int]], batches: list[ListBatch]) -> Tensor:
        with self.compute_loss_context_manager():
            found = [reference_logprobs(self.scorer, self.policy, batch) for batch in batches]
        return _join(whole, parts, found, whole.targets.shape[1])

    def _loss_of(self, batch: ListBatch, stats: Any, *, counts: bool = True) -> Tensor:
        """The lists' share of the step's loss: their sum over the step's global number of lists."""
        with self.compute_loss_context_manager():
            reference = reference_logprobs(self.scorer, self.policy, batch) if self.loss.needs_reference else None
        scores = self.loss.scores(stats, reference, batch)
        losses = self.loss(stats, reference, batch, self.baseline)
        values = {"loss": losses.detach(), **self.loss.metrics(batch, stats, reference, scores.detach())}
        self.sums.add(values, counts=counts)
        # Gradients are averaged over processes, so each process's sum counts world_size times.
        share = self.args.world_size / len(self.plan[self.state.global_step]) if counts else 0.0
        return losses.sum() * share

    def _backward(self, loss: Tensor) -> Tensor:
        self.accelerator.backward(loss)
        return loss.detach()

    def _micro_batches(self, lists: list[Example]) -> list[list[Example]]:
        return agreed_micro_batches(
            lists, tokens_per_batch=self.tokens_per_batch, accelerator=self.accelerator, packed=self.policy.packing
        )

    def _baseline(self) -> Tensor:
        """KTO's estimate of the policy's divergence from the reference, in nats, at least 0.

        The mean log-ratio of every prompt of the whole step with the next row's completion: it does not depend on how
        the step is cut (TRL takes it per micro-batch).
        """
        rows = self.plan[self.state.global_step]
        places = range(self.args.process_index, len(rows), self.args.world_size)
        total = torch.zeros((), device=self.args.device)
        for examples in self._micro_batches([self._mismatched(rows, place) for place in places]):
            total += self._log_ratio(examples or [self._mismatched(rows, 0)]) * bool(examples)
        return (self.accelerator.reduce(total, reduction="sum") / len(rows)).clamp(min=0)

    def _mismatched(self, rows: Sequence[int], place: int) -> Example:
        other = self.lists[rows[(place + 1) % len(rows)]]
        prompt_ids = self.lists[rows[place]]["prompt_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": other["completion_ids"][:1], "grades": [0.0]}

    @torch.no_grad()
    def _log_ratio(self, examples: list[Example]) -> Tensor:
        """Sum over the examples of the log-ratio of policy and reference."""
        batch = self.policy.collate(examples)
        with self.compute_loss_context_manager():
            ratio = self.scorer(batch).logprobs - reference_logprobs(self.scorer, self.policy, batch)
        return ratio.where(batch.completion_mask, 0.0).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line per optimizer step: the lists' means, and the Trainer's gradient norm and learning rate."""
        if "grad_norm" not in logs:  # the Trainer's own totals at the end
            return
        means = self.sums.means(self.accelerator)
        self.sums = Sums()
        self._refuse_divergence("loss", means["loss"])
        if not self.args.fp16:  # whose scaler passes over a step with an infinite gradient
            self._refuse_divergence("gradient's norm", logs["grad_norm"])
        line = {LOG_NAMES.get(name, name): value for name, value in means.items()}
        line |= {name: logs[name] for name in ("grad_norm", "learning_rate")}
        self._write(line | self._rates())
        note = f"loss {means['loss']:.4f}" + (f", ndcg {means['ndcg']:.3f}" if "ndcg" in means else "")
        self.advance(1, note if self.state.global_step % self.logging_steps == 0 else "")

    def _refuse_divergence(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"step {self.state.global_step}: the {name} is {value}; lower train.learning_rate, or set "
                "train.precision to bfloat16 or float32 if it is float16, and give `output` another folder"
            )

    def _rates(self) -> dict[str, float]:
        rows = self.plan[self.state.global_step - 1]
        seconds = time.monotonic() - self.step_began
        tokens = sum(self.completion_tokens[row] for row in rows)
        return {"lists_per_second": len(rows) / seconds, "completion_tokens_per_second": tokens / seconds}

    def _write(self, values: dict[str, float]) -> None:
        """A line for metrics.jsonl and for the loggers that the recipe names."""
        super().log(values)
        if self.is_world_process_zero():
            place = {"step": self.state.global_step, "seconds": self.seconds_before + time.monotonic() - self.began}
            self.run.append_metrics(place | values)

    def evaluate_heldout(
        self, by_list: dict[str, dict[int, float]] | None = None, *, label: str = "evaluating"
    ) -> dict[str, float]:
        """Metrics of the policy as it is on the held-out lists; empty if there are none.

        Args:
            by_list, label: as for `evaluate_lists`.
        """
        metrics = evaluate_lists(
            self.scorer,
            self.policy,
            self.loss,
            self.heldout,
            tokens_per_batch=self.tokens_per_batch,
            accelerator=self.accelerator,
            by_list=by_list,
            label=label,
        )
        self._refuse_divergence("loss on the held-out lists", metrics.get("loss", 0.0))
        return metrics

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Metrics on the held-out lists in the middle of training; keeps the best policy."""
        metrics = self.evaluate_heldout()
        if self.keep_best and self.is_world_process_zero():
            self._keep_if_best(metrics[self.keep_best])
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self._write(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _keep_if_best(self, value: float) -> None:
        earlier = [line[f"eval_{self.keep_best}"] for line in self.run.read_metrics() if "eval_loss" in line]
        better = min if self.keep_best == "loss" else max
        if not earlier or better(value, *earlier) == value != better(earlier):
            shutil.rmtree(self.run.best, ignore_errors=True)
            self.policy.save_state(self.run.best)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Mark the checkpoint as whole once it is, and only then drop older ones: a kill leaves one to go on from."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self.run.checkpoints
            (folder / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            for old in complete_checkpoints(folder)[: -self.keep_checkpoints]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.policy.save_state(Path(output_dir or self.run.checkpoints))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_state(Path(resume_from_checkpoint))


class _AfterStep(TrainerCallback):
    """Lets the adapter act between the optimizer's step and the gradients' end (AdaLoRA moves its ranks there)."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.policy.after_step(state.global_step + 1)


class _AtTheStart(TrainerCallback):
    """Tells trackers, once they are open, the held-out figures from before the first step; a resumed run did so."""

    def __init__(self, trainer: AlignTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 and self.trainer.before:
            self.trainer.track_heldout(self.trainer.before)


def _trained_on(stats: Stats) -> Tensor:
    """What the loss is differentiated by: token log-probabilities, or a reward model's rewards."""
    return stats if isinstance(stats, Tensor) else stats.logprobs


def _joined(whole: ListBatch, parts: list[list[int]], found: list[Stats]) -> Stats:
    """The statistics of a list's completions, from those of its parts."""
    if isinstance(found[0], Tensor):
        return _join(whole, parts, found, found[0].shape[1])  # type: ignore[arg-type]
    width = whole.targets.shape[1]
    names = [f.name for f in fields(TokenStats) if getattr(found[0], f.name) is not None]
    return TokenStats(**{name: _join(whole, parts, [getattr(s, name) for s in found], width) for name in names})


def _join(whole: ListBatch, parts: list[list[int]], values: list[Tensor], width: int) -> Tensor:
    joined = torch.zeros(len(whole.targets), width, device=whole.targets.device)
    for places, own in zip(parts, values, strict=True):
        joined[places, : own.shape[1]] = own
    return joined
