"""The reference's log-probabilities, computed before training and kept as columns of the data sets."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader

from align.trl.micro_batches import Step
from align.trl.reference import ReferenceTrainer


class BeforehandTrainer(ReferenceTrainer):
    """A trainer that `precompute_ref_log_probs` is for."""

    _reference_columns: tuple[str, ...]
    """Columns of the reference's sums, by TRL's names."""

    def _take(self, model: Any, args: Any) -> None:
        super()._take(model, args)
        self.precompute_ref_logps = args.precompute_ref_log_probs

    def _set_reference(self, given: Any, args: Any) -> None:
        super()._set_reference(given, args)
        if self.precompute_ref_logps:
            self.train_dataset = self._with_reference(self.train_dataset, args.per_device_train_batch_size)
            self.eval_dataset = self._each(self.eval_dataset, self._with_reference, args.per_device_eval_batch_size)

    def _prepared_later(self, datasets: Any) -> Any:
        datasets = super()._prepared_later(datasets)
        if not self.precompute_ref_logps:
            return datasets
        started = self.state.global_step > 0 and not isinstance(self.model, PeftModel)
        if started and self.ref_model is None:
            raise ValueError(
                "Cannot compute reference log-probs for a dataset passed to `evaluate()` after training has started: "
                "the start of full fine-tuning was not kept; give this data set to the constructor, or give a "
                "`ref_model`"
            )
        return self._each(datasets, self._with_reference, self.args.per_device_eval_batch_size)

    def _with_reference(self, dataset: Any, batch_size: int) -> Any:
        """The data set with the reference's sums of log-probabilities, unless it has them."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "`precompute_ref_log_probs=True` is not supported with IterableDataset: it needs a data set of known "
                "length"
            )
        if set(self._reference_columns) <= set(dataset.column_names):
            return dataset
        batch_size = self.args.precompute_ref_batch_size or batch_size
        needed = dataset.select_columns([name for name in self._columns if name in dataset.column_names])
        loader = self.accelerator.prepare(DataLoader(needed, batch_size=batch_size, collate_fn=self.data_collator))
        found: list[Tensor] = []
        for inputs in loader:
            with torch.no_grad(), self.compute_loss_context_manager():
                values = torch.stack(self._reference_sums(self._prepare_inputs(inputs)), dim=1)
            found.append(self.accelerator.gather_for_metrics(values).cpu())
        for place, name in enumerate(self._reference_columns):
            dataset = dataset.add_column(name, torch.cat(found)[:, place].tolist())
        return dataset

    def _reference_sums(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """[B] of each column, for the rows of a data set that a collator gave."""
        raise NotImplementedError

    def _sums_of_rows(self, step: Step) -> Tensor:
        """[R] sums under the reference."""
        for lists in self._agreed(self._passes(step)):
            batch = self.engine.collate(lists or step.micros[0].lists[:1], self.args.device)
            values = self._reference_stats(batch)
            if lists:
                numbers = self._numbers(lists)
                step.keep(numbers, {"ref": (values * self._token_weights(numbers, values, step)).sum(dim=1)})
        return step.table["ref"]

    def _token_weights(self, rows: Tensor, values: Tensor, step: Step) -> Tensor:
        """What a row's tokens count, as [N, C] or one number."""
        return values.new_ones(())
