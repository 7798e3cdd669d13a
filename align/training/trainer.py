"""AlignTrainer: a step's lists -> token log-probs -> scores -> one mean of the objective -> one optimizer step."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from align.data.steps import StepLists, agreed_micro_batches, agreed_parts
from align.data.windows import completion_tokens
from align.evaluate.lists import evaluate_lists, reference_logprobs
from align.files import partial_folder, replaced_folder
from align.losses.list_loss import ListLoss
from align.losses.metrics import LOG_NAMES, Sums
from align.manifest import seal
from align.model.checkpointing import OnHost
from align.model.policy import Policy
from align.model.sharding import at_rest, is_sharded
from align.packing.batch import Example
from align.progress import progress
from align.recipe.settings import TrainSection
from align.runs.checkpoints import step_of
from align.runs.run_directory import RunDirectory
from align.stopping import between_steps
from align.training.at_steps import AfterStep, AtTheStart
from align.training.bad_step import SKIPPED, BadSteps, refuse_divergence
from align.training.balance import Waiting, step_cost
from align.training.baseline import Baseline
from align.training.checkpointed import CheckpointedTrainer
from align.training.given import Given
from align.training.last_words import LastWords
from align.training.list_parts import ListParts
from align.training.optimizers import averaging
from align.training.pause import Pause
from align.training.processes import check_sharding
from align.training.stopping import Ending, Patience, was_stopped
from align.training.tracking import Tracking
from align.training.zero import before_the_last, whole_weights
from align.types import ListBatch

log = logging.getLogger("align")

OUTPUTS = ("logprob", "entropy")


class AlignTrainer(CheckpointedTrainer):
    """transformers' Trainer, where one item of the data loader is one optimizer step's lists.

    The step is cut into micro-batches by tokens, so neither the cut nor the number of processes changes the loss: it is
    the sum over lists divided by the step's global number of lists; where rows have weights, the sum of weight times
    loss divided by the step's global sum of weights.
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
        section: TrainSection,
        args: TrainingArguments,
        given: Given = Given(),  # noqa: B008, frozen
    ) -> None:
        """Args:
        lists: tokenised training lists, with `reference_logprobs` or not.
        plan: the rows of `lists` of every optimizer step.
        heldout: tokenised lists that are measured.
        section: the recipe's `train`, of which `args` are what transformers reads.
        given: of it the hooks, the optimizer, the schedule and callbacks.
        """
        self.scorer: Any = policy.scorer()
        if not len(heldout):
            args.metric_for_best_model = None
        super().__init__(model=self.scorer, args=args, train_dataset=lists, eval_dataset=heldout)
        check_sharding(self)
        self.remove_callback(PrinterCallback)
        self.add_callback(AfterStep(self))
        self.add_callback(AtTheStart(self))
        self.tracking = Tracking(self.callback_handler.callbacks, args.project)
        self.pause = Pause(self)
        self.ending = Ending(self.pause, told=bool(given.callbacks))
        for own in (*given.callbacks, self.ending, self.pause):
            self.add_callback(own)
        self.sharded = is_sharded(self.scorer)
        self.policy = policy
        self.loss = loss
        self.lists = lists
        self.heldout = heldout
        self.plan = plan
        self.run = run
        self.section = section
        self.bad = BadSteps(self, skip=section.on_bad_step == "skip")
        self.tokens_per_batch = section.batch_tokens
        self.cost = step_cost(policy)
        self.offload = section.activation_offload
        self.keep_checkpoints = section.keep_checkpoints
        self.keep_best = section.keep_best
        self.patience = (
            Patience(section.early_stopping, keep_best=section.keep_best) if section.early_stopping else None
        )
        self.given = given
        self.hooks = given.hooks
        self.outputs = tuple(dict.fromkeys([*OUTPUTS, *loss.outputs]))
        self.in_parts, self.mismatched = ListParts(self), Baseline(self)
        self.sums = Sums()
        self.waiting = Waiting(self.scorer, self.accelerator)
        self.weights = lists["loss_weight"][:] if "loss_weight" in lists.column_names else None
        self.completion_tokens: list[int] = completion_tokens(lists).tolist()
        """Of every list, learnt or not: it is what the model computes."""

    @property
    def trained_tokens(self) -> int:
        """Completion tokens of the steps that were taken, learnt or not."""
        return sum(self.completion_tokens[row] for rows in self.plan[: self.state.global_step] for row in rows)

    def train_from(
        self, checkpoint: Path | None, *, logging_steps: int, before: Mapping[str, float] | None = None
    ) -> None:
        """Train to the end of the plan, with a progress bar; from a checkpoint if there is one.

        Args:
            before: held-out figures of the policy at its start, for the trackers.

        Raises:
            Stopped: by a signal or the end of its time; a checkpoint is written.
        """
        self.before = before or {}
        at_rest(self.scorer)  # the optimizer is made for the parts
        start = step_of(checkpoint) if checkpoint else 0
        if was_stopped(checkpoint):  # the plan's rest is not trained on
            self.plan, self.args.max_steps = self.plan[:start], start
        if self.is_world_process_zero():
            self.run.rewind_metrics(checkpoint)
            if checkpoint:
                self.run.saved.drop_older(checkpoint, keep=self.keep_checkpoints)
        if self.patience:
            self.patience.begin(self.run.read_metrics(), start)
        self.logging_steps = logging_steps
        self.seconds_before, self.began = self.run.seconds(), time.monotonic()
        show = self.is_world_process_zero()
        if start and show:
            log.info("goes on from step %d of %d", start, len(self.plan))
        with progress("training", len(self.plan), unit="steps", start=start, show=show) as self.advance:
            with between_steps():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self.pause.check()

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
        last = LastWords.of(summary["samples"], figures, self.state.global_step, self.run.path)
        self.tracking.end(last, self.args, self.state, self.control)

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step; each process reads its own share, so accelerate must not cut it again."""
        world = {"rank": self.args.process_index, "world_size": self.args.world_size}
        own = StepLists(self.lists, self.plan, cost=self.cost, **world)
        return DataLoader(own, batch_size=1, collate_fn=itemgetter(0))

    def training_step(  # type: ignore[override]  # an item is a step's lists, not tensors
        self, model: nn.Module, inputs: list[Example], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of all of a step's micro-batches; returns the step's loss."""
        self.step_began = time.monotonic()
        self.waiting.begin_step()
        model.train()
        averaging(self.optimizer, train=True)
        batches = self.micro_batches(inputs)
        self.loss.begin_step(self.policy, batches, self.accelerator)
        self.baseline = self.mismatched.of_step() if self.loss.needs_baseline else None
        total = torch.zeros((), device=self.args.device)
        cut = agreed_parts(batches, tokens_per_batch=self.tokens_per_batch, accelerator=self.accelerator)
        for number, (examples, parts, passes) in enumerate(cut, start=1):
            last = number == len(cut)
            total += self._run(model, examples, parts, passes, self.policy.penalty() if last else 0.0, last=last)
        self.step_loss = total
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """transformers' own, between the backward pass and the optimizer's step: the last moment to refuse a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad = self.pause.agree(self.bad.is_bad(self.step_loss, norm))
        self.bad.met(bad, self.step_loss, norm)
        return norm

    def _run(
        self,
        model: nn.Module,
        examples: list[Example],
        parts: list[list[int]],
        passes: int,
        penalty: Tensor | float,
        *,
        last: bool,
    ) -> Tensor:
        """Forward and backward of one micro-batch; its share of the step's loss.

        Args:
            parts, passes: of `agreed_parts`.
            last: whether the processes' gradients are put together now.
        """
        if passes > 1:
            parts = [*parts, *[[]] * (passes - len(parts))]
            return self.in_parts.run(model, examples, parts, penalty, last=last)
        batch = self.policy.collate(examples or [self.idle])
        with self.together(model, last):
            with self.compute_loss_context_manager():
                stats = model(batch, self.outputs)
            return self.backward(self.loss_of(batch, stats, examples) + penalty)

    def together(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """In which gradients are put together with the other processes', or are not yet; sharded ones always are,
        since those that wait would be whole on every process."""
        if last or self.sharded:
            return nullcontext()
        return before_the_last() if self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    @cached_property
    def idle(self) -> Example:
        """The smallest list, which a process passes through the model where it has none and others have."""
        smallest = min(range(len(self.lists)), key=self.completion_tokens.__getitem__)
        return self.lists[smallest] | {"key": 0}

    def loss_of(self, batch: ListBatch, stats: Any, examples: Sequence[Example]) -> Tensor:
        """The lists' share of the step's loss; see the class. Without examples the batch is a stand-in of share 0."""
        counts = bool(examples)
        with self.compute_loss_context_manager():
            reference = reference_logprobs(self.scorer, self.policy, batch) if self.loss.needs_reference else None
        scores = self.loss.scores(stats, reference, batch)
        losses = self.loss(stats, reference, batch, self.baseline)
        values = {"loss": losses.detach(), **self.loss.metrics(batch, stats, reference, scores.detach())}
        self.sums.add(values, batch, counts=counts)
        # Gradients are averaged over processes, so each process's sum counts world_size times.
        counted = self.counted(self.plan[self.state.global_step])
        share = self.args.world_size / counted if counts else 0.0
        if counts and self.hooks.on_lists:
            weights = (torch.ones_like(losses) if batch.weights is None else batch.weights) / counted
            seen = (examples, batch, stats, reference, scores, losses, weights)
            self.hooks.tell_lists(self.state.global_step + 1, *seen)
        if batch.weights is None:
            return losses.sum() * share
        return (losses * (batch.weights * share).to(losses.dtype)).sum()

    def counted(self, rows: Sequence[int]) -> float:
        """How many lists these rows count as."""
        return len(rows) if self.weights is None else math.fsum(self.weights[row] for row in rows)

    def backward(self, loss: Tensor) -> Tensor:
        self.accelerator.backward(loss)
        return loss.detach()

    def micro_batches(self, lists: list[Example]) -> list[list[Example]]:
        return agreed_micro_batches(
            lists, tokens_per_batch=self.tokens_per_batch, accelerator=self.accelerator, packed=self.policy.packing
        )

    def compute_loss_context_manager(self) -> Any:
        """transformers' own, in which activations wait on the host where the recipe says so."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self.sharded:  # accelerate puts autocast around every other model's forward
            stack.enter_context(self.accelerator.autocast())
        if self.offload:
            stack.enter_context(OnHost(self.policy.model))
        return stack

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line per optimizer step: the lists' means, and the Trainer's gradient norm and learning rate."""
        if "grad_norm" not in logs:  # the Trainer's own totals at the end
            return
        means = self.sums.means(self.accelerator)
        self.sums = Sums()
        if self.bad.skips:
            self._write({SKIPPED: 1.0, "learning_rate": logs["learning_rate"]})
            self.advance(1)
            return
        self._refuse_divergence("loss", means["loss"])
        if not self.args.fp16:  # whose scaler passes over a step with an infinite gradient
            self._refuse_divergence("gradient's norm", logs["grad_norm"])
        line = {LOG_NAMES.get(name, name): value for name, value in means.items()}
        line |= {name: logs[name] for name in ("grad_norm", "learning_rate")}
        self._write(line | self._rates() | self.waiting.share())
        note = f"loss {means['loss']:.4f}" + (f", ndcg {means['ndcg']:.3f}" if "ndcg" in means else "")
        self.advance(1, note if self.state.global_step % self.logging_steps == 0 else "")
        if self.hooks.on_step and self.is_world_process_zero():
            self.hooks.tell_step(self.state.global_step, len(self.plan), line)

    def _refuse_divergence(self, name: str, value: float) -> None:
        refuse_divergence(name, value, step=self.state.global_step, model=self.policy.model)

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
        with whole_weights(self.scorer) if self.keep_best else nullcontext():
            if self.keep_best and (self.sharded or self.is_world_process_zero()):
                self._keep_if_best(metrics[self.keep_best])
        named = {f"eval_{name}": value for name, value in metrics.items()}
        self._write(named)
        if self.patience and self.patience.is_over(metrics[self.patience.figure]):
            log.info(
                "step %d: ends here, since %s has not become better for %d evaluations",
                *(self.state.global_step, self.patience.figure, self.patience.section.patience),
            )
            self.control.should_training_stop = self.control.should_save = self.ending.asked = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _keep_if_best(self, value: float) -> None:
        earlier = [line[f"eval_{self.keep_best}"] for line in self.run.read_metrics() if "eval_loss" in line]
        better = min if self.keep_best == "loss" else max
        if not earlier or better(value, *earlier) == value != better(earlier):
            main = self.is_world_process_zero()
            with replaced_folder(self.run.best) if main else nullcontext(partial_folder(self.run.best)) as folder:
                self.policy.save_state(folder)
                if main:
                    seal(folder)
        if self.sharded:  # where all have read the metrics before one goes on to write them
            self.accelerator.wait_for_everyone()
