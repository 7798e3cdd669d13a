"""AlignTrainer: a step's lists -> token log-probs -> scores -> one mean of the objective -> one optimizer step."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from align.data.steps import StepLists, agreed_micro_batches, agreed_parts, part_of_list
from align.data.windows import completion_tokens
from align.errors import UserError
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
from align.training.bad_step import SKIPPED, BadSteps
from align.training.balance import Waiting, step_cost
from align.training.given import Given, own_optimizer, own_schedule, restore_callbacks
from align.training.last_words import LastWords
from align.training.pause import Pause
from align.training.processes import check_sharding
from align.training.sharded import PARTS, load_optimizer, save_optimizer, set_rates
from align.training.stopping import STOPPED, Ending, Patience, was_stopped
from align.training.tracking import Tracking
from align.training.zero import before_the_last, check_world, check_zero, keep_head_whole, whole_weights
from align.types import ListBatch, TokenStats
from rewards.broken import REMEDY, broken_weights

log = logging.getLogger("align")

OUTPUTS = ("logprob", "entropy")
MISMATCHED = ("completion_ids", "learn_at", "token_weights")
"""What a completion takes along behind another prompt."""
Stats = TokenStats | Tensor
"""What a model says: a policy of every token, a reward model its rewards [N, A]."""


class AlignTrainer(Trainer):
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
        self.add_callback(_AfterStep(policy))
        self.add_callback(_AtTheStart(self))
        self.tracking = Tracking(self.callback_handler.callbacks, args.project)
        self.pause = Pause(self)
        self.ending = Ending(self.pause, told=bool(given.callbacks))
        for own in (*given.callbacks, self.ending, self.pause):
            self.add_callback(own)
        if self.is_deepspeed_enabled:
            check_zero(policy, loss, stage=self.accelerator.state.deepspeed_plugin.zero_stage)
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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The caller's own optimizer, or transformers'."""
        if self.given.optimizer and self.optimizer is None:
            self.optimizer = own_optimizer(self.given.optimizer, self.scorer)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The caller's own schedule, or transformers'."""
        if self.given.schedule and self.lr_scheduler is None:
            self.lr_scheduler = own_schedule(self.given.schedule, self.optimizer, len(self.plan))
        return super().create_scheduler(num_training_steps, optimizer)

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
        batches = self._micro_batches(inputs)
        self.loss.begin_step(self.policy, batches, self.accelerator)
        self.baseline = self._baseline() if self.loss.needs_baseline else None
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
            return self._run_in_parts(model, examples, [*parts, *[[]] * (passes - len(parts))], penalty, last=last)
        batch = self.policy.collate(examples or [self._idle])
        with self._together(model, last):
            with self.compute_loss_context_manager():
                stats = model(batch, self.outputs)
            return self._backward(self._loss_of(batch, stats, examples) + penalty)

    def _together(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """In which gradients are put together with the other processes', or are not yet; sharded ones always are,
        since those that wait would be whole on every process."""
        if last or self.sharded:
            return nullcontext()
        return before_the_last() if self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    @cached_property
    def _idle(self) -> Example:
        """The smallest list, which a process passes through the model where it has none and others have."""
        smallest = min(range(len(self.lists)), key=self.completion_tokens.__getitem__)
        return self.lists[smallest] | {"key": 0}

    def _run_in_parts(
        self, model: nn.Module, examples: list[Example], parts: list[list[int]], penalty: Tensor | float, *, last: bool
    ) -> Tensor:
        """A list larger than a forward pass may be: its loss is taken over all of it, its backward pass by parts.

        A first pass without activations gives every token's log-probability (a reward model's rewards) and so the loss
        and its gradient there; a second one carries that gradient through the model, one part at a time. Of a batch
        that another process's list has made several passes, the first part is all and the rest are empty.
        """
        whole = self.policy.collate(examples or [self._idle])
        batches = [self._part(examples, places) for places in parts]
        with torch.no_grad(), self.compute_loss_context_manager():
            found = [model(batch, self.outputs) for batch in batches]
        stats = _joined(whole, parts, found)
        if self.loss.needs_reference:  # in the same parts, so that before the first step it is the policy bit for bit
            whole = replace(whole, reference_logprobs=self._reference_in_parts(whole, parts, batches))
        leaf = _trained_on(stats).requires_grad_()
        loss = self._loss_of(whole, stats, examples)
        (gradient,) = torch.autograd.grad(loss, leaf)
        for number, (batch, places) in enumerate(zip(batches, parts, strict=True), start=1):
            with self._together(model, last and number == len(batches)):
                with self.compute_loss_context_manager():
                    values = _trained_on(model(batch))
                carried = gradient[places, : values.shape[1]] if places else torch.zeros_like(values)
                self._backward((values * carried).sum() + penalty)
            penalty = 0.0
        return loss.detach()

    def _part(self, examples: list[Example], places: list[int]) -> ListBatch:
        """Some completions of a list, all of a batch of several, or the least that goes through the model."""
        if not places or not examples:
            return self.policy.collate([part_of_list(self._idle, [0])])
        return self.policy.collate(examples if len(examples) > 1 else [part_of_list(examples[0], places)])

    def _reference_in_parts(self, whole: ListBatch, parts: list[list[int]], batches: list[ListBatch]) -> Tensor:
        with self.compute_loss_context_manager():
            found = [reference_logprobs(self.scorer, self.policy, batch) for batch in batches]
        return _join(whole, parts, found, whole.targets.shape[1])

    def _loss_of(self, batch: ListBatch, stats: Any, examples: Sequence[Example]) -> Tensor:
        """The lists' share of the step's loss; see the class. Without examples the batch is a stand-in of share 0."""
        counts = bool(examples)
        with self.compute_loss_context_manager():
            reference = reference_logprobs(self.scorer, self.policy, batch) if self.loss.needs_reference else None
        scores = self.loss.scores(stats, reference, batch)
        losses = self.loss(stats, reference, batch, self.baseline)
        values = {"loss": losses.detach(), **self.loss.metrics(batch, stats, reference, scores.detach())}
        self.sums.add(values, batch, counts=counts)
        # Gradients are averaged over processes, so each process's sum counts world_size times.
        counted = self._counted(self.plan[self.state.global_step])
        share = self.args.world_size / counted if counts else 0.0
        if counts and self.hooks.on_lists:
            weights = (torch.ones_like(losses) if batch.weights is None else batch.weights) / counted
            seen = (examples, batch, stats, reference, scores, losses, weights)
            self.hooks.tell_lists(self.state.global_step + 1, *seen)
        if batch.weights is None:
            return losses.sum() * share
        return (losses * (batch.weights * share).to(losses.dtype)).sum()

    def _counted(self, rows: Sequence[int]) -> float:
        """How many lists these rows count as."""
        return len(rows) if self.weights is None else math.fsum(self.weights[row] for row in rows)

    def _backward(self, loss: Tensor) -> Tensor:
        self.accelerator.backward(loss)
        return loss.detach()

    def _micro_batches(self, lists: list[Example]) -> list[list[Example]]:
        return agreed_micro_batches(
            lists, tokens_per_batch=self.tokens_per_batch, accelerator=self.accelerator, packed=self.policy.packing
        )

    def _baseline(self) -> Tensor:
        """KTO's estimate of the policy's divergence from the reference, in nats, at least 0.

        The mean log-ratio of every prompt of the whole step with the completion of the next row that is another: it
        does not depend on how the step is cut (TRL takes it per micro-batch), and weight 2 is the row twice.
        """
        rows = self.plan[self.state.global_step]
        places = range(self.args.process_index, len(rows), self.args.world_size)
        total = torch.zeros((), device=self.args.device)
        for examples in self._micro_batches([self._mismatched(rows, place) for place in places]):
            total += self._log_ratio(examples or [self._mismatched(rows, 0)]) * bool(examples)
        return (self.accelerator.reduce(total, reduction="sum") / self._counted(rows)).clamp(min=0)

    def _mismatched(self, rows: Sequence[int], place: int) -> Example:
        own, others = self.lists[rows[place]], [*rows[place + 1 :], *rows[:place]]
        other = next((one for one in map(self.lists.__getitem__, others) if not _is_same(one, own)), own)
        first = {name: other[name][:1] for name in MISMATCHED if name in other}
        counted = {} if self.weights is None else {"loss_weight": self.weights[rows[place]]}
        return {"prompt_ids": own["prompt_ids"], "grades": [0.0]} | first | counted

    @torch.no_grad()
    def _log_ratio(self, examples: list[Example]) -> Tensor:
        """Sum over the examples of the log-ratio of policy and reference, as often as each counts."""
        batch = self.policy.collate(examples)
        with self.compute_loss_context_manager():
            ratio = self.scorer(batch).logprobs - reference_logprobs(self.scorer, self.policy, batch)
        weights = self.loss.message_weights(batch)
        ratio = ratio if weights is None else ratio * weights
        ratio = ratio.where(batch.completion_mask, 0.0)
        return ratio.sum() if batch.weights is None else (ratio.sum(dim=1) * batch.weights).sum().to(ratio.dtype)

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
        if not math.isfinite(value):
            broken, step = broken_weights(self.policy.model), self.state.global_step
            remedy = (
                "lower train.learning_rate, or set" if step else f"before any step: {broken and REMEDY + ', or '}set"
            )
            raise UserError(
                f"step {step}: the {name} is {value}; {broken + '; ' if broken else ''}{remedy} "
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Seal the checkpoint once every process has written its part: a kill leaves an older one to go on from."""
        if self.args.should_save:
            checkpoint = self.run.saved.begin(self.state.global_step)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.ending.asked and self.state.global_step < len(self.plan):
                (checkpoint / STOPPED).touch()
            self.run.saved.end(checkpoint, keep=self.keep_checkpoints)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What training changed, for going on; sharded weights are gathered one by one, or all together under ZeRO-3,
        which takes every process."""
        with whole_weights(self.scorer):
            if self.sharded or self.args.should_save:
                self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.optimizer, self.scorer, Path(output_dir))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and self.is_deepspeed_enabled:
            check_world(Path(checkpoint), self.args.world_size)
        if checkpoint is None or not (self.sharded or (Path(checkpoint) / PARTS).is_dir()):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.optimizer, self.scorer, Path(checkpoint))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        set_rates(self.optimizer, scheduler)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.policy.save_state(Path(output_dir or self.run.checkpoints))

    def _load_callback_state(self) -> None:
        restore_callbacks(self.given.callbacks, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_state(Path(resume_from_checkpoint))
        self.policy.load_moved(Path(resume_from_checkpoint))


class _AfterStep(TrainerCallback):
    """Lets the adapter act between the optimizer's step and the gradients' end (AdaLoRA moves its ranks there)."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.policy.after_step(state.global_step + 1)


class _AtTheStart(TrainerCallback):
    """Tells trackers, once they are open, the held-out figures from before the first step; a resumed run did so.

    Under DeepSpeed the weights have been cut by now.
    """

    def __init__(self, trainer: AlignTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            keep_head_whole(self.trainer.deepspeed, self.trainer.policy)
        self.trainer.tracking.begin(getattr(args, "recipe_values", {}))
        if state.global_step == 0 and self.trainer.before:
            self.trainer.track_heldout(self.trainer.before)


def _is_same(a: Example, b: Example) -> bool:
    """Whether two rows have the same prompt and first completion, as a row that a step has twice."""
    return a["prompt_ids"] == b["prompt_ids"] and a["completion_ids"][:1] == b["completion_ids"][:1]


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
    for places, own in filter(itemgetter(0), zip(parts, values, strict=True)):
        joined[places, : own.shape[1]] = own
    return joined
