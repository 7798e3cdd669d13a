"""The trainers' common part: a transformers.Trainer that takes an optimizer step's micro-batches in packed passes."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from align.data.steps import packed_size
from align.model.forward import logprobs
from align.packing.batch import Example
from align.trl.built import BuiltTrainer
from align.trl.engine import Engine
from align.trl.experts import Balance
from align.trl.extra import extra
from align.trl.micro_batches import MicroBatch, Step, passes
from align.trl.overrides import class_name, overrides_compute_loss
from align.types import ListBatch, TokenStats

log = logging.getLogger("align")

TOKENS = 4096
"""Of a pass at most, unless a micro-batch was meant to be smaller; `align={"tokens_per_batch": ...}` says otherwise."""
LOOKED_AT = ("logprob", "entropy", "mean_logit", "is_top")
"""What a pass says of tokens, for the metrics too."""


class PackedTrainer(BuiltTrainer):
    """Stashes the micro-batches of an optimizer step and takes them together, in as few packed passes as they need.

    Losses, gradients and logs are those of TRL's trainer of the same name, which takes the micro-batches one by one:
    the loss of each is a mean over it, and the step's the mean over them.
    """

    _read: Any = staticmethod(logprobs)
    _outputs: tuple[str, ...] = LOOKED_AT
    _counts_tokens = True
    """Whether the log says how many tokens were seen."""
    _whole = False
    """Whether a loss needs all of a micro-batch in one pass."""
    balance: Balance | None = None
    router_aux_loss_coef = 0.0

    def _ready(self) -> None:
        """What comes once transformers' trainer stands."""
        super()._ready()
        self.tokens_per_pass = extra(self.args).get("tokens_per_batch")
        self.engine = Engine(self.model, trainer=class_name(type(self)), read=self._read)
        if self.router_aux_loss_coef:
            self.balance = Balance(self.model, trainer=class_name(type(self)))
            self._outputs, self._whole = (*self._outputs, "router_logits"), True
        self._stash: list[dict[str, Any]] = []
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0
        self.add_callback(_LastLayerKept(self.engine))
        self._one_by_one = overrides_compute_loss(type(self))
        if self._one_by_one:
            log.info("%s has a compute_loss of its own: micro-batches are taken one by one", type(self).__name__)

    # What a trainer says of its own.

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        """A collator's batch as lists."""
        raise NotImplementedError

    def _scored(self, model: nn.Module, lists: list[Example], step: Step) -> dict[str, Tensor]:
        """Of the lists' rows, in their order: what the loss and the metrics need; passes through the model."""
        raise NotImplementedError

    def _row_sums(self, stats: TokenStats, weights: Tensor) -> dict[str, Tensor]:
        """Rows' sums of what a pass says of tokens; `weights` of the log-probabilities."""
        found = {"logp": (stats.logprobs * weights).sum(dim=1), "logp_sum": stats.logprobs.sum(dim=1)}
        for name, values in (("entropy", stats.entropy), ("logit", stats.mean_logit), ("top", stats.is_top)):
            if values is not None:
                found[name] = values.detach().sum(dim=1)
        return found

    def _loss(self, micro: MicroBatch, rows: Tensor, values: dict[str, Tensor]) -> Tensor:
        """The part of a micro-batch's loss that comes from some of its rows.

        Args:
            rows: their numbers in the step.
            values: of these rows.
        """
        raise NotImplementedError

    def _figures(self, micro: MicroBatch, table: dict[str, Tensor]) -> dict[str, float]:
        """A micro-batch's line of metrics, from all of its rows' values."""
        raise NotImplementedError

    def _units(self, micro: MicroBatch) -> list[list[Example]]:
        """Lists that a loss needs in one pass."""
        return [[example] for example in micro.lists]

    def _before(self, model: nn.Module, step: Step) -> None:
        """What a loss needs of all of a micro-batch before its first pass."""

    # The step.

    def _numbers(self, lists: list[Example]) -> Tensor:
        return torch.tensor([row for example in lists for row in example["rows"]], device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._stash = []
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Nothing until a step's last micro-batch, then all of the step; its loss."""
        if self._one_by_one:
            return super().training_step(model, inputs, num_items_in_batch)
        self._stash.append(inputs)
        if len(self._stash) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        stash, self._stash = self._stash, []
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        return self._run_step(model, [self._prepare_inputs(inputs) for inputs in stash])

    def _run_step(self, model: nn.Module, stash: list[Any]) -> Tensor:
        step = self._step(stash)
        self._before(model, step)
        total = torch.zeros((), device=self.args.device)
        batches = self._agreed(self._passes(step))
        for place, lists in enumerate(batches):
            last = place == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._loss_of(model, lists, step) / len(stash)
                self.accelerator.backward(loss, **self._of_backward())
            total += loss.detach()
        self._note("train", step)
        return total

    def _of_backward(self) -> dict[str, Any]:
        return {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

    def _step(self, stash: Sequence[Any]) -> Step:
        micros: list[MicroBatch] = []
        for inputs in stash:
            micros.append(self._micro_batch(inputs, micros[-1].rows.stop if micros else 0))
        return Step(micros, self.args.device)

    def _passes(self, step: Step) -> list[list[Example]]:
        units = self._all_units(step)
        as_given = max(micro.inputs["input_ids"].numel() for micro in step.micros)
        return passes(units, self.tokens_per_pass or min(as_given, max(TOKENS, _largest(units))))

    def _all_units(self, step: Step) -> list[list[Example]]:
        units = [[micro.lists] if self._whole else self._units(micro) for micro in step.micros]
        return [unit for own in units for unit in own if unit]

    def _agreed(self, batches: list[list[Example]]) -> list[list[Example]]:
        """As many passes on every process; empty ones where a process has fewer."""
        count = torch.tensor([max(1, len(batches))], device=self.args.device)
        wanted = int(self.accelerator.gather(count).max())
        return batches + [[] for _ in range(wanted - len(batches))]

    def _loss_of(self, model: nn.Module, lists: list[Example], step: Step) -> Tensor:
        """The sum over micro-batches of what these lists add to each one's loss."""
        counts = bool(lists)
        lists = lists or [_nothing()]
        values = self._scored(model, lists, step)
        if not counts:
            return torch.stack([value.sum() for value in values.values() if value.requires_grad]).sum() * 0.0
        rows = self._numbers(lists)
        step.keep(rows, values)
        total: Any = 0.0
        for micro in step.micros:
            own = (rows >= micro.rows.start) & (rows < micro.rows.stop)
            if own.any():
                total = total + self._loss(micro, rows[own], {name: v[own] for name, v in values.items()})
                total = total + self.router_aux_loss_coef * self._balance_of(step, micro)
        return total

    def _stats(self, model: nn.Module, lists: list[Example], step: Step) -> tuple[ListBatch, TokenStats]:
        """Lists as the model reads them, and what it says of their tokens; of experts their balance is kept."""
        batch = self.engine.collate(lists, self.args.device)
        stats = self.engine.score(model, batch, self._outputs)
        if self.balance:
            self.balance.keep(step, batch, lists, stats.router_logits)
        return batch, stats

    def _balance_of(self, step: Step, micro: MicroBatch) -> Tensor:
        """The load-balancing loss of a micro-batch; 0 of one without a learnt token, or of a model without experts."""
        return step.balance.get(micro.first, torch.zeros((), device=self.args.device))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's loss, with its graph; the packed step does not come by here."""
        step = self._step([inputs])
        self._before(model, step)
        loss = sum(self._loss_of(model, lists, step) for lists in self._agreed(self._passes(step)))
        self._note("train" if self.model.training else "eval", step)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of one batch; logits are made for compute_metrics alone, by a pass of their own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, inputs["input_ids"]

    # Metrics.

    def _note(self, mode: str, step: Step) -> None:
        for micro in step.micros:
            if mode == "train" and self._counts_tokens:
                seen = micro.inputs["attention_mask"].sum()
                self._total_train_tokens += int(self.accelerator.gather(seen).sum())
            table = {name: values[micro.rows] for name, values in step.table.items()}
            for name, value in self._figures(micro, table).items():
                self._metrics[mode][name].append(value)
            if self._counts_tokens:
                self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _ratio(self, top: Tensor, bottom: Tensor | float) -> float:
        """A quotient of sums over all processes; 0 where there is nothing."""
        both = torch.stack([top.double().reshape(()), torch.as_tensor(bottom, device=top.device).double().reshape(())])
        total = self.accelerator.gather(both[None]).sum(dim=0)
        return float(total[0] / total[1]) if total[1] > 0 else 0.0

    def _mean(self, values: Tensor) -> float:
        return self._ratio(values.sum(), float(values.numel()))

    def _mode(self, logs: Mapping[str, float]) -> str:
        """Which metrics go with a line of the log."""
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the metrics' means since the last line, under TRL's names."""
        mode = self._mode(logs)
        means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items()}
        logs.update({f"eval_{name}": value for name, value in means.items()} if mode == "eval" else means)
        self._metrics[mode].clear()
        super().log(logs, start_time)


class _LastLayerKept(TrainerCallback):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.gradient_checkpointing:  # transformers has switched it on for every layer
            self.engine.checkpoint_all_but_last()


def _largest(units: list[list[Example]]) -> int:
    return max((sum(map(packed_size, unit)) for unit in units), default=0)


def _nothing() -> Example:
    """A list for a process that has none left, so that it takes part in a pass of the others."""
    return {
        "prompt_ids": [0],
        "completion_ids": [[0], [0]],
        "learn_at": [[0], [0]],
        "grades": [0.0] * 2,
        "rows": [-1, -1],
    }
