"""What exported folders are read again with: its log-probabilities and a prompt's token ids, as users get them."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from align.data.schema import is_messages
from align.export.heldout import Prompt, token_logprobs
from align.export.trained import Trained
from align.model.load import auto_class
from rewards.loading import without_bars


class Engine(Protocol):
    """A program that models run in."""

    said: str
    """Its name and version."""

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        """How the export's own tokenizer and template read a prompt; None where the engine has no way to."""
        ...

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        """The log-probabilities of the tokens from place `start` on, [T - start]; nats."""
        ...


def read_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """A prompt as transformers' users give it to a model."""
    text: Any = prompt.text
    if not is_messages(text):
        return tokenizer(text)["input_ids"]
    goes_on = text[-1]["role"] == "assistant"
    if tokenizer.chat_template is None:
        return []
    found: Any = tokenizer.apply_chat_template(
        text,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        **prompt.options,
    )
    return found


class Transformers:
    """A folder that transformers loads as a user would; computed in float32 unless its weights are quantised."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        self.said = f"transformers {version('transformers')}"
        code: dict[str, Any] = {"trust_remote_code": trained.trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **code)
        self.model = self._load(folder, code).eval()

    def _load(self, folder: Path, code: dict[str, Any]) -> Any:
        config = AutoConfig.from_pretrained(folder, **code)
        with without_bars():
            return auto_class(config).from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **code)

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        return read_prompt(self.tokenizer, prompt)

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        return token_logprobs(self.model, ids, start)


class Peft(Transformers):
    """An adapter's folder, on the base that it names."""

    def _load(self, folder: Path, code: dict[str, Any]) -> Any:
        self.said = f"peft {version('peft')}"
        revision = PeftConfig.from_pretrained(str(folder)).revision
        with without_bars():
            return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, revision=revision, **code)
