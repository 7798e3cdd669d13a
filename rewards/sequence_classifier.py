"""A scorer that reads one output of a transformers sequence classifier."""

import logging
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rewards.types import Messages, ScorerError, Strict, Text

logger = logging.getLogger(__name__)


class SequenceClassifier(Strict):
    """A reward model in the usual layout: AutoModelForSequenceClassification, weights in safetensors."""

    name: Literal["sequence_classifier"] = "sequence_classifier"
    model: str
    """A local folder, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    label: Annotated[int, Field(ge=0)] | str | None = None
    """Which output is the reward, by number or name; needed where the model has several."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are held and the model is run in; only float32 gives the same reward in every batch."""
    max_length: PositiveInt | None = None
    """Tokens read at most, by default the model's context; a longer text loses its beginning, save the first token."""
    tokens_per_batch: PositiveInt = 8192
    """Tokens of one forward pass at most, padding included; changes speed and memory, not the rewards."""
    device: str | None = None
    """Torch device; by default a GPU where there is one."""


class SequenceClassifierScorer:
    """Rewards by one output of a sequence classifier; see `SequenceClassifier` for the arguments."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        label: int | str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        tokens_per_batch: int = 8192,
        device: str | None = None,
    ) -> None:
        self.model = _load_model(model, revision, dtype, device or _default_device())
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision)
        self.pad_id: int | None = self.model.config.get_text_config().pad_token_id
        self.output = _output_index(self.model, label, model)
        self.max_length = max_length or _context(self.model, self.tokenizer)
        self.tokens_per_batch = tokens_per_batch

    @torch.inference_mode()
    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """The classifier's output for each prompt with its completion, a logit (no sigmoid).

        Text is scored as prompt and completion joined without anything between; messages go through the chat
        template, and a text beside messages counts as a user's prompt or an assistant's completion.

        Args:
            prompts: The prompt of each completion.
            completions: As many as prompts.

        Returns:
            Rewards in order. The output is read at a text's last token that is not the model's padding token, as
            transformers reads it from a single unpadded text; [] for no completions.

        Raises:
            ScorerError: Messages are given, but the tokenizer has no chat template; or a text has no tokens.

        Source: ours
        """
        rows = [self._tokenize(*pair) for pair in zip(prompts, completions, strict=True)]
        cut = sum(len(row) > self.max_length for row in rows)
        if cut:
            logger.warning("%d of %d texts are cut to max_length=%d tokens", cut, len(rows), self.max_length)
        rows = [_cut(row, self.max_length) for row in rows]
        rewards = [0.0] * len(rows)
        for batch in _batches([len(row) for row in rows], self.tokens_per_batch):
            for index, reward in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                rewards[index] = reward
        return rewards

    def _tokenize(self, prompt: Text, completion: Text) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            bos = self.tokenizer.bos_token
            framed = not (bos and text.startswith(bos))
        else:
            text, framed = self._render([*_messages(prompt, "user"), *_messages(completion, "assistant")]), False
        ids: list[int] = self.tokenizer(text, add_special_tokens=framed)["input_ids"]
        if not ids:
            raise ScorerError("a prompt and its completion are both empty; there is nothing to score")
        return ids

    def _render(self, messages: Messages) -> str:
        if self.tokenizer.chat_template is None:
            raise ScorerError(
                f"{self.tokenizer.name_or_path}: the rows hold messages, but this tokenizer has no chat template; "
                "give text rows or add a chat_template.jinja to the model's folder"
            )
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def _forward(self, rows: list[list[int]]) -> list[float]:
        # transformers finds a row's last token by the padding id; without one, no row may end in the id used instead.
        pad = self.pad_id if self.pad_id is not None else _free_id(rows)
        self.model.config.get_text_config().pad_token_id = pad
        width = max(map(len, rows))
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self.model.device
        logits = self.model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        return logits[:, self.output].float().tolist()


def _load_model(model: str, revision: str | None, dtype: str, device: str) -> PreTrainedModel:
    try:
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            model, revision=revision, dtype=dtype, device_map=device, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ScorerError(f"{model}: cannot be loaded as a sequence classifier: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ScorerError(f"{model}: holds no trained reward head (its weights lack {missing}); give a reward model")
    return loaded


def _output_index(model: PreTrainedModel, label: int | str | None, name: str) -> int:
    names = {str(name): int(index) for index, name in (model.config.id2label or {}).items()}
    if label is None and len(names) == 1:
        return 0
    index = names.get(label) if isinstance(label, str) else label
    if index is None or index >= len(names):
        raise ScorerError(f"{name}: no output {label!r}; set `label` to one of {', '.join(names)}, or its number")
    return index


def _context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    # The tokenizer's figure is the usable one (RoBERTa's positions are two more than its tokens), but often not set.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return min(tokenizer.model_max_length, positions)


def _messages(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _cut(row: list[int], length: int) -> list[int]:
    """At most `length` tokens: the first, which often starts every text, and then the last ones."""
    return row if len(row) <= length else [row[0], *row[len(row) - length + 1 :]]


def _batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose rows times longest row stay within the budget; longest first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _free_id(rows: list[list[int]]) -> int:
    ends = {row[-1] for row in rows}
    return next(i for i in count() if i not in ends)


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
