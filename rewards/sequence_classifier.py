"""A scorer that reads one output, or a weighted sum of outputs, of a sequence classifier."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.packing.unpadded import enable_unpadding
from rewards.backbone import Backbone, batches_by_length, right_padded
from rewards.loading import (
    ADAPTER_CONFIG,
    context,
    folder_of,
    load_model,
    load_tokenizer,
    named_tensor,
    with_adapters,
)
from rewards.texts import cut, joint_ids, text_key
from rewards.types import RunningOptions, ScorerError, Tally, Text

logger = logging.getLogger(__name__)

OTHER_HEADS = ("v_head.summary", "v_head", "value_head", "reward_head", "rm_head", "regression_layer")
"""What reward models call their last linear layer where it is not transformers' `score`."""


class SequenceClassifierScorer:
    """Rewards by a sequence classifier's outputs; see `SequenceClassifier` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        label: int | str | None,
        weights: Mapping[str, float] | None,
        **running: Unpack[RunningOptions],
    ) -> None:
        folder = folder_of(model, revision)
        self.model = _load(folder, running["dtype"], running["device"])
        self.tokenizer = load_tokenizer(folder)
        self.outputs = _outputs(self.model, label, weights, model)
        self.pad_id: int | None = self.model.config.get_text_config().pad_token_id
        self.max_length = context(self.model, self.tokenizer, running["max_length"])
        self.tokens_per_batch, self.exact = running["tokens_per_batch"], running["exact"]
        self.tally = Tally()
        self.backbone: Backbone | None = None
        if isinstance(getattr(self.model, "score", None), nn.Linear):
            self.backbone = Backbone(
                cast(PreTrainedModel, self.model.base_model),
                name=model,
                tokens_per_batch=self.tokens_per_batch,
                exact=self.exact,
            )
        elif not self.exact:
            enable_unpadding(cast(PreTrainedModel, self.model.base_model), name=model)

    @torch.no_grad()
    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """The classifier's output for each prompt with its completion, a logit (no sigmoid).

        Text is scored as prompt and completion joined without anything between; messages go through the chat
        template, and a text beside messages counts as a user's prompt or an assistant's completion. What completions
        of one prompt share at their beginning is computed once, where the model is a decoder.

        Args:
            prompts: The prompt of each completion.
            completions: As many as prompts.

        Returns:
            Rewards in order. The output is read at a text's last token that is not the model's padding token, as
            transformers reads it from a single unpadded text; [] for no completions.

        Raises:
            RowError: Messages are given, but the tokenizer has no chat template; or a text has no tokens.

        Source: ours
        """
        whole = joint_ids(prompts, completions, self.tokenizer)
        rows = [cut(row, self.max_length) for row in whole]
        self.tally.completions += len(rows)
        if long := self.tally.read(whole, rows):
            logger.warning("%d of %d texts are cut to max_length=%d tokens", long, len(rows), self.max_length)
        logits = torch.zeros(len(rows), cast(int, self.model.config.num_labels))
        if self.backbone is not None:
            self._decode(self.backbone, rows, [text_key(prompt) for prompt in prompts], logits)
        else:
            self._encode(rows, logits)
        chosen = logits[:, list(self.outputs)].double()
        return (chosen @ torch.tensor(list(self.outputs.values())).double()).tolist()

    def _decode(
        self, backbone: Backbone, rows: list[list[int]], groups: list[str], logits: Float[Tensor, "N A"]
    ) -> None:
        head: Any = self.model.score
        bias = None if head.bias is None else head.bias.float()
        for members, hidden in backbone.states(rows, groups, [[_last(row, self.pad_id)] for row in rows]):
            logits[members] = F.linear(hidden.float(), head.weight.float(), bias).cpu()

    def _encode(self, rows: list[list[int]], logits: Float[Tensor, "N A"]) -> None:
        for batch in batches_by_length(rows, self.tokens_per_batch, exact=self.exact):
            logits[batch] = self._forward([rows[i] for i in batch]).float().cpu()

    def _forward(self, rows: list[list[int]]) -> Float[Tensor, "N A"]:
        # transformers finds a row's last token by the padding id; without one, no row may end in the id used instead.
        pad = self.pad_id if self.pad_id is not None else _free_id(rows)
        self.model.config.get_text_config().pad_token_id = pad
        ids, mask = right_padded(rows, pad, self.model.device)
        return self.model(input_ids=ids, attention_mask=mask).logits


def _load(folder: Path, dtype: str, device: str | None) -> PreTrainedModel:
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapted(folder, dtype, device)
    other = _other_head(folder)
    weight = named_tensor(folder, f"{other}.weight") if other else None
    size = {} if weight is None else {"num_labels": len(weight)}
    model, report = load_model(AutoModelForSequenceClassification, folder, dtype=dtype, device=device, **size)
    missing = set(report["missing_keys"])
    if missing == {"score.weight"} and weight is not None:
        _set_head(model, weight, named_tensor(folder, f"{other}.bias"))
        missing = set()
    if missing:
        names = ", ".join(sorted(missing))
        raise ScorerError(f"{folder}: holds no trained reward head (its weights lack {names}); give a reward model")
    return model


def _load_adapted(folder: Path, dtype: str, device: str | None) -> PreTrainedModel:
    """A base model with an adapter and a head saved beside it (PEFT's `modules_to_save`), merged."""
    base = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    if not base:
        raise ScorerError(f"{folder / ADAPTER_CONFIG}: names no base model; give `base_model_name_or_path` there")
    head = named_tensor(folder, "base_model.model.score.weight")
    if head is None:
        raise ScorerError(f"{folder}: the adapter holds no reward head (base_model.model.score.weight); give another")
    model, _ = load_model(
        AutoModelForSequenceClassification, folder_of(base), dtype=dtype, device=device, num_labels=len(head)
    )
    merged: Any = with_adapters(model, {"reward": str(folder)}).merge_and_unload()
    return merged


def _other_head(folder: Path) -> str | None:
    """The name of a head that transformers does not look for."""
    if named_tensor(folder, "score.weight") is not None:
        return None
    return next((name for name in OTHER_HEADS if named_tensor(folder, f"{name}.weight") is not None), None)


def _set_head(model: Any, weight: Tensor, bias: Tensor | None) -> None:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight.data = weight
    if bias is not None:
        head.bias.data = bias
    model.score = head.to(device=model.device, dtype=model.dtype).requires_grad_(False)


def _outputs(
    model: PreTrainedModel, label: int | str | None, weights: Mapping[str, float] | None, name: str
) -> dict[int, float]:
    """Output number -> weight."""
    names = {str(name): int(index) for index, name in (model.config.id2label or {}).items()}
    if weights is not None:
        return {_index(names, key, name): weight for key, weight in weights.items()}
    if label is None and len(names) == 1:
        return {0: 1.0}
    return {_index(names, label, name): 1.0}


def _index(names: Mapping[str, int], label: int | str | None, model: str) -> int:
    index = names.get(label, int(label) if label.isdigit() else None) if isinstance(label, str) else label
    if index is None or index >= len(names):
        known = ", ".join(names)
        raise ScorerError(f"{model}: no output {label!r}; set `label` or `weights` to some of {known}, or to numbers")
    return index


def _last(row: list[int], pad_id: int | None) -> int:
    """Where transformers reads a single unpadded text: its last token that is not padding, else the first."""
    return next((i for i in reversed(range(len(row))) if row[i] != pad_id), 0)


def _free_id(rows: list[list[int]]) -> int:
    ends = {row[-1] for row in rows}
    return next(i for i in count() if i not in ends)
