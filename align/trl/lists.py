"""DPOTrainer on ranked lists: rows, objectives, token rewards, adapters and references as a recipe says them."""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn

from align.data import in_one_line
from align.data.steps import micro_batches
from align.errors import UserError
from align.losses.metrics import LOG_NAMES, Sums
from align.model.adapters import Full
from align.model.attach import attach_adapter
from align.model.config import ContrastSection
from align.model.load import LoadOptions
from align.model.moving import MOVING, MovingReference
from align.model.token_rewards import contrast_rewards, with_token_column
from align.model.value_cache import Found, Values, list_key
from align.packing.batch import Example, learnt_counts
from align.recipe import Recipe
from align.runs.build import check_objectives, policy_loss, prepare
from align.trl import start
from align.trl.extra import extra
from align.trl.list_recipe import recipe_of
from align.trl.micro_batches import MicroBatch, Step, passes
from align.trl.moving import FollowPolicy
from align.trl.reference import ReferenceTrainer
from align.trl.trainer import TOKENS

log = logging.getLogger("align")


class ListTrainer(ReferenceTrainer):
    """What comes before DPOTrainer where its configuration's `align` has an objective."""

    def _check(self, args: Any) -> None:
        self.recipe: Recipe = recipe_of(args)
        self.list_loss: Any = policy_loss(self.recipe)
        if self.list_loss.needs_baseline:
            raise UserError("align.objective: kto measures from a baseline of a whole step; use KTOTrainer")
        if not isinstance(self.recipe.token_rewards, ContrastSection):
            raise UserError("align.token_rewards: only the contrast of one model here; `align train` takes another's")

    def _adapted(self, model: Any, peft_config: Any, args: Any) -> Any:
        adapter = self.recipe.policy.adapter
        if "adapter" not in extra(args) or isinstance(adapter, Full):
            return super()._adapted(model, peft_config, args)
        if peft_config is not None or isinstance(model, PeftModel):
            raise UserError("align.adapter: there is an adapter already; leave `peft_config` or `align.adapter` out")
        if adapter.reads_rows() or adapter.needs_steps:
            raise UserError(f"align.adapter: {adapter.name} has to see the rows or the steps first; use `align train`")
        adapter.check_quantization("4bit" if start.is_quantized(model) else None)
        torch.manual_seed(args.seed)
        options = LoadOptions(seed=args.seed, device=model.device)
        folder = Path(model.config._name_or_path)
        return start.with_adapter(
            attach_adapter(model, adapter, self.recipe.policy, options, folder=folder), None, args, keeps_start=False
        )

    def _take(self, model: Any, args: Any) -> None:
        super()._take(model, args)
        self.beta = self.list_loss.terms[0].beta
        self._outputs = tuple(dict.fromkeys(["logprob", "entropy", *self.list_loss.outputs]))

    def _needs_reference(self, args: Any) -> bool:
        return self.list_loss.needs_reference or self.recipe.needs_token_rewards

    # Data.

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenised lists of rows in any of the forms that `align train` reads."""
        if isinstance(dataset, IterableDataset):
            raise UserError(f"{dataset_name}: a stream; lists are read whole, so give a datasets.Dataset")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{dataset_name}.jsonl"
            with file.open("w", encoding="utf-8") as out:
                for row in dataset:
                    out.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
            source = {"sources": [{"path": str(file)}]}
            section = type(self.recipe.data).model_validate(self.recipe.data.model_dump(mode="json") | source)
            own = self.recipe.model_copy(update={"data": section})
            try:
                prepared = prepare(own, tokenizer=self._tokenizer)
                check_objectives(own, prepared)
            except UserError as error:
                raise UserError(str(error).replace(f"{folder}/", "")) from None
        say = log.info if len(prepared.train) == len(dataset) else log.warning
        say("%s: %s", dataset_name, in_one_line(prepared.audit))
        return prepared.train

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        return _as_they_are

    def _set_reference(self, given: Any, args: Any) -> None:
        super()._set_reference(given, args)
        section = self.recipe.reference
        self._moving = None
        if section.name == "moving":
            self._moving = MovingReference(self.model, self.ref_model, every=section.every, mixture=section.mixture)
            self.add_callback(FollowPolicy(self._moving))
        if self.recipe.needs_token_rewards:
            self.train_dataset = self._with_token_rewards(self.train_dataset)
            self.eval_dataset = self._each(self.eval_dataset, self._with_token_rewards)

    def _prepared_later(self, datasets: Any) -> Any:
        datasets = self._prepared(datasets, "eval")
        return self._each(datasets, self._with_token_rewards) if self.recipe.needs_token_rewards else datasets

    def _with_token_rewards(self, lists: Dataset) -> Dataset:
        values = contrast_rewards(lists, self._read_lists)
        kept = [name for name in lists.column_names if name not in ("better_ids", "worse_ids")]
        return with_token_column(lists.select_columns(kept), "token_rewards", values)

    @torch.no_grad()
    def _read_lists(self, lists: Dataset, **_: Any) -> Found:
        """The reference's log-probabilities of learnt tokens, by a list's key."""
        found: Values = {}
        for examples in micro_batches(list(lists), tokens_per_batch=self.tokens_per_pass or TOKENS):
            batch = self.engine.collate(examples, self.args.device)
            with self.compute_loss_context_manager():
                values = self._reference_stats(batch)
            for place, e in enumerate(examples):
                own = (batch.list_index == place)[:, None] & batch.completion_mask
                key = list_key(e["prompt_ids"], e["completion_ids"], e.get("learn_at"))
                found[key] = values[own].float().cpu().numpy()
        return {"logprobs": found}

    # The step.

    def _micro_batch(self, inputs: Mapping[str, Any], first: int) -> MicroBatch:
        lists, row = [], first
        for example in inputs["lists"].examples:
            count = len(example["completion_ids"])
            lists.append(example | {"rows": [*range(row, row + count)]})
            row += count
        return MicroBatch(inputs, lists, first, torch.tensor([n for e in lists for n in learnt_counts(e)]))

    def _passes(self, step: Step) -> list[list[Example]]:
        return passes(self._all_units(step), self.tokens_per_pass or TOKENS)

    def _before(self, model: nn.Module, step: Step) -> None:
        """How many lists count in the step, over all processes; of an evaluation batch, in this one."""
        self._sums = Sums()
        every = [e.get("loss_weight", 1.0) for micro in step.micros for e in micro.lists]
        total: Any = torch.tensor(sum(every), device=self.args.device, dtype=torch.float64)
        if self.model.training:
            total = self.accelerator.reduce(total, reduction="sum") / self.args.world_size
        self._total = float(total)

    def _loss_of(self, model: nn.Module, lists: list[Example], step: Step) -> Tensor:
        """These lists' part of the step's mean over lists, times the micro-batches that the step is divided by."""
        batch, stats = self._stats(model, lists or [self.train_dataset[0] | {"rows": [-1]}], step)
        reference = self._reference_stats(batch) if self.list_loss.needs_reference else None
        losses = self.list_loss(stats, reference, batch)
        scores = self.list_loss.scores(stats, reference, batch).detach()
        self._sums.add(self.list_loss.metrics(batch, stats, reference, scores), batch, counts=bool(lists))
        losses = losses if batch.weights is None else losses * batch.weights.to(losses.dtype)
        mean = losses.sum() * (len(step.micros) / self._total) * bool(lists)
        here = {row for example in lists for row in example["rows"]}
        balances = [self._balance_of(step, micro) for micro in step.micros if micro.rows.start in here]
        return mean + self.router_aux_loss_coef * sum(balances)

    def _note(self, mode: str, step: Step) -> None:
        for name, value in self._sums.means(self.accelerator).items():
            self._metrics[mode][LOG_NAMES.get(name, name)].append(value)
        self._note_balance(mode, step)

    def _reference_stats(self, batch: Any) -> Tensor:
        if self._moving is not None and self._moving.moved and self.ref_model is None:
            with self.engine.start(MOVING):
                return self.engine.score(self.model, batch, ("logprob",)).logprobs
        return super()._reference_stats(batch)

    # Checkpoints: a reference that has moved is in a file of its own, not among the adapters.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        adapters = getattr(self.model, "peft_config", {})
        moved = adapters.pop(MOVING, None)
        super()._save(output_dir, state_dict)
        if moved is not None:
            adapters[MOVING] = moved

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._moving is not None and self.args.should_save:
            self._moving.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._moving is not None:
            self._moving.load(Path(resume_from_checkpoint))


class Lists:
    """A micro-batch's lists, which accelerate and transformers pass on as they are."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples


def _as_they_are(examples: list[Example]) -> dict[str, Lists]:
    return {"lists": Lists(examples)}
